// The figures of a stream, as text.

const cells = new Map();

export function showFigures(stream, chart) {
  const last = stream.samples.at(-1);
  figure("rate", stream.rate ? stream.rate.toFixed(1) : "–");
  figure("slack", last ? `${signed(last.slack_s)} s` : "–", last?.slack_s < 0);
  figure("steps", last ? String(last.steps) : "–", Boolean(last?.flags));
  figure("lead", last ? `${stream.lead_s.toFixed(2)} s` : "–");
  figure("late", last ? String(stream.late) : "–", stream.late > 0);
  figure("first", ms(stream.first_ms));
  figure("received", ms(stream.change?.received_ms));
  figure("made", ms(stream.change?.applied_ms));
  figure("seen", ms(stream.change?.shown_ms));
  chart.draw(stream.samples);
  if (!last) return;
  const words = `Slack ${signed(last.slack_s)} seconds, ${last.steps} steps, ${stream.late} late blocks`;
  if (chart.canvas.getAttribute("aria-label") !== words) chart.canvas.setAttribute("aria-label", words);
}

export function showClock(player) {
  const s = player.empty ? 0 : Math.max(0, player.shown) / player.fps;
  const text = `${Math.floor(s / 60)}:${(s % 60).toFixed(1).padStart(4, "0")}`;
  const clock = document.getElementById("clock");
  if (clock.value !== text) clock.value = text;
}

function figure(name, text, bad = false) {
  if (!cells.has(name)) cells.set(name, document.querySelector(`[data-figure=${name}]`));
  const cell = cells.get(name);
  if (cell.textContent !== text) cell.textContent = text;
  cell.classList.toggle("bad", bad);
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

function ms(value) {
  if (value === undefined) return "–";
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`;
}
