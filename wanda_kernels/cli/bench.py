"""``wanda-kernels bench``: the benchmarks of a checkout of the repository (benchmarks/bench.py)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import typer

# What it is given goes to the benchmarks' own command, --help too.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench_command(context: typer.Context) -> int:
    """Measure the kernels and whole runs, each checked first, against their peers, side by side."""
    # beside the package in a checkout, and not installed
    start = Path(__file__).resolve().parents[2] / "benchmarks" / "__init__.py"
    if not start.is_file():
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package: run this in a checkout of the repository, with "
            "`python -m wanda_kernels bench`, or after `pip install --no-build-isolation --editable .`"
        )
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", start, submodule_search_locations=[str(start.parent)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks"] = module
        spec.loader.exec_module(module)
    bench: Any = importlib.import_module("benchmarks.bench")
    return bench.app(args=context.args, prog_name="wanda-kernels bench", standalone_mode=False) or 0
