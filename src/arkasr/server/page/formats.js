// Files of a transcript {file, duration, text, segments: [{start, end, text}], usage}; times are seconds.

const two = (number) => String(number).padStart(2, "0");
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function time(ms, point) {
  const parts = [ms / 3_600_000, (ms / 60_000) % 60, (ms / 1000) % 60];
  return parts.map((part) => two(Math.floor(part))).join(":") + point + String(ms % 1000).padStart(3, "0");
}

/** A line of times and one of text for each segment with text: at least 1 ms long, and never into the next one. */
function cues({ segments }, point) {
  const clean = (text) => text.replace(/[\s\u0000-\u001f\u007f-\u009f]+/g, " ").trim();
  const spoken = segments.map((segment) => ({ ...segment, text: clean(segment.text) })).filter(({ text }) => text);
  const starts = [];
  for (const { start } of spoken) starts.push(Math.max((starts.at(-1) ?? -1) + 1, Math.round(start * 1000)));
  return spoken.map(({ end, text }, i) => {
    const end_ms = Math.min(Math.max(starts[i] + 1, Math.round(end * 1000)), starts[i + 1] ?? Infinity);
    // An arrow in the text would be read as a line of times, and srt has no escape for it.
    return { times: `${time(starts[i], point)} --> ${time(end_ms, point)}`, text: text.replaceAll("-->", "-- >") };
  });
}

/** What writes the file of an ending. */
export const formats = {
  txt: ({ text }) => `${text.trim()}\n`,
  srt: (heard) => cues(heard, ",").map(({ times, text }, i) => `${i + 1}\n${times}\n${text}\n\n`).join(""),
  vtt: (heard) => `WEBVTT\n\n${cues(heard, ".").map(({ times, text }) => `${times}\n${escaped(text)}\n\n`).join("")}`,
  json: ({ file, duration, text, segments, usage }) => {
    const numbered = segments.map(({ start, end, text }, id) => ({ id, start, end, text: text.trim() }));
    const record = { file, task: "transcribe", language: null, duration, text: text.trim(), segments: numbered, usage };
    return `${JSON.stringify(record, null, 2)}\n`;
  },
};
