"""A rollout in another tokenizer: tokens with equal bytes, and positions behind equal bytes.

    the student's ids -> bytes -> text -> the teacher's ids -> bytes;  the two are at one place where both have spelled
    the same bytes so far

Unusual: nothing is searched for. The teacher's tokens of a rollout stand behind its prompt, where we put them, so each
place is known; and no id is ever looked up in the other vocabulary without the map between them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor

from arkasr import files
from arkasr.errors import CheckpointMismatchError
from arkasr.text import IM_END, TextRules, bytes_of, told_of
from arkasr.train import losses
from arkasr.train.losses import TopK
from arkasr.train.teachers import Request, Scores

INSIDE = "inside a teacher token"
NOT_UTF8 = "not UTF-8"
OTHERWISE = "spelled otherwise by the teacher"  # it normalises, or would read a special token
NOT_ALIGNED = (INSIDE, NOT_UTF8, OTHERWISE)  # reasons that drop a position; the others drop an id
NOT_STUDENTS = "no counterpart in the student's vocabulary"
NOT_TEACHERS = "no counterpart in the teacher's vocabulary"
REASONS = (*NOT_ALIGNED, NOT_STUDENTS, NOT_TEACHERS)
NONE = -1  # in a map of ids: no counterpart


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[int | str]:
    """For each of the student's tokens, how many of the teacher's spell what stands before it, or why no number does.

    A stop, which is no text, is given as b"".
    """
    text, spelled = b"".join(student), b"".join(teacher)
    differ = (place for place, (one, other) in enumerate(zip(text, spelled, strict=False)) if one != other)
    same = next(differ, min(len(text), len(spelled)))
    whole = len(decodable(text).encode())
    ends = {end: count for count, end in enumerate(accumulate(map(len, teacher), initial=0))}

    def find(start: int) -> int | str:
        if start > whole:
            return NOT_UTF8
        return OTHERWISE if start > same else ends.get(start, INSIDE)

    return [find(start) for start, _ in pairwise(accumulate(map(len, student), initial=0))]


def decodable(data: bytes) -> str:
    """The text of bytes up to where they are no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


class TeacherTokens:
    """A byte-level BPE tokenizer that is not the student's.

    Attributes:
        bytes: of each id; None for what is no text.
        preferred: ids of text, the ordinary ones first, then by number.
        added: how its added tokens are spelled, each of which it would read in a text.
        stop_id: its end of turn.
    """

    def __init__(self, tokenizer: Tokenizer, *, place: str) -> None:
        """`place` names the tokenizer in errors.

        Raises:
            CheckpointMismatchError: not byte-level, or without <|im_end|>.
        """
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise CheckpointMismatchError(f"{place}: not byte-level BPE; only such a teacher's tokens can be mapped")
        stop_id = tokenizer.token_to_id(IM_END)
        if stop_id is None:
            raise CheckpointMismatchError(f"{place}: no token {IM_END}; the teacher's end of turn is not known")
        self.stop_id: int = stop_id
        added = tokenizer.get_added_tokens_decoder()
        self.added = tuple(token.content for token in added.values())
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.bytes: list[bytes | None] = [None] * (max(vocab.values()) + 1)
        for token, token_id in vocab.items():
            if token_id in added:
                if not added[token_id].special and not re.fullmatch(r"<.*>", token, re.DOTALL):
                    self.bytes[token_id] = token.encode()
            else:
                self.bytes[token_id] = bytes_of(token)
        text_ids = [token_id for token_id, spelled in enumerate(self.bytes) if spelled]
        self.preferred = sorted(text_ids, key=lambda token_id: (token_id in added, token_id))
        # Without the added tokens: a student may spell <|im_end|> with ordinary tokens, and that is text.
        self._plain = Tokenizer(tokenizer.model)
        self._plain.normalizer, self._plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer

    @classmethod
    def load(cls, path: Path) -> "TeacherTokens":
        """From a tokenizer.json or the folder it is in.

        Raises:
            ModelNotFoundError: not there.
            CheckpointMismatchError: damaged, or as above.
        """
        path = path / files.TOKENIZER if path.is_dir() else path
        with told_of(path):
            tokenizer = Tokenizer.from_file(str(path))
        return cls(tokenizer, place=str(path))

    def encode(self, text: str) -> tuple[int, ...]:
        """The teacher's tokens of a text, none of them special."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def allowed(self, width: int) -> Tensor:
        """Which of so many logits are text or the end of turn, [width] bool."""
        allowed = torch.zeros(width, dtype=torch.bool)
        allowed[[*self.preferred, self.stop_id]] = True
        return allowed


class TokenMap:
    """Ids with equal bytes in the vocabularies of a student and a teacher, one to one; the stop goes to the stop.

    Attributes:
        to_student: [teacher's ids], NONE where there is no counterpart.
        to_teacher: [student's ids], likewise.
        report: how many there are, in words.
    """

    def __init__(self, student: TextRules, teacher: TeacherTokens, *, width: int) -> None:
        """`width` is the number of the teacher's logits.

        Raises:
            CheckpointMismatchError: a token behind the last logit, or nothing in common.
        """
        if max(teacher.stop_id, *teacher.preferred) >= width:
            raise CheckpointMismatchError(
                f"the teacher's tokenizer has ids beyond its {width} logits; fetch both again"
            )
        self.student, self.teacher = student, teacher
        allowed = student.allowed_ids.nonzero()[0].tolist()
        self._bytes = {token_id: student.token_bytes(token_id) for token_id in allowed}
        self._bytes |= dict.fromkeys(student.stop_ids, b"")
        ids: dict[bytes, int] = {}
        for token_id in allowed:  # ARK's tokenizers have their added tokens behind the ordinary ones
            ids.setdefault(self._bytes[token_id], token_id)
        self.to_student = torch.full((width,), NONE)
        self.to_teacher = torch.full((student.vocab_size,), NONE)
        for token_id in teacher.preferred:
            spelled = teacher.bytes[token_id]
            if spelled and spelled in ids:
                self._join(ids.pop(spelled), token_id)
        shared = int((self.to_teacher != NONE).sum())
        if not shared:
            raise CheckpointMismatchError("student and teacher have no token in common; this teacher cannot be used")
        self._join(student.stop_ids[0], teacher.stop_id)
        self.report = (
            f"{shared} tokens have the same bytes, {shared / len(allowed):.1%} of the student's "
            f"and {shared / len(teacher.preferred):.1%} of the teacher's"
        )

    def _join(self, student_id: int, teacher_id: int) -> None:
        self.to_teacher[student_id] = teacher_id
        self.to_student[teacher_id] = student_id

    def spell(self, rollout: Sequence[int]) -> list[bytes]:
        """The bytes of each of a rollout's tokens; the stop has none."""
        return [self._bytes[token_id] for token_id in rollout]


@dataclass(frozen=True)
class Row:
    """One rollout as the teacher reads it.

    Attributes:
        clip: its number in the request.
        text: what of the rollout the teacher is given.
        ids: the teacher's tokens of it.
        columns: behind how many of them a distribution is wanted, for each aligned position.
    """

    clip: int
    text: str
    ids: tuple[int, ...]
    columns: tuple[int, ...]


class Spans:
    """The rollouts of a request in the teacher's tokens, and the teacher's answer in the student's ids.

    Attributes:
        rows: one a rollout, in the request's order.
        aligned: [N] bool; M of them are.
        asked: [M, S] teacher's ids of the request's support, NONE without a counterpart; None when none is asked.
    """

    def __init__(self, request: Request, tokens: TokenMap, keep: Callable[[int, str], str] | None = None) -> None:
        """`keep` shortens the text of a clip to what the teacher can be given of it."""
        self._request, self._tokens = request, tokens
        self._drops: Counter[str] = Counter()
        self.rows: list[Row] = []
        aligned: list[bool] = []
        for clip, rollouts in enumerate(request.rollouts):
            for rollout in rollouts:
                spelled = tokens.spell(rollout)
                text = decodable(b"".join(spelled))
                text = text if keep is None else keep(clip, text)
                ids = tokens.teacher.encode(text)
                places = align(spelled, [tokens.teacher.bytes[token_id] or b"" for token_id in ids])
                self._drops.update(place for place in places if isinstance(place, str))
                columns = tuple(place for place in places if isinstance(place, int))
                aligned += [isinstance(place, int) for place in places]
                self.rows.append(Row(clip, text, ids, columns))
        self.aligned = torch.tensor(aligned, dtype=torch.bool)
        self.asked: Tensor | None = None
        if request.support is not None:
            self.asked = tokens.to_teacher[request.support.cpu()[self.aligned]]

    def scores(self, own_ids: Tensor, own_logprobs: Tensor, asked_logprobs: Tensor | None) -> Scores:
        """From the teacher's ids [M, k] with log-probabilities, most probable first, and those of `asked` [M, S]."""
        device = own_logprobs.device
        drops = Counter(self._drops)
        ids = self._tokens.to_student.to(device)[own_ids]
        possible = own_logprobs.isfinite()
        valid = possible & (ids != NONE)
        drops[NOT_STUDENTS] += int((possible & ~valid).sum())
        logprobs = own_logprobs
        if self.asked is not None and self._request.support is not None and asked_logprobs is not None:
            asked = self._request.support.to(device)[self.aligned.to(device)]
            known = self.asked.to(device) != NONE
            drops[NOT_TEACHERS] += int((~known).sum())
            logprobs = torch.cat([logprobs, asked_logprobs], dim=1)
            known = torch.cat([valid, known], dim=1)
            ids, valid = losses.union(ids, valid, asked)
            valid &= known
        aligned = self.aligned.to(device)

        def spread(values: Tensor) -> Tensor:
            """[M, S] to [N, S], zero at positions that are not aligned and ids that are not valid."""
            full = values.new_zeros(len(aligned), values.shape[1])
            full[aligned] = values.masked_fill(~valid, 0)
            return full

        top = TopK(ids=spread(ids), logprobs=spread(logprobs.float()), valid=spread(valid))
        return Scores(top, own_ids.shape[1], aligned, {reason: count for reason, count in drops.items() if count})
