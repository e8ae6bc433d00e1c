"""The offline engine: clips in batches through vLLM in this process's service, on CUDA or, for tests, the CPU.

Unusual: vLLM knows no loop guard. It decodes to a clip's cap, and what `pytorch` would not have said after a loop was
found is cut off afterwards.
"""

import math
import os
import time
from collections.abc import Sequence
from typing import Any

from arkasr.audio import Waveform
from arkasr.checkpoint import Checkpoint, need_weights
from arkasr.config import ARCHITECTURE
from arkasr.engines import DecodeOptions, Dtype, Generation
from arkasr.errors import CheckpointMismatchError, MissingExtraError, UsageError

# vLLM raises what lies below the one to it, by which more would be drawn than asked; so that is greedy.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
CPU_CACHE_BYTES = 2**30  # without a number vLLM asks for nearly all memory, and does not start where some is in use
DTYPES = ("auto", "float32", "bfloat16", "float16")


class VllmEngine:
    """Runs `vllm.LLM` over a checkpoint."""

    def __init__(self, llm: Any, source: Checkpoint) -> None:
        """Of `load`."""
        self.llm, self._rules = llm, source.rules

    @classmethod
    def load(cls, source: Checkpoint, *, device: str = "auto", dtype: Dtype = "auto", **settings: Any) -> "VllmEngine":
        """An engine over a checkpoint; dtype "auto" is float32 on the CPU and bfloat16 elsewhere.

        Sets VLLM_LOGGING_STREAM and VLLM_NO_USAGE_STATS where they are not set: vLLM would log to standard output, and
        report the machine to its makers.

        Args:
            source: the checkpoint.
            device: "auto", or the kind of device for which this vLLM was built.
            dtype: of weights and activations.
            settings: more arguments of `vllm.LLM`, such as `tensor_parallel_size` or `gpu_memory_utilization`.

        Raises:
            MissingExtraError: vLLM, or its plugin, is not installed.
            UsageError: no such dtype, or this build of vLLM runs on another device.
        """
        need_weights(source)
        # Before vLLM is imported, and for its processes: standard output is the transcripts'.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm
        except ImportError as error:
            if error.name != "vllm":
                raise
            raise MissingExtraError("engine vllm: vLLM is not installed; pip install 'arkasr[vllm]'") from None
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        kind = current_platform.device_type
        if device not in ("auto", kind):
            raise UsageError(
                f"engine vllm: this vLLM runs on {kind}, not on {device}; CUDA_VISIBLE_DEVICES says which device"
            )
        if dtype not in DTYPES:
            raise UsageError(f"engine vllm has no dtype {dtype}; use one of {', '.join(DTYPES)}")
        load_general_plugins()
        if ARCHITECTURE not in vllm.ModelRegistry.get_supported_archs():
            raise MissingExtraError("engine vllm: its plugin was not loaded; if VLLM_PLUGINS is set, name arkasr in it")
        if dtype == "auto":
            dtype = "float32" if kind == "cpu" else "bfloat16"
        ours = {
            "generation_config": "vllm",  # no sampling that was not asked for
            "enable_prefix_caching": False,  # no clip has another's prompt
            "mm_processor_cache_gb": 0,
            "logprobs_mode": "raw_logprobs",
            "kv_cache_memory_bytes": CPU_CACHE_BYTES if kind == "cpu" else None,
        }
        return cls(vllm.LLM(str(source.folder), dtype=dtype, **(ours | settings)), source)

    def generate(self, waveforms: Sequence[Waveform], options: DecodeOptions) -> list[Generation]:
        """Recognize clips; see `Engine.generate`. A temperature below 0.01 is greedy.

        Raises:
            UsageError: a temperature that vLLM does not take.
            CheckpointMismatchError: the network's output is not finite.
        """
        if options.temperature > MAX_TEMPERATURE:
            raise UsageError(f"temperature is {options.temperature}; engine vllm takes at most {MAX_TEMPERATURE}")
        started = time.perf_counter()
        prompts = [
            {"prompt_token_ids": self._rules.prompt_ids(1), "multi_modal_data": {"audio": waveform}}
            for waveform in waveforms
        ]
        outputs = self.llm.generate(prompts, [self._params(len(w), options) for w in waveforms], use_tqdm=False)
        timings_s = {"vllm": (time.perf_counter() - started) / len(waveforms)}
        return [
            self._generation(output.outputs[0], len(waveform), options, timings_s)
            for output, waveform in zip(outputs, waveforms, strict=True)
        ]

    def _params(self, num_samples: int, options: DecodeOptions) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=options.temperature if options.temperature >= MIN_TEMPERATURE else 0.0,
            top_p=options.top_p,
            seed=options.seed,
            max_tokens=options.token_cap(num_samples),
            stop_token_ids=list(self._rules.stop_ids),
            logprobs=0,  # of the chosen token only
            detokenize=False,
        )

    def _generation(
        self, said: Any, num_samples: int, options: DecodeOptions, timings_s: dict[str, float]
    ) -> Generation:
        """What `pytorch` would have said: up to the stop, or the first place where the clip is over."""
        ids = list(said.token_ids)
        logprobs = [step[token_id].logprob for token_id, step in zip(ids, said.logprobs, strict=True)]
        if not all(map(math.isfinite, logprobs)):
            raise CheckpointMismatchError(
                "the network's output is not finite: damaged weights, or too large for float16; use --dtype float32"
            )
        for end, token_id in enumerate(ids):
            if token_id in self._rules.stop_ids:
                return Generation(tuple(ids[:end]), tuple(logprobs[:end]), logprobs[end], timings_s)
            if options.is_over(ids[: end + 1], num_samples):
                return Generation(tuple(ids[: end + 1]), tuple(logprobs[: end + 1]), None, timings_s)
        raise AssertionError("vLLM ended a clip before its cap")
