"""`ArkasrProcessor`: audio to the inputs of `generate` and of training, and ids to text.

Unusual: it is made from config.json and the tokenizer's own files. What a folder has besides (preprocessor_config.json,
chat templates) repeats what `arkasr.audio` and `arkasr.text` know, and names code that we do not run.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from arkasr import audio, files, text
from arkasr import config as configs
from arkasr.audio import AudioSource
from arkasr.config import MAX_CLIP_S, ModelConfig
from arkasr.engines.pytorch import stack_mels
from arkasr.errors import AudioError, ModelNotFoundError, UsageError
from arkasr.text import ASSISTANT, TextRules

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
AUTO_OPTIONS = ("_from_auto", "trust_remote_code")  # what AutoProcessor adds; there is no remote code to trust
NO_LABEL = -100  # what cross entropy leaves out

Source = AudioSource | np.ndarray[Any, Any] | Tensor


class ArkasrProcessor(ProcessorMixin):  # type: ignore[misc]
    """Inputs for `ArkasrForConditionalGeneration`, and the text of what it generates."""

    def __init__(self, folder: Path) -> None:
        """Of a folder with config.json and a tokenizer.

        Raises:
            ModelNotFoundError: a file is missing.
            CheckpointMismatchError: a file is damaged, or they contradict each other.
        """
        super().__init__()
        self.config = configs.load(folder)
        self.rules = load_rules(folder, self.config)
        self._folder = folder

    @classmethod
    def get_attributes(cls) -> list[str]:
        """No processor of Transformers' is a part of this one."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """What there is to say of it; the rest is in config.json."""
        return {"processor_class": type(self).__name__}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> "ArkasrProcessor":
        """The processor of a folder or hub id; options are those of a download.

        Raises:
            UsageError: another option.
        """
        surplus = options.keys() - {*HUB_OPTIONS, *AUTO_OPTIONS}
        if surplus:
            raise UsageError(f"from_pretrained: {', '.join(sorted(surplus))} is no option of this processor")
        return cls(fetch(pretrained_model_name_or_path, **options))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Copy the tokenizer's files, so that beside a saved model they make a checkpoint.

        Raises:
            UsageError: an option, for there is none; upload the folder itself.
        """
        if any(options.values()):
            raise UsageError(f"save_pretrained: {', '.join(options)} is not supported; upload the folder that it wrote")
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for source in (self._folder / name for name in files.TOKENIZER_FILES):
            if source.exists() and source.resolve() != (target / source.name).resolve():
                shutil.copyfile(source, target / source.name)

    @property
    def model_input_names(self) -> list[str]:
        """What `apply_transcription_request` returns, labels apart."""
        return ["input_ids", "attention_mask", "input_features", "num_frames"]

    def apply_transcription_request(
        self,
        sources: Source | list[Any],
        *,
        sampling_rate: int | None = None,
        targets: str | Sequence[str] | None = None,
    ) -> BatchFeature:
        """A batch for `generate`, or with `targets` for training.

        Args:
            sources: a recording or a list of them: arrays or tensors [samples] or [samples, channels], or whatever
                else `arkasr.audio.load` reads (paths, bytes, files).
            sampling_rate: of the arrays; files tell their own.
            targets: the transcript of each recording.

        Returns:
            `input_ids` and `attention_mask` [B, T], padded on the left; `input_features`, log-mels [B, M, F], and
            `num_frames` [B] of each; with targets, `labels` [B, T].

        Raises:
            AudioError: audio that cannot be read, is shorter than a frame or longer than 30 s.
            UsageError: an array without its rate; not as many targets as recordings.
        """
        several = sources if isinstance(sources, list) else [sources]
        texts = [targets] if isinstance(targets, str) else targets
        if not several or (texts is not None and len(texts) != len(several)):
            raise UsageError(
                f"{len(several)} recordings and {len(texts or ())} targets; give as many, and at least one"
            )
        waveforms = [_waveform(source, sampling_rate) for source in several]
        prompts = [
            self.rules.prompt_ids(audio.num_audio_tokens(len(waveform), self.config.merge_factor))
            for waveform in waveforms
        ]
        answers = [self.rules.target_ids(said) for said in texts] if texts is not None else [[] for _ in prompts]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        features, num_frames = stack_mels([audio.log_mel(waveform, self.config.num_mels) for waveform in waveforms])
        batch = {
            "input_ids": _left_padded(rows, self.config.pad_token_id),
            "attention_mask": _left_padded([[1] * len(row) for row in rows], 0),
            "input_features": features,
            "num_frames": num_frames,
        }
        if texts is not None:
            labels = [[NO_LABEL] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
            batch["labels"] = _left_padded(labels, NO_LABEL)
        return BatchFeature(batch)

    def __call__(self, *sources: Any, **options: Any) -> BatchFeature:
        """As `apply_transcription_request`; there is no other request."""
        return self.apply_transcription_request(*sources, **options)

    def decode(self, ids: Tensor | Sequence[int], **options: Any) -> str:
        """The transcript in one row of what `generate` returned; the prompt may stand before it.

        Raises:
            UsageError: an option that would change the text: the rules of ARK-ASR's text are fixed.
        """
        if not options.pop("skip_special_tokens", True) or any(options.values()):
            raise UsageError("decode: the rules of ARK-ASR's text are fixed; leave out the options")
        said = [int(token_id) for token_id in ids]
        turn = self.rules.special_ids[ASSISTANT]
        start = len(said) - said[::-1].index(turn) if turn in said else 0
        return self.rules.to_text(said[start:])

    def batch_decode(self, rows: Tensor | Sequence[Sequence[int]], **options: Any) -> list[str]:
        """The transcript of each row; as `decode`."""
        return [self.decode(row, **options) for row in rows]


def fetch(name: str | os.PathLike[str], **options: Any) -> Path:
    """The folder with config.json and tokenizer of a folder or hub id, by Transformers' own cache.

    Raises:
        ModelNotFoundError: there is neither.
    """
    kept = {option: options[option] for option in HUB_OPTIONS if option in options}
    if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return Path(name, kept.get("subfolder") or "")
    wanted = (files.CONFIG, *files.TOKENIZER_FILES)
    found = [cached_file(name, file, **kept, _raise_exceptions_for_missing_entries=False) for file in wanted]
    folders = {Path(path).parent for path in found if path is not None}  # one, of the one commit
    if not folders:
        raise ModelNotFoundError(f"{name}: no {files.CONFIG}; give a folder or hub id in the published layout")
    return folders.pop()


def load_rules(folder: Path, config: ModelConfig) -> TextRules:
    """The token rules of a folder with a tokenizer."""
    return text.load(
        folder,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        audio_token_id=config.audio_token_id,
    )


def _waveform(source: Source, sampling_rate: int | None) -> audio.Waveform:
    if isinstance(source, np.ndarray | Tensor):
        if sampling_rate is None:
            raise UsageError("an array of samples without its rate; give sampling_rate=")
        source = (np.asarray(source), sampling_rate)
    waveform = audio.load(source)
    if len(waveform) < audio.HOP_SAMPLES:
        raise AudioError(f"{audio.describe(source)}: {len(waveform)} samples, less than one frame; record it again")
    if len(waveform) > MAX_CLIP_S * audio.SAMPLE_RATE:
        raise AudioError(
            f"{audio.describe(source)}: {len(waveform) / audio.SAMPLE_RATE:.1f} s, the model takes {MAX_CLIP_S} s at "
            "once; use arkasr.load_model(...).transcribe, which splits at pauses, or split it yourself"
        )
    return waveform


def _left_padded(rows: list[list[int]], padding: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
