"""Which runs a study has: a grid that the user gives, or the tables and figures of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from ..methods import METHODS, Pattern, create, options_of
from ..pruning.spec import REFINE_DAMPING, UPDATE_DAMPING, PruneSpec

COMPARED = ("magnitude", "sparsegpt", "wanda")
STEPS = ("refine", "refine_damping", "update", "update_damping")  # of a run, after the method's mask
GROUPS = ("layer", "column", "column:128", "row", "row:128")


@dataclass(frozen=True)
class Run:
    """One pruned model: method, target, options, calibration. ``detail``: with each layer's error and threshold (a run
    more). A damping that is None becomes the default."""

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    samples: int = 0
    seed: int = 0
    group: str | None = None
    variant: bool = False
    weight_update: bool | None = None
    owl: bool = False
    refine: bool = False
    refine_damping: float | None = None
    update: bool = False
    update_damping: float | None = None
    detail: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.refine and self.refine_damping is None:
            object.__setattr__(self, "refine_damping", REFINE_DAMPING)
        if self.update and self.update_damping is None:
            object.__setattr__(self, "update_damping", UPDATE_DAMPING)

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
        steps = [
            f"refined{_unless(REFINE_DAMPING, self.refine_damping)}" if self.refine else "",
            f"updated{_unless(UPDATE_DAMPING, self.update_damping)}" if self.update else "",
        ]
        by_itself = " ".join([self.method, *filter(None, options)])
        return ", ".join(filter(None, [by_itself, " and ".join(filter(None, steps))]))

    @property
    def key(self) -> str:
        calibration = f"{self.samples} samples, seed {self.seed}" if self.samples else "no calibration"
        return f"{self.label} {self.target}, {calibration}"

    def spec(self, exact_error: bool = False) -> PruneSpec:
        """Raises ValueError for options that do not go together."""
        names = ("method", "sparsity", "pattern", "group", "variant", "weight_update", "owl")
        given = {name: getattr(self, name) for name in names + STEPS}
        unset = {name for name in STEPS if given[name] is None or given[name] is False}
        return PruneSpec(exact_error=exact_error, **{name: given[name] for name in given if name not in unset})


def _unless(default: float | None, damping: float | None) -> str:
    """All figures of a damping, so that two have never the same name."""
    return "" if damping in (None, default) else f" (damping {float(damping)!r})"


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
    *,
    refine: Sequence[float | None] = (),
    update: Sequence[float | None] = (),
    detail: bool = True,
) -> list[Run]:
    """method x (sparsity or pattern) x group x samples x seed. Groups leave patterns out, and methods that have none.

    Args:
        refine: dampings, None for the default: beside each run of a method that keeps the weights one whose mask is
            refined with each.
        update: the same of updated weights, on the refined masks, or on the method's where none is refined.
        detail: with each layer's error and threshold, of runs that are neither; they prune twice for it.

    Raises:
        ValueError: a combination that :func:`wanda_kernels.prune` refuses; no method keeps the weights.
    """
    refined = [{"refine": True, "refine_damping": damping} for damping in refine]
    updated = [{"update": True, "update_damping": damping} for damping in update]
    steps: list[dict[str, Any]] = [{}, *refined, *(one | two for one in refined or [{}] for two in updated)]
    keeping = {name for name in methods if create(name, {}).keeps_weights}
    if len(steps) > 1 and not (keeping and None in groups):
        named = "refine" if refined else "update"
        raise ValueError(
            f"{named} is for methods that keep the weights, compared as they do by themselves: none of "
            f"{', '.join(methods)} with groups {', '.join(group or 'own' for group in groups)}"
        )
    targets: list[tuple[float | None, str | None]] = [(s, None) for s in sparsities] + [(None, p) for p in patterns]
    runs = []
    for seed, count, group, (sparsity, pattern), method in itertools.product(seeds, samples, groups, targets, methods):
        if group is not None and (pattern is not None or "group" not in options_of(method)):
            continue
        no_update = False if group is not None and "weight_update" in options_of(method) else None
        plain = Run(
            method, sparsity, pattern, count, seed, group, weight_update=no_update, detail=detail and group is None
        )
        can_step = group is None and method in keeping
        runs += [plain, *(replace(plain, detail=False, **step) for step in steps[1:] if can_step)]
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
    targets: list[dict[str, Any]] = [{"sparsity": 0.5}, {"sparsity": 0.6}, {"pattern": "4:8"}, {"pattern": "2:4"}]
    runs += [
        Run("wanda", **target, samples=n, refine=True, update=update)
        for target, update in itertools.product(targets, (False, True))
    ]
    runs += [Run(method, 0.5, samples=n, seed=seed) for seed in scale.seeds for method in ("sparsegpt", "wanda")]
    return _distinct(runs)
