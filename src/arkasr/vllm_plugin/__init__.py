"""The plugin by which vLLM serves ARK-ASR checkpoints without their code; vLLM calls `register` in every process.

Unusual: what vLLM is told here are names. The model's own module is imported where vLLM builds the model, and not
where it serves others.
"""

import logging
from typing import Any

from arkasr.config import ARCHITECTURE
from arkasr.engines import MAX_NEW_TOKENS
from arkasr.errors import ArkASRError

KNOWN = ("0.32", "0.33")
_log = logging.getLogger(__name__)


class UnknownVllmError(ArkASRError, RuntimeError):
    """The plugin was not tried with the vLLM that is installed."""


class Limits:
    """What vLLM asks of an architecture before it builds it: here, how many tokens a request may take."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Room for one clip and its longest text, and the same cap of new tokens as elsewhere, where no one set others.

        vLLM would let a loop run to the end of the decoder's 32 768 positions.
        """
        from arkasr.vllm_plugin import processing

        model_config.override_generation_config.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        if model_config.original_max_model_len is None:
            model_config.max_model_len = min(model_config.max_model_len, processing.max_positions(model_config))

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Nothing more."""


def register() -> None:
    """Tell vLLM and Transformers of the architecture; cheap, and the same when it is called again."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2Tokenizer
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from arkasr.hf.configuration import ArkAsrConfig

    module = "model"
    try:
        check_version()
    except UnknownVllmError as error:
        _log.warning("%s", error)  # and no more, for other models may work
        module = "unknown"
    AutoConfig.register(ArkAsrConfig.model_type, ArkAsrConfig, exist_ok=True)
    AutoTokenizer.register(ArkAsrConfig, fast_tokenizer_class=Qwen2Tokenizer, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(ARCHITECTURE, f"arkasr.vllm_plugin.{module}:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Limits


def check_version() -> None:
    """Refuse a vLLM whose interfaces may be others.

    Raises:
        UnknownVllmError: it is none of `KNOWN`.
    """
    from vllm import __version__

    if not __version__.startswith(tuple(f"{known}." for known in KNOWN)):
        raise UnknownVllmError(
            f"vLLM {__version__}: the arkasr plugin knows {' and '.join(KNOWN)}; pip install 'arkasr[vllm]' fetches one"
        )
