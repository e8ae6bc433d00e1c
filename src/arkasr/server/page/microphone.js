// A recording as a WAV file: mono, 16 bits, at 16 kHz where the browser can; no server needs a decoder for it.

const RATE = 16_000;

/** Records until `stop()` or the loss of the microphone; calls `onSound(level from 0 to 1, seconds so far)`. */
export async function record(onSound) {
  const asItIs = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: asItIs });
  try {
    return await tape(stream, onSound);
  } catch (error) {
    release(stream); // no microphone stays open that nobody listens to
    throw error;
  }
}

const release = (stream) => stream.getTracks().forEach((track) => track.stop());

async function tape(stream, onSound) {
  const [context, source] = listen(stream);
  await context.audioWorklet.addModule(new URL("recorder.js", import.meta.url));
  const recorder = new AudioWorkletNode(context, "recorder", { channelCount: 1, channelCountMode: "explicit" });
  const stop = () => recorder.port.postMessage("end");
  const blocks = [];
  let samples = 0;
  const file = new Promise((resolve) => {
    recorder.port.onmessage = ({ data: block }) => {
      if (block !== null) {
        blocks.push(block);
        samples += block.length;
        onSound(level(block), samples / context.sampleRate);
        return;
      }
      release(stream);
      context.close();
      resolve(wav(blocks, context.sampleRate));
    };
  });
  stream.getTracks()[0].onended = stop; // unplugged, or taken back by the user
  source.connect(recorder).connect(context.destination); // silence; a graph without an end need not run
  return { stop, file };
}

/** A context and the microphone in it: Firefox refuses a rate other than the microphone's, and the server takes any. */
function listen(stream) {
  const context = new AudioContext({ sampleRate: RATE });
  try {
    return [context, context.createMediaStreamSource(stream)];
  } catch {
    context.close();
    const other = new AudioContext();
    return [other, other.createMediaStreamSource(stream)];
  }
}

/** Loudness of a block: 0 is -60 dB or less. */
function level(block) {
  const power = block.reduce((sum, sample) => sum + (sample / 32768) ** 2, 0) / Math.max(1, block.length);
  return Math.max(0, Math.min(1, 1 + Math.log10(power) / 6));
}

function wav(blocks, rate) {
  const bytes = blocks.reduce((sum, block) => sum + block.byteLength, 0);
  const header = new DataView(new ArrayBuffer(44));
  const tag = (at, letters) => [...letters].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)));
  tag(0, "RIFF");
  header.setUint32(4, 36 + bytes, true);
  tag(8, "WAVEfmt ");
  header.setUint32(16, 16, true); // bytes of the format
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, rate, true);
  header.setUint32(28, 2 * rate, true); // bytes a second
  header.setUint16(32, 2, true); // bytes a frame
  header.setUint16(34, 16, true); // bits a sample
  tag(36, "data");
  header.setUint32(40, bytes, true);
  const now = new Date().toISOString().slice(0, 19).replace("T", "-").replaceAll(":", "");
  return new File([header, ...blocks], `recording-${now}.wav`, { type: "audio/wav" });
}
