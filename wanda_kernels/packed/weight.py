"""A weight that stays packed in memory: what holds it, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..ops import unpack_bitmap, unpack_sparse24
from .format import COLUMNS, PADDING, pack_bitmap, pack_sparse24, validate_bitmap, validate_sparse24


class PackedWeight(nn.Module):
    """A packed matrix [C_out, C_in].

    State dict: ``weight`` (the values: another shape than a dense weight's, so that nothing takes one for the other),
    and ``weight_bitmap`` [C_out, C_in / 8] and ``weight_starts`` [C_out + 1], or ``weight_indices`` [C_out, C_in / 8].
    They are checked at the first forward pass, or by :meth:`validate`.

    Args:
        in_features, out_features: ``in_features`` is a multiple of 64.
        form: ``"bitmap"`` or ``"2:4"``.
        kept: how many values a bitmap keeps.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str,
        kept: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if form not in ("bitmap", "2:4"):
            raise ValueError(f"form must be bitmap or 2:4, got '{form}'")
        if in_features % COLUMNS:
            raise ValueError(f"in_features must be a multiple of {COLUMNS}, got {in_features}")
        self.in_features, self.out_features, self.form = in_features, out_features, form

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        codes = empty(out_features, in_features // 8, dtype=torch.uint8)
        if form == "bitmap":
            values = empty(kept + PADDING)
            self.register_buffer("weight_bitmap", codes)
            self.register_buffer("weight_starts", empty(out_features + 1, dtype=torch.int32))
        else:
            values = empty(out_features, in_features // 2)
            self.register_buffer("weight_indices", codes)
        self.weight = nn.Parameter(values, requires_grad=False)
        self._is_valid = False

    def fill(self, codes: tuple[Tensor, ...]) -> Self:
        """Hold what :func:`pack` gave."""
        self.weight = nn.Parameter(codes[0], requires_grad=False)
        for name, tensor in zip(self._buffers, codes[1:], strict=True):
            self._buffers[name] = tensor
        self._is_valid = True
        return self

    def packed(self) -> tuple[Tensor, ...]:
        """What the operators take: (values, bitmap, starts) or (values, indices)."""
        names = ("weight_bitmap", "weight_starts") if self.form == "bitmap" else ("weight_indices",)
        return self.weight, *(self.get_buffer(name) for name in names)

    def unpacked(self) -> Tensor:
        """[C_out, C_in], bit for bit what was packed."""
        self.validate()
        return unpack(self.packed())

    def validate(self) -> None:
        """Raises ValueError where the packed tensors contradict each other. Once, after they were loaded."""
        if not self._is_valid:
            codes = self.packed()[1]
            if tuple(codes.shape) != (self.out_features, self.in_features // 8):
                whole = [self.out_features, self.in_features]
                raise ValueError(f"its {self.form} codes are {list(codes.shape)}, which is not 1/8 of {whole}")
            validate_bitmap(*self.packed()) if self.form == "bitmap" else validate_sparse24(*self.packed())
            self._is_valid = True

    def describe(self) -> dict[str, Any]:
        """What config.json says of it: enough to make it without its data."""
        if self.form == "2:4":
            return {"format": "2:4"}
        return {"format": self.form, "kept": self.weight.numel() - PADDING}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._is_valid = False  # to_empty() leaves what was in memory before
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_valid = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.form}"


def pack(weight: Tensor, form: str) -> tuple[tuple[Tensor, ...], int]:
    """What a :class:`PackedWeight` holds, and how many values a bitmap keeps (0 of 2:4)."""
    if form == "2:4":
        return pack_sparse24(weight), 0
    codes = pack_bitmap(weight)
    return codes, codes[0].numel() - PADDING


def unpack(packed: tuple[Tensor, ...]) -> Tensor:
    return unpack_bitmap(*packed) if len(packed) == 3 else unpack_sparse24(*packed)
