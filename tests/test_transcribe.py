import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import arkasr
from arkasr.audio import AudioSource
from conftest import MakeCheckpoint


def test_one_clip_or_many_lazily(make_checkpoint: MakeCheckpoint) -> None:
    transcriber = arkasr.load_model(make_checkpoint())
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(n).astype(np.float32) / 10, 16_000) for n in (4_000, 9_000, 16_000)]
    drawn = 0

    def source() -> "object":
        nonlocal drawn
        for clip in clips:
            drawn += 1
            yield clip

    options = arkasr.DecodeOptions(guard=False)
    many = transcriber.transcribe(source(), options=options, vad=False, batch_size=2)  # type: ignore[call-overload]
    assert drawn == 0
    first = next(many)
    assert drawn >= 1
    texts = [transcript.text for transcript in (first, *many)]
    assert texts == [transcriber.transcribe(clip, options=options, vad=False).text for clip in clips]
    assert all(texts)


def test_sources_are_drawn_only_a_little_ahead(make_checkpoint: MakeCheckpoint) -> None:
    """A generator of a million files must neither be exhausted before the first text, nor fill the memory."""
    drawn = 0

    def sources() -> Iterator[AudioSource]:
        nonlocal drawn
        while True:
            drawn += 1
            yield np.zeros(1_600, np.float32), 16_000

    transcripts = arkasr.load_model(make_checkpoint()).transcribe(sources(), batch_size=2)
    for taken in range(1, 20):
        next(transcripts)
        time.sleep(0.02)
        # A batch is out, four pieces wait (a span and an end of each source), and one is in the thread's hands.
        assert drawn <= taken + 2 + 4 + 1


def test_a_source_that_raises(make_checkpoint: MakeCheckpoint) -> None:
    """What the caller's own iterable raises reaches the caller, after what was drawn before."""

    def sources() -> Iterator[AudioSource]:
        yield np.zeros(1_600, np.float32), 16_000
        raise KeyError("mine")

    transcripts = arkasr.load_model(make_checkpoint()).transcribe(sources())
    assert next(transcripts).duration_s == pytest.approx(0.1)
    with pytest.raises(KeyError, match="mine"):
        next(transcripts)


def test_timings_of_every_stage_remain(make_checkpoint: MakeCheckpoint) -> None:
    """Regression: the last segment of a recording came without timings, and those before were forgotten."""
    transcriber = arkasr.load_model(make_checkpoint())
    clip = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10, 16_000
    timings_s = transcriber.transcribe(clip, options=arkasr.DecodeOptions(guard=False), vad=False).timings_s
    assert {"load", "log_mel", "encoder", "prefill", "decode"} <= timings_s.keys()
    assert all(seconds > 0 for seconds in timings_s.values())


def test_a_named_temporary_file_is_one_clip(make_checkpoint: MakeCheckpoint) -> None:
    """It is no io.IOBase, and its lines were once taken for file names."""
    transcriber = arkasr.load_model(make_checkpoint())
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        soundfile.write(file, np.zeros(8_000), 16_000, format="WAV")
        file.seek(0)
        transcript = transcriber.transcribe(file)
    assert isinstance(transcript, arkasr.Transcript)
    assert transcript.duration_s == 0.5


def test_a_generator_that_is_never_closed_does_not_abort_the_exit() -> None:
    """The thread that runs ahead was in the voice activity detector when its libraries were taken down: SIGABRT."""
    clip = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
    program = f"""
import arkasr
transcripts = arkasr.load_model("tiny").transcribe([{str(clip)!r}] * 400)
for _ in range(5):
    next(transcripts)
raise SystemExit(3)
"""
    codes = {subprocess.run([sys.executable, "-c", program], check=False).returncode for _ in range(3)}
    assert codes == {3}
