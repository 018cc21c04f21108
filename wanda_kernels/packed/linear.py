"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.sparse import to_sparse_semi_structured

from . import dispatch
from .format import check_width, padded
from .values import ValueType
from .weight import PackedWeight, pack, unpack

# The operators without their wrappers: finding them is a tenth of a small layer's time.
_PRODUCTS = {"bitmap": torch.ops.wanda.bitmap_linear.default, "2:4": torch.ops.wanda.sparse24_linear.default}
_QUANTIZED = torch.ops.wanda.quantized_linear.default


class PackedLinear(PackedWeight):
    """``nn.Linear`` on a packed weight. One copy of the weight is resident; what it is unpacked into, on the CPU
    a band of rows at a time, is freed again.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        form, kept, dtype, kind: as of :class:`PackedWeight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        form: str,
        kept: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        kind: ValueType | None = None,
    ) -> None:
        super().__init__(in_features, out_features, form, kept, dtype, device, kind)
        added = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if added is None else nn.Parameter(added, requires_grad=False)
        self._prefill: Tensor | None = None

    @classmethod
    def from_linear(cls, layer: nn.Linear, form: str, kind: ValueType | None = None) -> PackedLinear:
        """Pack a layer's weight; ``form`` as :func:`choose_format` gives it."""
        weight, has_bias = layer.weight.data, layer.bias is not None
        codes, kept = pack(weight, form, kind)
        packed = cls(layer.in_features, layer.out_features, has_bias, form, kept, weight.dtype, "meta", kind)
        if packed.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return packed.fill(codes)

    def to_linear(self) -> nn.Linear:
        """A dense layer with the same weight, bit for bit; of 8 or 4 bits with what it stands for."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.unpacked())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:  # shapes alone
            return x.new_empty(*x.shape[:-1], self.out_features)
        kind = "cpu" if x.is_cpu else x.device.type  # the latter takes 0.3 us
        packed = self.packed()
        bias: Tensor | None = self._parameters.get("bias")
        if torch.is_autocast_enabled(kind):  # as nn.Linear: x, weight and bias in autocast's type
            dtype = torch.get_autocast_dtype(kind)
            bias = None if bias is None else bias.to(dtype)
            with torch.autocast(kind, enabled=False):
                values = packed[0] if self.kind is not None else packed[0].to(dtype)
                return self._multiply(x.to(dtype), (values, *packed[1:]), bias)
        return self._multiply(x, packed, bias)

    def _multiply(self, x: Tensor, packed: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        if not self._is_valid:
            self.validate()
        device, form = x.device, self.form
        dtype = packed[0].dtype if self.kind is None else x.dtype
        if x.requires_grad and torch.is_grad_enabled():  # the operators have no gradient
            return linear(x, self.unpacked().to(dtype), bias)
        if self.columns != self.in_features:
            check_width(x, self.in_features)
            x = padded(x)
        tokens = x.numel() // self.columns
        # Of 8 or 4 bits the ways differ in more than rounding, as one of them rounds x: never by time
        if tokens == 0 or self.kind is not None or torch.compiler.is_compiling():
            return self._product(dispatch.unasked(form, device, tokens), x, packed, bias)
        has_copy = self._prefill is not None and dtype == self._prefill.dtype
        if has_copy:
            form += " + copy"
        bits = (tokens - 1).bit_length()
        key = (form, dtype, self.out_features, self.in_features, bits, device, torch.get_num_threads())
        way = dispatch.known(key)
        if way == "packed" and tokens <= dispatch.DIRECT_TOKENS:
            return self._call(x, packed, bias)
        if way is None:
            ways = dispatch.WAYS if has_copy else dispatch.WAYS[:2]
            way = dispatch.choose(key, ways, lambda way: self._product(way, x, packed, bias))
        return self._product(way, x, packed, bias)

    def _call(self, x: Tensor, packed: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        if self.kind is not None:
            return _QUANTIZED(x, *packed, bias, self.kind.bits)
        return _PRODUCTS[self.form](x, *packed, bias)

    def _product(self, way: str, x: Tensor, packed: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        if way == "packed":
            return self._packed_product(x, packed, bias)
        if way == "unpack":
            return self._dense_product(x, packed, bias)
        assert self._prefill is not None
        return linear(x, self._prefill, bias)

    def keep_prefill_copy(self) -> None:
        """Keep the weight as torch's semi-structured tensor too, for products with many tokens: 9/16 of the dense size
        once more. It is not saved, and gone when the layer moves or is loaded again.

        Raises:
            ValueError: the layer is not 2:4, not on CUDA, not of a 16-bit type, or of a shape that torch does not take.
        """
        where = f"a layer of [{self.out_features}, {self.in_features}], {self.form}, {self.weight.dtype}"
        if (
            self.form != "2:4"
            or self.kind is not None
            or self.weight.element_size() != 2
            or self.weight.device.type != "cuda"
        ):
            raise ValueError(f"a prefill copy needs 2:4 in a 16-bit type on CUDA, got {where} on {self.weight.device}")
        try:
            self._prefill = to_sparse_semi_structured(unpack(self.packed(), self.dtype))  # x is filled up, too
        except RuntimeError as error:
            raise ValueError(f"torch has no semi-structured tensor for {where}: {error}") from error

    def prefill_bytes(self) -> int:
        """Of the copy that :meth:`keep_prefill_copy` made."""
        if self._prefill is None:
            return 0
        parts, _ = self._prefill.__tensor_flatten__()  # type: ignore[attr-defined]
        tensors = [getattr(self._prefill, name) for name in parts]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._prefill = None
        return super()._apply(fn, recurse)

    def _packed_product(self, x: Tensor, packed: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        # As many tokens at a time as the operators multiply without unpacking: for processors whose dense product is
        # slow in 16-bit types. Without AVX-512, 256 tokens of bfloat16 took 0.30 of torch's dense time (Zen 3, 4096 x
        # 4096).
        most = dispatch.direct_tokens(self.form, x.device)
        if x.numel() <= most * self.columns:
            return self._call(x, packed, bias)
        parts = x.reshape(-1, self.columns).split(most)
        y = torch.cat([self._call(part, packed, bias) for part in parts])
        return y.view(*x.shape[:-1], self.out_features)

    def _dense_product(self, x: Tensor, packed: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu":  # a band would be too small a product
            return linear(x, unpack(packed, x.dtype, self.kind), bias)
        # The operators unpack a band of rows at a time where they are given more tokens than kernels take.
        tokens, most = x.numel() // self.columns, dispatch.direct_tokens(self.form, x.device)
        if tokens > most:
            return self._call(x, packed, bias)
        filled = pad(x.reshape(-1, self.columns), (0, 0, 0, most + 1 - tokens))
        return self._call(filled, packed, bias)[:tokens].view(*x.shape[:-1], self.out_features)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prefill = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"
