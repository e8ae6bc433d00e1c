"""Reports: nothing hostile gets out of its place, nothing is asked of elsewhere, and every number says what it is."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from arkasr.errors import UsageError
from arkasr.evaluate.manifest import Manifest, Row
from arkasr.evaluate.page import plots, sounds, tables
from arkasr.evaluate.report import Plot, Report, Section, Series, System, Table, write
from arkasr.evaluate.score import SetScore, score
from arkasr.metrics.normalize import Normalizer

WORDS = Normalizer(
    "plain", "word", merge_compounds=True, text=lambda t: t.lower().replace("\ud800", ""), tokens=str.split
)
LETTERS = Normalizer(
    "letters", "character", merge_compounds=False, text=str.lower, tokens=lambda t: [*t.replace(" ", "")]
)
HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(1)> & \u202eturned\u202c \u2028 \x07 | `a` ]]> -->"
)


def row(name: str, text: str, pred_text: str, **x: Any) -> Row:
    return Row(f"{name}.wav", 2.5, 0.1, text, pred_text, x={"id": name, **x})


def scored(rows: Sequence[Row], name: str = "dev", *, normalizer: Normalizer = WORDS) -> SetScore:
    return score(Manifest(Path("m.jsonl"), tuple(rows)), normalizer, name=name, regime=None)


def system(*scores: SetScore, name: str = "ark 0.6b", **changes: Any) -> System:
    return replace(System(name, {"engine": "onnx"}, scores, (WORDS, LETTERS)), **changes)


ROWS = (
    row("a", "the cat sat", "the bat sat", speaker="s1"),
    row("b", "on the mat", "on the the mat", speaker="s2", flags=["loop"]),
    row("c", "white paper here now", "whitepaper here", speaker="s1"),
    row("d", "all is well", "all is well", speaker="s2"),
    row("e", "not heard", "", speaker="s2", error="the decoder failed"),
)


def small() -> Report:
    curve = Series("ark", (1.0, 2.0, 4.0), (10.0, None, 30.0), (9.0, None, 20.0), (11.0, None, float("inf")))
    plot = Plot("curves", "Speed", "batch", "RTFx", (curve,), "one H200", log_x=True)
    table = Table(
        "Slices", ("Slice", "WER %"), (("0 to 1 s", 3.14159), ("1 to 2 s", None)), "none, plain", "Small cells."
    )
    return Report("Two sets", (system(scored(ROWS)),), (Section("More", "Of it.", (table,), (plot,)),), ("A note.",))


def written(report: Report, folder: Path, **options: bool) -> tuple[str, str, dict[str, Any]]:
    write(report, folder, **options)
    html, markdown, text = ((folder / f"report.{end}").read_text(encoding="utf-8") for end in ("html", "md", "json"))
    assert {path.name for path in folder.iterdir()} >= {"report.html", "report.md", "report.json"}
    return html, markdown, json.loads(text)


class Parsed(HTMLParser):
    """Elements with their attributes, the text of each script and style, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inner: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inner.append((self.cdata_elem, data))
        else:
            self.text += data

    def joined(self, tag: str, nth: int) -> str:
        """Text of the nth element of a kind; the parser may hand it out in pieces."""
        return [part for part in self.inner if part[0] == tag][nth][1]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.joined("script", 0))  # type: ignore[no-any-return]


def test_the_three_files_tell_the_same(tmp_path: Path) -> None:
    html, markdown, everything = written(small(), tmp_path / "new" / "folder")
    one = everything["systems"][0]["sets"][0]
    # by hand: 1 sub, 1 ins, (white paper is one word) 1 del, 2 del of 15 words
    assert one["counts"] == {"insertions": 1, "deletions": 3, "substitutions": 1, "reference_words": 15}
    assert (one["percent"], one["failed"], one["regime"]) == (33.33, 1, "none")
    assert "33.33" in Parsed(html).text
    assert "33.33" in markdown
    assert Parsed(html).data == everything["utterances"]
    assert everything["sections"][0]["plots"][0]["series"][0]["high"] == [11.0, None, None]
    for content in (Parsed(html).text, markdown):
        for shown in ("A note.", "3.14", "Small cells.", "0 to 1 s", "one H200", "plain", "onnx", "Of it."):
            assert shown in content
    assert "| Slice | WER % |\n| --- | --- |\n| 0 to 1 s | 3.14 |" in markdown


def test_utterances_carry_their_alignment(tmp_path: Path) -> None:
    a, b, c, d, e = (one["systems"][0] for one in Parsed(written(small(), tmp_path)[0]).data["rows"])
    assert a["edits"] == ["the", ["s", "cat", "bat"], "sat"]
    assert [edit[0] for edit in b["edits"] if isinstance(edit, list)] == ["i"]
    assert c["edits"] == [["c", "white paper", "whitepaper"], "here", ["d", "now", ""]]
    assert (c["compounds"], c["del"], d["edits"]) == (1, 1, ["all is well"])
    assert (b["flags"], e["flags"], e["error"]) == (["loop"], ["failed"], "the decoder failed")


def test_a_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = [row(HOSTILE, HOSTILE, f"{HOSTILE} \ud800", speaker=HOSTILE, flags=[HOSTILE], error=HOSTILE, audio=HOSTILE)]
    table = Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, 1),), HOSTILE, HOSTILE)
    plot = Plot("points", HOSTILE, HOSTILE, HOSTILE, (Series(HOSTILE, (HOSTILE,), (1.0,)),), HOSTILE)
    made = replace(system(scored(rows, HOSTILE), name=HOSTILE), facts={HOSTILE: HOSTILE})
    html, markdown, everything = written(
        Report(HOSTILE, (made,), (Section(HOSTILE, HOSTILE, (table,), (plot,)),), (HOSTILE,)), tmp_path
    )
    page, harmless = Parsed(html), Parsed(written(small(), tmp_path)[0])
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in harmless.elements} | {"polygon", "title"}
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search("[\u2028\u202e\x07]", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    assert page.data["rows"][0]["reference"] == HOSTILE
    assert page.data == everything["utterances"]
    assert "<" not in markdown
    table_lines = [line for line in markdown.splitlines() if "U+202E" in line and line.startswith("| ")]
    assert len(table_lines) >= 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table_lines}) == 3  # summary, table, plot


def test_a_page_asks_nothing_of_anybody(tmp_path: Path) -> None:
    page = Parsed(written(small(), tmp_path)[0])
    urls = [
        value for _, attributes in page.elements for name, value in attributes.items()
        if name in {"src", "href", "action", "data", "poster", "srcset", "formaction", "xlink:href"}
    ]  # fmt: skip
    assert all(url is not None and (url.startswith("#") or url == "data:,") for url in urls)
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {url[1:] for url in urls if url and url.startswith("#")} <= ids
    assert not any("style" in attributes for _, attributes in page.elements)
    for tag in ("script", "style"):
        assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp|innerHTML|eval\(", page.joined(tag, -1))


def test_the_policy_lets_run_what_the_page_has_and_no_more(tmp_path: Path) -> None:
    page = Parsed(written(small(), tmp_path)[0])
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "content" in a and "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert (rules["default-src"], rules["base-uri"], rules["form-action"]) == ("'none'", "'none'", "'none'")
    assert rules["media-src"] == "'self' file: data:"
    for tag, nth in (("script", 1), ("style", 0)):
        digest = hashlib.sha256(page.joined(tag, nth).encode()).digest()
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(small(), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_two_systems_meet_by_utterance(tmp_path: Path) -> None:
    others = [replace(ROWS[3], pred_text="all is bell"), ROWS[0], row("z", "new", "knew")]
    report = replace(small(), systems=(system(scored(ROWS)), system(scored(others), name="other")))
    data = Parsed(written(report, tmp_path)[0]).data
    assert data["systems"] == ["ark 0.6b", "other"]
    heard = {one["id"]: [None if s is None else s["text"] for s in one["systems"]] for one in data["rows"]}
    assert heard["d"] == ["all is well", "all is bell"]
    assert heard["a"] == ["the bat sat"] * 2
    assert heard["b"] == ["on the the mat", None]
    assert heard["z"] == [None, "knew"]


def test_one_file_may_hold_several_utterances(tmp_path: Path) -> None:
    rows = [Row("call.wav", n, 0.1, f"text {n}", f"text {n}") for n in range(1, 4)]
    data = Parsed(written(Report("Calls", (system(scored(rows)),)), tmp_path)[0]).data
    assert [one["systems"][0]["text"] for one in data["rows"]] == ["text 1", "text 2", "text 3"]


def _unlabelled(report: Report) -> Report:
    return replace(report, sections=(Section("s", "", (Table("t", ("a",), ((1,),), ""),)),))


def _without_regime(report: Report) -> Report:
    return replace(report, systems=(system(replace(scored(ROWS), regime=None)),))


def _unlike(report: Report) -> Report:
    return replace(report, systems=(system(scored(ROWS)), system(scored(ROWS, normalizer=LETTERS), name="other")))


def _other_regime(report: Report) -> Report:
    return replace(report, systems=(system(scored(ROWS)), system(replace(scored(ROWS), regime="D"), name="other")))


def _twice(report: Report) -> Report:
    return replace(report, systems=(system(scored(ROWS), scored(ROWS)),))


def _three(report: Report) -> Report:
    return replace(report, systems=report.systems * 3)


def _unknown(report: Report) -> Report:
    return replace(report, systems=(system(scored(ROWS), normalizers=()),))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_unlabelled, "no label"), (_without_regime, "no regime"), (_unlike, "score both systems alike"),
        (_other_regime, "regime D"), (_three, "3 systems"), (_unknown, "no normalizer 'plain'"),
        (_twice, "stands twice"),
    ],
)  # fmt: skip
def test_no_number_without_what_it_means(broken: Callable[[Report], Report], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        write(broken(small()), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write(small(), tmp_path / "file" / "report")


# ---- audio ----


def test_audio_is_linked_from_where_the_report_is(tmp_path: Path) -> None:
    report, elsewhere = tmp_path / "report", tmp_path / "else where#1.wav"
    inside = report / "clips" / "50 % #1?.wav"
    inside.parent.mkdir(parents=True)
    for path in (inside, elsewhere):
        path.write_bytes(b"RIFF")
    find = sounds.Sounds(report, embed=False).find
    assert find("clips/50 % #1?.wav") == find(str(inside)) == {"url": "./clips/50%20%25%20%231%3F.wav"}
    assert find(str(elsewhere)) == find("../else where#1.wav") == {"url": "./../else%20where%231.wav"}
    assert find("") is find(None) is find(3) is None
    for missing in ("gone.wav", "https://example.com/a.wav", "javascript:alert(1)", "a\0b", "x" * 5000, "clips"):
        assert find(missing) == {"missing": missing}


def test_small_clips_are_embedded_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tmp_path / "a.wav"
    soundfile.write(clip, np.zeros(1600), 16_000)
    (tmp_path / "secret.wav").write_text("root:x:0:0")
    find = sounds.Sounds(tmp_path, embed=True).find
    found = find("a.wav") or {}
    assert base64.b64decode(found["url"].removeprefix("data:audio/wav;base64,")) == clip.read_bytes()
    assert find("secret.wav") == {"url": "./secret.wav"}
    monkeypatch.setattr(sounds, "EMBEDDED_BYTES", clip.stat().st_size * 2)
    find = sounds.Sounds(tmp_path, embed=True).find
    assert [(find("a.wav") or {})["url"][:5] for _ in range(3)] == ["data:", "data:", "./a.w"]
    monkeypatch.setattr(sounds, "CLIP_BYTES", clip.stat().st_size - 1)
    assert sounds.Sounds(tmp_path, embed=True).find("a.wav") == {"url": "./a.wav"}
    monkeypatch.undo()
    html, _, _ = written(
        Report("r", (system(scored([row("a", "x", "x", audio=str(clip))])),)), tmp_path, embed_audio=True
    )
    assert Parsed(html).data["rows"][0]["audio"] == found


# ---- tables and plots ----


def svg(plot: Plot) -> ET.Element:
    return ET.fromstring(plots.draw(plot))  # noqa: S314 - our own


def test_points_stand_where_their_values_are() -> None:
    """Equal steps of value are equal steps across, negative ones to the left, and intervals enclose their points."""
    one = Series("one", ("a", "b", "c"), (-1.0, 0.0, 1.0), (-1.5, -0.5, None), (-0.5, 0.5, None))
    drawn = svg(Plot("points", "t", "Set", "%", (one,), "none, plain"))
    xs = [float(circle.get("cx", "")) for circle in drawn.iter("circle")][1:]  # the first is the legend's
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert xs[0] < xs[1] < xs[2]
    whiskers = [
        (float(line.get("x1", "")), float(line.get("x2", "")))
        for line in drawn.findall("g[@class='s0 line']/line") if line.get("y1") == line.get("y2")
    ]  # fmt: skip
    assert len(whiskers) == 2
    for (low, high), x in zip(whiskers, xs, strict=False):
        assert (low + high) / 2 == pytest.approx(x, abs=0.2)
        assert high - low == pytest.approx(xs[1] - xs[0], abs=0.2)


def test_curves_double_on_a_logarithmic_axis() -> None:
    curve = Series("one", (8.0, 1.0, 2.0, 4.0), (1.0, 1.0, None, 3.0))
    drawn = svg(Plot("curves", "t", "batch", "RTFx", (curve,), "one H200", log_x=True))
    x, y = zip(*((float(c.get("cx", "")), float(c.get("cy", ""))) for c in [*drawn.iter("circle")][1:]), strict=True)
    assert (x[1] - x[0]) == pytest.approx(2 * (x[2] - x[1]), abs=0.3)
    assert y[1] < y[0] == y[2]


VALUES = st.none() | st.floats(-1e9, 1e9) | st.sampled_from([float("inf"), float("nan")])


@given(
    st.lists(st.tuples(st.floats(0.001, 1e6), VALUES, VALUES, VALUES), max_size=20),
    st.booleans(), st.booleans(),
)  # fmt: skip
@example(points=[(1.0, 2.0, None, None), (1.0, 2.0, 1.0, 3.0)], log_x=False, named=False)
def test_any_values_are_drawn_inside(points: list[tuple[Any, ...]], log_x: bool, named: bool) -> None:
    x, y, low, high = zip(*points, strict=True) if points else ((), (), (), ())
    x = tuple(map(str, x)) if named else x
    kind = "points" if named else "curves"
    drawn = svg(Plot(kind, "t", "x", "y", (Series("s", x, y, low, high),) * 2, "l", log_x=log_x and not named))  # type: ignore[arg-type]
    _, _, width, height = map(float, drawn.get("viewBox", "").split())
    for element in drawn.iter():
        for name in ("x1", "x2", "cx", "x"):
            assert -1 <= float(element.get(name, "0")) <= width + 1
        for name in ("y1", "y2", "cy", "y"):
            assert -1 <= float(element.get(name, "0")) <= height + 1


def test_shapes_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(UsageError, match="2 values at 3 places"):
        Series("s", ("a", "b", "c"), (1.0, 2.0))
    one = Series("s", (0.0, 1.0), (1.0, 2.0))
    with pytest.raises(UsageError, match="logarithmic"):
        Plot("curves", "t", "x", "y", (one,), "l", log_x=True)
    with pytest.raises(UsageError, match="choose the other kind"):
        Plot("points", "t", "x", "y", (one,), "l")
    with pytest.raises(UsageError, match="7 series"):
        Plot("curves", "t", "x", "y", (one,) * 7, "l")
    with pytest.raises(UsageError, match="2 cells"):
        Table("t", ("a", "b"), ((1,),), "l")


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_is_one_cell_of_markdown(texts: list[str]) -> None:
    lines = tables.markdown(Table("t", tuple("c" for _ in texts), (tuple(texts),), "l"))
    (line,) = lines[4:-1]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(texts) + 1
    assert len(line.splitlines()) == 1


# ---- size ----


def many(size: int, num_systems: int = 2, *, errors: float = 0.1) -> Report:
    rng = np.random.default_rng(0)
    vocabulary = [f"{'abcdefgh'[n % 8]}ord{n}" for n in range(2000)]
    systems = []
    for number in range(num_systems):
        rows = []
        for n in range(size):
            words = [vocabulary[(n * 31 + k * k * 7) % 2000] for k in range(20)]
            heard = [vocabulary[rng.integers(2000)] if rng.random() < errors else word for word in words]
            rows.append(
                row(f"utt-{n:05}", " ".join(words), " ".join(heard), speaker=f"s{n % 40}", audio=f"audio/{n}.flac")
            )
        systems.append(system(scored(rows), name=f"system {number}"))
    return Report("Many", tuple(systems))


def test_five_thousand_utterances(tmp_path: Path) -> None:
    report = many(5000, 1)
    start = time.monotonic()
    write(report, tmp_path)
    assert time.monotonic() - start < 10
    assert (tmp_path / "report.html").stat().st_size < 12e6
