"""What a pruning run does, made once from Python arguments or command-line options."""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from .._words import percent
from ..methods import Method, Needs, Pattern, create
from ..methods.owl import Owl
from ..methods.select import Group
from ..packed.values import ValueType

PROPAGATE = ("pruned", "dense")
EXPERTS = ("routed", "all")
REFINE_DAMPING = 0.3
# SmolLM2, 50 % and 2:4: from 0 to 3, 0.1 and 0.3 leave the least error of a layer on held-out windows of the
# calibration text, 0.3 on another text.
UPDATE_DAMPING = 0.3
UPDATE_STEPS = 10  # after 8 the error is within 0.3 % of that, after 6 within 1 %


class SpecArguments(TypedDict, total=False):
    """The keyword arguments of :class:`PruneSpec`, with the options of the methods of this package; None is the
    default of each."""

    sparsity: float | None
    pattern: str | Pattern | None
    method: str | Method
    propagate: str
    batch_size: int | None
    exact_error: bool
    fuse_statistics: bool
    owl: Owl | bool | None
    experts: str
    min_tokens: int
    require_all: bool
    refine: bool
    refine_damping: float | None
    update: bool
    update_damping: float | None
    update_steps: int | None
    values: str
    group_size: int | None
    group: str | Group | None
    variant: bool
    weight_update: bool | None
    block_size: int | None
    damping: float | None
    ria_power: float | None


def check_whole(name: str, value: Any) -> None:
    """Raises ValueError where nothing can be counted with ``value``: whole, at least 1, in 63 bits."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not 1 <= value <= sys.maxsize:
        limit = f", at most {sys.maxsize}" if is_whole and value > 1 else ""
        raise ValueError(f"{name} must be a whole number, at least 1{limit}, got {value!r}")


def _damping_of(step: str, is_asked_for: bool, given: float | None, default: float) -> float:
    """Of the ``step`` refine or update. Raises ValueError where it is none, or the step is not asked for."""
    if given is not None and not is_asked_for:
        raise ValueError(f"{step}_damping {given:g} needs {step}=True")
    damping = default if given is None else float(given)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"{step}_damping must be at least 0 and finite, got {damping}")
    return damping


@dataclass(frozen=True, init=False)
class PruneSpec:
    """How a model is pruned: all but the model and its calibration data.

    Args:
        sparsity: share of each row to prune, in [0, 1); 0.5 where neither it nor ``pattern`` is given.
        pattern: ``"N:M"``: keep N of every M consecutive inputs.
        method: ``"wanda"`` (``|W| * ||X||_2`` within each row), ``"magnitude"`` (``|W|``, one threshold per
            matrix as in the official code), ``"sparsegpt"`` (blocks of columns, with its weight update), ``"ria"``
            (one threshold per matrix), or an ablation of the official code, ``"ablate_mag_seq"``,
            ``"ablate_wanda_seq"``, ``"ablate_mag_iter"``, ``"ablate_wanda_iter"``: the mask of magnitude or Wanda
            with SparseGPT's update, chosen at once or block of columns by block. Or a :class:`Method` itself.
        propagate: ``"pruned"``: each block sees the outputs of the pruned blocks before it, as in the paper;
            ``"dense"``: all statistics come from one forward pass of the dense model, about half the time.
        batch_size: sequences per forward pass; None chooses by device. It does not change the masks where it
            does not change the activations.
        exact_error: also measure each layer's relative output error on the calibration data (a pass more).
        fuse_statistics: let RMSNorm and gated MLPs add up the statistics of what they make, where a fused operator
            gives what they give (on the CPU the same bits; on CUDA to rounding). False: a pass of its own for each
            distinct input.
        owl: an :class:`Owl`, or True for its defaults: blocks with more outliers keep more (a dense pass more).
        experts: ``"routed"``: an expert's statistics come from the tokens that the router sends it; ``"all"``: from
            every token (the outputs stay the routed ones; a pass over all experts more).
        min_tokens: (``"routed"``) experts with fewer tokens than this take their layer's norms, the mean over its
            experts; 1: only idle ones. The report names them.
        refine: swap pruned and kept weights of each row (of each group of an N:M pattern) where that makes the layer's
            error on the calibration data smaller; no weight is changed (:func:`wanda_kernels.ops.refine_rows_`). Needs
            the Gram matrix of each input.
        refine_damping: how much a channel's own square counts more there than what channels have in common, 0.3; a
            large one leaves Wanda's mask as it is.
        update: then give the kept weights of each row the values that make that error least, on the same mask
            (:func:`wanda_kernels.ops.solve_rows_`).
        update_damping: as ``refine_damping``, of the update, 0.3; a large one leaves the weights as they are.
        update_steps: conjugate gradient steps of the update, 10.
        values: ``"int4"``: then round what is kept to 4 bits, the levels chosen so that a layer's error on the
            calibration data stays small (:func:`wanda_kernels.packed.calibrated.quantize_rows`); of layers that
            :func:`wanda_kernels.compress` packs as int4, which finds the same values again. With ``sparsity=0`` of a
            model that is pruned already. Needs the Gram matrix of each input. ``"float"``: do not.
        group_size: (``"int4"``) columns for a scale: 32, 64 or 128, the default.
        require_all: refuse models with tensors that would stay dense in their blocks, as routers and convolutions.
        group: (wanda, magnitude, ria, sparsegpt without update) what weights are compared with: ``"row"``,
            ``"layer"``, ``"column"``, or ``"row:N"``, ``"column:N"`` for N neighbours together.
        variant: (wanda) the appendix's variant: rows lose what carries the least of their score.
        weight_update: (sparsegpt) False: prune by its metric and leave the other weights alone.
        block_size: (sparsegpt, ablate) columns in a block, 128.
        damping: (sparsegpt, ablate) of the Hessian, as a share of its mean diagonal, 0.01. Where it cannot be
            factorised, ten times as much; the layer's report says so.
        ria_power: (ria) exponent of the norm, 0.5.

    Raises:
        ValueError: values out of range, or that do not go together. TypeError: an argument that does not exist.
    """

    method: Method
    sparsity: float
    pattern: Pattern | None
    owl: Owl | None
    propagate: str
    batch_size: int | None
    exact_error: bool
    fuse_statistics: bool
    experts: str
    min_tokens: int
    require_all: bool
    refine: bool
    refine_damping: float
    update: bool
    update_damping: float
    update_steps: int
    values: ValueType | None

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        pattern: str | Pattern | None = None,
        method: str | Method = "wanda",
        propagate: str = "pruned",
        batch_size: int | None = None,
        exact_error: bool = False,
        fuse_statistics: bool = True,
        owl: Owl | bool | None = None,
        experts: str = "routed",
        min_tokens: int = 1,
        require_all: bool = False,
        refine: bool = False,
        refine_damping: float | None = None,
        update: bool = False,
        update_damping: float | None = None,
        update_steps: int | None = None,
        values: str = "float",
        group_size: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(method, str):
            method = create(method, options)
        elif options:
            raise ValueError(f"method has its options already: {min(options)} belongs into {type(method).__name__}(..)")
        if pattern is not None and sparsity is not None:
            raise ValueError(f"give sparsity or pattern, not both: got sparsity {sparsity} and pattern {pattern}")
        parsed = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        if parsed is not None:
            share = 1 - parsed.n / parsed.m
        else:
            share = 0.5 if sparsity is None else float(sparsity)
            if not 0 <= share < 1:
                raise ValueError(f"sparsity must be in [0, 1), got {share}")
        method.check(parsed)
        owl = Owl() if owl is True else owl or None
        if owl is not None:
            if parsed is not None:
                raise ValueError("owl is for a sparsity, a pattern leaves it no choice: give one of them")
            owl.check(share)
        if propagate not in PROPAGATE:
            raise ValueError(f"propagate must be one of {', '.join(PROPAGATE)}, got '{propagate}'")
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        if experts not in EXPERTS:
            raise ValueError(f"experts must be one of {', '.join(EXPERTS)}, got '{experts}'")
        check_whole("min_tokens", min_tokens)
        for name, given in (("refine", refine), ("update", update)):
            if given and not method.keeps_weights:
                raise ValueError(
                    f"{name} is for methods that keep the weights as they are, and '{method.name}' updates them"
                )
        refine_damping = _damping_of("refine", refine, refine_damping, REFINE_DAMPING)
        update_damping = _damping_of("update", update, update_damping, UPDATE_DAMPING)
        if update_steps is not None:
            if not update:
                raise ValueError(f"update_steps {update_steps} needs update=True")
            check_whole("update_steps", update_steps)
        kind = ValueType.parse(values, group_size)
        if kind is not None and kind.bits != 4:
            raise ValueError(
                f"values must be float or int4, got '{values}': calibration wins nothing over the nearest of 8 bits, "
                "which is what compress packs"
            )
        if experts == "all" and min_tokens != 1:
            raise ValueError(f"min_tokens is for experts 'routed', got {min_tokens}: with 'all' each gets every token")
        fields = (
            method, share, parsed, owl, propagate, batch_size, bool(exact_error), bool(fuse_statistics), experts,
            min_tokens, bool(require_all), bool(refine), refine_damping, bool(update), update_damping,
            UPDATE_STEPS if update_steps is None else update_steps, kind,
        )  # fmt: skip
        for one, value in zip(dataclasses.fields(self), fields, strict=True):
            object.__setattr__(self, one.name, value)

    @classmethod
    def of(cls, spec: PruneSpec | None, arguments: SpecArguments) -> PruneSpec:
        """``spec``, or one of ``arguments``; raises ValueError where both are given."""
        if spec is None:
            return cls(**arguments)
        if arguments:
            raise ValueError(f"give spec or its parts, not both: got spec and {min(arguments)}")
        if not isinstance(spec, PruneSpec):
            raise TypeError(f"spec must be a PruneSpec, got a {type(spec).__name__}")
        return spec

    def with_batch_size(self, size: int) -> PruneSpec:
        made = copy.copy(self)
        object.__setattr__(made, "batch_size", size)
        return made

    @property
    def needs(self) -> Needs:
        """What has to be known of the inputs."""
        if self.improves:
            return Needs.GRAM
        return max(self.method.needs, Needs.NORM) if self.owl else self.method.needs

    @property
    def improves(self) -> bool:
        """Whether anything follows the method's mask."""
        return self.refine or self.update or self.values is not None

    def options(self) -> dict[str, Any]:
        """Of the method and ``owl``, those that are not the default, as plain data."""
        return self.method.options() | ({"owl": dataclasses.asdict(self.owl)} if self.owl else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data: all that decides the masks, and what else is measured."""
        return {
            "method": self.method.name,
            "sparsity": self.sparsity,
            "pattern": str(self.pattern) if self.pattern else None,
            "method options": self.options(),
            "propagate": self.propagate,
            "batch_size": self.batch_size,
            "exact_error": self.exact_error,
            "fuse_statistics": self.fuse_statistics,
            "experts": self.experts,
            "min_tokens": self.min_tokens,
            "refine": self.refine,
            "refine_damping": self.refine_damping if self.refine else None,
            "update": self.update,
            "update_damping": self.update_damping if self.update else None,
            "update_steps": self.update_steps if self.update else None,
            "values": None if self.values is None else self.values.name,
            "group_size": None if self.values is None else self.values.group,
        }

    def check_experts(self, has_experts: bool) -> None:
        """Raises ValueError for options about experts of a model that has none, or that the method does not use."""
        given = [("experts", self.experts != "routed"), ("min_tokens", self.min_tokens != 1)]
        for name in (name for name, is_given in given if is_given):
            if not has_experts:
                raise ValueError(f"{name} is for models with fused experts, and this one has none")
            if not self.needs:
                raise ValueError(f"{name} is for methods that calibrate, and '{self.method.name}' does not")

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Raises ValueError where the pattern does not fit ``weight``, [.., C_out, C_in]."""
        if self.pattern is not None and weight.shape[-1] % self.pattern.m:
            raise ValueError(
                f"{name} has {weight.shape[-1]} input columns, not a multiple of the pattern's M = {self.pattern.m}"
            )

    def __str__(self) -> str:
        return f"{self.method.name} {self.pattern or percent(self.sparsity)}"
