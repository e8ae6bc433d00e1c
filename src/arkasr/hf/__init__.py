"""ARK-ASR in Hugging Face Transformers, without remote code: importing this registers config, model and processor.

import arkasr.hf
model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER_OR_HUB_ID)
processor = transformers.AutoProcessor.from_pretrained(FOLDER_OR_HUB_ID)
"""

from arkasr.errors import MissingExtraError

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
except ImportError:
    raise MissingExtraError("arkasr.hf: Transformers is not installed; pip install 'arkasr[hf]'") from None

from arkasr.hf.configuration import ArkAsrConfig
from arkasr.hf.modeling import ArkasrForConditionalGeneration
from arkasr.hf.processing import ArkasrProcessor

__all__ = ["ArkAsrConfig", "ArkasrForConditionalGeneration", "ArkasrProcessor"]

AutoConfig.register(ArkAsrConfig.model_type, ArkAsrConfig, exist_ok=True)
for _auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto.register(ArkAsrConfig, ArkasrForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ArkAsrConfig, ArkasrProcessor, exist_ok=True)
