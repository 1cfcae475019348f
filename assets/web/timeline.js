// The timeline: what was made, what is on the screen, and prompts ahead that can be dragged.
//
// Ahead prompts are buttons: drag them, or move them by the arrow keys, Delete removes. The track itself is a slider
// that looks back through the pictures held.

import { SWATCHES, wordsIn } from "./words.js";

const SPAN_S = { wide: 24, narrow: 12 };
const NOW_AT = 0.5; // place of the present in the span, once it moves
const BIG_STEP_S = 1;

export class Timeline {
  /** actions: {pick(text), moved()}; root holds the elements of index.html's timeline. */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.track = root.querySelector(".track");
    this.ruler = root.querySelector(".ruler");
    this.ahead = root.querySelector(".made-ahead");
    this.head = root.querySelector(".playhead");
    this.elements = new Map(); // prompt -> element
    this.stream = null;
    this.start_s = 0;
    this.span_s = SPAN_S.wide;
    this.track.addEventListener("pointerdown", (event) => this.scrub(event));
    this.track.addEventListener("pointermove", (event) => event.buttons && this.scrub(event));
    this.track.addEventListener("keydown", (event) => this.key(event));
    this.track.addEventListener("dblclick", (event) => actions.plan(this.timeAt(event.clientX)));
  }

  show(stream) {
    this.stream = stream;
    for (const element of this.elements.values()) element.remove();
    this.elements.clear();
    this.drawn = "";
    this.draw();
  }

  x(media_s) {
    return ((media_s - this.start_s) / this.span_s) * this.width;
  }

  timeAt(clientX) {
    const { left } = this.track.getBoundingClientRect();
    return this.start_s + ((clientX - left) / this.width) * this.span_s;
  }

  // What fingers and keys do.

  scrub(event) {
    const { stream } = this;
    if (!stream || stream.player.empty || event.target.closest(".mark")) return;
    const at_s = this.timeAt(event.clientX);
    if (at_s > stream.player.end_s) return;
    this.track.setPointerCapture?.(event.pointerId);
    stream.look(at_s);
  }

  key(event) {
    const { stream } = this;
    if (!stream || event.target !== this.track || event.ctrlKey || event.metaKey || event.altKey) return;
    const { player } = stream;
    const frames = event.shiftKey ? Math.round(BIG_STEP_S * player.fps) : 1;
    const moves = {
      ArrowLeft: () => stream.step(-frames),
      ArrowDown: () => stream.step(-frames),
      ArrowRight: () => stream.step(frames),
      ArrowUp: () => stream.step(frames),
      PageDown: () => stream.step(-Math.round(player.fps)),
      PageUp: () => stream.step(Math.round(player.fps)),
      Home: () => stream.look(0),
      End: () => stream.look(Infinity),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  }

  // Prompts.

  element(prompt) {
    const known = this.elements.get(prompt);
    if (known) return known;
    const mark = document.createElement("button");
    mark.type = "button";
    mark.className = "mark";
    const words = wordsIn(prompt.text);
    mark.style.setProperty("--hue", SWATCHES[words.color] ?? "var(--quiet)");
    const text = document.createElement("span");
    text.textContent = prompt.text;
    mark.append(text);
    mark.title = prompt.text;
    mark.addEventListener("pointerdown", (event) => this.grab(event, prompt, mark));
    mark.addEventListener("keydown", (event) => this.nudge(event, prompt));
    mark.addEventListener("click", () => this.actions.pick(prompt));
    this.track.append(mark);
    this.elements.set(prompt, mark);
    return mark;
  }

  grab(event, prompt, mark) {
    if (prompt.stage !== "planned") return;
    event.preventDefault();
    mark.focus();
    mark.setPointerCapture(event.pointerId);
    const offset = this.timeAt(event.clientX) - prompt.at_s;
    const move = ({ clientX }) => prompt.stage === "planned" && this.stream.move(prompt, this.timeAt(clientX) - offset);
    const drop = () => {
      mark.removeEventListener("pointermove", move);
      mark.classList.remove("held");
      this.actions.moved(prompt);
    };
    mark.classList.add("held");
    mark.addEventListener("pointermove", move);
    mark.addEventListener("pointerup", drop, { once: true });
    mark.addEventListener("pointercancel", drop, { once: true });
  }

  nudge(event, prompt) {
    if (prompt.stage !== "planned") return;
    const step = event.shiftKey ? BIG_STEP_S : 0.25;
    const by = { ArrowLeft: -step, ArrowRight: step }[event.key];
    if (by) this.stream.move(prompt, prompt.at_s + by);
    else if (event.key === "Delete" || event.key === "Backspace") this.stream.remove(prompt);
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (by) this.actions.moved(prompt);
    else this.track.focus();
  }

  // Drawing, on every animation frame; cheap where nothing moved.

  draw() {
    const { stream } = this;
    this.width = this.track.clientWidth;
    if (!stream || !this.width) return;
    const { player } = stream;
    const now_s = player.empty ? 0 : Math.max(0, player.shown) / player.fps;
    this.span_s = this.width < 520 ? SPAN_S.narrow : SPAN_S.wide;
    this.start_s = Math.max(0, now_s - NOW_AT * this.span_s);
    this.drawMarks(stream);
    const [end, now] = [this.x(player.end_s), this.x(now_s)];
    this.ahead.style.transform = `translateX(${now}px)`;
    this.ahead.style.width = `${Math.max(0, end - now)}px`;
    this.head.style.transform = `translateX(${now}px)`;
    this.drawRuler();
    this.describe(now_s);
  }

  drawMarks(stream) {
    const prompts = new Set(stream.prompts);
    for (const [prompt, element] of this.elements) {
      if (prompts.has(prompt)) continue;
      element.remove();
      this.elements.delete(prompt);
    }
    stream.prompts.forEach((prompt, i) => {
      const next = stream.prompts[i + 1];
      const mark = this.element(prompt);
      const [from, to] = [this.x(prompt.at_s), next ? this.x(next.at_s) : this.width + 40];
      const seen = to > 0 && from < this.width;
      mark.hidden = !seen;
      if (!seen) return;
      const left = Math.max(from, -2);
      mark.style.transform = `translateX(${left}px)`;
      mark.style.width = `${Math.max(10, Math.min(to, this.width) - left - 2)}px`;
      mark.dataset.stage = prompt.stage;
      const ahead = prompt.stage === "planned" ? "planned; arrow keys move it, Delete removes it" : "";
      mark.setAttribute("aria-label", `${prompt.text}, from ${prompt.at_s.toFixed(2)} s${ahead && `, ${ahead}`}`);
    });
  }

  drawRuler() {
    const key = `${this.start_s.toFixed(3)} ${this.width}`;
    if (key === this.drawn) return;
    this.drawn = key;
    const ratio = devicePixelRatio || 1;
    const { ruler } = this;
    const height = ruler.clientHeight;
    ruler.width = this.width * ratio;
    ruler.height = height * ratio;
    const context = ruler.getContext("2d");
    const style = getComputedStyle(ruler);
    context.scale(ratio, ratio);
    context.font = `11px ${style.fontFamily}`;
    context.fillStyle = context.strokeStyle = style.color;
    context.lineWidth = 1;
    context.beginPath();
    for (let s = Math.ceil(this.start_s); s <= this.start_s + this.span_s; s++) {
      const x = Math.round(this.x(s)) + 0.5;
      const labelled = s % (this.width / this.span_s < 24 ? 5 : 2) === 0;
      context.moveTo(x, height);
      context.lineTo(x, height - (labelled ? 7 : 4));
      if (labelled) context.fillText(`${s} s`, x + 3, height - 4);
    }
    context.stroke();
  }

  describe(now_s) {
    const text = `${now_s.toFixed(1)} seconds`;
    if (this.track.getAttribute("aria-valuetext") === text) return;
    this.track.setAttribute("aria-valuemin", (this.stream.player.oldest / this.stream.player.fps).toFixed(1));
    this.track.setAttribute("aria-valuemax", this.stream.player.end_s.toFixed(1));
    this.track.setAttribute("aria-valuenow", now_s.toFixed(1));
    this.track.setAttribute("aria-valuetext", text);
  }
}
