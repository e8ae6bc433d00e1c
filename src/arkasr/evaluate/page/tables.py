"""Tables of a report, as HTML and as Markdown."""

import math
import re
from dataclasses import dataclass
from html import escape

from arkasr.errors import UsageError
from arkasr.evaluate.page.plots import shown, visible

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Numbers under names.

    Attributes:
        title: its caption.
        columns: their names, with units.
        rows: cells; numbers are set to the right, floats with two decimals or one digit, None as a dash.
        label: regime and normalizer of its numbers, or under what they were measured.
        note: what the reader must know.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    label: str
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise UsageError(f"table {self.title!r}: a row without {len(self.columns)} cells; give one for each column")


def html(table: Table) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    numeric = [all(not isinstance(row[n], str) for row in table.rows) for n in range(len(table.columns))]
    kinds = [' class="n"' if one else "" for one in numeric]
    head = "".join(f'<th scope="col"{kind}>{shown(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True))
    body = []
    for row in table.rows:
        first, *rest = (f"<bdi>{shown(_text(cell))}</bdi>" for cell in row)
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row"{kinds[0]}>{first}</th>{cells}</tr>')
    note = f'<p class="muted">{shown(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{shown(table.title)}, {shown(table.label)}"><table>'
        f'<caption>{shown(table.title)} <small class="label">{shown(table.label)}</small></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def markdown(table: Table) -> list[str]:
    """The lines of a table, its title and its note."""
    head = [f"**{plain(table.title)}** ({plain(table.label)})", ""]
    lines = [table.columns, *(tuple(map(_text, row)) for row in table.rows)]
    first, *rest = (f"| {' | '.join(map(plain, line))} |" for line in lines)
    note = [plain(table.note), ""] if table.note else []
    return [*head, first, "|" + " --- |" * len(table.columns), *rest, "", *note]


def plain(text: str) -> str:
    """Text for Markdown, where it must neither be markup nor end the line."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", " ".join(escape(visible(text), quote=False).split()))


def _text(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"  # noqa: RUF001
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float):
        if math.isinf(cell):
            return "∞" if cell > 0 else "-∞"
        return f"{cell:.2f}" if cell == 0 or abs(cell) >= 0.01 else f"{cell:.1g}"  # a p of 0.001 is not 0.00
    return f"{cell:,}"
