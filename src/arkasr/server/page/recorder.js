// The audio thread of a recording: 16-bit samples in blocks. Any message ends it; null is the last one back.

const BLOCK_SAMPLES = 2048;

class Recorder extends AudioWorkletProcessor {
  block = new Int16Array(BLOCK_SAMPLES);
  filled = 0;
  ended = false;

  constructor() {
    super();
    this.port.onmessage = () => {
      this.ended = true;
      this.port.postMessage(this.block.slice(0, this.filled));
      this.port.postMessage(null);
    };
  }

  process([[samples = []]]) {
    if (this.ended) return false;
    for (const sample of samples) {
      this.block[this.filled++] = Math.round(Math.max(-1, Math.min(1, sample)) * 32767);
      if (this.filled === BLOCK_SAMPLES) {
        this.port.postMessage(this.block);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
