"""Every family of transformers' causal and image-text mappings: is it pruned, to the bits of a plain Wanda?

    python -m benchmarks.families                       all of them: writes docs/models.md and its results file
    python -m benchmarks.families --families llama,opt  these only: prints what was found, writes nothing
    python -m benchmarks.families --check [--families]  fails where a family is worse than the results file says

Each family is judged (benchmarks/family.py) on a tiny random model, in another process, with a time limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from benchmarks import models_page
from benchmarks.circumstances import circumstances
from benchmarks.family import Row, judge
from benchmarks.models_page import PAGE, RESULT
from benchmarks.tiny_configs import KINDS
from wanda_kernels.cli.display import bar

SECONDS = 60.0  # for one family, the first of a process with its imports


@dataclass
class Worker:
    """A process that judges one family after the other; importing what models need takes it longer than a family."""

    process: BaseProcess
    connection: Connection
    asked: tuple[str, str] = ("", "")
    since: float = 0.0

    @classmethod
    def start(cls) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=answer, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def ask(self, kind: str, family: str) -> None:
        self.asked, self.since = (kind, family), time.monotonic()
        self.connection.send(self.asked)

    def seconds_left(self) -> float:
        return SECONDS - (time.monotonic() - self.since)

    def row(self) -> Row | None:
        """What it found; None while it is at work. A worker that is late, or gone, must be replaced."""
        kind, family = self.asked
        lost: Row = {"kind": kind, "family": family, "class": KINDS[kind][family]}
        lost |= dict.fromkeys(("encoder", "runs", "pruned"), False)
        try:
            if self.connection.poll():
                found: Row = self.connection.recv()
                return found
        except EOFError:
            self.process.join()
            return lost | {"why": f"its process ended with {self.process.exitcode}"}
        return lost | {"why": f"it took more than {SECONDS:.0f} s"} if self.seconds_left() < 0 else None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def answer(connection: Connection) -> None:
    """A worker's work: (kind, family) -> row, until there is nobody to ask."""
    torch.set_num_threads(1)
    while True:
        try:
            kind, family = connection.recv()
        except EOFError:
            return
        connection.send(judge(kind, family))


def survey(asked: list[tuple[str, str]], jobs: int) -> Iterator[Row]:
    """The rows of ``asked`` (kind, family), as they come.

    Args:
        jobs: processes at a time.
    """
    left = list(reversed(asked))
    workers: list[Worker] = []
    idle: list[Worker] = []
    try:
        while left or len(idle) < len(workers):
            if left and not idle and len(workers) < jobs:
                workers.append(Worker.start())
                idle.append(workers[-1])
            while left and idle:
                idle.pop().ask(*left.pop())
            if left and len(workers) < jobs:
                continue
            busy = [worker for worker in workers if worker not in idle]
            wait([worker.connection for worker in busy], timeout=min(worker.seconds_left() for worker in busy) + 0.1)
            for worker in busy:
                row = worker.row()
                if row is None:
                    continue
                if worker.process.is_alive() and worker.seconds_left() > 0:
                    idle.append(worker)
                else:
                    worker.end()
                    workers.remove(worker)
                yield row
    finally:
        for worker in workers:
            worker.end()


def worse(before: list[Row], after: list[Row]) -> list[str]:
    """Families that were pruned ``before`` and are not any more, or to other bits than the plain Wanda's."""
    was = {(row["kind"], row["family"]): row for row in before}
    found = []
    for row in after:
        old = was.get((row["kind"], row["family"]))
        if old is None or not old["pruned"]:
            continue
        if not row["pruned"]:
            found.append(f"{row['family']} ({row['kind']}) is not pruned any more: {row['why']}")
        elif models_page.is_equal(old) and not models_page.is_equal(row):
            found.append(f"{row['family']} ({row['kind']}) gets other masks than the plain Wanda's: {row['bits']}")
    return found


def chosen(names: str | None, only: str | None) -> list[tuple[str, str]]:
    """(kind, family), sorted. Raises ValueError for a name that transformers does not have."""
    wanted = None if names is None else {name.strip() for name in names.split(",")}
    known = {family for families in KINDS.values() for family in families}
    if wanted is not None and (unknown := sorted(wanted - known)):
        raise ValueError(f"transformers has no family {', '.join(unknown)}")
    kinds = KINDS if only is None else {only: KINDS[only]}
    return [(kind, family) for kind in kinds for family in sorted(KINDS[kind]) if wanted is None or family in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", metavar="A,B,C", help="these only")
    parser.add_argument("--only", choices=list(KINDS), help="one mapping only")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--check", action="store_true", help="fail where a family is worse than recorded; write nothing"
    )
    options = parser.parse_args()
    try:
        asked = chosen(options.families, options.only)
    except ValueError as error:
        sys.exit(str(error))
    if options.jobs < 1:
        sys.exit(f"--jobs must be at least 1, got {options.jobs}")
    rows: list[Row] = []
    with bar() as shown:
        task = shown.add_task("families", total=len(asked))
        for row in survey(asked, options.jobs):
            rows.append(row)
            shown.update(task, description=row["family"])
            shown.advance(task)
    rows.sort(key=lambda row: (row["kind"], row["family"]))
    if options.check:
        if found := worse(json.loads(RESULT.read_text())["rows"], rows):
            sys.exit("\n".join(found))
    elif options.families or options.only:
        print("\n".join(map(models_page.line, rows)))
    else:
        result = {"circumstances": circumstances(), "rows": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(models_page.page(result))
        print(models_page.counts(rows))


if __name__ == "__main__":
    main()
