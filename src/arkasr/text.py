"""Token rules: prompt ids, stop ids, allowed ids, and ids to text. The only owner of each.

    <|user|><|begin_of_audio|><|audio|> * n<|end_of_audio|>Please transcribe this audio.<|assistant|>

Unusual: there is no system turn, newline or BOS, and the instruction is not optional: without it the published
weights stop at once. Every id is looked up by its string, so a checkpoint with another vocabulary works unchanged.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from arkasr import files
from arkasr.errors import ArkASRError, CheckpointMismatchError, ModelNotFoundError, quoted

AUDIO = "<|audio|>"
USER = "<|user|>"
BEGIN_OF_AUDIO = "<|begin_of_audio|>"
END_OF_AUDIO = "<|end_of_audio|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
IM_END = "<|im_end|>"
NEEDED = (AUDIO, USER, BEGIN_OF_AUDIO, END_OF_AUDIO, ASSISTANT, SYSTEM, IM_END)

INSTRUCTION = "Please transcribe this audio."
CUT_AT = (USER, ASSISTANT, IM_END)
LEADING_JUNK = " ,.;:!?-"
MAX_TOKEN_CHARS = 1024  # the longest published token has 128; a clip may repeat it 300 times

# Qwen2's pre-tokenizer: contractions, words with one leading character, single digits, punctuation, white space.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# GPT-2's alphabet: bytes that print stand for themselves, the others in order for the letters behind them.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))}


def bytes_of(token: str) -> bytes | None:
    """The bytes that an ordinary token of byte-level BPE stands for; None where a character is not of its alphabet."""
    return bytes(_BYTES[character] for character in token) if _BYTES.keys() >= set(token) else None


def clean(text: str) -> str:
    """Decoded text, cut at a turn token that was spelled with ordinary ones, folded, leading punctuation dropped."""
    for token in CUT_AT:
        text = text.split(token, 1)[0]
    return " ".join(text.split()).lstrip(LEADING_JUNK)


class TextRules:
    """The tokenizer of one checkpoint with ARK's rules on top of it."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: tuple[int, ...], place: str) -> None:
        """`vocab_size` is the number of logits; `eos_token_ids` the config's; `place` names the tokenizer in errors.

        Raises:
            CheckpointMismatchError: a needed token is missing or its id is outside the vocabulary.
        """
        self._tokenizer = tokenizer
        self.special_ids: dict[str, int] = {}
        for token in NEEDED:
            token_id = tokenizer.token_to_id(token)
            if token_id is None:
                raise CheckpointMismatchError(f"{place}: no token {token}; this is not an ARK-ASR tokenizer")
            if token_id >= vocab_size:
                raise CheckpointMismatchError(f"{place}: {token} has id {token_id}, vocab_size is {vocab_size}")
            self.special_ids[token] = token_id
        self.vocab_size = vocab_size
        self.audio_id = self.special_ids[AUDIO]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.special_ids[IM_END], *eos_token_ids)))
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.allowed_ids = self._allowed(vocab)
        self.allowed_ids.flags.writeable = False
        self._instruction = tokenizer.encode(INSTRUCTION, add_special_tokens=False).ids
        self._check(vocab, place)

    def prompt_ids(self, num_audio_tokens: int) -> list[int]:
        """The prompt of a clip; the `<|audio|>` ids mark where its embeddings go."""
        ids = self.special_ids
        audio = [self.audio_id] * num_audio_tokens
        return [ids[USER], ids[BEGIN_OF_AUDIO], *audio, ids[END_OF_AUDIO], *self._instruction, ids[ASSISTANT]]

    def target_ids(self, text: str) -> list[int]:
        """What a model is trained to emit for a transcript: its tokens, then the stop token."""
        return [*self._tokenizer.encode(text, add_special_tokens=False).ids, self.special_ids[IM_END]]

    def to_text(self, ids: list[int]) -> str:
        """Transcript of generated ids: cut at the first turn token, white space folded, leading punctuation dropped."""
        cut_ids = {self.special_ids[token] for token in CUT_AT}
        return clean(self._tokenizer.decode(list(takewhile(lambda token_id: token_id not in cut_ids, ids))))

    def same_tokens(self, other: "TextRules") -> bool:
        """Whether every id that may be emitted, the prompt and the stop ids are the other's; the padding may differ."""
        theirs = other._tokenizer  # noqa: SLF001 - of the same class
        return (
            self._tokenizer.get_vocab(with_added_tokens=True) == theirs.get_vocab(with_added_tokens=True)
            and self.prompt_ids(1) == other.prompt_ids(1)
            and self.stop_ids == other.stop_ids
            and np.flatnonzero(self.allowed_ids).tolist() == np.flatnonzero(other.allowed_ids).tolist()
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; only several together need be UTF-8."""
        token = self._tokenizer.id_to_token(token_id) or ""
        data = bytes_of(token)
        return token.encode() if data is None else data  # an added token is spelled as it is

    def _check(self, vocab: dict[str, int], place: str) -> None:
        """Refuse ids that would index outside the embeddings or the audio, and tokens that would fill the memory."""
        if len(set(self.special_ids.values())) < len(NEEDED):
            raise CheckpointMismatchError(f"{place}: two of {', '.join(NEEDED)} have the same id")
        added = self._tokenizer.get_added_tokens_decoder()
        for token, token_id in vocab.items():
            if len(token) > MAX_TOKEN_CHARS:
                raise CheckpointMismatchError(f"{place}: token {quoted(token)} has {len(token)} characters")
            if token_id >= self.vocab_size and token_id not in added:
                raise CheckpointMismatchError(
                    f"{place}: {quoted(token)} has id {token_id}, vocab_size is {self.vocab_size}"
                )
        if max(self._instruction, default=0) >= self.vocab_size or set(self._instruction) & set(
            self.special_ids.values()
        ):
            raise CheckpointMismatchError(f"{place}: {INSTRUCTION!r} is {quoted(self._instruction)}, not ordinary text")

    def _allowed(self, vocab: dict[str, int]) -> npt.NDArray[np.bool_]:
        """Ids that may be emitted, [vocab_size]: ordinary text and the stop ids.

        Forbidden are special tokens, added tokens written <...>, everything after the last of ARK's own tokens (codec
        tokens of a shared vocabulary and padding of the embedding table), and ids the tokenizer does not know.
        """
        allowed = np.zeros(self.vocab_size, dtype=np.bool_)
        known = np.fromiter(vocab.values(), dtype=np.int64)
        allowed[known[known <= self.special_ids[SYSTEM]]] = True
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            if token_id < self.vocab_size and (token.special or re.fullmatch(r"<.*>", token.content, re.DOTALL)):
                allowed[token_id] = False
        allowed[list(self.stop_ids)] = True
        return allowed


def load(folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...], audio_token_id: int) -> TextRules:
    """Token rules of the checkpoint in `folder`: tokenizer.json, or else vocab.json + merges.txt.

    Raises:
        ModelNotFoundError: no tokenizer file.
        CheckpointMismatchError: damaged, lacks a needed token, or contradicts the config.
    """
    path = folder / files.TOKENIZER
    if not path.exists():
        path = folder / "vocab.json"
    if not path.exists():
        raise ModelNotFoundError(f"{folder}: neither {files.TOKENIZER} nor vocab.json; fetch the tokenizer's files")
    with told_of(path):
        tokenizer = _from_tokenizer(path) if path.name == files.TOKENIZER else _from_vocab(folder)
    rules = TextRules(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids, place=str(path))
    if rules.audio_id != audio_token_id:
        raise CheckpointMismatchError(
            f"{path}: {AUDIO} has id {rules.audio_id}, config.json says audio_token_id {audio_token_id}"
        )
    return rules


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Reads a tokenizer's file: what is wrong with it becomes a line that names it.

    Raises:
        ModelNotFoundError: not there.
        CheckpointMismatchError: damaged.
    """
    files.check(path)
    try:
        yield
    except ArkASRError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for every damaged file
        raise CheckpointMismatchError(f"{path}: not a tokenizer ({quoted(str(error))}); fetch the file again") from None


def _from_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, after checking that it is Qwen2's in all but vocabulary.

    Other parts could double a text thirty times over, pad it to gigabytes, or search it for hours.
    """
    raw = files.read_json(path)
    qwen2 = Tokenizer(models.BPE())
    configure_byte_level(qwen2)
    wanted = json.loads(qwen2.to_str())
    offsets = json.loads(qwen2.to_str().replace('"trim_offsets":true', '"trim_offsets":false'))  # we ask for no offsets
    parts = {part: raw.get(part) for part in ("truncation", "padding", "normalizer", "pre_tokenizer")}
    wrong = [part for part, value in parts.items() if value not in (wanted[part], offsets[part])]
    if _type(raw, "decoder") != "ByteLevel":
        wrong.append("decoder")
    if _type(raw, "post_processor") not in (None, "ByteLevel"):
        wrong.append("post_processor")
    model = raw.get("model")
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    if _type(raw, "model") != "BPE" or not isinstance(model, dict) or any(model.get(option) for option in options):
        wrong.append("model")
    if wrong:
        raise CheckpointMismatchError(f"{path}: {wrong[0]} is not Qwen2's; fetch the file again")
    return Tokenizer.from_file(str(path))


def _type(raw: dict[str, Any], part: str) -> object:
    value = raw.get(part)
    return value.get("type", "untyped") if isinstance(value, dict) else value


def _from_vocab(folder: Path) -> Tokenizer:
    """Qwen2's tokenizer from its older three files."""
    merges = folder / "merges.txt"
    files.check(merges)
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(merges)))
    configure_byte_level(tokenizer)
    added_path = folder / "added_tokens.json"
    added: dict[str, int] = files.read_json(added_path) if added_path.exists() else {}
    contents = sorted(added, key=lambda content: added[content])
    tokenizer.add_tokens([AddedToken(c, normalized=False, special=c.startswith("<|")) for c in contents])
    for content in contents:
        if tokenizer.token_to_id(content) != added[content]:
            raise CheckpointMismatchError(
                f"{added_path}: {quoted(content)} has id {quoted(added[content])}, but "
                f"{tokenizer.token_to_id(content)} is its place"
            )
    return tokenizer


def configure_byte_level(tokenizer: Tokenizer) -> None:
    """Give a BPE tokenizer Qwen2's normalizer, pre-tokenizer and decoder."""
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
