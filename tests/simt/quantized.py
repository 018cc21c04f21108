"""The CUDA kernels for packed weights of 8 or 4 bits under SIMT: as operators.py."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from wanda_kernels._checks_quantized import group_of

from .machine import Buffer, Machine
from .operators import _DTYPE, DEVICE, DTYPES, _plan, _struct

QuantizedWeight = _struct("values scales codes starts", "rows cols group groups bits")
RoundParams = _struct("x whole scales", "tokens cols group groups bits", _DTYPE)
QuantizedLinearParams = _struct(
    "", "", ("weight", QuantizedWeight),
    *((name, ctypes.c_void_p) for name in ("whole", "scales", "bias", "y", "ends")),
    ("tokens", ctypes.c_int64), ("experts", ctypes.c_int64), _DTYPE,
)  # fmt: skip
QuantizedPlan = _plan("room share ring_bytes threads")
Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Block = tuple[int, int]


class _Weight:
    """(values, scales, codes or None, starts or None), in buffers."""

    def __init__(self, packed: Packed, bits: int) -> None:
        values, scales, codes, _ = packed
        self.rows, self.groups = scales.shape
        self.cols = values.shape[1] if codes is None else codes.shape[1] * 8
        self.group, self.bits = group_of(self.cols, self.groups), bits
        parts = zip(("values", "scales", "codes", "starts"), packed, strict=True)
        buffers = [None if part is None else Buffer(part, name, False) for name, part in parts]
        self.buffers = [buffer for buffer in buffers if buffer is not None]
        pointers = [None if buffer is None else buffer.pointer for buffer in buffers]
        self.struct = QuantizedWeight(*pointers, self.rows, self.cols, self.group, self.groups, bits)


def _planned(machine: Machine, params: ctypes.Structure, block: Block | None) -> QuantizedPlan:
    """`block`: tokens that there is room for (1, 4 or 8), warps at most. None: the launcher's choice."""
    plan = QuantizedPlan()
    arguments = (ctypes.byref(params), ctypes.byref(DEVICE), *(block or (0, 0)), ctypes.byref(plan))
    machine.library.simt_plan_quantized(*arguments)
    return plan


def rounded(machine: Machine, x: Tensor, group: int, groups: int, bits: int) -> tuple[Tensor, Tensor]:
    """(bytes [tokens, C_in / 16, bits / 4, 16] int8, scales [tokens, groups])"""
    tokens, cols = x.shape
    inputs = Buffer(x, "x", False)
    whole = Buffer(torch.full((tokens, cols // 16, bits // 4, 16), 85, dtype=torch.int8), "whole")
    scales = Buffer(torch.full((tokens, groups), math.nan), "x scales")
    params = RoundParams(
        inputs.pointer, whole.pointer, scales.pointer, tokens, cols, group, groups, bits, DTYPES[x.dtype]
    )
    machine.run("simt_round", [inputs, whole, scales], ctypes.byref(params))
    return whole.tensor(), scales.tensor()


def linear(
    machine: Machine, x: Tensor, packed: Packed, bits: int, bias: Tensor | None = None, ends: Tensor | None = None, *,
    block: Block | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, C_in], sorted by expert where there are `ends`; `block` as in _planned."""
    weight, tokens, experts = _Weight(packed, bits), len(x), 1 if ends is None else len(ends)
    whole, scales = rounded(machine, x, weight.group, weight.groups, bits)
    inputs, factors = Buffer(whole, "whole", False), Buffer(scales, "x scales", False)
    added = Buffer(torch.zeros(1, dtype=x.dtype) if bias is None else bias, "bias", False)
    bounds = Buffer(torch.zeros(1, dtype=torch.int32) if ends is None else ends, "ends", False)
    rows = weight.rows // experts
    y = Buffer(torch.full((tokens, rows), math.nan if ends is None else 0, dtype=x.dtype), "y")
    params = QuantizedLinearParams(
        weight.struct, inputs.pointer, factors.pointer, None if bias is None else added.pointer, y.pointer,
        None if ends is None else bounds.pointer, tokens, experts, DTYPES[x.dtype],
    )  # fmt: skip
    plan = _planned(machine, params, block)
    buffers = [*weight.buffers, inputs, factors, added, bounds, y]
    machine.run("simt_quantized_linear", buffers, ctypes.byref(params), ctypes.byref(plan))
    return y.tensor()


def unpack(machine: Machine, packed: Packed, bits: int, dtype: torch.dtype, *, warps: int = 8) -> Tensor:
    weight = _Weight(packed, bits)
    dense = Buffer(torch.full((weight.rows, weight.cols), math.nan, dtype=dtype), "dense")
    plan = _planned(machine, QuantizedLinearParams(weight=weight.struct), (1, warps))
    machine.run(
        "simt_unpack_quantized", [*weight.buffers, dense], ctypes.byref(weight.struct),
        ctypes.c_void_p(dense.pointer), DTYPES[dtype], ctypes.byref(plan),
    )  # fmt: skip
    return dense.tensor()
