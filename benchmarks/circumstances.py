"""Where and when a figure was measured: goes with every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.places import RESULTS, ROOT, slug
from wanda_kernels import _backend
from wanda_kernels.cli.info import processor_name


@cache
def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


@cache
def _driver() -> str:
    """Of the first NVIDIA card, as nvidia-smi says."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def circumstances(device: torch.device | None = None) -> dict[str, Any]:
    """Device (the CPU, where none is given), driver, versions, commit and date."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "cores": os.cpu_count(),
        "driver": f"{_driver()}, CUDA {torch.version.cuda}" if on_gpu else "",
        "kernels": _backend.cuda_status if on_gpu else _backend.cpu_status,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def folder_name(device: torch.device | None = None) -> str:
    """Of the results: ``nvidia-h100-80gb-hbm3``, or ``amd-epyc-2-cores-avx2``."""
    found = circumstances(device)
    name = found["device"]
    if device is None or device.type == "cpu":
        name += f" {found['cores']} cores {_backend.extension.isa() if _backend.extension else 'reference'}"
    return slug(name)


def write_result(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes ``{circumstances, **content}`` to ``<folder>/<name>.json``."""
    folder = folder or RESULTS / folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"circumstances": circumstances()} | content, indent=2) + "\n")
    return path
