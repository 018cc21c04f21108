"""A weight that stays packed in memory: what holds it, as a module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..memory import in_huge_pages
from ..ops import unpack_bitmap, unpack_quantized, unpack_sparse24
from .format import COLUMNS, PADDING, pack_bitmap, pack_sparse24, padded, validate_bitmap, validate_sparse24
from .values import BYTES_AFTER, ValueType, pack_quantized, validate_quantized


class PackedWeight(nn.Module):
    """A packed matrix [C_out, C_in].

    State dict: ``weight`` (the values: another shape than a dense weight's, so that nothing takes one for the other),
    and ``weight_bitmap`` [C_out, columns / 8] and ``weight_starts`` [C_out + 1], or ``weight_indices`` of that shape.
    Of values of 8 or 4 bits ``weight`` is uint8, and ``weight_scales`` [C_out, groups] holds the bits of their bfloat16
    scales as int16, which no change of the model's type rounds. They are checked at the first forward pass, or by
    :meth:`validate`.

    Args:
        in_features, out_features: where ``in_features`` is no multiple of 64, what is packed is filled up to one with
            columns that keep nothing.
        form: ``"bitmap"``, ``"2:4"``, or of 8 or 4 bits also ``"dense"``: every column is kept.
        kept: how many values a bitmap keeps; of 8 or 4 bits, how many bytes they take.
        dtype: of the values, or of what those of 8 or 4 bits are unpacked to.
        kind: of values of 8 or 4 bits.

    Attributes:
        dtype: as above; it goes with the module's ``to``. columns: ``in_features``, filled up.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str,
        kept: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        kind: ValueType | None = None,
    ) -> None:
        super().__init__()
        if form not in ("bitmap", "2:4") and (form != "dense" or kind is None):
            raise ValueError(f"form must be bitmap or 2:4 (or dense, of 8 or 4 bits), got '{form}'")
        self.in_features, self.out_features, self.form = in_features, out_features, form
        self.columns = cols = -(-in_features // COLUMNS) * COLUMNS
        self.dtype, self.kind = dtype, kind
        value, rows = dtype, out_features
        if kind is not None:
            value, rows = torch.uint8, kind.rows(out_features)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        if form == "bitmap":
            values = empty(kept + padding_of(kind), dtype=value)
            self.register_buffer("weight_bitmap", empty(out_features, cols // 8, dtype=torch.uint8))
            self.register_buffer("weight_starts", empty(rows + 1, dtype=torch.int32))
        elif form == "2:4":
            values = empty(rows, cols // 2, dtype=value)
            self.register_buffer("weight_indices", empty(out_features, cols // 8, dtype=torch.uint8))
        else:
            values = empty(rows * cols, dtype=value)  # flat: nothing takes it for a dense weight
        if kind is not None:
            self.register_buffer("weight_scales", empty(out_features, kind.scales(cols), dtype=torch.int16))
        self.weight = nn.Parameter(values, requires_grad=False)
        self._is_valid = False

    def fill(self, codes: tuple[Tensor, ...]) -> Self:
        """Hold what :func:`pack` gave."""
        self.weight = nn.Parameter(codes[0], requires_grad=False)
        for name, tensor in zip(self._buffers, codes[1:], strict=True):
            self._buffers[name] = tensor
        self._settle()
        return self

    def _settle(self) -> None:
        """What is held is valid, and lies where a product reads it fastest."""
        with torch.inference_mode(False):  # or what is made in a first forward pass could not be loaded anew
            self.weight.data = in_huge_pages(self.weight.data)
            for name, tensor in self._buffers.items():
                self._buffers[name] = None if tensor is None else in_huge_pages(tensor)
        self._is_valid = True

    def packed(self) -> tuple[Any, ...]:
        """What the operators take: (values, bitmap, starts) or (values, indices); of 8 or 4 bits (values, scales, codes
        or None, starts or None)."""
        buffers: Any = self._buffers
        codes = buffers.get("weight_bitmap" if self.form == "bitmap" else "weight_indices")
        starts = buffers.get("weight_starts")
        if self.kind is not None:
            values = self.weight if self.form != "dense" else self.weight.view(-1, self.columns)
            return values, buffers["weight_scales"].view(torch.bfloat16), codes, starts
        return (self.weight, codes) if starts is None else (self.weight, codes, starts)

    def nbytes(self) -> int:
        """Of all that is held for the weight."""
        return self.weight.nbytes + sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)

    def unpacked(self) -> Tensor:
        """[C_out, C_in], bit for bit what was packed; of 8 or 4 bits each value times its scale."""
        self.validate()
        weight = unpack(self.packed(), self.dtype, self.kind)
        return weight if self.columns == self.in_features else weight[:, : self.in_features].contiguous()

    def validate(self) -> None:
        """Raises ValueError where the packed tensors contradict each other. Once, after they were loaded."""
        if self._is_valid:
            return
        codes = self._buffers.get("weight_bitmap" if self.form == "bitmap" else "weight_indices")
        if codes is not None and tuple(codes.shape) != (self.out_features, self.columns // 8):
            whole = [self.out_features, self.columns]
            raise ValueError(f"its {self.form} codes are {list(codes.shape)}, which is not 1/8 of {whole}")
        if self.kind is not None:
            validate_quantized(self.packed(), self.kind, self.out_features, self.columns)
        elif self.form == "bitmap":
            validate_bitmap(*self.packed())
        else:
            validate_sparse24(*self.packed())
        self._settle()

    def describe(self) -> dict[str, Any]:
        """What config.json says of it: enough to make it without its data."""
        said: dict[str, Any] = {"format": self.form}
        if self.form == "bitmap":
            said["kept"] = self.weight.numel() - padding_of(self.kind)
        if self.kind is not None:
            said |= {"values": self.kind.name, "group_size": self.kind.group}
        return said

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._is_valid = False  # to_empty() leaves what was in memory before
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_valid = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.form}" + (
            "" if self.kind is None else f", values={self.kind.name}, group_size={self.kind.group}"
        )


def padding_of(kind: ValueType | None) -> int:
    """Values behind the last one of a bitmap."""
    return PADDING if kind is None else BYTES_AFTER


def pack(weight: Tensor, form: str, kind: ValueType | None = None) -> tuple[tuple[Tensor, ...], int]:
    """What a :class:`PackedWeight` holds, its values first and then its buffers in their order, and how many values (of
    8 or 4 bits: bytes) a bitmap keeps: 0 of the others."""
    weight = padded(weight)
    if kind is not None:
        return pack_quantized(weight, form, kind)
    if form == "2:4":
        return pack_sparse24(weight), 0
    codes = pack_bitmap(weight)
    return codes, codes[0].numel() - PADDING


def unpack(packed: tuple[Any, ...], dtype: torch.dtype, kind: ValueType | None = None) -> Tensor:
    """``packed``: as :meth:`PackedWeight.packed` gives it."""
    if kind is not None:
        values, scales, codes, starts = packed
        return unpack_quantized(values, scales, codes, starts, kind.bits, dtype)
    return unpack_bitmap(*packed) if len(packed) == 3 else unpack_sparse24(*packed)


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which torch multiplies matrices of ``dtype`` on this CPU: itself, or float32 where the processor has
    no instructions for it. There torch's own product of 16 bits is slow: on a Zen 3 (AVX2, two threads, 8960 x 1536)
    64 tokens of bfloat16 took 96 ms, 256 tokens 399; int8 unpacked and multiplied in float32 39 and 70."""
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return torch.float32
    mkldnn = torch.ops.mkldnn
    has = mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()
    return dtype if has else torch.float32
