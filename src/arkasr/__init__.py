"""arkasr: the open, native home of the ARK-ASR speech recognizers.

import arkasr
print(arkasr.load_model("tiny").transcribe("talk.flac").text)
"""

from arkasr.engines import DecodeOptions
from arkasr.errors import ArkASRError
from arkasr.results import Transcript
from arkasr.transcribe import Transcriber, load_model

__version__ = "0.1.0"

__all__ = ["ArkASRError", "DecodeOptions", "Transcriber", "Transcript", "__version__", "load_model"]
