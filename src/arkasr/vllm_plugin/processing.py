"""From a request to what the network gets: the prompt, a clip's log-mel, and the places of its embeddings.

    one <|audio|> and a waveform -> its log-mel [M, F], and as many <|audio|> as it has audio tokens

Unusual: there is no processor of Transformers in it, for the rules are ours; and the tokenizer's files are read here
once more, because vLLM's tokenizer does not say which ids may be emitted.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from arkasr import audio, text
from arkasr.audio import HOP_SAMPLES, SAMPLE_RATE
from arkasr.config import MAX_CLIP_S, ModelConfig
from arkasr.engines import DecodeOptions
from arkasr.errors import AudioError
from arkasr.hf.configuration import ArkAsrConfig
from arkasr.hf.processing import fetch
from arkasr.text import TextRules

MAX_SAMPLES = MAX_CLIP_S * SAMPLE_RATE
LONGEST = 2**31  # more tokens than any clip may have


def rules_of(model_config: Any) -> TextRules:
    """The token rules of the checkpoint that vLLM's model config names.

    Raises:
        ModelNotFoundError, CheckpointMismatchError: as `text.load`.
    """
    config = model_config.hf_config.network()
    return _rules(
        model_config.tokenizer,
        model_config.tokenizer_revision,
        config.vocab_size,
        config.eos_token_ids,
        config.audio_token_id,
    )


@lru_cache(maxsize=4)
def _rules(
    source: str, revision: str | None, vocab_size: int, eos_token_ids: tuple[int, ...], audio_token_id: int
) -> TextRules:
    folder = fetch(source, revision=revision)
    return text.load(folder, vocab_size=vocab_size, eos_token_ids=eos_token_ids, audio_token_id=audio_token_id)


def max_positions(model_config: Any) -> int:
    """Positions of the longest clip's prompt and of the most that may be said of it."""
    num_tokens = audio.num_audio_tokens(MAX_SAMPLES, model_config.hf_config.network().merge_factor)
    longest_text = DecodeOptions(max_new_tokens=LONGEST).token_cap(MAX_SAMPLES)
    return len(rules_of(model_config).prompt_ids(num_tokens)) + longest_text


class Info(BaseProcessingInfo):  # type: ignore[misc]  # vLLM is not where the types are checked
    """What vLLM's processing may know of a checkpoint."""

    def network(self) -> ModelConfig:
        """The architecture."""
        config: ModelConfig = self.ctx.get_hf_config(ArkAsrConfig).network()
        return config

    def get_data_parser(self) -> MultiModalDataParser:
        """One that mixes and resamples what has a sample rate."""
        return MultiModalDataParser(target_sr=SAMPLE_RATE, target_channels=1, audio_resample_method="soxr")

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One clip a prompt."""
        return {"audio": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Of the longest clip."""
        return {"audio": audio.num_audio_tokens(MAX_SAMPLES, self.network().merge_factor)}


class DummyInputs(BaseDummyInputsBuilder[Info]):  # type: ignore[misc]
    """The longest clip, with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """As many places as clips."""
        return text.AUDIO * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Silence."""
        num_audios = mm_counts.get("audio", 0)
        overrides = mm_options.get("audio")
        return {"audio": self._get_dummy_audios(length=MAX_SAMPLES, num_audios=num_audios, overrides=overrides)}


class Processor(BaseMultiModalProcessor[Info]):  # type: ignore[misc]
    """Waveforms to log-mels, and one `<|audio|>` to as many as a clip has audio tokens."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        num_mels = self.info.network().num_mels
        return BatchFeature({"mel": [torch.from_numpy(_log_mel(clip, num_mels)) for clip in hf_data["audio"]]})

    def _get_mm_fields_config(
        self, hf_inputs: Mapping[str, object], hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"mel": MultiModalFieldConfig.batched("audio")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: object
    ) -> Sequence[PromptReplacement]:
        config = self.info.network()

        def places(item: int) -> list[int]:
            num_samples = mm_items.get_items("audio", AudioProcessorItems).get_audio_length(item)
            return [config.audio_token_id] * audio.num_audio_tokens(num_samples, config.merge_factor)

        return [PromptReplacement(modality="audio", target=[config.audio_token_id], replacement=places)]


def _log_mel(samples: Any, num_mels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Log-mel [M, F] of a clip; what ends before its first frame, as the rest of a long recording may, is filled up.

    Raises:
        AudioError: longer than 30 s, or not finite.
    """
    waveform = np.asarray(samples, dtype=np.float32)
    if len(waveform) > MAX_SAMPLES:
        raise AudioError(f"clip: {len(waveform)} samples, over the {MAX_CLIP_S} s of one prompt; cut it into pieces")
    if not np.isfinite(waveform).all():
        raise AudioError("clip: NaN or infinite samples; write the file again")
    return audio.log_mel(np.pad(waveform, (0, max(0, HOP_SAMPLES - len(waveform)))), num_mels)
