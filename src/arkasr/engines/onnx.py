"""The CPU engine: exported graphs in ONNX Runtime, without PyTorch.

Unusual: no row is ever padded. Clips are encoded and prefilled one at a time, which already fills the processor; only
the decode steps, which memory bounds, are shared by rows. A row that ends makes room for the next clip at once. Keys
and values are written in place, and only token and log-probability leave the graph, not 600 kB of logits a step. Steps
have an even number of rows: the kernels take two at a time, and sum the last of an odd number in another order, so
that a clip's numbers would depend on its neighbours.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arkasr import audio, engines, export, files, runtime, segment
from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint
from arkasr.config import Heads, ModelConfig, default_alignment_heads, rope_angles
from arkasr.engines import Clip, Clips, DecodeOptions, Floats, Generation
from arkasr.errors import CheckpointMismatchError
from arkasr.export import Precision
from arkasr.quantize import Table
from arkasr.text import TextRules

MAX_ROWS = 8  # that share a decode step; more rows gain little and cost cache memory
THREADED_DIM = 512  # of the decoder; below, threads spin longer than they compute, on cores that the VAD could use


@dataclass
class _Row:
    """One clip while it is decoded; `length` counts its positions in the cache."""

    clip: Clip
    length: int
    generator: np.random.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_logprob: float | None = None
    queries: list[Floats] = field(default_factory=list)  # [C, D] of each position, where alignment is asked
    attention: Floats | None = None


class OnnxEngine:
    """Runs an export of a checkpoint."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        rules: TextRules,
        *,
        threads: int = 0,
        alignment_heads: Heads | None = None,
    ) -> None:
        """An engine over an export's folder; threads 0 is one for each core, for a small model one.

        Alignment heads are those of the export's checkpoint; None are the default ones.

        Raises:
            CheckpointMismatchError: the export is damaged, or not one that this ONNX Runtime can run.
        """
        manifest = export.read_manifest(folder)
        self.config, self.rules = config, rules
        self.heads = engines.heads_by_layer(alignment_heads or default_alignment_heads(config))
        self.first_audio = rules.prompt_ids(1).index(rules.audio_id)
        if threads == 0 and config.hidden_dim < THREADED_DIM:
            threads = 1
        # The encoder's threads would go on spinning while the decoder's work; between decode steps it pays.
        self.encoder = runtime.session(folder / "encoder.onnx", threads=threads, stop_spinning=True)
        self.decoder = runtime.session(folder / "decoder.onnx", threads=threads)
        if not {f"queries_{layer}" for layer in self.heads} <= {output.name for output in self.decoder.get_outputs()}:
            raise CheckpointMismatchError(
                f"{folder}: made with other alignment heads than {files.GENERATION_CONFIG} names; choose them in the "
                "checkpoint, and export it again"
            )
        try:
            self.embed = _Embedding(folder / "decoder.bin", manifest.table, config)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise CheckpointMismatchError(
                f"{folder / files.MANIFEST}: the table cannot be there ({error}); delete the folder"
            ) from None
        forbidden = np.where(rules.allowed_ids, 0, -np.inf).astype(np.float32)
        self.forbidden = runtime.OrtValue.ortvalue_from_numpy(forbidden)

    @classmethod
    def load(
        cls, source: Checkpoint, *, precision: Precision | None, threads: int = 0, report: Callable[[str], object]
    ) -> "OnnxEngine":
        """An engine over a checkpoint, which is exported into the cache first where that has not been done.

        See `export.find_or_write`.
        """
        folder = export.find_or_write(source, precision, report=report)
        return cls(folder, source.config, source.rules, threads=threads, alignment_heads=source.alignment_heads)

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize clips; see `Engine.generate`."""
        given = _Given([Clip(waveform, options) for waveform in waveforms])
        self._decode(given, min(len(waveforms), MAX_ROWS), max(map(len, waveforms)), options)
        return given.in_order()

    def decode(self, clips: Clips) -> None:
        """Recognize clips of at most 30 s that come and go; see `Continuous.decode`."""
        self._decode(clips, MAX_ROWS, segment.MAX_SAMPLES, DecodeOptions(max_new_tokens=2**31))

    def _decode(self, clips: Clips, max_rows: int, longest_samples: int, options: DecodeOptions) -> None:
        """The loop, with room for so many clips of such a length and options."""
        capacity = len(self._prompt_ids(longest_samples)) + options.token_cap(longest_samples)
        batch = _Batch(self, max_rows, capacity)
        while True:
            batch.keep(clips.wants)
            while len(batch.rows) < max_rows and (clip := clips.take()) is not None:
                x = self._prompt(clip)
                started = time.perf_counter()
                batch.prefill(x, _Row(clip, x.shape[1], np.random.default_rng(clip.options.seed)))
                done = batch.take(first=len(batch.rows) - 1)
                clip.timings_s |= {"prefill": time.perf_counter() - started, "decode": 0.0}
                _give(done, clips)
            if not batch.rows:
                return
            started = time.perf_counter()
            rows = list(batch.rows)
            batch.step()
            done = batch.take()
            share_s = (time.perf_counter() - started) / len(rows)
            for row in rows:
                row.clip.timings_s["decode"] += share_s
            _give(done, clips)

    def _prompt_ids(self, num_samples: int) -> npt.NDArray[np.int64]:
        num_tokens = audio.num_audio_tokens(num_samples, self.config.merge_factor)
        return np.array(self.rules.prompt_ids(num_tokens))

    def prepare(self, clip: Clip) -> None:
        """Work out a clip's log-mel; see `Continuous.prepare`."""
        started = time.perf_counter()
        clip.mel = audio.log_mel(clip.waveform, self.config.num_mels)
        clip.timings_s["log_mel"] = time.perf_counter() - started

    def _prompt(self, clip: Clip) -> Floats:
        """Embeddings [1, T, H] of a clip's prompt, its audio tokens in their places."""
        if clip.mel is None:
            self.prepare(clip)
        assert clip.mel is not None
        started = time.perf_counter()
        (encoded,) = self.encoder.run(["audio"], {"mel": clip.mel[None]})
        clip.mel = None
        clip.timings_s["encoder"] = time.perf_counter() - started
        ids = self._prompt_ids(len(clip.waveform))
        x = self.embed(ids)
        x[ids == self.rules.audio_id] = encoded[0]
        return x[None]


class _Given:
    """The clips of one call."""

    def __init__(self, clips: list[Clip]) -> None:
        self._clips = clips
        self._waiting = iter(clips)
        self._said: dict[Clip, Generation] = {}

    def take(self) -> Clip | None:
        return next(self._waiting, None)

    def wants(self, clip: Clip) -> bool:
        return True

    def give(self, clip: Clip, generation: Generation) -> None:
        self._said[clip] = generation

    def in_order(self) -> list[Generation]:
        return [self._said[clip] for clip in self._clips]


def _give(done: list[_Row], clips: Clips) -> None:
    for row in done:
        told = tuple(row.ids), tuple(row.logprobs), row.stop_logprob, row.clip.timings_s
        clips.give(row.clip, Generation(*told, attention=row.attention))


class _Batch:
    """Rows that share decode steps, the first `len(rows)` places of the cache [rows, kv heads, capacity, D]."""

    def __init__(self, engine: OnnxEngine, max_rows: int, capacity: int) -> None:
        config = engine.config
        shape = (max_rows + max_rows % 2, config.kv_heads, capacity, config.decoder_head_dim)
        self.rows: list[_Row] = []
        self._engine = engine
        self._names = [f"{kind}_{n}" for n in range(config.decoder_layers) for kind in ("keys", "values")]
        self._cache = [np.zeros(shape, np.float32) for _ in self._names]
        self._answers: list[npt.NDArray[Any]] = []
        self._queries: Floats | None = None  # [B, C, D] of the last run, where a row wants them
        self._next_ids: list[int] = []

    def prefill(self, x: Floats, row: _Row) -> None:
        """Run a prompt [1, T, H] in the next free place."""
        place = len(self.rows)
        self.rows.append(row)
        self._next_ids.append(0)
        self._run(x, [row.length], slice(place, place + 1))

    def step(self) -> None:
        """Run one more token of every row."""
        for row in self.rows:
            row.length += 1
        even = [*range(len(self.rows)), *([0] if len(self.rows) % 2 else [])]  # the first once more, in a free place
        x = self._engine.embed(np.array(self._next_ids)[even])[:, None]
        self._run(x, [self.rows[place].length for place in even], slice(0, len(even)))

    def _run(self, x: Floats, lengths: list[int], places: slice) -> None:
        """X [B, T, H] of rows whose caches then hold `lengths` positions."""
        binding = self._engine.decoder.io_binding()
        inputs = {
            "x": np.ascontiguousarray(x),
            "last_position": np.array(lengths, np.int32) - 1,
            "num_positions": np.array([max(lengths)], np.int32),
        }
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_ortvalue_input("forbidden", self._engine.forbidden)
        for name, cache in zip(self._names, self._cache, strict=True):
            rows = cache[places]
            binding.bind_input(f"past_{name}", "cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            binding.bind_output(f"present_{name}", "cpu", 0, np.float32, rows.shape, rows.ctypes.data)
        sampled = any(row.clip.options.temperature > 0 for row in self.rows)
        aligned = any(row.clip.options.align for row in self.rows)
        queries = [f"queries_{layer}" for layer in self._engine.heads] if aligned else []
        outputs = ["token", "logprob", *(["logits"] if sampled else []), *queries]
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._engine.decoder.run_with_iobinding(binding)
        self._answers = [value.numpy() for value in binding.get_outputs()[-len(outputs) :]]
        self._queries = self._chosen(self._answers[-len(queries) :]) if queries else None

    def _chosen(self, queries: list[npt.NDArray[Any]]) -> Floats:
        """Those of the alignment heads [B, C, D], of the queries [B, 1, N * D] of each layer that has such."""
        split = (len(queries[0]), -1, self._engine.config.decoder_head_dim)
        by_layer = zip(queries, self._engine.heads.values(), strict=True)
        return np.concatenate([every.reshape(split)[:, heads] for every, heads in by_layer], axis=1)

    def take(self, *, first: int = 0) -> list[_Row]:
        """Give the rows from `first` on the tokens that the last run chose; those that are done, taken out."""
        done = []
        for place in range(len(self.rows) - 1, first - 1, -1):
            row = self.rows[place]
            options = row.clip.options
            token, logprob = self._choose(row, place - first, options)
            if options.align:
                assert self._queries is not None
                row.queries.append(self._queries[place - first])
            if token in self._engine.rules.stop_ids:
                row.stop_logprob = logprob
            else:
                row.ids.append(token)
                row.logprobs.append(logprob)
            self._next_ids[place] = token
            if row.stop_logprob is not None or options.is_over(row.ids, len(row.clip.waveform)):
                if options.align:
                    row.attention = self._attention(place, row)
                done.append(row)
                self._remove(place)
        return done

    def _attention(self, place: int, row: _Row) -> Floats:
        """Where a row that is done heard its tokens; the cached keys are rotated, the queries not yet."""
        engine, config = self._engine, self._engine.config
        behind = engine.first_audio + audio.num_audio_tokens(len(row.clip.waveform), config.merge_factor)
        queries = np.stack(row.queries, axis=1)  # [C, n, D]
        positions = np.arange(row.length - len(row.queries), row.length)
        cos, sin = rope_angles(positions, config.decoder_head_dim, config.rope_theta)
        half = config.decoder_head_dim // 2
        low, high = queries[..., :half], queries[..., half:]
        rotated = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        group = config.decoder_heads // config.kv_heads
        caches = [(self._cache[2 * layer], heads) for layer, heads in engine.heads.items()]
        keys = np.concatenate([cache[place, heads // group, engine.first_audio : behind] for cache, heads in caches])
        return engines.attention(rotated, keys, num_ids=len(row.ids))

    def _choose(self, row: _Row, place: int, options: DecodeOptions) -> tuple[int, float]:
        """A row's next token and its log-probability at temperature 1."""
        token, logprob = int(self._answers[0][place]), float(self._answers[1][place])
        if not math.isfinite(logprob):
            raise CheckpointMismatchError("the network's output is not finite: damaged weights; verify the model")
        if options.temperature == 0:
            return token, logprob
        logits = self._answers[2][place].astype(np.float64)
        logprobs = logits - (logits[token] - logprob)
        probs = np.exp((logprobs - logprob) / options.temperature)
        if options.top_p < 1:
            falling = np.sort(probs)[::-1]
            reached = np.searchsorted(np.cumsum(falling), options.top_p * falling.sum())
            probs[probs < falling[min(reached, len(falling) - 1)]] = 0
        drawn = int(np.searchsorted(np.cumsum(probs / probs.sum()), row.generator.random(), side="right"))
        drawn = min(drawn, int(np.flatnonzero(probs)[-1]))
        return drawn, float(logprobs[drawn])

    def keep(self, wanted: Callable[[Clip], bool]) -> None:
        """Take the rows out that nobody waits for any more."""
        for place in range(len(self.rows) - 1, -1, -1):
            if not wanted(self.rows[place].clip):
                self._remove(place)

    def _remove(self, place: int) -> None:
        """Take a row out; the last one moves into its place."""
        last = self.rows.pop()
        last_id = self._next_ids.pop()
        if place < len(self.rows):
            for cache in self._cache:
                cache[place, :, : last.length] = cache[len(self.rows), :, : last.length]
            self.rows[place], self._next_ids[place] = last, last_id


class _Embedding:
    """Rows of the embedding table, out of the decoder's own mapped weights."""

    def __init__(self, path: Path, table: Table, config: ModelConfig) -> None:
        vocab, hidden = config.vocab_size, config.hidden_dim
        self._scales: npt.NDArray[np.float32] | None = None
        self._rows: npt.NDArray[Any]
        if table.scale_offset is None:
            self._rows = np.memmap(path, np.float32, "r", table.offset, (vocab, hidden))
        else:
            shape = (vocab, hidden // table.block, table.block)
            self._rows = np.memmap(path, np.uint8, "r", table.offset, shape)
            self._scales = np.memmap(path, np.float32, "r", table.scale_offset, shape[:2])

    def __call__(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Embeddings [n, H] of ids [n]."""
        rows = self._rows[ids]
        if self._scales is None:
            return np.array(rows)
        blocks = (rows.astype(np.float32) - 128) * self._scales[ids][..., None]
        return blocks.reshape(len(ids), -1)
