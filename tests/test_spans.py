"""A rollout in another tokenizer: every aligned position speaks of the same text, and every other one is counted."""

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from arkasr import text
from arkasr.errors import CheckpointMismatchError, ModelNotFoundError
from arkasr.text import TextRules
from arkasr.train.teachers import Request, Scores
from arkasr.train.teachers.spans import (
    INSIDE,
    NONE,
    NOT_ALIGNED,
    NOT_STUDENTS,
    NOT_TEACHERS,
    NOT_UTF8,
    OTHERWISE,
    Spans,
    TeacherTokens,
    TokenMap,
    align,
    decodable,
)

VOCAB_SIZE, IM_END, AUDIO = 151_936, 151_645, 151_663
LATIN = "abcdefghijklmnopqrstuvwxyz"
# Letters of each language's script, vowel signs and tone marks with them.
SCRIPTS = {
    "zh": [chr(c) for c in range(0x4E00, 0x9FA0, 37)],
    "yue": [*"唔係佢哋嘅咗喺冇嚟啲乜嘢點解", *(chr(c) for c in range(0x4E00, 0x9FA0, 53))],
    "en": [*LATIN, "'"],
    "ar": [chr(c) for c in [*range(0x621, 0x63B), *range(0x641, 0x653)]],
    "de": [*LATIN, *"äöüß"],
    "fr": [*LATIN, *"éèêëàâçîïôûùœ'"],
    "es": [*LATIN, *"áéíóúñü"],
    "pt": [*LATIN, *"ãõáéíóúâêôç"],
    "id": [*LATIN, "-"],
    "it": [*LATIN, *"àèéìòù"],
    "ko": [chr(c) for c in range(0xAC00, 0xD7A4, 29)],
    "ru": [chr(c) for c in range(0x430, 0x450)],
    "th": [chr(c) for c in [*range(0xE01, 0xE3B), *range(0xE40, 0xE4E)]],
    "vi": [*LATIN, *"ăâđêôơưạảấầẩẫậắằặẹẻẽếềểễệịọỏốồổỗộớờởợụủứừửữựỳỵ", "a\u0323", "o\u0309"],
    "ja": [*(chr(c) for c in range(0x3041, 0x3097)), *(chr(c) for c in range(0x30A1, 0x30FB)), *"東京大学日本語"],
    "tr": [*LATIN, *"çğıöşü"],
    "hi": [chr(c) for c in [*range(0x905, 0x93A), *range(0x93E, 0x94E)]],
    "ms": [*LATIN],
    "nl": [*LATIN, *"ëïé"],
}
OTHERS = [*'0123456789.,!?;:-%€"()', "👍🏽", "👨‍👩‍👧", "🇫🇷", "e\u0301", "\u0327", "½", "\n", "\t", "。", "、"]
SPACELESS = ("zh", "yue", "ja", "th")


def lexicon(language: str) -> list[str]:
    rng = random.Random(f"words of {language}")
    return ["".join(rng.choices(SCRIPTS[language], k=rng.randint(1, 8))) for _ in range(200)]


def sentence(rng: random.Random, language: str, words: Sequence[str]) -> str:
    """Words of a language, some new, some of another, with digits, marks and emoji between them."""
    pieces = []
    for _ in range(rng.randint(0, 14)):
        kind = rng.random()
        if kind < 0.7:
            pieces.append(rng.choice(words))
        elif kind < 0.8:
            pieces.append("".join(rng.choices(SCRIPTS[language], k=rng.randint(1, 5))))
        elif kind < 0.9:
            pieces.append("".join(rng.choices(OTHERS, k=rng.randint(1, 3))))
        else:
            pieces.append("".join(rng.choices(SCRIPTS[rng.choice(list(SCRIPTS))], k=3)))
    between = "" if language in SPACELESS else " "
    return rng.choice(["", "", " ", "  "]) + between.join(pieces) + rng.choice(["", "", ".", " "])


def other_bpe(texts: Sequence[str], *, vocab_size: int = 3000) -> Tokenizer:
    """Another byte-level BPE, with another split of words and its specials in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True),
        special_tokens=["<pad>", text.IM_END], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<asr_text>", normalized=False), AddedToken("hello", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def arks(shared: Path) -> TextRules:
    return text.load(shared / "tokenizer", vocab_size=VOCAB_SIZE, eos_token_ids=(IM_END,), audio_token_id=AUDIO)


@pytest.fixture(scope="module")
def students(shared: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shared / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    rng = random.Random("what the teacher read")
    words = {language: lexicon(language) for language in SCRIPTS}
    return other_bpe([sentence(rng, language, words[language]) for language in SCRIPTS for _ in range(60)])


@pytest.fixture(scope="module")
def tokens(arks: TextRules, theirs: Tokenizer) -> TokenMap:
    teacher = TeacherTokens(theirs, place="theirs")
    return TokenMap(arks, teacher, width=len(teacher.bytes) + 5)


def hashed(prefix: bytes, width: int) -> np.ndarray:
    """Log-probabilities over all of a teacher's ids that follow from the bytes before alone."""
    seed = int.from_bytes(hashlib.sha256(prefix).digest()[:8], "big")
    logits = np.random.default_rng(seed).standard_normal(width) * 3
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def hashing_teacher(request: Request, tokens: TokenMap) -> Scores:
    """A teacher that sees nothing but its own tokens of the text it was given."""
    spans = Spans(request, tokens)
    rows = []
    for row in spans.rows:
        for column in row.columns:
            prefix = b"".join(tokens.teacher.bytes[token_id] or b"" for token_id in row.ids[:column])
            rows.append(hashed(prefix, len(tokens.to_student)))
    logprobs = torch.tensor(np.array(rows).reshape(-1, len(tokens.to_student)), dtype=torch.float32)
    own, ids = logprobs.topk(request.top_k)
    asked = None if spans.asked is None else logprobs.gather(1, spans.asked.clamp(min=0))
    return spans.scores(ids, own, asked)


def request_of(rollouts: Sequence[tuple[int, ...]], support: Tensor | None = None, top_k: int = 8) -> Request:
    return Request([], [None], [rollouts], support, top_k, 1.0)


def check_prefixes(rollouts: Sequence[tuple[int, ...]], scores: Scores, tokens: TokenMap) -> None:
    """Each value is the hash of the student's own bytes before that place, looked up by the bytes of the id."""
    prefixes = [b"".join(tokens.spell(rollout[:place])) for rollout in rollouts for place in range(len(rollout))]
    assert len(prefixes) == len(scores.aligned) == len(scores.top.ids)
    teachers_id = {spelled: token_id for token_id, spelled in enumerate(tokens.teacher.bytes) if spelled}
    teachers_id[b""] = tokens.teacher.stop_id
    for number, prefix in enumerate(prefixes):
        valid = scores.top.valid[number]
        assert scores.aligned[number] or not valid.any()
        if valid.any():
            ids = [teachers_id[spelled] for spelled in tokens.spell(scores.top.ids[number][valid].tolist())]
            wanted = hashed(prefix, len(tokens.to_student))[ids]
            assert np.allclose(scores.top.logprobs[number][valid].numpy(), wanted, atol=1e-4)


def check_drops(scores: Scores) -> None:
    dropped = sum(count for reason, count in scores.drops.items() if reason in NOT_ALIGNED)
    assert len(scores.aligned) == int(scores.aligned.sum()) + dropped
    assert scores.coverage == pytest.approx(1 - dropped / max(len(scores.aligned), 1))


# ---- the same text ----


@pytest.mark.parametrize("language", SCRIPTS)
def test_every_aligned_position_speaks_of_the_students_own_prefix(
    language: str, arks: TextRules, students: Tokenizer, tokens: TokenMap
) -> None:
    rng = random.Random(f"what was heard in {language}")
    words = lexicon(language)
    rollouts = []
    for number in range(8):
        ids = students.encode(sentence(rng, language, words), add_special_tokens=False).ids
        rollouts.append(tuple(ids[: rng.randint(0, len(ids))] if number % 3 == 0 else [*ids, IM_END]))
    total = sum(map(len, rollouts))
    support = torch.tensor(rng.choices(np.flatnonzero(arks.allowed_ids).tolist(), k=total * 4)).reshape(total, 4)
    support[:, 0] = IM_END
    scores = hashing_teacher(request_of(rollouts, support=distinct(support)), tokens)
    check_prefixes(rollouts, scores, tokens)
    check_drops(scores)


def distinct(support: Tensor) -> Tensor:
    """Ids that stand twice in a row of a support become others."""
    for row in support:
        while len(set(row.tolist())) < len(row):
            row[1:] = torch.randperm(1000)[: len(row) - 1]
    return support


def test_most_positions_are_aligned_on_average_over_the_languages(students: Tokenizer, tokens: TokenMap) -> None:
    coverages = {}
    for language in SCRIPTS:
        rng = random.Random(f"coverage of {language}")
        words = lexicon(language)
        texts = [sentence(rng, language, words) for _ in range(20)]
        rollouts = [(*students.encode(one, add_special_tokens=False).ids, IM_END) for one in texts]
        scores = hashing_teacher(request_of(rollouts, top_k=1), tokens)
        check_drops(scores)
        assert scores.drops.get(NOT_UTF8, 0) == 0
        coverages[language] = scores.coverage
    assert sum(coverages.values()) / len(coverages) > 0.7


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_of_random_ids_no_position_is_misplaced_or_lost(data: st.DataObject, tokens: TokenMap) -> None:
    """Such rollouts are seldom UTF-8, and what they spell is seldom tokenized as it was said."""
    allowed = np.flatnonzero(tokens.student.allowed_ids)
    allowed = allowed[~np.isin(allowed, tokens.student.stop_ids)]
    short = data.draw(st.booleans())  # single bytes, of which some are joined to characters
    highest = 255 if short else len(allowed) - 1
    rollouts = [
        tuple(int(allowed[number]) for number in data.draw(st.lists(st.integers(0, highest), max_size=12)))
        + ((IM_END,) if data.draw(st.booleans()) else ())
        for _ in range(3)
    ]
    scores = hashing_teacher(request_of(rollouts, top_k=3), tokens)
    check_prefixes(rollouts, scores, tokens)
    check_drops(scores)


# ---- align ----


def pieces(whole: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = sorted({0, *(cut % (len(whole) + 1) for cut in cuts), len(whole)})
    return [whole[start:end] for start, end in pairwise(ends)]


CUTS = st.lists(st.integers(0, 200), max_size=12)


@given(st.text(max_size=20), CUTS, CUTS)
def test_of_one_text_a_position_is_aligned_where_both_have_a_boundary(
    said: str, ones: list[int], others: list[int]
) -> None:
    whole = said.encode()
    student, teacher = [*pieces(whole, ones), b""], pieces(whole, others)
    places = align(student, teacher)
    assert len(places) == len(student)
    boundaries = [sum(map(len, teacher[:count])) for count in range(len(teacher) + 1)]
    for number, place in enumerate(places):
        start = sum(map(len, student[:number]))
        assert place == (boundaries.index(start) if start in boundaries else INSIDE)
    assert places[-1] == len(teacher)  # a stop is aligned with the end, whatever is before


def test_positions_by_hand() -> None:
    assert align([], []) == []
    assert align([b""], []) == [0]
    assert align([b"the", b" c", b"at", b""], [b"th", b"e", b" cat"]) == [0, 2, INSIDE, 3]
    snowman = "☃".encode()
    assert align([b"a", snowman[:1], snowman[1:], b""], [b"a", snowman]) == [0, 1, INSIDE, 2]
    assert align([b"a", snowman[:2], b"b", b""], [b"a"]) == [0, 1, NOT_UTF8, NOT_UTF8]  # never completed
    assert align([b"e", "\u0301".encode(), b"x", b""], ["é".encode(), b"x"]) == [0, OTHERWISE, OTHERWISE, OTHERWISE]
    assert align([b"ab", b"c", b""], [b"ab"]) == [0, 1, OTHERWISE]  # the teacher was given less


@given(st.binary(max_size=12))
def test_decodable_is_the_longest_prefix_that_is_utf8(data: bytes) -> None:
    def decodes(length: int) -> bool:
        try:
            data[:length].decode()
        except UnicodeDecodeError:
            return False
        return True

    assert decodable(data).encode() == data[: max(length for length in range(len(data) + 1) if decodes(length))]


def test_a_special_token_that_is_spelled_out_stays_text(students: Tokenizer, tokens: TokenMap) -> None:
    """A student may say <|im_end|> in ordinary tokens; a teacher that read an end of turn would score nonsense."""
    students.encode_special_tokens = True
    ids = students.encode("a <|im_end|> b<pad>c", add_special_tokens=False).ids
    students.encode_special_tokens = False
    assert IM_END not in ids
    rollout = (*ids, IM_END)
    (row,) = Spans(request_of([rollout]), tokens).rows
    assert tokens.teacher.stop_id not in row.ids
    check_prefixes([rollout], hashing_teacher(request_of([rollout]), tokens), tokens)


def test_a_teacher_that_normalises_is_used_up_to_there(arks: TextRules, theirs: Tokenizer) -> None:
    composing = Tokenizer.from_str(theirs.to_str())
    composing.normalizer = normalizers.NFC()  # as Qwen's
    tokens = TokenMap(arks, TeacherTokens(composing, place="nfc"), width=4000)
    byte_ids = {arks.token_bytes(token_id): token_id for token_id in range(256)}
    rollout = (*(byte_ids[bytes([byte])] for byte in "a e\u0301 b".encode()), IM_END)  # the e and its accent are one
    scores = hashing_teacher(request_of([rollout]), tokens)
    assert scores.aligned.tolist()[3:] == [False] * 5
    assert scores.drops[OTHERWISE] == 5
    assert scores.aligned[0]
    check_prefixes([rollout], scores, tokens)


# ---- the map ----


def test_ids_with_equal_bytes_are_mapped_both_ways_and_nothing_else(arks: TextRules, tokens: TokenMap) -> None:
    pairs = [(int(one), other) for other, one in enumerate(tokens.to_student.tolist()) if one != NONE]
    assert len(pairs) > 256
    for student_id, teacher_id in pairs:
        assert tokens.to_teacher[student_id] == teacher_id
        if teacher_id == tokens.teacher.stop_id:
            assert student_id == IM_END
        else:
            assert arks.token_bytes(student_id) == tokens.teacher.bytes[teacher_id]
    assert int((tokens.to_teacher != NONE).sum()) == len(pairs)
    alphabet = {bytes([byte]) for byte in range(256)}
    assert alphabet <= {tokens.teacher.bytes[other] for _, other in pairs}
    assert any(one != other for one, other in pairs)
    assert tokens.report.startswith(f"{len(pairs) - 1} tokens have the same bytes, ")


def test_specials_have_no_counterpart_and_of_equal_bytes_the_ordinary_id_is_taken(
    arks: TextRules, theirs: Tokenizer, tokens: TokenMap
) -> None:
    for token in ("<pad>", "<asr_text>"):
        assert tokens.to_student[theirs.token_to_id(token)] == NONE
    for token_id in np.flatnonzero(~arks.allowed_ids).tolist():
        assert tokens.to_teacher[token_id] == NONE
    twice = Tokenizer(models.BPE(vocab={"h": 0, "hello": 1, text.IM_END: 2, "Ġ": 3}, merges=[]))
    twice.decoder = decoders.ByteLevel()
    twice.add_special_tokens([text.IM_END])
    twice.add_tokens([AddedToken(" ", normalized=False)])  # spells what Ġ spells
    teacher = TeacherTokens(twice, place="twice")
    again = TokenMap(arks, teacher, width=9)
    space = next(token_id for token_id in range(300) if arks.token_bytes(token_id) == b" ")
    assert again.to_teacher[space] == 3
    assert again.to_student[3] == space
    assert again.to_student[twice.token_to_id(" ")] == NONE


def test_dropped_ids_are_counted_and_no_id_is_read_in_the_wrong_vocabulary(
    arks: TextRules, students: Tokenizer, tokens: TokenMap
) -> None:
    rollout = (*students.encode("one two", add_special_tokens=False).ids, IM_END)
    allowed = np.flatnonzero(arks.allowed_ids).tolist()
    unknown = next(token_id for token_id in allowed if tokens.to_teacher[token_id] == NONE)
    support = torch.tensor([[IM_END, unknown]] * len(rollout))
    scores = hashing_teacher(request_of([rollout], support=support, top_k=16), tokens)
    aligned = int(scores.aligned.sum())
    assert scores.drops[NOT_TEACHERS] == aligned
    assert scores.num_own == 16
    assert scores.drops[NOT_STUDENTS] == aligned * 16 - int(scores.top.valid[:, :16].sum())
    for row, valid in zip(scores.top.ids, scores.top.valid, strict=True):
        asked = row[valid].tolist()
        assert asked.count(IM_END) <= 1
        assert unknown not in asked
    there = (scores.top.ids == IM_END) & scores.top.valid
    assert (there.sum(dim=1) == scores.aligned.long()).all()  # asked for, so there wherever it can be


# ---- damaged or strange tokenizers ----


def test_a_tokenizer_that_cannot_be_mapped_is_refused(arks: TextRules, theirs: Tokenizer, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel(vocab={text.IM_END: 0, "a": 1}, unk_token="a"))  # noqa: S106
    with pytest.raises(CheckpointMismatchError, match="not byte-level"):
        TeacherTokens(words, place="words")
    endless = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    endless.decoder = decoders.ByteLevel()
    with pytest.raises(CheckpointMismatchError, match="end of turn"):
        TeacherTokens(endless, place="endless")
    with pytest.raises(CheckpointMismatchError, match="beyond its 100 logits"):
        TokenMap(arks, TeacherTokens(theirs, place="theirs"), width=100)
    with pytest.raises(ModelNotFoundError):
        TeacherTokens.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointMismatchError, match="not a tokenizer"):
        TeacherTokens.load(tmp_path)
    theirs.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert TeacherTokens.load(path).bytes == TeacherTokens(theirs, place="theirs").bytes
