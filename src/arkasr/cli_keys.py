"""The part of the command line that is about who uses the server: keys create, list and revoke; usage."""

import sys
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from arkasr.audio import SAMPLE_RATE
from arkasr.server import accounts, default_state, keys

app = typer.Typer(help="API keys of the server.", no_args_is_help=True, rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]
StateOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="ARKASR_SERVER_STATE",
        show_envvar=False,
        help="The server's folder, as its --state.  [default: ~/.local/state/arkasr]",
    ),
]


@app.command("create")
def create(
    name: NameArgument,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests a minute.")] = None,
    audio_seconds_per_day: Annotated[float | None, typer.Option(help="Most seconds of audio a day, UTC.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Most requests at once.")] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="May be used; again for several.")] = None,
    price: Annotated[str | None, typer.Option(metavar="AMOUNT/UNIT", help="0.36/hour or 0.0001/second.")] = None,
    state: StateOption = None,
) -> None:
    """Make a key and print it, this once; running servers that need keys know it at once."""
    limits = keys.Limits(
        requests_per_minute=requests_per_minute,
        audio_seconds_per_day=audio_seconds_per_day,
        concurrent_requests=concurrent_requests,
        models=tuple(models) if models else None,
        price=keys.Price.parse(price) if price else None,
    )
    path = _file(state)
    is_first = keys.Keyring(path).is_empty
    _, secret = keys.create_key(path, name, limits)
    print(secret)
    print(f"ark-asr: only its hash is kept, in {path}; store the key now", file=sys.stderr)
    if is_first:
        print("ark-asr: servers that were started without keys go on without; restart them", file=sys.stderr)


@app.command("list")
def list_all(state: StateOption = None) -> None:
    """Show all keys: name, state, limits, price."""
    for key in keys.list_keys(_file(state)):
        limits = key.limits
        facts = (
            f"revoked {key.revoked}" if key.revoked else f"valid since {key.created}",
            f"{limits.requests_per_minute} requests/minute" if limits.requests_per_minute else "",
            f"{limits.audio_seconds_per_day:g} s of audio/day" if limits.audio_seconds_per_day else "",
            f"{limits.concurrent_requests} at once" if limits.concurrent_requests else "",
            f"models {', '.join(limits.models)}" if limits.models else "",
            f"price {limits.price}" if limits.price else "",
        )
        print(f"{key.name}: {'; '.join(filter(None, facts))}")


@app.command("revoke")
def revoke(name: NameArgument, state: StateOption = None) -> None:
    """End a key; running servers refuse it from now on."""
    key = keys.revoke_key(_file(state), name)
    print(f"ark-asr: the key of {key.name} is revoked", file=sys.stderr)


def usage(
    since: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day, UTC.")] = None,
    state: StateOption = None,
) -> None:
    """Print what each key used of each model, with its cost; tab-separated, the first line names the columns."""
    used = accounts.Accounts(state or default_state())
    lines = used.usage(since=since and since.date(), until=until and until.date())
    print("key", "model", "requests", "audio_seconds", "cost", sep="\t")
    for line in lines:
        seconds = accounts.decimal_text(Fraction(line.num_samples, SAMPLE_RATE))
        print(line.key, line.model, line.requests, seconds, accounts.decimal_text(line.cost), sep="\t")


def _file(state: Path | None) -> Path:
    return (state or default_state()) / keys.KEYS
