"""An engine of your own is any object with `generate`; here one that measures the real one: FILE..."""

import sys
import time
from collections.abc import Sequence

import arkasr
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.engines import DecodeOptions, Engine, Generation


class Measured:
    """Passes clips on and says how fast they were recognized."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """See `arkasr.engines.Engine`."""
        started = time.perf_counter()
        generations = self.inner.generate(waveforms, options)
        audio_s = sum(len(waveform) for waveform in waveforms) / SAMPLE_RATE
        print(f"RTFx {audio_s / (time.perf_counter() - started):.0f}", file=sys.stderr)
        return generations


tiny = arkasr.load_model("tiny")
transcriber = arkasr.load_model("tiny", engine=Measured(tiny.engine))
for transcript in transcriber.transcribe(sys.argv[1:]):
    print(transcript.text)
