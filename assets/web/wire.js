// The wire: everything this page knows of the protocol streamgen.v1 (docs/protocol.md), and nothing else.
//
// A Wire is one session. It reconnects by itself with the resume token; whoever holds it sees only
//   link     {state: "connecting" | "open" | "retrying" | "closed", message, seconds}
//   start    the session is accepted, or taken up again (detail.resumed)
//   frame    {epoch, block, number, version, media_s, slack_s, steps, dropped, flags, blob}; of H.264 sample, not blob
//   opening  what comes before the first sample of H.264: bytes
//   block    what the server says about a block of frames before they come
//   state    {state, message, place}: place, 1 is next, while the machine is full
//   shows    a prompt's first block is made: {version, media_s}
//   refused  {code, message, fatal}: an error that answers no command
//   lost     the server does not know this session any more
//   done     the stream is over
// Commands return promises, which fail with a Refusal.

const SUBPROTOCOL = "streamgen.v1";
const TOKEN_SUBPROTOCOL = "streamgen.token.";
const PATH = "v1/realtime/video";
const MAGIC = 0x52464753; // "SGFR", little-endian
const HEADER_VERSION = 1;
const MIME = { 1: "image/jpeg", 2: "image/webp" };
const H264 = 3;
const FRAME = 0;
const OPENING = 1;
const PLAYBACK_MS = 100;
const FIRST_RETRY_MS = 250;
const LAST_RETRY_MS = 5000;
const WAIT_S = 120; // for a place on a full machine
const ANSWER_MS = 15000;
// Commands whose answer is in `session.applied`; of the others it may take a block, or a pause, to come.
const NEEDS_APPLIED = new Set(["session.branch", "session.record"]);
// Refusals of a whole session that pass with time: the wire tries again.
const PASSING = new Set(["not_ready", "draining", "overload", "memory"]);

/** Bits of a frame's flags. */
export const FLAGS = { fewerSteps: 1, previewCodec: 2, repeated: 4, late: 8 };

export class Refusal extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export class Wire extends EventTarget {
  constructor({ token = "" } = {}) {
    super();
    this.token = token;
    this.asked = new Map(); // message id -> {resolve, reject, timer}
    this.counter = 0;
    this.attempt = 0;
    this.last = { number: -1, epoch: 0 };
    this.played = null;
    this.ended = false;
  }

  get open() {
    return this.socket?.readyState === WebSocket.OPEN && this.session !== undefined && !this.awaiting;
  }

  // What the page says.

  /** request: {prompt, seed, fps, steps, branch, format}; undefined fields are the server's choice. */
  start(request) {
    this.request = { type: "session.start", format: "jpeg", wait_seconds: WAIT_S, ...request };
    this.session = undefined;
    this.last = { number: -1, epoch: 0 };
    this.ended = false;
    this.connect();
  }

  /** at_s: from this media time on; else soon: at once, un-making what was not shown yet. Resolves {version, media_s, warnings}. */
  async prompt(text, { transition, blend_blocks, at_s, soon }) {
    const interaction = { event: { prompt: text }, transition, transition_chunks: blend_blocks };
    if (at_s !== undefined) interaction.at_seconds = at_s;
    else if (soon) interaction.apply_at = "playhead";
    const answer = await this.ask({ type: "session.interaction", interaction });
    return { version: answer.prompt_version, media_s: answer.media_seconds, warnings: answer.warnings ?? [] };
  }

  pause() {
    return this.ask({ type: "session.pause" });
  }

  play() {
    return this.ask({ type: "session.play" });
  }

  /** From there on all is made again, in the next epoch; prompts that come later hold again. */
  seek(media_s) {
    return this.ask({ type: "session.seek", position_seconds: media_s });
  }

  /** Resolves {branch, media_s}; the name is for `start`. */
  async branch() {
    const answer = await this.ask({ type: "session.branch" });
    return { branch: answer.branch, media_s: answer.media_seconds };
  }

  /** null: the server's choice. */
  steps(count) {
    return this.ask({ type: "session.steps", steps: count });
  }

  record(format) {
    return this.ask({ type: "session.record", action: "start", format });
  }

  /** Resolves the recording as a Blob. */
  async recorded() {
    const { url } = await this.ask({ type: "session.record", action: "stop" }, 60000);
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    const answer = await fetch(new URL(url, document.baseURI), { headers });
    if (!answer.ok) throw new Refusal("internal", `the recording did not come: ${answer.status} ${answer.statusText}`);
    return answer.blob();
  }

  /** What is on the screen now; goes out about ten times a second at most. */
  playback(media_s) {
    const now = performance.now();
    if (!this.open || now - (this.played ?? 0) < PLAYBACK_MS) return;
    this.played = now;
    const message = { type: "session.playback", position_seconds: Math.max(0, media_s) };
    if (this.last.number >= 0) message.received_frame = this.last.number;
    this.send(message);
  }

  /** End the session for good. */
  stop() {
    this.ended = true;
    clearTimeout(this.retry);
    if (this.open) this.send({ type: "session.stop" });
    this.fail(new Refusal("closed", "the stream was closed"));
    this.socket?.close(1000);
    this.tell("link", { state: "closed", message: "closed" });
  }

  // The connection.

  connect() {
    clearTimeout(this.retry);
    this.tell("link", { state: "connecting", message: this.session ? "reconnecting" : "connecting" });
    const url = new URL(PATH, document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const protocols = this.token ? [SUBPROTOCOL, TOKEN_SUBPROTOCOL + this.token] : [SUBPROTOCOL];
    const socket = new WebSocket(url, protocols);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.awaiting = true;
    this.refusal = null;
    socket.onopen = () => this.send(this.session ? this.resumption() : this.request);
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      if (typeof data === "string") this.hear(JSON.parse(data));
      else this.see(data);
    };
    socket.onclose = ({ code }) => {
      if (socket === this.socket) this.dropped(code);
    };
  }

  resumption() {
    const { number, epoch } = this.last;
    const { format } = this.request;
    return { type: "session.resume", resume_token: this.session.resume_token, last_frame: number, epoch, format };
  }

  /** Go on in another format, with the frame behind this one. */
  change(format, last) {
    this.request.format = format;
    this.last = last;
    if (this.session) this.socket?.close(1000);
    if (this.session) this.connect();
  }

  dropped(code) {
    this.fail(new Refusal("lost", "the connection was lost"));
    const { refusal } = this;
    if (this.ended) return;
    if (refusal?.code === "unknown_session") {
      this.session = undefined;
      this.tell("lost", refusal);
      return;
    }
    if (code === 1000 || (refusal && !PASSING.has(refusal.code))) {
      this.ended = true;
      this.tell("link", { state: "closed", message: refusal?.message ?? "the stream is over" });
      return;
    }
    const grown = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** this.attempt++);
    const asked = (refusal?.retry_after_seconds ?? this.drain ?? 0) * 1000;
    const wait = Math.max(grown * (0.75 + Math.random() / 2), asked);
    this.drain = undefined;
    const why = refusal?.message ?? "connection lost";
    this.tell("link", { state: "retrying", message: why, seconds: wait / 1000 });
    this.retry = setTimeout(() => this.connect(), wait);
    addEventListener("online", () => this.hurry(), { once: true });
  }

  /** Try now instead of later. */
  hurry() {
    if (this.socket?.readyState === WebSocket.CLOSED && !this.ended && this.retry) this.connect();
  }

  // What the server says.

  hear(message) {
    switch (message.type) {
      case "video.start":
        return this.started(message);
      case "video.chunk_metadata":
        return this.tell("block", message);
      case "session.received":
        return NEEDS_APPLIED.has(message.command) ? undefined : this.answered(message);
      case "session.interaction.queued":
      case "session.applied":
      case "session.pong":
        return this.answered(message);
      case "session.interaction.applied":
        return this.tell("shows", { version: message.prompt_version, media_s: message.media_seconds });
      case "session.state":
        this.drain = message.retry_after_seconds ?? undefined;
        return this.tell("state", message);
      case "session.done":
        this.ended = true;
        this.tell("done", message);
        return this.tell("link", { state: "closed", message: "the stream is over" });
      case "error":
        return this.refused(message);
    }
  }

  started(message) {
    const resumed = this.session !== undefined;
    this.session = message;
    this.awaiting = false;
    this.attempt = 0;
    if (!resumed) this.last = { number: message.next_frame - 1, epoch: message.epoch };
    this.tell("start", { ...message, resumed });
    this.tell("link", { state: "open", message: "connected" });
  }

  refused(message) {
    if (message.fatal) this.refusal = message;
    const asked = this.asked.get(message.id);
    if (asked) this.settle(message.id, () => asked.reject(new Refusal(message.code, message.message)));
    else if (message.code === "unknown_session" || (message.fatal && PASSING.has(message.code))) return;
    else this.tell("refused", message);
  }

  see(buffer) {
    const view = new DataView(buffer);
    if (view.getUint32(0, true) !== MAGIC || view.getUint16(4, true) !== HEADER_VERSION) {
      throw new Error("a binary message that is no frame of streamgen.v1");
    }
    const size = view.getUint16(6, true);
    const encoding = view.getUint8(61);
    const kind = view.getUint8(62);
    const bytes = new Uint8Array(buffer, size, view.getUint32(64, true));
    if (kind === OPENING) return this.tell("opening", bytes);
    if (kind !== FRAME || !(MIME[encoding] || encoding === H264)) return;
    const frame = {
      epoch: view.getUint32(8, true),
      block: view.getUint32(12, true),
      number: view.getUint32(16, true),
      version: view.getUint32(20, true),
      media_s: view.getFloat64(24, true),
      slack_s: view.getFloat32(48, true),
      steps: view.getUint16(52, true),
      dropped: view.getUint16(54, true),
      flags: view.getUint8(60),
    };
    if (encoding === H264) frame.sample = bytes;
    else frame.blob = new Blob([bytes], { type: MIME[encoding] });
    this.last = { number: frame.number, epoch: frame.epoch };
    this.tell("frame", frame);
  }

  // Questions and answers.

  send(message) {
    this.socket.send(JSON.stringify(message));
  }

  ask(message, wait_ms = ANSWER_MS) {
    if (!this.open) return Promise.reject(new Refusal("lost", "not connected"));
    const id = `c${++this.counter}`;
    this.send({ ...message, id });
    return new Promise((resolve, reject) => {
      const late = () => this.settle(id, () => reject(new Refusal("late", "the server did not answer")));
      this.asked.set(id, { resolve, reject, timer: setTimeout(late, wait_ms) });
    });
  }

  answered(message) {
    const asked = this.asked.get(message.id);
    if (asked) this.settle(message.id, () => asked.resolve(message));
  }

  settle(id, how) {
    clearTimeout(this.asked.get(id)?.timer);
    this.asked.delete(id);
    how();
  }

  fail(error) {
    for (const [id, { reject }] of [...this.asked]) this.settle(id, () => reject(error));
  }

  tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
