"""Packs the linear layers and experts of a model's blocks in place, and unpacks them."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..pruning.blocks import find_blocks, matrices_of, unwrapped, why_not_plain
from ..pruning.matrices import Matrix, adapter_of
from .dense import make_plain, serve_dense
from .experts import PackedExperts, PackedStack, why_not_packable_experts
from .format import check_format, choose_format, why_dense
from .linear import PackedLinear
from .values import ValueType, quantized_bytes
from .weight import PackedWeight


@dataclass
class PackedReport:
    """What :func:`compress` did.

    Attributes:
        formats: layer -> its format, ``bitmap int8`` for instance, or ``dense`` where it stayed so.
        dense: layer that stayed dense -> why.
        dense_bytes, packed_bytes: of the weights of all those layers, before and after; ``weights``: how many.
        embedding_bytes: of an embedding that shared the weight of an output layer that was packed: it stays.
    """

    formats: dict[str, str]
    dense: dict[str, str]
    dense_bytes: int
    packed_bytes: int
    weights: int = 0
    embedding_bytes: int = 0

    def add(self, name: str, dense: Tensor, packed: PackedWeight | None, why: str | None = None) -> None:
        """A layer whose weight was ``dense``, on any device; ``packed``: what it is now, or None, and ``why``."""
        self.dense_bytes += dense.nbytes
        self.weights += dense.numel()
        if packed is None:
            self.formats[name], self.dense[name] = "dense", why or ""
            self.packed_bytes += dense.nbytes
        else:
            self.formats[name] = packed.form if packed.kind is None else f"{packed.form} {packed.kind.name}"
            self.packed_bytes += packed.nbytes()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / max(self.weights, 1)

    def __str__(self) -> str:
        counts = {form: list(self.formats.values()).count(form) for form in dict.fromkeys(self.formats.values())}
        layers = ", ".join(f"{count} {form}" for form, count in counts.items() if count)
        share = self.packed_bytes / max(self.dense_bytes, 1)
        sizes = f"{self.packed_bytes / 2**20:.1f} of {self.dense_bytes / 2**20:.1f} MiB ({share:.3f})"
        total = f"{layers}: {sizes}, {self.bits_per_weight:.2f} bits a weight"
        kept = f"{self.embedding_bytes / 2**20:.1f} MiB beside"
        tied = [f"the embedding keeps the weight that the output layer shared: {kept}"] if self.embedding_bytes else []
        return "\n".join([total, *tied, *(f"dense: {line}" for line in stayed_dense(self.dense))])


def stayed_dense(reasons: dict[str, str]) -> list[str]:
    """A line for each reason in ``reasons`` (layer -> why it is dense): ``up_proj, gate_proj (4 layers, the first is
    ..): why``."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        lines.append(f"{kinds} ({len(names)} layers, the first is {names[0]}): {reason}")
    return lines


@dataclass(frozen=True)
class Packing:
    """How weights are packed: the arguments of :func:`compress`.

    Attributes:
        kind, head_kind: what ``values`` and ``head`` say; None: as they are.

    Raises:
        ValueError: an unknown format, values, group_size or head.
    """

    format: str = "auto"
    values: str = "float"
    group_size: int | None = None
    head: str = "float"

    def __post_init__(self) -> None:
        check_format(self.format)
        if self.head not in ("float", "int8"):
            raise ValueError(f"head must be float or int8, got '{self.head}'")
        _ = self.kind

    def check_chosen(self, chosen: ValueType | None) -> None:
        """Raises ValueError where values that a run chooses (``prune(values=)``) may then not be packed: it rounds what
        any format fits."""
        if chosen is not None and self.format == "2:4":
            raise ValueError(
                "format must be auto or bitmap where values are chosen, got 2:4 (auto takes it where it fits)"
            )

    @property
    def kind(self) -> ValueType | None:
        return ValueType.parse(self.values, self.group_size)

    @property
    def head_kind(self) -> ValueType | None:
        return ValueType.parse(self.head)


def compress(
    model: nn.Module, format: str = "auto", values: str = "float", group_size: int | None = None, head: str = "float"
) -> PackedReport:
    """Replace the linear layers of a transformers decoder's blocks by :class:`PackedLinear`, and its fused experts by
    :class:`PackedExperts`, in place.

    Args:
        model: pruned; float32, bfloat16 or float16.
        format: ``bitmap`` (any sparsity), ``2:4``, or ``auto``: 2:4 where a weight is, else a bitmap.
        values: ``float``: as they are, lossless; ``int8``, ``int4``: the nearest whole numbers, with a scale for a row
            or some columns of it (:mod:`wanda_kernels.packed.values`). A weight that consists of such numbers already,
            as ``prune(values="int4")`` leaves it, is packed without loss.
        group_size: columns for a scale: 32, 64 or 128, or 0: a row's. None: 0 of int8, 128 of int4.
        head: ``int8``: so also the output layer, which reads as much as some blocks of a small model. One that shares
            its weight with the embedding gets one of its own.

    A layer that would not shrink, or that is not a plain ``nn.Linear`` (a subclass, one with hooks), stays dense, and
    so do experts of a form of their own (JetMoE); the report says why. Whatever stays an ``nn.Linear`` becomes a
    :class:`DenseLinear`, which computes the same, faster on the CPU. ``model.save_pretrained`` then writes a packed
    checkpoint, which ``from_pretrained`` loads after ``import wanda_kernels``.

    Raises:
        ValueError: an unknown format, values, group_size or head, a model that is packed already, NaN or inf where
            values are rounded, or a model in which every layer stays dense.
    """
    packing = Packing(format, values, group_size, head)
    if packed_layers(model):
        raise ValueError("the model is packed already: decompress it first")
    model = unwrapped(model)
    report = PackedReport({}, {}, 0, 0)
    matrices = matrices_of(find_blocks(model))
    # Before the first layer is packed: what ends halfway could neither be saved nor packed again.
    head_name = None if packing.head_kind is None else head_of(model)
    if packing.kind is not None:
        refuse_unroundable((name, matrix.stored) for name, matrix in matrices.items())
    if head_name is not None:
        refuse_unroundable([(head_name, model.get_submodule(head_name).weight)])  # type: ignore[list-item]
    for name in list(matrices):
        pack_matrix(model, name, matrices.pop(name), packing, report)  # popped, or it would hold the dense weight
    refuse_nothing_packed(model, packing, report)
    if head_name is not None:
        pack_head(model, head_name, packing, report)
    serve_dense(model)
    set_config(model, describe(model))
    return report


def refuse_unroundable(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError where one of the weights that are to be rounded holds NaN or inf."""
    for name, weight in weights:
        if not bool(weight.detach().isfinite().all()):
            raise ValueError(f"{name} holds NaN or inf: it cannot be rounded to 8 or 4 bits")


def pack_matrix(model: nn.Module, name: str, matrix: Matrix, packing: Packing, report: PackedReport) -> None:
    """In place, where it shrinks; the report is told."""
    stored = matrix.stored.detach()
    form, special = form_of(model, name, matrix, packing.format, packing.kind)
    if form is None:
        report.add(name, stored, None, special or why_dense(_as_matrix(matrix), packing.format))
    else:
        report.add(name, stored, _pack(model, name, matrix, form, packing.kind))


def refuse_nothing_packed(model: nn.Module, packing: Packing, report: PackedReport) -> None:
    """Raises ValueError where every layer stayed dense."""
    if not packed_layers(model):
        wanted = "" if packing.format == "auto" else f" as {packing.format}"
        reasons = "; ".join(stayed_dense(report.dense))
        raise ValueError(f"no linear layer of the model can be packed{wanted}: {reasons}")


def form_of(
    model: nn.Module, name: str, matrix: Matrix, format: str, kind: ValueType | None
) -> tuple[str | None, str | None]:
    """How :func:`compress` packs a matrix: (the form or None, why whatever it holds it must stay dense or None)."""
    special = _why_special(matrix) or used_outside(model, name, kind is not None)
    if special is None and kind is not None:
        special = why_not_pairs(matrix, kind)
    return (None if special else _choose(_as_matrix(matrix), format, kind)), special


def _choose(weight: Tensor, format: str, kind: ValueType | None) -> str | None:
    """None, too, of 8 or 4 bits where nothing was pruned: quantising alone is not what was asked for."""
    form = choose_format(weight, format)
    if kind is None or form is None:
        return form
    return choose_format(weight, format, lambda weight, form: quantized_bytes(weight, form, kind))


def why_not_pairs(matrix: Matrix, kind: ValueType) -> str | None:
    """Why experts of 4 bits, of which two rows share bytes, must stay dense; None if they need not."""
    if matrix.experts is None or kind.bits == 8 or matrix.weight.shape[-2] % 2 == 0:
        return None
    return f"its experts have {matrix.weight.shape[-2]} outputs: those of int4 need an even number"


def head_of(model: nn.Module) -> str:
    """The name of the output layer. Raises ValueError where it cannot be packed."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise ValueError(f"head must be float for a {type(model).__name__}: its output layer is no nn.Linear")
    if why := why_not_plain(head) or used_outside(model, name, is_rounded=True):
        raise ValueError(f"head must be float for a {type(model).__name__}: {name} cannot be packed: {why}")
    return name


def pack_head(model: nn.Module, name: str, packing: Packing, report: PackedReport) -> None:
    """The output layer, in place, with a weight of its own; the report is told."""
    head: Any = model.get_submodule(name)
    layer = PackedLinear.from_linear(head, "dense", packing.head_kind).train(head.training)
    if layer.nbytes() >= head.weight.nbytes:
        report.add(name, head.weight, None, "8 bits would not shrink it")
        return
    report.add(name, head.weight, layer)
    config: Any = model.config
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        report.embedding_bytes = head.weight.nbytes
    model.set_submodule(name, layer)
    _untie(model, name)


def used_outside(model: nn.Module, name: str, is_rounded: bool) -> str | None:
    """Why a linear layer must stay dense whose model reads the weight past the layer's forward (Mamba's ``dt_proj``,
    RWKV's ``output``; of 8 or 4 bits also its dtype): by the text of the model's module, without what makes first
    weights."""
    place, _, own = name.rpartition(".")
    try:
        source = _source(sys.modules[type(model.get_submodule(place)).__module__])
    except (OSError, TypeError):  # no text: a class made at run time
        return None
    other = "" if is_rounded else r"|\.dtype"
    # Slices, in BLOOM, are for the tensor parallelism that it was trained with.
    is_used = re.search(rf"\.{re.escape(own)}\.weight\b(?!\[|\.device{other})", source)
    return f"its model uses {own}.weight outside of the layer" if is_used else None


@functools.cache
def _source(module: ModuleType) -> str:
    return re.sub(r"\n( +)def _init_weights\b.*?(?=\n\1(?:def|@)|\n\S)", "", inspect.getsource(module), flags=re.DOTALL)


def _untie(model: Any, name: str) -> None:
    """The output layer no longer shares the embedding's weight: neither here nor when the model is loaded."""
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)


def _why_special(matrix: Matrix) -> str | None:
    """Why a matrix must stay dense, whatever it holds."""
    if matrix.experts is not None:
        return why_not_packable_experts(matrix.module)
    if isinstance(matrix.module, nn.Linear):
        return why_not_plain(matrix.module)
    return f"a {type(matrix.module).__name__} is not packed"


def _as_matrix(matrix: Matrix) -> Tensor:
    """[C_out, C_in]; of experts [E * C_out, C_in], with those that no router chooses."""
    stored = matrix.stored.detach()
    stored = stored.transpose(-1, -2) if matrix.is_transposed else stored
    return stored.reshape(-1, stored.shape[-1])


def _pack(model: nn.Module, name: str, matrix: Matrix, form: str, kind: ValueType | None) -> PackedWeight:
    """In place."""
    if isinstance(matrix.module, nn.Linear):
        layer = PackedLinear.from_linear(matrix.module, form, kind).train(matrix.module.training)
        model.set_submodule(name, layer)
        return layer
    place, _, parameter = name.rpartition(".")
    experts = PackedExperts.of(model.get_submodule(place))
    stored = matrix.stored.detach()
    stack = PackedStack.from_weight(stored.transpose(-1, -2) if matrix.is_transposed else stored, form, kind)
    experts.put(parameter, stack.train(experts.training))
    model.set_submodule(place, experts)
    return stack


def decompress(model: nn.Module) -> None:
    """Replace every packed layer by a dense one with the same weight, bit for bit, in place.

    Raises:
        ValueError: the model holds none.
    """
    model = unwrapped(model)
    if not packed_layers(model):
        raise ValueError("the model is not packed")
    unpack_layers(model)
    set_config(model, None)


def unpack_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Puts dense modules in the places of packed ones; returns them. Those beside them become plain, too."""
    places = [name for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedExperts)]
    for name in places:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear | PackedExperts)
        model.set_submodule(name, packed.to_linear() if isinstance(packed, PackedLinear) else packed.to_dense())
    make_plain(model)
    return {name: model.get_submodule(name) for name in places}


def keep_prefill_copies(model: nn.Module) -> int:
    """Give every linear 2:4 layer torch's semi-structured tensor beside its packed weight, for products with many
    tokens on CUDA (:meth:`PackedLinear.keep_prefill_copy`). Returns the bytes that they take.

    Raises:
        ValueError: the model has no 2:4 layer, or one cannot have a copy.
    """
    layers = [layer for layer in linear_layers(model).values() if layer.form == "2:4" and layer.kind is None]
    if not layers:
        raise ValueError("the model has no linear layer that is packed as 2:4 with float values")
    for layer in layers:
        layer.keep_prefill_copy()
    return sum(layer.prefill_bytes() for layer in layers)


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def linear_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in packed_layers(model).items() if isinstance(layer, PackedLinear)}


def dense_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers beside the packed ones in the blocks of a packed model, and its experts that are not packed
    -> why they are dense."""
    stacks = {name.rpartition(".")[0] for name in linear_layers(model)}
    is_rounded = any(layer.kind is not None for layer in packed_layers(model).values())
    found = {}
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if isinstance(module, nn.Linear) and name.rpartition(".")[0] in stacks:
            found[name] = (
                why_not_plain(module) or used_outside(model, name, is_rounded) or why_dense(module.weight.data)
            )
        elif isinstance(module, PackedExperts):
            for weight in module.layout.names:
                if module.stack_of(weight) is None:
                    matrix = Matrix(module, weight, module.layout.is_transposed, module.layout.experts)
                    found[f"{name}.{weight}"] = why_dense(_as_matrix(matrix))
        elif adapter is not None:
            for weight, matrix in adapter.matrices(f"{name}.").items():
                found[weight] = _why_special(matrix) or why_dense(_as_matrix(matrix))
    return found


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """By the names that they have in the dense model: those of linear layers, and of the weights of experts."""
    found: dict[str, PackedWeight] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found[name] = module
        elif isinstance(module, PackedExperts):
            stacks = {weight: module.stack_of(weight) for weight in module.layout.names}
            found |= {f"{name}.{weight}": stack for weight, stack in stacks.items() if stack is not None}
    return found


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What config.json says of the packed weights."""
    return {name: weight.describe() for name, weight in packed_weights(model).items()}


def set_config(model: Any, layers: dict[str, dict[str, Any]] | None) -> None:
    """What the model's config says of its packed weights, as :func:`describe` does; None: nothing."""
    from .quantizer import WandaPackedConfig

    if layers is not None:
        model.config.quantization_config = WandaPackedConfig(layers=layers)
        return
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
