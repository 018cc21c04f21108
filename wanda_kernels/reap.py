"""Takes whole experts out of a mixture of experts: those whose outputs, as the router weighs them, are the smallest.

Source: REAP (arXiv 2510.13999, Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression"),
eq. 9: the score of an expert is the mean, over the tokens that the router sends it, of its share times the L2 norm of
its output.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ._words import percent, to_json
from .models import evaluating
from .models.experts import ExpertsLayout, Routing, experts_per_token
from .models.load import empty_model
from .pruning.blocks import find_blocks, refuse_non_finite, unwrapped, what_it_computes
from .pruning.driver import check_input_ids
from .pruning.loop import default_batch_size
from .pruning.matrices import ROUTERS, RoutedExperts
from .pruning.report import Progress
from .pruning.spec import PruneSpec, check_whole
from .pruning.stand_ins import stand_ins

# What configurations call the number of experts, in the order of preference.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass
class DroppedLayer:
    """One layer of experts: ``scores`` and ``tokens`` of each, in their old order, and which were ``dropped``."""

    name: str
    scores: list[float]
    tokens: list[int]
    dropped: list[int]


@dataclass
class DropReport:
    """What :func:`drop_experts` did: ``experts`` a layer before, and ``left``."""

    experts: int
    left: int
    layers: list[DroppedLayer]

    def to_json(self) -> str:
        return to_json(asdict(self))

    def __str__(self) -> str:
        lines = [f"{self.experts - self.left} of {self.experts} experts dropped in each of {len(self.layers)} layers"]
        for layer in self.layers:
            lost = sum(layer.scores[expert] for expert in layer.dropped) / max(sum(layer.scores), 1e-30)
            names = ", ".join(map(str, layer.dropped[:8])) + (", .." if len(layer.dropped) > 8 else "")
            lines.append(f"{layer.name}: {names} ({percent(lost, 1)} of the layer's scores)")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Layer:
    """Experts, and ``router``: the tensors of ``parent`` that have an element or a row for each, by name."""

    name: str
    layout: ExpertsLayout
    parent: nn.Module
    router: dict[str, Tensor]


def drop_experts(
    model: Any,
    input_ids: Tensor,
    share: float,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> DropReport:
    """Take the share ``share`` of each layer's experts out, in place: weights, routers and the model's config.

    One pass of the dense model over ``input_ids`` gives the scores. A layer keeps the experts with the largest, in
    their order; where the router chooses groups first, each group loses as many. What ``save_pretrained`` writes loads
    in plain transformers.

    Args:
        model: a mixture of experts of transformers, as for :func:`wanda_kernels.prune`.
        input_ids: [samples, length], int64: the calibration sequences.
        share: of the experts, in (0, 1): ``int(experts * share)`` go.
        batch_size: sequences per forward pass; None chooses by device.
        progress: told about each batch.

    Raises:
        ValueError: no experts, or of a form whose number is fixed; a share that drops none, or leaves fewer than the
            router chooses for a token, or than its groups need; weights or outputs of experts that hold NaN or inf.
            Nothing is changed then.

    Source: REAP (arXiv 2510.13999), eq. 9.
    """
    model = unwrapped(model)
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    layers, experts, dropped = check_drop(model, share)
    if input_ids is None:
        raise ValueError("drop_experts needs input_ids: [samples, length], int64")
    ids = check_input_ids(model, input_ids, PruneSpec())
    assert ids is not None
    refuse_non_finite(find_blocks(model))
    groups = getattr(model.config.get_text_config(), "n_group", None) or 1
    report = DropReport(experts, experts - dropped, _scores(model, layers, ids, batch_size, progress or Progress()))
    with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could never be trained
        for layer, told in zip(layers, report.layers, strict=True):
            kept = _best(told.scores, dropped, groups)
            told.dropped = sorted(set(range(experts)) - set(kept))
            _keep(layer, kept, experts)
    _set_attributes(model, layers, experts, experts - dropped)
    _set_count(model.config, experts, experts - dropped)
    return report


def check_drop(model: Any, share: float, meta: bool = False, named: str = "share") -> tuple[list[_Layer], int, int]:
    """The layers of experts, how many each has, and how many of them would go. Raises ValueError as
    :func:`drop_experts`. ``meta``: the model's weights may be without data. ``named``: what errors call the share."""
    layers = [
        _layer_of(model, f"{block.name}.{name}".rstrip("."), adapter)
        for block in find_blocks(model, meta)
        for name, adapter in block.experts.items()
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no fused experts: there is none to drop")
    counts = {layer.layout.experts for layer in layers}
    if len(counts) > 1:
        raise ValueError(f"{type(model).__name__} has layers of {min(counts)} to {max(counts)} experts: one is needed")
    experts = counts.pop()
    dropped = _count_to_drop(model.config.get_text_config(), experts, share, named)
    _refuse_other_shapes(model, layers, _shrunk(model.config, experts, experts - dropped), experts - dropped)
    return layers, experts, dropped


def _count_to_drop(config: Any, experts: int, share: float, named: str) -> int:
    """Of each layer. ``config``: of the text model. Raises ValueError for a share that makes no sense."""
    check_share(named, share)
    groups = getattr(config, "n_group", None) or 1
    dropped = int(experts // groups * share) * groups
    if dropped == 0:
        of = f" in each of {groups} groups" if groups > 1 else ""
        raise ValueError(f"{named} must be larger: {share} of {experts // groups} experts{of} drops none")
    chosen = experts_per_token(config)
    if experts - dropped < chosen:
        raise ValueError(
            f"{named} must be smaller: {share} leaves {experts - dropped} of {experts} experts, a token takes {chosen}"
        )
    size = (experts - dropped) // groups
    among = getattr(config, "topk_group", None) or groups
    if groups > 1 and (size < 2 or size * among < chosen):
        raise ValueError(
            f"{named} must be smaller: {share} leaves {size} of {experts // groups} experts in each of {groups} "
            f"groups: a group needs 2 to be chosen by, and a token takes {chosen} from {among} of them"
        )
    return dropped


def check_share(name: str, share: Any) -> None:
    """Raises ValueError where ``share`` is no number in (0, 1)."""
    is_number = isinstance(share, Real) and not isinstance(share, bool)
    if not is_number or not 0 < share < 1:
        raise ValueError(f"{name} must be in (0, 1), got {share!r}")


def _layer_of(model: nn.Module, name: str, adapter: Any) -> _Layer:
    if not isinstance(adapter, RoutedExperts):
        raise ValueError(f"{name}: experts of the form {type(adapter).__name__} cannot be dropped")
    layout = adapter.layout
    experts = layout.experts
    if hasattr(layout.module, "identity_expert"):
        raise ValueError(f"{name}: its router also chooses experts that compute nothing: none can be dropped")
    other = what_it_computes(layout.module)
    if other is not None:
        raise ValueError(f"{name}: none can be dropped: {other}")
    parent = model.get_submodule(name.rpartition(".")[0])
    inside = name.rpartition(".")[2]
    named = [*parent.named_parameters(), *parent.named_buffers()]
    beside = {key: tensor for key, tensor in named if not key.startswith(f"{inside}.")}
    for key, tensor in beside.items():
        if tensor.dim() >= 2 and not (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name}: its router looks experts up in a table ({key}): none can be dropped")
    router = {
        key: tensor
        for key, tensor in beside.items()
        if (_is_of_router(key) or key.endswith(("e_score_correction_bias", "expert_bias")))
        and tensor.dim() >= 1
        and tensor.shape[0] == experts
    }
    if not any(tensor.dim() == 2 for tensor in router.values()):
        raise ValueError(f"{name}: no router with a row for each of its {experts} experts was found beside it")
    return _Layer(name, layout, parent, router)


def _is_of_router(key: str) -> bool:
    return not ROUTERS.isdisjoint(key.split("."))


@contextmanager
def _watched(layers: list[_Layer], sums: list[Tensor], counts: list[Tensor]) -> Iterator[None]:
    """Inside, each layer adds its experts' scores and tokens up, in float64 and in the order of the tokens."""

    def forward_of(index: int, layout: ExpertsLayout) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, chosen, shares = layout.arguments(args, kwargs)

            def seen(routing: Routing, out: Tensor) -> None:
                weighed = shares.reshape(-1)[routing.order].double().abs() * out.double().norm(dim=-1)
                ends = routing.ends.tolist()
                for expert, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
                    sums[index][expert] += weighed[begin:end].sum()
                    counts[index][expert] += end - begin

            return layout.forward(hidden, chosen, shares, layout.dense_product, seen)

        return forward

    with stand_ins([(layer.layout.module, forward_of(i, layer.layout)) for i, layer in enumerate(layers)]):
        yield


def _scores(
    model: Any, layers: list[_Layer], ids: Tensor, batch_size: int | None, progress: Progress
) -> list[DroppedLayer]:
    device = layers[0].layout.weight(layers[0].layout.down).device
    batches = ids.split(min(len(ids), batch_size or default_batch_size(device, ids.shape[1])))
    sums = [torch.zeros(layer.layout.experts, dtype=torch.float64, device=device) for layer in layers]
    counts = [torch.zeros(layer.layout.experts, dtype=torch.int64, device=device) for layer in layers]
    progress.start(len(batches))
    with ExitStack() as inside:
        inside.enter_context(torch.no_grad())
        inside.enter_context(evaluating(model))
        inside.enter_context(_watched(layers, sums, counts))
        for batch in batches:
            model(input_ids=batch.to(device), use_cache=False)
            progress.advance()
    scores = [(total / count.clamp(min=1)).tolist() for total, count in zip(sums, counts, strict=True)]
    for layer, of_layer in zip(layers, scores, strict=True):
        bad = [str(expert) for expert, score in enumerate(of_layer) if not math.isfinite(score)]
        if bad:
            raise ValueError(f"{layer.name}: outputs of the experts {', '.join(bad[:8])} hold NaN or inf")
    return [
        DroppedLayer(layer.name, of_layer, count.tolist(), [])
        for layer, of_layer, count in zip(layers, scores, counts, strict=True)
    ]


def _best(scores: list[float], dropped: int, groups: int) -> list[int]:
    """The experts that stay, in order: those with the largest scores of each group, of equals the first."""
    size = len(scores) // groups
    kept: list[int] = []
    for begin in range(0, len(scores), size):
        ranked = sorted(range(begin, begin + size), key=lambda expert: (-scores[expert], expert))
        kept += ranked[: size - dropped // groups]
    return sorted(kept)


def _keep(layer: _Layer, kept: list[int], experts: int) -> None:
    """The tensors of a layer with only the experts ``kept``."""
    module = layer.layout.module
    for name, tensor in [*module._parameters.items(), *layer.router.items()]:
        if tensor is None or tensor.shape[:1] != (experts,):
            continue
        owner, leaf = module, name
        if tensor is layer.router.get(name):
            path, _, leaf = name.rpartition(".")
            owner = layer.parent.get_submodule(path)
        rows = tensor.detach()[torch.tensor(kept, device=tensor.device)].contiguous()
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(rows, tensor.requires_grad)
        else:
            owner._buffers[leaf] = rows


def _set_attributes(model: nn.Module, layers: list[_Layer], experts: int, left: int) -> None:
    """The number of experts wherever modules remember it: experts, routers, and all that they are in, as the model
    itself (for its loss of balance)."""
    for layer in layers:
        parts = layer.name.split(".")
        around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        routers = [part for key, part in layer.parent.named_modules() if _is_of_router(key)]
        for part in [*around, *routers, layer.layout.module]:
            for name, value in list(vars(part).items()):
                is_count = ("experts" in name and "shared" not in name) or (name == "out_features" and part in routers)
                if is_count and type(value) is int and value == experts:
                    setattr(part, name, left)


def _set_count(config: Any, experts: int, left: int) -> None:
    """Every name of the number of experts in ``config``, and in its text model's."""
    for one in {id(one): one for one in (config, config.get_text_config())}.values():
        for name in _COUNTS:
            if type(getattr(one, name, None)) is int and getattr(one, name) == experts:
                setattr(one, name, left)


def _shrunk(config: Any, experts: int, left: int) -> Any:
    """A config of ``left`` experts. Raises ValueError where it does not say how many there are."""
    smaller = copy.deepcopy(config)
    _set_count(smaller, experts, left)
    text = smaller.get_text_config()
    if not any(getattr(text, name, None) == left for name in _COUNTS):
        raise ValueError(f"{type(text).__name__} does not say by any of {', '.join(_COUNTS)} that there are {experts}")
    return smaller


def _refuse_other_shapes(model: Any, layers: list[_Layer], smaller: Any, left: int) -> None:
    """Raises ValueError where the smaller model of transformers would not have the tensors that are left here."""
    mine = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        cut = [f"{layer.name}.{name}" for name in layer.layout.module._parameters]
        cut += [f"{parent}.{name}" for name in layer.router]
        for name in cut:
            if name in mine and mine[name][0] == layer.layout.experts:
                mine[name][0] = left
    wanted = {name: list(tensor.shape) for name, tensor in empty_model(smaller).state_dict().items()}
    for name in sorted(mine.keys() | wanted.keys()):
        if mine.get(name) != wanted.get(name):
            raise ValueError(
                f"{name} would be {mine.get(name)}, and transformers makes it {wanted.get(name)} for {left} experts: "
                "they cannot be dropped"
            )
