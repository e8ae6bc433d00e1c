"""The reference engine: log-mel, encoder, adapter, prefill and decode steps in PyTorch, on CPU or CUDA.

Unusual: clips of unequal length share a batch without touching each other. Rows are right-padded and every row keeps
its own position in the KV cache, so no left padding shifts anybody's positions.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arkasr import audio, model
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.engines import DecodeOptions, Dtype, Generation
from arkasr.errors import CheckpointMismatchError, UsageError
from arkasr.model import ArkASR, KVCache
from arkasr.text import TextRules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PyTorchEngine:
    """Runs an `ArkASR` module; also makes training rollouts."""

    def __init__(self, network: ArkASR, rules: TextRules) -> None:
        """An engine over a network in memory and its token rules."""
        self.network = network
        self.rules = rules

    @classmethod
    def load(cls, source: Checkpoint, *, device: str = "auto", dtype: Dtype = "float32") -> "PyTorchEngine":
        """An engine over a checkpoint; device "auto" is CUDA where there is one."""
        if device == "auto":
            device = "cuda" if has_cuda() else "cpu"
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r}: no such dtype; use one of {', '.join(DTYPES)}")
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise UsageError(f"device {device!r}: no such device; use auto, cpu, cuda or cuda:N") from None
        if wanted.type != "cuda" and device != "cpu":
            raise UsageError(f"device {device}: not supported; use auto, cpu, cuda or cuda:N")
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {device}: not among the CUDA devices that PyTorch sees; use --device cpu")
        return cls(model.load(source, dtype=DTYPES[dtype], device=device), source.rules)

    @torch.inference_mode()
    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize a batch; see `Engine.generate`."""
        device = self.network.decoder.embed.weight.device
        started = _now(device)
        mel, num_frames = pad_mels(waveforms, self.network)
        mel_done = _now(device)
        embeddings = self.network.encode(mel, num_frames)
        encoded = _now(device)
        rows = _Rows(self, waveforms, options)
        logits = rows.prefill(embeddings)
        prefilled = _now(device)
        while rows.take(logits):
            logits = rows.step()
        done = _now(device)
        timings_s = {
            "log_mel": mel_done - started,
            "encoder": encoded - mel_done,
            "prefill": prefilled - encoded,
            "decode": done - prefilled,
        }
        return rows.generations({stage: seconds / len(waveforms) for stage, seconds in timings_s.items()})


def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device."""
    return torch.cuda.is_available()


def _now(device: torch.device) -> float:
    """Wall clock after the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pad_mels(waveforms: Sequence[Waveform], network: ArkASR) -> tuple[Tensor, Tensor]:
    """Log-mels of clips as one zero-padded batch [B, M, F] and their frame counts [B], on the network's device."""
    like = network.decoder.embed.weight
    batch, num_frames = stack_mels([audio.log_mel(waveform, network.config.num_mels) for waveform in waveforms])
    return batch.to(like.device, like.dtype), num_frames.to(like.device)


def stack_mels(mels: Sequence[npt.NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Log-mels [M, F] of clips as one zero-padded batch [B, M, F] and their frame counts [B]."""
    num_frames = torch.tensor([mel.shape[1] for mel in mels])
    batch = torch.zeros(len(mels), mels[0].shape[0], int(num_frames.max()))
    for row, mel in enumerate(mels):
        batch[row, :, : mel.shape[1]] = torch.from_numpy(mel)
    return batch, num_frames


@dataclass
class _Row:
    """One clip while it is decoded."""

    num_samples: int
    ids: list[int]
    logprobs: list[float]
    stop_logprob: float | None = None
    done: bool = False


class _Rows:
    """The decode state of a batch: KV cache, positions, and what each row has said."""

    def __init__(self, engine: PyTorchEngine, waveforms: Sequence[Waveform], options: DecodeOptions) -> None:
        self.network, self.rules, self.options = engine.network, engine.rules, options
        self.device = engine.network.decoder.embed.weight.device
        self.forbidden = torch.from_numpy(~engine.rules.allowed_ids).to(self.device)
        # One a row, so that a sampled text does not depend on the neighbours either.
        self.generators = [torch.Generator(device=self.device).manual_seed(options.seed) for _ in waveforms]
        self.rows = [_Row(len(waveform), [], []) for waveform in waveforms]
        merge = engine.network.config.merge_factor
        self.prompts = [engine.rules.prompt_ids(audio.num_audio_tokens(len(waveform), merge)) for waveform in waveforms]
        self.positions = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        self.next_ids = torch.zeros(len(self.rows), dtype=torch.long, device=self.device)
        self.cache: KVCache | None = None

    def prefill(self, embeddings: Tensor) -> Tensor:
        """Logits [B, V] after each row's prompt."""
        longest = max(len(prompt) for prompt in self.prompts)
        padding = self.rules.stop_ids[0]
        ids = torch.tensor([p + [padding] * (longest - len(p)) for p in self.prompts], device=self.device)
        capacity = longest + max(self.options.token_cap(row.num_samples) for row in self.rows)
        x = self.network.embed(ids, embeddings)
        self.cache = KVCache(self.network.config, len(ids), capacity, x)
        positions = torch.arange(longest, device=self.device).expand_as(ids)
        hidden = self.network.decoder(x, positions, self.cache)
        last = hidden[torch.arange(len(ids), device=self.device), self.positions - 1]
        return self.network.decoder.logits(last)

    def step(self) -> Tensor:
        """Logits [B, V] after one more token a row; finished rows are carried along."""
        x = self.network.decoder.embed(self.next_ids[:, None])
        hidden = self.network.decoder(x, self.positions[:, None], self.cache)
        self.positions = self.positions + 1
        return self.network.decoder.logits(hidden[:, 0])

    def take(self, logits: Tensor) -> bool:
        """Choose a token for every row; False when all rows are done."""
        logprobs = logits.float().masked_fill(self.forbidden, -torch.inf).log_softmax(dim=-1)
        if self.options.temperature == 0:
            chosen = logprobs.argmax(dim=-1)
        else:
            probs = (logprobs / self.options.temperature).softmax(dim=-1)
            draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, self.generators, strict=True)]
            chosen = torch.cat(draws)
        self.next_ids = chosen
        chosen_logprobs = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, chosen_logprobs)):
            raise CheckpointMismatchError(
                "the network's output is not finite: damaged weights, or too large for float16; use --dtype float32"
            )
        for row, token_id, logprob in zip(self.rows, chosen.tolist(), chosen_logprobs, strict=True):
            if row.done:
                continue
            if token_id in self.rules.stop_ids:
                row.stop_logprob, row.done = logprob, True
                continue
            row.ids.append(token_id)
            row.logprobs.append(logprob)
            row.done = self.options.is_over(row.ids, row.num_samples)
        return not all(row.done for row in self.rows)

    def generations(self, timings_s: dict[str, float]) -> list[Generation]:
        """What each row said."""
        return [Generation(tuple(row.ids), tuple(row.logprobs), row.stop_logprob, timings_s) for row in self.rows]
