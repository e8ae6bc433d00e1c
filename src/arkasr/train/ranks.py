"""The processes of a run: torchrun's, or one alone; sums over them, and the trainee's weights spread over them.

Unusual: nothing here is needed to read a program. Alone, every function does the obvious thing and torch.distributed
is not started.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from arkasr.errors import ArkASRError, UsageError
from arkasr.model import DecoderLayer, EncoderLayer

# Longer than any rank waits for another in a healthy run: an evaluation's share, a checkpoint on a slow disk.
TIMEOUT = timedelta(minutes=20)


@dataclass(frozen=True)
class Ranks:
    """One process among `size`; rank 0 writes what there is once."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextmanager
    def started(cls, device: str) -> Iterator["Ranks"]:
        """`start` and `close`; in between, a user's mistake is told with the rank that met it."""
        ranks = cls.start(device)
        try:
            yield ranks
        except ArkASRError as error:
            if ranks.size == 1:
                raise
            # Not closed: that would wait for the others, which torchrun ends when this process does.
            raise type(error)(f"rank {ranks.rank} of {ranks.size}: {error}") from None
        ranks.close()

    @classmethod
    def start(cls, device: str) -> "Ranks":
        """Join the processes that torchrun started; alone where it did not.

        Raises:
            UsageError: the device is not cpu or cuda, or there is none for this process.
        """
        wanted, size = torch.device(device), int(os.environ.get("WORLD_SIZE", "1"))
        if wanted.type not in ("cpu", "cuda"):
            raise UsageError(f"device {device}: not supported; use cpu or cuda")
        if size == 1:
            return cls(0, 1, wanted)
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if wanted.type == "cuda":
            found = torch.cuda.device_count()
            if local_rank >= found:
                raise UsageError(f"rank {rank} of {size}: {found} CUDA devices here; lower --nproc-per-node")
            wanted = torch.device("cuda", local_rank)
            torch.cuda.set_device(wanted)
        # The plans of a checkpoint and the sums travel on the CPU also where gradients do not.
        dist.init_process_group("cpu:gloo,cuda:nccl" if wanted.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(rank, size, wanted)

    @property
    def first(self) -> bool:
        """Whether this process writes what there is once."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64; every rank must give as many."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        self.sums([0.0])

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            dist.destroy_process_group()

    def shard(self, module: nn.Module, *, bf16: bool) -> None:
        """Spread the weights over the ranks (FSDP2): gathered layer by layer for what the module's `forward` calls.

        With bf16 they are gathered in bfloat16, while this rank's part and the sums of gradients stay float32.
        """
        if self.size == 1:
            return
        mesh = init_device_mesh(self.device.type, (self.size,))
        # Autocast decides what is bfloat16 in between, as it does alone.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = policy if bf16 else MixedPrecisionPolicy()
        for layer in layers(module):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)

    @torch.no_grad()
    def copy_full(self, source: Mapping[str, Tensor], target: nn.Module, *, part: str = "") -> None:
        """Gather parameters one at a time into a plain module of any dtype; every rank must call it.

        Args:
            source: parameters by name, spread over the ranks or not.
            target: has a parameter of each name, which loses its leading `part`.
            part: only names that begin with it are copied.
        """
        for name, value in source.items():
            if name.startswith(part):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                target.get_parameter(name.removeprefix(part)).copy_(whole)


def layers(module: nn.Module) -> list[EncoderLayer | DecoderLayer]:
    """Every encoder and decoder layer of a module."""
    return [layer for layer in module.modules() if isinstance(layer, EncoderLayer | DecoderLayer)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a spread tensor, which shares its memory; else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
