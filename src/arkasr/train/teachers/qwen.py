"""A teacher that is a Qwen3-ASR checkpoint, run by the classes of transformers.

    clips -> processor -> prompts and log-mels -> encoder, each clip once -> one row a rollout, its prompt before it ->
    decoder -> logits at the wanted columns

Unusual: log-mels are made clip by clip and padded as such. transformers pads waveforms, and then the last frames of a
clip would depend on how long its neighbours are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arkasr import files
from arkasr.audio import Waveform
from arkasr.engines.pytorch import DTYPES
from arkasr.errors import CheckpointMismatchError, MissingExtraError, ModelNotFoundError, UsageError, quoted
from arkasr.text import TextRules
from arkasr.train import losses
from arkasr.train.teachers import Capabilities, Request, Scores, language_name
from arkasr.train.teachers.spans import Row, Spans, TeacherTokens, TokenMap

ASR_TEXT = "<asr_text>"  # between language and transcript; a tokenizer that has it is Qwen3-ASR's
ROW_TOKENS = 16_384  # of a pass through the decoder, padding included
CHUNK = 512  # positions whose logits over the whole vocabulary are in memory at once


def told(language: str | None) -> str:
    """The name of a record's language; untold, Qwen3-ASR says it first, where the student's transcript begins.

    Raises:
        UsageError: there is none, or none that it was trained on.
    """
    if language is None:
        raise UsageError("a record has no language, which Qwen3-ASR must be told; give each record its language")
    return language_name(language)


class QwenTeacher:
    """Scores what a student said, over the teacher's whole vocabulary; see `Teacher`."""

    def __init__(self, network: Any, processor: Any, student: TextRules) -> None:
        """A teacher over a Qwen3ASRForConditionalGeneration in memory and its processor.

        Raises:
            CheckpointMismatchError: its tokenizer cannot be mapped to the student's.
        """
        self.network, self.processor = network.eval().requires_grad_(requires_grad=False), processor
        width = network.config.text_config.vocab_size
        teacher = TeacherTokens(processor.tokenizer.backend_tokenizer, place="teacher")
        self.tokens = TokenMap(student, teacher, width=width)
        self._allowed = teacher.allowed(width).to(network.device)
        self.capabilities = Capabilities(any_ids=True, any_temperature=True, max_top_k=width, exact_vocabulary=False)

    @classmethod
    def load(cls, folder: Path, student: TextRules, *, device: str, dtype: str) -> "QwenTeacher":
        """The teacher in a folder, from safetensors alone and without code of its own.

        Raises:
            MissingExtraError: transformers is not installed, or too old.
            ModelNotFoundError: a file is missing.
            CheckpointMismatchError: files that contradict each other, or not the layout that transformers reads.
        """
        try:
            from transformers import Qwen3ASRForConditionalGeneration, Qwen3ASRProcessor
        except ImportError as error:
            raise MissingExtraError(
                f"{folder}: Qwen3-ASR needs transformers ({quoted(str(error))}); pip install 'transformers>=5.23'"
            ) from None
        if "thinker_config" in files.read_json(folder / files.CONFIG):
            raise CheckpointMismatchError(f"{folder}: in Qwen's own layout; fetch the -hf one, as Qwen3-ASR-0.6B-hf")
        for name in (files.TOKENIZER, "chat_template.jinja"):
            files.check(folder / name)
        try:
            processor = Qwen3ASRProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            network, loaded = Qwen3ASRForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=DTYPES[dtype],
                output_loading_info=True,
            )  # fmt: skip
        except OSError as error:
            raise ModelNotFoundError(f"{folder}: a file is missing ({quoted(str(error))}); fetch it again") from None
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise CheckpointMismatchError(f"{folder}: not loaded ({quoted(str(error))}); fetch it again") from None
        for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if loaded[fault]:  # transformers would make missing weights up and say so in a log
                raise CheckpointMismatchError(f"{folder}: {fault} {quoted(sorted(loaded[fault]))}; fetch it again")
        return cls(network.to(device), processor, student)

    @torch.no_grad()
    def score(self, request: Request) -> Scores:
        """Log-probabilities wherever the teacher's tokens meet the student's; raises as `told` does."""
        spans = Spans(request, self.tokens)
        rows = [row for row in spans.rows if row.columns]
        audible = sorted({row.clip for row in rows})
        prompts, audio = self._hear(
            [request.waveforms[clip] for clip in audible], [request.languages[clip] for clip in audible]
        )
        place = {clip: number for number, clip in enumerate(audible)}
        device = self.network.device
        hidden = [
            self._hidden(some, [prompts[place[row.clip]] for row in some], [audio[place[row.clip]] for row in some])
            for some in _groups(rows, [len(prompts[place[row.clip]]) for row in rows])
        ]
        asked = None if spans.asked is None else spans.asked.to(device)
        dim = self.network.config.text_config.hidden_size
        states = torch.cat(hidden) if hidden else torch.zeros(0, dim, dtype=self.network.dtype, device=device)
        chunks = [
            self._top(states[begin : begin + CHUNK], None if asked is None else asked[begin : begin + CHUNK], request)
            for begin in range(0, max(len(states), 1), CHUNK)
        ]
        ids, own, others = zip(*chunks, strict=True)
        return spans.scores(torch.cat(ids), torch.cat(own), None if asked is None else torch.cat(others))

    def _hear(
        self, waveforms: Sequence[Waveform], languages: Sequence[str | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The prompt's ids [P] and the audio's embeddings [A, D] of each clip; the encoder hears each once."""
        if not waveforms:
            return [], []
        inputs = [
            self.processor.apply_transcription_request(audio=[waveform], language=[told(language)])
            for waveform, language in zip(waveforms, languages, strict=True)
        ]
        longest = max(one["input_features"].shape[-1] for one in inputs)

        def padded(name: str) -> Tensor:
            return torch.cat([F.pad(one[name], (0, longest - one[name].shape[-1])) for one in inputs])

        device, dtype = self.network.device, self.network.dtype
        features = self.network.model.get_audio_features(
            padded("input_features").to(device, dtype), padded("input_features_mask").to(device), return_dict=True
        ).pooler_output  # [all A, D]
        prompts = [one["input_ids"][0].to(device) for one in inputs]
        counts = [int((prompt == self.network.config.audio_token_id).sum()) for prompt in prompts]
        return prompts, list(torch.split(features, counts))

    def _hidden(self, rows: Sequence[Row], prompts: Sequence[Tensor], audio: Sequence[Tensor]) -> Tensor:
        """The decoder's last states at the wanted columns of some rows, in order, [m, D]."""
        device = self.network.device
        sequences = [
            torch.cat([prompt, torch.tensor(row.ids, dtype=torch.long, device=device)])
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self.tokens.teacher.stop_id)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        embeddings = self.network.get_input_embeddings()(ids)
        embeddings[ids == self.network.config.audio_token_id] = torch.cat(list(audio)).to(embeddings.dtype)
        states = self.network.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state  # [B, T, D]
        at = [
            (number, len(prompt) - 1 + column)
            for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
            for column in row.columns
        ]
        wanted, columns = torch.tensor(at, device=device).T
        return states[wanted, columns]  # type: ignore[no-any-return]

    def _top(self, states: Tensor, asked: Tensor | None, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's own ids and their log-probabilities [m, k], and those of the asked ids [m, S]."""
        logprobs = losses.log_probs(self.network.lm_head(states), self._allowed, request.temperature)
        own = losses.top_k_ids(logprobs, min(request.top_k, logprobs.shape[-1]))
        others = own[:, :0] if asked is None else asked.clamp(min=0)
        return own, logprobs.gather(-1, own), logprobs.gather(-1, others)


def _groups(rows: Sequence[Row], prompt_tokens: Sequence[int]) -> Iterator[list[Row]]:
    """Rows in order, as many at a time as fit into ROW_TOKENS once they are padded."""
    group: list[Row] = []
    longest = 0
    for row, before in zip(rows, prompt_tokens, strict=True):
        longest = max(longest, before + len(row.ids))
        if group and longest * (len(group) + 1) > ROW_TOKENS:
            yield group
            group, longest = [], before + len(row.ids)
        group.append(row)
    if group:
        yield group
