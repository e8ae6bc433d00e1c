"""Every mistake a user can make raises one of these; each is also the standard error a caller would expect."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def quoted(value: object) -> str:
    """`repr` in one short line: how a message quotes what somebody else wrote, be it nested, huge or binary."""
    return _SHORT.repr(value)


class ArkASRError(Exception):
    """Base of all errors that arkasr raises on purpose; the message names the thing, the place and the remedy."""


class AudioError(ArkASRError, ValueError):
    """The audio cannot be read, is empty, damaged, or outside what the recognizer takes."""


class ModelNotFoundError(ArkASRError, FileNotFoundError):
    """No model of that name, or a folder that lacks a needed file."""


class CheckpointMismatchError(ArkASRError, ValueError):
    """A checkpoint's config, tokenizer or tensors contradict each other or the architecture."""


class MissingExtraError(ArkASRError, ImportError):
    """The call needs an optional dependency that is not installed."""


class NoAnswerError(ArkASRError):
    """One request to an endpoint got no answer that can be read; others may get theirs."""


class UsageError(ArkASRError, ValueError):
    """An option, manifest or argument has a value that cannot be used."""
