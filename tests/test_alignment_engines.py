"""Where engines say that tokens were heard: one plain forward pass with the attention written out is the oracle."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from arkasr import audio, checkpoint, engines, export, files
from arkasr import config as configs
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.config import Heads, ModelConfig
from arkasr.engines import Clip, DecodeOptions, Engine, Generation
from arkasr.engines.onnx import OnnxEngine
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import CheckpointMismatchError
from arkasr.export import Precision
from arkasr.model import ArkASR, load, rope_angles
from arkasr.text import TextRules
from conftest import MakeCheckpoint, random_network

CLIP = Path(__file__).parents[1] / "examples" / "audio" / "an4-rubout.flac"
SAMPLES = (16_000, 161, 6_000, 40_000, 960, 9_000, 640, 23_000, 12_000, 3_000)  # more than share a decode step
ALIGNED = DecodeOptions(align=True)
EXACT, INT8 = 1e-4, 0.15  # most that a row, which sums to 1, may differ in all


def noise(num_samples: int) -> Waveform:
    values = np.random.default_rng(num_samples).standard_normal(num_samples) * 0.2
    return values.astype(np.float32)


def expected(
    network: ArkASR, rules: TextRules, heads: Heads, waveform: Waveform, ids: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Attention [len(ids) + 1, A]: the whole text in one uncached pass, and the softmax written out in float64."""
    config = network.config
    prompt = rules.prompt_ids(audio.num_audio_tokens(len(waveform), config.merge_factor))
    places = [n for n, token in enumerate(prompt) if token == rules.audio_id]
    mel = torch.from_numpy(audio.log_mel(waveform, config.num_mels))[None]
    rows = torch.zeros(len(ids) + 1, len(places), dtype=torch.float64)
    with torch.inference_mode():
        x = network.embed(torch.tensor([[*prompt, *ids]]), network.encode(mel, torch.tensor([mel.shape[2]])))
        positions = torch.arange(x.shape[1])[None]
        cos, sin = rope_angles(positions, config.decoder_head_dim, config.rope_theta)
        for n, layer in enumerate(network.decoder.layers):
            q, k, _ = layer.attend(x, (cos[:, None], sin[:, None]))  # type: ignore[operator]
            for head in (head for number, head in heads if number == n):
                keys = k[0, head * config.kv_heads // config.decoder_heads].double()
                for row, position in enumerate(range(len(prompt) - 1, x.shape[1])):
                    products = (q[0, head, position].double() * keys[places]).sum(dim=-1)
                    powers = (products / config.decoder_head_dim**0.5).exp()
                    rows[row] += powers / powers.sum() / len(heads)
            x = layer(x, (cos[:, None], sin[:, None]), None, None, n, positions)
    return rows.numpy()


def furthest(ours: Generation, rows: npt.NDArray[np.float64]) -> float:
    """The largest difference of a row in all; the last one is a copy where the clip was cut off."""
    assert ours.attention is not None
    assert ours.attention.dtype == np.float32
    assert ours.attention.shape == rows.shape == (len(ours.ids) + 1, rows.shape[1])
    assert ours.attention.min() >= 0
    np.testing.assert_allclose(ours.attention.sum(axis=1), 1, atol=1e-5)
    if ours.stop_logprob is None:
        np.testing.assert_array_equal(ours.attention[-1], ours.attention[-2])
        return float(np.abs(ours.attention - rows)[:-1].sum(axis=1).max())
    return float(np.abs(ours.attention - rows).sum(axis=1).max())


def engines_of(source: Checkpoint, *precisions: Precision) -> list[Engine]:
    exported = [OnnxEngine.load(source, precision=each, threads=1, report=str) for each in precisions]
    return [PyTorchEngine.load(source, device="cpu"), *exported]


def choose(folder: Path, heads: object) -> None:
    (folder / files.GENERATION_CONFIG).write_text(json.dumps({"alignment_heads": heads}))


Setting = tuple[dict[str, object], Heads | None]
SETTINGS: dict[str, Setting] = {
    "default": ({}, None),
    "several layers, in any order": ({"decoder_layers": 3}, ((2, 3), (0, 1), (2, 0))),
    "no groups": ({"kv_heads": 4}, ((1, 2),)),
    "one layer, one key head": ({"decoder_layers": 1, "kv_heads": 1}, None),
    "merge 2, other angles": ({"merge_factor": 2, "rope_theta": 1e2}, ((1, 1), (0, 3))),
}


@pytest.mark.parametrize(("changes", "heads"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.usefixtures("cache")
def test_engines_tell_what_the_network_attends_to(
    make_checkpoint: MakeCheckpoint,
    small: ModelConfig,
    changes: dict[str, object],
    heads: Heads | None,
    temperature: float,
) -> None:
    """In a batch whose rows leave it one after the other: many an id is a stop, and short clips have low caps."""
    folder = make_checkpoint(**changes, eos_token_ids=(*small.eos_token_ids, *range(0, 240, 10)))
    if heads is not None:
        choose(folder, heads)
    source = checkpoint.open_checkpoint(folder)
    assert source.alignment_heads == (heads or configs.default_alignment_heads(source.config))
    network = load(source)
    waveforms = [noise(n) for n in SAMPLES]
    options = replace(ALIGNED, temperature=temperature, seed=3)
    lengths: set[tuple[int, bool]] = set()
    for engine in engines_of(source, "float32"):
        for waveform, said in zip(waveforms, engine.generate(waveforms, options), strict=True):
            rows = expected(network, source.rules, source.alignment_heads, waveform, said.ids)
            assert furthest(said, rows) < EXACT
            lengths.add((len(said.ids), said.stop_logprob is None))
    assert len(lengths) > 3
    assert temperature == 0 or {cut_off for _, cut_off in lengths} == {True, False}


@pytest.mark.usefixtures("cache")
def test_tiny(tiny: Checkpoint) -> None:
    """The shipped weights: three heads of layer 1, which point from left to right through the recording."""
    assert tiny.alignment_chosen
    assert tiny.alignment_heads == ((1, 0), (1, 1), (1, 2))
    waveforms = [audio.load(CLIP), audio.load(CLIP)[:20_000]]
    network = load(tiny)
    for engine, allowed in zip(engines_of(tiny, "float32", "int8"), (EXACT, EXACT, INT8), strict=True):
        for waveform, said in zip(waveforms, engine.generate(waveforms, ALIGNED), strict=True):
            rows = expected(network, tiny.rules, tiny.alignment_heads, waveform, said.ids)
            assert 0 < furthest(said, rows) < allowed
            centres = rows[:-1] @ np.arange(rows.shape[1])
            assert (np.diff(centres) > -1).all()
            assert len(waveform) == 20_000 or centres[-1] - centres[0] > rows.shape[1] / 3


@pytest.mark.usefixtures("cache")
def test_int8_is_near(make_checkpoint: MakeCheckpoint) -> None:
    source = checkpoint.open_checkpoint(make_checkpoint())
    (engine,) = engines_of(source, "int8")[1:]
    network = load(source)
    for waveform in (noise(n) for n in SAMPLES):
        (said,) = engine.generate([waveform], ALIGNED)
        rows = expected(network, source.rules, source.alignment_heads, waveform, said.ids)
        assert furthest(said, rows) < INT8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_asking_changes_no_bit(tiny: Checkpoint, temperature: float) -> None:
    waveforms = [audio.load(CLIP)[start : start + 14_000] for start in range(0, 40_000, 4_000)]
    for engine in engines_of(tiny, "int8"):
        plain = DecodeOptions(temperature=temperature, seed=1)
        without, aligned = (engine.generate(waveforms, replace(plain, align=asked)) for asked in (False, True))
        for one, other in zip(without, aligned, strict=True):
            assert (one.ids, one.logprobs, one.stop_logprob) == (other.ids, other.logprobs, other.stop_logprob)
            assert one.attention is None
            assert other.attention is not None


class Mixed:
    """Clips with options of their own, that come to an engine one after the other; some are given up."""

    def __init__(self, clips: list[Clip], unwanted: set[int]) -> None:
        self.clips, self.waiting, self.said = clips, list(clips), dict[int, Generation]()
        self.unwanted = {id(clips[n]) for n in unwanted}
        self.asked = 0

    def take(self) -> Clip | None:
        return self.waiting.pop(0) if self.waiting else None

    def wants(self, clip: Clip) -> bool:
        self.asked += 1
        return id(clip) not in self.unwanted or self.asked < 20

    def give(self, clip: Clip, generation: Generation) -> None:
        self.said[id(clip)] = generation


def test_only_who_asks_is_told(tiny: Checkpoint) -> None:
    """Beside others who did not ask, or were given up: what one is told is what it is told alone."""
    (engine,) = engines_of(tiny, "int8")[1:]
    assert isinstance(engine, OnnxEngine)
    whole = audio.load(CLIP)
    waveforms = [whole[start : start + 20_000] for start in range(0, 36_000, 3_000)]
    clips = [Clip(waveform, DecodeOptions(align=n % 3 != 1)) for n, waveform in enumerate(waveforms)]
    given = Mixed(clips, unwanted={0, 5})
    engine.decode(given)
    assert len(given.said) >= len(clips) - 2
    for n, clip in enumerate(clips):
        if id(clip) not in given.said:
            continue
        told, (alone,) = given.said[id(clip)], engine.generate([waveforms[n]], ALIGNED)
        assert told.ids == alone.ids
        if n % 3 == 1:
            assert told.attention is None
        else:
            assert told.attention is not None
            assert alone.attention is not None
            np.testing.assert_allclose(told.attention, alone.attention, atol=1e-5)


def test_a_clip_of_several_options(small: ModelConfig, rules: TextRules) -> None:
    """Rollouts share a prompt; each has its own attention, and only those that ask."""
    network = random_network(small)
    heads = ((0, 2), (1, 1))
    engine = PyTorchEngine(network, rules, alignment_heads=heads)
    waveforms = [noise(n) for n in SAMPLES[:3]]
    options = [DecodeOptions(temperature=1.0, seed=n, max_new_tokens=5 + n, align=n != 1) for n in range(3)]
    mels = [audio.log_mel(waveform, small.num_mels) for waveform in waveforms]
    num_frames = torch.tensor([mel.shape[1] for mel in mels])
    batch = torch.zeros(3, small.num_mels, int(num_frames.max()))
    for place, mel in enumerate(mels):
        batch[place, :, : mel.shape[1]] = torch.from_numpy(mel)
    with torch.inference_mode():
        embeddings = network.encode(batch, num_frames)
    told = engine.continuations(embeddings, [len(w) for w in waveforms], [options] * 3)
    assert len({said.ids for of_clip in told for said in of_clip}) > 4
    for waveform, of_clip in zip(waveforms, told, strict=True):
        assert of_clip[1].attention is None
        for said in (of_clip[0], of_clip[2]):
            assert furthest(said, expected(network, rules, heads, waveform, said.ids)) < EXACT


def test_attention_by_hand() -> None:
    """Two heads, one of which looks at one place alone; without a stop the last id's row stands twice."""
    keys = np.zeros((2, 3, 4), np.float32)
    keys[0, 1] = 100
    queries = np.ones((2, 2, 4), np.float32)
    rows = engines.attention(queries, keys, num_ids=1)
    np.testing.assert_allclose(rows, [[1 / 6, 2 / 3, 1 / 6]] * 2, atol=1e-6)
    queries[0, 1] = -1
    twice = engines.attention(queries, keys, num_ids=2)
    np.testing.assert_allclose(twice[1], [5 / 12, 1 / 6, 5 / 12], atol=1e-6)
    np.testing.assert_array_equal(twice[2], twice[1])


# ---- which heads ----


@pytest.mark.parametrize(("layers", "layer"), [(1, 0), (2, 1), (4, 1), (8, 2), (24, 6), (36, 9)])
def test_default_heads(small: ModelConfig, layers: int, layer: int) -> None:
    heads = configs.default_alignment_heads(replace(small, decoder_layers=layers))
    assert heads == tuple((layer, head) for head in range(small.decoder_heads))


@pytest.mark.parametrize("content", [None, {}, {"temperature": 0.0}, {"alignment_heads": None}])
def test_without_a_choice(make_checkpoint: MakeCheckpoint, content: dict[str, object] | None) -> None:
    folder = make_checkpoint()
    if content is not None:
        (folder / files.GENERATION_CONFIG).write_text(json.dumps(content))
    source = checkpoint.open_checkpoint(folder)
    assert not source.alignment_chosen
    assert source.alignment_heads == ((1, 0), (1, 1), (1, 2), (1, 3))


BAD = [
    [], {}, "1,0", 7, [[]], [1, 0], [[1]], [[1, 0, 0]], [[2, 0]], [[0, 4]], [[-1, 0]], [[0, -1]], [[1, 0], [1, 0]],
    [[True, 0]], [[1, False]], [[1.0, 0]], [["1", 0]], [[1, 0], None], [[1, 10**30]], {"1": 0},
]  # fmt: skip


@pytest.mark.parametrize("heads", BAD, ids=str)
def test_a_bad_choice_is_refused(make_checkpoint: MakeCheckpoint, heads: object) -> None:
    folder = make_checkpoint()
    choose(folder, heads)
    with pytest.raises(CheckpointMismatchError, match=r"alignment_heads is .* of 2 layers with 4 heads each"):
        checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"alignment_heads": [[1, 0]], "alignment_heads": [[1, 1]]}'])
def test_a_damaged_file_is_refused(make_checkpoint: MakeCheckpoint, content: str) -> None:
    folder = make_checkpoint()
    (folder / files.GENERATION_CONFIG).write_text(content)
    with pytest.raises(CheckpointMismatchError, match=r"generation_config\.json: not"):
        checkpoint.open_checkpoint(folder)


# ---- exports ----


def test_another_choice_is_another_export(make_checkpoint: MakeCheckpoint, cache: Path) -> None:
    """Its graph gives the queries of the chosen layers and of no others, and it is a model by itself."""
    folder = make_checkpoint(decoder_layers=3)
    given: dict[Path, set[str]] = {}
    for heads, layers in (None, {1}), (((2, 1),), {2}), (((0, 1), (2, 1), (0, 3)), {0, 2}):
        if heads is not None:
            choose(folder, heads)
        source = checkpoint.open_checkpoint(folder)
        made = export.find_or_write(source, "float32")
        graph = onnx.load(made / "decoder.onnx", load_external_data=False).graph
        given[made] = {output.name for output in graph.output if output.name.startswith("queries")}
        assert given[made] == {f"queries_{layer}" for layer in layers}
        again = checkpoint.open_checkpoint(made)
        assert (again.alignment_heads, again.alignment_chosen) == (source.alignment_heads, source.alignment_chosen)
        (said,) = OnnxEngine.load(again, precision=None, threads=1, report=str).generate([noise(6_000)], ALIGNED)
        rows = expected(load(source), source.rules, source.alignment_heads, noise(6_000), said.ids)
        assert furthest(said, rows) < EXACT
    assert len(given) == len(list(cache.glob(f"*/{files.MANIFEST}"))) == 3


def test_heads_that_an_export_lacks_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """They were written beside the graphs, which give no queries of their layer."""
    made = export.find_or_write(checkpoint.open_checkpoint(make_checkpoint()), "float32", folder=tmp_path / "made")
    choose(made, [[0, 1]])
    with pytest.raises(CheckpointMismatchError, match="made with other alignment heads"):
        OnnxEngine.load(checkpoint.open_checkpoint(made), precision=None, report=str)
