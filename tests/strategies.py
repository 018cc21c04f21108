"""Rows that break selection: one set of Hypothesis strategies for every backend."""

from __future__ import annotations

import os

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

MORE = int(os.environ.get("MORE_DRAWS", "1"))  # `make soak`: times as many draws in slow tests as `make test` has
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (
    "normal",
    "ties",
    "plateau",
    "heavy tail",
    "sorted",
    "descending",
    "constant",
    "zeros",
    "denormal",
    "extremes",
    "non-finite",
    "four bits",
)
# Around vector widths, SmolLM2's widths, and LLaMA's.
WIDTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 576, 1000, 1536)


def weight_of(kind: str, rows: int, cols: int, generator: np.random.Generator) -> np.ndarray:
    """[rows, cols], float32."""
    normal = generator.standard_normal((rows, cols)).astype(np.float32)
    if kind == "ties":
        return np.round(normal * 2) / 2
    if kind == "plateau":
        return np.where(generator.random((rows, cols)) < 0.8, np.float32(0.5), normal)
    if kind == "heavy tail":
        return normal / np.maximum(np.abs(generator.standard_normal((rows, cols))), 1e-3).astype(np.float32) ** 3
    if kind == "sorted":
        return np.sort(np.abs(normal), axis=1)
    if kind == "descending":
        return np.sort(np.abs(normal), axis=1)[:, ::-1].copy()
    if kind == "constant":
        return np.full((rows, cols), generator.choice([0.25, -3.0, 1e-3]), dtype=np.float32)
    if kind == "zeros":
        return np.where(generator.random((rows, cols)) < 0.7, generator.choice([0.0, -0.0]), normal)
    if kind == "denormal":
        return normal * np.float32(1e-40)
    if kind == "extremes":
        return normal * generator.choice([1e-30, 1e-10, 1.0, 1e10, 1e30], (rows, cols)).astype(np.float32)
    if kind == "non-finite":
        return np.where(generator.random((rows, cols)) < 0.3, generator.choice([np.nan, np.inf, -np.inf]), normal)
    if kind == "four bits":
        return (generator.integers(0, 16, (rows, cols)) - 8).astype(np.float32) * np.float32(0.0173)
    return normal


def norm_of(kind: str, cols: int, generator: np.random.Generator) -> np.ndarray:
    """[cols], float32; >= 0 but for the kinds that no statistics give and that must work all the same."""
    norm = np.abs(generator.standard_normal(cols)).astype(np.float32) + np.float32(0.01)
    if kind == "ones":
        return np.ones(cols, dtype=np.float32)
    if kind == "some zero":
        return np.where(generator.random(cols) < 0.3, np.float32(0), norm)
    if kind == "negative zero":
        return np.where(generator.random(cols) < 0.3, np.float32(-0.0), norm)
    if kind == "negative":
        return np.where(generator.random(cols) < 0.2, -norm, norm)
    if kind == "non-finite":
        return np.where(generator.random(cols) < 0.2, generator.choice([np.nan, np.inf]), norm).astype(np.float32)
    if kind == "outliers":
        return np.where(generator.random(cols) < 0.05, norm * 100, norm).astype(np.float32)
    return norm


NORMS = ("usual", "ones", "some zero", "negative zero", "negative", "non-finite", "outliers")


@st.composite
def matrices(draw: st.DrawFn, widths: tuple[int, ...] = WIDTHS, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(weight [rows, cols], norm [cols]); now and then with rows that are not adjacent in memory."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cols = draw(st.sampled_from([width * multiple for width in widths]))
    rows = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(KINDS))
    with np.errstate(over="ignore", invalid="ignore"):
        values = weight_of(kind, rows, cols, generator)
    weight = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)
    if draw(st.booleans()):
        storage = torch.full((rows, cols + draw(st.sampled_from([1, 3, 16]))), 7.0, dtype=dtype)
        storage[:, :cols] = weight
        weight = storage[:, :cols]
    norm = torch.from_numpy(norm_of(draw(st.sampled_from(NORMS)), cols, generator))
    return weight, norm


@st.composite
def stacks(draw: st.DrawFn, widths: tuple[int, ...] = WIDTHS, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(weight [E, rows, cols], norm [E, cols]): rows adjacent, evenly strided, or not, or transposed in memory."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cols = draw(st.sampled_from([width * multiple for width in widths]))
    matrices, rows = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(DTYPES))
    with np.errstate(over="ignore", invalid="ignore"):
        kinds = [draw(st.sampled_from(KINDS)) for _ in range(matrices)]
        values = np.stack([weight_of(kind, rows, cols, generator) for kind in kinds])
        norms = np.stack([norm_of(draw(st.sampled_from(NORMS)), cols, generator) for _ in range(matrices)])
    weight = torch.from_numpy(values.astype(np.float32)).to(dtype)
    more_rows, more_cols = draw(st.sampled_from([(0, 0), (0, 3), (0, 16), (1, 0), (2, 1)]))
    shape = (matrices, rows + more_rows, cols + more_cols)
    storage = torch.full(shape, 7.0, dtype=dtype)
    if draw(st.integers(0, 3)) == 0:
        storage = storage.transpose(1, 2).contiguous().transpose(1, 2)
    placed = storage[:, :rows, :cols]
    placed.copy_(weight)
    return placed, torch.from_numpy(norms.astype(np.float32))


def sparsities() -> st.SearchStrategy[float]:
    return st.one_of(
        st.sampled_from([0.0, 0.5, 0.25, 0.6, 0.9, 0.99, 0.999, float(np.nextafter(1.0, 0.0))]),
        st.floats(0.0, 1.0, exclude_max=True),
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that tells -0.0 from +0.0 and sees equal NaN payloads as equal."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(integers), right.contiguous().view(integers)
    )


def copy_with_strides(tensor: Tensor) -> Tensor:
    """A copy in memory of its own with the same strides, so that neighbours of its rows can be watched."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copy.copy_(tensor)
