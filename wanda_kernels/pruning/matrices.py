"""What is pruned: the weights of a block, and how their inputs are seen while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.experts import AllTokensLayout, ExpertsLayout, Routing, ends_of, layout_of
from .stand_ins import stand_ins


@dataclass(frozen=True)
class Matrix:
    """A weight that is pruned: ``parameter`` of ``module``.

    Attributes:
        is_transposed: it is stored as [.., C_in, C_out].
        experts: how many matrices it holds, one after the other; None: one, in two dimensions. What it holds behind
            them is not used by any expert.
    """

    module: nn.Module
    parameter: str = "weight"
    is_transposed: bool = False
    experts: int | None = None

    @property
    def stored(self) -> Tensor:
        """As the module holds it."""
        return self.module.get_parameter(self.parameter)

    @property
    def weight(self) -> Tensor:
        """[C_out, C_in], or [E, C_out, C_in]: a view of what is stored."""
        return self.view(self.stored)

    def view(self, stored: Tensor) -> Tensor:
        """Of a tensor like the one that is stored."""
        used = stored if self.experts is None else stored[: self.experts]
        return used.transpose(-1, -2) if self.is_transposed else used

    def name_of(self, name: str) -> str:
        """Of the parameter, where the matrix is called ``name``."""
        return f"{name}.weight" if self.parameter == "weight" else name


@dataclass(frozen=True)
class Rows:
    """Inputs of the experts ``experts`` of a matrix.

    Attributes:
        x: [rows, C_in], sorted by expert, and those of one by sequence.
        ends: [experts * sequences] int32: where the rows of each expert and sequence end.
        tokens: [sequences, experts]: how many the router sent.
    """

    x: Tensor
    ends: Tensor
    experts: range
    tokens: Tensor


class Watcher(Protocol):
    """Told of inputs just before they are used, in the order of the calls."""

    def input(self, name: str, x: Tensor) -> None:
        """``x``: [.., C_in], of the matrix ``name``."""

    def rows(self, name: str, rows: Rows) -> None:
        """Some of the inputs of experts."""

    def all_rows(self, name: str) -> None:
        """There are no more of this call."""


@dataclass(frozen=True)
class Watching:
    """``sequences``: of one length, in the batch. ``every``: experts are also told of tokens that went elsewhere."""

    watcher: Watcher
    sequences: int
    every: bool = False

    def tell(self, name: str, x: Tensor, ends: Tensor, experts: int) -> None:
        """Of routed rows: ``ends`` [experts * sequences]."""
        tokens = torch.diff(ends, prepend=ends.new_zeros(1)).view(experts, -1).t()
        self.watcher.rows(name, Rows(x, ends, range(experts), tokens))
        self.watcher.all_rows(name)


class ExpertsAdapter(Protocol):
    """How the inputs of a module's fused experts are seen."""

    @property
    def only_routed(self) -> str | None:
        """Why tokens that went to other experts cannot be told; None where they can."""

    def matrices(self, name: str) -> dict[str, Matrix]:
        """By their names; ``name``: of the module, with a dot behind it."""

    def watched(self, name: str, watching: Watching) -> AbstractContextManager[None]:
        """Inside, the experts' inputs are told, and outputs are the module's own."""


def _matrices_of(layout: ExpertsLayout, name: str) -> dict[str, Matrix]:
    return {name + one: Matrix(layout.module, one, layout.is_transposed, layout.experts) for one in layout.names}


@dataclass(frozen=True)
class RoutedExperts:
    """Experts that are called as (tokens, index, shares): nearly all."""

    layout: ExpertsLayout
    only_routed: str | None = None

    def matrices(self, name: str) -> dict[str, Matrix]:
        return _matrices_of(self.layout, name)

    @contextmanager
    def watched(self, name: str, watching: Watching) -> Iterator[None]:
        layout = self.layout

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, index, shares = layout.arguments(args, kwargs)
            tokens = hidden.shape[0]
            routing = Routing.of(index, layout.experts)
            ends = routing.ends_by_sequence(tokens, watching.sequences)

            def product(one: str, rows: Tensor, bounds: Tensor) -> Tensor:
                if watching.every:
                    self._tell_all(name + one, hidden, ends, watching, inner=one == layout.down)
                else:
                    watching.tell(name + one, rows, ends, layout.experts)
                return layout.dense_product(one, rows, bounds)

            return layout.forward(hidden, index, shares, product)

        with stand_ins([(layout.module, forward)]):
            yield

    def _tell_all(self, name: str, hidden: Tensor, ends: Tensor, watching: Watching, inner: bool) -> None:
        """Every token through every expert, one expert after the other."""
        sequences = watching.sequences
        tokens = torch.diff(ends, prepend=ends.new_zeros(1)).view(-1, sequences).t()
        length = hidden.shape[0] // sequences
        all_ends = torch.arange(1, sequences + 1, dtype=torch.int32, device=hidden.device) * length
        for expert in range(self.layout.experts):
            x = self.layout.inner(hidden, expert) if inner else hidden
            one = range(expert, expert + 1)
            watching.watcher.rows(name, Rows(x, all_ends, one, tokens[:, expert : expert + 1]))
        watching.watcher.all_rows(name)


@dataclass(frozen=True)
class AllTokensExperts:
    """Llama 4's: each expert gets all tokens, scaled by the router's share: 0 for those that went elsewhere."""

    layout: AllTokensLayout
    only_routed: str | None = "it gets tokens scaled by their shares, and of those that went elsewhere nothing is left"

    def matrices(self, name: str) -> dict[str, Matrix]:
        return _matrices_of(self.layout, name)

    @contextmanager
    def watched(self, name: str, watching: Watching) -> Iterator[None]:
        layout, sequences = self.layout, watching.sequences
        module, experts = layout.module, layout.experts

        def tell(one: str, x: Tensor, is_routed: Tensor) -> None:
            length = x.shape[1] // sequences
            ends = torch.arange(1, experts * sequences + 1, dtype=torch.int32, device=x.device) * length
            tokens = is_routed.view(experts, sequences, length).sum(dim=2).t()
            watching.watcher.rows(name + one, Rows(x.reshape(-1, x.shape[-1]), ends, range(experts), tokens))
            watching.watcher.all_rows(name + one)

        def forward(hidden_states: Tensor) -> Tensor:
            x = hidden_states.view(experts, -1, hidden_states.shape[-1])
            is_routed = layout.routed(hidden_states)
            tell(layout.up, x, is_routed)
            gate, up = torch.bmm(x, module.gate_up_proj).chunk(2, dim=-1)
            inner = up * module.act_fn(gate)
            tell(layout.down, inner, is_routed)
            return torch.bmm(inner, module.down_proj).view(-1, hidden_states.shape[-1])

        with stand_ins([(module, forward)]):
            yield


@dataclass(frozen=True)
class SortedExperts:
    """JetMoE's: two layers of experts that are called with (rows sorted by expert, how many each gets), beside the
    router that sorted them."""

    module: Any
    only_routed: str | None = "it sorts its tokens itself"

    def matrices(self, name: str) -> dict[str, Matrix]:
        layers = {one: getattr(self.module, one) for one in ("input_linear", "output_linear")}
        return {name + one: Matrix(layer, experts=layer.weight.shape[0]) for one, layer in layers.items()}

    @contextmanager
    def watched(self, name: str, watching: Watching) -> Iterator[None]:
        sorting: list[Tensor] = []  # the token of each row
        tokens: list[int] = []  # how many there are

        def remember(_router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            sorting[:], tokens[:] = [output[1]], [args[0].shape[0]]

        def forward_of(one: str, layer: Any) -> Any:
            own = layer.forward

            def forward(x: Tensor, sizes: list[int]) -> Tensor:
                experts = layer.weight.shape[0]
                counts = torch.tensor(sizes, device=x.device)
                expert = torch.repeat_interleave(torch.arange(experts, device=x.device), counts)
                order = torch.argsort(expert * tokens[0] + sorting[0], stable=True)
                keys = expert * watching.sequences + sorting[0][order] // (tokens[0] // watching.sequences)
                watching.tell(name + one, x[order], ends_of(keys, experts * watching.sequences), experts)
                made: Tensor = own(x, sizes)
                return made

            return forward

        layers = {one: getattr(self.module, one) for one in ("input_linear", "output_linear")}
        forwards = [(layer, forward_of(one, layer)) for one, layer in layers.items()]
        with self.module.router.register_forward_hook(remember), stand_ins(forwards):
            yield


_SORTED = {f"transformers.models.jetmoe.modeling_jetmoe.{name}" for name in ("JetMoeMoE", "JetMoeMoA")}


def adapter_of(module: nn.Module) -> ExpertsAdapter | None:
    """Of a module that holds fused experts whose inputs can be seen; None for any other."""
    layout = layout_of(module)
    if layout is not None:
        return AllTokensExperts(layout) if isinstance(layout, AllTokensLayout) else RoutedExperts(layout)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind in _SORTED:
        return SortedExperts(module)
    return None


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        name: in the model.
        module: the block.
        matrices: by their name inside it.
        experts: modules of experts among them, by name.
        dense: parameters of two dimensions or more that are none of them, by name: they stay as they are.
    """

    name: str
    module: nn.Module
    matrices: dict[str, Matrix]
    experts: dict[str, ExpertsAdapter] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def share(self, parameter: Tensor) -> float:
        """Of the block's weights in two dimensions or more."""
        matrices = sum(matrix.stored.numel() for matrix in self.matrices.values())
        return parameter.numel() / max(1, matrices + sum(other.numel() for other in self.dense.values()))

    @contextmanager
    def watched(self, watching: Watching) -> Iterator[None]:
        """Inside, the watcher is told of what the matrices get."""

        def told(name: str) -> Any:
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                if not inputs:
                    raise ValueError(
                        f"{self.name}.{name} is called by a keyword: the input of its statistics cannot be told"
                    )
                watching.watcher.input(name, inputs[0])

            return hook

        with ExitStack() as stack:
            for name, matrix in self.matrices.items():
                if matrix.experts is None:
                    stack.enter_context(matrix.module.register_forward_pre_hook(told(name)))
            for name, adapter in self.experts.items():
                stack.enter_context(adapter.watched(name, watching))
            yield


ROUTERS = {"router", "gate", "classifier"}  # what modules and layers that choose among experts are called


def is_router(name: str, linear: nn.Linear, matrices: dict[str, Matrix], experts: Iterable[str]) -> bool:
    """Whether a layer inside a block chooses among experts: it is called so and has an output for each, or is a part of
    a module beside them that is called so. ``experts``: the names of their modules, with a dot behind."""
    parts = name.split(".")
    counts = {n for m in matrices.values() if m.experts is not None for n in (m.experts, m.stored.shape[0])}
    homes = {module.rstrip(".").rpartition(".")[0] for module in experts}
    around = [place for place, part in enumerate(parts[:-1]) if part in ROUTERS]
    is_inside = any(".".join(parts[:place]) in homes for place in around)
    return is_inside or (linear.out_features in counts and not ROUTERS.isdisjoint(parts))


def matrices_in(module: nn.Module) -> tuple[dict[str, Matrix], dict[str, ExpertsAdapter]]:
    """All that can be pruned inside a block, and its modules of experts, by their names in it. Routers are not: they
    are small, and decide what the rest computes."""
    matrices: dict[str, Matrix] = {}
    experts: dict[str, ExpertsAdapter] = {}
    for name, child in module.named_modules():
        adapter = adapter_of(child)
        if adapter is not None:
            prefix = f"{name}." if name else ""
            experts[prefix] = adapter
            matrices |= adapter.matrices(prefix)
        elif isinstance(child, nn.Linear):
            matrices[name] = Matrix(child)
        elif type(child) is Conv1D:
            matrices[name] = Matrix(child, is_transposed=True)
    linears = {name: m.module for name, m in matrices.items() if isinstance(m.module, nn.Linear)}
    routers = [name for name, linear in linears.items() if is_router(name, linear, matrices, experts)]
    return {name: matrix for name, matrix in matrices.items() if name not in routers}, experts
