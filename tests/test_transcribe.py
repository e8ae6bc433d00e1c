import tempfile

import numpy as np
import soundfile

import arkasr
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

    many = transcriber.transcribe(source(), batch_size=2)  # type: ignore[call-overload]
    assert drawn == 0
    first = next(many)
    assert drawn == 2
    assert [first, *many][2].text == transcriber.transcribe(clips[2]).text


def test_a_named_temporary_file_is_one_clip(make_checkpoint: MakeCheckpoint) -> None:
    """It is no io.IOBase, and its lines were once taken for file names."""
    transcriber = arkasr.load_model(make_checkpoint())
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        soundfile.write(file, np.zeros(8_000), 16_000, format="WAV")
        file.seek(0)
        transcript = transcriber.transcribe(file)
    assert isinstance(transcript, arkasr.Transcript)
    assert transcript.duration_s == 0.5
