"""A real vLLM on the CPU serves `tiny` and a random checkpoint through the plugin; run by scripts/vllm.

Below the server: test_vllm_plugin; offline: test_vllm_engine.
"""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch

from arkasr import audio, checkpoint, endpoint, files, model
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.data import Utterance, read_manifest
from arkasr.engines import MAX_NEW_TOKENS, DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.text import TextRules
from conftest import byte_tokenizer, small_config
from test_engine import LETTER_A, noise, rigged
from vllm_serving import VllmFailedError, need_vllm, serve_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
CLIP = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
CLIP_TEXT = "RUBOUT G M E F THREE NINE"
NUM_CLIPS = 30


@pytest.fixture(scope="module")
def url(tiny: Checkpoint) -> Iterator[str]:
    """Of `tiny`, compiled as vLLM does where nobody says otherwise."""
    need_vllm()
    with serve_vllm(tiny.folder, "--dtype", "float32") as base_url:
        yield base_url


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def utterances(shared: Path) -> list[Utterance]:
    return list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))[:NUM_CLIPS]


class Reference:
    """What the reference engine says."""

    def __init__(self, source: Checkpoint) -> None:
        self.engine, self.rules = PyTorchEngine.load(source, device="cpu"), source.rules

    def text(self, waveform: Waveform) -> str:
        (said,) = self.engine.generate([waveform], DecodeOptions())
        return self.rules.to_text(list(said.ids))


@pytest.fixture(scope="module")
def reference(tiny: Checkpoint) -> Reference:
    return Reference(tiny)


def long_recording(utterances: list[Utterance]) -> Waveform:
    """Over a minute of speech, with half a second between two utterances."""
    pause = noise(SAMPLE_RATE // 2, 1e-4)
    pieces = [piece for utterance in utterances for piece in (utterance.waveform(), pause)]
    return np.concatenate(pieces)[: 75 * SAMPLE_RATE]


def as_16_bit(waveform: Waveform) -> bytes:
    return endpoint.encode(waveform, "flac")


def deltas(url: str, content: bytes) -> tuple[list[str], list[str]]:
    """What a streamed answer says, piece by piece, and why its pieces end."""
    with httpx2.stream(
        "POST",
        f"{url}/audio/transcriptions",
        data={"model": "ark", "stream": "true"},
        files={"file": ("a.flac", content)},
        timeout=60,
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices: list[dict[str, Any]] = [json.loads(line)["choices"][0] for line in lines[:-1]]
    return [choice["delta"]["content"] for choice in choices], [
        choice["finish_reason"] for choice in choices if choice.get("finish_reason")
    ]


@pytest.mark.parametrize("parallel", [1, 16])
def test_it_says_what_the_reference_engine_says(
    client: Any, reference: Reference, utterances: list[Utterance], parallel: int
) -> None:
    """30 clips of AN4, alone and 16 at a time."""

    def ask(utterance: Utterance) -> str:
        return str(client.audio.transcriptions.create(model="ark", file=utterance.audio).text)

    expected = [reference.text(utterance.waveform()) for utterance in utterances]
    with ThreadPoolExecutor(parallel) as pool:
        assert list(pool.map(ask, utterances)) == expected
    assert len(set(expected)) > NUM_CLIPS / 2


def test_long_audio_is_cut_at_quiet_points(
    url: str, client: Any, reference: Reference, tiny: Checkpoint, utterances: list[Utterance]
) -> None:
    """The answer is that of vLLM's own chunks, each heard by the reference engine, streamed or not."""
    from vllm.config import ModelConfig
    from vllm.multimodal.audio import split_audio

    from arkasr.vllm_plugin import register
    from arkasr.vllm_plugin.model import ArkasrForConditionalGeneration as Plugged

    register()
    told = Plugged.get_speech_to_text_config(ModelConfig(str(tiny.folder)), "transcribe")
    waveform = audio.load(as_16_bit(long_recording(utterances)))
    chunks = split_audio(
        waveform,
        int(told.sample_rate),
        told.max_audio_clip_s,
        told.overlap_chunk_second,
        told.min_energy_split_window_size,
    )
    assert len(chunks) >= 3
    assert all(20 * SAMPLE_RATE <= len(chunk) <= 30 * SAMPLE_RATE for chunk in chunks[:-1])
    assert all(math.sqrt(np.square(chunk[:800]).mean()) < 1e-3 for chunk in chunks[1:])
    expected = " ".join(reference.text(chunk) for chunk in chunks)
    assert len(expected.split()) > 30
    content = as_16_bit(waveform)
    answer = client.audio.transcriptions.create(model="ark", file=("long.flac", content))
    assert answer.text == expected
    said, ends = deltas(url, content)
    assert "".join(said) == expected
    assert len(said) > 30
    assert ends == ["stop"] * len(chunks)


def test_a_stream_adds_up(url: str) -> None:
    said, ends = deltas(url, CLIP.read_bytes())
    assert "".join(said) == CLIP_TEXT
    assert len(said) > 3
    assert ends == ["stop"]


def test_the_sdk(client: Any) -> None:
    assert [entry.id for entry in client.models.list()] == ["ark"]
    for options in ({}, {"language": "en"}, {"language": "et"}, {"temperature": 0}, {"response_format": "json"}):
        answer = client.audio.transcriptions.create(model="ark", file=CLIP, **options)
        assert answer.text == CLIP_TEXT
        assert answer.usage.seconds == math.ceil(len(audio.load(CLIP)) / SAMPLE_RATE)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"language": "xx"}, 400),
        ({"model": "other"}, 404),
        ({"response_format": "verbose_json"}, 400),
        ({"response_format": "srt"}, 400),
        ({"file": ("a.wav", b"no audio at all")}, 400),
    ],
    ids=str,
)
def test_what_vllm_refuses(client: Any, options: dict[str, Any], status: int) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.audio.transcriptions.create(**({"model": "ark", "file": CLIP} | options))
    assert caught.value.status_code == status


def test_it_transcribes_and_does_nothing_else(client: Any) -> None:
    asked: list[Callable[[], object]] = [
        lambda: client.audio.translations.create(model="ark", file=CLIP),
        lambda: client.completions.create(model="ark", prompt="one"),
        lambda: client.chat.completions.create(model="ark", messages=[{"role": "user", "content": "one"}]),
    ]
    for ask in asked:
        with pytest.raises(openai.APIStatusError) as caught:
            ask()
        assert 400 <= caught.value.status_code < 500


# ---- a random checkpoint with code in its folder ----

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel
class ArkasrConfig(PretrainedConfig):
    model_type = "arkasr"
class ArkasrForConditionalGeneration(PreTrainedModel):
    config_class = ArkasrConfig
"""


HUB_ID, COMMIT = "AutoArk-AI/ARK-ASR-3B", "0" * 40


def tells_forbidden(folder: Path, stop_id: int | None = None) -> Path:
    """A checkpoint by whose logits every forbidden id beats every other, and which does not stop."""
    small = replace(small_config(byte_tokenizer()), decoder_heads=2, kv_heads=1)
    rules = TextRules(byte_tokenizer(), vocab_size=small.vocab_size, eos_token_ids=small.eos_token_ids, place="here")
    wanted = dict.fromkeys(np.flatnonzero(~rules.allowed_ids).tolist(), 50.0) | dict.fromkeys(rules.stop_ids, -1e4)
    config = small if stop_id is None else replace(small, eos_token_ids=(stop_id,))
    model.save(rigged(config, {None: wanted | {LETTER_A: 10.0}}), folder, dtype=torch.float32)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def on_the_hub(folder: Path, cache: Path, marker: Path) -> None:
    """Put it into a cache of Hugging Face's, beside code that every file which may name code names."""
    keys = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "ArkasrConfig", "AutoModelForCausalLM": keys["architectures"][0], "AutoProcessor": "Other"}
    keys["auto_map"] = {kind: f"modeling_arkasr.{name}" for kind, name in named.items()}
    (folder / "config.json").write_text(json.dumps(keys))
    processor = {"auto_map": {"AutoProcessor": "modeling_arkasr.Other"}, "processor_class": "Other"}
    tokenizer = {"auto_map": {"AutoTokenizer": ["modeling_arkasr.Other", None]}}
    for name, content in (("processor", processor), ("preprocessor", processor), ("tokenizer", tokenizer)):
        (folder / f"{name}_config.json").write_text(json.dumps(content))
    (folder / "modeling_arkasr.py").write_text(CODE.format(marker=str(marker)))
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir():
        blob = repository / "blobs" / files.sha256(path)
        path.rename(blob)
        (repository / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{blob.name}")


def test_a_hub_id_is_served_and_its_code_is_not_executed(tmp_path: Path) -> None:
    """No forbidden id is said, and who does not stop is stopped at the cap that other engines have."""
    need_vllm()
    cache, marker = tmp_path / "cache", tmp_path / "EXECUTED"
    on_the_hub(tells_forbidden(tmp_path / "model"), cache, marker)
    with serve_vllm(HUB_ID, "--dtype", "float32", "--enforce-eager", HF_HUB_CACHE=str(cache)) as base_url:
        hear: Any = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0).audio.transcriptions.create
        clip = ("a.flac", as_16_bit(noise(16_000)))
        assert hear(model="ark", file=clip).text == byte_tokenizer().decode([LETTER_A]) * MAX_NEW_TOKENS
        warm = [hear(model="ark", file=clip, temperature=1.5, extra_body={"seed": seed}).text for seed in (1, 1, 2)]
        assert warm[0] == warm[1] != warm[2]
        assert all(len(text) > MAX_NEW_TOKENS // 4 and "<|" not in text for text in warm)
    assert not marker.exists()


def test_a_checkpoint_whose_stop_vllm_would_not_see_is_not_served(tmp_path: Path) -> None:
    need_vllm()
    folder = tells_forbidden(tmp_path / "model", stop_id=LETTER_A)
    unseen = checkpoint.open_checkpoint(folder).rules.stop_ids[0]
    told = rf"vLLM would not stop at \[{unseen}\]"
    with pytest.raises(VllmFailedError, match=told), serve_vllm(folder, "--enforce-eager"):
        pass
