# ruff: noqa: RUF001 - the texts are multilingual
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from arkasr import text
from arkasr.errors import CheckpointMismatchError, ModelNotFoundError
from arkasr.text import TextRules
from conftest import byte_tokenizer

VOCAB_SIZE, IM_END, AUDIO = 151_936, 151_645, 151_663

TEXTS = (
    "Please transcribe this audio.", "hello", " hello  world ", "It's what they'd say, I'LL bet WE'VE won't",
    "0 12 345,678.90 in 2024", "naïve café Ångström", "nai\u0308ve e\u0301te\u0301", "Größe straße ÄÖÜ ß", "¿Qué? ¡Sí!",
    "你好，世界。今天天气很好", "こんにちは 世界", "안녕하세요 세계", "Привет, мир!", "مرحبا بالعالم", "ไทย",
    "👍🏽 family 👨‍👩‍👧 🇫🇷", "line one\nline two\r\n\r\n  three\t\tfour   ", "\n", "   ", "", "a" * 300,
    "<b>x</b> <|user", "don’t", "def f(x):\n    return x**2  # ok", "\u200b\ufeff\x00\x1b", "𝒳 ½ ² Ⅷ ٣",
)  # fmt: skip


@pytest.fixture(scope="module")
def raw(shared: Path) -> Tokenizer:
    """The published tokenizer without our rules."""
    return Tokenizer.from_file(str(shared / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def arks(shared: Path) -> TextRules:
    """Token rules over the published vocabulary."""
    return text.load(shared / "tokenizer", vocab_size=VOCAB_SIZE, eos_token_ids=(IM_END,), audio_token_id=AUDIO)


@pytest.fixture(scope="module")
def three_files(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as vocab.json, merges.txt and added_tokens.json."""
    raw = json.loads((shared / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("three")
    merges = "".join(f"{left} {right}\n" for left, right in raw["model"]["merges"])
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    return folder


@pytest.mark.parametrize("num_audio_tokens", [1, 2, 12, 375])
def test_prompt_ids(arks: TextRules, raw: Tokenizer, num_audio_tokens: int) -> None:
    ids = arks.prompt_ids(num_audio_tokens)
    instruction = [5501, 1356, 3114, 419, 7699, 13]
    assert ids == [151_665, 151_666, *[AUDIO] * num_audio_tokens, 151_667, *instruction, 151_668]
    literal = (
        f"<|user|><|begin_of_audio|>{'<|audio|>' * num_audio_tokens}<|end_of_audio|>"
        "Please transcribe this audio.<|assistant|>"
    )
    assert ids == raw.encode(literal, add_special_tokens=False).ids


def test_stop_ids(arks: TextRules, raw: Tokenizer) -> None:
    assert arks.stop_ids == (IM_END,)
    two = TextRules(raw, vocab_size=VOCAB_SIZE, eos_token_ids=(151_643,), place="raw")
    assert set(two.stop_ids) == {IM_END, 151_643}


def test_allowed_ids_are_ordinary_text_and_the_stop(arks: TextRules) -> None:
    assert arks.allowed_ids.shape == (VOCAB_SIZE,)
    assert arks.allowed_ids[:151_643].all()
    assert np.flatnonzero(arks.allowed_ids[151_643:]).tolist() == [IM_END - 151_643]
    with pytest.raises(ValueError, match="read-only"):
        arks.allowed_ids[AUDIO] = True


def test_every_stop_id_is_allowed(raw: Tokenizer) -> None:
    some = TextRules(raw, vocab_size=VOCAB_SIZE, eos_token_ids=(IM_END, 151_643, 151_800), place="raw")
    assert np.flatnonzero(some.allowed_ids[151_643:]).tolist() == [0, 2, 157]


def test_codec_tokens_are_forbidden(rules: TextRules) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|codec_0|>", "plain codec", "<other\nkind>"])
    some = TextRules(tokenizer, vocab_size=rules.vocab_size, eos_token_ids=rules.stop_ids, place="codec")
    assert (some.allowed_ids == rules.allowed_ids).all()
    assert np.flatnonzero(rules.allowed_ids).tolist() == [*range(256), *rules.stop_ids]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        *[("hello world", "hello world"), ("  hello \n\t world\r\n", "hello world"), ("", ""), (" . ", "")],
        *[(" ,.;:!?-hello, world!", "hello, world!"), ("... - yes", "yes"), ("-5 degrees", "5 degrees")],
        *[("one<|user|>two", "one"), ("one<|assistant|>two<|user|>", "one"), ("one <|im_end|>two", "one")],
        *[
            ("<|im_end|>late", ""),
            ("one<|im_end|><|user|>", "one"),
            ("a<|endoftext|>b", "ab"),
            ("你好，世界。", "你好，世界。"),
        ],
        *[("a\u3000b\u00a0c", "a b c"), ("¿Qué?", "¿Qué?"), ("x < y |> z", "x < y |> z")],
    ],
)
def test_to_text(arks: TextRules, raw: Tokenizer, said: str, expected: str) -> None:
    assert arks.to_text(raw.encode(said, add_special_tokens=False).ids) == expected


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_to_text_of_half_a_character(rules: TextRules, cut: int) -> None:
    ids = rules.target_ids("a你😀")[:cut]
    assert rules.to_text(ids).startswith("a")
    assert rules.to_text(ids[1:]) is not None


def test_target_ids_come_back_as_text(arks: TextRules, rules: TextRules) -> None:
    for some in (arks, rules):
        for sentence in ("Hello, it's 25 degrees.", "你好，世界。", "Привет, мир!", "naïve café", "👨‍👩‍👧 ok"):
            ids = some.target_ids(sentence)
            assert ids[-1] == some.stop_ids[0]
            assert some.to_text(ids) == some.to_text(ids[:-1]) == sentence
            assert some.allowed_ids[ids].all()


def test_three_files_give_the_same_tokenizer(arks: TextRules, three_files: Path) -> None:
    older = text.load(three_files, vocab_size=VOCAB_SIZE, eos_token_ids=(IM_END,), audio_token_id=AUDIO)
    assert older.prompt_ids(3) == arks.prompt_ids(3)
    assert (older.allowed_ids == arks.allowed_ids).all()
    for sentence in TEXTS:
        assert older.target_ids(sentence) == arks.target_ids(sentence), sentence
        assert older.to_text(older.target_ids(sentence)) == arks.to_text(arks.target_ids(sentence))


def test_ids_are_those_of_transformers(arks: TextRules, three_files: Path) -> None:
    reference: Any = Qwen2Tokenizer.from_pretrained(str(three_files))
    for sentence in TEXTS:
        assert [*reference.encode(sentence, add_special_tokens=False), IM_END] == arks.target_ids(sentence), sentence


def load(folder: Path, *, vocab_size: int = 400, audio_token_id: int | None = None) -> TextRules:
    tokenizer = byte_tokenizer()
    ids = tokenizer.get_vocab()
    audio_id = ids[text.AUDIO] if audio_token_id is None else audio_token_id
    return text.load(folder, vocab_size=vocab_size, eos_token_ids=(ids[text.IM_END],), audio_token_id=audio_id)


@pytest.mark.parametrize("token", text.NEEDED)
def test_a_missing_token_is_named(tmp_path: Path, token: str) -> None:
    without = byte_tokenizer().to_str().replace(f'"{token}"', '"<|gone|>"')
    (tmp_path / "tokenizer.json").write_text(without, encoding="utf-8")
    with pytest.raises(CheckpointMismatchError) as caught:
        load(tmp_path)
    assert f"no token {token};" in str(caught.value)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path, vocab_size=265).vocab_size == 265
    with pytest.raises(CheckpointMismatchError, match="has id 264, vocab_size is 264"):
        load(tmp_path, vocab_size=264)


def test_a_contradicting_audio_token_id(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointMismatchError, match="audio_token_id 7"):
        load(tmp_path, audio_token_id=7)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b"<html>", b"half"])
def test_a_damaged_tokenizer(tmp_path: Path, content: bytes) -> None:
    whole = byte_tokenizer().to_str().encode()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(
        CheckpointMismatchError,
        match=r"tokenizer\.json: (not JSON|not a JSON object|truncation is not|normalizer is not)",
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        load(tmp_path)


def test_the_bytes_of_tokens_are_those_of_the_text(arks: TextRules) -> None:
    text = "naïve café, 東京 ไทย 🙂 \t\u00ad\x7f"
    ids = arks.target_ids(text)[:-1]
    assert b"".join(map(arks.token_bytes, ids)) == text.encode()
    assert arks.token_bytes(arks.audio_id) == b"<|audio|>"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("vocab.json", "{", "not a tokenizer"),
        ("added_tokens.json", None, "no token <.audio.>"),
        ("added_tokens.json", "{", "added_tokens.json: not JSON"),
        ("added_tokens.json", "[1]", "added_tokens.json: not a JSON object"),
        ("added_tokens.json", '{"<|audio|>": 300}', "'<.audio.>' has id 300, but 256 is its place"),
    ],
)
def test_damaged_older_files(tmp_path: Path, name: str, content: str | None, cause: str) -> None:
    vocab = byte_tokenizer().get_vocab(with_added_tokens=False)
    added = {token: i for token, i in byte_tokenizer().get_vocab().items() if token not in vocab}
    files = {"vocab.json": json.dumps(vocab), "merges.txt": "#version: 0.2\n", "added_tokens.json": json.dumps(added)}
    for file, whole in files.items():
        (tmp_path / file).write_text(whole, encoding="utf-8")
    assert load(tmp_path).prompt_ids(2) == TextRules(
        byte_tokenizer(), vocab_size=400, eos_token_ids=(), place=""
    ).prompt_ids(2)
    (tmp_path / "merges.txt").rename(tmp_path / "away")
    with pytest.raises(ModelNotFoundError, match=r"merges\.txt: cannot be read"):
        load(tmp_path)
    (tmp_path / "away").rename(tmp_path / "merges.txt")
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointMismatchError, match=cause):
        load(tmp_path)
