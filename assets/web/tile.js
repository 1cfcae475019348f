// The picture of one stream, with its name, its prompt and its state.

export const STATES = {
  idle: "Ready",
  connecting: "Connecting",
  queued: "In the queue",
  warming: "Making the first frames",
  playing: "Playing",
  paused: "Paused",
  waiting: "Waiting for frames",
  retrying: "Reconnecting",
  over: "Ended",
  failed: "Stopped",
};

export class Tile {
  /** actions: {choose(), close(), start()} */
  constructor(name, actions) {
    this.root = document.createElement("figure");
    this.root.className = "tile";
    this.root.tabIndex = 0;
    this.root.dataset.name = name;
    this.canvas = document.createElement("canvas");
    this.canvas.width = this.canvas.height = 64;
    this.canvas.setAttribute("role", "img");
    this.frame = document.createElement("div");
    this.frame.className = "picture";
    this.veil = document.createElement("button");
    this.veil.type = "button";
    this.veil.className = "veil";
    this.veil.innerHTML = '<svg aria-hidden="true"><use href="#i-play"/></svg>';
    this.veil.setAttribute("aria-label", `Play stream ${name}`);
    this.frame.append(this.canvas, this.veil);
    this.caption = document.createElement("figcaption");
    this.label = Object.assign(document.createElement("b"), { textContent: name });
    this.text = document.createElement("span");
    this.text.className = "prompt-now";
    this.status = document.createElement("span");
    this.status.className = "status";
    this.shut = Object.assign(document.createElement("button"), { type: "button", className: "shut", textContent: "×" });
    this.shut.setAttribute("aria-label", `Close stream ${name}`);
    this.caption.append(this.label, this.text, this.status, this.shut);
    this.root.append(this.frame, this.caption);
    this.root.addEventListener("pointerdown", actions.choose);
    this.root.addEventListener("focusin", actions.choose);
    this.shut.addEventListener("click", actions.close);
    this.veil.addEventListener("click", actions.start);
  }

  /** Follow a stream. */
  follow(stream) {
    this.stream = stream;
    const update = () => this.update();
    stream.addEventListener("state", update);
    stream.addEventListener("shown", update);
    stream.addEventListener("prompts", update);
    this.update();
  }

  update() {
    const { stream } = this;
    const shown = stream.player.drawn;
    const entry = shown && stream.prompts.find((p) => p.version === shown.version);
    const text = shown ? (entry ?? stream.promptAt(shown.media_s))?.text ?? "" : "";
    if (this.text.textContent !== text) {
      this.text.textContent = text;
      this.canvas.setAttribute("aria-label", text ? `Video: ${text}` : "No video yet");
    }
    const status = stream.state === "playing" ? "" : STATES[stream.state];
    if (this.status.textContent !== status) this.status.textContent = status;
    this.root.dataset.state = stream.state;
    this.veil.hidden = stream.state !== "idle" && stream.state !== "over" && stream.state !== "failed";
  }
}
