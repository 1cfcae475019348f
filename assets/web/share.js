// A stream as the fragment of an address: what was asked for, in words, so that the same video can be made again.
//
//   #seed=7&fps=16&steps=4&p=0~recache~two+large+green+circles...&p=5.25~blend6~two+yellow+rings...

const TRANSITIONS = ["cut", "recache", "blend", "scene"];
const MOST_PROMPTS = 256;

/** {seed, fps, steps, prompts: [{at_s, text, transition, blend_blocks}]} -> "#..." */
export function toFragment({ seed, fps, steps, prompts }) {
  const fields = new URLSearchParams();
  fields.set("seed", seed);
  if (fps) fields.set("fps", fps);
  if (steps) fields.set("steps", steps);
  const first = Math.max(0, prompts[0]?.at_s ?? 0);
  for (const { at_s, text, transition, blend_blocks } of prompts) {
    const how = transition === "blend" ? `blend${blend_blocks}` : transition;
    fields.append("p", `${Math.round(1000 * Math.max(0, at_s - first)) / 1000}~${how}~${text}`);
  }
  return `#${fields}`;
}

/** null where the fragment holds no prompt that makes sense. */
export function fromFragment(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const prompts = fields.getAll("p").slice(0, MOST_PROMPTS).map(onePrompt).filter(Boolean);
  if (!prompts.length) return null;
  prompts.sort((a, b) => a.at_s - b.at_s);
  prompts[0].at_s = 0;
  const number = (name, low, high) => {
    const value = Number(fields.get(name));
    return fields.has(name) && value >= low && value <= high ? value : undefined;
  };
  const seed = number("seed", 0, Number.MAX_SAFE_INTEGER);
  return { seed: Math.floor(seed ?? 0), fps: number("fps", 1, 240), steps: number("steps", 1, 1000), prompts };
}

function onePrompt(field) {
  const [, at, how, blocks, text] = /^([\d.]+)~([a-z]+)(\d*)~(.+)$/s.exec(field) ?? [];
  const at_s = Number(at);
  if (!text?.trim() || !Number.isFinite(at_s) || !TRANSITIONS.includes(how)) return null;
  const blend_blocks = Math.min(64, Math.max(1, Number(blocks) || 4));
  return { at_s, text: text.slice(0, 2000), transition: how, blend_blocks };
}
