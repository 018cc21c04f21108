"""The faults of several processes that the soak test knows: they disagree, one is killed, two write to one place."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import saved
import tiny
import torch
from soak_run import Run, last_line, wait

ENDS_WITHIN_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(run: Run, commands: list[list[Any]], variables: dict[str, str] | None = None) -> list[BaseProcess]:
    """One process for each command, as torchrun would start them; they print to said<rank>.txt."""
    shared = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= variables or {}
    return [
        run.start(command, said_of(run, rank), variables=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, command in enumerate(commands)
    ]


def said_of(run: Run, rank: int) -> Path:
    return run.base / f"said{rank}.txt"


def exit_codes(processes: list[BaseProcess], what: str) -> list[int]:
    """Of processes that must end within 30 s from now."""
    end = time.monotonic() + ENDS_WITHIN_S
    for rank, process in enumerate(processes):
        process.join(max(0.0, end - time.monotonic()))
        assert not process.is_alive(), f"rank {rank} still runs {ENDS_WITHIN_S:.0f} s after {what}"
    return [process.exitcode or 0 for process in processes]


# What rank 1 has differently -> how an error names it.
MISMATCHES = {
    "other weights": "model|weight|tensor", "other layers": "model|layer|config", "other dtype": "model|dtype|tensor",
    "other text": "calibration|text|token", "seed": "seed|calibration|token", "sparsity": "sparsity",
    "pattern": "pattern", "method": "method", "samples": "samples|calibration", "length": "length|calibration",
    "propagate": "propagate", "fuse": "fuse", "stream": "stream", "batch size": "batch.size", "other out": r"\bout",
}  # fmt: skip


def differently(run: Run, kind: str) -> list[Any]:
    """The command of rank 1."""
    model, out, text = run.model, run.out, run.text
    options, stream = dict(run.options), run.stream
    extra: list[str] = []
    if kind in ("other weights", "other layers", "other dtype"):
        model = run.base / "inputs" / "model"
        dtype = {"float32": torch.bfloat16, "bfloat16": torch.float32}[run.dtype]
        dtype = dtype if kind == "other dtype" else getattr(torch, run.dtype)
        other = tiny.model(run.family, dtype, **({"num_hidden_layers": 2} if kind == "other layers" else {}))
        if kind == "other weights":
            with torch.no_grad():
                other.get_input_embeddings().weight.mul_(1.5)
        other.save_pretrained(model, max_shard_size=run.shard)
        saved.tokenizer().save_pretrained(model)
    elif kind == "other text":
        text = run.base / "other.txt"
        text.write_text(saved.text(400, seed=1))
    elif kind == "other out":
        out = run.base / "out2"
    elif kind in ("seed", "samples", "length"):
        extra = [f"--{kind}", {"seed": "7", "samples": "5", "length": "20"}[kind]]
    elif kind == "stream":
        stream = not stream
    elif kind == "sparsity":
        options = {"sparsity": options.get("sparsity", 0.5) / 2} | {k: v for k, v in options.items() if k != "pattern"}
    elif kind == "pattern":
        options["pattern"] = "4:8" if options.get("pattern") == "2:4" else "2:4"
        options.pop("sparsity", None)
    elif kind == "method":
        options["method"] = "magnitude"
    elif kind == "propagate":
        options["propagate"] = "dense" if options["propagate"] == "pruned" else "pruned"
    elif kind == "fuse":
        options["fuse_statistics"] = not options["fuse_statistics"]
    else:
        options["batch_size"] = 3 - options["batch_size"]
    mine = (run.options, run.stream)
    run.options, run.stream = options, stream
    run.write_arguments(text)
    command = ["prune", model, "--out", out, *run.arguments, *extra]
    run.options, run.stream = mine
    run.write_arguments()
    return command


def other_rank(run: Run) -> None:
    """One thing differs: refused by name, by both, and nothing is written."""
    kind = sorted(MISMATCHES)[run.turn % len(MISMATCHES)]
    run.save_model()
    commands = [["prune", run.model, "--out", run.out, *run.arguments], differently(run, kind)]
    codes = exit_codes(start_ranks(run, commands), "the start")
    run.outcome = f"{codes} {kind}: "
    assert not run.out.exists(), f"{kind}: a model of two kinds was written"
    assert not (run.base / "out2").exists(), f"{kind}: a model of two kinds was written"
    for rank, code in enumerate(codes):
        said = run.check_error(code, said_of(run, rank))
        run.outcome += f"{said[:150]} | "
        assert said.startswith(f"rank {rank}: "), f"{kind}: no rank is named: {said}"
        assert re.search(MISMATCHES[kind], said.replace(str(run.base), "").lower()), f"{kind} is not named: {said}"
        assert "rank 1" in said, f"{kind}: who differs is not said: {said}"
        assert "rank 0" in said, f"{kind}: who differs is not said: {said}"
    assert run.left() == set(), run.left()


def killed_rank(run: Run) -> None:
    """One of two or three is ended by a signal, at a drawn moment from the start on: the others end soon, and say so,
    or the output is whole. A command after it ends in the right files."""
    run.save_model()
    draw = run.draw
    size = draw.choice((2, 2, 3))
    victim = draw.randrange(size)
    name = draw.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"))
    moment = draw.choice((0.0, draw.uniform(0, 0.4), draw.uniform(0, 1.5), draw.uniform(0, 1.5)))
    # As it is by default in one of four: what it is set to is waited for in most of the others.
    start = {} if run.turn % 4 == 0 else {"WANDA_KERNELS_START_S": "8"}
    command = ["prune", run.model, "--out", run.out, *run.arguments]
    processes = start_ranks(run, [command] * size, start)
    time.sleep(moment)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if victim in alive:
        os.kill(processes[victim].pid or 0, getattr(signal, name))
    codes = exit_codes(processes, f"rank {victim} of {size} got a {name} at {moment:.2f} s")
    run.outcome = f"{codes} {name} to rank {victim} of {size} at {moment:.2f} s"
    others = [rank for rank in alive if rank != victim and victim in alive]
    run.outcome += "".join(f" | {last_line(said_of(run, rank))[:120]}" for rank in others)
    if run.out.exists():
        run.check_output()
    else:
        assert codes[0] != 0, "no output, and the first says that all is well"
        for rank in others:
            run.check_error(codes[rank], said_of(run, rank))
    left = run.left()
    if codes[0] == -signal.SIGKILL or codes[0] == -signal.SIGTERM:  # the one that writes
        assert all(path == ".out.partial" if run.stream else path.startswith(".out.partial-") for path in left), left
    else:
        assert not left, f"left beside the output: {left}"
    code = wait(run.start([*command, "--overwrite"]))
    assert code == 0, f"the command after it: {last_line(run.said)}"
    run.check_output()
    assert run.left() == (set() if run.stream else left), run.left()


LOSES = "is being written by process|is not empty|was written by another command|holds an unfinished run"


def two_commands(run: Run) -> None:
    """Into one place at once, without --overwrite: exactly one output, whole and right. The loser says so; what it
    made it may keep, if it says where."""
    run.save_model()
    expected, commands = [run.expected], [["prune", run.model, "--out", run.out, *run.arguments]]
    mine = run.arguments
    run.options = {"sparsity": 0.25} | {key: v for key, v in run.options.items() if key not in ("pattern", "sparsity")}
    run.stream = run.draw.random() < 0.5
    run.write_arguments()
    expected.append(run.reference(run.options))
    commands.append(["prune", run.model, "--out", run.out, *run.arguments])
    processes = []
    for number, command in enumerate(commands):
        processes.append(run.start(command, said_of(run, number)))
        time.sleep(run.draw.choice((0.0, run.draw.uniform(0, 0.5))) if number == 0 else 0.0)
    codes = [wait(process) for process in processes]
    said = [last_line(said_of(run, number)) for number in (0, 1)]
    run.outcome = f"{codes} {' | '.join(line[:150] for line in said)}"
    assert sorted(codes) == [0, 1], f"exit codes {codes}: {said}"
    winner = codes.index(0)
    loser = 1 - winner
    run.check_output(expected[winner])
    error = run.check_error(1, said_of(run, loser))
    assert re.search(LOSES, error), f"the loser does not say why: {error}"
    for name in run.left():
        kept = run.base / name
        if name.startswith("out.partial-"):
            assert str(kept) in error, f"{name} is left, and nothing says so: {error}"
            run.check_output(expected[loser], kept)
            shutil.rmtree(kept)
        else:
            assert name == ".out.partial", f"{name} is left"
            assert str(kept) in said_of(run, loser).read_text(), f"{name} is left, and nothing says so: {error}"
            command = [*commands[loser], "--resume", "--overwrite"]
            assert wait(run.start(command)) == 0, last_line(run.said)
            run.check_output(expected[loser])
            run.outcome += " | went on"
    assert not run.left(), run.left()
    run.arguments = mine
