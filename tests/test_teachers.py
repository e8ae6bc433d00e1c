"""Teachers: one contract for all, Qwen3-ASR against its own forward pass, and an endpoint that fails in every way."""

import base64
import io
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from arkasr import endpoint as asking
from arkasr import text
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.config import ModelConfig
from arkasr.errors import ArkASRError, CheckpointMismatchError, ModelNotFoundError, UsageError
from arkasr.text import TextRules
from arkasr.train import teachers
from arkasr.train.losses import Support
from arkasr.train.teachers import Capabilities, Request, Scores, Teacher, language_name, load_teacher
from arkasr.train.teachers.ark import ArkTeacher
from arkasr.train.teachers.http import HttpTeacher
from arkasr.train.teachers.qwen import QwenTeacher
from arkasr.train.teachers.spans import NONE, NOT_ALIGNED, NOT_STUDENTS, NOT_TEACHERS, OTHERWISE
from conftest import MakeCheckpoint, random_network

READ = ["hello there general", "the cat sat on the mat", "so much for that", "größe naïve 東京 привет"] * 4
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", text.IM_END, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
TEMPLATE = (
    "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}{% for c in m.content %}"
    "{% set ns.system = ns.system + c.text %}{% endfor %}{% endfor %}<|im_start|>system\n{{ ns.system }}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = "Qwen/Qwen3-ASR"


def noise(seed: int, seconds: float, loudness: float = 0.1) -> Waveform:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(round(seconds * SAMPLE_RATE)) * loudness).clip(-1, 1).astype(np.float32)


CLIPS = [noise(1, 1.27), noise(2, 2.41, 0.3), noise(3, 0.3)]


def qwen_tokenizer() -> Tokenizer:
    """Qwen's kind of tokenizer with some merges: the student's single bytes are often inside its tokens."""
    tokenizer = Tokenizer(models.BPE())
    text.configure_byte_level(tokenizer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(READ, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIALS])
    tokenizer.add_tokens([AddedToken("<asr_text>", normalized=False, special=False)])
    return tokenizer


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-ASR checkpoint as transformers writes it."""
    from transformers import (
        Qwen2Tokenizer,
        Qwen3ASRConfig,
        Qwen3ASRFeatureExtractor,
        Qwen3ASRForConditionalGeneration,
        Qwen3ASRProcessor,
    )

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = qwen_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    audio = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    wrapped = Qwen2Tokenizer(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=text.IM_END, pad_token="<|endoftext|>",  # noqa: S106
        extra_special_tokens=audio,
    )  # fmt: skip
    extractor = Qwen3ASRFeatureExtractor(feature_size=16)
    Qwen3ASRProcessor(extractor, wrapped, chat_template=TEMPLATE).save_pretrained(folder)
    ids = tokenizer.get_vocab()
    config = Qwen3ASRConfig(
        audio_config={
            "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16,
            "output_dim": 32, "downsample_hidden_size": 8, "initializer_range": 0.3,
        },
        text_config={
            "model_type": "qwen3", "vocab_size": tokenizer.get_vocab_size() + 5, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 4096, "tie_word_embeddings": True, "initializer_range": 0.3,
        },
        audio_token_id=ids["<|audio_pad|>"], pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|endoftext|>"], ids[text.IM_END]], initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ASRForConditionalGeneration(config).save_pretrained(folder)
    return folder


# ---- an endpoint ----


@dataclass
class Endpoint:
    """A chat endpoint in vLLM's form, whose model is a table: logits that follow from audio and token ids alone."""

    tokenizer: Tokenizer
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    fails: list[int] = field(default_factory=list)  # statuses of the next answers
    change: Callable[[dict[str, Any]], object] = lambda answer: answer
    template: Callable[[str], str] = str  # what is done to the begun turn
    delay_s: float = 0.0
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def logprobs(self, audio: bytes, ids: Sequence[int]) -> Tensor:
        seed = zlib.crc32(audio + np.array(ids, np.int64).tobytes())
        logits = torch.from_numpy(np.random.default_rng(seed).standard_normal(self.tokenizer.get_vocab_size()) * 2)
        return logits.log_softmax(dim=0)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        (user, *begun) = body["messages"]
        sound = user["content"][0]["input_audio"]
        assert user["role"] == "user"
        assert user["content"][0]["type"] == "input_audio"
        assert sound["format"] == "wav"
        audio = base64.b64decode(sound["data"])
        samples, rate = soundfile.read(io.BytesIO(audio))
        assert rate == SAMPLE_RATE
        hint = "".join(part["text"] for part in user["content"][1:])
        pads = "<|audio_pad|>" * (1 + len(samples) // 1280)
        prompt = f"<|im_start|>user\n<|audio_start|>{pads}<|audio_end|>{hint}<|im_end|>\n<|im_start|>assistant\n"
        assert body["continue_final_message"] == (not body["add_generation_prompt"]) == bool(begun)
        ids = self.tokenizer.encode(prompt + "".join(self.template(turn["content"]) for turn in begun)).ids
        rows = [self.logprobs(audio, ids[:place]) for place in range(len(ids) + 1)]

        def entries(row: Tensor, k: int, also: Sequence[int] = ()) -> dict[int, float]:
            return {
                token_id: float(row[token_id]) for token_id in dict.fromkeys([*row.topk(k).indices.tolist(), *also])
            }

        told = [
            {
                str(token_id): {"logprob": logprob, "rank": 1 + int((row > logprob).sum()), "decoded_token": "?"}
                for token_id, logprob in entries(row, body["prompt_logprobs"], [ids[place]]).items()
            }
            for place, row in enumerate(rows[:-1])
        ]
        top = [
            {"token": f"token_id:{token_id}", "logprob": logprob, "bytes": None}
            for token_id, logprob in entries(rows[-1], body["top_logprobs"]).items()
        ]
        return {
            "id": "chatcmpl-1", "object": "chat.completion", "model": body["model"], "usage": {},
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "?"}, "finish_reason": "length",
                         "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}],
            "prompt_logprobs": [None, *told[1:]], "prompt_token_ids": ids,
        }  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Endpoint, str]]:
    """An endpoint on this machine and its address; it is not waited for."""
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.001)
    monkeypatch.delenv(asking.KEY_VARIABLE, raising=False)
    state = Endpoint(qwen_tokenizer())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with state.lock:
                state.bodies.append(body)
                state.headers.append({name.lower(): value for name, value in self.headers.items()})
                state.busy += 1
                state.most_busy = max(state.most_busy, state.busy)
                status = state.fails.pop(0) if state.fails else 200
            time.sleep(state.delay_s)
            if self.path != "/v1/chat/completions":
                status = 404
            answer = state.change(state.answer(body)) if status == 200 else {"error": {"message": "no\nluck"}}
            content = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
            with state.lock:
                state.busy -= 1
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_address[1]}/v1#{MODEL}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path, rules: TextRules) -> QwenTeacher:
    return QwenTeacher.load(qwen_folder, rules, device="cpu", dtype="float32")


@pytest.fixture
def http(endpoint: tuple[Endpoint, str], rules: TextRules, tokenizer_file: Path) -> HttpTeacher:
    return HttpTeacher(endpoint[1], rules, tokenizer_file)


@pytest.fixture(params=["ark", "qwen", "http"])
def teacher(request: pytest.FixtureRequest, small: ModelConfig, rules: TextRules) -> Teacher:
    if request.param == "ark":
        return ArkTeacher(random_network(small), rules)
    return cast(Teacher, request.getfixturevalue(request.param))


# ---- the contract ----


def said(rules: TextRules, *texts: str) -> tuple[int, ...]:
    """A rollout of single bytes that stops."""
    return tuple(rules.target_ids("".join(texts)))


def ask(
    teacher: Teacher, waveforms: Sequence[Waveform], rollouts: Sequence[Sequence[tuple[int, ...]]], *,
    language: str | None = "en", support: Tensor | None = None, top_k: int = 6, temperature: float = 1.0,
) -> Scores:  # fmt: skip
    return teacher.score(Request(waveforms, [language] * len(waveforms), rollouts, support, top_k, temperature))


def same(one: Scores, other: Scores, rows: slice = slice(None)) -> bool:
    return (
        torch.equal(one.aligned, other.aligned[rows])
        and torch.equal(one.top.valid, other.top.valid[rows])
        and torch.equal(one.top.ids, other.top.ids[rows])
        and torch.allclose(one.top.logprobs, other.top.logprobs[rows], atol=2e-4, rtol=1e-4)
    )


def test_values_are_log_probabilities_and_a_teachers_own_are_sorted(teacher: Teacher, rules: TextRules) -> None:
    rollouts = [[said(rules, "hello there cat"), said(rules, "so 東京")[:-1]], [said(rules, "the mat")]]
    scores = ask(teacher, CLIPS[:2], rollouts)
    total = sum(len(rollout) for of_clip in rollouts for rollout in of_clip)
    assert len(scores.top.ids) == len(scores.aligned) == total
    assert scores.num_own == 6
    values, valid = scores.top.logprobs, scores.top.valid
    assert valid.any(dim=1).equal(scores.aligned)
    assert (values[valid] < 0).all()
    assert values[valid].isfinite().all()
    assert (values.masked_fill(~valid, -torch.inf).exp().sum(dim=1) < 1).all()
    for row, here in zip(values, valid, strict=True):
        assert row[here].equal(row[here].sort(descending=True).values)
    assert rules.allowed_ids[scores.top.ids[valid].numpy()].all()
    dropped = sum(count for reason, count in scores.drops.items() if reason in NOT_ALIGNED)
    assert int(scores.aligned.sum()) + dropped == total
    assert scores.coverage > 0.3
    unmapped = int(scores.aligned.sum()) * 6 - int(valid.sum())
    assert scores.drops.get(NOT_STUDENTS, 0) == unmapped


def test_neighbours_in_a_batch_change_nothing(teacher: Teacher, rules: TextRules) -> None:
    """Beside a louder and longer clip with longer rollouts, behind it and before it."""
    alone = ask(teacher, CLIPS[:1], [[said(rules, "the cat")]])
    other = said(rules, "hello there general, so much for that mat")
    before = ask(teacher, CLIPS, [[said(rules, "the cat")], [other, other], [said(rules, "")]])
    behind = ask(teacher, CLIPS[1::-1], [[other], [said(rules, "the cat")]])
    assert same(alone, before, slice(len(alone.aligned)))
    assert same(alone, behind, slice(-len(alone.aligned), None))


def test_k_rollouts_of_a_clip_are_k_requests(teacher: Teacher, rules: TextRules) -> None:
    rollouts = [said(rules, "hello there"), said(rules, "hell"), said(rules, ""), said(rules, "a mat")[:-1]]
    together = ask(teacher, CLIPS[:1], [rollouts])
    apart = [ask(teacher, CLIPS[:1], [[rollout]]) for rollout in rollouts]
    start = 0
    for one in apart:
        assert same(one, together, slice(start, start + len(one.aligned)))
        start += len(one.aligned)
    assert start == len(together.aligned)
    assert sum(sum(one.drops.values()) for one in apart) == sum(together.drops.values())


def test_a_position_is_told_what_follows_the_tokens_before_it(teacher: Teacher, rules: TextRules) -> None:
    """Whatever was said later: so the distribution at a place is that at the stop of a rollout that ends there."""
    whole = said(rules, "the cat sat on")
    scores = ask(teacher, CLIPS[:1], [[whole]])
    different = []
    for words in ("", "the", "the cat", "the cat sat"):
        place = len(words)
        short = ask(teacher, CLIPS[:1], [[said(rules, words)]])
        assert scores.aligned[place]
        assert short.aligned[-1]
        assert short.top.ids[-1].equal(scores.top.ids[place])
        assert torch.allclose(short.top.logprobs[-1], scores.top.logprobs[place], atol=2e-4)
        different.append(tuple(short.top.logprobs[-1].tolist()))
    assert len(set(different)) == len(different)


def test_a_teacher_hears_the_clip(teacher: Teacher, rules: TextRules) -> None:
    rollout = said(rules, "cat")
    scores = ask(teacher, CLIPS[:2], [[rollout], [rollout]])
    one, other = scores.top.logprobs.split(len(rollout))  # type: ignore[no-untyped-call]
    assert not torch.allclose(one[-1], other[-1], atol=1e-4)


def test_stop_only_rollouts_have_one_position(teacher: Teacher, rules: TextRules) -> None:
    scores = ask(teacher, CLIPS[:2], [[said(rules, "")], [said(rules, "")]])
    assert scores.aligned.tolist() == [True, True]
    assert scores.coverage == 1


@pytest.mark.parametrize("rollouts", [[[], []], [[()], []]])
def test_without_rollouts_there_is_nothing(teacher: Teacher, rollouts: list[list[tuple[int, ...]]]) -> None:
    scores = ask(teacher, CLIPS[:2], rollouts)
    assert scores.top.ids.shape == (0, 6)
    assert scores.coverage == 1
    assert not scores.drops


def test_a_clip_without_rollouts_takes_no_place(teacher: Teacher, rules: TextRules) -> None:
    rollout = said(rules, "mat")
    alone = ask(teacher, CLIPS[1:2], [[rollout]])
    assert same(alone, ask(teacher, CLIPS[:2], [[], [rollout]]))


def test_asked_ids_come_back_once(teacher: Teacher, rules: TextRules) -> None:
    rollout = said(rules, "the cat")
    if not teacher.capabilities.any_ids:
        with pytest.raises(UsageError, match="support teacher"):
            ask(teacher, CLIPS[:1], [[rollout]], support=torch.zeros(len(rollout), 1, dtype=torch.long))
        return
    everything = torch.arange(rules.vocab_size).expand(len(rollout), -1)
    full = ask(teacher, CLIPS[:1], [[rollout]], support=everything, top_k=1)
    values = torch.full((len(rollout), rules.vocab_size), -torch.inf)
    for row in range(len(rollout)):
        valid = full.top.valid[row]
        assert len(set(full.top.ids[row][valid].tolist())) == int(valid.sum())
        values[row, full.top.ids[row][valid]] = full.top.logprobs[row][valid]
    assert (values.exp().sum(dim=1) < 1.001).all()
    if teacher.capabilities.exact_vocabulary:
        assert torch.allclose(values.exp().sum(dim=1), torch.ones(len(rollout)), atol=1e-4)
    few = torch.stack(
        [torch.randperm(200, generator=torch.Generator().manual_seed(row))[:5] for row in range(len(rollout))]
    )
    few[:, 0] = rules.stop_ids[0]
    some = ask(teacher, CLIPS[:1], [[rollout]], support=few, top_k=4)
    assert some.num_own == 4
    for row in range(len(rollout)):
        valid = some.top.valid[row]
        ids = some.top.ids[row][valid]
        assert torch.allclose(some.top.logprobs[row][valid], values[row][ids], atol=2e-4)
        if some.aligned[row]:
            wanted = {int(token_id) for token_id in few[row] if values[row][token_id].isfinite()}
            assert wanted <= set(ids.tolist())
            assert ids.tolist().count(rules.stop_ids[0]) == 1


def test_a_temperature_divides_logits_before_they_are_normalised(teacher: Teacher, rules: TextRules) -> None:
    rollout = said(rules, "mat")
    if not teacher.capabilities.any_temperature:
        with pytest.raises(UsageError, match="temperature 1"):
            ask(teacher, CLIPS[:1], [[rollout]], temperature=2.0)
        return
    sharp, flat = (ask(teacher, CLIPS[:1], [[rollout]], temperature=temperature) for temperature in (1.0, 2.0))
    both = sharp.top.valid & flat.top.valid
    differences = [  # within a row, log-probabilities differ from halved ones by one number
        (2 * flat.top.logprobs[row][here] - sharp.top.logprobs[row][here])
        for row, here in enumerate(both)
        if here.any()
    ]
    assert differences
    for difference in differences:
        assert torch.allclose(difference, difference[:1].expand_as(difference), atol=1e-3)


# ---- what cannot be asked ----

ALL = Capabilities(any_ids=True, any_temperature=True, max_top_k=300, exact_vocabulary=True)


@pytest.mark.parametrize(
    ("capabilities", "support", "top_k", "temperature", "tail", "remedy"),
    [
        (ALL, "union", 32, 2.0, False, None),
        (ALL, "full", 400, 1.0, False, None),
        (ALL, "teacher", 1, 1.0, True, None),
        (ALL, "teacher", 1, 1.0, False, "larger top_k"),
        (ALL, "union", 0, 1.0, False, "above 0"),
        (ALL, "union", 8, 0.0, False, "above 0"),
        (ALL, "union", 301, 1.0, False, "300"),
        (replace(ALL, exact_vocabulary=False), "full", 8, 1.0, False, "support union"),
        (replace(ALL, any_temperature=False), "union", 8, 0.9, False, "temperature 1"),
        *((HttpTeacher.capabilities, one, 8, 1.0, True, "support teacher") for one in ("union", "student", "full")),
        (HttpTeacher.capabilities, "teacher", 20, 1.0, True, None),
        (HttpTeacher.capabilities, "teacher", 21, 1.0, True, "20"),
    ],
)
def test_what_a_teacher_cannot_answer_is_refused_at_the_start(
    capabilities: Capabilities, support: Support, top_k: int, temperature: float, tail: bool, remedy: str | None
) -> None:
    def start() -> None:
        teachers.check(capabilities, support=support, top_k=top_k, temperature=temperature, tail=tail)

    if remedy is None:
        start()
    else:
        with pytest.raises(UsageError, match=remedy):
            start()


def test_languages_are_those_of_transformers() -> None:
    from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

    assert teachers.LANGUAGES == LANGUAGE_CODE_TO_NAME
    assert [language_name(code) for code in ("pt-BR", "zh_TW", "cmn", "YUE")] == [
        "Portuguese", "Chinese", "Chinese", "Cantonese",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="language 'xx'"):
        language_name("xx")


# ---- Qwen3-ASR ----


def test_qwen_is_its_own_forward_pass(qwen: QwenTeacher, rules: TextRules) -> None:
    """The oracle: the processor on prompt and text at once, and all logits of the network's own forward."""
    prompt = (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\nlanguage German<asr_text>"
    )
    words = "the cat größe"
    inputs = qwen.processor(text=prompt + words, audio=[CLIPS[1]])
    with torch.no_grad():
        logits = qwen.network(**{name: inputs[name] for name in inputs if name != "num_audio_tokens"}).logits[0]
    plain = qwen_tokenizer()
    ids = plain.encode(words).ids
    assert inputs["input_ids"][0, -len(ids) :].tolist() == ids
    forbidden = [plain.token_to_id(token) for token in (*QWEN_SPECIALS, "<asr_text>") if token != text.IM_END]
    logits[:, forbidden] = -torch.inf
    logits[:, plain.get_vocab_size() :] = -torch.inf
    wanted = (logits[-len(ids) - 1 :] / 1.5).log_softmax(dim=-1)
    rollout = said(rules, words)
    everything = torch.arange(rules.vocab_size).expand(len(rollout), -1)
    scores = ask(qwen, CLIPS[1:2], [[rollout]], language="de", support=everything, temperature=1.5)
    spelled = [*accumulate((len(str(plain.id_to_token(one))) for one in ids), initial=0)]  # a letter is a byte
    assert [place for place, here in enumerate(scores.aligned.tolist()) if here] == spelled
    to_teacher = qwen.tokens.to_teacher
    for place, row in zip(spelled, wanted, strict=True):
        valid = scores.top.valid[place]
        mapped = to_teacher[scores.top.ids[place][valid]]
        assert int(valid.sum()) == int((to_teacher != NONE).sum())
        assert torch.allclose(scores.top.logprobs[place][valid], row[mapped], atol=2e-4)
        own = row.topk(6).indices
        assert scores.top.ids[place, :6][valid[:6]].tolist() == [
            one for one in qwen.tokens.to_student[own].tolist() if one != NONE
        ]
    assert scores.drops[NOT_TEACHERS] == len(spelled) * int((to_teacher == NONE).sum())


def test_qwen_is_asked_nothing_without_a_language(
    endpoint: tuple[Endpoint, str], qwen: QwenTeacher, http: HttpTeacher, rules: TextRules
) -> None:
    """It would say "language" first: what it thinks of the first position would be about another text."""
    for teacher in (qwen, http):
        with pytest.raises(UsageError, match=r"^a record has no language, .*; give each record its language$"):
            ask(teacher, CLIPS[:1], [[said(rules, "cat")]], language=None)
    assert endpoint[0].bodies == []


def test_qwen_hears_each_clip_once(qwen: QwenTeacher, rules: TextRules, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    encoder = qwen.network.model.get_audio_features

    def count(features: Tensor, mask: Tensor, **options: object) -> object:
        heard.append(len(features))
        return encoder(features, mask, **options)

    monkeypatch.setattr(qwen.network.model, "get_audio_features", count)
    ask(qwen, CLIPS, [[said(rules, "a"), said(rules, "b"), said(rules, "c")], [], [said(rules, "d")]])
    assert heard == [2]


def test_qwen_is_the_same_in_small_passes(qwen: QwenTeacher, rules: TextRules, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = [[said(rules, "the cat"), said(rules, "")], [said(rules, "so much for that")]]
    at_once = ask(qwen, CLIPS[:2], rollouts)
    monkeypatch.setattr("arkasr.train.teachers.qwen.ROW_TOKENS", 1)
    monkeypatch.setattr("arkasr.train.teachers.qwen.CHUNK", 3)
    assert same(at_once, ask(qwen, CLIPS[:2], rollouts))


def copied(folder: Path, target: Path, leave: str = "") -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.name != leave:
            (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "model.safetensors", "config.json"])
def test_a_qwen_folder_without_a_file_is_refused(
    qwen_folder: Path, rules: TextRules, tmp_path: Path, name: str
) -> None:
    folder = copied(qwen_folder, tmp_path / "less", leave=name)
    if name == "model.safetensors":  # no pickle is opened instead
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError):
        QwenTeacher.load(folder, rules, device="cpu", dtype="float32")


def test_qwen_weights_are_never_made_up(qwen_folder: Path, rules: TextRules, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(qwen_folder, tmp_path / "less")
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match="missing_keys"):
        QwenTeacher.load(folder, rules, device="cpu", dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "thinker_config": {}}))
    with pytest.raises(CheckpointMismatchError, match="-hf"):
        QwenTeacher.load(folder, rules, device="cpu", dtype="float32")


# ---- the endpoint ----


def test_http_values_are_the_endpoints(endpoint: tuple[Endpoint, str], http: HttpTeacher, rules: TextRules) -> None:
    """The oracle: the endpoint's table at the tokens that its tokenizer makes of prompt and prefix."""
    words = "the cat sat"
    scores = ask(http, CLIPS[:1], [[said(rules, words)]], language="fr")
    (body,) = endpoint[0].bodies
    assert body["messages"][1] == {"role": "assistant", "content": f"language French<asr_text>{words}"}
    audio = base64.b64decode(body["messages"][0]["content"][0]["input_audio"]["data"])
    samples, _ = soundfile.read(io.BytesIO(audio), dtype="float32")
    assert np.abs(samples - CLIPS[0]).max() < 1e-4
    ids = endpoint[0].answer(body)["prompt_token_ids"]
    count = len(qwen_tokenizer().encode(words).ids)
    rows = [endpoint[0].logprobs(audio, ids[: len(ids) - count + column]) for column in range(count + 1)]
    assert int(scores.aligned.sum()) == len(rows)
    for row, place in zip(rows, scores.aligned.nonzero()[:, 0].tolist(), strict=True):
        values, own = row.topk(6)
        mapped = http.tokens.to_student[own]
        assert scores.top.ids[place].tolist() == [max(one, 0) for one in mapped.tolist()]
        here = mapped != NONE
        assert torch.allclose(scores.top.logprobs[place][here], values[here].float(), atol=1e-5)


def test_a_request_is_in_vllms_form(endpoint: tuple[Endpoint, str], http: HttpTeacher, rules: TextRules) -> None:
    ask(http, CLIPS[:1], [[said(rules, "a")]], top_k=7)
    (body,) = endpoint[0].bodies
    wanted = {
        "model": MODEL, "add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 7,
        "logprobs": True, "top_logprobs": 7, "max_completion_tokens": 1, "return_token_ids": True,
        "return_tokens_as_token_ids": True, "temperature": 1.0,
    }  # fmt: skip
    assert {name: body[name] for name in wanted} == wanted


@pytest.fixture
def other(endpoint: tuple[Endpoint, str], rules: TextRules, tmp_path: Path) -> HttpTeacher:
    """A model that is not Qwen3-ASR."""
    tokenizer = json.loads(qwen_tokenizer().to_str())
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != "<asr_text>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    endpoint[0].tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
    return HttpTeacher(endpoint[1], rules, tmp_path)


@pytest.mark.parametrize(("language", "hint"), [("de", " It is in German."), (None, "")])
def test_another_kind_of_model_is_asked_in_words(
    endpoint: tuple[Endpoint, str], other: HttpTeacher, rules: TextRules, language: str | None, hint: str
) -> None:
    assert ask(other, CLIPS[:1], [[said(rules, "cat")]], language=language).aligned[-1]
    user, assistant = endpoint[0].bodies[0]["messages"]
    assert user["content"][1] == {"type": "text", "text": f"{text.INSTRUCTION}{hint}"}
    assert assistant["content"] == "cat"


@pytest.mark.parametrize(("words", "sent"), [("a <|im_end|> b", "a "), (" a", ""), ("\n", "")])
def test_what_a_server_would_read_otherwise_is_not_sent(
    endpoint: tuple[Endpoint, str], other: HttpTeacher, rules: TextRules, words: str, sent: str
) -> None:
    rollout = (*(rules.target_ids(c)[0] for c in words), rules.stop_ids[0])
    scores = ask(other, CLIPS[:1], [[rollout]], language=None)
    (body,) = endpoint[0].bodies
    assert [turn["content"] for turn in body["messages"][1:]] == ([sent] if sent else [])
    assert body["add_generation_prompt"] == (not sent)
    assert scores.drops[OTHERWISE] == len(rollout) - 1 - len(sent)


def test_an_endpoint_is_asked_again_until_it_answers(endpoint: tuple[Endpoint, str], http: HttpTeacher) -> None:
    endpoint[0].fails = [429, 503, 500]
    http.probe()
    assert len(endpoint[0].bodies) == 4
    endpoint[0].fails = [503] * 6
    with pytest.raises(UsageError, match=r"asked 6 times, HTTP 503 'no\\nluck'; look after") as caught:
        http.probe()
    assert "\n" not in str(caught.value)


def test_a_refusal_is_not_asked_again(endpoint: tuple[Endpoint, str], http: HttpTeacher) -> None:
    for status, remedy in ((401, "check URL, model and ARKASR_API_KEY"), (422, "look after server and model")):
        endpoint[0].bodies.clear()
        endpoint[0].fails = [status]
        with pytest.raises(UsageError, match=f"HTTP {status} .*{remedy}"):
            http.probe()
        assert len(endpoint[0].bodies) == 1


def test_a_silent_endpoint_is_given_up(
    endpoint: tuple[Endpoint, str], http: HttpTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arkasr.train.teachers.http.TIMEOUT_S", 0.02)
    endpoint[0].delay_s = 0.2
    with pytest.raises(UsageError, match="asked 6 times, ReadTimeout"):
        http.probe()


def test_requests_at_a_time_are_bounded(endpoint: tuple[Endpoint, str], rules: TextRules, tokenizer_file: Path) -> None:
    endpoint[0].delay_s = 0.05
    three = HttpTeacher(endpoint[1], rules, tokenizer_file, parallel=3)
    ask(three, CLIPS[:2], [[said(rules, letter) for letter in "abcdef"]] * 2)
    assert len(endpoint[0].bodies) == 12
    assert 2 <= endpoint[0].most_busy <= 3


def test_a_key_goes_into_the_header_and_no_message(
    endpoint: tuple[Endpoint, str], http: HttpTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.probe()
    monkeypatch.setenv("ARKASR_API_KEY", "secret-1")
    http.probe()
    assert [headers.get("authorization") for headers in endpoint[0].headers] == [None, "Bearer secret-1"]
    endpoint[0].fails = [403]
    with pytest.raises(UsageError) as caught:
        http.probe()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("template", [lambda _: "", str.strip, str.upper, lambda said: said + "\n"])
def test_a_template_that_changes_the_turn_is_found_at_the_start(
    endpoint: tuple[Endpoint, str], http: HttpTeacher, template: Callable[[str], str]
) -> None:
    """Qwen3-ASR's first template left the assistant's turn out: every answer would be of an empty transcript."""
    endpoint[0].template = template
    with pytest.raises(UsageError, match="tokens are not those of 'a b '; start the server with a chat template"):
        http.probe()


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda answer: {key: value for key, value in answer.items() if key != name}


def with_logprob(value: object) -> Callable[[dict[str, Any]], object]:
    def change(answer: dict[str, Any]) -> object:
        next(iter(answer["prompt_logprobs"][-1].values()))["logprob"] = value
        return answer

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("prompt_token_ids"), "lacks"),
        (without("prompt_logprobs"), "lacks"),
        (without("choices"), "lacks"),
        (lambda answer: {**answer, "choices": [{"logprobs": None}]}, "lacks"),
        (lambda answer: {**answer, "prompt_logprobs": None}, "lacks"),
        (lambda answer: {**answer, "prompt_logprobs": answer["prompt_logprobs"][1:]}, "tokens are not those"),
        (lambda answer: {**answer, "prompt_logprobs": [{"99999": {"logprob": -1.0}}] * len(answer["prompt_token_ids"])},
         "99999"),
        (with_logprob("much"), "lacks"),
        (with_logprob(float("nan")), "nan"),
        (with_logprob(3.5), "positive"),
        (lambda _: [], "lacks"),
        (lambda _: b"<html>", "not JSON"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_refused_in_one_line(
    endpoint: tuple[Endpoint, str], http: HttpTeacher, rules: TextRules,
    change: Callable[[dict[str, Any]], object], message: str,
) -> None:  # fmt: skip
    endpoint[0].change = change
    with pytest.raises(ArkASRError, match=message) as caught:
        ask(http, CLIPS[:1], [[said(rules, "cat")]])
    assert "\n" not in str(caught.value)
    assert len(endpoint[0].bodies) == 1


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/v1", "http://u:p@127.0.0.1:9/v1#m", "http://#m", "http://127.0.0.1:x/v1#m"]
)
def test_addresses_that_are_none(name: str, rules: TextRules, tokenizer_file: Path) -> None:
    with pytest.raises(UsageError, match=r"give http://HOST/v1#MODEL") as caught:
        HttpTeacher(name, rules, tokenizer_file)
    assert "u:p" not in str(caught.value)


# ---- by name ----


def test_a_teacher_is_found_by_its_name(
    endpoint: tuple[Endpoint, str], qwen_folder: Path, tokenizer_file: Path, rules: TextRules,
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(name: str, tokenizer: Path | None = None) -> Teacher:
        return load_teacher(name, rules, device="cpu", dtype="float32", tokenizer=tokenizer)

    assert isinstance(load(str(make_checkpoint())), ArkTeacher)
    capsys.readouterr()
    for teacher, kind in (
        (load(str(qwen_folder)), QwenTeacher),
        (load(endpoint[1], tokenizer_file), HttpTeacher),
    ):
        assert isinstance(teacher, kind)
        assert not teacher.capabilities.exact_vocabulary
    out, err = capsys.readouterr()
    assert out == ""
    assert sum("tokens have the same bytes" in line for line in err.splitlines()) == 2
    assert len(endpoint[0].bodies) == 1
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load(endpoint[1])
    with pytest.raises(UsageError, match="has its own tokenizer"):
        load(str(qwen_folder), tokenizer_file)
    endpoint[0].fails = [404]
    with pytest.raises(UsageError, match="HTTP 404"):
        load(endpoint[1], tokenizer_file)
