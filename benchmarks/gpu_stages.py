"""The stages of gpu_suite.py that are the project's own, each run in a process of its own.

python -m benchmarks.gpu_stages kernels|environment|smoke|repeats|ceilings|main [--device cuda|cpu] [--quick]

What a stage prints is its log; a line "figures: {..}" is kept as JSON, and the line "summary: .." goes to the summary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import operators, products, refine
from benchmarks.circumstances import circumstances
from benchmarks.harness import Case, Settings, clone, seconds_of
from wanda_kernels import _backend, ops
from wanda_kernels.cli.info import gather
from wanda_kernels.models.load import choose_device

SHAPES = ((256, 4096), (64, 11008))
TINY = ((64, 512),)  # --quick on a CPU, where the PyTorch reference may serve
MAIN_SHAPE = ((4096, 4096),)
REPETITIONS = 200


def few_shapes(settings: Settings) -> operators.Shapes:
    """With --quick."""
    return TINY if settings.device.type == "cpu" else SHAPES[1:]


def cases(settings: Settings, shapes: operators.Shapes) -> Iterator[Case]:
    """Every operator: prune_rows_, row_mask, prune_nm_, nm_mask, refinement, packing, statistics, products."""
    for suite in (operators.select, operators.nm, refine.refine, operators.stats, products.sparse):
        yield from suite(settings, shapes)


def kernels(settings: Settings) -> str:
    """What the operators run on; on a GPU, that it is CUDA kernels built for it."""
    if settings.device.type == "cpu":
        return f"{'' if _backend.extension else 'the PyTorch reference: '}{_backend.cpu_status}"
    if _backend.extension is None:
        raise SystemExit(f"summary: {_backend.cpu_status}")
    if not _backend.extension.build_info().get("cuda"):
        raise SystemExit("summary: wanda_kernels._C was built without CUDA kernels")
    weight = torch.ones(32, 256, dtype=torch.bfloat16, device=settings.device)
    ops.prune_rows_(weight, torch.ones(256, device=settings.device), 0.5)  # fails where it was built for another card
    if int((weight == 0).sum()) != 32 * 128:
        raise SystemExit(f"summary: prune_rows_ at 0.5 left {int((weight == 0).sum())} zeros in 32 x 256")
    return _backend.cuda_status


def environment(settings: Settings) -> str:
    found = gather() | {"circumstances": {k: str(v) for k, v in circumstances(settings.device).items()}}
    print("figures: " + json.dumps({"environment": found}))
    if settings.device.type == "cuda":
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    about = found["circumstances"]
    return f"{about['device']}, {about['driver'] or 'no driver'}, torch {about['torch']}, commit {about['commit']}"


def smoke(settings: Settings) -> str:
    """Every operator once, against the reference; all are tried, whatever fails."""
    wrong, number = [], 0
    for case in cases(settings, few_shapes(settings) if settings.quick else SHAPES):
        number += 1
        torch.manual_seed(0)
        try:
            found = case.check(clone(case.make()))
        except Exception as error:  # noqa: BLE001  (told, counted, and the stage fails at the end)
            found = f"WRONG: {type(error).__name__}: {error}"
            wrong.append(str(case))
        print(f"{case}: {found}", flush=True)
    if wrong:
        raise SystemExit(f"summary: {len(wrong)} of {number} cases are wrong: {'; '.join(wrong)[:300]}")
    return f"{number} cases equal their references"


def repeats(settings: Settings) -> str:
    """The same bits every time."""
    count, differing, number = 3 if settings.quick else REPETITIONS, [], 0
    for case in cases(settings, few_shapes(settings) if settings.quick else SHAPES[:1]):
        number += 1
        torch.manual_seed(0)
        source = case.make()
        first: list[Tensor] | None = None
        for _ in range(count):
            inputs = clone(source)
            result = case.run(inputs)
            tensors = _tensors(inputs[0] if result is None else result)
            first = first or tensors
            if not all(_same_bits(a, b) for a, b in zip(tensors, first, strict=True)):
                differing.append(str(case))
                break
        print(f"{case}: {'DIFFERENT BITS' if str(case) in differing else f'{count} times the same bits'}", flush=True)
    if differing:
        raise SystemExit(f"summary: {len(differing)} cases change their bits: {'; '.join(differing)[:300]}")
    return f"{number} cases, {count} times the same bits"


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def ceilings(settings: Settings) -> str:
    """What the card can do: copying, and dense products of 8192^3."""
    found: dict[str, float] = {}
    size, side = (1 << 20, 128) if settings.quick else (1 << 30, 8192)
    source, target = (torch.ones(size, dtype=torch.uint8, device=settings.device) for _ in range(2))
    found["copy GB/s"] = 2 * size / _best(lambda: target.copy_(source), settings) / 1e9
    for name in ("bfloat16", "float32"):
        a, b = (torch.randn(side, side, device=settings.device).to(getattr(torch, name)) for _ in range(2))
        found[f"matmul {name} TFLOP/s"] = 2 * side**3 / _best(lambda a=a, b=b: a @ b, settings) / 1e12  # type: ignore[misc]
    print("figures: " + json.dumps({"ceilings": found}))
    return ", ".join(f"{name} {value:.1f}" for name, value in found.items())


def _best(call: Callable[[], Any], settings: Settings) -> float:
    call()
    return min(seconds_of(call, settings.device) for _ in range(3 if settings.quick else 20))


def main_kernels(settings: Settings) -> str:
    """Each operator once, at one shape of LLaMA-7B: for a profiler."""
    number = 0
    for case in cases(settings, few_shapes(settings) if settings.quick else MAIN_SHAPE):
        if case.dtype == torch.bfloat16:
            case.run(case.make())
            number += 1
    return f"{number} launches"


STAGES: dict[str, Callable[[Settings], str]] = {
    "kernels": kernels, "environment": environment, "smoke": smoke, "repeats": repeats, "ceilings": ceilings,
    "main": main_kernels,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    settings = Settings(device=choose_device(options.device), quick=options.quick)
    print(f"summary: {STAGES[options.stage](settings)}", flush=True)


if __name__ == "__main__":
    main()
