"""The shipped model on real recorded speech."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arkasr
from arkasr import metrics
from arkasr.data import read_manifest

ROOT = Path(__file__).parents[1]
CLIPS = {
    "an4-rubout.flac": "RUBOUT G M E F THREE NINE",
    "an4-patterson.flac": "P A T T E R S O N",
}


@pytest.fixture(scope="module")
def tiny() -> arkasr.Transcriber:
    return arkasr.load_model("tiny")


@pytest.mark.parametrize("clip", CLIPS)
def test_clips_in_the_repository(tiny: arkasr.Transcriber, clip: str) -> None:
    transcript = tiny.transcribe(ROOT / "examples" / "audio" / clip)
    assert transcript.text == CLIPS[clip]
    assert [segment.flags for segment in transcript.segments] == [()]
    assert 0.3 < transcript.confidence <= 1


@pytest.mark.parametrize(("name", "words", "limit"), [("an4", 773, 0.15), ("fsdd", 500, 0.35)])
def test_word_error_rate(tiny: arkasr.Transcriber, shared: Path, name: str, words: int, limit: float) -> None:
    utterances = list(read_manifest(shared / "speech" / name / "manifest.jsonl", split="test"))
    transcripts = tiny.transcribe((utterance.audio for utterance in utterances), batch_size=16)
    errors = metrics.corpus_word_errors((u.text, t.text) for u, t in zip(utterances, transcripts, strict=True))
    assert errors.reference_words == words
    assert errors.rate <= limit


def test_real_clips_do_not_depend_on_their_batch(tiny: arkasr.Transcriber, shared: Path) -> None:
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))[::6]
    alone = [transcript.tokens for transcript in tiny.transcribe((u.audio for u in utterances), batch_size=1)]
    together = [transcript.tokens for transcript in tiny.transcribe((u.audio for u in utterances), batch_size=22)]
    assert alone == together


def test_the_package_holds_at_most_10_mb_of_model() -> None:
    folder = ROOT / "src" / "arkasr" / "weights" / "tiny"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000


# serve_client.py needs a server, ray_batch.py a Ray, lora.py no clip: their own tests run them.
ELSEWHERE = {ROOT / "examples" / name for name in ("serve_client.py", "ray_batch.py", "lora.py")}
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - ELSEWHERE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples(example: Path) -> None:
    clip = ROOT / "examples" / "audio" / "an4-rubout.flac"
    printed = subprocess.run([sys.executable, str(example), str(clip)], capture_output=True, text=True, check=True)
    assert printed.stdout.startswith(CLIPS[clip.name])
    assert len(example.read_text().splitlines()) <= 40


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_says_what_the_cpu_says(tiny: arkasr.Transcriber, dtype: str) -> None:
    assert torch.cuda.is_available()
    clips = [ROOT / "examples" / "audio" / name for name in CLIPS]
    cuda = arkasr.load_model("tiny", device="cuda", dtype=dtype)  # type: ignore[arg-type]
    assert [t.tokens for t in cuda.transcribe(clips)] == [t.tokens for t in tiny.transcribe(clips)]
