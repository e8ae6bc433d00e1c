"""The network in vLLM: our encoder and adapter, vLLM's Qwen2, and the mask of ids that may be emitted.

    log-mels [M, F] -> Encoder, Adapter -> [A, H] a clip, in its places of the prompt -> Qwen2 -> logits, masked

Unusual: encoder and adapter are whole on every rank. With `--mm-encoder-tp-mode data` each rank hears its part of the
clips; without it, all hear all. No clip's numbers depend on its neighbours, and the decoder's path has nothing in it
that a CUDA graph could not record.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import SpeechToTextConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.interfaces import (
    StreamingTranscriptionPostProcessor,
    SupportsMultiModal,
    SupportsTranscription,
)
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config

from arkasr import audio, checkpoint, segment, text
from arkasr import model as networks
from arkasr.audio import HOP_SAMPLES, SAMPLE_RATE
from arkasr.checkpoint import EMBEDDINGS, HEAD
from arkasr.config import MAX_CLIP_S, ModelConfig
from arkasr.errors import CheckpointMismatchError, UsageError
from arkasr.vllm_plugin.processing import DummyInputs, Info, Processor, rules_of

LANGUAGES = {
    "zh": "Chinese", "en": "English", "de": "German", "ja": "Japanese", "fr": "French", "ko": "Korean",
    "es": "Spanish", "pl": "Polish", "it": "Italian", "ro": "Romanian", "hu": "Hungarian", "cs": "Czech",
    "nl": "Dutch", "fi": "Finnish", "hr": "Croatian", "sk": "Slovak", "sl": "Slovenian", "et": "Estonian",
    "lt": "Lithuanian",
}  # fmt: skip


class CleanDeltas(StreamingTranscriptionPostProcessor):  # type: ignore[misc]  # vLLM is not where the types are checked
    """What `text.clean` makes of a text that comes in pieces: their sum is what it makes of the whole."""

    def __init__(self) -> None:
        self._heard, self._told = "", ""

    def process_delta(self, text_delta: str, finished: bool) -> str:
        """What can be told now; the start of a turn token is held back until more is known."""
        self._heard += text_delta
        cleaned = text.clean(self._heard)
        if not finished:
            begun = (token[:size] for token in text.CUT_AT for size in range(len(token) - 1, 0, -1))
            cleaned = cleaned.removesuffix(next((b for b in begun if cleaned.endswith(b)), "")).rstrip()
        delta = cleaned[len(self._told) :]
        self._told += delta
        return delta


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class ArkasrForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsTranscription):  # type: ignore[misc]
    """A recognizer that vLLM's servers and engines run."""

    supported_languages: ClassVar[Mapping[str, str]] = LANGUAGES
    supports_transcription_only: ClassVar[bool] = True
    supports_encoder_tp_data: ClassVar[bool] = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """As vLLM builds it.

        Raises:
            ModelNotFoundError, CheckpointMismatchError: no tokenizer, or not an ARK-ASR one.
        """
        super().__init__()
        model_config = vllm_config.model_config
        self.network: ModelConfig = model_config.hf_config.network()
        self.place: str = model_config.model
        # Where a checkpoint with tied embeddings has a head too, vLLM unties them in the config.
        self.tied = self.network.tied_embeddings or model_config.word_embeddings_untied_by_checkpoint
        self.shares_clips = model_config.multimodal_config.mm_encoder_tp_mode == "data"
        with self._mark_tower_model(vllm_config, "audio"):  # type: ignore[operator]
            self.encoder = networks.Encoder(self.network)
            self.adapter = networks.Adapter(self.network)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config, prefix=maybe_prefix(prefix, "language_model"), architectures=["Qwen2ForCausalLM"]
            )
        forbidden = torch.tensor((~rules_of(model_config).allowed_ids).tolist())
        self.forbidden: Tensor  # [V]
        self.register_buffer("forbidden", forbidden, persistent=False)

    # ---- audio ----

    def embed_multimodal(self, *, mel: Tensor | Sequence[Tensor] = (), **_: object) -> list[Tensor]:
        """Embeddings [A, H] of each clip's log-mel [M, F]."""
        if len(mel) == 0:
            return []
        num_frames = [clip.shape[1] for clip in mel]
        weight = self.encoder.conv1.weight
        batch = weight.new_zeros(len(mel), self.network.num_mels, max(num_frames))
        for row, clip in enumerate(mel):
            batch[row, :, : clip.shape[1]] = clip
        embeddings = self._encode(batch, torch.tensor(num_frames, device=weight.device))
        merge = self.network.merge_factor
        lengths = [audio.num_audio_tokens(frames * HOP_SAMPLES, merge) for frames in num_frames]
        return [row[:length] for row, length in zip(embeddings, lengths, strict=True)]

    def _encode(self, mel: Tensor, num_frames: Tensor) -> Tensor:
        """Embeddings [B, A, H] of a zero-padded batch [B, M, F], each rank's clips by itself where they are shared."""
        size = get_tensor_model_parallel_world_size() if self.shares_clips else 1
        num_clips = len(mel)
        share = -(-num_clips // size)
        if size > 1:
            surplus = size * share - num_clips
            start = get_tensor_model_parallel_rank() * share
            mel = F.pad(mel, (0, 0, 0, 0, 0, surplus))[start : start + share]
            num_frames = F.pad(num_frames, (0, surplus), value=mel.shape[2])[start : start + share]
        frames = self.encoder(mel, num_frames)
        embeddings: Tensor = self.adapter(frames, networks.num_encoder_frames(num_frames))
        if size > 1:
            embeddings = tensor_model_parallel_all_gather(embeddings.contiguous(), dim=0)[:num_clips]
        return embeddings

    # ---- text ----

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Hidden states [T, H] of the decoder, of ids [T] or embeddings [T, H] at positions [T]."""
        hidden: Tensor = self.language_model.model(input_ids, positions, inputs_embeds=inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [T, V] of hidden states [T, H], minus infinity where an id may not be emitted."""
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits if logits is None else logits.masked_fill_(self.forbidden, -torch.inf)

    # ---- weights ----

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take tensors of published names; returns the names of the parameters that have their values.

        Raises:
            CheckpointMismatchError: a tensor is missing, surplus, or of another shape than config.json says.
        """
        here = {name: tensor for name, tensor in self.named_parameters() if not name.startswith("language_model.")}
        decoder = self.language_model.load_weights(self._of_decoder(weights, here))
        return {f"language_model.{name}" for name in decoder} | here.keys()

    def _of_decoder(
        self, weights: Iterable[tuple[str, Tensor]], here: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The decoder's tensors; the encoder's and the adapter's are copied as they come."""
        wanted = {spec.hf_name: spec for spec in checkpoint.tensor_specs(self.network)}
        found: dict[str, tuple[int, ...]] = {}
        tied: list[Tensor] = []
        for name, tensor in weights:
            found[name] = tuple(tensor.shape)
            if self.tied and name in (HEAD, EMBEDDINGS):
                tied.append(tensor)
                if len(tied) == 2 and not torch.equal(*tied):
                    raise CheckpointMismatchError(f"{HEAD} differs from {EMBEDDINGS}, but config.json ties them")
            spec = wanted.get(name)
            if spec is None or tensor.shape != spec.shape:
                continue  # an ignored one, or `match` tells
            if spec.name.startswith("decoder."):
                yield name, tensor
            else:
                here[spec.name].data.copy_(tensor)
        checkpoint.match(found, self.network, self.place)

    # ---- transcription ----

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:  # noqa: ARG003 - vLLM's
        """Where a clip goes in a prompt of text."""
        return text.AUDIO if modality == "audio" else None

    @classmethod
    def get_speech_to_text_config(cls, model_config: Any, task_type: str) -> SpeechToTextConfig:  # noqa: ARG003
        """Chunks of at most 30 s, cut where it is quietest in the last third.

        Raises:
            CheckpointMismatchError: vLLM, which asks others, would not stop where a text ends.
        """
        told = model_config.try_get_generation_config().get("eos_token_id", [])
        stops = {cached_tokenizer_from_config(model_config).eos_token_id, *(told if isinstance(told, list) else [told])}
        deaf = set(rules_of(model_config).stop_ids) - stops
        if deaf:
            raise CheckpointMismatchError(
                f"{model_config.model}: vLLM would not stop at {sorted(deaf)}; name all stop ids as eos_token_id in "
                "config.json and, where there is one, generation_config.json"
            )
        return SpeechToTextConfig(
            sample_rate=SAMPLE_RATE,
            max_audio_clip_s=MAX_CLIP_S,
            overlap_chunk_second=segment.SEARCH_SAMPLES // SAMPLE_RATE,
            min_energy_split_window_size=segment.WINDOW_SAMPLES,
        )

    @classmethod
    def get_generation_prompt(cls, stt_params: Any) -> TokensPrompt:
        """The published prompt; neither a language nor a request's own prompt have a place in it.

        Raises:
            UsageError: something else than a transcription is asked.
        """
        if stt_params.task_type != "transcribe":
            raise UsageError(f"{stt_params.task_type}: ARK-ASR transcribes, and does nothing else")
        ids = rules_of(stt_params.model_config).prompt_ids(1)
        return TokensPrompt(prompt_token_ids=ids, multi_modal_data={"audio": stt_params.audio})

    @classmethod
    def post_process_output(cls, raw: str) -> str:
        """As `text.clean`."""
        return text.clean(raw)

    @classmethod
    def get_streaming_post_processor_cls(cls) -> type[CleanDeltas]:
        """Deltas that add up to the text of an answer that is not streamed."""
        return CleanDeltas
