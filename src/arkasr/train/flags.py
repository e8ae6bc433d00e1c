"""A program's command line, made from its Config: one flag a field, described by the docstring."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

ConfigT = TypeVar("ConfigT")


def parse_flags(config: type[ConfigT], argv: Sequence[str], *, program: str, about: str) -> ConfigT | None:
    """A program's Config from its command line: one flag a field, described by the class's docstring.

    Fields of a nested dataclass are flags of their own. With --dry-run the flags are checked and None is returned.
    """
    parser = argparse.ArgumentParser(prog=program, description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="check the flags and stop")
    _add_flags(parser, config)
    given = vars(parser.parse_args(argv))
    dry_run = given.pop("dry_run")
    made = _build(config, given)
    return None if dry_run else made


def _add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    hints = get_type_hints(config)
    for item in fields(config):
        hint = hints[item.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            _add_flags(parser, hint)
            continue
        flag, about = "--" + item.name.replace("_", "-"), described(config, item.name)
        many = hint == tuple[str, ...]
        kind = str if many else next((k for k in (bool, int, float, Path) if k in (hint, *get_args(hint))), str)
        default = _default(item)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=about)
            continue
        about = about if default in (MISSING, None, ()) else f"{about} (default {default})"
        required, shown = default is MISSING, None if default is MISSING else default
        shown = list(shown) if isinstance(shown, tuple) else shown
        choices = [choice for choice in get_args(hint) if isinstance(choice, str)] or None
        parser.add_argument(
            flag, type=kind, action="append" if many else "store", required=required, default=shown, help=about,
            choices=choices, metavar=None if choices else kind.__name__.upper(),
        )  # fmt: skip


def _default(item: "Field[Any]") -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def described(config: type[Any], name: str) -> str:
    """The line(s) of a field in the Attributes of the class or of one it extends, shared lines included."""
    pattern = re.compile(rf"^ +(?:\w+, )*{name}(?:, \w+)*: ((?:.+\n?)(?:^ {{12,}}.+\n?)*)", re.MULTILINE)
    found = next(filter(None, (pattern.search(owner.__doc__ or "") for owner in config.__mro__)), None)
    return " ".join(found[1].split()).rstrip(".").replace("%", "%%") if found else ""


def _build(config: type[ConfigT], given: Mapping[str, Any]) -> ConfigT:
    hints = get_type_hints(config)
    values = {}
    for item in fields(config):  # type: ignore[arg-type]
        hint = hints[item.name]
        value = _build(hint, given) if is_dataclass(hint) else given[item.name]  # type: ignore[arg-type]
        values[item.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)
