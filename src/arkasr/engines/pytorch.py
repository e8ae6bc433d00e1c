"""The reference engine: log-mel, encoder, adapter, prefill and decode steps in PyTorch, on CPU or CUDA.

Unusual: clips of unequal length share a batch without touching each other. Rows are right-padded and every row keeps
its own position in the KV cache, so no left padding shifts anybody's positions.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arkasr import audio, engines, model
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.config import Heads, default_alignment_heads
from arkasr.engines import DecodeOptions, Dtype, Floats, Generation
from arkasr.errors import CheckpointMismatchError, UsageError
from arkasr.model import ArkASR, KVCache
from arkasr.text import TextRules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PyTorchEngine:
    """Runs an `ArkASR` module; also makes training rollouts."""

    def __init__(self, network: ArkASR, rules: TextRules, *, alignment_heads: Heads | None = None) -> None:
        """An engine over a network in memory and its token rules; alignment heads None are the default ones."""
        self.network = network
        self.rules = rules
        self.alignment_heads = alignment_heads or default_alignment_heads(network.config)

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
        network = model.load(source, dtype=DTYPES[dtype], device=device)
        return cls(network, source.rules, alignment_heads=source.alignment_heads)

    @torch.inference_mode()
    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize a batch; see `Engine.generate`."""
        device = self.network.decoder.embed.weight.device
        started = _now(device)
        mel, num_frames = pad_mels(waveforms, self.network)
        mel_done = _now(device)
        embeddings = self.network.encode(mel, num_frames)
        encoded = _now(device)
        rows = _Rows(self, [len(waveform) for waveform in waveforms], [[options]] * len(waveforms))
        logits = rows.prefill(embeddings)
        prefilled = _now(device)
        rows.run(logits)
        done = _now(device)
        timings_s = {
            "log_mel": mel_done - started,
            "encoder": encoded - mel_done,
            "prefill": prefilled - encoded,
            "decode": done - prefilled,
        }
        return [said for (said,) in rows.generations({k: seconds / len(waveforms) for k, seconds in timings_s.items()})]

    @torch.inference_mode()
    def continuations(
        self, embeddings: Tensor, num_samples: Sequence[int], options: Sequence[Sequence[DecodeOptions]]
    ) -> list[list[Generation]]:
        """What clips say that were encoded before, once for each of their options.

        A clip's audio is encoded and its prompt run once, however many options it has.

        Args:
            embeddings: of the audio, [B, A, H], as `ArkASR.encode` gives them.
            num_samples: lengths of the clips at 16 kHz.
            options: of every clip.
        """
        rows = _Rows(self, num_samples, options)
        rows.run(rows.prefill(embeddings))
        return rows.generations({})


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
    """One text while it is decoded."""

    num_samples: int
    options: DecodeOptions
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_logprob: float | None = None
    attention: Floats | None = None
    done: bool = False


class _Rows:
    """The decode state of a batch: KV cache, positions, and what each row has said.

    Unusual: a row has its own random numbers, so that a sampled text does not depend on its neighbours; and rows that
    are done leave the batch when half of it is.
    """

    def __init__(
        self, engine: PyTorchEngine, num_samples: Sequence[int], options: Sequence[Sequence[DecodeOptions]]
    ) -> None:
        """Of clips, each decoded once for each of its options."""
        self.network, self.rules = engine.network, engine.rules
        self.device = engine.network.decoder.embed.weight.device
        self.forbidden = torch.from_numpy(~engine.rules.allowed_ids).to(self.device)
        self.clips = [
            [_Row(length, each, np.random.default_rng(each.seed)) for each in those]
            for length, those in zip(num_samples, options, strict=True)
        ]
        merge = engine.network.config.merge_factor
        self.prompts = [engine.rules.prompt_ids(audio.num_audio_tokens(length, merge)) for length in num_samples]
        self.live = [row for rows in self.clips for row in rows]  # those in the batch, in its order
        by_layer = engines.heads_by_layer(engine.alignment_heads)
        self.heads = {layer: torch.from_numpy(heads).to(self.device) for layer, heads in by_layer.items()}
        self.see = self._see if any(row.options.align for row in self.live) else None
        self.queries: dict[int, list[Tensor]] = {layer: [] for layer in self.heads}  # [B, C, D] of each position

    def prefill(self, embeddings: Tensor) -> Tensor:
        """Logits [B, V] after each row's prompt."""
        longest = max(len(prompt) for prompt in self.prompts)
        padding = self.rules.stop_ids[0]
        ids = torch.tensor([p + [padding] * (longest - len(p)) for p in self.prompts], device=self.device)
        capacity = longest + max(row.options.token_cap(row.num_samples) for row in self.live)
        x = self.network.embed(ids, embeddings)
        self.cache = KVCache(self.network.config, len(ids), capacity, x)
        positions = torch.arange(longest, device=self.device).expand_as(ids)
        self.positions = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        hidden = self.network.decoder(x, positions, self.cache, see=self.see)
        last = hidden[torch.arange(len(ids), device=self.device), self.positions - 1]
        clips = torch.tensor([clip for clip, rows in enumerate(self.clips) for _ in rows], device=self.device)
        if len(clips) != len(ids):
            self._select(clips)
        return self.network.decoder.logits(last)[clips]

    def run(self, logits: Tensor) -> None:
        """Decode until every row is done, from the logits [B, V] after the prompts."""
        while True:
            chosen = self._take(logits)
            alive = [place for place, row in enumerate(self.live) if not row.done]
            if not alive:
                return
            if 2 * len(alive) <= len(self.live):
                kept = torch.tensor(alive, device=self.device)
                self.live = [self.live[place] for place in alive]
                self._select(kept)
                chosen = chosen[kept]
            logits = self.step(chosen)

    def step(self, ids: Tensor) -> Tensor:
        """Logits [B, V] after one more token of every row, ids [B]."""
        x = self.network.decoder.embed(ids[:, None])
        hidden = self.network.decoder(x, self.positions[:, None], self.cache, see=self.see)
        self.positions = self.positions + 1
        return self.network.decoder.logits(hidden[:, 0])

    def _select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.positions = self.positions[rows]
        self.queries = {layer: [q[rows] for q in kept] for layer, kept in self.queries.items()}

    def _see(self, layer: int, q: Tensor) -> None:
        """Keep the chosen heads' queries where each row's next token is predicted, of q [B, N, T, D]."""
        if layer in self.heads:
            last = q[:, :, 0] if q.shape[2] == 1 else q[torch.arange(len(q), device=self.device), :, self.positions - 1]
            self.queries[layer].append(last[:, self.heads[layer]])

    def _attention(self, place: int, row: _Row) -> Floats:
        """Where a row that is done, at a place in the batch, heard its tokens."""
        config = self.network.config
        first = self.prompts[0].index(self.rules.audio_id)
        behind = first + audio.num_audio_tokens(row.num_samples, config.merge_factor)
        queries, keys = [], []
        for layer, heads in self.heads.items():
            queries.append(torch.stack([q[place] for q in self.queries[layer]], dim=1))
            kv_heads = heads // (config.decoder_heads // config.kv_heads)
            keys.append(self.cache.keys[layer, place, kv_heads, first:behind])
        told, heard = (torch.cat(pieces).float().cpu().numpy() for pieces in (queries, keys))
        return engines.attention(told, heard, num_ids=len(row.ids))

    def _take(self, logits: Tensor) -> Tensor:
        """Choose a token [B] for every row; rows that are done are carried along."""
        logprobs = logits.float().masked_fill(self.forbidden, -torch.inf).log_softmax(dim=-1)
        chosen = logprobs.argmax(dim=-1)
        if any(row.options.temperature for row in self.live):
            chosen = self._drawn(logprobs, chosen)
        chosen_logprobs = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, chosen_logprobs)):
            raise CheckpointMismatchError(
                "the network's output is not finite: damaged weights, or too large for float16; use --dtype float32"
            )
        told = zip(self.live, chosen.tolist(), chosen_logprobs, strict=True)
        for place, (row, token_id, logprob) in enumerate(told):
            if row.done:
                continue
            if token_id in self.rules.stop_ids:
                row.stop_logprob, row.done = logprob, True
            else:
                row.ids.append(token_id)
                row.logprobs.append(logprob)
                row.done = row.options.is_over(row.ids, row.num_samples)
            if row.done and row.options.align:
                row.attention = self._attention(place, row)
        return chosen

    def _drawn(self, logprobs: Tensor, greedy: Tensor) -> Tensor:
        """Tokens [B] drawn by inverse transform from logprobs [B, V]; the greedy ones [B] where that is asked."""
        temperatures = torch.tensor([row.options.temperature or 1.0 for row in self.live], dtype=torch.float64)
        best = logprobs.max(dim=-1, keepdim=True).values
        probs = ((logprobs - best).double() / temperatures.to(self.device)[:, None]).exp()
        top_p = torch.tensor([row.options.top_p for row in self.live], dtype=torch.float64, device=self.device)
        if bool((top_p < 1).any()):
            falling = probs.sort(dim=-1, descending=True).values
            reached = falling.cumsum(dim=-1)
            last = torch.searchsorted(reached, (top_p * reached[:, -1])[:, None]).clamp(max=probs.shape[-1] - 1)
            probs = torch.where(probs < falling.gather(1, last), 0.0, probs)
        reached = probs.cumsum(dim=-1)
        uniform = torch.tensor([row.random.random() for row in self.live], dtype=torch.float64, device=self.device)
        drawn = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
        possible = torch.arange(probs.shape[-1], device=self.device).expand_as(probs).masked_fill(probs == 0, 0)
        drawn = torch.minimum(drawn, possible.amax(dim=-1))  # a draw of almost 1 may round to 1
        sampled = torch.tensor([row.options.temperature > 0 for row in self.live], device=self.device)
        return torch.where(sampled, drawn, greedy)

    def generations(self, timings_s: dict[str, float]) -> list[list[Generation]]:
        """What each clip says, for each of its options."""
        return [
            [
                Generation(tuple(row.ids), tuple(row.logprobs), row.stop_logprob, timings_s, attention=row.attention)
                for row in rows
            ]
            for rows in self.clips
        ]
