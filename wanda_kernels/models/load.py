"""Loads a causal language model: MODEL is a hub id, a local folder, or a ``.gguf`` file (dequantised)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where torch sees one, else the CPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _source(model: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` is to be called with; errors for paths that cannot hold a model."""
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model file {model} does not exist")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("reading a .gguf file needs the gguf package: pip install 'wanda_kernels[gguf]'")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{model} is not a GGUF file: it does not begin with 'GGUF'")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model folder {model} holds no config.json")
        return str(path), {}
    if path.exists():
        raise ValueError(f"{model} is neither a model folder nor a .gguf file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"model {model} does not exist")
    return model, {}


def _gguf_options() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told otherwise; older ones always dequantise."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _explain(model: str, error: Exception) -> Exception:
    """One sentence for what goes wrong while reading a model; the cause stays attached."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not Path(model).expanduser().exists():
        return FileNotFoundError(
            f"model {model} is no local path and could not be had from the Hugging Face hub: {text[:300]}"
        )
    return ValueError(f"model {model} could not be read (incomplete or damaged?): {text[:300]}")


def load_config(model: str) -> Any:
    """The configuration alone, of transformers. Errors as :func:`load_model`."""
    from transformers import AutoConfig

    source, options = _source(model)
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise _explain(model, error) from error


def load_model(model: str, dtype: str = "auto", device: str = "auto", device_map: str | None = None) -> nn.Module:
    """The model in evaluation mode, on ``device``.

    Args:
        model: a hub id, a folder as ``save_pretrained`` writes it, or a ``.gguf`` file.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        device_map: as transformers takes it, instead of ``device``: ``auto`` spreads the model over all GPUs.

    Raises:
        FileNotFoundError, ValueError: a model that is not there, or cannot be read.
        ImportError: a ``.gguf`` file without the ``gguf`` package.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    target = choose_device(device)
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ImportError("device_map needs the accelerate package: pip install 'wanda_kernels[stream]'")
    name, options = _source(model)
    from transformers import AutoModelForCausalLM

    if "gguf_file" in options:
        options |= _gguf_options()
    if device_map is not None:
        options["device_map"] = device_map
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **options)
    except Exception as error:
        raise _explain(model, error) from error
    loaded.config._name_or_path = os.path.basename(os.path.normpath(model)) if Path(model).exists() else model
    return loaded.eval() if device_map is not None else loaded.eval().to(target)


def load_tokenizer(model: str) -> Any:
    """The tokenizer that belongs to ``model`` (as for :func:`load_model`)."""
    name, options = _source(model)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        if not Path(model).expanduser().exists():
            raise _explain(model, error) from error
        raise ValueError(f"the tokenizer of {model} could not be read: {' '.join(str(error).split())[:300]}") from error
