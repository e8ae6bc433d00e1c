"""engines/vllm: what every engine promises, on the CPU in float32, and AN4 as the reference engine hears it.

Run by scripts/vllm. The contract's tests are those of test_engine.py itself; here they are given another engine.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from arkasr import checkpoint, model
from arkasr.checkpoint import Checkpoint
from arkasr.config import ModelConfig
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.engines.vllm import VllmEngine
from arkasr.errors import CheckpointMismatchError, MissingExtraError, UsageError
from conftest import byte_tokenizer, random_network, small_config
from test_engine import (  # noqa: F401 - pytest finds them here
    LETTER_A,
    LETTER_B,
    UNGUARDED,
    MakeSubject,
    Subject,
    babbling,
    clips,
    noise,
    rigged,
    test_a_clip_says_the_same_alone_and_in_any_batch,
    test_every_stop_id_stops,
    test_greedy_repeats_itself,
    test_logits_beyond_what_exp_takes,
    test_logprobs_are_of_the_allowed_tokens,
    test_low_temperatures_approach_greedy,
    test_more_clips_than_share_a_step,
    test_sampled_shares_match_the_probabilities,
    test_sampling_does_not_depend_on_the_batch,
    test_sampling_follows_its_seed,
    test_stop_at_once,
    test_stops_in_the_middle,
    test_the_cap_stops_who_does_not,
    test_top_p_keeps_the_fewest_that_reach_it,
)
from test_engine import test_forbidden_ids_are_never_emitted as emits_no_forbidden_ids
from vllm_serving import need_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
CLIP = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
Load = Callable[[Path], VllmEngine]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """An engine over a folder, in this process: otherwise each would be one that imports everything anew."""
    need_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_PLUGINS", "arkasr")
        yield lambda folder: VllmEngine.load(checkpoint.open_checkpoint(folder), enforce_eager=True)


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """As conftest's, with heads of 32: vLLM has no attention for heads of 16 on the CPU."""
    return replace(small_config(byte_tokenizer()), decoder_heads=2, kv_heads=1)


def write(network: model.ArkASR, folder: Path) -> Path:
    model.save(network, folder, dtype=torch.float32)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def make_subject(load: Load, tmp_path: Path) -> Iterator[MakeSubject]:
    number = count()

    def make(network: model.ArkASR) -> Subject:
        folder = write(network, tmp_path / str(next(number)))
        return Subject(load(folder), network, checkpoint.open_checkpoint(folder).rules, drift=1e-4)

    yield make
    gc.collect()  # an engine has a gigabyte for keys and values


@pytest.fixture
def babbler(make_subject: MakeSubject, small: ModelConfig) -> Subject:
    """As test_engine's, with a seed by which some clips stop and some do not."""
    return make_subject(babbling(small, 68))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_forbidden_ids_are_never_emitted(make_subject: MakeSubject, small: ModelConfig, temperature: float) -> None:
    """As every engine's; vLLM takes temperatures up to 2."""
    emits_no_forbidden_ids(make_subject, small, temperature)


def test_the_vocabulary_stays_allowed_at_the_highest_temperature(babbler: Subject) -> None:
    options = DecodeOptions(temperature=2.0)
    said = [t for g in babbler.engine.generate(clips(), options) for t in g.ids]
    assert len(set(said)) > 20
    assert babbler.rules.allowed_ids[said].all()
    with pytest.raises(UsageError, match=r"temperature is 2\.1; engine vllm takes at most 2\.0"):
        babbler.engine.generate(clips(), replace(options, temperature=2.1))


def test_a_loop_ends_where_the_reference_ends_it(make_subject: MakeSubject, small: ModelConfig) -> None:
    """vLLM itself goes on to the cap."""
    chain: dict[int | None, dict[int, float]] = {
        None: {LETTER_A: 20.0}, LETTER_A: {LETTER_B: 20.0}, LETTER_B: {LETTER_A: 20.0},
    }  # fmt: skip
    subject = make_subject(rigged(small, chain))
    waveforms = [noise(n) for n in (32_000, 400_000, 100_000)]
    expected = PyTorchEngine(subject.network, subject.rules).generate(waveforms, DecodeOptions())
    said = subject.engine.generate(waveforms, DecodeOptions())
    assert [g.ids for g in said] == [g.ids for g in expected]
    assert [g.stop_logprob for g in said] == [None] * 3
    uncut = subject.engine.generate(waveforms, UNGUARDED)
    assert all(len(g.ids) < len(u.ids) for g, u in zip(said, uncut, strict=True))


def test_an_output_that_is_not_finite_is_an_error(make_subject: MakeSubject, small: ModelConfig) -> None:
    network = random_network(small)
    with torch.no_grad():
        network.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointMismatchError, match="not finite"):
        make_subject(network).engine.generate([noise(16_000)], DecodeOptions())


@pytest.mark.parametrize("size", [1, 16])
def test_it_says_what_the_reference_engine_says(load: Load, tiny: Checkpoint, shared: Path, size: int) -> None:
    """30 clips of AN4, alone and 16 at a time."""
    utterances = list(read_manifest(shared / "speech" / "an4" / "manifest.jsonl", split="test"))[:30]
    waveforms = [utterance.waveform() for utterance in utterances]
    reference = PyTorchEngine.load(tiny, device="cpu")
    expected = [reference.generate([waveform], DecodeOptions())[0] for waveform in waveforms]
    engine = load(tiny.folder)
    batches = [waveforms[start : start + size] for start in range(0, 30, size)]
    said = [g for batch in batches for g in engine.generate(batch, DecodeOptions())]
    assert len({g.ids for g in said}) > 20
    assert [g.ids for g in said] == [g.ids for g in expected]
    for one, other in zip(said, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.stop_logprob == pytest.approx(other.stop_logprob, abs=1e-4)
        assert one.timings_s["vllm"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"device": "cuda"}, "runs on cpu, not on cuda"), ({"dtype": "int8"}, "no dtype int8")],
)
@pytest.mark.usefixtures("load")
def test_what_it_has_not_is_refused(tiny: Checkpoint, arguments: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        VllmEngine.load(tiny, **arguments)  # type: ignore[arg-type]


def test_in_a_program_of_its_own_standard_output_is_the_programs(tmp_path: Path) -> None:
    """With vLLM's own processes, and nothing in the environment; vLLM would log there, and report to its makers."""
    need_vllm()
    program = tmp_path / "program.py"
    program.write_text(f"""
import os
from arkasr import audio, checkpoint, engines
before = dict(os.environ)
from arkasr.engines.vllm import VllmEngine
assert dict(os.environ) == before
if __name__ == "__main__":
    source = checkpoint.open_checkpoint("tiny")
    engine = VllmEngine.load(source, enforce_eager=True)
    from vllm.usage.usage_lib import is_usage_stats_enabled
    assert not is_usage_stats_enabled()
    (said,) = engine.generate([audio.load({str(CLIP)!r})], engines.DecodeOptions())
    print(source.rules.to_text(list(said.ids)))
""")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "RUBOUT G M E F THREE NINE\n", done.stderr


@pytest.mark.usefixtures("load")
def test_without_its_plugin_it_says_so(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.delitem(vllm.ModelRegistry.models, "ArkasrForConditionalGeneration", raising=False)
    monkeypatch.setattr("vllm.plugins.plugins_loaded", True)
    with pytest.raises(MissingExtraError, match="VLLM_PLUGINS"):
        VllmEngine.load(tiny)
