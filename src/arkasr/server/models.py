"""The models of a server: loaded when first asked for, shared by all requests, freed after a time without any.

Those of a back end are names, and nothing is loaded.
"""

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from arkasr import engines, hub
from arkasr.checkpoint import Checkpoint, open_checkpoint
from arkasr.engines.shared import Observe, SharedEngine, Turns
from arkasr.errors import UsageError
from arkasr.server.backend import BackEnd, RemoteEngine
from arkasr.server.openai import Refusal
from arkasr.server.settings import Settings
from arkasr.text import TextRules

BATCH_SIZE = 4  # spans that a request asks for at once; the engine fills its rows with those of others


@dataclass(frozen=True)
class Loaded:
    """A model in memory, or at a back end.

    Attributes:
        name: its own.
        shared: what recognizes.
        rules: of its tokens; None at a back end, which tells none.
        batch_size: spans that a request asks for at once.
    """

    name: str
    shared: SharedEngine
    rules: TextRules | None
    batch_size: int = BATCH_SIZE


@dataclass
class _Place:
    """Where a model is, or will be: here, or at the back end."""

    name: str
    source: Checkpoint | RemoteEngine
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    loaded: Loaded | None = None
    users: int = 0
    used: float = 0.0


class Models:
    """Models by name."""

    def __init__(self, settings: Settings, observe: Callable[[str], Observe]) -> None:
        """Find all models and read all but their weights; `observe` makes the observer of one's engine.

        Raises:
            ModelNotFoundError: one is neither here nor to be had.
            CheckpointMismatchError: one is damaged.
            UsageError: an alias names no model, or settings do not go together.
        """
        settings.check_engine()
        self._settings, self._observe = settings, observe
        self._back_end = _back_end(settings)
        self._turns = Turns(max(1, (os.cpu_count() or 2) - 1))  # for all requests; an engine has the other core
        names = list(dict.fromkeys(settings.model or [hub.default_model()]))
        if self._back_end is None:
            self._places = {short_name(name): _Place(short_name(name), _opened(name, settings)) for name in names}
        else:
            self._places = {name: _Place(name, self._back_end.engine(name)) for name in names}
        if len(self._places) < len(names):
            raise UsageError(f"model: two of {', '.join(names)} have the same name; rename a folder")
        self._aliases: dict[str, str] = {}
        for alias in settings.alias:
            other, _, name = alias.partition("=")
            if not other or name not in self._places or other in self._places:
                raise UsageError(f"alias {alias}: give NAME=MODEL with a MODEL of {', '.join(self._places)}")
            self._aliases[other] = name

    @property
    def names(self) -> Sequence[str]:
        """Of the models, and their aliases."""
        return [*self._places, *self._aliases]

    @property
    def default(self) -> str:
        """The first model, for routes that name none."""
        return next(iter(self._places))

    def resolve(self, name: str) -> str:
        """A model's own name.

        Raises:
            Refusal: there is none of that name.
        """
        name = self._aliases.get(name, name)
        if name not in self._places:
            raise Refusal(
                404,
                f"The model {name[:200]!r} does not exist; this server has {', '.join(self.names)}",
                code="model_not_found",
                param="model",
            )
        return name

    def is_here(self, name: str) -> bool:
        """Whether a model, by its own name, is of this machine, and not of a back end."""
        return isinstance(self._places[name].source, Checkpoint)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Loaded]:
        """A model, loaded while it is used."""
        place = self._places[self.resolve(name)]
        place.users += 1
        try:
            async with place.lock:
                if place.loaded is None:
                    place.loaded = await asyncio.to_thread(self._load, place)
            yield place.loaded
        finally:
            place.users -= 1
            place.used = time.monotonic()

    async def unload_idle(self) -> None:
        """Free the models that nobody has used for the set time."""
        for place in self._places.values():
            idle_s = time.monotonic() - place.used
            if place.loaded is None or place.users or not 0 < self._settings.unload_after_s <= idle_s:
                continue
            loaded, place.loaded = place.loaded, None
            await asyncio.to_thread(loaded.shared.close)
            del loaded
            gc.collect()

    async def state(self) -> dict[str, str]:
        """Of each model, whether it is loaded; of a back end's, whether that answers."""
        if self._back_end is not None and not await self._back_end.lives():
            return dict.fromkeys(self._places, "unreachable")
        return {name: "ready" if place.loaded else "unloaded" for name, place in self._places.items()}

    def num_waiting(self) -> int:
        """Clips that wait for an engine."""
        return sum(place.loaded.shared.num_waiting for place in self._places.values() if place.loaded)

    def close(self) -> None:
        """Stop all engines."""
        for place in self._places.values():
            if place.loaded is not None:
                place.loaded.shared.close()
            if isinstance(place.source, RemoteEngine):
                place.source.close()

    def _load(self, place: _Place) -> Loaded:
        source, settings, observe = place.source, self._settings, self._observe(place.name)
        if isinstance(source, RemoteEngine):
            return Loaded(place.name, SharedEngine(source, turns=self._turns, observe=observe), None, source.parallel)
        engine = engines.load_engine(source, name=settings.engine, device=settings.device, dtype=settings.dtype)
        return Loaded(place.name, SharedEngine(engine, turns=self._turns, observe=observe), source.rules)


def short_name(model: str) -> str:
    """What clients call a model: a built-in or hub name as it is, the last part of a folder's path."""
    return Path(model).name if Path(model).is_dir() else model


def _back_end(settings: Settings) -> BackEnd | None:
    if settings.engine != "openai":
        return None
    assert settings.base_url is not None
    return BackEnd(
        settings.base_url,
        key_variable=settings.api_key_env,
        parallel=settings.parallel,
        request_s=settings.request_timeout_s,
    )


def _opened(name: str, settings: Settings) -> Checkpoint:
    return open_checkpoint(hub.pull(name, offline=settings.offline))
