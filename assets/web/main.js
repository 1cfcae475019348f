// The page: streams side by side, one of them chosen, and the controls that act on the chosen one.

import { Chart } from "./chart.js";
import { buildChips, showChips } from "./chips.js";
import { showClock, showFigures } from "./figures.js";
import { decodesH264 } from "./h264.js";
import { Recording, save } from "./record.js";
import { fromFragment, toFragment } from "./share.js";
import { Stream } from "./stream.js";
import { STATES, Tile } from "./tile.js";
import { Timeline } from "./timeline.js";
import { anyCaption, sentence, wordsIn } from "./words.js";

const $ = (selector) => document.querySelector(selector);
const MOST_STREAMS = 9;
const PLAN_AHEAD_S = 8; // leaves some seconds to drag it
const FIGURES_MS = 200;
const TOKEN = "streamgen token";
const NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

const entries = []; // {stream, tile}
let chosen = null;
let named = 0;

const chart = new Chart($("#chart"));
const timeline = new Timeline($("#timeline"), {
  pick: (prompt) => write(prompt.text),
  moved: (prompt) => announce(`Planned for ${prompt.at_s.toFixed(2)} seconds`),
  plan: (at_s) => plan(at_s),
});

// Streams.

function addStream(settings = {}) {
  if (entries.length >= MOST_STREAMS) return trouble(`This page shows at most ${MOST_STREAMS} streams; close one.`);
  const name = NAMES[named++ % NAMES.length];
  const entry = {};
  entry.tile = new Tile(name, {
    choose: () => choose(entry),
    close: () => removeStream(entry),
    start: () => (choose(entry), begin()),
  });
  const token = sessionStorage.getItem(TOKEN) ?? "";
  entry.stream = new Stream(name, entry.tile.canvas, { seed: seedWanted(), fps: undefined, steps: null, token, ...settings });
  entry.tile.follow(entry.stream);
  follow(entry);
  entries.push(entry);
  $("#stage").append(entry.tile.root);
  arrange();
  choose(entry);
  return entry;
}

function follow(entry) {
  const { stream } = entry;
  const mine = (act) => (event) => entry === chosen && act(event.detail);
  stream.addEventListener("state", () => (entry === chosen ? showState() : undefined));
  stream.addEventListener("notice", mine(announce));
  stream.addEventListener("trouble", mine(trouble));
  stream.addEventListener("failed", mine(trouble));
  stream.addEventListener("failed", ({ detail }) => /token/i.test(detail) && askToken(stream));
}

function removeStream(entry) {
  entry.recording = null;
  entry.stream.close();
  entry.tile.root.remove();
  const at = entries.indexOf(entry);
  entries.splice(at, 1);
  if (!entries.length) addStream();
  else if (entry === chosen) choose(entries[Math.min(at, entries.length - 1)]);
  arrange();
}

function arrange() {
  $("#stage").dataset.streams = entries.length;
  $("#stage").style.setProperty("--columns", Math.min(entries.length, entries.length === 4 ? 2 : 3));
  for (const { tile } of entries) tile.shut.hidden = entries.length === 1;
}

function choose(entry) {
  if (entry === chosen) return;
  chosen = entry;
  for (const { tile } of entries) tile.root.toggleAttribute("data-chosen", tile === entry.tile);
  const { settings } = entry.stream;
  $("#seed").value = settings.seed;
  $("#steps").value = settings.steps ?? 0;
  if (settings.fps) $("#fps").value = settings.fps;
  showSliders();
  timeline.show(entry.stream);
  showState();
  showRecording();
}

const running = ({ state }) => !["idle", "over", "failed"].includes(state);

/** Start the chosen stream with the text in the box. */
function begin(prompts) {
  const { stream } = chosen;
  const text = $("#prompt").value.trim();
  const first = prompts ?? [{ at_s: 0, text, ...manner() }];
  if (!first[0].text) return trouble("Type what to show, or pick words below.");
  trouble("");
  stream.settings.seed = seedWanted();
  stream.settings.fps = Number($("#fps").value);
  stream.settings.format = $("#video").value;
  stream.settings.token = sessionStorage.getItem(TOKEN) ?? "";
  stream.start(first);
  timeline.show(stream);
}

// Prompts.

function manner() {
  const transition = $("#transition input:checked").value;
  return { transition, blend_blocks: Number($("#blend").value), soon: $("#soon").checked };
}

async function apply() {
  const text = $("#prompt").value.trim();
  const { stream } = chosen;
  if (!text) return trouble("Type what to show, or pick words below.");
  if (!running(stream)) return begin();
  trouble("");
  if (stream.isPast) return attempt(() => stream.remake(text, manner()), "Received");
  if (!stream.player.running) stream.play();
  return attempt(() => stream.prompt(text, manner()), "Received");
}

/** From this picture on again, with what is in the box. */
function remake() {
  const { stream } = chosen;
  const text = $("#prompt").value.trim();
  const same = !text || text === stream.promptAt(stream.player.shown / stream.player.fps)?.text;
  return attempt(() => stream.remake(same ? undefined : text, manner()), "Made anew from here");
}

function plan(at_s) {
  const text = $("#prompt").value.trim();
  const { stream } = chosen;
  if (!text) return trouble("Type what to show, or pick words below.");
  if (!running(stream)) return begin();
  const time_s = Math.max(at_s ?? stream.player.now() + PLAN_AHEAD_S, stream.earliest_s);
  stream.plan(text, time_s, manner());
  announce(`Planned for ${time_s.toFixed(1)} seconds`);
}

function write(text) {
  $("#prompt").value = text;
  showChips($("#prompt").value);
}

async function attempt(act, success) {
  try {
    await act();
    if (success) announce(success);
  } catch (error) {
    trouble(error.message);
  }
}

// What is said to the visitor.

function announce(text) {
  $("#news").textContent = text;
}

function trouble(text) {
  $("#trouble").textContent = text;
}

function showState() {
  const { state, message } = chosen.stream;
  const text = message && message !== "connecting" ? `${STATES[state]}: ${message}` : STATES[state];
  if ($("#link .text").textContent !== text) $("#link .text").textContent = text;
  document.body.dataset.state = state;
  const plays = running(chosen.stream) && chosen.stream.player.running;
  $("#play").setAttribute("aria-label", plays ? "Pause" : "Play");
  $("#play").title = `${plays ? "Pause" : "Play"} (Space)`;
  $("#play use").setAttribute("href", plays ? "#i-pause" : "#i-play");
  $("#apply").textContent = running(chosen.stream) ? "Apply" : "Play";
  for (const id of ["back", "forth", "live", "remake", "branch", "record"]) {
    $(`#${id}`).disabled = chosen.stream.player.empty;
  }
}

function showSliders() {
  const steps = Number($("#steps").value);
  const blend = Number($("#blend").value);
  const config = chosen?.stream.config;
  const block_s = (config?.block_frames ?? 12) / (config?.fps ?? 16);
  $("output[for=steps]").value = steps ? String(steps) : "auto";
  $("output[for=fps]").value = $("#fps").value;
  $("output[for=blend]").value = `${(blend * block_s).toFixed(1)} s`;
  $("#blend-row").hidden = manner().transition !== "blend";
  $("#fps").setAttribute("aria-valuetext", `${$("#fps").value} frames per second`);
  $("#steps").setAttribute("aria-valuetext", steps ? `${steps} steps` : "chosen by the server");
}

// Words.

function pickWord(attribute, word) {
  write(sentence({ ...wordsIn($("#prompt").value), [attribute]: word }));
  if ($("#at-once").checked && running(chosen.stream)) apply();
}

// Playback, branches, recordings, links.

function playPause() {
  const { stream } = chosen;
  if (!running(stream)) return begin();
  if (stream.player.running) stream.pause();
  else stream.play();
  showState();
}

function toLive() {
  chosen.stream.player.jump(Infinity);
  chosen.stream.play();
}

async function branch() {
  const source = chosen.stream;
  if (source.player.empty) return;
  const { seed, fps, steps } = source.settings;
  const before = chosen;
  const entry = addStream({ seed, fps, steps });
  if (!entry) return;
  try {
    await source.branch(entry.stream);
    timeline.show(entry.stream);
    announce(`Stream ${entry.stream.name} branches off`);
  } catch (error) {
    removeStream(entry);
    choose(before);
    trouble(error.message);
  }
}

async function record() {
  const entry = chosen;
  const { recording, stream } = entry;
  if (!recording) {
    return attempt(async () => {
      entry.recording = await Recording.start(stream, $("#format").value);
      entry.recordedSince = performance.now();
      showRecording();
    }, "Recording");
  }
  entry.recording = null;
  showRecording();
  return attempt(async () => {
    const blob = await recording.stop();
    save(blob, `streamgen-${stream.settings.seed}.${recording.suffix}`);
  }, "The recording is saved");
}

function showRecording() {
  const { recording, recordedSince } = chosen;
  const s = recording ? Math.floor((performance.now() - recordedSince) / 1000) : 0;
  $("#record").setAttribute("aria-pressed", String(Boolean(recording)));
  $("#record .text").textContent = recording ? `Save ${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")}` : "Record";
  $("#format").disabled = Boolean(recording);
}

async function share() {
  const { stream } = chosen;
  const prompts = stream.prompts.length ? stream.prompts : [{ at_s: 0, text: $("#prompt").value.trim(), ...manner() }];
  const fps = stream.player.empty ? Number($("#fps").value) : stream.player.fps;
  const fragment = toFragment({ ...stream.settings, fps, prompts });
  history.replaceState(null, "", fragment);
  try {
    await navigator.clipboard.writeText(location.href);
    announce("The link is copied");
    flash($("#share"), "Copied");
  } catch {
    announce("The link is in the address bar");
    flash($("#share"), "In the address bar");
  }
}

function flash(button, text) {
  const label = button.querySelector("span");
  const before = (button.dataset.text ??= label.textContent);
  label.textContent = text;
  clearTimeout(button.timer);
  button.timer = setTimeout(() => (label.textContent = before), 1800);
}

function askToken(stream) {
  const dialog = $("#ask-token");
  if (dialog.open) return;
  dialog.showModal();
  dialog.onclose = () => {
    const token = $("#token").value.trim();
    $("#token").value = "";
    if (!token) return;
    sessionStorage.setItem(TOKEN, token);
    if (chosen.stream === stream) begin(stream.prompts.length ? stream.prompts : undefined);
  };
}

const seedWanted = () => Math.min(Number.MAX_SAFE_INTEGER, Math.max(0, Math.floor(Number($("#seed").value) || 0)));

const KEYS = {
  " ": playPause,
  k: playPause,
  ArrowLeft: (event) => chosen.stream.step(event.shiftKey ? -Math.round(chosen.stream.player.fps) : -1),
  ArrowRight: (event) => chosen.stream.step(event.shiftKey ? Math.round(chosen.stream.player.fps) : 1),
  l: toLive,
  r: remake,
  b: branch,
  o: record,
  n: () => addStream(),
  s: () => $("#smooth").click(),
  "?": () => $("#keys").showModal(),
  "/": () => ($("#prompt").focus(), $("#prompt").select()),
};

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (target.matches("input, select, textarea")) {
    if (key === "Escape") target.blur();
    return;
  }
  if (target.matches("button") && (key === " " || key === "Enter")) return;
  if (/^[1-9]$/.test(key) && entries[key - 1]) {
    choose(entries[key - 1]);
    entries[key - 1].tile.root.focus();
    return;
  }
  const act = KEYS[key] ?? KEYS[key.toLowerCase()];
  const needsVideo = !["n", "s", "?", "/", " ", "k"].includes(key.toLowerCase());
  if (!act || (needsVideo && chosen.stream.player.empty)) return;
  event.preventDefault();
  act(event);
}

function wire() {
  const on = (id, act) => $(id).addEventListener("click", act);
  on("#play", playPause);
  on("#back", () => chosen.stream.step(-1));
  on("#forth", () => chosen.stream.step(1));
  on("#live", toLive);
  on("#remake", remake);
  on("#branch", branch);
  on("#record", record);
  on("#add", () => addStream());
  on("#share", share);
  on("#help", () => $("#keys").showModal());
  on("#later", () => plan());
  on("#again", () => begin());
  on("#dice", () => (write(sentence(anyCaption())), $("#at-once").checked && running(chosen.stream) && apply()));
  on("#link", () => chosen.stream.wire?.hurry());
  $("#say").addEventListener("submit", (event) => (event.preventDefault(), apply()));
  $("#prompt").addEventListener("input", () => (showChips($("#prompt").value), trouble("")));
  $("#prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.shiftKey || event.ctrlKey)) return;
    event.preventDefault();
    plan();
  });
  for (const id of ["#steps", "#fps", "#blend", "#transition"]) $(id).addEventListener("input", showSliders);
  $("#steps").addEventListener("change", () => chosen.stream.setSteps(Number($("#steps").value) || null));
  $("#smooth").addEventListener("change", ({ target }) => $("#stage").classList.toggle("smooth", target.checked));
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => openLink());
  addEventListener("pagehide", () => entries.forEach(({ stream }) => stream.wire?.stop()));
  setInterval(() => (showFigures(chosen.stream, chart), showRecording()), FIGURES_MS);
  const draw = () => (timeline.draw(), showClock(chosen.stream.player), requestAnimationFrame(draw));
  requestAnimationFrame(draw);
}

/** A shared link: its stream starts at once. */
function openLink() {
  const shared = fromFragment(location.hash);
  if (!shared) return false;
  $("#seed").value = shared.seed;
  if (shared.fps) $("#fps").value = shared.fps;
  $("#steps").value = shared.steps ?? 0;
  chosen.stream.settings.steps = shared.steps ?? null;
  showSliders();
  write(shared.prompts[0].text);
  begin(shared.prompts);
  return true;
}

buildChips($("#words"), pickWord);
write(sentence({}));
addStream();
wire();
showSliders();
decodesH264().then((able) => ($("#video-row").hidden = !able));
openLink();
