"""Runs in processes of their own, which can be killed, forked off a server that has all imported."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers.models.gemma2 import modeling_gemma2  # noqa: F401  (loaded once, in the server)
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.opt import modeling_opt  # noqa: F401

from wanda_kernels import prune
from wanda_kernels.cli.app import main
from wanda_kernels.distributed import Processes
from wanda_kernels.pruning.report import Progress
from wanda_kernels.streaming import stream_prune

HERE = Path(__file__).parent
# The server imports what it is told to from here only; what it cannot import it leaves to each child, for seconds.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["streaming_child"])


def run(model: Path, out: Path, options: dict) -> None:
    """``options``: of stream_prune."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        stream_prune(model, out, None if options.get("method") == "magnitude" else tiny.ids(), **options)


def start(model: Path, out: Path, **options) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=run, args=(model, out, options))
    process.start()
    return process


def die_while_publishing(step: int) -> None:
    """SIGKILL of this process at the ``step``-th thing that it does to files from the writing of config.json on: the
    small files, the rename, the removal of what is left."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "ctypes.dlsym"):
            return
        if not seen and not (
            event == "open" and ".partial" in str(arguments[0]) and "config.json" in str(arguments[0])
        ):
            return
        seen += 1
        if seen > step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_and_die(model: Path, out: Path, step: int, options: dict) -> None:
    die_while_publishing(step)
    run(model, out, options)


def start_and_die(model: Path, out: Path, step: int, **options) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=run_and_die, args=(model, out, step, options))
    process.start()
    return process


def at_state(count: int, action: Callable[..., None], arguments: tuple) -> None:
    """Calls ``action`` just before the ``count``-th state of this run is put in its place."""
    seen = 0

    def hook(event: str, parts: tuple) -> None:
        nonlocal seen
        if event == "os.rename" and str(parts[1]).endswith("state.json"):
            seen += 1
            if seen == count:
                action(*arguments)

    sys.addaudithook(hook)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_command(
    arguments: list[str],
    said: Path,
    file_limit: int | None,
    die_at: int | None,
    state: tuple | None,
    variables: dict[str, str],
) -> None:
    """``wanda-kernels`` with ``arguments``; what it prints goes to the file ``said``; no file may pass the limit.

    ``state``: the arguments of :func:`at_state`; ``variables``: of the environment.
    """
    torch.set_num_threads(1)
    os.environ.update(variables)
    if die_at is not None:
        die_while_publishing(die_at)
    if state is not None:
        at_state(*state)
    with said.open("w") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    main(arguments)


def start_command(
    arguments: list,
    said: Path,
    file_limit: int | None = None,
    die_at: int | None = None,
    state: tuple | None = None,
    variables: dict[str, str] | None = None,
) -> multiprocessing.process.BaseProcess:
    """As :func:`run_command`, in a process of its own."""
    words = [str(part) for part in arguments]
    process = CONTEXT.Process(target=run_command, args=(words, said, file_limit, die_at, state, variables or {}))
    process.start()
    return process


def run_rank(rank: int, size: int, folder: Path, options: dict) -> None:
    """One of ``size`` processes: prunes what ``options`` say and writes ``rank<r>.safetensors``, or the error.

    ``options``: of prune(), and ``family``, ``dtype``, ``samples``, ``changes`` (of its config); ``fails``: the rank
    that fails, and how; ``port``: where they meet, instead of at a file.
    """
    torch.set_num_threads(1)
    options = dict(options)
    dtype = getattr(torch, options.pop("dtype"))
    model = tiny.model(options.pop("family"), dtype, **options.pop("changes", {}))
    ids = tiny.ids(options.pop("samples"))
    failing, how = options.pop("fails", (None, None))
    port = options.pop("port", None)
    file = str(folder / "store")
    store = dist.FileStore(file, size) if port is None else dist.TCPStore("127.0.0.1", port, size, rank == 0)
    if rank == failing and how == "kill while connecting":
        Processes._make_group = lambda *_: die()  # type: ignore[method-assign]
    processes = None
    try:
        processes = Processes(store, rank, size, torch.device("cpu"), timeout_s=options.pop("timeout_s", 60.0))
        report = prune(model, ids, **options, processes=processes, progress=Failing(how if rank == failing else None))
    except Exception as error:  # noqa: BLE001  (whatever it is, the test looks at it)
        if processes is not None:
            processes.leave(str(error))
        (folder / f"rank{rank}.error").write_text(str(error))
        os._exit(1)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(report.to_dict(seconds=False)))
    processes.leave()


class Failing(Progress):
    """In block 1: ``raise``, ``kill`` (as the out-of-memory killer does) or ``hang``."""

    def __init__(self, how: str | None) -> None:
        self.how = how

    def block(self, name, layers) -> None:
        if self.how is None or not name.endswith(".1"):
            return
        if self.how == "raise":
            raise OSError("no space left on device")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(size: int, folder: Path, **options) -> list[multiprocessing.process.BaseProcess]:
    folder.mkdir()
    ranks = [CONTEXT.Process(target=run_rank, args=(rank, size, folder, options)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks
