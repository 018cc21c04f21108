"""What the operators are compared with: the paper's formulas, and what torch and numpy offer."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanda_kernels import _backend

Weighted = tuple[Tensor, Tensor]  # weight, norm


def sort_scatter(inputs: Weighted) -> None:
    """The official code's selection."""
    weight, norm = inputs
    score = weight.abs() * norm  # float32
    order = torch.sort(score, dim=-1, stable=True)[1][:, : weight.shape[1] // 2]
    weight.scatter_(1, order, 0)


def topk_scatter(inputs: Weighted) -> None:
    weight, norm = inputs
    score = weight.abs().float() * norm
    weight.scatter_(1, torch.topk(score, weight.shape[1] // 2, dim=-1, largest=False)[1], 0)


def kthvalue(inputs: Weighted) -> None:
    weight, norm = inputs
    score = weight.abs().float() * norm
    weight.masked_fill_(score <= torch.kthvalue(score, weight.shape[1] // 2, dim=1, keepdim=True).values, 0)


def flashinfer_topk(inputs: Weighted) -> None:
    """FlashInfer's radix select, which takes the largest."""
    import flashinfer

    weight, norm = inputs
    score = -(weight.abs().float() * norm)
    weight.scatter_(1, flashinfer.top_k(score, weight.shape[1] // 2)[1].long(), 0)


def partition(inputs: Weighted) -> None:
    weight, norm = inputs
    score = (weight.abs().float() * norm).numpy()
    k = weight.shape[1] // 2
    threshold = np.partition(score, k - 1, axis=1)[:, k - 1 : k]
    weight.masked_fill_(torch.from_numpy(score <= threshold), 0)


def select_peers(device: torch.device) -> dict[str, Callable[[Weighted], None]]:
    found: dict[str, Callable[[Weighted], None]] = {
        "sort + scatter": sort_scatter,
        "topk": topk_scatter,
        "kthvalue": kthvalue,
    }
    if device.type == "cpu":
        return found | {"np.partition": partition}
    # torch.sort and torch.topk run on CUB's segmented and radix sorts; of others, what is installed.
    return found | ({"flashinfer.top_k": flashinfer_topk} if importlib.util.find_spec("flashinfer") else {})


def official_nm(inputs: Weighted, n: int, m: int) -> None:
    weight, norm = inputs
    score = weight.abs() * norm
    mask = torch.zeros_like(score, dtype=torch.bool)
    for column in range(0, score.shape[1], m):
        lowest = torch.topk(score[:, column : column + m], m - n, dim=1, largest=False)[1]
        mask.scatter_(1, column + lowest, True)
    weight[mask] = 0


def grouped_topk(inputs: Weighted, n: int, m: int) -> None:
    """The official loop in one topk."""
    weight, norm = inputs
    groups = (weight.abs() * norm).view(weight.shape[0], -1, m)
    lowest = torch.topk(groups, m - n, dim=2, largest=False)[1]
    weight.view(groups.shape).scatter_(2, lowest, 0)


def official_norm(x: Tensor) -> Tensor:
    """The statistics of the official hook."""
    return torch.norm(x.t().float(), p=2, dim=1) ** 2


def square_sum(x: Tensor) -> Tensor:
    return (x.float() ** 2).sum(0)


def plain_read(x: Tensor) -> Tensor:
    """Reads every byte once: torch's vectorised sum, which one core does at the speed of its memory."""
    return x.view(torch.float32).sum()


def torch_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own conversion to its CUTLASS layout."""
    from torch.sparse import _semi_structured_conversions as conversions

    return conversions.sparse_semi_structured_from_dense_cutlass(weight)


def semi_structured(weight: Tensor) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(weight)


LLAMA_CPP = "test-backend-ops"  # llama.cpp's own measurement of its operators
LLAMA_CPP_SHAPE = (4096, 14336)  # what it measures, on half of the processor's threads
_PER_RUN = re.compile(r"([\d.]+) us/run")


def llama_cpp_threads() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


def llama_cpp_product(program: str, values: str) -> float:
    """Seconds of llama.cpp's product of a weight [4096, 14336] of type ``values`` (``q8_0``, ``q4_K``, ..) with one row
    of x. Its mean over a second, the same weight again and again, not in the order that a loaded model may have it in.

    Args:
        program: the path of ``test-backend-ops``.
    """
    rows, cols = LLAMA_CPP_SHAPE
    wanted = f"type_a={values},type_b=f32,m={rows},n=1,k={cols},bs=.1,1.,nr=.1,1."
    command = [program, "perf", "-b", "CPU", "-o", "MUL_MAT", "-p", wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _PER_RUN.findall(done.stdout)
    if done.returncode != 0 or len(found) != 1:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{LLAMA_CPP} gave {len(found)} figures for {values}, ended with {done.returncode}: {last}")
    return float(found[0]) / 1e6


@functools.cache
def dense_gemv() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """dense_gemv.cpp, the best dense product at batch 1 that we could write, or None where this machine cannot build
    or run it."""
    if not _backend.extension or not _backend.extension.cpu_features().get("avx512bf16") or not shutil.which("g++"):
        return None
    source = Path(__file__).parent / "dense_gemv.cpp"
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "dense_gemv.so"
        command = ["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).dense_gemv

    def run(weight: Tensor, x: Tensor, y: Tensor) -> None:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, y))
        sizes = (ctypes.c_int64(weight.shape[0]), ctypes.c_int64(weight.shape[1]))
        function(*pointers, *sizes, torch.get_num_threads())

    return run
