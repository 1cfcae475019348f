// A strip chart: slack of the last minute's blocks as a line over zero, the steps they took as a band below.

const SPAN_S = 60;
const STEPS_PX = 26;
const LEFT_PX = 42;

export class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.drawn = null;
  }

  /** samples: [{media_s, slack_s, steps, flags}], in order. */
  draw(samples) {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const style = getComputedStyle(canvas);
    const key = `${samples.length} ${samples.at(-1)?.media_s} ${width} ${height} ${style.color}`;
    if (key === this.drawn || !width) return;
    this.drawn = key;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = `10.5px ${style.fontFamily}`;
    const color = (name) => style.getPropertyValue(name);
    const end_s = Math.max(SPAN_S, samples.at(-1)?.media_s ?? 0);
    const x = (media_s) => LEFT_PX + (1 - (end_s - media_s) / SPAN_S) * (width - LEFT_PX - 4);
    const area = { context, color, x, width, height };
    drawSlack(area, samples);
    drawSteps(area, samples);
  }
}

function drawSlack({ context, color, x, width, height }, samples) {
  const bottom = height - STEPS_PX - 8;
  const most = niceTop(Math.max(0.5, ...samples.map((s) => s.slack_s)));
  const least = Math.min(0, ...samples.map((s) => s.slack_s));
  const low = least < 0 ? -niceTop(-least) : 0;
  const y = (slack_s) => 7 + ((most - slack_s) / (most - low)) * (bottom - 9);
  context.lineWidth = 1;
  context.fillStyle = color("--quiet");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of new Set([most, 0, low])) {
    context.strokeStyle = color(value === 0 ? "--rule-strong" : "--rule");
    const at = Math.round(y(value)) + 0.5;
    context.beginPath();
    context.moveTo(LEFT_PX, at);
    context.lineTo(width - 4, at);
    context.stroke();
    context.fillText(value === 0 ? "0 s" : `${value > 0 ? "+" : "−"}${Math.abs(value)}`, LEFT_PX - 6, at);
  }
  context.strokeStyle = color("--accent");
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.beginPath();
  samples.forEach((s, i) => (i ? context.lineTo : context.moveTo).call(context, x(s.media_s), y(s.slack_s)));
  context.stroke();
  context.fillStyle = color("--bad");
  for (const s of samples) {
    if (s.slack_s >= 0) continue;
    context.beginPath();
    context.arc(x(s.media_s), y(s.slack_s), 2.5, 0, 7);
    context.fill();
  }
  if (samples.length) {
    const last = samples.at(-1);
    context.fillStyle = color(last.slack_s < 0 ? "--bad" : "--accent");
    context.beginPath();
    context.arc(x(last.media_s), y(last.slack_s), 3, 0, 7);
    context.fill();
  }
}

function drawSteps({ context, color, x, height }, samples) {
  const most = Math.max(4, ...samples.map((s) => s.steps));
  context.fillStyle = color("--quiet");
  context.textAlign = "right";
  context.textBaseline = "alphabetic";
  context.fillText("steps", LEFT_PX - 6, height - 4);
  samples.forEach((s, i) => {
    const next = samples[i + 1]?.media_s ?? s.media_s + 0.75;
    const tall = Math.max(1, (s.steps / most) * (STEPS_PX - 6));
    context.fillStyle = color(s.flags ? "--warn" : "--bar");
    context.fillRect(x(s.media_s), height - 3 - tall, Math.max(1, x(next) - x(s.media_s) - 1), tall);
  });
}

function niceTop(value) {
  return [0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100].find((top) => value <= top) ?? Math.ceil(value);
}
