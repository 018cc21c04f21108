"""Fused experts: how transformers keeps the weights of a layer's experts, and what they compute.

A module holds ``gate_up_proj`` (or ``up_proj``) [E, C_out, C_in] and ``down_proj``, and is called with tokens, the
experts that the router chose for each, and their shares. transformers describes such a module by attributes
(``use_experts_implementation``); a few modules without them compute in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

# Modules of this form that transformers does not describe.
_UNDESCRIBED = {
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts",
    "transformers.models.step3p7.modeling_step3p7.Step3p7Experts",
}

_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"

# What configurations call the number of experts that the router chooses for a token.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")

# (parameter, rows sorted by expert, where each expert's end) -> its products
Product = Callable[[str, Tensor, Tensor], Tensor]
Seen = Callable[["Routing", Tensor], None]


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, and within an expert by token: ``token`` [rows] of each row; ``order`` [rows]: its place
    in the flattened index; ``expert`` [rows]: beyond the last where it is none that computes; ``ends`` [E] int32."""

    token: Tensor
    order: Tensor
    expert: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routing:
        """``index``: [tokens, chosen], of experts."""
        expert, order = torch.sort(index.reshape(-1), stable=True)
        return cls(order // index.shape[-1], order, expert, ends_of(expert, experts))

    def ends_by_sequence(self, tokens: int, sequences: int) -> Tensor:
        """[E * sequences] int32: where the rows of each expert and sequence end, of ``tokens`` in as many sequences of
        one length."""
        experts = len(self.ends)
        return ends_of(self.expert * sequences + self.token // (tokens // sequences), experts * sequences)


def experts_per_token(config: Any) -> int:
    """How many the router chooses, by the config of the text model; of numbers by layer the largest; 1 where it does
    not say."""
    for name in _CHOSEN:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(one, int) for one in value):
            return max(value)
    return 1


def ends_of(keys: Tensor, count: int) -> Tensor:
    """[count] int32: how many of ascending ``keys`` are at most 0, 1, ..."""
    return torch.searchsorted(keys, torch.arange(count, device=keys.device), right=True).int()


@dataclass(frozen=True)
class ExpertsLayout:
    """What a module of experts holds.

    Attributes:
        module: that holds the parameters.
        up, down: their names.
        is_transposed: they are [E, C_in, C_out].
        has_bias: ``{up}_bias`` and ``{down}_bias`` [E, C_out] are added.
        has_norm: ``post_expert_norm`` follows each expert.
        adds_in_turn: outputs are added expert by expert in the tokens' type, as the module itself does it.
        kind: the class whose forward says what the arguments are called; None: the module's.
        count: of experts, where the module does not hold the parameters that tell it (they are packed).
    """

    module: Any
    up: str
    down: str
    is_transposed: bool = False
    has_bias: bool = False
    has_norm: bool = False
    adds_in_turn: bool = False
    kind: type[nn.Module] | None = None
    count: int | None = None

    @property
    def experts(self) -> int:
        """Those that compute; a router may also choose others, that hand their input on."""
        return int(getattr(self.module, self.down).shape[0]) if self.count is None else self.count

    @property
    def names(self) -> Sequence[str]:
        return self.up, self.down

    def weight(self, name: str) -> Tensor:
        """[E, C_out, C_in], a view."""
        stored: Tensor = getattr(self.module, name)[: self.experts]
        return stored.transpose(-1, -2) if self.is_transposed else stored

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, index and shares of a call of the module, whichever of them it names."""
        if kwargs:  # looking names up takes as long as a small product
            own_forward = (self.kind or type(self.module)).forward
            args = [*inspect.signature(own_forward).bind(self.module, *args, **kwargs).arguments.values()][1:]
        hidden, index, shares = args
        return hidden, index, shares

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any], product: Product) -> Tensor:
        """What the module gives, as it is called."""
        return self.forward(*self.arguments(args, kwargs), product)

    def dense_product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(rows, self.weight(name).transpose(-1, -2), offs=ends)

    def forward(
        self, hidden: Tensor, index: Tensor, shares: Tensor, product: Product, seen: Seen | None = None
    ) -> Tensor:
        """What the module gives for ``hidden`` [tokens, C_in], ``index`` and ``shares`` [tokens, chosen].

        Args:
            product: makes the products of rows and weights; the dense one is :meth:`dense_product`.
            seen: told each row's output before its share is applied.
        """
        routing = Routing.of(index, self.experts)
        rows = hidden[routing.token]
        out = self._compute(rows, routing, product)
        if seen is not None:
            seen(routing, out)
        is_none = routing.expert >= self.experts
        if self._hands_on():
            out = torch.where(is_none.unsqueeze(-1), rows, out)
        out = out * shares.reshape(-1)[routing.order].unsqueeze(-1)
        if not self._hands_on():
            out = out.masked_fill(is_none.unsqueeze(-1), 0)
        if self.adds_in_turn:
            whole = torch.zeros_like(hidden)
            begin = 0
            for end in [*routing.ends.tolist(), len(rows)]:
                whole.index_add_(0, routing.token[begin:end], out[begin:end].to(whole.dtype))
                begin = end
            return whole
        unsorted = torch.empty_like(out)
        unsorted[routing.order] = out
        return unsorted.view(*index.shape, -1).sum(dim=1).to(hidden.dtype)

    def _compute(self, rows: Tensor, routing: Routing, product: Product) -> Tensor:
        """Each row through its expert, without its share."""
        inner = product(self.up, rows, routing.ends)
        inner = self._gate(self._add_bias(self.up, inner, routing.expert))
        out = self._add_bias(self.down, product(self.down, inner, routing.ends), routing.expert)
        return self.module.post_expert_norm(out) if self.has_norm else out

    def inner(self, tokens: Tensor, expert: int) -> Tensor:
        """What ``down`` gets where one expert takes all of ``tokens``."""
        made = torch.nn.functional.linear(tokens, self.weight(self.up)[expert])
        return self._gate(self._add_bias(self.up, made, torch.full((len(tokens),), expert, device=tokens.device)))

    def _add_bias(self, name: str, rows: Tensor, expert: Tensor) -> Tensor:
        if not self.has_bias:
            return rows
        return rows + getattr(self.module, f"{name}_bias")[expert.clamp(max=self.experts - 1)]

    def _gate(self, inner: Tensor) -> Tensor:
        gate = getattr(self.module, "_apply_gate", None)
        if not getattr(self.module, "has_gate", True):
            made: Tensor = self.module.act_fn(inner)
        elif gate is not None:
            made = gate(inner)
        else:
            first, second = inner.chunk(2, dim=-1)
            made = self.module.act_fn(first) * second
        return made

    def _hands_on(self) -> bool:
        return hasattr(self.module, "identity_expert")


@dataclass(frozen=True)
class AllTokensLayout(ExpertsLayout):
    """Llama 4's: called with all tokens for each expert, [E * tokens, C_in], scaled by the router's shares: 0 for those
    that went elsewhere, which give 0."""

    is_transposed: bool = True

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any], product: Product) -> Tensor:
        (hidden,) = (*args, *kwargs.values())
        is_routed = self.routed(hidden)
        rows = hidden[is_routed.view(-1)]
        ends = is_routed.sum(dim=1).cumsum(0).int()
        gate, up = product(self.up, rows, ends).chunk(2, dim=-1)
        out = torch.zeros_like(hidden)
        out[is_routed.view(-1)] = product(self.down, up * self.module.act_fn(gate), ends)
        return out

    def routed(self, hidden: Tensor) -> Tensor:
        """[E, tokens] bool: which tokens an expert really gets."""
        return (hidden != 0).any(dim=-1).view(self.experts, -1)


class _Described(Protocol):
    is_transposed: bool
    has_bias: bool
    has_gate: bool


def _is_described(module: nn.Module) -> bool:
    """Whether transformers says what the module computes: a subclass with another forward has the words too."""
    has_words = all(hasattr(module, name) for name in ("is_transposed", "has_bias", "has_gate"))
    from transformers.integrations import moe  # by now there, where it counts; before, seconds

    return has_words and getattr(type(module).forward, "__globals__", None) is vars(moe)


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """Of a module that holds fused experts of a known form; None for any other."""
    three = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    up = next((name for name in ("gate_up_proj", "up_proj") if name in three), None)
    if up is None or "down_proj" not in three:
        return None
    if _is_described(module):
        described: _Described = module  # type: ignore[assignment]
        norm = bool(getattr(module, "has_post_expert_norm", False))
        return ExpertsLayout(module, up, "down_proj", described.is_transposed, described.has_bias, norm)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind == _LLAMA4:
        return AllTokensLayout(module, up, "down_proj")
    return ExpertsLayout(module, up, "down_proj", adds_in_turn=True) if kind in _UNDESCRIBED else None
