// Frames by their number, a media clock, and the canvas that shows them.
//
// Media time is frame number / fps. While the player runs, the clock runs with the wall; where the next frame is not
// there yet the clock stands ("waiting") and goes on from the same frame: late video is never skipped. Frames that
// were shown stay, compressed, for HISTORY_S, so that one can step back without asking the server. Frames of H.264 cannot
// be decoded one by one: they come decoded (`image`), and stay as long as HISTORY_BYTES hold them.

const HISTORY_S = 120;
const HISTORY_BYTES = 256e6;
const DECODE_AHEAD = 24; // pictures held decoded before their time

export class Player extends EventTarget {
  constructor(canvas) {
    super();
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.fps = 16;
    this.clear();
    this.tick = this.tick.bind(this);
    requestAnimationFrame(this.tick);
  }

  /** Forget everything; the canvas keeps its last picture. */
  clear() {
    for (const picture of this.pictures?.values() ?? []) picture.then((image) => image?.close?.());
    for (const frame of this.frames?.values() ?? []) frame.image?.close();
    this.frames = new Map(); // number -> frame as it came, compressed
    this.pictures = new Map(); // number -> Promise<ImageBitmap>
    this.ready = new Map(); // number -> ImageBitmap
    this.epoch = 0;
    this.oldest = 0;
    this.end = 0; // number after the last frame held
    this.shown = -1; // number on the screen
    this.drawn = null; // the frame on the screen
    this.running = false;
    this.waiting = false;
    this.position_s = 0; // where the clock stands when it does not run
    this.anchor_ms = 0;
  }

  get empty() {
    return this.end === 0;
  }

  /** Media time now, in seconds. */
  now() {
    if (!this.running || this.waiting) return this.position_s;
    return this.position_s + (performance.now() - this.anchor_ms) / 1000;
  }

  /** Media time at which the frames held end. */
  get end_s() {
    return this.end / this.fps;
  }

  /** Add one frame {epoch, number, blob, ...}. A newer epoch replaces all from its first frame on. */
  add(frame) {
    if (frame.epoch < this.epoch) return;
    if (frame.epoch > this.epoch) {
      this.epoch = frame.epoch;
      this.dropFrom(frame.number);
    }
    if (this.empty || frame.number < this.oldest) {
      this.oldest = frame.number;
      if (this.empty) {
        this.position_s = frame.number / this.fps;
        this.anchor_ms = performance.now();
      }
    }
    this.frames.get(frame.number)?.image?.close();
    this.frames.set(frame.number, frame);
    this.end = Math.max(this.end, frame.number + 1);
    if (frame.number <= this.shown + DECODE_AHEAD) this.decode(frame.number);
  }

  /** Drop all frames from this number on: they will be made anew. */
  dropFrom(number) {
    for (let n = Math.max(number, this.oldest); n < this.end; n++) this.forget(n);
    this.end = Math.min(this.end, Math.max(number, this.oldest));
    if (this.shown >= number) this.shown = number - 1;
  }

  forget(number) {
    this.frames.get(number)?.image?.close();
    this.frames.delete(number);
    this.release(number);
  }

  release(number) {
    this.ready.get(number)?.close();
    this.ready.delete(number);
    this.pictures.delete(number);
  }

  /** The picture of a frame, decoded once; null where there is none. */
  decode(number) {
    if (this.pictures.has(number)) return this.pictures.get(number);
    const frame = this.frames.get(number);
    if (!frame) return Promise.resolve(null);
    const picture = createImageBitmap(frame.image ?? frame.blob).then(
      (image) => {
        if (this.frames.get(number) !== frame) return image.close(); // replaced meanwhile
        this.ready.set(number, image);
        return image;
      },
      () => {
        if (this.frames.get(number) === frame) this.ready.set(number, null); // broken: skipped when its time comes
        return null;
      },
    );
    this.pictures.set(number, picture);
    return picture;
  }

  play() {
    if (this.running) return;
    this.running = true;
    this.waiting = false;
    this.anchor_ms = performance.now();
  }

  pause() {
    this.position_s = Math.min(this.now(), Math.max(0, this.end_s - 0.5 / this.fps));
    this.running = false;
    this.waiting = false;
  }

  /** Put the clock somewhere among the frames held. */
  jump(media_s) {
    const last_s = Math.max(this.oldest, this.end - 1) / this.fps;
    this.position_s = Math.min(Math.max(media_s, this.oldest / this.fps), last_s);
    this.anchor_ms = performance.now();
    this.waiting = false;
    this.shown = -1; // draw again, also the same number
  }

  step(frames) {
    const here = this.numberAt(this.now());
    if (this.running) this.pause();
    this.jump((here + frames + 0.5) / this.fps);
  }

  numberAt(media_s) {
    return Math.floor(media_s * this.fps + 1e-6);
  }

  /** Bring clock and canvas up to date. Also called by a timer, because hidden pages get no animation frames. */
  advance() {
    if (this.empty) return;
    let wanted = this.numberAt(this.now());
    if (this.running && wanted >= this.end) {
      this.wait();
      wanted = this.end - 1;
    } else if (this.waiting && this.end > this.numberAt(this.position_s)) {
      this.waiting = false;
      this.anchor_ms = performance.now();
      this.dispatchEvent(new Event("resumed"));
    }
    wanted = Math.max(wanted, this.oldest);
    if (wanted === this.shown) return;
    for (let n = wanted; n < Math.min(wanted + DECODE_AHEAD, this.end); n++) this.decode(n);
    if (!this.ready.has(wanted)) return; // on the next animation frame
    this.draw(wanted);
  }

  wait() {
    if (this.waiting) return;
    this.position_s = this.end_s;
    this.waiting = true;
    this.dispatchEvent(new Event("waiting"));
  }

  draw(number) {
    const image = this.ready.get(number);
    if (image) {
      if (this.canvas.width !== image.width || this.canvas.height !== image.height) {
        this.canvas.width = image.width;
        this.canvas.height = image.height;
      }
      this.context.drawImage(image, 0, 0);
    }
    for (const held of [...this.pictures.keys()]) {
      if (held < number - 2 || held >= number + 2 * DECODE_AHEAD) this.release(held);
    }
    const { width, height } = this.canvas;
    const keep = number - Math.min(HISTORY_S * this.fps, this.frames.get(number)?.image ? HISTORY_BYTES / (4 * width * height) : Infinity);
    while (this.oldest < keep) this.forget(this.oldest++);
    this.shown = number;
    this.drawn = this.frames.get(number);
    this.dispatchEvent(new CustomEvent("shown", { detail: this.drawn }));
  }

  tick() {
    if (this.closed) return;
    this.advance();
    requestAnimationFrame(this.tick);
  }

  close() {
    this.clear();
    this.closed = true;
  }
}
