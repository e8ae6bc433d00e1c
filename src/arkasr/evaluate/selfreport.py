"""The file by which a model's repository tells the leaderboard's values of its own run."""

import json
import re
from collections.abc import Sequence
from datetime import date as Date

from arkasr.errors import UsageError, quoted
from arkasr.evaluate.score import Average, SetScore
from arkasr.metrics import regimes

FILE = ".eval_results/open_asr_leaderboard.yaml"
_DATASET = "hf-audio/open-asr-leaderboard"
_URL = re.compile(r"https?://[^\s\x00-\x1f]+")


def eval_results_yaml(scores: Sequence[SetScore], average: Average, *, date: str, source: str) -> str:
    """The file's text: the average, the sets that have a name there, and the RTFx of unpadded audio if there is one.

    Args:
        scores: of the sets.
        average: over them.
        date: day of the run, as 2026-09-01.
        source: address of the predictions.

    Raises:
        UsageError: there is no average, or the date or the address is none.
    """
    if average.wer is None:
        raise UsageError(f"no self-report: {average.reason}; score every set of regime {average.regime}")
    try:
        day = Date.fromisoformat(date).isoformat()
    except ValueError:
        raise UsageError(f"{quoted(date)}: no date; write it as 2026-09-01") from None
    if not _URL.fullmatch(source):
        raise UsageError(f"{quoted(source)}: no address; say where the predictions are, as https://...")
    by_name = {one.name: one for one in scores}
    tasks = {known.task: by_name[known.name].wer for known in regimes.regime(average.regime).sets if known.task}
    values = {"mean_wer": average.wer, **tasks}
    if average.rtfx is not None:
        values["rtfx"] = round(average.rtfx, 2)
    entry = (
        "- dataset:\n    id: {dataset}\n    task_id: {task}\n  value: {value}\n  date: {date}\n"
        "  source:\n    url: {url}\n    name: {name}\n"
    )
    return "".join(
        entry.format(
            dataset=_DATASET, task=task, value=value, date=json.dumps(day), url=json.dumps(source),
            name=json.dumps(average.label),
        )
        for task, value in values.items()
    )  # fmt: skip
