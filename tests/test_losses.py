"""Divergences on a support: against plain Python in float64 over the whole vocabulary, and by their properties."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arkasr.errors import UsageError
from arkasr.train import losses
from arkasr.train.losses import Divergence, TopK, divergence, is_usable

KINDS: tuple[Divergence, ...] = get_args(Divergence)
VOCAB = 12
FORBIDDEN = (3, 8)

seeds = st.integers(0, 2**31 - 1)
kinds = st.sampled_from(KINDS)
betas = st.sampled_from([0.1, 0.5, 0.7])
temperatures = st.sampled_from([0.5, 1.0, 3.0])
examples = settings(deadline=None, max_examples=40)


@dataclass(frozen=True)
class Case:
    """Logits of both models at some positions, and the ids of the support of each, all of them allowed."""

    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]
    allowed: Tensor  # [V]
    supports: tuple[tuple[int, ...], ...]

    @property
    def permitted(self) -> list[int]:
        return self.allowed.nonzero()[:, 0].tolist()

    def top(self, temperature: float, *, logits: Tensor | None = None) -> TopK:
        logprobs = losses.log_probs(self.teacher if logits is None else logits, self.allowed, temperature)
        return as_top_k(logprobs, self.supports)

    def student_logprobs(self, temperature: float, *, logits: Tensor | None = None) -> Tensor:
        return losses.log_probs(self.student if logits is None else logits, self.allowed, temperature)


def as_top_k(logprobs: Tensor, supports: Sequence[Sequence[int]]) -> TopK:
    width = max(1, *map(len, supports))
    ids = torch.full((len(supports), width), 10**6)  # anything, where not valid
    valid = torch.zeros(len(supports), width, dtype=torch.bool)
    values = torch.full((len(supports), width), torch.nan)
    for row, support in enumerate(supports):
        ids[row, : len(support)] = torch.tensor(support, dtype=torch.int64)
        valid[row, : len(support)] = True
        values[row, : len(support)] = logprobs[row, list(support)]
    return TopK(ids, values, valid)


def make_case(seed: int, *, whole: bool = False, least: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    allowed = torch.ones(VOCAB, dtype=torch.bool)
    allowed[list(FORBIDDEN)] = False
    permitted = allowed.nonzero()[:, 0].numpy()
    sizes = [len(permitted) if whole else int(rng.integers(least, len(permitted) + 1)) for _ in range(5)]
    return Case(
        torch.from_numpy(rng.normal(0, 3, (5, VOCAB))).float(),
        torch.from_numpy(rng.normal(0, 3, (5, VOCAB))).float(),
        allowed,
        tuple(tuple(rng.permutation(permitted)[:size].tolist()) for size in sizes),
    )


cases = st.builds(make_case, seeds)


def softmax(logits: Sequence[float], permitted: Sequence[int], temperature: float) -> dict[int, float]:
    highest = max(logits[i] for i in permitted)
    weights = {i: math.exp((logits[i] - highest) / temperature) for i in permitted}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def between(p: Sequence[float], q: Sequence[float], kind: Divergence, beta: float) -> float:
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    mixture = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def bucketed(probs: dict[int, float], support: Sequence[int], *, tail: bool) -> list[float]:
    inside = [probs[i] for i in support]
    if not tail:
        return [x / sum(inside) for x in inside]
    rest = [probs[i] for i in probs if i not in support]
    return [*inside, sum(rest)] if rest else inside


def tolerance(case: Case, temperature: float) -> Tensor:
    """Of each row [N]: one minus a mass is known to 1e-7, so the logarithm of a small tail of the teacher less well."""
    rests = []
    for teacher, support in zip(case.teacher.tolist(), case.supports, strict=True):
        probs = softmax(teacher, case.permitted, temperature)
        rests.append(sum(probs[i] for i in probs if i not in support) or 1.0)
    return 1e-5 + 5e-7 * temperature**2 / torch.tensor(rests, dtype=torch.float64)


def oracle(case: Case, *, kind: Divergence, beta: float, temperature: float, tail: bool) -> list[float]:
    """The definition, bucket by bucket, in plain Python."""
    values = []
    for student, teacher, support in zip(case.student.tolist(), case.teacher.tolist(), case.supports, strict=True):
        p, q = (
            bucketed(softmax(logits, case.permitted, temperature), support, tail=tail) for logits in (teacher, student)
        )
        values.append(temperature**2 * between(p, q, kind, beta))
    return values


def close(
    one: Tensor, other: Tensor | Sequence[float] | Sequence[Sequence[float]], *, rtol: float = 1e-4, atol: float = 1e-5
) -> bool:
    other = torch.as_tensor(other, dtype=torch.float64)
    return torch.allclose(one.double(), other, rtol=rtol, atol=atol)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(at).sum(), at)
    return grad


# ---- values ----


@examples
@given(case=cases, kind=kinds, beta=betas, temperature=temperatures, tail=st.booleans())
def test_a_divergence_is_its_definition_on_any_support(
    case: Case, kind: Divergence, beta: float, temperature: float, tail: bool
) -> None:
    student, top = case.student_logprobs(temperature), case.top(temperature)
    got = divergence(student, top, kind=kind, beta=beta, temperature=temperature, tail=tail)
    assert got.dtype == torch.float32
    wanted = torch.tensor(oracle(case, kind=kind, beta=beta, temperature=temperature, tail=tail), dtype=torch.float64)
    assert ((got.double() - wanted).abs() <= tolerance(case, temperature) + 1e-4 * wanted.abs()).all()


@examples
@given(case=st.builds(partial(make_case, whole=True), seeds), kind=kinds, temperature=temperatures)
def test_over_the_whole_vocabulary_the_tail_adds_nothing(case: Case, kind: Divergence, temperature: float) -> None:
    student, top = case.student_logprobs(temperature), case.top(temperature)
    plain, tailed = (divergence(student, top, kind=kind, temperature=temperature, tail=tail) for tail in (False, True))
    probs = [
        [list(softmax(row, case.permitted, temperature).values()) for row in logits.tolist()]
        for logits in (case.teacher, case.student)
    ]
    dense = [temperature**2 * between(p, q, kind, 0.5) for p, q in zip(*probs, strict=True)]
    assert close(plain, dense)
    assert close(tailed, dense)
    plain_slope, tailed_slope = (
        gradient(
            lambda logits, tail=tail: divergence(  # type: ignore[misc]
                case.student_logprobs(temperature, logits=logits), top, kind=kind, temperature=temperature, tail=tail
            ),
            case.student,
        )
        for tail in (False, True)
    )
    assert close(tailed_slope, plain_slope)


@examples
@given(case=cases, kind=kinds, temperature=temperatures)
def test_a_tail_is_the_divergence_of_lumped_distributions(case: Case, kind: Divergence, temperature: float) -> None:
    """Whatever two distributions do outside the support, only its sum counts: moving mass about there does nothing."""
    student, top = case.student_logprobs(temperature), case.top(temperature)
    before = divergence(student, top, kind=kind, temperature=temperature, tail=True)
    moved = student.clone()
    for row, support in enumerate(case.supports):
        rest = [i for i in case.permitted if i not in support]
        if rest:
            moved[row, rest] = student[row, rest].logsumexp(0) - math.log(len(rest))
    assert close(divergence(moved, top, kind=kind, temperature=temperature, tail=True), before.double())


def test_hand_computed_values() -> None:
    """P = 1/2, 1/4, 1/4 and Q = 1/4, 1/4, 1/2, on the first two ids."""
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[True, True]]))
    ln2, ln3 = math.log(2), math.log(3)
    renormalised = {  # P = 2/3, 1/3 and Q = 1/2, 1/2
        "forward": 5 / 3 * ln2 - ln3,
        "reverse": math.log(3 / 2) / 2 + math.log(3 / 4) / 2,
        "jsd": (2 / 3 * math.log(8 / 7) + math.log(4 / 5) / 3 + math.log(6 / 7) / 2 + math.log(6 / 5) / 2) / 2,
    }
    tailed = {"forward": ln2 / 4, "reverse": ln2 / 4, "jsd": math.log(4 / 3) / 2 + math.log(2 / 3) / 4}
    for kind in KINDS:
        assert close(divergence(student, top, kind=kind), [renormalised[kind]], atol=1e-6)
        assert close(divergence(student, top, kind=kind, tail=True), [tailed[kind]], atol=1e-6)
        assert close(divergence(student, top, kind=kind, temperature=3), [9 * renormalised[kind]], atol=1e-6)


# ---- invariances ----


@examples
@given(case=cases, kind=kinds, tail=st.booleans(), constants=st.tuples(*[st.floats(-30, 30)] * 2))
def test_a_constant_added_to_either_models_logits_changes_no_loss(
    case: Case, kind: Divergence, tail: bool, constants: tuple[float, float]
) -> None:
    """The reference mixed raw logits and log-probabilities, and its loss fell from 5.32 to 4.60 by such a shift."""
    before = divergence(case.student_logprobs(1), case.top(1), kind=kind, tail=tail)
    student = case.student_logprobs(1, logits=case.student + constants[0])
    teacher = case.top(1, logits=case.teacher + constants[1])
    assert close(divergence(student, teacher, kind=kind, tail=tail), before.double(), rtol=1e-3, atol=1e-4)


@examples
@given(case=cases, kind=kinds, temperature=temperatures, tail=st.booleans())
def test_from_oneself_there_is_no_divergence_and_no_gradient(
    case: Case, kind: Divergence, temperature: float, tail: bool
) -> None:
    top = case.top(temperature, logits=case.student)

    def value(logits: Tensor) -> Tensor:
        student = case.student_logprobs(temperature, logits=logits)
        return divergence(student, top, kind=kind, temperature=temperature, tail=tail)

    assert value(case.student).abs().max() < 1e-5
    assert gradient(value, case.student).abs().max() < 1e-5


@examples
@given(seed=seeds, kind=kinds, tail=st.booleans())
def test_the_order_of_the_ids_and_what_is_asked_twice_change_nothing(seed: int, kind: Divergence, tail: bool) -> None:
    case = make_case(seed, least=2)
    rng = np.random.default_rng(seed)
    logprobs = losses.log_probs(case.teacher, case.allowed, 1)
    own, asked = losses.top_k_ids(logprobs, 3), losses.top_k_ids(case.student_logprobs(1), 4)
    values = []
    for order in (np.arange(3), rng.permutation(3)):
        for doubles in (0, 3):
            ids, valid = losses.union(
                torch.cat([own[:, order], own[:, :doubles]], -1),
                torch.ones(5, 3 + doubles, dtype=torch.bool),
                torch.cat([asked[:, :doubles], asked.flip(-1)], -1),
            )
            top = TopK(ids, logprobs.gather(-1, ids), valid)
            for row in range(5):
                assert set(top.ids[row, top.valid[row]].tolist()) == {*own[row].tolist(), *asked[row].tolist()}
            values.append(divergence(case.student_logprobs(1), top, kind=kind, tail=tail))
    assert all(close(value, values[0].double()) for value in values)


def test_a_union_keeps_columns_and_the_first_of_two() -> None:
    teacher_ids, teacher_valid = torch.tensor([[5, 9, 9], [1, 2, 3]]), torch.tensor([[True, False, True], [False] * 3])
    ids, valid = losses.union(teacher_ids, teacher_valid, torch.tensor([[9, 7, 5], [3, 2, 3]]))
    assert ids.tolist() == [[5, 9, 9, 9, 7, 5], [1, 2, 3, 3, 2, 3]]
    assert valid.tolist() == [[True, False, True, False, True, False], [False, False, False, True, True, False]]


# ---- gradients ----


@examples
@given(case=cases, kind=kinds, beta=betas, temperature=temperatures, tail=st.booleans())
def test_the_gradient_is_the_finite_difference_and_on_the_mask_alone(
    case: Case, kind: Divergence, beta: float, temperature: float, tail: bool
) -> None:
    """The differences are of the definition in float64; the top-k of either model takes no part in the gradient."""
    weights, mask = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0]), torch.tensor([True, True, False, True, False])

    def loss(logits: Tensor) -> Tensor:
        student = case.student_logprobs(temperature, logits=logits)
        top = case.top(temperature)
        values = divergence(student, top, kind=kind, beta=beta, temperature=temperature, tail=tail)
        return losses.weighted_sum(values, weights, mask)

    got = gradient(loss, case.student)
    assert (got[~mask] == 0).all()
    assert (got[:, list(FORBIDDEN)] == 0).all()
    wanted = torch.zeros(case.student.shape, dtype=torch.float64)
    step = 1e-4
    for column in case.permitted:
        sides = []
        for sign in (1, -1):
            logits = case.student.double()
            logits[:, column] += sign * step
            moved = Case(logits, case.teacher, case.allowed, case.supports)
            values = oracle(moved, kind=kind, beta=beta, temperature=temperature, tail=tail)
            sides.append(torch.tensor(values, dtype=torch.float64))
        wanted[:, column] = (sides[0] - sides[1]) / (2 * step)
    wanted *= (weights * mask)[:, None]
    allowance = (weights * 20 * tolerance(case, temperature))[:, None] + 1e-3 * wanted.abs()
    assert ((got.double() - wanted).abs() <= allowance).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient(kind: Divergence) -> None:
    """At large temperature tau^2 D tends to a quadratic form of the logits (Hinton et al. 2015), whatever the tau."""
    case = make_case(3, whole=True)
    norms = []
    for temperature in (50.0, 200.0):
        top = case.top(temperature)
        student = partial(case.student_logprobs, temperature)
        value = partial(divergence, teacher=top, kind=kind, temperature=temperature)
        norms.append(gradient(lambda logits, student=student, value=value: value(student(logits=logits)), case.student))  # type: ignore[misc]
    sizes = [float(norm.norm()) for norm in norms]
    assert sizes[0] > 0.1
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_a_sure_student_still_feels_the_tail() -> None:
    """One minus a mass that rounds to one has no gradient; the ids outside, summed, have."""
    student = torch.tensor([[40.0, 0, -1, -2]])
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.1]]).log(), torch.tensor([[True, True]]))
    allowed = torch.ones(4, dtype=torch.bool)
    got = gradient(
        lambda logits: divergence(losses.log_probs(logits, allowed, 1), top, kind="forward", tail=True), student
    )
    rest = torch.tensor([-1.0, -2]).softmax(0)
    assert close(got, [[0.4, -0.1, -0.3 * float(rest[0]), -0.3 * float(rest[1])]])


# ---- positions that do not count ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [False, True])
def test_positions_with_too_little_to_compare_leave_numerator_and_denominator(kind: Divergence, tail: bool) -> None:
    case = make_case(1)
    case = Case(case.student, case.teacher, case.allowed, ((), (4,), (4, 6), (), (1, 2, 5)))
    top = case.top(1)
    usable = is_usable(top, tail)
    assert usable.tolist() == [False, tail, True, False, True]

    def values(logits: Tensor) -> Tensor:
        return divergence(case.student_logprobs(1, logits=logits), top, kind=kind, tail=tail)

    assert (values(case.student)[~usable] == 0).all()
    assert (values(case.student)[usable] > 0).all()
    got = gradient(values, case.student)
    assert got.isfinite().all()
    assert (got[~usable] == 0).all()
    assert (got[usable].abs().sum(-1) > 0).all()
    ones = torch.ones(5)
    alone = values(case.student)[usable].mean()
    mean = losses.weighted_sum(values(case.student), ones, usable) / losses.weighted_sum(ones, ones, usable)
    assert torch.isclose(mean, alone)


def test_a_sum_leaves_out_what_is_masked_even_if_it_is_not_finite() -> None:
    values = torch.tensor([2.0, torch.nan, torch.inf, 3.0], requires_grad=True)
    total = losses.weighted_sum(values, torch.tensor([1.0, 1, 0, 0.5]), torch.tensor([True, False, False, True]))
    assert float(total.detach()) == 3.5
    (grad,) = torch.autograd.grad(total, values)
    assert grad.tolist() == [1, 0, 0, 0.5]


def test_a_student_that_is_not_finite_is_seen() -> None:
    """The update has to be skipped, not the position."""
    student = torch.full((1, 3), torch.nan)
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.1]]).log(), torch.tensor([[True, True]]))
    assert all(divergence(student, top, kind=kind, tail=tail).isnan() for kind in KINDS for tail in (False, True))


# ---- infinities and precision ----


@examples
@given(seed=seeds, kind=kinds, tail=st.booleans(), scale=st.sampled_from([1.0, 30.0, 300.0]))
def test_forbidden_ids_may_be_asked_and_nothing_becomes_nan(
    seed: int, kind: Divergence, tail: bool, scale: float
) -> None:
    """Every id of the vocabulary is asked, with logits so far apart that probabilities underflow."""
    case = make_case(seed)
    logprobs = losses.log_probs(case.teacher * scale, case.allowed, 1)
    ids = torch.arange(VOCAB).expand(5, -1)
    top = TopK(ids, logprobs, torch.ones(5, VOCAB, dtype=torch.bool))
    assert (top.valid == case.allowed).all()
    assert is_usable(top, tail).all()

    def values(logits: Tensor) -> Tensor:
        return divergence(case.student_logprobs(1, logits=logits), top, kind=kind, tail=tail)

    student = case.student * scale
    assert values(student).isfinite().all()
    assert gradient(values, student).isfinite().all()
    assert (values(student) > -1e-5).all()
    without = as_top_k(logprobs, [case.permitted] * 5)
    assert close(values(student), divergence(case.student_logprobs(1, logits=student), without, kind=kind).double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_whose_mass_rounds_to_more_than_one_has_no_tail(kind: Divergence) -> None:
    student = losses.log_probs(torch.tensor([[1.0, 0, -1]]), torch.ones(3, dtype=torch.bool), 1)
    ids, valid = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    over, even = (TopK(ids, torch.tensor([[0.5, mass]]).log(), valid) for mass in (0.5005, 0.5))
    got, wanted = (divergence(student, top, kind=kind, tail=True) for top in (over, even))
    assert got.isfinite().all()
    assert torch.allclose(got, wanted, atol=2e-3)


@examples
@given(case=cases, kind=kinds, temperature=temperatures)
def test_bfloat16_logits_are_computed_in_float32(case: Case, kind: Divergence, temperature: float) -> None:
    """Only the inputs are rounded: the result is that of the same rounded logits as float32."""
    student, teacher = case.student.bfloat16(), case.teacher.bfloat16()
    low, high = (
        divergence(case.student_logprobs(temperature, logits=s), case.top(temperature, logits=t), kind=kind, tail=True)
        for s, t in ((student, teacher), (student.float(), teacher.float()))
    )
    assert low.dtype == torch.float32
    assert torch.equal(low, high)
    assert losses.log_probs(student, case.allowed, temperature).dtype == torch.float32


# ---- JSD ----


@examples
@given(case=st.builds(partial(make_case, least=2), seeds), tail=st.booleans())
def test_jsd_approaches_forward_and_reverse_kl(case: Case, tail: bool) -> None:
    """JSD_beta / beta -> KL(P||Q) as beta -> 0, and JSD_beta / (1 - beta) -> KL(Q||P) as beta -> 1."""
    mild = Case(case.student / 3, case.teacher / 3, case.allowed, case.supports)
    student, top = mild.student_logprobs(1), mild.top(1)
    value = partial(divergence, student, top, tail=tail)
    assert close(value(kind="jsd", beta=2e-3) / 2e-3, value(kind="forward").double(), rtol=0.05, atol=2e-3)
    assert close(value(kind="jsd", beta=1 - 2e-3) / 2e-3, value(kind="reverse").double(), rtol=0.05, atol=2e-3)


@examples
@given(case=cases, tail=st.booleans())
def test_jsd_is_symmetric_at_a_half_and_at_most_the_logarithm_of_two(case: Case, tail: bool) -> None:
    swapped = Case(case.teacher, case.student, case.allowed, case.supports)
    one, other = (divergence(c.student_logprobs(1), c.top(1), kind="jsd", tail=tail) for c in (case, swapped))
    assert close(one, other.double())
    assert (one <= math.log(2) + 1e-5).all()


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_beta_lies_between_its_limits(beta: float) -> None:
    case = make_case(0)
    with pytest.raises(UsageError, match="beta"):
        divergence(case.student_logprobs(1), case.top(1), kind="jsd", beta=beta)
    divergence(case.student_logprobs(1), case.top(1), kind="forward", beta=beta)


# ---- TopK ----


@pytest.mark.parametrize(
    ("values", "ids", "fault"),
    [
        ([2.0, 1.0, -1.0], [0, 1, 2], "positive"),
        ([torch.inf, -1.0, -1.0], [0, 1, 2], "positive"),
        ([-0.1, -0.2, -3.0], [0, 1, 2], "more than one"),  # logits that happen to be negative
        ([-1.0, torch.nan, -3.0], [0, 1, 2], "NaN"),
        ([-1.0, -2.0, -3.0], [4, 1, 4], "twice"),
        ([-1.0, -2.0, -3.0], [0, 1, -1], "negative"),
    ],
)
def test_a_top_k_takes_nothing_but_log_probabilities(values: list[float], ids: list[int], fault: str) -> None:
    valid = torch.ones(2, 3, dtype=torch.bool)
    rows = torch.tensor([[-1.0, -2.0, -3.0], values])
    both = torch.tensor([[0, 1, 2], ids])
    with pytest.raises(UsageError, match=rf"position 1: .*{fault}"):
        TopK(both, rows, valid)
    top = TopK(both, rows, valid & torch.tensor([[True], [False]]))  # what is not valid may be anything
    assert not top.valid[1].any()
    assert top.logprobs[1].tolist() == [-torch.inf] * 3


def test_raw_logits_of_a_network_are_refused() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3 + 10
    top = logits.topk(8)
    with pytest.raises(UsageError):
        TopK(top.indices, top.values, torch.ones(4, 8, dtype=torch.bool))


def test_a_little_rounding_is_no_fault() -> None:
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[5e-5, -8.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert top.valid.all()


def test_what_a_teacher_says_has_no_gradient() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    logprobs = losses.log_probs(logits, torch.ones(4, dtype=torch.bool), 1)
    assert not as_top_k(logprobs, [(0, 1)]).logprobs.requires_grad
    assert TopK(torch.tensor([[0, 1]]), logprobs[:, :2], torch.ones(1, 2, dtype=torch.bool)).logprobs.grad_fn is None


def test_an_id_that_the_student_may_not_write_is_refused() -> None:
    """Two vocabularies that forbid different ids would have an infinite divergence, or silently another support."""
    case = make_case(0)
    every = losses.log_probs(case.teacher, torch.ones(VOCAB, dtype=torch.bool), 1)
    top = as_top_k(every, [(0, 1), (0, 1), (1, FORBIDDEN[0]), (0,), (0,)])
    with pytest.raises(UsageError, match=rf"position 2: id {FORBIDDEN[0]} "):
        divergence(case.student_logprobs(1), top, kind="forward")


def test_a_top_k_is_narrowed_to_columns_or_ids() -> None:
    top = as_top_k(torch.full((2, 9), -3.0), [(5, 6, 7), (1,)])
    assert top.first(2).ids.tolist() == [[5, 6], [1, 0]]
    assert top.first(2).valid.tolist() == [[True, True], [True, False]]
    assert top.rows(slice(1, 2)).ids.tolist() == [[1, 0, 0]]
    assert top.rows(slice(0, 1)).valid.tolist() == [[True] * 3]
    assert top.among(torch.tensor([[7, 5], [0, 0]])).valid.tolist() == [[True, False, True], [False] * 3]


# ---- log_probs, top_k_ids ----


@examples
@given(case=cases, temperature=temperatures)
def test_log_probs_are_of_the_allowed_ids_at_the_temperature(case: Case, temperature: float) -> None:
    got = losses.log_probs(case.student, case.allowed, temperature)
    assert (got[:, ~case.allowed] == -torch.inf).all()
    for row, logits in zip(got, case.student.tolist(), strict=True):
        wanted = softmax(logits, case.permitted, temperature)
        assert close(row[case.permitted].exp(), list(wanted.values()))


def test_the_top_k_are_the_likeliest_in_order() -> None:
    logprobs = torch.tensor([[0.1, 0.4, 0.2, 0.3]], requires_grad=True).log()
    assert losses.top_k_ids(logprobs, 3).tolist() == [[1, 3, 2]]


# ---- diagnostics ----


def test_diagnostics_of_positions_made_by_hand() -> None:
    """Two positions of unlike weight, and one that is masked and broken."""
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2], [1.0, 0, 0, 0, 0]])
    student = probs.log()
    student[2] = torch.nan
    ids = torch.tensor([[1, 2, 0], [0, 1, 2], [0, 1, 2]])
    logprobs = torch.tensor([[0.5, 0.25, 0.125], [0.25, 0.25, 0.25], [0.5, 0.25, 0.125]]).log()
    valid = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    teacher = TopK(ids, logprobs, valid)
    sums = losses.diagnose(
        student,
        teacher,
        own=teacher.first(2),
        student_ids=torch.tensor([[0, 1], [3, 4], [0, 1]]),
        values=torch.tensor([3.0, 5.0, torch.nan]),
        weights=torch.tensor([1.0, 2.0, 1.0]),
        mask=torch.tensor([True, True, False]),
    )
    ln2 = math.log(2)
    wanted = {
        "vuss": 3 + 2 * 2,
        "overlap": 1 / 2 + 2 * 0,
        "jaccard": 1 / 3 + 2 * 0,
        "teacher_mass": 0.875 + 2 * 0.5,
        "student_mass": 0.875 + 2 * 0.4,
        "student_entropy": 1.75 * ln2 + 2 * math.log(5),
        "teacher_entropy": 1.75 * ln2 + 2 * 1.5 * ln2,
        "kl": 3 + 2 * 5,
    }
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(wanted, rel=1e-5)
    assert not any(value.requires_grad for value in sums.values())


def test_overlap_counts_only_what_the_teacher_has_to_offer() -> None:
    """Where the teacher has three ids of four and shares two: 2 of k = 4, and 2 of the 5 ids of both."""
    student = torch.full((1, 8), 1 / 8).log()
    logprobs = torch.full((1, 4), 0.1).log()
    own = TopK(torch.tensor([[0, 1, 6, 2]]), logprobs, torch.tensor([[True, True, True, False]]))
    one = torch.ones(1)
    ids = torch.tensor([[0, 1, 2, 3]])
    sums = losses.diagnose(student, own, own=own, student_ids=ids, values=one, weights=one, mask=one.bool())
    assert float(sums["overlap"]) == pytest.approx(2 / 4)
    assert float(sums["jaccard"]) == pytest.approx(2 / 5)
