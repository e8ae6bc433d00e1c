"""Results read as a whole: the average over a regime's sets, its interval, its self-report, and hints."""

from pathlib import Path

import pytest

from arkasr import cli_eval
from arkasr.errors import UsageError
from arkasr.evaluate import manifest, study
from arkasr.evaluate.manifest import Row
from arkasr.metrics import regimes
from arkasr.metrics.regimes import NONE, EvalSet, Regime

SETS = tuple(EvalSet(name, name.title(), f"org/{name}", "", rows=8, task=f"{name}_wer") for name in ("one", "two"))


def results(folder: Path, *names: str, language: str = "en") -> Path:
    """Manifests of eight rows of four words, of which every other row has a wrong one; in "two", every row."""
    folder.mkdir()
    for name in names:
        rows = [
            Row(f"{n}.wav", 2.0, 0.1, "a b c d", "a b c x" if n % 2 or name == "two" else "a b c d",
                x={"id": f"{name}-{n}", "speaker": f"s{n // 2}", "language": language})
            for n in range(8)
        ]  # fmt: skip
        path = folder / manifest.file_name("org/model", f"org/{name}", "", "test")
        path.write_text("".join(manifest.line(row).rstrip("\n") + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(regimes.REGIMES, "E", Regime("E", "two small sets", SETS, "plain", "ours"))


def test_an_average_has_its_label_its_interval_and_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.yaml"
    cli_eval.score([results(tmp_path / "all", "one", "two")], "E", None, report, "https://example.org/predictions")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "public macro" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4] == "18.75"  # the mean of 12.5 and 25
    assert float(cells[5]) < 18.75 < float(cells[6])
    assert float(cells[7]) == pytest.approx(20)
    assert cells[-1] == "OAL-E/plain public-2"
    assert "task_id: mean_wer\n  value: 18.75" in report.read_text()


def test_a_part_of_a_regime_has_no_average_and_no_self_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = results(tmp_path / "part", "one")
    with pytest.raises(UsageError, match="missing: two"):
        cli_eval.score([place], "E", None, tmp_path / "report.yaml", "https://example.org/predictions")
    assert "public macro" not in capsys.readouterr().out
    assert not (tmp_path / "report.yaml").exists()
    with pytest.raises(UsageError, match="one system"):
        cli_eval.score([place, place], "E", None, tmp_path / "report.yaml", "https://example.org/predictions")


def test_what_a_normalizer_does_not_do_is_said(tmp_path: Path) -> None:
    found = study.read(results(tmp_path / "et", "one", language="et"), normalizer="multilingual", regime=NONE)
    assert any("num2words has no et" in note for note in found.notes)


def test_systems_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [results(tmp_path / name, "one") for name in ("int8", "float32")]
    found = study.read_all(places, normalizer=None, regime="E")
    assert [one.name for one in found] == ["org/model (int8)", "org/model (float32)"]
