"""Several processes on one model: calibration sequences and rows in shares, the same masks for any number of them.

Each process has the model (or streams it), runs its share of the batches, and the sums of each sequence are exchanged,
so that all reduce the same numbers in the same order. Rows are selected in shares and exchanged. Started by torchrun;
gloo on CPUs, NCCL on GPUs. Exchanges move bytes: no type of the two is left out, and nothing is pickled.

At the start all compare what decides the result (:meth:`Processes.refuse_differences`). From then on each watches the
next one by a message that comes only when that one is done: a process that is killed breaks its connection, whatever
the others do at that moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import itertools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .identity import differences, in_words
from .models.load import choose_device

TIMEOUT_S = 1800.0  # of an exchange: how long the fastest process waits for the slowest
START_S = 12.0  # how long the first waits for the last to begin; WANDA_KERNELS_START_S says otherwise
CONNECT_S = 8.0  # how long they take to connect once all are there
HERE, FAILURE, DONE, LEFT = (f"wanda_kernels/{word}" for word in ("here", "failure", "done", "left"))  # keys
NOT_HERE = "stopped, because {} did not come in time (WANDA_KERNELS_START_S: seconds that the others wait)"
GONE = "stopped, because the process that the others meet at is gone (killed?)"
PATIENCE_S = 3.0  # in which a process whose connection broke learns why
POLL_S = 0.5


class LostError(Exception):
    """Raised in the main thread, at whatever it does, where another process failed or was killed. No RuntimeError,
    which many libraries catch."""


class Processes:
    """This process among ``size``.

    Args:
        store: of the process group; a failure is told through it.
        device: of the tensors that are exchanged: ``cpu`` with gloo, ``cuda`` with NCCL.
        timeout_s: of an exchange.
        start_s: how long the others are waited for at the start.
        on_loss: told, in another thread, why the run cannot go on; the main thread may be deep in a library.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float = TIMEOUT_S,
        start_s: float = START_S,
        on_loss: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.lost: str | None = None  # why the run cannot go on, once another process is gone
        # A connection of its own: one that the library waits on lets nobody else ask, for up to ``timeout_s``
        self._store = store.clone()
        self.device = device
        self._timeout_s = timeout_s
        self._main = threading.get_ident()
        self._is_leaving = False
        self._is_failing = False  # the main thread knows of it, and raises an error of its own
        self._telling = threading.Lock()
        self._on_loss = on_loss
        self._compared = 0
        self._meet(start_s)
        soon, whole = (datetime.timedelta(seconds=seconds) for seconds in (CONNECT_S, timeout_s))
        self._all(
            lambda: dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=soon),
            "the connection to the other processes failed",
        )
        if size > 1:
            for watch in (self._watch_next, self._watch_store):
                threading.Thread(target=watch, daemon=True, name=f"wanda-{watch.__name__.strip('_')}").start()
        self._all(lambda: self._make_group("nccl" if device.type == "cuda" else "gloo", soon, whole))

    def _meet(self, seconds: float) -> None:
        """Until all are here."""
        keys = [f"{HERE}/{rank}" for rank in range(self.size)]
        with self._told():
            self._store.set(keys[self.rank], "")
            if not self._wait_for(keys, seconds):
                missing = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                raise RuntimeError(NOT_HERE.format(f"rank {', '.join(missing)}"))

    def _make_group(self, backend: str, connect: datetime.timedelta, exchange: datetime.timedelta) -> None:
        """``connect``, ``exchange``: how long either may take."""
        group = dist.new_group(backend=backend, timeout=connect)
        assert isinstance(group, dist.ProcessGroup)
        library = dist.distributed_c10d
        getattr(library, "set_timeout", library._set_pg_timeout)(exchange, group)  # the first is torch 2.14's
        self._group = group

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shares(self, count: int) -> list[range]:
        """``count`` things in order, cut into one run of neighbours for each process, equal but for one."""
        cuts = [count * rank // self.size for rank in range(self.size + 1)]
        return [range(begin, end) for begin, end in itertools.pairwise(cuts)]

    def all_from_first(self, count: int) -> list[range]:
        """``count`` things, all of them the first process's."""
        return [range(count if rank == 0 else 0) for rank in range(self.size)]

    def my_share(self, count: int, what: str) -> range:
        """Raises ValueError where there is not one for each."""
        if count < self.size:
            raise ValueError(f"{self.size} processes need at least as many {what}, there are {count}")
        return self.shares(count)[self.rank]

    def refuse_differences(self, mine: dict[str, Any]) -> None:
        """Raises ValueError, on every process, where the others were given something else: with its name.

        Args:
            mine: what decides the result, as plain data. All must call this equally often.
        """
        self._compared += 1
        key = f"wanda_kernels/compared/{self._compared}"
        with self._told():
            self._store.set(f"{key}/{self.rank}", json.dumps(mine))
            all_of_them = [self._read(f"{key}/{rank}") for rank in range(self.size)]
            self._store.set(f"{key}/read/{self.rank}", "")
        for rank, theirs in enumerate(all_of_them):
            found = differences(all_of_them[0], theirs)
            if found:
                said = in_words([f"{name}: rank 0 has {_short(a)}, rank {rank} {_short(b)}" for name, a, b in found])
                self._is_leaving = True  # each says it itself, and is not told by the others
                with self._told():
                    self._wait_for([f"{key}/read/{other}" for other in range(self.size)], PATIENCE_S)
                raise ValueError(f"all processes must be given the same, but {said}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Inside, the loss of the store, or of who holds it, is told in words."""
        try:
            yield
        except dist.DistError as error:
            raise RuntimeError(self.lost or GONE) from error

    def _read(self, key: str) -> Any:
        if not self._wait_for([key], self._timeout_s, self._refuse_lost):
            raise RuntimeError(
                f"stopped, because another process did not say within {self._timeout_s:.0f} s what it runs"
            )
        return json.loads(self._store.get(key))

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
        length = torch.tensor([len(text)], device=self.device)
        self._broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.is_first:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._broadcast(content, 0)
        return json.loads(bytes(content.cpu().numpy()))

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if tensor.device.type == self.device.type:
            self._all(lambda: dist.broadcast(tensor, source, group=self._group))
            return
        raise ValueError(f"tensors on {tensor.device} cannot be exchanged by processes that began on {self.device}")

    def _all(self, exchange: Callable[[], object], failed: str = "an exchange with the other processes failed") -> None:
        self._refuse_lost()
        try:
            exchange()
        except RuntimeError as error:
            raise RuntimeError(self._why(error, failed)) from error

    def _refuse_lost(self) -> None:
        if self.lost is not None:
            self._fail_here()
            raise LostError(self.lost)

    def _fail_here(self) -> None:
        """The main thread raises an error of its own: from now on the watch raises none in it, and one that has not
        arrived yet is taken back."""
        with self._telling:
            self._is_failing = True
            if threading.get_ident() == self._main:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), None)

    def _why(self, error: Exception, failed: str) -> str:
        """Which process failed first, or what the library says."""
        self._fail_here()
        if self.lost is not None:
            return self.lost
        told = self._failure(PATIENCE_S)
        return told or f"stopped, because {failed}: {' '.join(str(error).split())[:200]}"

    def _failure(self, patience_s: float) -> str | None:
        """What a process said that failed."""
        try:
            there = self._wait_for([FAILURE], patience_s)
            return f"stopped, because {self._store.get(FAILURE).decode()}" if there else None
        except RuntimeError:
            return GONE

    def _watch_next(self) -> None:
        """Waits for the next process's goodbye; without one its connection broke."""
        following = (self.rank + 1) % self.size
        try:
            goodbye = dist.irecv(torch.zeros(1, dtype=torch.uint8), src=following)
            assert goodbye is not None
            goodbye.wait(datetime.timedelta(days=365))
        except RuntimeError:
            if not self._is_leaving:
                self._lose(self._failure(PATIENCE_S / 3) or f"stopped, because rank {following} is gone (killed?)")

    def _watch_store(self) -> None:
        """Looks whether any process said that it failed: the one watched may still be well."""
        try:
            while not self._is_leaving:
                if self._store.check([FAILURE]):
                    self._lose(f"stopped, because {self._store.get(FAILURE).decode()}")
                    return
                time.sleep(POLL_S)
        except RuntimeError:  # the process that held the store has ended
            if not self._is_leaving:
                self._lose(GONE)

    def _lose(self, reason: str) -> None:
        if self.lost is not None or self._is_leaving:
            return
        self.lost = reason
        self._say(reason.removeprefix("stopped, because "))
        self._on_loss(reason)
        # Python makes the exception of the class, without arguments
        told = type("LostError", (LostError,), {"__init__": lambda error: Exception.__init__(error, reason)})
        with self._telling:
            if not self._is_failing:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), ctypes.py_object(told))

    def _say(self, failure: str) -> None:
        """To all; the first that is said stays."""
        with contextlib.suppress(RuntimeError):
            if not self._store.check([FAILURE]):
                self._store.set(FAILURE, failure)

    def goodbye(self) -> None:
        """This process has done its share, and waits until the first, which may have a result to save, has too.

        Raises:
            LostError: another process failed or was killed before.
        """
        with self._told():
            self._store.set(f"{DONE}/{self.rank}", "")
            self._wait_for([f"{DONE}/0"], math.inf, self._refuse_lost)
        self._is_leaving = True
        with contextlib.suppress(RuntimeError):  # the one that listens may have ended already
            if self.size > 1:
                dist.send(torch.ones(1, dtype=torch.uint8), dst=(self.rank - 1) % self.size)
        self._end_last(START_S)

    def leave(self, failure: str | None = None) -> None:
        """Ends the exchanges. ``failure``: the others' connections break, and they say this then; the first stays."""
        if failure is None:
            self.goodbye()
            dist.destroy_process_group()
            return
        self._is_leaving = True
        self._fail_here()
        if self.lost is None:
            self._say(f"rank {self.rank} failed: {failure}")
        self._end_last(PATIENCE_S)

    def _end_last(self, seconds: float) -> None:
        """The first process, at which the others may meet, waits until they have left."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{LEFT}/{self.rank}", "")
            if self.is_first:
                self._wait_for([f"{LEFT}/{rank}" for rank in range(self.size)], seconds)

    def _wait_for(self, keys: list[str], seconds: float, look: Callable[[], None] = lambda: None) -> bool:
        """Until the store has all of them, or the time is over: whether it has. ``look``: called meanwhile."""
        end = time.monotonic() + seconds
        while not self._store.check(keys):
            look()
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def join(device: str, timeout_s: float = TIMEOUT_S, on_loss: Callable[[str], None] = lambda reason: None) -> Processes:
    """The processes that torchrun started.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``: with CUDA, process i of a machine takes its GPU i.
        timeout_s, on_loss: as for :class:`Processes`.

    Raises:
        ValueError: no GPU for this process, or one that was named.
        RuntimeError: the others did not come.
    """
    end = time.monotonic() + float(os.environ.get("WANDA_KERNELS_START_S", START_S))
    place = choose_device(device)
    if place.index is not None:
        raise ValueError(f"processes take the GPUs of their numbers: device must be auto, cpu or cuda, got '{device}'")
    if place.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    if os.environ["RANK"] != "0":
        _wait_for_port(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), end)
    left = datetime.timedelta(seconds=max(1.0, end - time.monotonic()))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=left))
    except RuntimeError as error:
        raise RuntimeError(f"{NOT_HERE.format('another process')}: {' '.join(str(error).split())[:200]}") from error
    return Processes(store, rank, size, place, timeout_s, max(1.0, end - time.monotonic()), on_loss)


def _wait_for_port(host: str, port: int, end: float) -> None:
    """Until somebody listens there. torch's own wait goes on for up to twice as long as it is told."""
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(NOT_HERE.format(f"rank 0, at {host}:{port},")) from error
        time.sleep(0.1)
