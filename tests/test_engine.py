"""What every engine promises, one suite over all of them, and what the Transcriber makes of an engine's answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import arkasr
from arkasr import audio, checkpoint, export, model
from arkasr.audio import AudioSource, Waveform
from arkasr.config import ModelConfig
from arkasr.engines import DecodeOptions, Engine, Generation, pytorch
from arkasr.engines.onnx import OnnxEngine
from arkasr.engines.pytorch import PyTorchEngine
from arkasr.errors import ArkASRError, AudioError, UsageError
from arkasr.results import Transcript
from arkasr.text import TextRules
from conftest import MakeCheckpoint, byte_tokenizer, random_network


def load_pytorch(folder: Path) -> Engine:
    return PyTorchEngine.load(checkpoint.open_checkpoint(folder), device="cpu")


def load_onnx(precision: export.Precision) -> Callable[[Path], Engine]:
    def load(folder: Path) -> Engine:
        return OnnxEngine.load(checkpoint.open_checkpoint(folder), precision=precision, threads=1, report=str)

    return load


# Another engine joins the contract by adding a way to load a checkpoint's folder.
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "pytorch": load_pytorch,
    "onnx-float32": load_onnx("float32"),
    "onnx-int8": load_onnx("int8"),
    "onnx-int4": load_onnx("int4"),
}
SAMPLES = (16_000, 161, 6_000, 40_000, 960, 640)
GAINS = (0.1, 1.0, 0.01, 0.9, 0.5, 0.3)
# Most that a log-probability of the babbler, whose standard deviation over the vocabulary is 2, may differ from the
# uncached network's. Measured: 2e-6 in float32, 0.08 with int8 weights, 0.52 with int4.
DRIFT = {"pytorch": 1e-4, "onnx-float32": 1e-4, "onnx-int8": 0.15, "onnx-int4": 0.8}
LETTER_A, LETTER_B = 65, 66  # some ordinary byte ids
UNGUARDED = DecodeOptions(guard=False)


@dataclass(frozen=True)
class Subject:
    """An engine under test, and the network and rules it was made from."""

    engine: Engine
    network: model.ArkASR
    rules: TextRules
    drift: float

    @property
    def forbidden(self) -> list[int]:
        return [i for i in range(self.rules.vocab_size) if not self.rules.allowed_ids[i]]


MakeSubject = Callable[[model.ArkASR], Subject]


@pytest.fixture(params=list(ENGINES))
def make_subject(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSubject:
    """make_subject(network) -> the parametrized engine over it, loaded from a folder."""
    monkeypatch.setenv("ARKASR_CACHE", str(tmp_path / "cache"))

    def make(network: model.ArkASR) -> Subject:
        folder = tmp_path / "subject"
        model.save(network, folder, dtype=torch.float32)
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        rules = checkpoint.open_checkpoint(folder).rules
        return Subject(ENGINES[request.param](folder), network, rules, DRIFT[request.param])

    return make


def babbling(small: ModelConfig, seed: int) -> model.ArkASR:
    """A random network that says varied things, with clear winners at every step."""
    network = random_network(replace(small, tied_embeddings=False), seed=seed)
    assert network.decoder.head is not None
    with torch.no_grad():
        network.decoder.head.weight.mul_(4)
    return network


@pytest.fixture
def babbler(make_subject: MakeSubject, small: ModelConfig) -> Subject:
    """One that stops on some of the clips."""
    return make_subject(babbling(small, 45))


def noise(num_samples: int, gain: float = 0.1, *, seed: int = 0) -> Waveform:
    values = np.random.default_rng(seed + num_samples).standard_normal(num_samples) * gain
    return values.astype(np.float32)


def clips() -> list[Waveform]:
    return [noise(n, gain) for n, gain in zip(SAMPLES, GAINS, strict=True)]


def rigged(config: ModelConfig, scores: dict[int | None, dict[int, float]]) -> model.ArkASR:
    """A network whose logits depend on the last token only: scores[last token, or None for all others][id], else 0."""
    network = random_network(replace(config, tied_embeddings=False))
    head = network.decoder.head
    assert head is not None
    with torch.no_grad():
        for layer in network.decoder.layers:
            assert isinstance(layer, model.DecoderLayer)
            layer.o.weight.zero_()
            layer.down.weight.zero_()
        network.decoder.norm.weight.fill_(1.0)
        network.decoder.embed.weight.zero_()
        network.decoder.embed.weight[:, 0] = 1.0
        head.weight.zero_()
        states = sorted(scores, key=lambda token: token is not None)
        for state, token in enumerate(states):
            if token is not None:
                network.decoder.embed.weight[token, 0] = 0.0
                network.decoder.embed.weight[token, state] = 1.0
            for wanted, score in scores[token].items():
                head.weight[wanted, state] = score / config.hidden_dim**0.5
    return network


def raw_logits(subject: Subject, waveform: Waveform, ids: Sequence[int]) -> torch.Tensor:
    """Unmasked logits [len(ids) + 1, V] after the prompt and after each id, by one uncached forward in float64."""
    config = subject.network.config
    prompt = subject.rules.prompt_ids(audio.num_audio_tokens(len(waveform), config.merge_factor))
    mel = torch.from_numpy(audio.log_mel(waveform, config.num_mels))[None]
    with torch.inference_mode():
        logits = subject.network(mel, torch.tensor([mel.shape[2]]), torch.tensor([[*prompt, *ids]]))
    return logits[0, len(prompt) - 1 :].double()  # type: ignore[no-any-return]


def test_greedy_repeats_itself(babbler: Subject) -> None:
    first, second = (babbler.engine.generate(clips(), DecodeOptions()) for _ in range(2))
    assert [g.ids for g in first] == [g.ids for g in second]
    assert len({g.ids for g in first}) > 2
    assert len({token for g in first for token in g.ids}) > 8


def test_a_clip_says_the_same_alone_and_in_any_batch(babbler: Subject) -> None:
    alone = [babbler.engine.generate([clip], DecodeOptions())[0] for clip in clips()]
    together = babbler.engine.generate(clips(), DecodeOptions())
    backwards = babbler.engine.generate(clips()[::-1], DecodeOptions())[::-1]
    assert [g.ids for g in alone] == [g.ids for g in together] == [g.ids for g in backwards]
    for one, other in zip(alone, together, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert other.stop_logprob == pytest.approx(one.stop_logprob, abs=1e-4)
    assert any(g.stop_logprob is None for g in alone)
    assert any(g.stop_logprob is not None for g in alone)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_clips_than_share_a_step(babbler: Subject, temperature: float) -> None:
    """Rows that end make room for others, whatever the order."""
    waveforms = [noise(200 + 900 * n, GAINS[n % len(GAINS)], seed=n) for n in range(20)]
    options = DecodeOptions(temperature=temperature, seed=5)
    alone = [babbler.engine.generate([waveform], options)[0] for waveform in waveforms]
    assert len({g.ids for g in alone}) > 5
    assert temperature or len({len(g.ids) for g in alone}) > 4
    order = np.random.default_rng(0).permutation(20)
    for chosen in (range(20), order, order[:1], order[:8], order[:9], order[:17]):
        together = babbler.engine.generate([waveforms[n] for n in chosen], options)
        assert [g.ids for g in together] == [alone[n].ids for n in chosen]
        for generation, n in zip(together, chosen, strict=True):
            assert generation.logprobs == pytest.approx(alone[n].logprobs, abs=1e-4)


def test_logits_beyond_what_exp_takes(make_subject: MakeSubject, small: ModelConfig) -> None:
    subject = make_subject(rigged(small, {None: {LETTER_A: 500.0, small.eos_token_ids[0]: 499.0}}))
    logprobs = subject.engine.generate([noise(16_000)], DecodeOptions(max_new_tokens=2))[0].logprobs
    # 8 bits hold 499 beside 500 as 500, or as 496.
    assert logprobs == pytest.approx([-math.log1p(math.exp(-1))] * 2, abs=max(subject.drift, 1e-3) * 5)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_forbidden_ids_are_never_emitted(make_subject: MakeSubject, small: ModelConfig, temperature: float) -> None:
    """Every forbidden id outranks every allowed one before the mask, so a hole in the mask would be seen."""
    probe = make_subject(random_network(small))
    wanted = dict.fromkeys(probe.forbidden, 50.0) | dict.fromkeys(probe.rules.stop_ids, -1e4)
    subject = make_subject(rigged(small, {None: wanted | {LETTER_A: 10.0}}))
    assert len(subject.forbidden) == 19
    waveforms = [noise(320_000), *clips()]
    raw = raw_logits(subject, waveforms[0], [])[0]
    assert raw[subject.forbidden].min() > raw[torch.from_numpy(subject.rules.allowed_ids.copy())].max() + 30
    generations = subject.engine.generate(waveforms, replace(UNGUARDED, temperature=temperature))
    said = {token for g in generations for token in g.ids}
    assert not said & set(subject.forbidden)
    assert said == {LETTER_A} if temperature == 0 else said
    assert len(generations[0].ids) == 208


def test_stop_at_once(make_subject: MakeSubject, small: ModelConfig) -> None:
    subject = make_subject(rigged(small, {None: {small.eos_token_ids[0]: 20.0}}))
    for generation in subject.engine.generate(clips(), DecodeOptions()):
        assert generation.ids == ()
        assert generation.logprobs == ()
        assert generation.stop_logprob == pytest.approx(0, abs=1e-4)
        assert generation.confidence == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("max_new_tokens", [1, 11, 256])
def test_the_cap_stops_who_does_not(make_subject: MakeSubject, small: ModelConfig, max_new_tokens: int) -> None:
    subject = make_subject(rigged(small, {None: {small.eos_token_ids[0]: -1e4, LETTER_A: 5.0}}))
    options = replace(UNGUARDED, max_new_tokens=max_new_tokens)
    generations = subject.engine.generate(clips(), options)
    assert [len(g.ids) for g in generations] == [options.token_cap(n) for n in SAMPLES]
    assert all(g.stop_logprob is None and set(g.ids) == {LETTER_A} for g in generations)


def test_stops_in_the_middle(make_subject: MakeSubject, small: ModelConfig) -> None:
    stop = small.eos_token_ids[0]
    chain: dict[int | None, dict[int, float]] = {
        None: {LETTER_A: 20.0},
        LETTER_A: {LETTER_B: 20.0},
        LETTER_B: {stop: 20.0},
    }
    subject = make_subject(rigged(small, chain))
    for generation in subject.engine.generate(clips(), DecodeOptions()):
        assert generation.ids == (LETTER_A, LETTER_B)
        assert len(generation.logprobs) == 2
        assert generation.stop_logprob is not None


@pytest.mark.parametrize("which", ["the turn's end", "an added token", "an ordinary id"])
def test_every_stop_id_stops(make_subject: MakeSubject, small: ModelConfig, which: str) -> None:
    turn_end, added = small.eos_token_ids[0], small.bos_token_id
    stop = {"the turn's end": turn_end, "an added token": added, "an ordinary id": LETTER_B}[which]
    config = replace(small, eos_token_ids=(added, LETTER_B))  # <|im_end|> stops though the config does not say so
    generation = make_subject(rigged(config, {None: {stop: 20.0}})).engine.generate([noise(8_000)], DecodeOptions())[0]
    assert generation.ids == ()
    assert generation.stop_logprob == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_of_the_allowed_tokens(babbler: Subject, temperature: float) -> None:
    """At temperature 1 whatever the sampling's; recomputed in PyTorch, uncached and alone, over allowed ids only."""
    waveforms = clips()
    allowed = np.flatnonzero(babbler.rules.allowed_ids).tolist()
    stops = [token for token in allowed if token in babbler.rules.stop_ids]
    assert len(stops) == 1
    options = DecodeOptions(temperature=temperature)
    for waveform, generation in zip(waveforms, babbler.engine.generate(waveforms, options), strict=True):
        logprobs = raw_logits(babbler, waveform, generation.ids)[:, allowed].log_softmax(dim=-1)
        expected = [float(logprobs[step, allowed.index(token)]) for step, token in enumerate(generation.ids)]
        assert generation.logprobs == pytest.approx(expected, abs=babbler.drift)
        if generation.stop_logprob is not None:
            expected.append(float(logprobs[-1, allowed.index(stops[0])]))
            assert generation.stop_logprob == pytest.approx(expected[-1], abs=babbler.drift)
        assert generation.confidence == pytest.approx(math.exp(sum(expected) / len(expected)), abs=babbler.drift)
        assert 0 <= generation.confidence <= 1


def test_sampling_follows_its_seed(babbler: Subject) -> None:
    said = [
        [g.ids for g in babbler.engine.generate(clips(), DecodeOptions(temperature=1.0, seed=seed))]
        for seed in (1, 1, 2, 3)
    ]
    assert said[0] == said[1]
    assert said[0] != said[2] != said[3] != said[0]


def test_sampling_does_not_depend_on_the_batch(babbler: Subject) -> None:
    options = DecodeOptions(temperature=0.8, seed=4)
    together = babbler.engine.generate(clips(), options)
    assert [g.ids for g in together] == [babbler.engine.generate([clip], options)[0].ids for clip in clips()]


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-30])
def test_low_temperatures_approach_greedy(babbler: Subject, temperature: float) -> None:
    greedy = babbler.engine.generate(clips(), DecodeOptions())
    sampled = babbler.engine.generate(clips(), DecodeOptions(temperature=temperature))
    assert [g.ids for g in sampled] == [g.ids for g in greedy]


@pytest.mark.parametrize("temperature", [1e3, 1e30])
def test_high_temperatures_stay_among_the_allowed(babbler: Subject, temperature: float) -> None:
    said = [t for g in babbler.engine.generate(clips(), DecodeOptions(temperature=temperature)) for t in g.ids]
    assert len(set(said)) > 20
    assert babbler.rules.allowed_ids[said].all()


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.7), (2.0, 0.6044)])
def test_sampled_shares_match_the_probabilities(
    make_subject: MakeSubject, small: ModelConfig, temperature: float, share: float
) -> None:
    """Of 2048 draws from 0.7 : 0.3; at temperature 2 the odds are their square root. Three sigma are 0.03."""
    wanted = dict.fromkeys(range(small.vocab_size), -1e4) | {LETTER_A: math.log(0.7), LETTER_B: math.log(0.3)}
    subject = make_subject(rigged(small, {None: wanted}))
    options = [replace(UNGUARDED, temperature=temperature, seed=seed) for seed in range(8)]
    generations = [subject.engine.generate([noise(400_000)], each)[0] for each in options]
    said = [token for g in generations for token in g.ids]
    assert len(said) == 2048
    assert set(said) == {LETTER_A, LETTER_B}
    assert said.count(LETTER_A) / len(said) == pytest.approx(share, abs=0.035)
    assert len({g.ids for g in generations}) == 8
    values = {round(logprob, 4) for g in generations for logprob in g.logprobs}
    assert values == {round(math.log(0.7), 4), round(math.log(0.3), 4)}


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.69, 1), (0.75, 2), (0.9, 2), (0.97, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(
    make_subject: MakeSubject, small: ModelConfig, top_p: float, kept: int
) -> None:
    """Of 0.7 : 0.25 : 0.04 : 0.01, and the shares among those kept are as before."""
    shares = dict(zip((LETTER_A, LETTER_B, 67, 68), (0.7, 0.25, 0.04, 0.01), strict=True))
    wanted = dict.fromkeys(range(small.vocab_size), -1e4) | {i: math.log(share) for i, share in shares.items()}
    subject = make_subject(rigged(small, {None: wanted}))
    options = [replace(UNGUARDED, temperature=1.0, top_p=top_p, seed=seed) for seed in range(6)]
    said = [i for each in options for g in subject.engine.generate([noise(400_000)], each) for i in g.ids]
    assert set(said) == set(list(shares)[:kept])
    total = sum(list(shares.values())[:kept])
    assert said.count(LETTER_A) / len(said) == pytest.approx(0.7 / total, abs=0.045)
    assert {round(lp, 3) for g in subject.engine.generate([noise(4_000)], options[0]) for lp in g.logprobs} <= {
        round(math.log(share), 3) for share in shares.values()
    }


def test_continuations_are_what_each_option_says_alone(small: ModelConfig, rules: TextRules) -> None:
    """Encoded and prefilled once, whatever is done with it: greedy and sampled rows, long and short, side by side."""
    network = random_network(replace(small, tied_embeddings=False), seed=45)
    assert network.decoder.head is not None
    with torch.no_grad():
        network.decoder.head.weight.mul_(4)
    engine = PyTorchEngine(network, rules)
    options = [
        [DecodeOptions(), DecodeOptions(temperature=1.0, seed=3), DecodeOptions(temperature=0.7, top_p=0.9, seed=4)],
        [DecodeOptions(temperature=1.0, seed=5)],
        [DecodeOptions(max_new_tokens=2), DecodeOptions(temperature=1.0, seed=3)],
    ]
    waveforms = clips()[:3]
    mel, num_frames = pytorch.pad_mels(waveforms, network)
    with torch.no_grad():
        embeddings = network.encode(mel, num_frames)
    together = engine.continuations(embeddings, [len(waveform) for waveform in waveforms], options)
    alone = [
        [engine.generate([waveform], each)[0] for each in those]
        for waveform, those in zip(waveforms, options, strict=True)
    ]
    assert [[g.ids for g in those] for those in together] == [[g.ids for g in those] for those in alone]
    assert len({g.ids for those in together for g in those}) == 6
    assert [len(those) for those in together] == [3, 1, 2]


# ---- options ----


def test_token_cap_grows_with_the_clip_up_to_the_limit() -> None:
    caps = [DecodeOptions().token_cap(n) for n in range(160, 480_001, 1_600)]
    assert caps == sorted(caps)
    assert caps[0] >= 1
    assert caps[-1] == 256
    assert len(set(caps)) > 200
    assert all(DecodeOptions(max_new_tokens=7).token_cap(n) <= 7 for n in (160, 16_000, 480_000))
    assert all(DecodeOptions(max_new_tokens=10_000).token_cap(16_000 * s) >= 10 * s for s in range(1, 31))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_options_refuse_bad_values(changes: dict[str, int | float], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        DecodeOptions(**changes)  # type: ignore[arg-type]


def test_confidence_of_nothing_is_zero() -> None:
    assert Generation((), (), None).confidence == 0.0
    assert Generation((1,), (math.log(0.5),), math.log(0.125)).confidence == pytest.approx(0.25)
    assert Generation((1,), (1e-6,), None).confidence == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "gpu"},
        {"device": ""},
        {"device": "cpu:-1"},
        {"device": "meta"},
        {"device": "mps"},
        {"device": "cuda:99"},
        {"dtype": "int16"},
        {"dtype": "Float32"},
        {"engine": "tensorflow"},
    ],
    ids=str,
)
def test_unknown_names_are_usage_errors(make_checkpoint: MakeCheckpoint, arguments: dict[str, str]) -> None:
    (value,) = arguments.values()
    with pytest.raises(UsageError) as caught:
        arkasr.load_model(make_checkpoint(), **arguments)  # type: ignore[arg-type]
    assert value in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "int8", "int4"])
def test_every_dtype_transcribes(make_checkpoint: MakeCheckpoint, dtype: str) -> None:
    transcriber = arkasr.load_model(make_checkpoint(), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    transcript = transcriber.transcribe((noise(16_000), 16_000), vad=False)
    assert transcript.tokens
    assert transcriber.rules is not None
    assert transcriber.rules.allowed_ids[list(transcript.tokens)].all()


# ---- the Transcriber over an engine ----


@dataclass
class Counting:
    """An engine that answers with each clip's length, in letters, and remembers its batches."""

    batches: list[list[int]] = field(default_factory=list)

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        self.batches.append([len(waveform) for waveform in waveforms])
        return [Generation((LETTER_A,) * (len(w) // 1_000), (-0.5,) * (len(w) // 1_000), -0.5) for w in waveforms]


def test_any_object_with_generate_is_an_engine(make_checkpoint: MakeCheckpoint) -> None:
    engine = Counting()
    transcriber = arkasr.load_model(make_checkpoint(), engine=engine)
    assert transcriber.engine is engine
    clips = [(noise(n * 1_000), 16_000) for n in (3, 1, 2)]
    assert [len(t.tokens) for t in transcriber.transcribe(clips, options=UNGUARDED, vad=False)] == [3, 1, 2]
    assert [n for batch in engine.batches for n in batch] == [3_000, 1_000, 2_000]
    engine.batches.clear()
    assert [t.segments[0].flags for t in transcriber.transcribe(clips)] == [("no_speech",)] * 3
    assert engine.batches == []


def test_no_sources_no_transcripts(make_checkpoint: MakeCheckpoint) -> None:
    engine = Counting()
    transcriber = arkasr.load_model(make_checkpoint(), engine=engine)
    assert list(transcriber.transcribe([])) == []
    assert list(transcriber.outcomes([])) == []
    assert engine.batches == []
    with pytest.raises(UsageError, match="batch_size"):
        list(transcriber.outcomes([], batch_size=0))


def test_bad_clips_fail_in_their_place(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    engine = Counting()
    transcriber = arkasr.load_model(make_checkpoint(), engine=engine)
    sources: list[tuple[AudioSource, int | None]] = [
        ((noise(1_000), 16_000), 1),
        (tmp_path / "absent.wav", None),
        ((noise(1), 16_000), None),
        ((noise(30 * 16_000 + 1), 16_000), 480 + 64),  # two spans that share 4 s
        (b"no audio at all, only words", None),
        ((noise(2_000), 16_000), 2),
        ((noise(30 * 16_000), 16_000), 480),
        (b"", None),
        ((noise(160), 16_000), 0),
    ]
    outcomes = list(transcriber.outcomes([source for source, _ in sources], options=UNGUARDED, vad=False, batch_size=2))
    assert len(outcomes) == len(sources)
    for (source, letters), (given, outcome) in zip(sources, outcomes, strict=True):
        assert given is source
        if letters is None:
            assert isinstance(outcome, ArkASRError)
        else:
            assert isinstance(outcome, Transcript)
            assert len(outcome.tokens) == letters
    assert all(1 <= len(batch) <= 2 for batch in engine.batches)
    assert [n for batch in engine.batches for n in batch] == [1_000, 480_000, 64_001, 2_000, 480_000, 160]
    with pytest.raises(AudioError, match=r"absent\.wav"):
        list(transcriber.transcribe([source for source, _ in sources]))


@pytest.mark.parametrize(("num_samples", "said"), [(1, "frame"), (159, "frame"), (0, "no samples")])
def test_clips_of_impossible_length(make_checkpoint: MakeCheckpoint, num_samples: int, said: str) -> None:
    transcriber = arkasr.load_model(make_checkpoint(), engine=Counting())
    with pytest.raises(AudioError, match=said):
        transcriber.transcribe((noise(num_samples), 16_000))
