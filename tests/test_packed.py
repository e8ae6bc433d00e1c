"""Texts packed behind one prompt give the numbers of each text in a row of its own."""

import torch

from arkasr.config import ModelConfig
from arkasr.model import ArkASR
from arkasr.train.packed import pack
from conftest import random_network

PROMPTS: list[list[int]] = [[3, 5, 7, 9], [4, 6]]
TEXTS: list[list[tuple[int, ...]]] = [[(11, 12, 13), (), (14,), (15, 16)], [(17, 18, 19, 20)]]


def alone(network: ArkASR, prompt: list[int], text: tuple[int, ...]) -> torch.Tensor:
    """States that predict each token of a text, by a plain causal row."""
    ids = torch.tensor([[*prompt, *text]])
    states = network.decoder(network.decoder.embed(ids), torch.arange(ids.shape[1])[None])
    predicting: torch.Tensor = states[0, len(prompt) - 1 : -1]
    return predicting


def test_packed_texts_are_as_if_alone(small: ModelConfig) -> None:
    network = random_network(small)
    packed = pack(PROMPTS, TEXTS, padding=0, device=torch.device("cpu"))
    hidden = packed.hidden(network, torch.zeros(2, 1, small.hidden_dim))
    expected = [alone(network, p, text) for p, those in zip(PROMPTS, TEXTS, strict=True) for text in those if text]
    torch.testing.assert_close(hidden, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert packed.targets.tolist() == [token for those in TEXTS for text in those for token in text]
    assert packed.ids.shape[1] == 4 + 2 + 0 + 1  # a last token is predicted and sees nobody


def test_gradients_are_the_sums_of_those_alone(small: ModelConfig) -> None:
    """K rollouts of one utterance are K utterances."""
    network = random_network(small).requires_grad_(True)
    packed = pack(PROMPTS, TEXTS, padding=0, device=torch.device("cpu"))
    goal = torch.randn(len(packed.targets), small.hidden_dim, generator=torch.Generator().manual_seed(0))
    (packed.hidden(network, torch.zeros(2, 1, small.hidden_dim)) * goal).sum().backward()  # type: ignore[no-untyped-call]
    together = [p.grad.clone() for p in network.decoder.parameters() if p.grad is not None]
    network.zero_grad()
    rows = [alone(network, p, text) for p, those in zip(PROMPTS, TEXTS, strict=True) for text in those if text]
    (torch.cat(rows) * goal).sum().backward()  # type: ignore[no-untyped-call]
    apart = [p.grad for p in network.decoder.parameters() if p.grad is not None]
    assert len(together) == len(apart) > 10
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_nothing_to_score_is_a_sum_of_nothing(small: ModelConfig) -> None:
    network = random_network(small).requires_grad_(True)
    packed = pack([[3, 5]], [[]], padding=0, device=torch.device("cpu"))
    hidden = packed.hidden(network, torch.zeros(1, 1, small.hidden_dim))
    assert hidden.shape == (0, small.hidden_dim)
    hidden.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and not p.grad.any() for p in network.decoder.layers.parameters())
