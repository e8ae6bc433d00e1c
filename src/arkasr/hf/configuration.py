"""`ArkAsrConfig`: the published config.json as Transformers and vLLM want it, a Qwen2 text config with more keys.

Unusual: `arkasr.config` reads and checks it, here as elsewhere. Qwen2Config has a default for every size, so a key that
is missing would be filled with another model's number; hence the keys are checked before Transformers sees them.
"""

from typing import Any

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from arkasr import config as configs
from arkasr.config import ModelConfig


class ArkAsrConfig(Qwen2Config):  # type: ignore[misc]
    """Config of an ARK-ASR model; attributes are the keys of config.json, `whisper_config` a dict."""

    model_type = "arkasr"

    def __init__(self, **keys: Any) -> None:
        """From the keys of a config.json; without any, an empty one, as Transformers makes to find what differs.

        Raises:
            CheckpointMismatchError: a key is missing, or the keys contradict each other.
        """
        keys.pop("auto_map", None)  # points at code, which a copy that we save must not do
        if keys:
            keys = configs.to_mapping(configs.from_mapping(keys)) | keys
        super().__init__(**keys)

    def network(self) -> ModelConfig:
        """The architecture that these keys, as they are now, describe.

        Raises:
            CheckpointMismatchError: a key is missing, or the keys contradict each other.
        """
        return configs.from_mapping(self.to_dict())
