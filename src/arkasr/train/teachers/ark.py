"""A teacher that is an arkasr checkpoint with the student's tokenizer: exact, over the whole vocabulary."""

import torch
from torch import Tensor

from arkasr import audio, model
from arkasr.checkpoint import Checkpoint
from arkasr.engines.pytorch import DTYPES, pad_mels
from arkasr.errors import UsageError
from arkasr.model import ArkASR
from arkasr.text import TextRules
from arkasr.train import losses
from arkasr.train.losses import TopK
from arkasr.train.packed import pack
from arkasr.train.teachers import Capabilities, Request, Scores

CHUNK = 1024  # positions whose logits over the whole vocabulary are in memory at once


class ArkTeacher:
    """Scores what a student said; see `Teacher`."""

    def __init__(self, network: ArkASR, rules: TextRules) -> None:
        """A teacher over a network in memory, whose rules are the student's too."""
        self.network, self.rules = network.eval().requires_grad_(requires_grad=False), rules
        self.capabilities = Capabilities(
            any_ids=True, any_temperature=True, max_top_k=rules.vocab_size, exact_vocabulary=True
        )

    @classmethod
    def load(cls, source: Checkpoint, student: TextRules, *, device: str, dtype: str) -> "ArkTeacher":
        """The teacher of a checkpoint.

        Raises:
            UsageError: its tokenizer is not the student's.
        """
        if not source.rules.same_tokens(student):
            raise UsageError(
                f"teacher {source.folder}: its tokenizer is not the student's; give a teacher with the same tokenizer"
            )
        return cls(model.load(source, dtype=DTYPES[dtype], device=device), source.rules)

    @torch.no_grad()
    def score(self, request: Request) -> Scores:
        """Log-probabilities after each prefix of each rollout; every position is aligned."""
        network = self.network
        device = network.decoder.embed.weight.device
        embeddings = network.encode(*pad_mels(request.waveforms, network))
        merge = network.config.merge_factor
        prompts = [
            self.rules.prompt_ids(audio.num_audio_tokens(len(waveform), merge)) for waveform in request.waveforms
        ]
        packed = pack(prompts, request.rollouts, padding=self.rules.stop_ids[0], device=device)
        hidden = packed.hidden(network, embeddings)
        asked = request.support
        chunks = [
            self._top(states, None if asked is None else asked[begin : begin + CHUNK].to(device), request)
            for begin, states in zip(range(0, max(len(hidden), 1), CHUNK), torch.split(hidden, CHUNK), strict=True)
        ]
        ids, logprobs, valid = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        aligned = torch.ones(len(hidden), dtype=torch.bool, device=device)
        return Scores(TopK(ids, logprobs, valid), min(request.top_k, self.rules.vocab_size), aligned, {})

    def _top(self, hidden: Tensor, asked: Tensor | None, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probabilities and validity, [n, k + asked], of states [n, H]."""
        allowed = torch.tensor(self.rules.allowed_ids, device=hidden.device)
        logprobs = losses.log_probs(self.network.decoder.logits(hidden), allowed, request.temperature)
        top = losses.top_k_ids(logprobs, min(request.top_k, logprobs.shape[-1]))
        ids, valid = (
            losses.union(top, torch.ones_like(top, dtype=torch.bool), asked) if asked is not None else (top, None)
        )
        values = logprobs.gather(-1, ids)
        finite = values.isfinite()
        return ids, values, finite if valid is None else finite & valid
