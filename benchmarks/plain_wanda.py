"""A plain Wanda for any decoder of transformers, to compare with: shares no code with wanda_kernels.

Block after block, the whole model runs on every batch, with the blocks before it pruned; hooks add up the squares of
what each linear layer gets, as the paper's code does; ``torch.sort`` makes the masks. What the experts of a fused
tensor get is seen in the products of their module's own eager forward, which runs beside the model's: a product whose
weight lies in the tensor's memory belongs to the expert at that place. Slow, and knows no model by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "_grouped_mm"}


@dataclass
class RunningMean:
    """Of a layer's squared norms over the sequences, step by step as the paper's code has it."""

    squares: Tensor  # [C_in]
    seen: int = 0

    def add(self, x: Tensor, sequences: int) -> None:
        for one in x.reshape(sequences, -1, x.shape[-1]):
            self.squares *= self.seen / (self.seen + 1)
            self.seen += 1
            self.squares += torch.norm(one.t().float(), p=2, dim=1) ** 2 / self.seen

    def norm(self) -> Tensor:
        return torch.sqrt(self.squares)


@dataclass
class ExpertSums:
    """Of squares, by expert, over all tokens.

    Attributes:
        parameter: [E, .., ..].
        count: how many of its slices are experts; what lies behind them is used by none.
        columns: which of its dimensions is C_in; None until a product was seen.
    """

    parameter: Tensor
    count: int
    columns: int | None = None
    squares: dict[int, Tensor] = field(default_factory=dict)  # [C_in], float64
    tokens: dict[int, int] = field(default_factory=dict)  # those that are not all zeros

    def place(self, weight: Tensor) -> int | None:
        """The expert with whom ``weight``, a part of the parameter's memory, begins; None where it is none."""
        offset = (weight.data_ptr() - self.parameter.data_ptr()) // self.parameter.element_size()
        inside = 0 <= offset < self.parameter.numel() and self._memory(weight) == self._memory(self.parameter)
        return offset // self.parameter.stride(0) if inside else None

    def add(self, expert: int, x: Tensor, stride: int) -> None:
        """``x``: [.., C_in]; ``stride``: between the columns of the weight that it meets."""
        self.columns = 2 if self.parameter.stride(2) == stride else 1
        rows = x.detach().reshape(-1, x.shape[-1])
        squares = rows.double().square().sum(dim=0)
        self.squares[expert] = self.squares[expert] + squares if expert in self.squares else squares
        self.tokens[expert] = self.tokens.get(expert, 0) + int((rows != 0).any(dim=-1).sum())

    def norms(self, samples: int) -> Tensor:
        """[E, C_in]; of all experts together for those that saw no token."""
        assert self.columns is not None, "no product with the parameter was seen"
        nothing = torch.zeros(self.parameter.shape[self.columns], dtype=torch.float64)
        pooled = sum(self.squares.values(), nothing)
        each = [self.squares[e] if self.tokens.get(e, 0) else pooled for e in range(self.count)]
        return torch.sqrt(torch.stack(each) / samples).float()

    @staticmethod
    def _memory(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


class Spy(TorchFunctionMode):
    """Tells ``sums`` of every product with their parameters."""

    def __init__(self, sums: Iterable[ExpertSums]) -> None:
        super().__init__()
        self._sums = list(sums)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and len(args) > 1:
            offsets = kwargs.get("offs", args[2] if name == "_grouped_mm" and len(args) > 2 else None)
            self._see(args[0], args[1], is_linear=name == "linear", offsets=offsets)
        return func(*args, **kwargs)

    def _see(self, x: Tensor, weight: Tensor, is_linear: bool, offsets: Tensor | None) -> None:
        for sums in self._sums:
            first = sums.place(weight)
            if first is None:
                continue
            stride = weight.stride(-1 if is_linear else -2)
            if weight.dim() == 2:
                sums.add(first, x, stride)
            elif offsets is None:
                for expert, rows in enumerate(x):
                    sums.add(first + expert, rows, stride)
            else:
                begin = 0
                for expert, end in enumerate(offsets.tolist()):
                    if end > begin:
                        sums.add(first + expert, x[begin:end], stride)
                    begin = end


@torch.no_grad()
def find_stack(model: nn.Module, input_ids: Tensor) -> tuple[str, nn.ModuleList]:
    """The text decoder's blocks: of the outermost lists of modules that ``input_ids`` go through, the one with the most
    weights. Towers for images and sounds are not called."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    called: set[str] = set()
    with ExitStack() as hooks:
        for name, blocks in outermost.items():
            for block in blocks.modules():
                hook = block.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
                hooks.enter_context(hook)
        model(input_ids=input_ids, use_cache=False)
    if not called:
        raise ValueError(f"{type(model).__name__} has no list of blocks")
    name = max(sorted(called), key=lambda name: sum(p.numel() for p in outermost[name].parameters()))
    return name, outermost[name]


@torch.no_grad()
def prune(
    model: nn.Module,
    input_ids: Tensor,
    batch_size: int,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    only: Callable[[str], bool] = lambda _: True,
    forward: Callable[[type[nn.Module]], Callable[..., Any]] | None = None,
) -> set[str]:
    """Prune a model in place.

    Args:
        input_ids: [samples, length], int64.
        pattern: (N, M), instead of ``sparsity``: keep N of every M inputs.
        only: whether a parameter of this name is pruned.
        forward: what shows the experts' inputs, of their module's class [default: its own eager forward].

    Returns:
        The names of the parameters that were pruned.
    """
    prefix, stack = find_stack(model, input_ids[:1])
    done: set[str] = set()
    for index, block in enumerate(stack):
        linears, experts = _weights(f"{prefix}.{index}", block, only)
        means = {name: RunningMean(torch.zeros(_columns(module))) for name, module in linears.items()}
        sums = {name: ExpertSums(p, count) for owned, count in experts.values() for name, p in owned.items()}
        with ExitStack() as hooks:
            sequences: list[int] = []
            for name, module in linears.items():
                hooks.enter_context(_mean_hook(module, means[name], sequences))
            for module, (owned, _) in experts.items():
                show = (forward or _eager)(type(module))
                hooks.enter_context(_experts_hook(module, show, [sums[name] for name in owned]))
            for batch in input_ids.split(batch_size):
                sequences[:] = [len(batch)]
                model(input_ids=batch, use_cache=False)
        for name, module in linears.items():
            weight = module.get_parameter("weight").data
            _prune(weight.t() if isinstance(module, Conv1D) else weight, means[name].norm(), sparsity, pattern)
        for name, found in sums.items():
            if found.columns is None:
                raise ValueError(f"no product with {name} was seen")
            weight = found.parameter.data[: found.count]
            view = weight if found.columns == 2 else weight.transpose(1, 2)
            for matrix, norm in zip(view, found.norms(len(input_ids)), strict=True):
                _prune(matrix, norm, sparsity, pattern)
        done |= {*linears, *sums}
    return done


def _weights(
    name: str, block: nn.Module, only: Callable[[str], bool]
) -> tuple[dict[str, nn.Module], dict[nn.Module, tuple[dict[str, Tensor], int]]]:
    """Linear layers by the names of their weights; modules of experts with their parameters and how many they are."""
    linears: dict[str, nn.Module] = {}
    experts: dict[nn.Module, tuple[dict[str, Tensor], int]] = {}
    for path, module in block.named_modules():
        inner = f"{name}.{path}".rstrip(".")
        if isinstance(module, nn.Linear | Conv1D):
            if only(f"{inner}.weight"):
                linears[f"{inner}.weight"] = module
            continue
        if isinstance(module, _CONVOLUTIONS):
            continue
        three = {f"{inner}.{key}": p for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
        count = min((p.shape[0] for p in three.values()), default=0)
        if owned := {key: p for key, p in three.items() if only(key)}:
            experts[module] = owned, count
    return linears, experts


def _columns(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[0 if isinstance(module, Conv1D) else 1]


@contextmanager
def _mean_hook(module: nn.Module, mean: RunningMean, sequences: list[int]) -> Iterator[None]:
    with module.register_forward_pre_hook(lambda _module, inputs: mean.add(inputs[0], sequences[0])):
        yield


@contextmanager
def _experts_hook(module: nn.Module, show: Callable[..., Any], sums: list[ExpertSums]) -> Iterator[None]:
    """``show`` runs with the spy, and what it returns is not used: the model goes on with its own forward."""

    def look(of: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with Spy(sums):
            show(of, *args, **kwargs)

    with module.register_forward_pre_hook(look, with_kwargs=True):
        yield


def _eager(kind: type[nn.Module]) -> Callable[..., Any]:
    """The class's own forward, under what transformers puts in its place."""
    return inspect.unwrap(kind.forward)


def _prune(weight: Tensor, norm: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> None:
    """``weight``: [C_out, C_in], in place; ``norm``: [C_in]."""
    score = weight.float().abs() * norm
    rows, columns = score.shape
    if pattern is None:
        lowest = torch.sort(score, dim=1, stable=True).indices[:, : int(columns * sparsity)]
        mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
    else:
        keep, group = pattern
        groups = score.view(rows, columns // group, group)
        lowest = torch.sort(groups, dim=2, stable=True).indices[..., : group - keep]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, lowest, True).view(rows, columns)
    weight.masked_fill_(mask, 0)
