"""A teacher behind a chat endpoint as vLLM serves it: the log-probabilities of a prompt that ends in the rollout.

    clip and rollout -> one request, the assistant's turn begun with the rollout -> prompt_logprobs at its tokens, and
    logprobs of the one token that is generated for the place behind them

Unusual: an answer is taken only where its tokens are those that were asked about. A server whose chat template drops
or trims the begun turn answers as readily, about another text.
"""

import base64
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arkasr import endpoint
from arkasr.audio import SAMPLE_RATE, Waveform
from arkasr.endpoint import KEY_VARIABLE, Client
from arkasr.errors import NoAnswerError, UsageError, quoted
from arkasr.text import INSTRUCTION, TextRules
from arkasr.train.teachers import Capabilities, Request, Scores, language_name
from arkasr.train.teachers.qwen import ASR_TEXT, told
from arkasr.train.teachers.spans import Row, Spans, TeacherTokens, TokenMap

MAX_TOP_K = 20  # what vLLM gives unless it is started with more --max-logprobs
TIMEOUT_S = 120.0
TEMPLATE = "start the server with a chat template that continues the assistant's turn"

Entry = tuple[int, float]  # the teacher's id and its log-probability


class HttpTeacher:
    """Scores what a student said, by the teacher's own most probable ids; see `Teacher`."""

    capabilities = Capabilities(any_ids=False, any_temperature=False, max_top_k=MAX_TOP_K, exact_vocabulary=False)

    def __init__(self, name: str, student: TextRules, tokenizer: Path, *, parallel: int = 16) -> None:
        """The model of an address `http://HOST/v1#MODEL`; its key, if it has one, by the environment.

        Args:
            name: the address.
            student: whose ids are scored.
            tokenizer: of the model, a folder with tokenizer.json or the file itself.
            parallel: requests at a time.

        Raises:
            UsageError: no such address.
            ModelNotFoundError, CheckpointMismatchError: the tokenizer cannot be used.
        """
        self._url, self._model = endpoint.place(name)
        self._parallel = parallel
        teacher = TeacherTokens.load(tokenizer)
        self._is_qwen = ASR_TEXT in teacher.added
        self._width = len(teacher.bytes)
        self.tokens = TokenMap(student, teacher, width=self._width)

    def probe(self) -> None:
        """Ask once about half a second of silence, before anything depends on the answers.

        Raises:
            UsageError: no answer, or not of the needed kind.
        """
        text = "a b "  # a template may trim
        ids = self.tokens.teacher.encode(text)
        silence = np.zeros(SAMPLE_RATE // 2, np.float32)
        with closing(self._client()) as client:
            self._ask(client, Row(0, text, ids, tuple(range(len(ids) + 1))), _wav(silence), "en", top_k=2)

    def score(self, request: Request) -> Scores:
        """Log-probabilities of the teacher's own ids wherever its tokens meet the student's.

        Raises:
            UsageError: more is asked than `capabilities` allow, a record lacks its language, or the endpoint fails.
        """
        if request.support is not None or request.temperature != 1 or request.top_k > MAX_TOP_K:
            raise UsageError(f"{self._url}: gives its own {MAX_TOP_K} ids at temperature 1; choose support teacher")
        spans = Spans(request, self.tokens, lambda _, text: self._sendable(text))
        rows = [row for row in spans.rows if row.columns]
        audio = {clip: _wav(request.waveforms[clip]) for clip in {row.clip for row in rows}}
        with closing(self._client()) as client:

            def ask(row: Row) -> list[list[Entry]]:
                return self._ask(client, row, audio[row.clip], request.languages[row.clip], top_k=request.top_k)

            answers = [entries for answer in client.each(ask, rows) for entries in answer]
        pairs = torch.tensor(answers, dtype=torch.float64).reshape(-1, request.top_k, 2)
        return spans.scores(pairs[:, :, 0].long(), pairs[:, :, 1].float(), None)

    def _client(self) -> Client:
        return Client(self._url, key_variable=KEY_VARIABLE, parallel=self._parallel, timeout_s=TIMEOUT_S)

    def _opening(self, language: str | None) -> str:
        """How the assistant's turn begins before the transcript."""
        return f"language {told(language)}{ASR_TEXT}" if self._is_qwen else ""

    def _sendable(self, text: str) -> str:
        """A text up to where the server would read a special token, or trim or join white space at its turn's start."""
        if not text[:1].strip() and not self._is_qwen:
            return ""
        ends = [place for place in map(text.find, self.tokens.teacher.added) if place >= 0]
        return text[: min(ends, default=len(text))]

    def _body(self, row: Row, audio: str, language: str | None, *, top_k: int) -> dict[str, Any]:
        """The request; the fields are those of vLLM's ChatCompletionRequest."""
        content: list[dict[str, Any]] = [{"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}]
        begun = self._opening(language) + row.text
        if not self._is_qwen:
            hint = "" if language is None else f" It is in {language_name(language)}."
            content.append({"type": "text", "text": INSTRUCTION + hint})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if begun:
            messages.append({"role": "assistant", "content": begun})
        return {
            "model": self._model, "messages": messages,
            "add_generation_prompt": not begun, "continue_final_message": bool(begun),
            "prompt_logprobs": top_k, "logprobs": True, "top_logprobs": top_k, "max_completion_tokens": 1,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
            "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0,
        }  # fmt: skip

    def _ask(self, client: Client, row: Row, audio: str, language: str | None, *, top_k: int) -> list[list[Entry]]:
        """The k most probable entries at each wanted column of a row."""
        body = self._body(row, audio, language, top_k=top_k)
        try:
            answer = client.ask("chat/completions", json=body)
        except NoAnswerError as error:
            raise UsageError(f"{self._url}: {error}; look after server and model, then resume") from None
        try:
            ids, prompt = answer["prompt_token_ids"], answer["prompt_logprobs"]
            behind = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            first = len(ids) - len(row.ids)
            spells = len(prompt) == len(ids) and first > 0 and tuple(ids[first:]) == row.ids
            found = [
                [(int(token_id), float(entry["logprob"])) for token_id, entry in prompt[first + column].items()]
                if column < len(row.ids)
                else [(int(entry["token"].removeprefix("token_id:")), float(entry["logprob"])) for entry in behind]
                for column in (row.columns if spells else ())
            ]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(
                f"{self._url}: the answer lacks prompt_token_ids, prompt_logprobs or logprobs as vLLM gives them "
                f"({type(error).__name__}: {error}); serve the teacher by a vLLM that gives them"
            ) from None
        if not spells:
            raise UsageError(
                f"{self._url}: its tokens are not those of {quoted(row.text)}; {TEMPLATE}, and give its tokenizer"
            )
        return [self._best(entries, top_k) for entries in found]

    def _best(self, entries: Sequence[Entry], top_k: int) -> list[Entry]:
        """The k most probable entries, filled up with impossible ones; vLLM adds the prompt's own token to its k."""
        for token_id, logprob in entries:
            if not 0 <= token_id < self._width or math.isnan(logprob):
                raise UsageError(f"{self._url}: answers {token_id}: {logprob}; give the tokenizer of its model")
        best = sorted(entries, key=lambda entry: (-entry[1], entry[0]))[:top_k]
        return best + [(self.tokens.teacher.stop_id, -math.inf)] * (top_k - len(best))


def _wav(waveform: Waveform) -> str:
    return base64.b64encode(endpoint.encode(waveform, "wav")).decode()
