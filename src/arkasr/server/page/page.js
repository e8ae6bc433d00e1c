// The page of `ark-asr serve`: a file or a recording goes to this server, and its text comes back segment by segment.
//
// Unusual: requests are XMLHttpRequests, for fetch says nothing about the progress of an upload. Whatever others wrote
// (texts, names, errors) enters the page as textContent and in no other way.

import { formats } from "./formats.js";
import { record } from "./microphone.js";

const KEY = "arkasr-key";
const THEME = "arkasr-theme";
const NO_MICROPHONE = {
  NotAllowedError: "This page may not use the microphone; the browser's settings can allow it.",
  NotFoundError: "No microphone was found.",
};
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const session = storage();

let chosen = null; // the File to transcribe
let heard = empty();
let job = null; // AbortController of the running request
let recording = null; // {stop, file} of the running recording
let items = []; // of the list, one for each of `heard.segments`

/** An error whose message is a sentence for the user. */
class Failure extends Error {}

function empty() {
  return { segments: [], text: "", duration: null, usage: null, done: false, error: null };
}

/** The tab's storage, or null where the user's settings forbid it. */
function storage() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

const say = (text) => (ui.status.textContent = text);

function fail(error) {
  if (!(error instanceof Failure)) console.error(error);
  const line = error.message.replace(/\s+/g, " ").trim();
  ui.error.textContent = line.charAt(0).toUpperCase() + line.slice(1);
}

const two = (number) => String(number).padStart(2, "0");

/** 65 -> 1:05, 3665 -> 1:01:05. */
function clock(seconds) {
  const [h, m, s] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

// --- requests ------------------------------------------------------------------------------------------------------

/** The body of the answer; `onSent(fraction)` and `onText(all text so far)` are called on the way. */
function request(method, path, { body = null, signal = null, onSent = () => {}, onText = () => {} } = {}) {
  signal?.throwIfAborted();
  const key = ui.key.value.trim();
  if (/[^\x21-\x7e]/.test(key)) throw new Failure("The API key has characters that no key has; copy it again.");
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    let sent = body === null;
    let answered = false; // an error takes the status away
    xhr.open(method, path);
    if (key) xhr.setRequestHeader("Authorization", `Bearer ${key}`);
    xhr.upload.onprogress = ({ loaded, total }) => onSent(loaded / total);
    xhr.upload.onload = () => {
      sent = true;
      onSent(1);
    };
    xhr.onprogress = () => {
      answered = xhr.status === 200;
      if (answered) onText(xhr.responseText);
    };
    xhr.onload = () => (xhr.status === 200 ? resolve(xhr.responseText) : reject(refusal(xhr, key)));
    xhr.onerror = () => reject(new Failure(broken(answered, sent)));
    xhr.onabort = () => reject(signal.reason);
    signal?.addEventListener("abort", () => xhr.abort());
    xhr.send(body);
  });
}

function broken(answered, sent) {
  if (answered) return "The connection broke; the text up to there is kept.";
  // A server that refuses a body may close before all of it was read, and the browser then hides its answer.
  if (!sent) return "The connection broke while sending: the server is gone, or the file is larger than it takes.";
  return "The server does not answer; is it still running?";
}

function refusal(xhr, key) {
  let why = `the server answered ${xhr.status}`;
  try {
    why = String(JSON.parse(xhr.responseText).error.message);
  } catch {
    // Not in the form of this API: a proxy in between, whose page would say less than the number.
  }
  if (xhr.status === 401) {
    ui.access.open = true;
    return new Failure(key ? `The API key is refused: ${why}` : "This server asks for an API key.");
  }
  const wait_s = Number(xhr.getResponseHeader("Retry-After"));
  const remedy = wait_s > 0 && !why.includes("try again") ? `; try again in ${wait(wait_s)}.` : ".";
  const opening = { 413: "The file is too large: ", 429: "A limit is reached: " }[xhr.status] ?? "";
  return new Failure(opening + why.replace(/\.$/, "") + remedy);
}

function wait(seconds) {
  const [size, unit] = seconds < 100 ? [1, "second"] : seconds < 6000 ? [60, "minute"] : [3600, "hour"];
  const count = Math.ceil(seconds / size);
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

/** Calls `onEvent` once for each event of a stream that comes as a growing text. */
function eventReader(onEvent) {
  let read = 0;
  return (text) => {
    for (let end = text.indexOf("\n", read); end >= 0; end = text.indexOf("\n", read)) {
      const line = text.slice(read, end);
      read = end + 1;
      if (line.startsWith("data:")) onEvent(JSON.parse(line.slice(5)));
    }
  };
}

async function loadModels() {
  const models = JSON.parse(await request("GET", "v1/models")).data.map(({ id }) => new Option(id, id));
  const before = ui.model.value;
  ui.model.replaceChildren(...models);
  if (models.some(({ value }) => value === before)) ui.model.value = before;
  if (!models.length) throw new Failure("The server has no model.");
}

async function showModels() {
  try {
    await loadModels();
    ui.error.textContent = "";
  } catch (error) {
    ui.model.replaceChildren();
    fail(error);
  }
}

// --- a job ---------------------------------------------------------------------------------------------------------

async function transcribe() {
  clear();
  job = new AbortController();
  busy(true);
  say("Sending");
  try {
    if (!ui.model.value) await loadModels();
    const body = new FormData();
    const fields = { model: ui.model.value, response_format: "json", stream: "true", "include[]": "segments" };
    for (const [name, value] of Object.entries(fields)) body.append(name, value);
    body.append("file", chosen, chosen.name);
    const onText = eventReader(take);
    onText(await request("POST", "v1/audio/transcriptions", { body, signal: job.signal, onSent: showSent, onText }));
    if (heard.error !== null) throw new Failure(heard.error);
    if (!heard.done) throw new Failure("The answer ended early; the text up to there is kept.");
    say(heard.segments.length ? `Done: ${clock(heard.duration)} of audio.` : "Done: no speech was found.");
  } catch (error) {
    const end = heard.segments.at(-1)?.end;
    say(end === undefined ? "Stopped." : `Stopped; heard up to ${clock(end)}.`);
    if (!job.signal.aborted) fail(error);
  } finally {
    job = null;
    busy(false);
  }
}

/** Takes one event of the stream. */
function take(event) {
  if (event.type === "transcript.text.delta") {
    heard.segments.push({ start: event.start, end: event.end, text: event.delta });
    heard.text += event.delta;
    show(heard.segments.at(-1));
    showHeard(event.end);
  } else if (event.type === "transcript.text.done") {
    Object.assign(heard, { text: event.text, usage: event.usage, duration: event.usage.seconds, done: true });
  } else if (event.type === "error") {
    heard.error = event.error.message;
  }
}

function busy(now) {
  ui.inputs.disabled = now;
  ui.running.hidden = ui.cancel.hidden = !now;
  ui.go.hidden = now;
  // The button that had the focus is gone; the one in its place gets it.
  if (now || [document.body, ui.cancel].includes(document.activeElement)) (now ? ui.cancel : ui.go).focus();
}

function showSent(fraction) {
  if (fraction < 1) {
    ui.progress.value = fraction;
    ui.heard.textContent = `sent ${Math.floor(fraction * 100)} %`;
  } else if (!heard.segments.length) {
    say("Listening");
    ui.progress.removeAttribute("value");
    ui.heard.textContent = "waiting for the first words";
  }
}

function showHeard(end) {
  const { duration } = ui.audio;
  const whole = Number.isFinite(duration) ? duration : null;
  ui.heard.textContent = `heard up to ${clock(end)}${whole === null ? "" : ` of ${clock(whole)}`}`;
  if (whole !== null) ui.progress.value = Math.min(1, end / whole);
}

function show({ start, text }) {
  const item = document.createElement("li");
  const seek = document.createElement("button");
  const words = document.createElement("span");
  seek.type = "button";
  seek.textContent = clock(start);
  seek.setAttribute("aria-label", `Play from ${clock(start)}`);
  seek.disabled = !ui.unplayable.hidden;
  seek.onclick = () => {
    ui.audio.currentTime = start;
    ui.audio.play();
  };
  words.dir = "auto";
  words.textContent = text.trim();
  item.append(seek, words);
  items.push(item);
  ui.segments.append(item);
  ui.tools.hidden = false;
}

function clear() {
  heard = empty();
  items = [];
  ui.segments.replaceChildren();
  ui.tools.hidden = true;
  ui.error.textContent = "";
  ui.progress.value = 0;
  ui.heard.textContent = "";
  say("");
}

// --- the chosen audio ----------------------------------------------------------------------------------------------

function choose(files) {
  if (!files.length || ui.inputs.disabled || recording) return;
  clear();
  [chosen] = files;
  URL.revokeObjectURL(ui.audio.src);
  ui.audio.src = URL.createObjectURL(chosen);
  ui.unplayable.hidden = true;
  ui.audio.hidden = ui.player.hidden = ui.go.disabled = false;
  ui.name.textContent = chosen.name;
  ui.size.textContent = `${(chosen.size / 1e6).toFixed(chosen.size < 1e6 ? 2 : 1)} MB`;
  if (files.length > 1) say(`One file at a time: this is the first of ${files.length}.`);
}

function cannotPlay() {
  ui.unplayable.hidden = false;
  ui.audio.hidden = true;
  for (const button of ui.segments.querySelectorAll("button")) button.disabled = true;
}

/** Marks the segment that is being played, and keeps it in view for someone who had the last one in view. */
function follow() {
  const now = ui.audio.currentTime + 0.02; // a seek may land just before what it asked for
  const next = items[heard.segments.findLastIndex(({ start, end }) => start <= now && now < end)] ?? null;
  const last = ui.segments.querySelector("[aria-current]");
  if (next === last) return;
  const box = last?.getBoundingClientRect();
  const following = !box || (box.top < innerHeight && box.bottom > 0);
  last?.removeAttribute("aria-current");
  next?.setAttribute("aria-current", "true");
  if (following && !ui.audio.paused) next?.scrollIntoView({ block: "nearest" });
}

// --- the microphone ------------------------------------------------------------------------------------------------

async function toggleRecording() {
  if (recording) return recording.stop();
  ui.error.textContent = "";
  recording = { stop() {} }; // while the browser asks the user
  try {
    recording = await record(showSound);
    showRecording(true);
    const file = await recording.file;
    recording = null;
    choose([file]);
  } catch (error) {
    recording = null;
    fail(error.name in NO_MICROPHONE ? new Failure(NO_MICROPHONE[error.name]) : error);
  }
  return showRecording(false);
}

function showSound(level, seconds) {
  ui.level.value = level;
  ui.elapsed.textContent = clock(seconds);
}

function showRecording(now) {
  ui.record.textContent = now ? "Stop" : "Record";
  ui.record.classList.toggle("live", now);
  ui.take.hidden = !now;
  ui.file.disabled = now;
  ui.go.disabled = now || chosen === null;
  say(now ? "Recording" : "");
  showSound(0, 0);
}

// --- what was heard, to take along ---------------------------------------------------------------------------------

function download(ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([formats[ending]({ file: chosen.name, ...heard })]));
  link.download = `${chosen.name.replace(/\.[^.]*$/, "")}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it after the click
}

async function copy() {
  const text = heard.text.trim();
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyInsecurely(text);
    say("Copied.");
  } catch {
    fail(new Failure("The browser does not let this page copy; select the text instead."));
  }
}

/** On plain http there is no navigator.clipboard, only the event of an old command. */
function copyInsecurely(text) {
  const fill = (event) => {
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
  };
  document.addEventListener("copy", fill, { once: true });
  if (!document.execCommand("copy")) throw new Error("refused");
}

// --- wiring --------------------------------------------------------------------------------------------------------

function keepKey() {
  session?.[ui.remember.checked ? "setItem" : "removeItem"](KEY, ui.key.value);
}

function paint() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = document.documentElement.dataset.theme ?? system;
  ui.theme.setAttribute("aria-pressed", String(theme === "dark"));
  return theme;
}

ui.theme.onclick = () => {
  document.documentElement.dataset.theme = paint() === "dark" ? "light" : "dark";
  session?.setItem(THEME, paint());
};
ui.file.onchange = () => {
  choose(ui.file.files);
  ui.file.value = ""; // so that the same file can be chosen again
};
ui.form.onsubmit = (event) => {
  event.preventDefault();
  if (chosen && !job && !recording) transcribe();
};
ui.cancel.onclick = () => job?.abort();
ui.record.onclick = toggleRecording;
ui.copy.onclick = copy;
ui.downloads.onclick = ({ target }) => target.value && download(target.value);
ui.audio.ontimeupdate = follow;
ui.audio.onerror = cannotPlay;
ui.remember.onchange = keepKey;
ui.key.onchange = () => {
  keepKey();
  showModels();
};
document.ondragover = (event) => {
  event.preventDefault();
  ui.drop.classList.add("over");
};
document.ondragleave = (event) => event.relatedTarget === null && ui.drop.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  ui.drop.classList.remove("over");
  choose(event.dataTransfer.files);
};
window.onbeforeunload = (event) => (job || recording) && event.preventDefault();

ui.host.textContent = `, ${location.host}`;
ui.key.value = session?.getItem(KEY) ?? "";
ui.remember.checked = ui.access.open = ui.key.value !== "";
if (session?.getItem(THEME)) document.documentElement.dataset.theme = session.getItem(THEME);
matchMedia("(prefers-color-scheme: dark)").onchange = paint;
paint();
ui.record.disabled = !navigator.mediaDevices;
ui.insecure.hidden = Boolean(navigator.mediaDevices);
showModels();
