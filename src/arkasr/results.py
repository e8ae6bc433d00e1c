"""What a recognition says, and how it is written: txt and json, one function each, in one dict."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO


@dataclass(frozen=True)
class Transcript:
    """The recognition of one clip.

    Attributes:
        source: path or description of the audio.
        text: what was said.
        tokens: generated token ids without the stop id.
        duration_s: length of the audio.
        confidence: geometric mean probability of the generated tokens, in [0, 1]; 0 where nothing was generated.
        complete: False where the token cap ended the text before the model did.
        timings_s: wall seconds by stage; the network's stages are shared by the clips of a batch.
    """

    source: str
    text: str
    tokens: tuple[int, ...]
    duration_s: float
    confidence: float
    complete: bool = True
    timings_s: dict[str, float] = field(default_factory=dict)


Writer = Callable[[Transcript, TextIO], None]


def write_txt(transcript: Transcript, out: TextIO) -> None:
    """The text and a line end."""
    out.write(transcript.text + "\n")


def write_json(transcript: Transcript, out: TextIO) -> None:
    """One JSON object on one line."""
    record = {
        "file": transcript.source,
        "text": transcript.text,
        "tokens": list(transcript.tokens),
        "duration": round(transcript.duration_s, 4),
        "confidence": round(transcript.confidence, 4),
        "complete": transcript.complete,
        "timings": {stage: round(seconds, 4) for stage, seconds in transcript.timings_s.items()},
    }
    out.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_json_error(source: str, message: str, out: TextIO) -> None:
    """The line of a file that failed."""
    out.write(json.dumps({"file": source, "error": message}, ensure_ascii=False) + "\n")


WRITERS: dict[str, Writer] = {"txt": write_txt, "json": write_json}
