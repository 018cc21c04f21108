"""Finds the operations that make the inputs of a block's linear layers and that a fused kernel can stand in for.

A block is watched once while it runs on real data. A module is a candidate by its class; what decides is that the
fused operator, given the very tensors the module saw, gives what the module gave, and that its output is the tensor
that a linear layer takes. Norms that feed none (``q_norm``, ``k_norm``, norms before a residual) stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gelu_tanh_mul_sqnorm, rms_norm_sqnorm, silu_mul_sqnorm
from .matrices import Block, Rows, Watching
from .recording import Call, run_block
from .stand_ins import stand_ins

PRODUCTS = {"silu_mul": silu_mul_sqnorm, "gelu_tanh_mul": gelu_tanh_mul_sqnorm}

RowsOf = Callable[[str, Tensor], Tensor]  # (layer, its input) -> the sums of its sequences
Hold = Callable[[str, Tensor], None]  # (layer, its input, whose sums are done)


@dataclass(frozen=True)
class FusedNorm:
    """An RMSNorm whose output goes to ``consumer`` first."""

    module: str
    consumer: str
    unit_offset: bool
    path: str = "rms_norm"

    def forward_of(self, module: nn.Module, rows_of: RowsOf, hold: Hold) -> Callable[..., Tensor]:
        eps = _eps(module)
        assert eps is not None

        def forward(x: Tensor) -> Tensor:
            rows = rows_of(self.consumer, x)
            y = rms_norm_sqnorm(x, module.weight, eps, rows, None, self.unit_offset)  # type: ignore[arg-type]
            hold(self.consumer, y)
            return y

        return forward


@dataclass(frozen=True)
class FusedProduct:
    """A gated MLP: ``consumer(activation(gate) * up)``; gate and up come from two layers, or are halves of one."""

    module: str
    consumer: str
    makers: Sequence[str]
    gate: int  # of the makers' outputs, or of the halves
    path: str  # a key of PRODUCTS

    def forward_of(self, module: nn.Module, rows_of: RowsOf, hold: Hold) -> Callable[..., Tensor]:
        def layer(name: str) -> nn.Module:
            return module.get_submodule(name.removeprefix(f"{self.module}."))

        def forward(x: Tensor) -> Tensor:
            gate, up = _gate_and_up([layer(name)(x) for name in self.makers], self.gate)
            y = PRODUCTS[self.path](gate, up, rows_of(self.consumer, gate))
            hold(self.consumer, y)
            return layer(self.consumer)(y)

        return forward


@dataclass(frozen=True)
class Plan:
    """What a run of a block showed: its matrices in calling order, what can be fused, and which were not called: their
    weight is used outside their forward, or for inputs that text does not make. They stay dense."""

    order: tuple[str, ...]
    fused: tuple[FusedNorm | FusedProduct, ...] = ()
    silent: tuple[str, ...] = ()

    def path(self, layer: str) -> str:
        """How the sums of the input that ``layer`` takes first are added up."""
        return next((fused.path for fused in self.fused if fused.consumer == layer), "standalone")

    def to_data(self) -> dict[str, Any]:
        """Plain data for :meth:`from_data`."""
        fused = [[type(fused).__name__, asdict(fused)] for fused in self.fused]
        return {"order": self.order, "fused": fused, "silent": self.silent}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Plan:
        kinds = {kind.__name__: kind for kind in (FusedNorm, FusedProduct)}
        fused = tuple(kinds[name](**fields) for name, fields in data["fused"])
        return cls(tuple(data["order"]), fused, tuple(data["silent"]))

    @contextmanager
    def installed(self, block: Block, rows_of: RowsOf, hold: Hold) -> Iterator[None]:
        """The fused forwards in place of the modules' own, which come back whatever happens."""
        modules = [block.module.get_submodule(fused.module) for fused in self.fused]
        forwards = [fused.forward_of(module, rows_of, hold) for fused, module in zip(self.fused, modules, strict=True)]
        with stand_ins(list(zip(modules, forwards, strict=True))):
            yield


def kind_of(block: Block) -> tuple:
    """Blocks of one kind can be run by one plan. A block with hooks, with forwards of its own or with functions among
    its attributes that have no name in a module is a kind by itself: what hangs there may be another thing in each."""
    found: list[tuple] = []
    is_special = False
    for name, module in block.module.named_modules():
        # Numbers and words decide what a module computes; integers, as layer_idx, tell blocks apart that are alike.
        values = {key: value for key, value in vars(module).items() if isinstance(value, float | bool | str)}
        values.pop("training", None)
        functions = {key: value for key, value in vars(module).items() if callable(value)}
        values |= {key: _name_of(value) for key, value in functions.items()}
        dtypes = tuple(p.dtype for p in module.parameters(recurse=False))
        found.append((name, type(module), *dtypes, *sorted(values.items())))
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        is_special |= any(hooks) or not _is_untouched(module) or "" in map(_name_of, functions.values())
    return (*found, block.name) if is_special else tuple(found)


def _name_of(function: Any) -> str:
    """Where a function or class is defined, with what it is partially called with; nothing for what is made on the way,
    as a lambda or a bound method."""
    if isinstance(function, functools.partial):
        inner = _name_of(function.func)
        return inner and f"{inner} {function.args} {function.keywords}"
    name, owner = getattr(function, "__qualname__", "<none>"), getattr(function, "__self__", None)
    is_made = "<" in name or not (owner is None or isinstance(owner, ModuleType))
    return "" if is_made and not isinstance(function, type) else f"{function.__module__}.{name}"


def observe(block: Block, hidden: Tensor, call: Call, fuse: bool = True) -> Plan:
    """Run the block on one batch and plan its statistics."""
    seen = _Observation()
    with ExitStack() as hooks:
        hooks.enter_context(block.watched(Watching(seen, call.sequences)))
        for name, matrix in block.matrices.items():
            if matrix.experts is None:
                hooks.enter_context(matrix.module.register_forward_hook(seen.linear(name)))
        for name, module in block.module.named_modules():
            if fuse and (_is_rms_norm(module) or _is_mlp(module)):
                hooks.enter_context(module.register_forward_hook(seen.module(name), with_kwargs=True))
        run_block(block, hidden, call)
    silent = tuple(name for name in block.matrices if name not in seen.order)
    fused = [_match(block, name, seen) for name in seen.modules]
    return Plan(tuple(seen.order), tuple(found for found in fused if found is not None), silent)


@dataclass
class _Observation:
    """Inputs and outputs of every call, held, so that identity means what it says."""

    order: list[str] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)  # of the linear layers, in calling order
    outputs: list[Tensor] = field(default_factory=list)
    modules: dict[str, list[tuple[Tensor, Any]]] = field(default_factory=dict)  # candidate -> (input, output) per call

    def input(self, name: str, x: Tensor) -> None:
        """As :class:`Watcher`: a linear layer's hook sees more."""

    def rows(self, name: str, rows: Rows) -> None:
        """As :class:`Watcher`."""

    def all_rows(self, name: str) -> None:
        """As :class:`Watcher`: what experts get is made for them alone."""
        self.order.append(name)
        self.inputs.append(torch.empty(0))
        self.outputs.append(torch.empty(0))

    def linear(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.order.append(name)
            self.inputs.append(inputs[0])
            self.outputs.append(output)

        return hook

    def module(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            is_plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() in (2, 3)
            calls = self.modules.setdefault(name, [])
            calls += [(args[0], output)] if is_plain else [(torch.empty(0), None)] * 2  # two calls: never matched

        return hook


def _eps(module: nn.Module) -> float | None:
    values = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in values if isinstance(value, float)), None)


def _is_untouched(module: nn.Module) -> bool:
    """No library has put a forward of its own on the object."""
    return "forward" not in module.__dict__


def _is_rms_norm(module: nn.Module) -> bool:
    shapes = [(name, parameter.dim()) for name, parameter in module.named_parameters()]
    is_norm = type(module).__name__.endswith("RMSNorm") and shapes == [("weight", 1)]
    return is_norm and _eps(module) is not None and _is_untouched(module)


def _is_mlp(module: nn.Module) -> bool:
    return type(module).__name__.endswith("MLP") and _is_untouched(module)


def _match(block: Block, name: str, seen: _Observation) -> FusedNorm | FusedProduct | None:
    if len(seen.modules[name]) != 1:
        return None
    module, (x, output) = block.module.get_submodule(name), seen.modules[name][0]
    is_norm = _is_rms_norm(module)
    return _match_norm(name, module, x, output, seen) if is_norm else _match_product(name, x, output, seen)


def _match_norm(name: str, module: nn.Module, x: Tensor, output: Tensor, seen: _Observation) -> FusedNorm | None:
    consumer = next((layer for layer, taken in zip(seen.order, seen.inputs, strict=True) if taken is output), None)
    eps, weight = _eps(module), module.weight
    if consumer is None or eps is None or not isinstance(weight, Tensor) or weight.dtype != x.dtype:
        return None
    for unit_offset in (False, True):
        if agree(rms_norm_sqnorm(x, weight, eps, _scratch(x), None, unit_offset), output):
            return FusedNorm(name, consumer, unit_offset)
    return None


def _match_product(name: str, x: Tensor, output: Tensor, seen: _Observation) -> FusedProduct | None:
    calls = [i for i, layer in enumerate(seen.order) if layer.startswith(f"{name}.")]
    if len(calls) not in (2, 3) or len({seen.order[i] for i in calls}) != len(calls):
        return None
    *makers, last = calls
    if seen.outputs[last] is not output or any(seen.inputs[i] is not x for i in makers):
        return None
    product = seen.inputs[last]
    for gate in (0, 1):
        first, second = _gate_and_up([seen.outputs[i] for i in makers], gate)
        if first.shape != product.shape or second.shape != product.shape:
            return None
        for path, operator in PRODUCTS.items():
            if agree(operator(first, second, _scratch(first)), product):
                return FusedProduct(name, seen.order[last], tuple(seen.order[i] for i in makers), gate, path)
    return None


def _gate_and_up(outputs: list[Tensor], gate: int) -> tuple[Tensor, Tensor]:
    pair = list(outputs[0].chunk(2, dim=-1)) if len(outputs) == 1 else outputs
    return pair[gate], pair[1 - gate]


def _scratch(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[-1], dtype=torch.float32, device=x.device)


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether a fused operator's output will do for the module's: on the CPU, the same bits."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return torch.equal(got, want) if got.device.type == "cpu" else is_close(got, want)


def is_close(got: Tensor, want: Tensor) -> bool:
    """To one unit in the last place in 16-bit types, 2e-6 in float32, beside 2e-6 of the largest value, since
    activations cancel."""
    unit = 2e-6 if want.dtype == torch.float32 else torch.finfo(want.dtype).eps
    size = want.float().abs()
    return bool(((got.float() - want.float()).abs() <= unit * size + 2e-6 * size.max()).all())
