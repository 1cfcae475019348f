// Recordings: by the server (mp4, webm, gif, every frame), or by this browser from what it shows.

const ENLARGE_TO = 512; // pixels of the longer side, of what this browser records

export class Recording {
  /** format: "mp4" | "webm" | "gif" by the server, "here" by this browser. */
  static async start(stream, format) {
    const recording = new Recording(stream, format);
    if (format === "here") recording.startHere();
    else await stream.wire.record(format);
    return recording;
  }

  constructor(stream, format) {
    this.stream = stream;
    this.format = format;
    this.wire = stream.wire;
  }

  /** The recording as a Blob. */
  async stop() {
    if (this.format !== "here") return this.wire.recorded();
    this.stream.removeEventListener("shown", this.draw);
    const stopped = new Promise((resolve) => this.recorder.addEventListener("stop", resolve, { once: true }));
    this.recorder.stop();
    await stopped;
    return new Blob(this.parts, { type: "video/webm" });
  }

  get suffix() {
    return this.format === "here" ? "webm" : this.format;
  }

  startHere() {
    if (!globalThis.MediaRecorder?.isTypeSupported("video/webm")) {
      throw new Error("this browser cannot record; choose MP4, which the server makes");
    }
    const { canvas } = this.stream.player;
    const copy = document.createElement("canvas");
    const scale = Math.max(1, Math.floor(ENLARGE_TO / Math.max(canvas.width, canvas.height)));
    copy.width = canvas.width * scale;
    copy.height = canvas.height * scale;
    const context = copy.getContext("2d");
    context.imageSmoothingEnabled = false;
    this.draw = () => context.drawImage(canvas, 0, 0, copy.width, copy.height);
    this.draw();
    this.stream.addEventListener("shown", this.draw);
    this.parts = [];
    this.recorder = new MediaRecorder(copy.captureStream(), { mimeType: "video/webm", videoBitsPerSecond: 6e6 });
    this.recorder.addEventListener("dataavailable", ({ data }) => this.parts.push(data));
    this.recorder.start(1000);
  }
}

/** Hand a file to the user. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
