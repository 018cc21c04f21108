"""Fused experts whose weights stay packed: a token reads those of its own experts alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from ..models.experts import ExpertsLayout, layout_of
from ..pruning.blocks import what_it_computes
from .format import check_width, join_bitmaps, padded
from .values import ValueType
from .weight import PackedWeight, pack, padding_of

_PRODUCTS = {"bitmap": torch.ops.wanda.bitmap_experts.default, "2:4": torch.ops.wanda.sparse24_experts.default}
_QUANTIZED = torch.ops.wanda.quantized_experts.default


class PackedStack(PackedWeight):
    """The weights [E, C_out, C_in] of a module's experts, as one packed matrix [E * C_out, C_in].

    Args:
        experts, in_features, out_features: E, C_in, C_out.
        form, kept, dtype, kind: as of :class:`PackedWeight`; of 4 bits C_out is even.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        form: str,
        kept: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        kind: ValueType | None = None,
    ) -> None:
        super().__init__(in_features, experts * out_features, form, kept, dtype, device, kind)
        self.experts = experts

    @classmethod
    def from_weight(cls, weight: Tensor, form: str, kind: ValueType | None = None) -> PackedStack:
        """Packs a weight [E, C_out, C_in], as :func:`choose_format` chose for it as one matrix: expert by expert, for
        packing takes several times the memory of what is packed."""
        parts, counts = zip(*(pack(one, form, kind) for one in weight), strict=True)
        columns = list(zip(*parts, strict=True))
        codes = tuple(torch.cat(held) for held in columns)
        if form == "bitmap":
            bitmaps = list(zip(*columns[:3], strict=True))
            codes = (*join_bitmaps(bitmaps, padding_of(kind)), *codes[3:])
        experts, rows, cols = weight.shape
        return cls(experts, cols, rows, form, sum(counts), weight.dtype, "meta", kind).fill(codes)

    def dense(self) -> Tensor:
        """[E, C_out, C_in], bit for bit what was packed."""
        return self.unpacked().view(self.experts, -1, self.in_features)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """[rows, C_out] of ``rows`` [rows, C_in], sorted by expert, those of each up to its entry of ``ends`` (int32,
        for all experts or the first of them)."""
        if rows.is_meta:  # shapes alone
            return rows.new_empty(rows.shape[0], self.out_features // self.experts)
        if not self._is_valid:
            self.validate()
        if len(ends) < self.experts:  # what lies behind the last one that computes
            ends = torch.cat([ends, ends[-1:].expand(self.experts - len(ends))])
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        rows = rows.to(dtype)  # as torch's own product of experts
        if rows.requires_grad and torch.is_grad_enabled():  # the operators have no gradient
            return grouped_mm(rows, self.dense().to(dtype).transpose(-1, -2), offs=ends)
        values, *codes = self.packed()
        check_width(rows, self.in_features)
        rows = padded(rows)
        if self.kind is not None:
            scales, bitmap, starts = codes
            return _QUANTIZED(rows, values, scales, ends, bitmap, starts, self.kind.bits)
        return _PRODUCTS[self.form](rows, values.to(dtype), *codes, ends)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class PackedExperts(nn.Module):
    """In the place of a module of fused experts, whose class it extends: the same, but for weights that are packed and
    a forward that multiplies with them, whatever ``experts_implementation`` the model has.

    State dict: for a packed weight, instead of the parameter, that of the :class:`PackedStack` ``packed_up`` or
    ``packed_down``: names that no conversion of transformers takes for an expert's. The other weight may be dense.
    """

    layout: ExpertsLayout

    @staticmethod
    def of(module: nn.Module) -> PackedExperts:
        """A module that shares everything with ``module``, nothing packed yet; ``module`` itself, if it is one."""
        if isinstance(module, PackedExperts):
            return module
        layout, experts = layout_of(module), cast(Any, type(module))
        assert layout is not None
        packed: Any = _copy_as(packed_class(experts), module)
        packed.layout = dataclasses.replace(layout, module=packed, kind=experts, count=layout.experts)
        packed._is_hf_initialized = True  # or transformers would look for what is packed, to fill it
        return cast(PackedExperts, packed)

    def place_of(self, name: str) -> str:
        """Of a weight's stack, by the weight's name."""
        return "packed_up" if name == self.layout.up else "packed_down"

    def stack_of(self, name: str) -> PackedStack | None:
        return cast(PackedStack | None, self._modules.get(self.place_of(name)))

    def put(self, name: str, stack: PackedStack) -> None:
        """Take ``stack`` for the weight ``name``, which is let go."""
        self._parameters[name] = None  # it stays in its place among the others
        self.add_module(self.place_of(name), stack)

    def to_dense(self) -> nn.Module:
        """The module that was packed, with the same weights, bit for bit."""
        dense: Any = _copy_as(dense_class(type(self)), self)
        del dense.layout
        for name in self.layout.names:
            stack = self.stack_of(name)
            if stack is not None:
                weight = stack.dense()
                weight = weight.transpose(-1, -2).contiguous() if self.layout.is_transposed else weight
                dense._parameters[name] = nn.Parameter(weight)
                del dense._modules[self.place_of(name)]
        return dense

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As the class is called."""
        return self.layout.call(args, kwargs, self._product)

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        stack = self.stack_of(name)
        return self.layout.dense_product(name, rows, ends) if stack is None else stack(rows, ends)

    def __reduce__(self) -> Any:  # its class has no name that pickle could look up
        return _empty, (dense_class(type(self)),), self.__dict__


@functools.cache
def packed_class(experts: type[nn.Module]) -> type[PackedExperts]:
    return type(f"Packed{experts.__name__}", (PackedExperts, experts), {"__module__": __name__})


def dense_class(packed: type[PackedExperts]) -> type[nn.Module]:
    return cast(type[nn.Module], packed.__bases__[1])


def _empty(experts: Any) -> PackedExperts:
    return object.__new__(packed_class(experts))


def _copy_as(kind: Any, module: nn.Module) -> Any:
    """A module of another class with the attributes of ``module``; what it holds by name can be changed apart."""
    made = object.__new__(kind)
    made.__dict__.update(module.__dict__)
    for held in ("_parameters", "_buffers", "_modules"):
        made.__dict__[held] = dict(module.__dict__[held])
    for wrapped in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, around the forward of the other
        made.__dict__.pop(wrapped, None)
    return made


def why_not_packable_experts(module: nn.Module) -> str | None:
    """Why a module of experts must not be replaced by a packed one; None if it may."""
    if layout_of(module) is None:
        return f"experts of a {type(module).__name__} are not packed"
    if (other := what_it_computes(module)) is not None:
        return other
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks, which would be lost" if any(hooks) or "forward" in vars(module) else None
