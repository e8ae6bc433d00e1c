"""What ideas for speed are worth on this CPU, each against what arkasr does now; writes bench/results.

    python bench/ideas.py SCRATCH SPEECH TOKENIZER [--only IDEA ...] [--rounds 7] [--processes 3]

SCRATCH is that of bench/cpu.py, which makes its 0.6b checkpoint with random weights and the int8 export; SPEECH holds
an4/ and other folders with their manifest.jsonl; TOKENIZER is the published tokenizer.json. Speed is of the 0.6b shape,
accuracy of `tiny` on AN4 test. What is compared takes turns, in this process or in fresh ones. The record is written
after each idea, and a later run of the same day keeps the ideas that it does not repeat.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tokenizers import Tokenizer

from arkasr import checkpoint, runtime
from arkasr.data import read_manifest
from arkasr.engines import DecodeOptions
from arkasr.engines import onnx as engine_module
from arkasr.engines.onnx import OnnxEngine
from cpu import RESULTS, TOKENS_PER_S, noise, spread
from ideas_accuracy import int4_head, silence, smooth_quant
from ideas_graphs import (
    Asked,
    Numbers,
    compared,
    encoder_graph,
    fused_qkv,
    head_runner,
    head_subset,
    int8_attention,
    padding,
    race,
)

STOP = "session.force_spinning_stop"
CHILD_CLIPS_S = (10, 4, 13, 7, 10)  # the first also pays for memory that is touched the first time
NOTE = (
    "ratio is baseline over tried, by medians: above 1 the tried way is faster, or errs less. Others used the machine, "
    "so the ratio of the least times, too. Times are in the unit, median, least and most. Small graphs run many times "
    "over the same weights, so those that fit in the 32 MB of L3 come from there; a head's do not."
)


# ---- speculation ----


def speculation(asked: Asked) -> Numbers:
    """A decode run of several positions of one row against one; what n-gram lookup would draft in real transcripts."""
    source = checkpoint.open_checkpoint(asked.folder)
    engine = OnnxEngine.load(source, precision="int8", report=str)
    batch = engine_module._Batch(engine, 1, 512)  # noqa: SLF001
    lengths = (1, 2, 3, 4, 6, 8)
    x = {n: engine.embed(np.arange(1000, 1000 + n))[None] for n in lengths}
    runs = {f"T = {n}": partial(batch._run, x[n], [200 + n], slice(0, 1)) for n in lengths}  # noqa: SLF001
    decoder = race(runs, rounds=asked.rounds, runs=10)
    heads = race({f"T = {n}": head_runner(n) for n in lengths}, rounds=asked.rounds, runs=10)
    cost = {n: decoder[f"T = {n}"]["median"] + heads[f"T = {n}"]["median"] - heads["T = 1"]["median"] for n in lengths}
    batch._run(x[4], [204], slice(0, 1))  # noqa: SLF001
    at_once = batch._answers[1]  # noqa: SLF001
    for n in range(4):
        batch._run(x[4][:, n : n + 1], [201 + n], slice(0, 1))  # noqa: SLF001
    tokenizer = Tokenizer.from_file(str(asked.tokenizer))
    accepted = {}
    for name in ("an4", "fleurs", "kathleen_arctic", "kerstin_de", "nathalie_nl", "long"):
        utterances = list(read_manifest(asked.speech / name / "manifest.jsonl"))
        texts = [tokenizer.encode(u.text, add_special_tokens=False).ids for u in utterances]
        for longest, shortest, most in ((3, 1, 1), (3, 1, 3), (3, 2, 3), (3, 2, 7)):
            steps = [step for ids in texts for step in verify_steps(ids, longest, shortest, most)]
            tokens, spent = (
                sum(gained for _, gained in steps),
                sum(float(np.interp(run, list(cost), list(cost.values()))) for run, _ in steps),
            )
            accepted[f"{name}, n-gram {shortest}-{longest}, {most} drafted"] = {
                "tokens_per_step": round(tokens / len(steps), 3), "speed_up": round(tokens * cost[1] / spent, 3),
            }  # fmt: skip
    more: Numbers = {"heads_ms": heads, "whole_ms": {n: round(ms, 2) for n, ms in cost.items()}, "lookup": accepted}
    return compared(decoder, logprob_difference=float(abs(batch._answers[1] - at_once).max()), **more)  # noqa: SLF001


def verify_steps(ids: Sequence[int], longest: int, shortest: int, most: int) -> list[tuple[int, int]]:
    """Positions run and tokens gained at each step, when the last place that ended alike drafts what comes next."""
    steps, done = [], 1
    while done < len(ids):
        draft = look_up(ids[:done], longest, shortest, most)
        right = next((n for n, token in enumerate(draft) if done + n >= len(ids) or ids[done + n] != token), len(draft))
        gained = min(right + 1, len(ids) - done)
        steps.append((1 + len(draft), gained))
        done += gained
    return steps


def look_up(ids: Sequence[int], longest: int, shortest: int, most: int) -> Sequence[int]:
    for size in range(longest, shortest - 1, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[len(ids) - size :]:
                return ids[start + size : start + size + most]
    return []


# ---- fresh processes ----


def child(asked: Mapping[str, Any]) -> Numbers:
    """Load the int8 export with session options, recognize clips of several lengths, tell seconds and memory."""
    if asked.get("one_pool"):
        runtime.onnxruntime.set_global_thread_pool_sizes(os.cpu_count() or 1, 1)

    def new_session(path: Path, *, threads: int, stop_spinning: bool = False) -> Any:
        options = runtime.onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.use_per_session_threads = not asked.get("one_pool")
        for name, value in asked.get("options", {}).items():
            setattr(options, name, value)
        entries = {STOP: str(int(stop_spinning)), **asked.get("both", {}), **asked.get(path.stem, {})}
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        return runtime.onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    source = checkpoint.open_checkpoint(asked["folder"])
    began = time.perf_counter()
    with mock.patch.object(runtime, "session", new_session):
        engine = OnnxEngine.load(source, precision="int8", threads=asked.get("threads", 0), report=str)
    load_s, clips = time.perf_counter() - began, []
    for seconds in CHILD_CLIPS_S:
        tokens = TOKENS_PER_S * seconds
        spent = engine.generate([noise(seconds)], DecodeOptions(max_new_tokens=tokens))[0].timings_s
        clips.append({**spent, "tokens": tokens})
    memory = Path("/proc/self/smaps_rollup").read_text()
    kib = {name: int(re.findall(rf"^{name}:\s+(\d+)", memory, re.MULTILINE)[0]) for name in ("Rss", "AnonHugePages")}
    warm = clips[1:]
    return {
        "load_s": load_s,
        "first_encoder_s": clips[0]["encoder"],
        **{f"{stage}_s": sum(clip[stage] for clip in warm) for stage in ("encoder", "prefill", "decode")},
        "ms_per_token": 1e3 * sum(clip["decode"] for clip in warm) / sum(clip["tokens"] - 1 for clip in warm),
        "total_s": sum(clip[stage] for clip in warm for stage in ("log_mel", "encoder", "prefill", "decode")),
        **{f"{name}_mib": size / 1024 for name, size in kib.items()},
    }


def processes(asked: Asked, ways: Mapping[str, Mapping[str, Any]]) -> Numbers:
    """Ways to set up a process, which take turns; a way's "env" is its environment."""
    runs: dict[str, list[Numbers]] = {name: [] for name in ways}
    for _ in range(asked.processes):
        for name, way in ways.items():
            what = json.dumps({"folder": str(asked.folder), **way})
            environment = {**os.environ, **way.get("env", {})}
            command = [sys.executable, __file__, "--child", what]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            runs[name].append(json.loads(done.stdout))
    details = {name: {key: spread([run[key] for run in of]) for key in of[0]} for name, of in runs.items()}
    audio_s = sum(CHILD_CLIPS_S[1:])
    rtfx = {name: round(audio_s / of["total_s"]["median"], 2) for name, of in details.items()}
    totals = {name: of["total_s"] for name, of in details.items()}
    return compared(totals, f"s for {audio_s} s of audio", rtfx=rtfx, details=details)


def huge_pages(asked: Asked) -> Numbers:
    """Transparent huge pages for what malloc gives."""
    return processes(asked, {"small pages": {}, "malloc asks": {"env": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}})


def session_options(asked: Asked) -> Numbers:
    """Options of ONNX Runtime's sessions."""
    return processes(asked, {
        "now": {},
        "no spinning": {"both": {"session.intra_op.allow_spinning": "0"}},
        "encoder spins on": {"encoder": {STOP: "0"}},
        "memory pattern off": {"options": {"enable_mem_pattern": False}},
        "arena off": {"options": {"enable_cpu_mem_arena": False}},
        "dynamic blocks": {"both": {"session.dynamic_block_base": "4"}},
        "one thread pool": {"one_pool": True},
    })  # fmt: skip


def threads(asked: Asked) -> Numbers:
    """Threads of each session."""
    return processes(asked, {f"{n} threads": {"threads": n} for n in (2, 1, 4)})


# ---- all of them ----

IDEAS: dict[str, Callable[[Asked], Numbers]] = {
    "smooth-quant": smooth_quant,
    "int8-attention": int8_attention,
    "fused-qkv": fused_qkv,
    "head-subset": head_subset,
    "speculation": speculation,
    "silence": silence,
    "huge-pages": huge_pages,
    "int4-head": int4_head,
    "padding": padding,
    "session-options": session_options,
    "threads": threads,
    "encoder-graph": encoder_graph,
}


def main() -> None:
    """Measure, print, write after each idea; or be the measured process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path, nargs="?")
    parser.add_argument("speech", type=Path, nargs="?")
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.add_argument("--rounds", type=int, default=7, help="turns within a process")
    parser.add_argument("--processes", type=int, default=3, help="turns of processes, and of whole encoders")
    parser.add_argument("--child", help="JSON: measure in this process")
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(child(json.loads(flags.child))))
        return
    if flags.tokenizer is None:
        parser.error("give SCRATCH, SPEECH and TOKENIZER")
    from arkasr.train import loop

    os.environ["ARKASR_CACHE"] = str((flags.scratch / "cache").resolve())
    asked = Asked(flags.scratch / "random-0.6b", flags.speech, flags.tokenizer, flags.rounds, flags.processes)
    target = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-cpu{os.cpu_count()}-ideas.json"
    results = json.loads(target.read_text())["ideas"] if target.exists() else {}
    for name in flags.only:
        began, load = datetime.now(UTC).isoformat(timespec="seconds"), round(os.getloadavg()[0], 2)
        try:
            found = IDEAS[name](asked)
        except Exception as error:  # noqa: BLE001 - the other ideas' results must not be lost
            traceback.print_exc()
            found = {"failed": repr(error)}
        what = (IDEAS[name].__doc__ or "").strip()
        results[name] = {"idea": what, "date": began, "load": load, "command": shlex.join(sys.argv), **found}
        record = {
            "what": "ideas: each against what arkasr does now", "date": began, **loop.provenance(),
            **{package: version(package) for package in ("onnxruntime", "onnx", "numpy", "tokenizers")},
            "note": NOTE, "ideas": {key: results[key] for key in IDEAS if key in results},
        }  # fmt: skip
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(found, indent=1), flush=True)
    print(target)


if __name__ == "__main__":
    main()
