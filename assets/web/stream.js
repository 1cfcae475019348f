// One stream: its wire, its player, its prompts over time, and the figures about it. No page elements but the canvas.
//
// Prompts that lie ahead are kept here, where they can be dragged, and go to the server shortly before their time:
// a sent prompt cannot be moved any more.

import { Decoder } from "./h264.js";
import { Player } from "./player.js";
import { Wire } from "./wire.js";

const SEND_AHEAD_S = 2.25; // beyond the frames that came: blocks that have begun may be among them
const RESUME_BELOW_S = 2; // of video waiting: then the server may go on
const SAMPLES_S = 60;
const TIMER_MS = 100;

export class Stream extends EventTarget {
  constructor(name, canvas, settings) {
    super();
    this.name = name;
    this.settings = settings; // {seed, fps, steps, token, format}
    this.player = new Player(canvas);
    this.state = "idle"; // idle connecting warming playing paused waiting retrying over failed
    this.message = "";
    this.prompts = []; // {at_s, text, transition, blend_blocks, stage: planned | sent | shown, version?}
    this.samples = []; // {media_s, slack_s, steps, flags} of each block
    this.shownAt = []; // times of the last pictures
    this.late = 0;
    this.dropped = 0;
    this.farthest = -1; // newest frame that was on the screen
    this.first = 0; // number of the session's own first frame; a branch has its source's pictures before it
    this.change = null; // the last change of prompt and when its three answers came
    this.serverPaused = false;
    this.timer = setInterval(() => this.beat(), TIMER_MS);
    this.player.addEventListener("shown", ({ detail }) => this.pictured(detail));
    this.player.addEventListener("waiting", () => this.link === "open" && this.is("waiting"));
    this.player.addEventListener("resumed", () => this.link === "open" && this.is("playing"));
  }

  // Beginning and end.

  /** Start from prompts [{at_s, text, transition, blend_blocks}], the first at 0. */
  start(prompts) {
    this.wire?.stop();
    this.player.clear();
    this.samples = [];
    this.late = this.dropped = 0;
    this.change = null;
    this.serverPaused = false;
    this.farthest = -1;
    this.first_ms = undefined;
    this.prompts = prompts.map(({ at_s, text, transition, blend_blocks }, i) => {
      return { at_s, text, transition, blend_blocks, stage: i ? "planned" : "shown" };
    });
    this.began_ms = performance.now();
    this.open();
    const { seed, fps, steps, format } = this.settings;
    this.wire.start({ prompt: prompts[0].text, seed, fps, steps: steps ?? undefined, format });
    this.player.play();
  }

  /** A second stream that goes on from where this one is; it has this one's past. */
  async branch(twin) {
    const { branch, media_s } = await this.wire.branch();
    twin.player.fps = this.player.fps;
    for (const frame of [...this.player.frames.values()]) {
      if (frame.media_s >= media_s) continue;
      const image = frame.image && (await createImageBitmap(frame.image)); // each player closes its own
      twin.player.add({ ...frame, image, epoch: 0 });
    }
    twin.prompts = this.prompts.filter((p) => p.stage !== "planned").map((p) => ({ ...p, stage: "shown" }));
    twin.samples = this.samples.filter((s) => s.media_s < media_s);
    twin.farthest = this.player.shown;
    twin.began_ms = performance.now();
    twin.open();
    const { steps, format } = this.settings;
    twin.settings.format = format;
    twin.wire.start({ branch, steps: steps ?? undefined, fps: this.player.fps, format });
    twin.player.jump(this.player.now());
    twin.player.play();
  }

  close() {
    clearInterval(this.timer);
    this.wire?.stop();
    this.decoder?.close();
    this.player.close();
  }

  open() {
    const wire = new Wire({ token: this.settings.token });
    this.wire = wire;
    const on = (name, act) => wire.addEventListener(name, ({ detail }) => wire === this.wire && act(detail));
    on("link", (link) => this.linked(link));
    on("start", (start) => this.started(start));
    on("frame", (frame) => this.framed(frame));
    on("opening", (bytes) => this.decoder.open(bytes));
    this.decoder?.close();
    this.given = { number: -1, epoch: 0 }; // the last frame that was decoded
    this.decoder = new Decoder(
      (frame, image) => {
        if (wire !== this.wire) return image.close();
        this.given = frame;
        this.player.add({ ...frame, image });
      },
      () => wire === this.wire && this.fallBack(),
    );
    on("shows", (shows) => this.applied(shows));
    on("refused", ({ message, fatal }) => this.tell(fatal ? "failed" : "trouble", message));
    on("lost", () => this.again());
    on("done", () => this.is("over"));
    on("state", ({ state, message, place }) => {
      if (place) return this.is("queued", place === 1 ? "next" : `place ${place}`);
      if (state === "warming" || state === "queued") this.is(state);
      if (message) this.tell("trouble", message);
    });
  }

  linked({ state, message, seconds }) {
    this.link = state;
    if (state === "connecting") this.is(this.player.empty ? "connecting" : "retrying", message);
    if (state === "retrying") {
      const when = seconds >= 1 ? `; again in ${Math.round(seconds)} s` : "";
      this.is(this.player.empty ? "connecting" : "retrying", message + when);
    }
    if (state === "closed" && this.state !== "over") this.is("failed", message);
  }

  started(start) {
    this.config = start.config;
    if (!start.resumed) {
      this.player.fps = start.config.fps;
      this.first = start.next_frame;
      this.settings.seed = start.config.seed;
    }
    this.note(start.prompt_version, start.prompt, start.next_frame / start.config.fps);
    this.serverPaused = start.state === "paused";
    if (start.resumed && this.player.running === this.serverPaused) this.serve(this.player.running);
    this.is(this.player.running ? (this.player.empty ? "warming" : "playing") : "paused");
    if (start.resumed) this.tell("notice", "Reconnected; nothing was lost.");
    else if (start.warnings?.length) this.tell("trouble", start.warnings.join("; "));
  }

  /** The server forgot this session: the same prompts, from the start. */
  again() {
    const now_s = this.player.now();
    const current = this.promptAt(now_s);
    this.tell("trouble", "The server does not know this stream any more; it starts again.");
    const ahead = this.prompts.filter((p) => p.at_s > now_s).map((p) => ({ ...p, at_s: p.at_s - now_s }));
    this.start([{ ...current, at_s: 0 }, ...ahead]);
  }

  // Frames.

  framed(frame) {
    const newest = this.samples.at(-1);
    if (!newest || newest.block !== frame.block || newest.epoch !== frame.epoch) this.sample(frame);
    this.dropped += frame.dropped;
    if (frame.sample) this.decoder.add({ ...frame, sample: undefined }, frame.sample);
    else this.player.add(frame);
    if (this.first_ms === undefined) this.first_ms = performance.now() - this.began_ms;
  }

  /** This browser does not decode what comes: pictures one by one from here. */
  fallBack() {
    if (this.settings.format === "jpeg") return;
    this.settings.format = "jpeg";
    this.tell("trouble", "This browser cannot decode the H.264 video; it goes on with JPEG.");
    this.wire.change("jpeg", { number: this.given.number, epoch: this.given.epoch });
  }

  sample({ epoch, block, media_s, slack_s, steps, flags }) {
    this.samples = this.samples.filter((s) => s.media_s < media_s && s.media_s > media_s - SAMPLES_S);
    this.samples.push({ epoch, block, media_s, slack_s, steps, flags });
    if (slack_s < 0) this.late++;
  }

  pictured(frame) {
    const now = performance.now();
    this.shownAt.push(now);
    while (this.shownAt[0] < now - 2000) this.shownAt.shift();
    const { change } = this;
    if (change?.version !== undefined && change.shown_ms === undefined && frame.version >= change.version) {
      change.shown_ms = now - change.began_ms;
      this.tell("notice", `On screen: ${change.text}`);
    }
    if (this.player.running && !this.player.waiting && this.link === "open") this.is("playing");
    this.farthest = Math.max(this.farthest, frame.number);
    this.dispatchEvent(new Event("shown"));
  }

  /** Pictures per second on the screen. */
  get rate() {
    const { shownAt } = this;
    if (shownAt.length < 2 || performance.now() - shownAt.at(-1) > 1000) return 0;
    return (1000 * (shownAt.length - 1)) / (shownAt.at(-1) - shownAt[0]);
  }

  get lead_s() {
    return Math.max(0, this.player.end_s - this.player.now());
  }

  beat() {
    const { player, wire } = this;
    player.advance();
    if (!wire || player.empty) return;
    if (this.farthest >= this.first) wire.playback(this.farthest / player.fps); // a look back is nothing to the server
    if (player.running && this.serverPaused && this.lead_s < RESUME_BELOW_S) this.serve(true);
    for (const prompt of this.prompts) {
      if (prompt.stage === "planned" && prompt.at_s < player.end_s + SEND_AHEAD_S && wire.open) this.deliver(prompt);
    }
  }

  // Pause and time.

  async serve(playing) {
    if (this.serverPaused !== playing) return;
    this.serverPaused = !playing;
    if (this.wire?.open) await this.said(playing ? this.wire.play() : this.wire.pause());
  }

  pause() {
    this.player.pause();
    this.serve(false);
    this.is("paused");
  }

  play() {
    this.player.play();
    if (this.lead_s < RESUME_BELOW_S) this.serve(true);
    this.is("playing");
  }

  /** Look back without the server; stands still afterwards. */
  step(frames) {
    if (this.player.running) this.pause();
    this.player.step(frames);
  }

  look(media_s) {
    if (this.player.running) this.pause();
    this.player.jump(media_s);
  }

  /** Whether the picture stands where other pictures followed already. */
  get isPast() {
    return this.player.shown >= 0 && this.player.shown < this.farthest;
  }

  /** Make everything anew from the picture on the screen, with a new text if one is given. */
  async remake(text, manner) {
    const { player, wire } = this;
    const here = Math.max(0, player.shown);
    if (here < this.first) {
      const begins = (this.first / player.fps).toFixed(1);
      throw new Error(`this branch begins at ${begins} s: what was before can be watched, not changed`);
    }
    const [epoch, held_s] = [player.epoch, player.end_s];
    player.epoch++; // what is under way is void
    player.dropFrom(here + 1);
    this.farthest = here;
    this.samples = this.samples.filter((s) => s.media_s < here / player.fps);
    for (const prompt of this.prompts) {
      if (prompt.stage === "shown" && prompt.at_s > here / player.fps) prompt.stage = "sent";
    }
    player.jump(here / player.fps);
    try {
      const sought = wire.seek(here / player.fps);
      const changed = text === undefined ? undefined : this.prompt(text, { ...manner, soon: false });
      player.play();
      await Promise.all([sought, changed, this.serve(true)]);
    } catch (error) {
      if (player.end_s < held_s && player.epoch === epoch + 1) player.epoch = epoch;
      throw error;
    }
  }

  // Prompts.

  /** Let a text take over as soon as it can. */
  async prompt(text, { transition, blend_blocks, soon }) {
    const entry = { text, transition, blend_blocks, stage: "sent", at_s: this.player.end_s };
    const change = { text, entry, began_ms: performance.now() };
    this.change = change;
    const unseen = soon && this.farthest >= this.first; // else there is nothing to take back
    const answer = await this.wire.prompt(text, { transition, blend_blocks, soon: unseen });
    const { version, media_s, warnings } = answer;
    if (warnings.length) this.tell("trouble", warnings.join("; "));
    change.version = version;
    change.received_ms = performance.now() - change.began_ms;
    // what was to come among the frames that are given up
    const void_s = this.player.end_s;
    this.prompts = this.prompts.filter((p) => p.stage === "planned" || p.at_s < media_s || p.at_s >= void_s || !p.at_s);
    Object.assign(entry, { version, at_s: media_s });
    this.insert(entry);
  }

  plan(text, at_s, { transition, blend_blocks }) {
    this.insert({ text, at_s, transition, blend_blocks, stage: "planned" });
  }

  insert(entry) {
    // of two prompts for one block the later holds
    this.prompts = this.prompts.filter((p) => p.stage === "planned" || Math.abs(p.at_s - entry.at_s) > 1e-3);
    this.prompts.push(entry);
    this.prompts.sort((a, b) => a.at_s - b.at_s);
    this.dispatchEvent(new Event("prompts"));
  }

  move(entry, at_s) {
    entry.at_s = Math.max(at_s, this.earliest_s);
    this.prompts.sort((a, b) => a.at_s - b.at_s);
    this.dispatchEvent(new Event("prompts"));
  }

  remove(entry) {
    this.prompts = this.prompts.filter((p) => p !== entry);
    this.dispatchEvent(new Event("prompts"));
  }

  /** The earliest time that a prompt can be planned for. */
  get earliest_s() {
    return this.player.end_s + SEND_AHEAD_S;
  }

  async deliver(entry) {
    entry.stage = "sent";
    const { text, transition, blend_blocks, at_s } = entry;
    const answer = await this.said(this.wire.prompt(text, { transition, blend_blocks, at_s }));
    if (answer) Object.assign(entry, { version: answer.version, at_s: answer.media_s });
    else this.prompts = this.prompts.filter((p) => p !== entry);
    this.dispatchEvent(new Event("prompts"));
  }

  applied({ version, media_s }) {
    const entry = this.prompts.find((p) => p.version === version);
    if (entry) Object.assign(entry, { stage: "shown", at_s: media_s });
    const { change } = this;
    if (change?.version === version) change.applied_ms = performance.now() - change.began_ms;
    this.prompts.sort((a, b) => a.at_s - b.at_s);
    this.dispatchEvent(new Event("prompts"));
  }

  /** Make sure that the prompt which holds at the start (or a resume) is on the timeline. */
  note(version, text, at_s) {
    const known = this.prompts.find((p) => p.version === version) ?? this.prompts.find((p) => p.text === text && p.stage !== "planned");
    if (known) known.version ??= version;
    else this.insert({ version, text, at_s, transition: "recache", blend_blocks: 4, stage: "shown" });
  }

  promptAt(media_s) {
    const before = this.prompts.filter((p) => p.at_s <= media_s + 1e-6 && p.stage !== "planned");
    return before.at(-1) ?? this.prompts[0];
  }

  async setSteps(steps) {
    this.settings.steps = steps;
    if (this.wire?.open) await this.said(this.wire.steps(steps));
  }

  // News.

  /** The answer, or undefined after saying why there is none. */
  async said(promise) {
    try {
      return await promise;
    } catch (error) {
      if (error.code !== "lost" && error.code !== "closed") this.tell("trouble", error.message);
      return undefined;
    }
  }

  is(state, message = "") {
    if (state === this.state && message === this.message) return;
    this.state = state;
    this.message = message;
    this.dispatchEvent(new Event("state"));
  }

  tell(name, message) {
    this.dispatchEvent(new CustomEvent(name, { detail: message }));
  }
}
