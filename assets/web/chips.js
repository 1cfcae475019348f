// The world's words as buttons, so that nobody needs to guess them.

import { SWATCHES, WORDS, wordsIn } from "./words.js";

/** One group of buttons for each attribute; pick(attribute, word) is called on a click. */
export function buildChips(root, pick) {
  for (const [attribute, words] of Object.entries(WORDS)) {
    const group = document.createElement("div");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", attribute);
    group.append(...words.map((word) => chip(attribute, word, pick)));
    root.append(group);
  }
}

function chip(attribute, word, pick) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "chip", textContent: word });
  Object.assign(button.dataset, { attribute, word });
  if (attribute === "color") {
    button.classList.add("swatch");
    button.style.setProperty("--hue", SWATCHES[word]);
  }
  button.addEventListener("click", () => pick(attribute, word));
  return button;
}

/** Press those that the text holds. */
export function showChips(text) {
  const found = wordsIn(text);
  for (const button of document.querySelectorAll(".chip")) {
    button.setAttribute("aria-pressed", String(found[button.dataset.attribute] === button.dataset.word));
  }
}
