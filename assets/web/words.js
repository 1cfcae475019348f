// The words of the sprites world and its sentence. The same lists as in streamgen/worlds/grammar.py.

export const WORDS = {
  count: ["a", "two"],
  size: ["large", "small"],
  color: ["red", "green", "blue", "yellow", "purple", "white"],
  shape: ["circle", "square", "triangle", "star", "ring"],
  motion: [
    "moving left",
    "moving right",
    "rising",
    "falling",
    "bouncing",
    "orbiting",
    "growing",
    "shrinking",
    "spinning",
  ],
  background: ["black", "navy", "sunset", "grass", "snow"],
};

/** How the words look in the page: CSS colours of the world's own colours. */
export const SWATCHES = {
  red: "rgb(230 40 40)",
  green: "rgb(40 220 60)",
  blue: "rgb(50 90 250)",
  yellow: "rgb(250 225 40)",
  purple: "rgb(180 50 220)",
  white: "rgb(250 250 250)",
};

const START = { count: "two", size: "large", color: "green", shape: "circle", motion: "bouncing", background: "grass" };

/** {count, size, ...} -> "two large green circles bouncing over a grass background". */
export function sentence(caption) {
  const { count, size, color, shape, motion, background } = { ...START, ...caption };
  return `${count} ${size} ${color} ${shape}${count === "two" ? "s" : ""} ${motion} over a ${background} background`;
}

/** The words of the world that a text holds: {color: "red", ...}; what it does not say is absent. */
export function wordsIn(text) {
  const padded = ` ${text.toLowerCase().replace(/[^a-z ]+/g, " ").replace(/\s+/g, " ")} `;
  const found = {};
  for (const [attribute, words] of Object.entries(WORDS)) {
    let first = Infinity;
    for (const word of words) {
      const at = padded.search(new RegExp(` ${word}s? `));
      if (at >= 0 && at < first && !(attribute === "count" && word === "a" && isArticle(padded, at))) {
        first = at;
        found[attribute] = word;
      }
    }
  }
  return found;
}

// "over a snow background": that "a" counts nothing
function isArticle(padded, at) {
  const before = padded.slice(0, at + 1);
  return /(over|on) $/.test(before);
}

export function anyCaption(random = Math.random) {
  const pick = (words) => words[Math.floor(random() * words.length)];
  return Object.fromEntries(Object.entries(WORDS).map(([attribute, words]) => [attribute, pick(words)]));
}
