"""One family of models, on a tiny random one: does it run, is it pruned, and to the bits of a plain Wanda?"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import plain_wanda
from benchmarks.tiny_configs import KINDS, SPECIAL, tiny_config
from wanda_kernels import compress, prune, stream_prune
from wanda_kernels.packed import dispatch

SAMPLES, LENGTH, BATCH = 5, 24, 2
TARGETS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
LOADERS = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}
LONGEST = 400  # of what is told of an error
CLOSE = 1e-3  # of the largest logit: packed products add in another order

Row = dict[str, Any]


def calibration() -> Tensor:
    """[SAMPLES, LENGTH], int64: ordinary tokens of every tiny vocabulary."""
    return torch.randint(3, SPECIAL.start, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def tiny_model(kind: str, family: str) -> Any:
    """A random model, the same at every call, in evaluation mode and float32."""
    return _model_of(kind, tiny_config(family))


def _model_of(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, LOADERS[kind]).from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # weights that begin as zeros would show no mask
        if parameter.dim() >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def judge(kind: str, family: str, files: bool = True) -> Row:
    """What there is to say of a family, as plain data.

    Args:
        kind: ``causal`` or ``image-text``.
        files: also pack it, and stream it from a temporary folder to another.

    Returns:
        ``encoder``: it is an encoder-decoder. ``runs``, ``pruned``; ``why``, where one of them is False. Where it is
        pruned: ``bits``: target -> [bits that differ from the plain Wanda's, bits], or why that gave none; ``dense``:
        see :func:`_dense`; ``packed``, ``streamed``: see :func:`_packed`, :func:`_streamed`.
    """
    row: Row = {"kind": kind, "family": family, "class": KINDS[kind][family], "encoder": False}
    with _quiet():
        try:
            config = tiny_config(family)
            row["encoder"] = bool(getattr(config, "is_encoder_decoder", False))
            model = _model_of(kind, config)
            logits = _logits(model)
        except Exception as error:  # noqa: BLE001 -- the row says what was raised, whatever it is
            return row | {"runs": False, "pruned": False, "why": _words(error)}
        if not bool(torch.isfinite(logits).all()):
            return row | {"runs": False, "pruned": False, "why": "its logits are not finite"}
        if not torch.equal(logits, _logits(model)):
            return row | {"runs": False, "pruned": False, "why": "its forward pass draws random numbers"}
        return row | {"runs": True} | _pruned(model, files)


def _pruned(model: Any, files: bool) -> Row:
    dense = _parameters(model)
    row: Row = {"pruned": True, "bits": {}}
    kept: tuple[Any, set[str]] | None = None
    for target, spec in TARGETS.items():
        ours = copy.deepcopy(model)
        try:
            report = prune(ours, calibration(), batch_size=BATCH, **spec)
        except Exception as error:  # noqa: BLE001 -- a refusal, or a fault of ours: the row says which
            if not row["bits"]:
                return {"pruned": False, "why": _words(error)}
            row["bits"][target] = _words(error)
            continue
        pruned = _parameters(ours)
        touched = {name for name, weight in dense.items() if not torch.equal(weight, pruned[name])}
        try:
            plain = copy.deepcopy(model)
            plain_wanda.prune(plain, calibration(), BATCH, only=touched.__contains__, **_plain(spec))
            row["bits"][target] = _bits(dense, pruned, _parameters(plain), touched)
        except Exception as error:  # noqa: BLE001 -- the plain Wanda has no answer: the row says so
            row["bits"][target] = f"plain Wanda: {_words(error)}"
        if kept is None:
            kept = ours, touched
            row["dense"] = _dense(model, touched, set(report.dense))
    if files and kept is not None:
        pruned_model, touched = kept
        row["packed"] = _answer(lambda: _packed(copy.deepcopy(pruned_model), touched))
        row["streamed"] = _answer(lambda: _streamed(model, pruned_model))
    return row


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    pattern = spec.get("pattern")
    return spec if pattern is None else {"pattern": tuple(map(int, pattern.split(":")))}


def _bits(dense: dict[str, Tensor], ours: dict[str, Tensor], plain: dict[str, Tensor], touched: set[str]) -> list[int]:
    """[bits of the masks that differ, bits]."""
    differ = 0
    for name in touched:
        was = dense[name] != 0
        differ += int(torch.count_nonzero((was & (ours[name] == 0)) != (was & (plain[name] == 0))))
    return [differ, sum(dense[name].numel() for name in touched)]


def _dense(model: nn.Module, touched: set[str], reported: set[str]) -> Row:
    """What no mask has ``touched`` in the blocks, of two dimensions or more: ``share`` of all such weights, ``names``,
    and those that the report does not list, ``unreported``."""
    prefix, stack = plain_wanda.find_stack(model, calibration()[:1])
    named = [(name, p) for name, p in stack.named_parameters() if p.dim() >= 2 and not name.endswith("bias")]
    weights = {f"{prefix}.{name}": p.numel() for name, p in named}
    left = {name: size for name, size in weights.items() if name not in touched}
    silent = {name for name in left if not {name, name.removesuffix(".weight")} & reported}

    def short(names: Iterable[str]) -> list[str]:
        return sorted({".".join(name.removeprefix(f"{prefix}.").split(".")[1:]) for name in names})

    share = sum(left.values()) / max(1, sum(weights.values()))
    return {"share": share, "names": short(left), "unreported": short(silent)}


def _answer(ask: Callable[[], Row]) -> Row:
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 -- a refusal, or a fault of ours: the row says which
        return {"ok": False, "why": _words(error)}


def _packed(model: Any, touched: set[str]) -> Row:
    """``difference``: the largest of the logits of one sequence, over the largest logit; ``ok``: it is rounding.
    ``share``: of the weights that are pruned, those that are packed.

    Products with the packed weights as they are: not what is fastest here, which may be to unpack them.
    """
    expected = _logits(model, 1)
    sizes = {name.removesuffix(".weight"): model.get_parameter(name).numel() for name in touched}
    forms = compress(model).formats
    packed = sum(size for name, size in sizes.items() if forms.get(name, "dense") != "dense")
    with patch.object(dispatch, "choose", lambda _key, ways, _product: ways[0]):
        dispatch.clear()
        difference = float((_logits(model, 1) - expected).abs().max() / expected.abs().max())
    dispatch.clear()
    row: Row = {"ok": difference < CLOSE, "difference": difference, "share": packed / sum(sizes.values())}
    return row if row["ok"] else row | {"why": f"its logits differ by {difference:.1e} of the largest"}


def _streamed(dense: Any, pruned: Any) -> Row:
    """``ok``: the files have the input's tensors, with the bits of the run in memory."""
    with tempfile.TemporaryDirectory() as folder:
        source, expected, out = (Path(folder) / name for name in ("dense", "expected", "out"))
        dense.save_pretrained(source)
        pruned.save_pretrained(expected)
        try:
            stream_prune(source, out, calibration(), batch_size=BATCH, sparsity=0.5, device="cpu")
        except Exception as error:  # noqa: BLE001 -- a refusal, or a fault of ours: the row says which
            return {"ok": False, "why": _words(error).replace(f"{folder}/", "")}
        names = set(_tensors(source))
        wanted, found = _tensors(expected), _tensors(out)
    if set(found) != names:
        return {"ok": False, "why": f"the files hold other tensors: {', '.join(sorted(names ^ set(found))[:3])}"}
    other = [name for name in sorted(names) if not torch.equal(found[name], wanted[name])]
    return {"ok": not other} | ({"why": f"{len(other)} tensors differ, {other[0]} first"} if other else {})


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _logits(model: Any, sequences: int = BATCH) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=calibration()[:sequences], use_cache=False).logits
    return logits


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _words(error: BaseException) -> str:
    """What was raised, in one line; a ValueError is a refusal, and speaks for itself."""
    text = " ".join(str(error).split())
    text = text if type(error) is ValueError else f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} ..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of libraries on random models."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
