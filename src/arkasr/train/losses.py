"""Training objectives, every formula once.

Distillation compares two next-token distributions, teacher P and student Q, at each of N transcript positions:

    logits -> log_probs -> the ids of a support, as TopK -> divergence [N] -> weighted_sum

Unusual: what a teacher says travels as `TopK`, which takes nothing but log-probabilities over the whole vocabulary. The
reference compared raw logits with log-probabilities in one softmax, and no number looked wrong.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from arkasr.errors import UsageError

IGNORE = -100  # label of a position that is not trained

Divergence = Literal["forward", "reverse", "jsd"]
Support = Literal["union", "teacher", "student", "full"]

_ABOVE_ZERO, _ABOVE_ONE = (
    1e-4,
    1e-3,
)  # how far rounding may lift a log-probability, and the sum of a row's probabilities
_LEAST_REST = torch.finfo(torch.float32).eps  # less than this is lost when a mass is taken from one


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of labels [B, T] given logits [B, T, V]; positions labelled IGNORE add nothing."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def ctc_sum(logits: Tensor, num_frames: Tensor, units: Tensor, num_units: Tensor) -> Tensor:
    """Summed CTC negative log-likelihood (Graves et al. 2006); unit 0 is the blank.

    logits [B, S, U] valid up to num_frames [B]; units [B, L] valid up to num_units [B]. A clip too short for its units
    adds nothing instead of infinity.
    """
    logprobs = logits.float().log_softmax(dim=-1).transpose(0, 1)
    return F.ctc_loss(logprobs, units, num_frames, num_units, blank=0, reduction="sum", zero_infinity=True)


def ctc_greedy(logits: Tensor, num_frames: Tensor) -> list[list[int]]:
    """Best path of each clip: argmax per frame, repeats folded, blanks dropped."""
    paths = []
    for best, length in zip(logits.argmax(dim=-1), num_frames.tolist(), strict=True):
        folded = torch.unique_consecutive(best[:length])
        paths.append([unit for unit in folded.tolist() if unit != 0])
    return paths


@dataclass(frozen=True)
class TopK:
    """What a distribution says of some ids at each position; checked, and put in one form.

    Attributes:
        ids: the student's ids [N, S]; distinct where valid, 0 elsewhere.
        logprobs: natural logarithms of probabilities [N, S], float32, normalised over the whole allowed vocabulary at
            the temperature of the loss; -inf where not valid.
        valid: [N, S]; what is impossible (-inf: asked for, but forbidden) is not.

    Raises:
        UsageError: something valid that is NaN or positive, probabilities of a row that sum to more than one (raw
            logits do either), or an id that is negative or there twice.
    """

    ids: Tensor
    logprobs: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        assert self.ids.shape == self.logprobs.shape == self.valid.shape, "ids, logprobs and valid differ in shape"
        logprobs = self.logprobs.detach().float()
        valid = self.valid & (logprobs != -torch.inf)
        logprobs = logprobs.masked_fill(~valid, -torch.inf)
        ids = self.ids.masked_fill(~valid, 0)
        faults = {
            "a value is NaN": logprobs.isnan().any(-1),
            "a value is positive": (logprobs > _ABOVE_ZERO).any(-1),
            "the probabilities sum to more than one": logprobs.exp().sum(-1) > 1 + _ABOVE_ONE,
            "an id is negative": (ids < 0).any(-1),
            "an id stands twice": _repeated(ids, valid).any(-1),
        }
        rows = torch.stack(list(faults.values()))  # [5, N]
        for fault, found in zip(faults, rows.any(-1).tolist(), strict=True):
            if found:
                row = int(rows[list(faults).index(fault)].int().argmax())
                raise UsageError(
                    f"teacher's top-k at position {row}: {fault}; give log-probabilities over its whole vocabulary, of "
                    f"distinct ids"
                )
        for name, value in (("ids", ids), ("logprobs", logprobs), ("valid", valid)):
            object.__setattr__(self, name, value)

    def first(self, count: int) -> Self:
        """Of the first `count` columns alone."""
        return type(self)(self.ids[:, :count], self.logprobs[:, :count], self.valid[:, :count])

    def rows(self, which: slice) -> Self:
        """Of some of the positions."""
        return type(self)(self.ids[which], self.logprobs[which], self.valid[which])

    def to(self, device: torch.device) -> Self:
        """On a device."""
        return type(self)(self.ids.to(device), self.logprobs.to(device), self.valid.to(device))

    def among(self, ids: Tensor) -> Self:
        """With only those of its ids valid that are in ids [N, M]."""
        return type(self)(self.ids, self.logprobs, self.valid & (self.ids[:, :, None] == ids[:, None, :]).any(-1))


def _repeated(ids: Tensor, valid: Tensor) -> Tensor:
    """Which valid ids [N, S] stood further left in their row already, [N, S]."""
    others = -1 - torch.arange(ids.shape[-1], device=ids.device)  # each once, and no id
    ordered, order = torch.where(valid, ids, others).sort(dim=-1, stable=True)
    again = torch.zeros_like(valid)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(valid).scatter(-1, order, again)


def log_probs(logits: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V] in float32 of logits [..., V] divided by a temperature; -inf where not allowed [V]."""
    return (logits.float() / temperature).masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)


def top_k_ids(logprobs: Tensor, k: int) -> Tensor:
    """The k likeliest ids [N, k] of log-probabilities [N, V], the likeliest first."""
    return logprobs.detach().topk(k, dim=-1).indices


def union(teacher_ids: Tensor, teacher_valid: Tensor, student_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids [N, K] of a teacher, then those [N, M] of the student, and which are valid: no id twice, [N, K + M]."""
    ids = torch.cat([teacher_ids, student_ids], dim=-1)
    valid = torch.cat([teacher_valid, torch.ones_like(student_ids, dtype=torch.bool)], dim=-1)
    return ids, valid & ~_repeated(ids, valid)


def is_usable(teacher: TopK, tail: bool) -> Tensor:
    """Which positions [N] have something to compare: two buckets at least, the tail being one."""
    return teacher.valid.sum(-1) + int(tail) >= 2


def divergence(
    student_logprobs: Tensor,
    teacher: TopK,
    *,
    kind: Divergence,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: bool = False,
) -> Tensor:
    """Divergence [N], times temperature squared, of the student's `log_probs` [N, V] from a teacher's on a support.

    forward KL(P||Q); reverse KL(Q||P); jsd, the generalised Jensen-Shannon divergence of Agarwal et al. 2023
    (arXiv 2306.13649): beta KL(P||M) + (1 - beta) KL(Q||M) with M = beta P + (1 - beta) Q.

    Both are renormalised on the valid ids; with `tail` they are not, and all other ids are one more bucket, which costs
    a copy of student_logprobs. Positions that are not `is_usable` are 0 and have no gradient. The temperature is that
    of the log-probabilities; its square keeps the size of the gradient (Hinton et al. 2015, arXiv 1503.02531).

    Raises:
        UsageError: a beta of 0, 1 or beyond; a teacher's id that is forbidden to the student.
    """
    if kind == "jsd" and not 0 < beta < 1:
        raise UsageError(f"beta {beta}: must lie between 0 and 1; the limits are forward and reverse")
    logq = student_logprobs.gather(-1, teacher.ids).float()
    forbidden = teacher.valid & (logq == -torch.inf)
    if bool(forbidden.any()):
        row, column = forbidden.nonzero()[0].tolist()
        raise UsageError(
            f"teacher's top-k at position {row}: id {int(teacher.ids[row, column])} is forbidden to the student; leave "
            f"out what the student may not write"
        )
    logp, valid = teacher.logprobs, teacher.valid
    if tail:
        logq_rest, exists = _log_rest(student_logprobs, teacher)
        logp_rest = (1 - _mass(teacher)).clamp(min=_LEAST_REST).log()
        logp, logq = (torch.cat([logp, logp_rest[:, None]], dim=-1), torch.cat([logq, logq_rest[:, None]], dim=-1))
        valid = torch.cat([valid, exists[:, None]], dim=-1)
    else:
        logp, logq = (_renormalised(values, valid) for values in (logp, logq))
    logp, logq = (values.masked_fill(~valid, 0) for values in (logp, logq))  # no infinity may meet another
    match kind:
        case "forward":
            value = _kl(logp, logq, valid)
        case "reverse":
            value = _kl(logq, logp, valid)
        case "jsd":
            weight = torch.tensor([beta, 1 - beta], device=logq.device).log()
            logm = torch.logaddexp(logp + weight[0], logq + weight[1])
            value = beta * _kl(logp, logm, valid) + (1 - beta) * _kl(logq, logm, valid)
    return temperature**2 * value.masked_fill(~is_usable(teacher, tail), 0)


def _kl(logp: Tensor, logq: Tensor, valid: Tensor) -> Tensor:
    """KL(P||Q) [N] in nats, over the valid of finite [N, S]."""
    return (logp.exp() * (logp - logq)).masked_fill(~valid, 0).sum(-1)


def _renormalised(logprobs: Tensor, valid: Tensor) -> Tensor:
    """Log-probabilities [N, S] whose valid ones sum to one; finite in a row without any."""
    return logprobs.masked_fill(~valid, torch.finfo(torch.float32).min).log_softmax(dim=-1)


def _mass(teacher: TopK) -> Tensor:
    return teacher.logprobs.exp().sum(-1)


def _log_rest(student_logprobs: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """Logarithm [N] of the student's probability outside the support, and whether there is any id, [N].

    Summed over those ids: one minus the mass inside rounds to nothing where a student is sure, and with it would go the
    gradient that tells it that it should not be.
    """
    vocab_size = student_logprobs.shape[-1]
    inside = student_logprobs.new_zeros((len(teacher.ids), vocab_size + 1), dtype=torch.bool)
    inside.scatter_(-1, teacher.ids.masked_fill(~teacher.valid, vocab_size), True)
    outside = ~inside[:, :vocab_size] & (student_logprobs.detach() != -torch.inf)
    return student_logprobs.float().masked_fill(~outside, -torch.inf).logsumexp(-1), outside.any(-1)


def weighted_sum(values: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Sum of values [N] times weights [N] where mask [N]; what is not finite elsewhere does not spread."""
    return torch.where(mask, values * weights, 0).sum()


@torch.no_grad()
def diagnose(
    student_logprobs: Tensor,
    teacher: TopK,
    *,
    own: TopK,
    student_ids: Tensor,
    values: Tensor,
    weights: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Weighted sums, as `weighted_sum`, of what describes each position; divide by the summed weights for means.

    Of the student's `log_probs` [N, V], the teacher on the support that is trained, the teacher's own top-k, the
    student's `top_k_ids` [N, k] and the divergences [N]. Entropies are in nats; the teacher's takes everything outside
    the support for one id.
    """
    num_student = student_ids.shape[-1]
    shared = own.among(student_ids).valid.sum(-1)
    inside = student_logprobs.gather(-1, teacher.ids).exp().masked_fill(~teacher.valid, 0)
    mass = _mass(teacher)
    entropy = torch.special.entr
    figures = {
        "vuss": teacher.valid.sum(-1),  # valid size of the support
        "overlap": shared / num_student,
        "jaccard": shared / (own.valid.sum(-1) + num_student - shared),
        "teacher_mass": mass,
        "student_mass": inside.float().sum(-1),
        "student_entropy": entropy(student_logprobs.float().exp()).sum(-1),
        "teacher_entropy": entropy(teacher.logprobs.exp()).sum(-1) + entropy((1 - mass).clamp(min=0)),
        "kl": values,
    }
    return {name: weighted_sum(figure.float(), weights, mask) for name, figure in figures.items()}
