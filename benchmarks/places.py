"""Where results lie. Imports nothing: gpu_suite.py must start at once."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def slug(name: str) -> str:
    """In lower case, words with hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
