"""Any recognizer of Transformers: CTC and encoder-decoder models by its pipeline, Qwen3-ASR by its own processor.

Unusual: nothing of a repository is run. Code of its own is never trusted, weights are safetensors, and what is not on
this machine is fetched only if that is allowed, at the commit that is named.
"""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.engines import MAX_NEW_TOKENS
from arkasr.errors import MissingExtraError, ModelNotFoundError, UsageError
from arkasr.evaluate.systems import Heard, charged

_PINNED = re.compile(r"([\w.\-]+/[\w.\-]+)@([0-9a-f]{40})", re.ASCII)
ASKED = ("qwen3_asr",)  # model types whose processor writes the prompt
WHISPER_S = 30  # beyond, Whisper has to mark times to go on


class TransformersSystem:
    """A model of Transformers."""

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        language: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        allow_download: bool = False,
    ) -> None:
        """A folder, or ORG/NAME@COMMIT.

        Raises:
            ModelNotFoundError: it is not on this machine, or is none that Transformers knows.
            MissingExtraError: torch or transformers is not installed.
            UsageError: it is named without its commit, or is no recognizer.
        """
        try:
            import torch
            import transformers
        except ImportError as error:
            raise MissingExtraError(
                f"{model}: {error.name} is not installed; pip install 'arkasr[eval,torch]'"
            ) from None
        found = _PINNED.fullmatch(str(model))
        if found is None and not Path(model).is_dir():
            raise UsageError(f"{model}: no such folder; give one, or ORG/NAME@COMMIT with the full commit")
        place, revision = found.groups() if found else (str(model), None)
        self.name = place if found else Path(model).absolute().name
        options = {"revision": revision, "local_files_only": not allow_download, "trust_remote_code": False}
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in dtypes:
            raise UsageError(f"dtype is {dtype!r}; give {', '.join(dtypes)}")
        try:
            config = transformers.AutoConfig.from_pretrained(place, **options)
            ctc = any(name.endswith("ForCTC") for name in config.architectures or ())
            auto = transformers.AutoModelForCTC if ctc else transformers.AutoModelForSpeechSeq2Seq
            network = auto.from_pretrained(place, dtype=dtypes[dtype], use_safetensors=True, **options)
            self._processor = transformers.AutoProcessor.from_pretrained(place, **options)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise ModelNotFoundError(f"{model}: cannot be loaded ({why}); give a recognizer that is here") from None
        self._torch, self._network = torch, network.to(device).eval()
        self._type, self._language = config.model_type, language
        if language and self._type not in ("whisper", *ASKED):
            raise UsageError(f"language is {language!r}; a {self._type} of Transformers is not told any")
        # The pipeline's own default is a search with five beams.
        greedy: dict[str, Any] = {"num_beams": 1, "do_sample": False, "max_new_tokens": max_new_tokens}
        self._generate = {} if ctc else greedy
        if self._type == "whisper" and language:
            self._generate |= {"language": language, "task": "transcribe"}
        self._ctc, self._longest = ctc, WHISPER_S * SAMPLE_RATE if self._type == "whisper" else sys.maxsize
        self._pipe = self._pipeline()
        self._facts = {
            "kind": "transformers", "model": self.name, "revision": revision, "type": self._type, "dtype": dtype,
            "device": device, "parameters": sum(p.numel() for p in network.parameters()),
            "decoding": {"language": language, **self._generate}, "attention": network.config._attn_implementation,  # noqa: SLF001
        }  # fmt: skip

    def _pipeline(self) -> Any:
        import transformers

        return transformers.AutomaticSpeechRecognitionPipeline(
            model=self._network,
            tokenizer=self._processor.tokenizer,
            feature_extractor=self._processor.feature_extractor,
            device=self._network.device,
        )

    def facts(self) -> dict[str, Any]:
        """Model, revision, class, dtype and decoding parameters."""
        return dict(self._facts)

    def hear(self, batch: Sequence[Waveform]) -> list[Heard]:
        """One answer a clip."""
        self._wait()
        since = time.perf_counter()
        with self._torch.inference_mode():
            texts = self._asked(batch) if self._type in ASKED else self._piped(batch)
        self._wait()
        return charged([Heard(text, 0.0) for text in texts], since)

    def _wait(self) -> None:
        if self._network.device.type == "cuda":
            self._torch.cuda.synchronize(self._network.device)

    def _piped(self, batch: Sequence[Waveform]) -> list[str]:
        """The pipeline's texts; together only those clips whose text does not depend on it.

        It decodes the padding of a CTC model's batch, and marks times for all of a batch or none.
        """
        texts = [""] * len(batch)
        alone = [self._ctc or len(waveform) > self._longest for waveform in batch]
        together = [number for number, is_alone in enumerate(alone) if not is_alone]
        groups = [[number] for number, is_alone in enumerate(alone) if is_alone] + ([together] if together else [])
        for numbers in groups:
            inputs = [{"raw": batch[number], "sampling_rate": SAMPLE_RATE} for number in numbers]
            options: dict[str, Any] = {"generate_kwargs": dict(self._generate)} if self._generate else {}
            if len(batch[numbers[0]]) > self._longest:
                options["return_timestamps"] = True
            for number, said in zip(numbers, self._pipe(inputs, batch_size=len(inputs), **options), strict=True):
                texts[number] = said["text"]
        return texts

    def _asked(self, batch: Sequence[Waveform]) -> list[str]:
        inputs = self._processor.apply_transcription_request(audio=list(batch), language=self._language)
        inputs = inputs.to(self._network.device, self._network.dtype)
        ids = self._network.generate(**inputs, **self._generate)
        said = ids[:, inputs["input_ids"].shape[1] :]
        return list(self._processor.decode(said, return_format="transcription_only"))
