"""The leaderboard's own scorer reads our manifests and says the same: OAL_CHECKOUT=folder [OAL_PYTHON=interpreter].

The interpreter needs what the checkout's normalizer imports: kaldialign, num2words, datasets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arkasr.evaluate import manifest
from arkasr.evaluate.manifest import Row
from arkasr.evaluate.score import score
from arkasr.metrics.normalize import normalizer
from arkasr.metrics.regimes import NONE

CASES = Path(__file__).parent / "eval" / "normalizer_cases.json"
ASK = """
import json, sys
from normalizer.eval_utils import score_results
print(json.dumps(score_results(sys.argv[1])[1]))
"""


def rows() -> list[Row]:
    """Recorded texts against themselves a little off: the next one's, or their own words without every third."""
    texts = [case["input"] for case in json.loads(CASES.read_text())["english"]]
    found = []
    for number, text in enumerate(texts):
        words = text.split()
        said = texts[number - 1] if number % 5 == 0 else " ".join(w for n, w in enumerate(words) if n % 3)
        found.append(Row(f"{number}.wav", 1.0 + number / 7, 0.01 + number / 1000, text, said))
    return found


@pytest.mark.skipif("OAL_CHECKOUT" not in os.environ, reason="no checkout of the leaderboard; see the docstring")
def test_the_leaderboards_own_program_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / manifest.file_name("org/model", "org/set", "", "test")
    path.write_text("".join(manifest.line(row).rstrip("\n") + "\n" for row in rows()), encoding="utf-8")
    python = os.environ.get("OAL_PYTHON", sys.executable)
    answer = subprocess.run(
        [python, "-c", ASK, str(tmp_path)], cwd=os.environ["OAL_CHECKOUT"], check=True, capture_output=True, text=True
    )
    (theirs,) = json.loads(answer.stdout.splitlines()[-1]).values()
    ours = score(manifest.read(path), normalizer("oal-d1e99b2"), name="set", regime=NONE)
    assert theirs["wer"] == ours.wer
    assert (theirs["ins"], theirs["del"], theirs["sub"]) == (
        ours.counts.insertions, ours.counts.deletions, ours.counts.substitutions,
    )  # fmt: skip
    assert ours.rtfx is not None
    assert theirs["rtfx"] == round(ours.rtfx, 4)
