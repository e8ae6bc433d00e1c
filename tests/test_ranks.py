"""Several processes of one run: gloo on this machine's CPU, as torchrun would start them."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from arkasr.errors import UsageError
from arkasr.train import ranks as ranks_module
from arkasr.train import sft
from arkasr.train.ranks import Ranks
from conftest import MakeCheckpoint
from test_train import ALL_AUGMENTATION, config, curve, manifest, weights

__all__ = ["manifest"]

SETTINGS = {"steps": 4, "save_every": 2, "batch_s": 10.0, "augmentation": ALL_AUGMENTATION, "ctc_only_steps": 1}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(rank: int, size: int, port: int, work: Callable[[], object], errors: "multiprocessing.Queue[str]") -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    try:
        work()
    except BaseException as error:  # noqa: BLE001  # the parent tells it
        errors.put(f"{type(error).__name__}: {error}")
        errors.close()
        errors.join_thread()
        os._exit(1)


def spread(size: int, work: Callable[[], object]) -> list[str]:
    """Call work in `size` processes of one run; returns what they raised. Forked, so that torch is there at once."""
    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    port = free_port()
    children = [context.Process(target=_child, args=(rank, size, port, work, errors)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=200)
        assert child.exitcode is not None, "a rank hangs"
    return [errors.get(timeout=5) for child in children if child.exitcode]


def same_run(one: Path, other: Path) -> None:
    """The same losses and weights but for the order of sums."""
    for line, same in zip(curve(one), curve(other), strict=True):
        assert same == pytest.approx(line, rel=2e-3, abs=2e-3)
    before, after = weights(one), weights(other)
    # Adam turns rounding of a tiny gradient into a whole step of it, hence not 1e-7; the weights moved by up to 2e-3.
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 3e-4


def test_two_ranks_make_the_updates_of_one_whoever_continues_them(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    alone = config(make_checkpoint(), manifest, tmp_path / "alone", **SETTINGS, eval=str(manifest), eval_every=2)
    sft.main(alone)
    two = replace(alone, out=tmp_path / "two", accumulate=2)
    assert spread(2, lambda: sft.main(two)) == []
    same_run(alone.out, two.out)

    # Four ranks of two pieces have more pieces than there are clips.
    for size, accumulate in ((1, 1), (4, 2)):
        resumed = replace(two, out=tmp_path / f"by_{size}", accumulate=accumulate)
        shutil.copytree(two.out, resumed.out)
        shutil.rmtree(resumed.out / "checkpoints" / "step-00000004")
        shutil.rmtree(resumed.out / "model")
        if size == 1:
            sft.main(resumed)
        else:
            assert spread(size, lambda resumed=resumed: sft.main(resumed)) == []  # type: ignore[misc]
        same_run(alone.out, resumed.out)


@pytest.mark.slow
def test_two_ranks_in_bfloat16_keep_float32_weights(
    make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path
) -> None:
    alone = config(make_checkpoint(), manifest, tmp_path / "alone", **SETTINGS, bf16=True, recompute=True)
    sft.main(alone)
    two = replace(alone, out=tmp_path / "two")
    assert spread(2, lambda: sft.main(two)) == []
    for line, same in zip(curve(alone.out), curve(two.out), strict=True):
        assert same == pytest.approx(line, rel=0.05, abs=0.01)
    sizes = [path.stat().st_size for path in sorted((two.out / "checkpoints/step-00000004").glob("*.distcp"))]
    whole = sum(value.numel() for value in weights(alone.out).values()) * 4 * 4
    assert sum(sizes) > whole  # float32, each kind once
    assert max(sizes) < 0.7 * sum(sizes)  # each rank its part


@pytest.mark.slow
def test_torchrun_runs_the_command(make_checkpoint: MakeCheckpoint, manifest: Path, tmp_path: Path) -> None:
    flags = {
        "model": make_checkpoint(), "train": manifest, "out": tmp_path / "run", "steps": 2, "batch-s": 2, "workers": 1,
        "warmup-steps": 1, "eval": manifest,
    }  # fmt: skip
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    program = [Path(sys.executable).with_name("ark-asr"), "train", "sft"]
    subprocess.run([str(word) for word in (*command, *program, *arguments)], check=True)
    assert curve(tmp_path / "run")[-1]["step"] == 2
    assert weights(tmp_path / "run")


def test_a_rank_that_fails_is_named_and_does_not_hang_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "TIMEOUT", timedelta(seconds=20))

    def work() -> None:
        with Ranks.started("cpu") as ranks:
            if ranks.rank == 1:
                raise UsageError("bad.jsonl:3: not JSON")
            ranks.wait()

    began = time.monotonic()
    errors = spread(2, work)
    assert time.monotonic() - began < 60
    assert "UsageError: rank 1 of 2: bad.jsonl:3: not JSON" in errors
    assert len(errors) == 2


def test_a_rank_that_sleeps_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "TIMEOUT", timedelta(seconds=2))

    def work() -> None:
        ranks = Ranks.start("cpu")
        if ranks.rank == 1:
            time.sleep(8)
        else:
            ranks.wait()

    [error] = spread(2, work)
    assert "imed out" in error


def test_what_is_spread_is_gathered_whole(tmp_path: Path) -> None:
    """Rows that no number of ranks divides, and a part of the names."""
    first = nn.Linear(3, 5)
    weight, bias = first.weight.detach().clone(), first.bias.detach().clone()
    module = nn.Sequential(first, nn.Linear(5, 1))
    target = nn.Linear(3, 5, dtype=torch.bfloat16)

    def work() -> None:
        ranks = Ranks.start("cpu")
        ranks.shard(module, bf16=False)
        assert ranks_module.local(first.weight).shape[0] < 5
        ranks.copy_full(dict(module.named_parameters()), target, part="0.")
        assert ranks.sums([ranks.rank, 1.0]) == [1.0, 2.0]
        if ranks.first:
            torch.save(target.state_dict(), tmp_path / "target.pt")
        ranks.close()

    assert spread(2, work) == []
    gathered = torch.load(tmp_path / "target.pt")
    assert torch.equal(gathered["weight"], weight.bfloat16())
    assert torch.equal(gathered["bias"], bias.bfloat16())
