"""An OpenAI-compatible HTTP server over a Transcriber, its keys and usage, and one page to try it."""

import os
from pathlib import Path


def default_state() -> Path:
    """Where keys and usage live unless told otherwise: $XDG_STATE_HOME/arkasr, or ~/.local/state/arkasr."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "arkasr"
