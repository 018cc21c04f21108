"""Host time of a packed layer's forward pass beside nn.Linear's, on a layer so small that little else is left.

    python -m benchmarks.host_time [--threads 1] [--rounds 200]

64 x 64 and one token, on the CPU: the layers take turns, 50 calls each. A line a layer: the median of its turns in
microseconds a call, p20 to p80, and the median as a multiple of nn.Linear's. An eager decoder on a GPU waits for the
host where this is longer than the kernel.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import nn

from wanda_kernels.packed import PackedLinear

CALLS = 50  # a turn


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    dense = nn.Linear(64, 64, dtype=dtype)
    with torch.no_grad():
        dense.weight[:, ::2] = 0
    packed = {f"PackedLinear {form}": PackedLinear.from_linear(dense, form) for form in ("bitmap", "2:4")}
    return {"nn.Linear": dense, **packed}


def measure(dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Layer -> microseconds a call, of each turn, in order of size."""
    found, x = layers(dtype), torch.randn(1, 64, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in found}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, layer in found.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    layer(x)
                if turn:  # the first one validates the weight and chooses the way
                    times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: sorted(taken) for name, taken in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (torch.bfloat16, torch.float32):
        times = measure(dtype, options.rounds)
        dense = times["nn.Linear"][options.rounds // 2]
        for name, taken in times.items():
            p20, p50, p80 = (taken[int(share * (len(taken) - 1))] for share in (0.2, 0.5, 0.8))
            of = str(dtype).removeprefix("torch.")
            print(f"{name:20} {of:9} {p50:6.1f} us a call ({p20:.1f} to {p80:.1f}), {p50 / dense:.2f} x nn.Linear")
    return 0


if __name__ == "__main__":
    sys.exit(main())
