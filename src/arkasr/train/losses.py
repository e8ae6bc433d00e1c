"""Training objectives, every formula once."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a position that is not trained


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
