// H.264 from the wire as pictures, by the browser's own decoder (WebCodecs).
//
// The wire brings a fragmented MP4: an opening, then one fragment per frame (ISO 14496-12, 8.8; 14496-15, 5.3.3).

const TYPICAL = { codec: "avc1.640028", codedWidth: 832, codedHeight: 480 };
const KEY = 5; // type of the NAL unit of a picture that stands by itself

/** Whether this browser decodes H.264. */
export async function decodesH264() {
  try {
    return (await VideoDecoder.isConfigSupported(TYPICAL)).supported === true;
  } catch {
    return false;
  }
}

export class Decoder {
  /** give(frame, image): in the order of the frames; image is an ImageBitmap. fail(error): it is of no use any more. */
  constructor(give, fail) {
    this.give = give;
    this.fail = fail;
    this.turn = Promise.resolve();
  }

  /** The opening: another encoder begins. */
  open(bytes) {
    this.close();
    const at = find(bytes, "avcC");
    const description = bytes.slice(at + 4, at - 4 + view(bytes).getUint32(at - 4));
    const profile = [...description.subarray(1, 4)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    const waiting = [];
    const output = (picture) => this.take(waiting.shift(), picture);
    this.waiting = waiting;
    this.decoder = new VideoDecoder({ output, error: (error) => this.fail(error) });
    this.decoder.configure({ codec: `avc1.${profile}`, description, optimizeForLatency: true });
  }

  /** One frame; bytes is its fragment. */
  add(frame, bytes) {
    if (this.decoder?.state !== "configured") return;
    const data = bytes.subarray(find(bytes, "mdat") + 4);
    this.waiting.push(frame);
    this.decoder.decode(new EncodedVideoChunk({ type: isKey(data) ? "key" : "delta", timestamp: frame.number, data }));
  }

  take(frame, picture) {
    const image = createImageBitmap(picture).finally(() => picture.close());
    this.turn = this.turn.then(async () => this.give(frame, await image)).catch((error) => this.fail(error));
  }

  close() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
  }
}

const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** Where the name of a box begins, among boxes and in boxes that hold boxes. */
function find(bytes, name) {
  const letters = [...name].map((letter) => letter.charCodeAt(0));
  for (let at = 4; at <= bytes.length - 4; at++) {
    if (letters.every((letter, i) => bytes[at + i] === letter)) return at;
  }
  throw new Error(`no ${name} in what the server sent`);
}

/** Whether a sample (NAL units, each behind its length in four bytes) holds a picture that stands by itself. */
function isKey(data) {
  for (let at = 0; at + 5 <= data.length; at += 4 + view(data).getUint32(at)) {
    if ((data[at + 4] & 31) === KEY) return true;
  }
  return false;
}
