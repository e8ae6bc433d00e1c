"""Where a report finds the audio of an utterance: beside itself, elsewhere on this machine, or inside the page."""

import base64
import os
from pathlib import Path
from urllib.parse import quote

CLIP_BYTES = 2**20  # embedded are files of at most this size, ...
EMBEDDED_BYTES = 64 * 2**20  # ... and no more in all; browsers open what is larger with difficulty
KINDS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mpeg"}  # how a file begins that may be embedded


class Sounds:
    """Finds them for a report in `folder`; small clips become part of the page when asked, until it is full."""

    def __init__(self, folder: Path, *, embed: bool) -> None:
        self._folder = folder.absolute()
        self._left = EMBEDDED_BYTES if embed else 0

    def find(self, name: object) -> dict[str, str] | None:
        """{"url": ...}, or {"missing": name} where no such file is; None where the manifest names none."""
        if not isinstance(name, str) or not name:
            return None
        path = self._folder / name
        try:
            if not path.is_file():
                return {"missing": name}
            return {"url": self._embedded(path) or self._linked(path)}
        except (OSError, ValueError):  # not allowed to look, or a name that cannot be one
            return {"missing": name}

    def _linked(self, path: Path) -> str:
        return "./" + quote(Path(os.path.relpath(path, self._folder)).as_posix())

    def _embedded(self, path: Path) -> str | None:
        size = path.stat().st_size
        if size > min(CLIP_BYTES, self._left):
            return None
        content = path.read_bytes()
        kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), None)
        if kind is None:  # a manifest may name any file, and a report is sent to others
            return None
        self._left -= size
        return f"data:audio/{kind};base64,{base64.b64encode(content).decode()}"
