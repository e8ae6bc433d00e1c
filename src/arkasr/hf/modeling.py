"""`ArkasrForConditionalGeneration`: `arkasr.model` as a Transformers model, with the published names.

Unusual: there are two trees over the same modules. `ArkASR` computes; the tree that Transformers and PEFT see has the
published names, made from `arkasr.checkpoint.TENSORS`. A module that is replaced there, as LoRA and quantizers do, is
replaced in `ArkASR` too.
"""

import os
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from arkasr import audio, checkpoint
from arkasr.checkpoint import HEAD, TensorSpec
from arkasr.config import MAX_CLIP_S
from arkasr.engines import DecodeOptions
from arkasr.errors import CheckpointMismatchError, UsageError, quoted
from arkasr.hf.configuration import ArkAsrConfig
from arkasr.hf.processing import fetch, load_rules
from arkasr.model import ArkASR

POSITIONS = "encoder.positions"  # a parameter that is no module's weight, and absent in some copies


class Names(nn.Module):
    """A node of the published names; what is put in the place of a linked module or parameter is put there as well."""

    def __init__(self) -> None:
        super().__init__()
        self._links: dict[str, tuple[nn.Module, str]] = {}

    def link(self, name: str, owner: nn.Module, attribute: str) -> None:
        """Let `name` here be `attribute` of `owner`."""
        linked = owner.get_parameter(attribute) if attribute in owner._parameters else owner.get_submodule(attribute)  # noqa: SLF001
        setattr(self, name, linked)
        self._links[name] = (owner, attribute)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._links:
            owner, attribute = self._links[name]
            setattr(owner, attribute, value)


class _Past:
    """A Transformers cache as the decoder takes one."""

    def __init__(self, kept: Cache, capacity: int) -> None:
        self.kept, self.capacity = kept, capacity

    def put(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.kept.update(k, v, layer)
        return keys, values


class ArkasrForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The recognizer; its name is the one in the published config.json."""

    config_class = ArkAsrConfig
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    _supports_sdpa = True
    _can_compile_fullgraph = False
    _tied_weights_keys = {HEAD: checkpoint.EMBEDDINGS}  # noqa: RUF012 - the base class's
    _keys_to_ignore_on_load_unexpected = [f"^{re.escape(name)}$" for name in checkpoint.IGNORED]  # noqa: RUF012

    def __init__(self, config: ArkAsrConfig) -> None:
        """Random weights; `from_pretrained` reads those of a checkpoint.

        Raises:
            UsageError: an attention other than PyTorch's own (SDPA) is asked for.
        """
        super().__init__(config)
        if self.config._attn_implementation != "sdpa":  # noqa: SLF001 - there is no other name for it
            raise UsageError(f"attn_implementation {self.config._attn_implementation!r}: not supported; use 'sdpa'")  # noqa: SLF001
        network = ArkASR(config.network())
        self._hidden = (network,)  # in a tuple, so that its names are not this model's
        for spec in checkpoint.tensor_specs(network.config):
            self._link(spec, network)
        head = network.decoder.head
        if head is None:  # Transformers ties its weight to the embeddings
            head = nn.Linear(network.config.hidden_dim, network.config.vocab_size, bias=False)
        self.lm_head = head
        if network.config.use_rope:
            self._keys_to_ignore_on_load_missing = [rf"^{re.escape(self._positions)}$"]
        self.post_init()

    @property
    def network(self) -> ArkASR:
        """The modules that compute."""
        return self._hidden[0]

    def _link(self, spec: TensorSpec, network: ArkASR) -> None:
        """Put one tensor's module into the tree of published names."""
        if spec.hf_name == HEAD:
            return
        path, _, last = spec.hf_name.rpartition(".")
        our_path, _, our_last = spec.name.rpartition(".")
        *nodes, leaf = [*path.split("."), *([last] if spec.name == POSITIONS else [])]
        node: nn.Module = self
        for name in nodes:
            if name not in node._modules:  # noqa: SLF001 - torch's own table of children
                node.add_module(name, Names())
            node = node.get_submodule(name)
        assert isinstance(node, Names)
        if spec.name == POSITIONS:
            self._positions = spec.hf_name
            node.link(leaf, network.get_submodule(our_path), our_last)
        elif leaf not in node._modules:  # noqa: SLF001
            owner, _, attribute = our_path.rpartition(".")
            node.link(leaf, network.get_submodule(owner), attribute)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Names):
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.network.decoder.embed

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *arguments: Any, **options: Any
    ) -> Any:
        """The model of a folder or hub id in the published layout, with its masks in `generation_config`.

        Options are Transformers'. Weights are read from safetensors only.

        Raises:
            CheckpointMismatchError: a tensor is missing, surplus, misshapen, or a tied head is no copy; it is named.
            ModelNotFoundError: neither masks in generation_config.json nor a tokenizer to make them from.
        """
        name = pretrained_model_name_or_path
        wants_info = options.pop("output_loading_info", False)
        told = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(name, *arguments, **options | told)
        tied = model.config.tie_word_embeddings
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = {key if isinstance(key, str) else key[0] for key in info[kind]}
            wrong = sorted(names - {HEAD} if tied else names)  # a tied head is missing where the embeddings are
            if wrong:
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise CheckpointMismatchError(
                    f"{name}: {kind.removesuffix('_keys')} tensor {quoted(wrong[0])}{more}; not the config's "
                    "architecture"
                )
        if tied and model.lm_head.weight is not model.get_input_embeddings().weight:
            raise CheckpointMismatchError(f"{name}: {HEAD} differs from the embeddings, but config.json ties them")
        model._settle(name, options)  # noqa: SLF001 - of this class
        return (model, info) if wants_info else model

    def _settle(self, name: str | os.PathLike[str], options: dict[str, Any]) -> None:
        """Let `generate` do as our own engines where the checkpoint's generation_config.json says nothing."""
        settings = self.generation_config
        if settings.suppress_tokens is None:
            rules = load_rules(fetch(name, **options), self.network.config)
            settings.suppress_tokens = (~rules.allowed_ids).nonzero()[0].tolist()
            settings.eos_token_id = list(rules.stop_ids)
        if settings.pad_token_id is None:
            settings.pad_token_id = self.config.pad_token_id
        if settings.max_new_tokens is None:
            settings.max_new_tokens = DecodeOptions().token_cap(MAX_CLIP_S * audio.SAMPLE_RATE)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        input_features: Tensor | None = None,
        num_frames: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], or of the last `logits_to_keep` positions; with labels [B, T] also their mean loss.

        Args:
            input_ids: [B, T], padded on either side.
            attention_mask: [B, T and what the cache holds], 0 at padding; all ones by default.
            position_ids: [B, T]; counted from the mask by default.
            past_key_values: a cache that grows; what it holds comes before input_ids.
            input_features: log-mels [B, M, F], zero beyond each clip's frames.
            num_frames: [B] frames of each clip; all of them by default.
            labels: [B, T] the ids themselves, -100 where they do not count.
            use_cache: whether to return a cache.
            logits_to_keep: 0 for all.
            inputs_embeds: not supported, but PEFT passes it; so with the next two.
            output_attentions: not supported.
            output_hidden_states: not supported.
            return_dict: False for a tuple.

        Raises:
            UsageError: something unsupported; audio that the ids have no, or other, places for.
        """
        if inputs_embeds is not None or output_attentions or output_hidden_states:
            raise UsageError("inputs_embeds, output_attentions and output_hidden_states are not supported")
        if labels is not None and logits_to_keep:
            raise UsageError("logits_to_keep leaves out logits that labels need; give one of them")
        if past_key_values is not None and past_key_values.is_compileable:
            raise UsageError("caches of a fixed size are not supported; leave out cache_implementation")
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), held + input_ids.shape[1])
        if attention_mask.shape != (len(input_ids), held + input_ids.shape[1]):
            raise UsageError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, wanted {len(input_ids)} rows of "
                f"{held + input_ids.shape[1]}, the ids that the cache holds among them"
            )
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, held:]
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache) and labels is None:
            past_key_values = DynamicCache()
        x = self._embed(input_ids, input_features, num_frames, started=held > 0)
        kept = None if past_key_values is None else _Past(past_key_values, attention_mask.shape[1])
        hidden = self.network.decoder(x, position_ids, kept, _mask(attention_mask, held))
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        vocab_size = self.network.config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _embed(self, ids: Tensor, mel: Tensor | None, num_frames: Tensor | None, *, started: bool) -> Tensor:
        """Embeddings [B, T, H] of ids [B, T] with their audio, if any."""
        network = self.network
        if mel is None:
            if not started and bool((ids == network.config.audio_token_id).any()):
                raise UsageError("input_ids have places for audio; give input_features and num_frames as well")
            x: Tensor = network.decoder.embed(ids)
            return x
        if num_frames is None:
            num_frames = torch.full((len(mel),), mel.shape[-1], device=mel.device)
        merge = network.config.merge_factor
        wanted = [audio.num_audio_tokens(frames * audio.HOP_SAMPLES, merge) for frames in num_frames.tolist()]
        places = (ids == network.config.audio_token_id).sum(dim=1).tolist()
        if places != wanted:
            raise UsageError(
                f"input_ids have {places} places for audio of {wanted} embeddings; make both by one call of the "
                "processor"
            )
        return network.embed(ids, network.encode(mel.to(self.dtype), num_frames))


def _mask(attention_mask: Tensor, held: int) -> Tensor:
    """[B, 1, T, keys], True where a query may attend: to real positions up to its own.

    Padding on the left attends to nothing; PyTorch's SDPA answers that with zeros, not NaN, since 2.5.
    """
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    mask: Tensor = (keys <= keys[held:, None]) & attention_mask[:, None].bool()  # [B, T, keys]
    return mask[:, None]
