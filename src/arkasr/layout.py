"""Where the lines and cues of subtitles end: even lines, ends after punctuation and in pauses, graphemes kept whole."""

import re
import unicodedata
from collections.abc import Mapping
from itertools import accumulate

# Scripts that write no spaces between words: Thai, kana, Han.
SPACELESS = r"\u0e00-\u0e7f\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff65"
SPACELESS_CHARACTER = re.compile(rf"[{SPACELESS}]")


def columns(character: str) -> int:
    """Columns that a character takes on a screen."""
    if unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# Besides what categories tell: small kana, Thai vowels behind their consonant, skin tones; Thai vowels before theirs.
_NEVER_FIRST = frozenset("ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶ～ฯะาำๅ🏻🏼🏽🏾🏿")  # noqa: RUF001
_NEVER_LAST = frozenset("เแโใไ\"'")
_WORD_KINDS = frozenset(("Lu", "Ll", "Nd"))  # wide digits and letters make numbers and words, too


def _may_end_line(text: str, cut: int) -> bool:
    """Whether a line may end before text[cut]: after a space, or beside a character of a script without spaces."""
    before, after = text[cut - 1], text[cut]
    if " " in {before, after}:
        return before == " "
    kinds = unicodedata.category(before), unicodedata.category(after)
    return (
        bool(SPACELESS_CHARACTER.match(before) or SPACELESS_CHARACTER.match(after))
        and not _WORD_KINDS.issuperset(kinds)
        # Marks and joiners belong to the character before them, and a joiner takes the one after it, too.
        and kinds[0] not in {"Cf", "Ps", "Pi"}
        and kinds[1] not in {"Cf", "Mn", "Mc", "Me", "Lm", "Pd", "Pe", "Pf", "Po"}
        and before not in _NEVER_LAST
        and after not in _NEVER_FIRST
    )


# What a break costs in a long pause, after a sentence, after other punctuation, at a space, and between two characters;
# the scale is that of an empty line, 1, so that nothing is worth as much as a cue's end in a long pause.
_LINE_BREAK_COSTS = (0.0, 0.0, 0.05, 0.15, 0.4)
_CUE_BREAK_COSTS = (-2.0, 0.3, 0.4, 0.7, 1.0)
LONG_PAUSE_S, PAUSE_S = 1.0, 0.3  # the one ends a cue, the other is as good as the end of a sentence
_SENTENCE_ENDS = tuple(".!?…。！？؟۔।")  # noqa: RUF001
_CLOSERS = "\"'”’」』）)]】》"  # noqa: RUF001


def _rank(text: str, cut: int, pause_s: float) -> int:
    """Which of the break costs it is."""
    if pause_s >= LONG_PAUSE_S:
        return 0
    before = text[max(0, cut - 4) : cut].rstrip(" ")
    if pause_s >= PAUSE_S or before.rstrip(_CLOSERS).endswith(_SENTENCE_ENDS):
        return 1
    if unicodedata.category(before[-1]).startswith("P"):
        return 2
    return 3 if text[cut - 1] == " " else 4


def lay_out(text: str, max_width: int, max_count: int, pauses_s: Mapping[int, float]) -> list[tuple[str, ...]]:
    """Lines of each cue: the cheapest layout, which is even, ends lines after punctuation, and has few lines and cues.

    A line wider than allowed is one that may not be cut anywhere.

    Args:
        text: on one line, without white space around it.
        max_width: columns of a line.
        max_count: lines of a cue.
        pauses_s: where they are known, seconds of silence before text[cut].
    """
    cuts = [0, *(cut for cut in range(1, len(text)) if _may_end_line(text, cut)), len(text)]
    ranks = [0, *(_rank(text, cut, pauses_s.get(cut, 0.0)) for cut in cuts[1:])]
    edges = [0, *accumulate(map(columns, text))]
    # best[cut][row]: least cost of the text up to there, its last line being number `row` of its cue; where this
    # line starts, and the row of the line above.
    best: list[dict[int, tuple[float, int, int]]] = [{-1: (0.0, 0, -1)}]
    for end in range(1, len(cuts)):
        rows: dict[int, tuple[float, int, int]] = {}
        for start in reversed(range(end)):
            line = text[cuts[start] : cuts[end]].rstrip(" ")
            width = edges[cuts[start] + len(line)] - edges[cuts[start]]
            if width > max_width and start < end - 1:
                break
            slack = max(0, 1 - width / max_width) ** 2
            for above, (cost, _, _) in best[start].items():
                new_cue = (cost + slack + _CUE_BREAK_COSTS[ranks[start]], start, above)
                rows[0] = min(rows.get(0, new_cue), new_cue)
                # A number alone below other text would be taken for the next cue's.
                if above + 1 < max_count and not line.isdigit():
                    new_line = (cost + slack + _LINE_BREAK_COSTS[ranks[start]], start, above)
                    rows[above + 1] = min(rows.get(above + 1, new_line), new_line)
        best.append(rows)
    end = len(cuts) - 1
    row = min(best[end], key=lambda row: best[end][row])
    cues: list[tuple[str, ...]] = [()]
    while end:
        _, start, above = best[end][row]
        cues[0] = (text[cuts[start] : cuts[end]].rstrip(" "), *cues[0])
        if row == 0 and start:
            cues.insert(0, ())
        end, row = start, above
    return cues
