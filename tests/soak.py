"""Prunes random small models with random options and a fault in most runs: a full disk, damaged or incomplete models,
signals, kills while publishing, wrong states, shards that vanish, processes that disagree or die, two commands at once.
Each must end in a complete and correct output, or in a clear error with nothing half-written; a streamed run that left
a state must go on from it to the correct output, or refuse it and begin anew.

python tests/soak.py [--runs 200] [--seed 0] [--from N] [--only N] [--stop]

A run that breaks its promise leaves its folder, with its inputs and run.json, and the command that repeats it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import soak_faults
import soak_ranks
import torch
from soak_run import TURNS, Run
from transformers.utils import logging

FAULTS: dict[str, Callable[[Run], None]] = dict.fromkeys(TURNS, soak_faults.old_faults) | {
    "kill while publishing": soak_faults.kill_while_publishing,
    "wrong state": soak_faults.wrong_state,
    "shard vanishes": soak_faults.shard_vanishes,
    "missing tensor": soak_faults.missing_tensor,
    "other rank": soak_ranks.other_rank,
    "killed rank": soak_ranks.killed_rank,
    "two commands": soak_ranks.two_commands,
}


@dataclass
class Tally:
    """How often each fault ended in an output, in an error, in a state to go on from; what broke the promise."""

    counts: Counter[str] = field(default_factory=Counter)
    red: dict[int, str] = field(default_factory=dict)  # by the run's number


def end_of(run: Run) -> str:
    for mark in ("went on", "refused", "anew"):
        if f"| {mark}" in run.outcome:
            return mark
    return "output" if run.out.exists() else "error"


def soak(numbers: Iterable[int], seed: int, tell: bool = False, stop: bool = False) -> Tally:
    """All runs are gone through, also after a red one, unless ``stop``."""
    tally = Tally()
    for number in numbers:
        run = Run(number, seed, Path(tempfile.mkdtemp(prefix="soak-")))
        try:
            FAULTS[run.fault](run)
        except Exception as error:  # noqa: BLE001  (whatever it is, the run is red, and the next one is begun)
            tally.red[number] = keep(run, error)
            print(tally.red[number], file=sys.stderr, flush=True)
            if stop:
                break
        else:
            tally.counts[f"{run.fault}: {end_of(run)}"] += 1
            shutil.rmtree(run.base)
            if tell:
                print(f"{run}\n       {run.outcome}", flush=True)
        finally:
            run.end()
    return tally


def keep(run: Run, error: Exception) -> str:
    """Writes down, in the folder that stays, what was run; what is to be printed of it."""
    said = str(error) if isinstance(error, AssertionError) else "".join(traceback.format_exception(error))
    (run.base / "run.json").write_text(run.to_json())
    return f"RED {run}\n    {run.outcome}\n    {said}\n    kept: {run.base}\n    again: {again(run.seed, run.number)}"


def again(seed: int, number: int) -> str:
    return f"python tests/soak.py --seed {seed} --only {number}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="begin with this run")
    parser.add_argument("--only", type=int, metavar="N", help="this run alone")
    parser.add_argument("--stop", action="store_true", help="at the first red run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    numbers = range(options.first, options.runs) if options.only is None else [options.only]
    tally = soak(numbers, options.seed, tell=True, stop=options.stop)
    for end, count in sorted(tally.counts.items()):
        print(f"{end:34} {count}")
    if tally.red:
        sys.exit("\n".join([f"{len(tally.red)} red", *(f"    {again(options.seed, number)}" for number in tally.red)]))


if __name__ == "__main__":
    main()
