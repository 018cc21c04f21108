"""Which runs a study has: a grid that the user gives, or the tables and figures of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

from ..methods import METHODS, Pattern, options_of
from ..pruning.spec import PruneSpec

COMPARED = ("magnitude", "sparsegpt", "wanda")
GROUPS = ("layer", "column", "column:128", "row", "row:128")


@dataclass(frozen=True)
class Run:
    """One pruned model: method, target, options, calibration. ``detail``: with each layer's error and threshold."""

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    samples: int = 0
    seed: int = 0
    group: str | None = None
    variant: bool = False
    weight_update: bool | None = None
    owl: bool = False
    detail: bool = field(default=False, compare=False)

    @property
    def target(self) -> str:
        """``2:4``, or ``62.5%``: all figures of the sparsity, so that two have never the same name."""
        if self.pattern is not None:
            return str(Pattern.parse(self.pattern))
        share = Decimal(repr(float(0.5 if self.sparsity is None else self.sparsity)))
        return f"{(100 * share).normalize():f}%"

    @property
    def label(self) -> str:
        """The method with its options."""
        options = [
            "variant" if self.variant else "",
            f"group {self.group}" if self.group else "",
            "no update" if self.weight_update is False and not self.group else "",
            "+ OWL" if self.owl else "",
        ]
        return " ".join([self.method, *filter(None, options)])

    @property
    def key(self) -> str:
        calibration = f"{self.samples} samples, seed {self.seed}" if self.samples else "no calibration"
        return f"{self.label} {self.target}, {calibration}"

    def spec(self, exact_error: bool = False) -> PruneSpec:
        """Raises ValueError for options that do not go together."""
        names = ("method", "sparsity", "pattern", "group", "variant", "weight_update", "owl")
        return PruneSpec(exact_error=exact_error, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Scale:
    """How large a study is: calibration sequences, their tokens, windows of evaluation (None: all), what is varied."""

    samples: int = 128
    length: int = 2048
    windows: int | None = None
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


SCALES = {
    "full": Scale(),
    "small": Scale(16, 512, 8, (0.3, 0.5, 0.6, 0.7), (1, 4, 16, 64), (0, 1, 2)),
    "tiny": Scale(8, 256, 8, (0.3, 0.5, 0.6, 0.7), (1, 4, 8, 32), (0, 1)),
}


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """Each once, in order; with details where one of its mentions has them. Magnitude alone needs no calibration."""
    found: dict[Run, Run] = {}
    for run in runs:
        if not run.spec().needs:
            run = replace(run, samples=0, seed=0)
        known = found.get(run, run)
        found[run] = replace(run, detail=run.detail or known.detail)
    return list(found.values())


def grid(
    methods: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    groups: Sequence[str | None],
    samples: Sequence[int],
    seeds: Sequence[int],
) -> list[Run]:
    """method x (sparsity or pattern) x group x samples x seed. Groups leave patterns out, and methods that have none.

    Raises:
        ValueError: a combination that :func:`wanda_kernels.prune` refuses.
    """
    targets: list[tuple[float | None, str | None]] = [(s, None) for s in sparsities] + [(None, p) for p in patterns]
    runs = []
    for seed, count, group, (sparsity, pattern), method in itertools.product(seeds, samples, groups, targets, methods):
        if group is not None and (pattern is not None or "group" not in options_of(method)):
            continue
        update = False if group is not None and "weight_update" in options_of(method) else None
        runs.append(Run(method, sparsity, pattern, count, seed, group, weight_update=update, detail=group is None))
    return _distinct(runs)


def paper_plan(scale: Scale) -> list[Run]:
    """The paper's comparisons of perplexity, in the order in which they are missed most if a study ends early."""
    n = scale.samples
    ablations = [name for name, method in METHODS.items() if method.update]
    runs = [Run(method, 0.5, samples=n, detail=True) for method in COMPARED]
    runs += [Run(method, pattern=pattern, samples=n) for pattern in ("4:8", "2:4") for method in COMPARED]
    runs += [Run(method, sparsity, samples=n) for sparsity in scale.sparsities for method in COMPARED]
    runs += [Run(method, 0.5, samples=count) for count in scale.sizes for method in ("sparsegpt", "wanda")]
    for group, method in itertools.product(GROUPS, COMPARED):
        update = False if "weight_update" in options_of(method) else None
        runs.append(Run(method, 0.5, samples=n, group=group, weight_update=update))
    runs += [Run(method, 0.5, samples=n) for method in ablations]
    runs += [Run(method, pattern=pattern, samples=n) for pattern in ("4:8", "2:4") for method in ablations]
    runs += [Run("wanda", 0.5, samples=n, variant=True), Run("ria", 0.5, samples=n)]
    runs += [Run(method, 0.6, samples=n, owl=True) for method in COMPARED]
    runs += [Run(method, 0.5, samples=n, seed=seed) for seed in scale.seeds for method in ("sparsegpt", "wanda")]
    return _distinct(runs)
