"""Values of 8 or 4 bits for what a packed weight keeps: whole numbers, with a scale for a row or some columns.

=====  ==========================================  ===============================================
bits   bytes                                       scales, bfloat16
=====  ==========================================  ===============================================
8      value + 128                                 one a row, or one for 32, 64 or 128 columns
4      value + 8; rows 2p and 2p + 1 share bytes,  the same; of a whole row they are too coarse
       the low half is row 2p's
=====  ==========================================  ===============================================

Scales are bfloat16, not float16: as values are rounded to what is stored, the scale's own rounding costs nothing (the
error of a layer of SmolLM2 is equal in four digits, with float32 scales, too), and small weights have a scale as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from .._checks_quantized import GROUPS, stored_counts
from .format import bitmap_of, check_indices, counts_of, indices_of, kept, parts, population

BYTES_AFTER = 64  # that kernels may read past the last value of a bitmap


@dataclass(frozen=True)
class ValueType:
    """``bits``: 8 or 4. ``group``: columns that share a scale; 0: all of a row."""

    bits: int
    group: int

    @classmethod
    def parse(cls, values: str, group_size: int | None = None) -> ValueType | None:
        """``float`` (as the weight is: None), ``int8`` (a scale a row) or ``int4`` (for 128 columns).

        Raises:
            ValueError: another word, or another size.
        """
        if values not in ("float", "int8", "int4"):
            raise ValueError(f"values must be float, int8 or int4, got '{values}'")
        if values == "float":
            if group_size is not None:
                raise ValueError(f"group_size {group_size} needs values int8 or int4")
            return None
        allowed = (0, *GROUPS) if values == "int8" else GROUPS
        group = {"int8": 0, "int4": 128}[values] if group_size is None else group_size
        if group not in allowed:
            raise ValueError(
                f"group_size must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]} with values {values}"
                f"{' (0: a whole row)' if 0 in allowed else ''}, got {group_size}"
            )
        return cls(int(values[3:]), group)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def rows(self, rows: int) -> int:
        """Of bytes, for so many of a weight: two of 4 bits share theirs."""
        return rows if self.bits == 8 else -(-rows // 2)

    def columns(self, cols: int) -> int:
        """Of a group."""
        return min(self.group or cols, cols)

    def scales(self, cols: int) -> int:
        """Of a row."""
        return -(-cols // self.columns(cols))


def quantize(weight: Tensor, kind: ValueType, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`wanda_kernels.ops.quantize`."""
    return ops.quantize(weight, kind.bits, kind.group, importance)


def spread(scales: Tensor, kind: ValueType, cols: int) -> Tensor:
    """[C_out, C_in], float32: the scale of each weight."""
    return scales.float().repeat_interleave(kind.columns(cols), dim=1)[:, :cols]


def dequantize(levels: Tensor, scales: Tensor, kind: ValueType) -> Tensor:
    """[C_out, C_in], float32: what :func:`quantize` gave, as weights."""
    return levels.float() * spread(scales, kind, levels.shape[1])


def quantized_before(weight: Tensor, kind: ValueType) -> tuple[Tensor, Tensor] | None:
    """The levels and scales of 4 bits that ``weight`` consists of to the bit, as :func:`quantize` gives them; None
    where there are none, or of 8 bits, of which a level is as fine as a 16-bit weight's own rounding.

    So what was chosen with more than the weights at hand, or was unpacked, is packed as it was.
    """
    if kind.bits == 8:
        return None
    levels, scales, are_exact = ops.exact_levels(weight, kind.bits, kind.group)
    return (levels, scales) if bool(are_exact) else None


def pack_rows(levels: Tensor, bits: int) -> Tensor:
    """[C_out, n], n levels of each row that are all stored -> [C_out, n] uint8, or [ceil(C_out / 2), n] of 4 bits."""
    stored = levels.view(torch.uint8) + (1 << (bits - 1))  # uint8 wraps
    if bits == 8:
        return stored
    halves = pad(stored, (0, 0, 0, stored.shape[0] % 2)).unflatten(0, (-1, 2))
    return halves[:, 0] | halves[:, 1] << 4


def pack_kept(levels: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The values of a bitmap's columns ``mask``, [C_out, C_in] bool: (values [bytes + 64] uint8, starts int32).

    Of 8 bits a row follows the other; of 4 bits a pair takes as many bytes as the longer of its rows.

    Raises:
        ValueError: more bytes than int32 counts.
    """
    counts = stored_counts(counts_of(mask), bits)
    total = int(counts.sum())
    if total > 2**31 - 1:
        raise ValueError(f"weight takes {total} bytes, a bitmap counts up to {2**31 - 1}")
    starts = pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    values = torch.zeros(total + BYTES_AFTER, dtype=torch.uint8, device=levels.device)
    ops.pack_kept_(values, levels, mask, starts, bits)
    return values, starts


def pack_quantized(weight: Tensor, form: str, kind: ValueType) -> tuple[tuple[Tensor, ...], int]:
    """(values, then of a bitmap bitmap and starts, of 2:4 indices, and scales as int16), and the bytes of a bitmap's
    values, 0 of the others.

    Args:
        weight: [C_out, C_in]; ``form``: ``bitmap``, ``2:4`` or ``dense``, whose values are flat.
    """
    levels, scales = quantized_before(weight, kind) or quantize(weight, kind)
    last = scales.view(torch.int16)
    if form == "dense":
        return (pack_rows(levels, kind.bits).flatten(), last), 0
    mask = kept(weight)
    if form == "2:4":
        columns, indices = indices_of(weight)
        chosen = levels.unflatten(1, (-1, 4)).gather(2, columns).flatten(1)
        return (pack_rows(chosen, kind.bits), indices, last), 0
    values, starts = pack_kept(levels, mask, kind.bits)
    return (values, bitmap_of(mask), starts, last), values.numel() - BYTES_AFTER


def validate_quantized(packed: tuple[Any, ...], kind: ValueType, rows: int, cols: int) -> None:
    """``packed``: (values, scales, codes or None, starts or None). Raises ValueError unless the counts fit: kernels
    read what they say without looking again."""
    values, scales, codes, starts = packed
    if codes is not None and codes.dtype != torch.uint8:
        raise ValueError(f"its codes must be uint8, they are {codes.dtype}")
    if values.dtype != torch.uint8:
        raise ValueError(f"its values must be uint8, they are {values.dtype}")
    if tuple(scales.shape) != (rows, kind.scales(cols)):
        raise ValueError(f"its scales must be [{rows}, {kind.scales(cols)}], they are {list(scales.shape)}")
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError("its scales must be finite and >= 0")
    if codes is None or starts is None:
        wanted = (kind.rows(rows), cols if codes is None else cols // 2)
        if tuple(values.shape) != wanted:
            raise ValueError(f"its values must be {list(wanted)}, they are {list(values.shape)}")
        if codes is not None:
            check_indices(codes)
        return
    counts = stored_counts(population(codes), kind.bits)
    if starts.dtype != torch.int32:
        raise ValueError(f"its row starts must be int32, they are {starts.dtype}")
    expected = pad(counts.cumsum(0), (1, 0))
    if starts.shape != expected.shape or not torch.equal(starts.long(), expected):
        raise ValueError("its row starts do not fit its bitmap")
    if tuple(values.shape) != (int(expected[-1]) + BYTES_AFTER,):
        raise ValueError(f"its bitmap keeps {int(expected[-1])} bytes, {values.numel() - BYTES_AFTER} are there")


def quantized_bytes(weight: Tensor, form: str, kind: ValueType) -> int:
    """What a weight takes."""
    rows, cols = weight.shape
    scales = 2 * rows * kind.scales(cols)
    if form == "dense":
        return kind.rows(rows) * cols + scales
    if form == "2:4":
        return kind.rows(rows) * (cols // 2) + rows * (cols // 8) + scales
    counts = torch.cat([counts_of(kept(part)) for part in parts(weight)])
    stored = int(stored_counts(counts, kind.bits).sum()) + BYTES_AFTER
    return stored + rows * (cols // 8) + 4 * (kind.rows(rows) + 1) + scales
