"""Linear layers that stay dense in a packed model, above all its output layer, which takes a third of a token's time
where the rest is packed: a few tokens go through our own product on the CPU, where that is faster than torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import _backend
from .._checks import FLOATS
from ..memory import in_huge_pages
from . import dispatch

MOST_TOKENS = 8  # torch's products of matrices begin to pay beyond
_HAS_VECTORS = _backend.extension is not None and _backend.extension.isa() != "scalar"
_PRODUCT = torch.ops.wanda.dense_linear.default


class DenseLinear(nn.Linear):
    """``nn.Linear``, but that up to 8 tokens of plain tensors on the CPU, without gradients and autocast, go the faster
    way of two (:mod:`wanda_kernels.packed.dispatch`): :func:`wanda_kernels.ops.dense_linear` or torch's product.

    Where nothing can be timed, in what torch.compile makes, 16-bit types go the first one, where it has vectors.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not self._is_served(input, weight, bias):
            return linear(input, weight, bias)
        if torch.compiler.is_compiling():
            is_ours = _HAS_VECTORS and input.dtype != torch.float32
            return self._product("own" if is_ours else "torch", input, weight, bias)
        rows, cols = weight.shape
        bits = (input.numel() // cols - 1).bit_length()
        key = ("dense", input.dtype, rows, cols, bits, input.device, torch.get_num_threads())
        way = dispatch.known(key)
        if way is None:
            way = dispatch.choose(key, dispatch.DENSE_WAYS, lambda way: self._product(way, input, weight, bias))
        return self._product(way, input, weight, bias)

    @staticmethod
    def _is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        if type(x) is not Tensor or type(weight) is not nn.Parameter:  # a subclass has products of its own
            return False
        if not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and weight.dtype in FLOATS):
            return False
        cols = weight.shape[1]
        if x.dim() == 0 or x.shape[-1] != cols or not 0 < x.numel() <= MOST_TOKENS * cols:
            return False
        if not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
            return False
        if bias is not None and (bias.dtype != weight.dtype or not bias.is_cpu):
            return False
        has_gradient = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        return not (has_gradient and torch.is_grad_enabled())

    @staticmethod
    def _product(way: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _PRODUCT(x, weight, bias) if way == "own" else linear(x, weight, bias)


def serve_dense(model: nn.Module) -> None:
    """The model's plain linear layers become :class:`DenseLinear`: the same objects, with their parameters, ties and
    hooks. Large weights move into huge pages, as packed ones do (1.2 x as fast at batch 1, Zen 3)."""
    for module in model.modules():
        # accelerate's and others' forward would not come here
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.__class__ = DenseLinear
            module.weight.data = in_huge_pages(module.weight.data)


def make_plain(model: nn.Module) -> None:
    """Undoes :func:`serve_dense`."""
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # a class that it was before
