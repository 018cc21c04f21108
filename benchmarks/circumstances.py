"""Where and when a figure was measured: goes with every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from wanda_kernels import _backend
from wanda_kernels.cli.info import processor_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def circumstances() -> dict[str, Any]:
    """Device, versions, commit and date."""
    return {
        "device": processor_name(),
        "cores": os.cpu_count(),
        "kernels": _backend.cpu_status,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_result(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes ``{circumstances, **content}`` to ``<folder>/<name>.json``."""
    folder = folder or RESULTS / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"circumstances": circumstances()} | content, indent=2) + "\n")
    return path
