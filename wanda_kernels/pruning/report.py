"""What a pruning run did, per layer and in all, and what it tells meanwhile. Prints as a table, serialises to JSON."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .._words import percent, to_json
from .spec import PruneSpec

if TYPE_CHECKING:
    from ..packed.model import PackedReport


@dataclass
class LayerReport:
    """One linear layer, or one of a module of fused experts.

    Attributes:
        name: of the layer in the model, as in its state dict without ``.weight``.
        shape: [C_out, C_in], or [E, C_out, C_in].
        sparsity: share of zeros after pruning.
        seconds: spent on the selection.
        estimated_error: sqrt(sum of pruned scores^2 / sum of all scores^2): the relative output error if the
            inputs were uncorrelated; of the method's mask, where that was refined.
        exact_error: ||X (W - W')^T||_F / ||X W^T||_F on the calibration inputs, where it was asked for.
        input_of: the layer whose input statistics it shares, None where the method uses none.
        statistics: what added them up: ``rms_norm``, ``silu_mul`` or ``gelu_tanh_mul`` while making that input, or
            ``standalone``; None where the method uses none.
        threshold: mean over rows of the largest Wanda score that was pruned, where the exact error was asked for.
        damping: of the Hessian, where the method has one: more than asked for where it could not be factorised.
        tokens: of experts: how many calibration tokens the router sent to each.
        swaps: of weights, where the mask was refined.
        gram_errors: where the mask was refined, the weights updated or rounded: ||X (W - W')^T||_F / ||X W^T||_F on the
            calibration data, by the Gram matrices (of experts, of all together): of the method's mask, then after the
            refinement, then after the update, then after rounding.
        pooled: of experts: those with fewer than ``min_tokens``, which took the mean over all experts.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    seconds: float
    estimated_error: float
    exact_error: float | None = None
    input_of: str | None = None
    statistics: str | None = None
    threshold: float | None = None
    damping: float | None = None
    tokens: list[int] | None = None
    pooled: list[int] | None = None
    swaps: int | None = None
    gram_errors: list[float] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Progress:
    """What the driver tells while it works: override what you want to hear of. The default is silent."""

    def start(self, steps: int) -> None:
        """The run will take ``steps`` steps, each one batch through one block."""

    def advance(self) -> None:
        """One step is done."""

    def block(self, name: str, layers: list[LayerReport]) -> None:
        """The block ``name`` is pruned."""


def sparsity_of(layers: list[LayerReport]) -> float:
    """Share of zeros in all the weights of ``layers``."""
    return sum(layer.sparsity * layer.numel for layer in layers) / max(1, sum(layer.numel for layer in layers))


def relative_error(part: float, whole: float) -> float:
    """sqrt(part / whole) for sums of squares; 0 where there is nothing to lose."""
    return math.sqrt(part / whole) if whole > 0 else 0.0


@dataclass
class PruningReport:
    """The outcome of :func:`wanda_kernels.prune`.

    Attributes:
        spec: what was asked for.
        samples, length: calibration sequences and tokens in each (0 where the method uses none).
        layers: one :class:`LayerReport` per pruned linear layer, in the model's order.
        seconds: part of the run -> seconds (``forward``, ``statistics``, ``selection``, ``refinement``, ``update``,
            ``quantisation``; the command line adds ``load`` and ``saving``).
        dense: tensor or layer of the blocks that stays dense -> its share of its block's weights.
        packed: what a streamed run packed.
    """

    spec: PruneSpec
    samples: int
    length: int
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    packed: PackedReport | None = None

    @property
    def method(self) -> str:
        return self.spec.method.name

    @property
    def sparsity(self) -> float:
        return self.spec.sparsity

    @property
    def pattern(self) -> str | None:
        return str(self.spec.pattern) if self.spec.pattern else None

    @property
    def propagate(self) -> str:
        return self.spec.propagate

    @property
    def options(self) -> dict[str, Any]:
        """Of the method, where they are not the default."""
        return self.spec.options()

    @property
    def achieved_sparsity(self) -> float:
        """Share of zeros over all pruned layers."""
        return sparsity_of(self.layers)

    def to_dict(self, seconds: bool = True) -> dict:
        """Plain data. Without ``seconds`` it is the same for every run of the same command."""
        names = ("method", "sparsity", "pattern", "propagate", "samples", "length", "options")
        data = {name: getattr(self, name) for name in names}
        data |= {"layers": [asdict(layer) for layer in self.layers], "seconds": dict(self.seconds)}
        data |= {"achieved_sparsity": self.achieved_sparsity, "dense": self.dense}
        if any(layer.tokens is not None for layer in self.layers):
            data |= {"experts": self.spec.experts, "min_tokens": self.spec.min_tokens}
        if self.spec.refine:
            data["refine_damping"] = self.spec.refine_damping
        if self.spec.update:
            data |= {"update_damping": self.spec.update_damping, "update_steps": self.spec.update_steps}
        if self.spec.values is not None:
            data |= {"values": self.spec.values.name, "group_size": self.spec.values.group}
        if not seconds:
            del data["seconds"]
            for layer in data["layers"]:
                del layer["seconds"]
        return data

    def to_json(self, indent: int | None = 2) -> str:
        return to_json(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True, emoji=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        target = self.pattern or percent(self.sparsity)
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
        told = "".join(f", {name} {value}" for name, value in self.options.items())
        title = Text(f"{self.method} {target}{told}: {len(self.layers)} layers")  # never markup: names come from models
        table = Table(title=title, title_justify="left")
        for heading in ("layer", "layers", "shape", "statistics", "sparsity", "estimated error"):
            table.add_column(heading, justify="left" if heading in ("layer", "statistics") else "right")
        exact = any(layer.exact_error is not None for layer in self.layers)
        if exact:
            table.add_column("exact error", justify="right")
        for kind, layers in kinds.items():
            shapes = sorted({layer.shape for layer in layers})
            shape = " x ".join(map(str, shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes"
            mean = sum(layer.estimated_error for layer in layers) / len(layers)
            paths = "/".join(sorted({layer.statistics or "-" for layer in layers}))
            row = [kind, str(len(layers)), shape, paths, percent(sparsity_of(layers), 2), f"{mean:.3f}"]
            if exact:
                row.append(f"{sum(layer.exact_error or 0.0 for layer in layers) / len(layers):.3f}")
            table.add_row(*map(Text, row))
        yield table
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.seconds.items())
        asked = getattr(self.spec.method, "damping", None)
        for layer in self.layers:
            if layer.damping is not None and asked is not None and layer.damping > asked:
                yield Text(f"{layer.name}: the Hessian could not be factorised; damping {layer.damping:g} did")
        yield from map(Text, self._about_experts())
        yield from map(Text, self.about_errors())
        stays = "; ".join(self._stays_dense())
        if stays:
            yield Text(f"stays dense: {stays}")
        yield Text(f"sparsity {percent(self.achieved_sparsity, 2)}; {parts}")

    def about_errors(self) -> list[str]:
        """What refinement and update have gained, and rounding has cost."""
        told = [layer for layer in self.layers if layer.gram_errors is not None]
        if not told:
            return []
        means = [sum(errors) / len(told) for errors in zip(*(layer.gram_errors or () for layer in told), strict=True)]
        changes = [
            f"mean error of a layer {before:.3f} before, {after:.3f} after"
            for before, after in itertools.pairwise(means)
        ]
        steps, spec = [], self.spec
        if spec.refine:
            swaps = sum(layer.swaps or 0 for layer in told)
            steps.append(f"refined (damping {spec.refine_damping:g}): {swaps} swaps")
        if spec.update:
            steps.append(f"updated (damping {spec.update_damping:g}, {spec.update_steps} steps)")
        if spec.values is not None:
            steps.append(f"rounded to {spec.values.name} (groups of {spec.values.group})")
        return [f"{step}; {change}" for step, change in zip(steps, changes, strict=True)]

    def _about_experts(self) -> list[str]:
        """How many tokens came to an expert, and which had too few."""
        told = [layer for layer in self.layers if layer.tokens]
        if not told:
            return []
        counts = sorted(count for layer in told for count in layer.tokens or ())
        pooled = [layer for layer in told if layer.pooled]
        middle = counts[len(counts) // 2]
        lines = [f"tokens an expert ({self.spec.experts}): {counts[0]} to {counts[-1]}, median {middle}"]
        if pooled:
            first = ", ".join(map(str, (pooled[0].pooled or [])[:8]))
            total = sum(len(layer.pooled or ()) for layer in pooled)
            lines.append(
                f"pooled norms (fewer than {self.spec.min_tokens} tokens): {total} experts of {len(pooled)} layers, "
                f"the first are {first} of {pooled[0].name}"
            )
        return lines

    def _stays_dense(self) -> list[str]:
        """A line for each kind of tensor, without the numbers of its block."""
        kinds: dict[str, list[float]] = {}
        for name, share in self.dense.items():
            kinds.setdefault(re.sub(r"^.*?\.\d+\.", "", name), []).append(share)
        return [
            f"{kind} ({percent(max(shares), 1)} of a block, {len(shares)} blocks)" for kind, shares in kinds.items()
        ]
