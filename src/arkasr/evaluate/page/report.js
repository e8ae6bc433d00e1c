// The list of utterances of a report: filters, sorting, pages, sound, exports. Tables and plots need none of this.
//
// Unusual: whatever others wrote enters the page as textContent and in no other way, and the page's policy forbids
// style attributes, so that looks are classes.

const data = JSON.parse(document.getElementById("data").textContent);
const systems = data.systems;
const TOKENS = 400; // of one alignment that are shown at first; a session may have ten thousand
const KINDS = { s: "substitution", d: "deletion", i: "insertion", c: "compound" };

const get = (id) => document.getElementById(id);
const visible = (text) =>
  text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/gu, (c) =>
    /[\t\n\r]/.test(c) ? " " : `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const text = (tag, content, className = "") => make(tag, { className, textContent: visible(content) });
const count = (number) => number.toLocaleString("en");
const errors = (heard) => heard.ins + heard.del + heard.sub;
const rate = (heard) => (heard ? (100 * errors(heard)) / heard.words : NaN); // nothing of nothing is NaN, too
const percent = (number) => (Number.isNaN(number) ? "–" : number === Infinity ? "∞" : number.toFixed(1));

// ---- which rows, in which order ----

const columns = [
  { name: "Utterance", value: (row) => row.id },
  { name: "Set", value: (row) => data.sets[row.set].name },
  { name: "Speaker", value: (row) => row.speaker },
  { name: "Seconds", value: (row) => row.duration ?? NaN, show: (s) => (Number.isNaN(s) ? "–" : s.toFixed(2)) },
  ...systems.map((name, n) => ({
    name: systems.length > 1 ? `% of ${name}` : "Error rate %", value: (row) => rate(row.systems[n]), show: percent,
  })),
];
if (systems.length > 1) {
  const value = (row) => rate(row.systems[1]) - rate(row.systems[0]);
  columns.push({ name: "Difference", value, show: (d) => (d > 0 ? "+" : "") + percent(d) });
}

const state = { rows: data.rows, page: 0, sorted: null, descending: false };
const order = new Map(data.rows.map((row, n) => [row, n]));
const found = new Map(); // of a row, what a search looks through

function haystack(row) {
  if (!found.has(row)) {
    const texts = row.systems.flatMap((heard) => (heard ? [heard.text, heard.edits.flat().join(" ")] : []));
    found.set(row, [row.id, row.reference, ...texts].join("\n").toLowerCase());
  }
  return found.get(row);
}

const differences = {
  differ: (a, b) => a !== b,
  first: (a, b) => a < b,
  second: (a, b) => b < a,
};

function matches(row, wanted) {
  const heard = row.systems.filter(Boolean);
  const [a, b] = row.systems.map((one) => one && errors(one));
  return (
    (wanted.set === "" || row.set === Number(wanted.set)) &&
    (wanted.speaker === "" || row.speaker === wanted.speaker) &&
    (wanted.flag === "" || heard.some(({ flags }) => flags.includes(wanted.flag))) &&
    (wanted.errors === "" || heard.some((one) =>
      wanted.errors === "some" ? errors(one) > 0 : wanted.errors === "none" ? errors(one) === 0 : one[wanted.errors] > 0)) &&
    (wanted.difference === "" || (heard.length === 2 && differences[wanted.difference](a, b))) &&
    (wanted.text === "" || haystack(row).includes(wanted.text))
  );
}

const collator = new Intl.Collator("en", { numeric: true });

/** Numbers that are none come last, whatever the order; equals stay as the manifest has them. */
function compare(one, other) {
  const [a, b] = [state.sorted.value(one), state.sorted.value(other)];
  const direction = state.descending ? -1 : 1;
  if (typeof a === "string") return direction * collator.compare(a, b) || order.get(one) - order.get(other);
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || order.get(one) - order.get(other);
  return (a === b ? 0 : direction * (a < b ? -1 : 1)) || order.get(one) - order.get(other);
}

function choose() {
  const wanted = { text: get("text").value.trim().toLowerCase() };
  for (const id of ["set", "speaker", "errors", "flag", "difference"]) wanted[id] = get(id).value;
  state.rows = data.rows.filter((row) => matches(row, wanted));
  if (state.sorted) state.rows.sort(compare);
  show(0);
  get("status").textContent = `${count(state.rows.length)} of ${count(data.rows.length)} utterances${rates()}`;
}

/** Error rates of what is listed, where all of it may be added up. */
function rates() {
  const protocols = new Set(state.rows.map((row) => `${data.sets[row.set].rate} (${data.sets[row.set].label})`));
  if (protocols.size === 0) return ".";
  if (protocols.size > 1) return "; no rate over sets of different protocols.";
  const sums = systems.map((name, n) => {
    const heard = state.rows.map((row) => row.systems[n]).filter(Boolean);
    const total = (what) => heard.reduce((sum, one) => sum + what(one), 0);
    const value = (100 * total(errors)) / total((one) => one.words);
    return `${visible(name)} ${Number.isFinite(value) ? value.toFixed(2) + " %" : "–"}`;
  });
  return `; ${[...protocols][0]}: ${sums.join(", ")}.`;
}

// ---- the page of the list ----

function show(page) {
  const size = Number(get("size").value);
  const pages = Math.max(1, Math.ceil(state.rows.length / size));
  state.page = Math.min(Math.max(0, page), pages - 1);
  for (const body of get("rows").querySelectorAll("tbody")) body.remove();
  get("rows").append(...state.rows.slice(state.page * size, (state.page + 1) * size).map(utterance));
  get("page").value = state.page + 1;
  get("page").max = pages;
  get("pages").textContent = `of ${count(pages)}`;
  get("previous").disabled = state.page === 0;
  get("next").disabled = state.page === pages - 1;
}

function utterance(row) {
  const cells = columns.map(({ value, show: shown }, n) => {
    const cell = make(n ? "td" : "th", { className: shown ? "n" : "" });
    if (n === 0) cell.scope = "row";
    cell.append(text("bdi", shown ? shown(value(row)) : value(row)));
    return cell;
  });
  const pair = make("div", { className: "pair" }, ...row.systems.map((heard, n) => system(row, heard, n)));
  const written = make("details", {}, make("summary", { textContent: "As written" }));
  written.append(make("div", { className: "raw" }, labelled("Reference", row.reference)));
  row.systems.forEach((heard, n) => heard && written.lastChild.append(labelled(systems[n], heard.text)));
  const { rate: measure, label } = data.sets[row.set];
  const foot = make("div", { className: "foot" }, written, text("span", `${measure}, ${label}`, "muted"));
  const below = make("td", { colSpan: columns.length + 2 }, pair, foot);
  return make("tbody", {}, make("tr", {}, ...cells, flags(row), sound(row)), make("tr", {}, below));
}

const labelled = (name, content) =>
  make("p", {}, text("span", `${name}: `, "muted"), text("bdi", content || "(nothing)"));

function flags(row) {
  const all = [...new Set(row.systems.flatMap((heard) => heard?.flags ?? []))];
  return make("td", {}, ...all.map((flag) => text("span", flag, "flag")));
}

function sound({ audio, id }) {
  const cell = make("td");
  if (!audio) return cell;
  const missing = (why) => cell.replaceChildren(text("span", why, "muted"));
  if (audio.missing) {
    missing(`no file ${audio.missing}`);
    return cell;
  }
  const play = make("button", { type: "button", textContent: "Play", ariaLabel: `Play ${visible(id)}` });
  play.addEventListener("click", () => {
    const player = make("audio", { controls: true, src: audio.url, ariaLabel: visible(id) });
    player.addEventListener("error", () => missing("the file cannot be played, or is gone"));
    player.addEventListener("play", () => {
      for (const other of document.querySelectorAll("audio")) if (other !== player) other.pause();
    });
    cell.replaceChildren(player);
    player.focus();
    player.play().catch(() => {}); // "error" tells of it
  });
  cell.append(play);
  return cell;
}

function system(row, heard, n) {
  const box = make("div");
  if (systems.length > 1) box.append(text("h3", systems[n]));
  if (!heard) {
    box.append(text("p", "not in this system's predictions", "muted"));
    return box;
  }
  if (heard.error) box.append(text("p", `Failed: ${heard.error}`, "muted"));
  const tokens = heard.edits.flatMap((edit) => (typeof edit === "string" ? edit.split(" ").map((w) => ["", w, w]) : [edit]));
  const dense = data.sets[row.set].rate === "CER" ? " dense" : "";
  const aligned = make("div", { className: `aligned${dense}`, ariaHidden: "true" }, ...tokens.slice(0, TOKENS).map(token));
  box.append(text("p", spoken(heard), "unseen"), aligned);
  if (tokens.length > TOKENS) {
    const rest = make("button", { type: "button", textContent: `Show all ${count(tokens.length)} tokens` });
    rest.addEventListener("click", () => {
      aligned.append(...tokens.slice(TOKENS).map(token));
      rest.remove();
    });
    box.append(rest);
  }
  return box;
}

function token([kind, reference, hypothesis]) {
  const made = make("span", { className: `t ${kind}` }, text("span", reference), text("span", hypothesis));
  if (kind) made.append(make("b", { textContent: kind.toUpperCase() }));
  return made;
}

/** The alignment for those who hear the page: columns read word by word make no sense. */
function spoken(heard) {
  const wrong = heard.edits.filter((edit) => typeof edit !== "string");
  const said = wrong.map(([kind, a, b]) => `${KINDS[kind]} ${a}${a && b ? " as " : ""}${b}`);
  return wrong.length ? `${errors(heard)} of ${heard.words} wrong: ${said.join(", ")}.` : "All is right.";
}

// ---- exports of what is listed ----

function save(name, type, content) {
  const link = make("a", { download: name, href: URL.createObjectURL(new Blob([content], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** A cell for CSV; an apostrophe keeps spreadsheets from running what somebody wrote as a formula. */
function cell(value) {
  if (typeof value === "number") return Number.isNaN(value) ? "" : String(value);
  const harmless = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(harmless) ? `"${harmless.replaceAll('"', '""')}"` : harmless;
}

function csv() {
  const head = ["set", "protocol", "id", "speaker", "duration_s", "reference"];
  for (const name of systems) {
    head.push(...["hypothesis", "ref_tokens", "ins", "del", "sub", "flags", "error"].map((what) => `${what} (${name})`));
  }
  const lines = state.rows.map((row) => [
    data.sets[row.set].name, `${data.sets[row.set].rate}, ${data.sets[row.set].label}`, row.id, row.speaker,
    row.duration ?? NaN, row.reference,
    ...row.systems.flatMap((heard) => heard
      ? [heard.text, heard.words, heard.ins, heard.del, heard.sub, heard.flags.join(" "), heard.error]
      : ["", NaN, NaN, NaN, NaN, "", "not predicted"]),
  ]);
  return [head, ...lines].map((line) => line.map(cell).join(",") + "\r\n").join("");
}

const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u;
const width = (word) => [...word].reduce((sum, char) => sum + (WIDE.test(char) ? 2 : /\p{M}/u.test(char) ? 0 : 1), 0);

/** REF, HYP and Eval lines as sclite's pra has them: errors in capitals, stars for what is not there. */
function pra() {
  const blocks = state.rows.flatMap((row) => row.systems.map((heard, n) => heard && alignment(row, heard, systems[n])));
  return blocks.filter(Boolean).join("\n");
}

function alignment(row, heard, name) {
  const lines = { ref: ["REF: "], hyp: ["HYP: "], eval: ["Eval:"] };
  for (const edit of heard.edits) {
    const tokens = typeof edit === "string" ? edit.split(" ").map((word) => ["", word, word]) : [edit];
    for (const [kind, reference, hypothesis] of tokens) {
      let [a, b] = [reference, hypothesis].map((word) => (kind ? visible(word).toUpperCase() : visible(word)));
      const columns_ = Math.max(width(a), width(b), 1);
      if (!a) a = "*".repeat(columns_);
      if (!b) b = "*".repeat(columns_);
      const pad = (word) => word + " ".repeat(columns_ - width(word));
      lines.ref.push(pad(a));
      lines.hyp.push(pad(b));
      lines.eval.push(pad(kind.toUpperCase()));
    }
  }
  const correct = heard.words - heard.sub - heard.del;
  const set = data.sets[row.set];
  return [
    `id: (${visible(row.id)})`, `System: ${visible(name)}`, `Set: ${visible(set.name)} (${set.rate}, ${visible(set.label)})`,
    `Scores: (#C #S #D #I) ${correct} ${heard.sub} ${heard.del} ${heard.ins}`,
    ...Object.values(lines).map((words) => words.join(" ").trimEnd()), "",
  ].join("\n");
}

// ---- set up ----

function head() {
  for (const column of columns) {
    const button = text("button", column.name);
    button.type = "button";
    const cell_ = make("th", { scope: "col", className: column.show ? "n" : "" }, button);
    button.addEventListener("click", () => {
      state.descending = state.sorted === column ? !state.descending : Boolean(column.show);
      state.sorted = column;
      for (const other of get("rows").querySelectorAll("th")) other.removeAttribute("aria-sort");
      cell_.ariaSort = state.descending ? "descending" : "ascending";
      choose();
    });
    get("rows").tHead.rows[0].append(cell_);
  }
  for (const name of ["Flags", "Audio"]) get("rows").tHead.rows[0].append(make("th", { scope: "col", textContent: name }));
}

function options(id, values) {
  for (const [value, name] of values) get(id).append(make("option", { value, textContent: visible(name) }));
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    const now = chosen ?? (dark.matches ? "dark" : "light");
    get("theme").ariaPressed = String(now === "dark");
    if (chosen) document.documentElement.dataset.theme = chosen;
    return now;
  };
  get("theme").hidden = false;
  get("theme").addEventListener("click", () => {
    chosen = apply() === "dark" ? "light" : "dark";
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

const alike = (values) => [...new Set(values)].filter(Boolean).sort(collator.compare).map((value) => [value, value]);
options("set", data.sets.map(({ name }, n) => [n, name]));
options("speaker", alike(data.rows.map((row) => row.speaker)));
options("flag", alike(data.rows.flatMap((row) => row.systems.flatMap((heard) => heard?.flags ?? []))));
if (systems.length > 1) {
  options("difference", [["differ", "numbers differ"], ["first", `${systems[0]} has fewer`], ["second", `${systems[1]} has fewer`]]);
  get("versus").hidden = false;
}
get("filters").addEventListener("submit", (event) => event.preventDefault());
get("filters").addEventListener("input", choose);
get("filters").addEventListener("reset", () => setTimeout(choose));
get("size").addEventListener("change", () => show(0));
get("page").addEventListener("change", () => show(Math.floor(Number(get("page").value) || 1) - 1));
get("previous").addEventListener("click", () => show(state.page - 1));
get("next").addEventListener("click", () => show(state.page + 1));
get("csv").addEventListener("click", () => save("utterances.csv", "text/csv", csv()));
get("pra").addEventListener("click", () => save("alignments.txt", "text/plain", pra()));
theme();
head();
get("list").hidden = false;
choose();
