"""``wanda-kernels``, and ``python -m wanda_kernels``: the command line, from its first moment."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _end(number: int, _frame: FrameType | None) -> None:
    print("wanda-kernels: error: interrupted; no output was written", file=sys.stderr, flush=True)
    os._exit(128 + number)


def main() -> None:
    """Runs a command and exits. The imports take seconds, and an exception in the middle of one may be lost there."""
    if "RANK" in os.environ:  # torch warns at length where another process has ended; what it means is said here
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        from .cli.app import main as run
    except (ImportError, ValueError) as error:  # the kernels do not load, or not as the environment asks
        print(f"wanda-kernels: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(1)

    for number, handler in before.items():
        signal.signal(number, handler)
    run()


if __name__ == "__main__":
    main()
