"""The backend for circuitforge's programs: its protocol, confidences that mean something, and many callers at once."""

import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import logging
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, get_origin, get_type_hints, runtime_checkable

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from arkasr import cf_voice, files, load_model, pins
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.cf_voice import ARKASRBackend, Calibration, STTResult, STTSegment, make_ark_backend
from arkasr.checkpoint import Checkpoint, open_checkpoint
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions, Generation
from arkasr.engines.shared import EngineClosedError
from arkasr.errors import AudioError, UsageError
from conftest import MakeCheckpoint

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "examples" / "audio" / "an4-rubout.flac"
TIMEOUT_S = 10.0
RECORD = ROOT / "bench" / "results" / "2026-11-23-cpu2-confidence.json"


def protocol() -> Any:
    """circuitforge_core.stt where it is installed, else its interface as it was read at the backend's pinned commit."""
    if importlib.util.find_spec("circuitforge_core") is not None:
        return importlib.import_module("circuitforge_core.stt")

    @dataclasses.dataclass(frozen=True)
    class Segment:
        start_s: float
        end_s: float
        text: str
        confidence: float

    @dataclasses.dataclass(frozen=True)
    class Result:
        text: str
        confidence: float
        below_threshold: bool
        language: str | None = None
        duration_s: float | None = None
        segments: list[Segment] = dataclasses.field(default_factory=list)
        model: str = ""
        CONFIDENCE_DEFAULT_THRESHOLD: float = 0.75

    @runtime_checkable
    class Backend(Protocol):
        def transcribe(
            self, audio: bytes, *, language: str | None = None, confidence_threshold: float = 0.75
        ) -> Result: ...

        @property
        def model_name(self) -> str: ...

        @property
        def vram_mb(self) -> int: ...

    return SimpleNamespace(STTSegment=Segment, STTResult=Result, STTBackend=Backend)


@pytest.fixture(scope="module")
def backend() -> Iterator[ARKASRBackend]:
    with make_ark_backend() as made:
        yield made


class Saying:
    """An engine that says the same tokens of every clip, with one probability."""

    def __init__(self, ids: Sequence[int], probability: float) -> None:
        self.ids, self.logprob = tuple(ids), math.log(probability)

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        return [Generation(self.ids, (self.logprob,) * len(self.ids), self.logprob) for _ in waveforms]


def silence(seconds: float) -> Waveform:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def wav(samples: Waveform) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return out.getvalue()


# ---- the protocol ----


def test_it_is_a_backend_of_the_protocol(backend: ARKASRBackend) -> None:
    assert isinstance(backend, protocol().STTBackend)
    theirs = inspect.signature(protocol().STTBackend.transcribe).parameters
    ours = inspect.signature(ARKASRBackend.transcribe).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert (backend.model_name, backend.vram_mb) == ("tiny", 0)
    assert type(backend.vram_mb) is int


def fields_of(kind: Any) -> list[tuple[object, ...]]:
    """Name, type and default of each; of a list of their own class only that it is one."""
    hints = get_type_hints(kind)
    types = [get_origin(hints[f.name]) if get_origin(hints[f.name]) is list else hints[f.name] for f in fields(kind)]
    return [(f.name, t, f.default, f.default_factory) for f, t in zip(fields(kind), types, strict=True)]


def test_results_have_the_protocols_fields() -> None:
    for name, ours in (("STTResult", STTResult), ("STTSegment", STTSegment)):
        theirs = getattr(protocol(), name)
        assert fields_of(ours) == fields_of(theirs)
    with pytest.raises(dataclasses.FrozenInstanceError):
        STTResult("", 0.0, True).text = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        STTSegment(0.0, 1.0, "", 0.0).text = "other"  # type: ignore[misc]
    assert STTResult.CONFIDENCE_DEFAULT_THRESHOLD == 0.75


def test_a_result_has_the_words_and_the_types(backend: ARKASRBackend) -> None:
    result = backend.transcribe(CLIP.read_bytes())
    assert result.text == "RUBOUT G M E F THREE NINE"
    types = [type(value) for value in (result.text, result.confidence, result.below_threshold, result.duration_s)]
    assert types == [str, float, bool, float]
    assert result.duration_s == pytest.approx(4.0, abs=0.1)
    (segment,) = result.segments
    assert all(type(value) is float for value in (segment.start_s, segment.end_s, segment.confidence))
    assert 0 <= segment.start_s < segment.end_s <= 4.1
    assert segment.confidence == result.confidence > 0.9
    assert (result.below_threshold, result.model, result.language) == (False, "tiny", None)
    json.dumps(dataclasses.asdict(result))


def test_the_lite_profile_needs_no_torch() -> None:
    program = (
        "import sys; from pathlib import Path; from arkasr.cf_voice import make_ark_backend\n"
        f"print(make_ark_backend().transcribe(Path({str(CLIP)!r}).read_bytes()).text)\n"
        "assert not {'torch', 'transformers', 'fastapi', 'circuitforge_core'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "RUBOUT G M E F THREE NINE\n"


def test_a_hint_of_the_language_is_given_back_and_told_once(
    backend: ARKASRBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="arkasr.cf_voice"):
        results = [backend.transcribe(CLIP.read_bytes(), language="tlh") for _ in range(2)]
    assert [result.language for result in results] == ["tlh", "tlh"]
    assert results[0].text == "RUBOUT G M E F THREE NINE"
    assert [record.message for record in caplog.records] == [
        "language 'tlh': not obeyed; ARK-ASR hears the language by itself"
    ]


# ---- what is sent ----


@pytest.mark.parametrize(
    "audio",
    [b"", b"\x00", b"no audio at all" * 50, b"RIFF\x00\x00\x00\x00WAVE", CLIP.read_bytes()[:5000], wav(silence(0))],
    ids=["empty", "a byte", "text", "a head", "half a file", "no samples"],
)
def test_what_is_no_recording_is_refused(backend: ARKASRBackend, audio: bytes) -> None:
    with pytest.raises(AudioError):
        backend.transcribe(audio)


@pytest.mark.parametrize("audio", [str(CLIP), CLIP, "-", None, (np.zeros(16_000, np.float32), 16_000)], ids=repr)
def test_nothing_but_bytes_is_read(backend: ARKASRBackend, audio: object) -> None:
    """A name would open a file of this machine."""
    with pytest.raises(AudioError, match="wanted bytes"):
        backend.transcribe(audio)  # type: ignore[arg-type]


def test_bytes_may_lie_anywhere(backend: ARKASRBackend) -> None:
    data = CLIP.read_bytes()
    expected = backend.transcribe(data)
    for other in (bytearray(data), memoryview(data)):
        assert backend.transcribe(other) == expected  # type: ignore[arg-type]  # typed as the protocol is


def test_silence_has_no_words_and_no_confidence(backend: ARKASRBackend) -> None:
    result = backend.transcribe(wav(silence(3)))
    assert (result.text, result.segments, result.confidence, result.below_threshold) == ("", [], 0.0, True)
    assert result.duration_s == 3.0
    assert not backend.transcribe(wav(silence(1)), confidence_threshold=0).below_threshold  # 0 is not below 0


def test_bare_samples_are_those_of_the_file(backend: ARKASRBackend) -> None:
    samples, rate = soundfile.read(CLIP, dtype="int16")
    assert rate == SAMPLE_RATE
    with make_ark_backend(raw_pcm=True) as raw:
        assert raw.transcribe(samples.astype("<i2").tobytes()) == backend.transcribe(CLIP.read_bytes())
        for audio, why in ((b"", "empty"), (b"\x00" * 4001, "whole number"), (CLIP.read_bytes(), "a file")):
            with pytest.raises(AudioError, match=why):
                raw.transcribe(audio)


# ---- threads ----


def at_once(said: Callable[[bytes], object], clips: Sequence[bytes]) -> list[object]:
    """What eight threads hear; a call that never ends fails the test and keeps nobody."""
    heard: dict[int, object] = {}

    def some(first: int) -> None:
        heard.update({n: said(clips[n]) for n in range(first, len(clips), 8)})

    threads = [threading.Thread(target=some, args=(first,), daemon=True) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(heard) == list(range(len(clips)))
    return [heard[n] for n in range(len(clips))]


def test_callers_at_once_get_what_they_get_alone(backend: ARKASRBackend, shared: Path) -> None:
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))[:24]
    clips = [utterance.audio.read_bytes() for utterance in utterances]
    alone = [backend.transcribe(clip) for clip in clips]
    assert at_once(backend.transcribe, clips) == alone
    assert len({result.text for result in alone}) > 20


def test_one_callers_bad_audio_is_nobody_elses(backend: ARKASRBackend) -> None:
    good = CLIP.read_bytes()
    expected = backend.transcribe(good)

    def said(audio: bytes) -> STTResult | type:
        try:
            return backend.transcribe(audio)
        except AudioError as error:
            return type(error)

    assert at_once(said, [good, b"nonsense", good] * 8) == [expected, AudioError, expected] * 8


def test_a_closed_backend_says_so() -> None:
    with make_ark_backend() as closed:
        pass
    closed.close()
    with pytest.raises(EngineClosedError):
        closed.transcribe(CLIP.read_bytes())


# ---- confidence ----

curves = st.builds(Calibration, st.floats(0.05, 8), st.floats(-8, 8))
confidences = st.floats(0, 1)


@given(curves, confidences, confidences)
def test_a_calibration_rises_and_stays_a_probability(curve: Calibration, one: float, other: float) -> None:
    low, high = curve(min(one, other)), curve(max(one, other))
    assert 0 <= low <= high + 1e-12
    assert high <= 1
    assert (curve(0.0), curve(1.0)) == (0.0, 1.0)


@given(curves, st.floats(0.01, 0.99))
def test_a_calibration_is_platts(curve: Calibration, confidence: float) -> None:
    log_odds = math.log(confidence / (1 - confidence))
    assert curve(confidence) == pytest.approx(1 / (1 + math.exp(-(curve.slope * log_odds + curve.offset))))


def test_the_threshold_is_not_below_itself(tiny: Checkpoint) -> None:
    ids = tiny.rules.target_ids("YES")[:-1]
    with ARKASRBackend(Saying(ids, 0.5), tiny.rules, model_name="fake") as fake:
        audio = CLIP.read_bytes()
        confidence = fake.transcribe(audio).confidence
        assert confidence == pytest.approx(0.5)
        assert not fake.transcribe(audio, confidence_threshold=confidence).below_threshold
        assert fake.transcribe(audio, confidence_threshold=math.nextafter(confidence, 1)).below_threshold
        assert fake.transcribe(audio).below_threshold
        for wrong in (-0.1, 1.1, math.nan, math.inf):
            with pytest.raises(UsageError, match=r"0\.\.1"):
                fake.transcribe(audio, confidence_threshold=wrong)


def test_a_backend_says_whether_its_confidences_were_measured(tiny: Checkpoint) -> None:
    ids = tiny.rules.target_ids("YES")[:-1]
    curve = Calibration(2.0, -1.0)
    with ARKASRBackend(Saying(ids, 0.9), tiny.rules, model_name="fake") as raw:
        assert raw.calibration is None
        assert raw.transcribe(CLIP.read_bytes()).confidence == pytest.approx(0.9)
    with ARKASRBackend(Saying(ids, 0.9), tiny.rules, model_name="fake", calibration=curve) as measured:
        result = measured.transcribe(CLIP.read_bytes())
        assert result.confidence == result.segments[0].confidence == pytest.approx(curve(0.9))


def test_the_whole_is_the_mean_of_its_words() -> None:
    segments = [STTSegment(0, 1, "ONE TWO THREE", 0.9), STTSegment(1, 2, "FOUR", 0.5)]
    assert cf_voice.overall(segments) == pytest.approx(0.8)
    assert cf_voice.overall([]) == 0.0
    assert cf_voice.overall([STTSegment(0, 1, "ONE TWO THREE", 1.0)] * 7) == 1.0


def test_a_long_recording_is_the_mean_of_its_segments(backend: ARKASRBackend) -> None:
    samples, _ = soundfile.read(CLIP, dtype="float32")
    noise = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32)
    pause = silence(2)
    result = backend.transcribe(wav(np.concatenate([samples, pause, samples + 0.05 * noise, pause] * 3)))
    assert len(result.segments) > 1
    low, *_, high = sorted(segment.confidence for segment in result.segments)
    assert low < result.confidence < high
    assert result.confidence == cf_voice.overall(result.segments)


def test_the_shipped_model_alone_has_the_measured_numbers(
    backend: ARKASRBackend, tiny: Checkpoint, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """The numbers in the code are those of the record, of the shipped weights; weights one bit off get none."""
    record = json.loads(RECORD.read_text())
    assert backend.calibration is not None
    assert dataclasses.asdict(backend.calibration) == record["calibration"]
    assert record["weights"][files.WEIGHTS]["sha256"] == pins.PINS["tiny"].sha256[files.WEIGHTS]
    copy = tmp_path / "copy"
    shutil.copytree(tiny.folder, copy)
    assert cf_voice.calibration_of(open_checkpoint(copy)) == backend.calibration
    weights = bytearray((copy / files.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (copy / files.WEIGHTS).write_bytes(weights)
    with make_ark_backend(copy) as tuned:
        assert tuned.calibration is None
    assert cf_voice.calibration_of(open_checkpoint(make_checkpoint())) is None
    assert cf_voice.calibration_of(open_checkpoint(pins.SHIPPED / "tiny-int8")) is None


def test_confidences_tell_noise_from_speech(backend: ARKASRBackend) -> None:
    samples, _ = soundfile.read(CLIP, dtype="float32")
    noise = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32)
    clean, *worse = [backend.transcribe(wav(samples + level * noise)).confidence for level in (0.0, 0.05, 0.2)]
    assert clean > 0.9
    assert all(confidence < clean for confidence in worse)


def test_raw_confidences_are_the_transcribers() -> None:
    transcript = load_model("tiny", device="cpu").transcribe(CLIP)
    (segment,) = transcript.segments
    with make_ark_backend() as measured:
        assert measured.calibration is not None
        assert measured.transcribe(CLIP.read_bytes()).confidence == measured.calibration(segment.confidence)


# ---- the factory ----


def test_the_memory_of_a_gpu_is_told_beforehand() -> None:
    with pytest.raises(UsageError, match="device auto"):
        make_ark_backend(device="auto")
    with pytest.raises(UsageError, match="device"):
        make_ark_backend(device="cuda:7")


def test_weights_on_a_gpu_are_counted(tiny: Checkpoint) -> None:
    stored = (tiny.folder / files.WEIGHTS).stat().st_size / 2**20  # bfloat16, and a small header
    assert cf_voice._weights_mib(tiny, "bfloat16") == math.ceil(stored)
    assert cf_voice._weights_mib(tiny, "float32") == pytest.approx(2 * stored, abs=1)
