"""Several processes on one model: calibration sequences and rows in shares, the same masks for any number of them.

Each process has the model (or streams it), runs its share of the batches, and the sums of each sequence are exchanged,
so that all reduce the same numbers in the same order. Rows are selected in shares and exchanged. Started by torchrun;
gloo on CPUs, NCCL on GPUs. Exchanges move bytes: no type of the two is left out, and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .models.load import choose_device
from .pruning.methods.apply import Outcome
from .pruning.methods.groups import Group
from .pruning.selection import Target, row_sums_

TIMEOUT_S = 1800.0  # of an exchange: how long the fastest process waits for the slowest
START_S = 300.0  # how long the first waits for the last to begin
FAILURE = "wanda_kernels/failure"
PATIENCE_S = 5.0  # in which a process whose connection broke learns why


class Processes:
    """This process among ``size``.

    Args:
        store: of the process group; a failure is told through it.
        device: of the tensors that are exchanged: ``cpu`` with gloo, ``cuda`` with NCCL.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        self._all(lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shares(self, count: int) -> list[range]:
        """``count`` things in order, cut into one run of neighbours for each process, equal but for one."""
        cuts = [count * rank // self.size for rank in range(self.size + 1)]
        return [range(begin, end) for begin, end in itertools.pairwise(cuts)]

    def my_share(self, count: int, what: str) -> range:
        """Raises ValueError where there is not one for each."""
        if count < self.size:
            raise ValueError(f"{self.size} processes need at least as many {what}, there are {count}")
        return self.shares(count)[self.rank]

    def exchange_rows_(self, tensor: Tensor, rows: list[range]) -> None:
        """Process r gives the ``rows[r]`` of ``tensor``, contiguous; afterwards all have all."""
        flat = tensor.view(torch.uint8).reshape(tensor.shape[0], -1)
        for source, share in enumerate(rows):
            part = flat[share.start : share.stop]
            if part.numel():
                self._broadcast(part, source)

    def agree_on(self, data: Any) -> Any:
        """The first process's plain ``data``."""
        text = json.dumps(data).encode() if self.is_first else b""
        length = torch.tensor([len(text)], device=self._device)
        self._broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if self.is_first:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._broadcast(content, 0)
        return json.loads(bytes(content.cpu().numpy()))

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if tensor.device.type == self._device.type:
            self._all(lambda: dist.broadcast(tensor, source))
            return
        raise ValueError(f"tensors on {tensor.device} cannot be exchanged by processes that began on {self._device}")

    def _all(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise RuntimeError(self._why(error)) from error

    def _why(self, error: Exception) -> str:
        """Which process failed first, or what the library says."""
        with contextlib.suppress(RuntimeError):  # the store itself may be gone
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end:
                if self._store.check([FAILURE]):
                    return f"stopped, because {self._store.get(FAILURE).decode()}"
                time.sleep(0.1)
        return f"stopped, because an exchange with the other processes failed: {' '.join(str(error).split())[:200]}"

    def leave(self, failure: str | None = None) -> None:
        """Ends the exchanges. ``failure``: the others' connections break, and they say this then; the first stays."""
        if failure is None:
            dist.destroy_process_group()
            return
        with contextlib.suppress(RuntimeError):
            if not self._store.check([FAILURE]):
                self._store.set(FAILURE, f"rank {self.rank} failed: {failure}")


def has_independent_rows(target: Target) -> bool:
    """Whether rows can be selected in shares. What compares more than a row is done whole by each process."""
    if target.method == "magnitude":
        return target.pattern is not None
    return target.method == "wanda" and not target.options.variant and target.options.group in (None, Group("row"))


def prune_rows_in_shares_(weight: Tensor, norm: Tensor | None, target: Target, processes: Processes) -> Outcome:
    """As :func:`wanda_kernels.pruning.methods.apply.prune_layer_`, each process a share of the rows."""
    if target.sparsity == 0:
        return Outcome(0.0, 1.0)
    shares = processes.shares(weight.shape[0])
    mine = shares[processes.rank]
    sums = torch.zeros(weight.shape[0], 2, dtype=torch.float32, device=weight.device)
    if len(mine):
        sums[mine.start : mine.stop] = row_sums_(weight[mine.start : mine.stop], norm, target)
    processes.exchange_rows_(weight, shares)
    processes.exchange_rows_(sums, shares)
    pruned, total = sums.double().sum(dim=0).tolist()
    return Outcome(pruned, total)


def join(device: str, timeout_s: float = TIMEOUT_S) -> Processes:
    """The processes that torchrun started.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``: with CUDA, process i of a machine takes its GPU i.
        timeout_s: of an exchange.

    Raises:
        ValueError: no GPU for this process.
        RuntimeError: the others did not come.
    """
    place = choose_device(device)
    if place.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=START_S)))
    return Processes(store, rank, size, place, timeout_s)
