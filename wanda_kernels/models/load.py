"""Loads a causal language model: MODEL is a hub id, a local folder, or a ``.gguf`` file (dequantised).

The one place where models come from. What transformers only warns of (tensors that are missing, or that the model has
no place for) is an error here: it fills what is missing with random numbers, and these would be pruned, evaluated and
saved. Code that comes with a model is never run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._words import need
from .checkpoint import INDEX, SINGLE, Checkpoint, json_object
from .fits import check_config, check_fits, check_size, listed
from .save import PROCESSOR

ADAPTER = "adapter_config.json"
DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BAD_QUANTISED = "could not be read by its quantization_config (incomplete or damaged?)"
_BAD_CONFIG = "cannot be made from its config.json"


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where torch sees one, else the CPU; ``cuda`` the current one, ``cuda:1`` the
    second."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got '{name}'")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    _, _, index = name.partition(":")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(name)


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is to be called with; errors for paths that cannot hold a model."""
    if not model:
        raise ValueError("model must be a hub id, a folder or a .gguf file, got nothing")
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model file {model} does not exist")
        need("gguf", "gguf", "reading a .gguf file needs the gguf package")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{model} is not a GGUF file: it does not begin with 'GGUF'")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / ADAPTER).exists():
            raise ValueError(
                f"model folder {model} holds a LoRA adapter ({ADAPTER}): merge it into the model first "
                "(peft: merge_and_unload), or take the adapter's files away"
            )
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model folder {model} holds no config.json")
        json_object((path / "config.json").read_bytes(), str(path / "config.json"))
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


def _words(error: Exception) -> str:
    """In one line; with its type where the words alone say nothing (``'x'`` of a KeyError)."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: {text}"


def _explain(model: str, error: Exception, what: str = "could not be read (incomplete or damaged?)") -> Exception:
    """One sentence for what goes wrong while reading a model; the cause stays attached."""
    import transformers

    text = _words(error)
    if "trust_remote_code" in text:
        return ValueError(
            f"model {model} needs code of its own (auto_map), and a model's code is never run here: transformers "
            f"{transformers.__version__} has no class for it"
        )
    if not Path(model).expanduser().exists():
        return FileNotFoundError(
            f"model {model} is no local path and could not be had from the Hugging Face hub: {text[:300]}"
        )
    return ValueError(f"model {model} {what}: {text[:300]}")


def load_config(model: str) -> Any:
    """The configuration alone, of transformers. Errors as :func:`load_model`."""
    from transformers import AutoConfig

    source, options = _source(model)
    if Path(source).is_dir() and "gguf_file" not in options:
        checkpoint = _checkpoint(model, source)
        check_config(Path(source) / "config.json", checkpoint)
        generation = Path(source) / "generation_config.json"
        if generation.is_file():
            json_object(generation.read_bytes(), str(generation))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise _explain(model, error, *([_BAD_CONFIG] if not options else [])) from error
    if config.dtype is not None and not getattr(config.dtype, "is_floating_point", False):
        raise ValueError(f"model {model} {_BAD_CONFIG}: its dtype is {config.dtype}, not a floating-point type")
    return config


def _checkpoint(model: str, source: str) -> Checkpoint | None:
    """The tensors of a local folder, or None where they are in another format. Damaged shards, an index that disagrees
    with them: transformers lets some pass."""
    if not any((Path(source) / name).is_file() for name in (SINGLE, INDEX)):
        if Path(source).is_dir() and any(Path(source).glob("*.bin")):
            raise ValueError(
                f"model folder {model} holds no safetensors but pickled weights (.bin), which are not read: save it "
                "once with transformers' save_pretrained"
            )
        return None
    try:
        return Checkpoint(Path(source))
    except Exception as error:
        raise _explain(model, error) from error


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the model of ``config``: a causal language model, or one that also takes
    images, whose text decoder is what is pruned.

    Raises:
        ValueError: it is neither.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for chosen in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in chosen._model_mapping:
            return chosen
    raise ValueError(
        f"{type(config).__name__} is the configuration of no causal language model that transformers knows"
    )


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of ``config`` on the meta device: its structure and shapes, without weights.

    Args:
        dtype: of the weights; None: the config's, or float32.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype or config.dtype or torch.float32)
    model.tie_weights()
    return model.eval()


def weight_bytes(model: str, dtype: str = "auto") -> int | None:
    """What the model's weights take on a disk in ``dtype``, without loading it; None where the files do not say."""
    path = Path(model).expanduser()
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        return None
    checkpoint = Checkpoint(path)
    if dtype == "auto":
        return checkpoint.size
    width = DTYPES[dtype].itemsize
    return sum(width * torch.Size(entry.shape).numel() for entry in checkpoint.entries.values())


def _has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def check_choices(dtype: str, device: str, device_map: str | None = None) -> torch.device:
    """The device. Raises ValueError or ImportError for what no model can be loaded with."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    target = choose_device(device)
    if device_map is not None:
        need("accelerate", "stream", "device_map needs the accelerate package")
    return target


def load_model(model: str, dtype: str = "auto", device: str = "auto", device_map: str | None = None) -> nn.Module:
    """The model in evaluation mode, on ``device``, with exactly the tensors that its files hold.

    Args:
        model: a hub id, a folder as ``save_pretrained`` writes it, or a ``.gguf`` file.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: as transformers takes it, instead of ``device``: ``auto`` spreads the model over all GPUs.

    Raises:
        FileNotFoundError, ValueError: a model that is not there, or cannot be read; files that lack tensors of the
            model, or hold others; one with an adapter beside it; one that needs code of its own.
        ImportError: a ``.gguf`` file without the ``gguf`` package.
    """
    target = check_choices(dtype, device, device_map)
    name, options = _source(model)
    config: Any = None
    if "gguf_file" in options:  # one file, whose description takes seconds to read
        from transformers import AutoModelForCausalLM

        chosen: Any = AutoModelForCausalLM
        options |= _gguf_options()
    else:
        config = load_config(model)
        chosen = auto_class(config)
        checkpoint = _checkpoint(model, name)
        if checkpoint is not None:
            _check_fits(model, config, checkpoint)
    # Straight to the card. transformers needs accelerate for that; without it, tensors of the files' own dtype are
    # pages of the files until they are moved, one by one.
    is_straight = target.type == "cuda" and "gguf_file" not in options and _has_accelerate()
    if device_map is not None:
        options["device_map"] = device_map
    elif is_straight:
        options["device_map"] = {"": target}
    try:
        loaded, info = chosen.from_pretrained(
            name,
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            output_loading_info=True,
            **({} if "gguf_file" in options else {"use_safetensors": True}),
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except torch.OutOfMemoryError:  # the files are not to blame
        raise
    except Exception as error:
        quantised = getattr(config, "quantization_config", None) is not None
        raise _explain(model, error, *([_BAD_QUANTISED] if quantised else [])) from error
    _refuse_incomplete(model, info)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model {model} has a LoRA adapter beside it: merge it into the model first (merge_and_unload)"
        )
    loaded.config._name_or_path = os.path.basename(os.path.normpath(model)) if Path(model).exists() else model
    return loaded.eval() if device_map is not None or is_straight else loaded.eval().to(target)


def _check_fits(model: str, config: Any, checkpoint: Checkpoint) -> None:
    try:
        empty = empty_model(config)
    except Exception as error:
        raise _explain(model, error, _BAD_CONFIG) from error
    if getattr(config, "quantization_config", None) is None:
        check_fits(empty, checkpoint)
    else:  # what is stored how is the quantizer's to say
        check_size(empty, checkpoint, quantised=True)


def _refuse_incomplete(model: str, info: dict[str, Any]) -> None:
    """Raises ValueError where the files and the model do not hold the same tensors. ``info``: as transformers says."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        hint = ""
        prefixes = {name[: -len(wanted)] for wanted in missing for name in unexpected if name.endswith(f".{wanted}")}
        if prefixes:
            hint = (
                f"; they are there as '{min(prefixes)}*', as a wrapped model (torch.compile, data parallel) is saved: "
                "save the model inside it (its _orig_mod or module)"
            )
        raise ValueError(f"model {model} is incomplete: its files lack {listed(missing)}{hint}")
    if unexpected:
        raise ValueError(
            f"model {model} holds tensors that its config.json has no place for: {listed(unexpected)}; they would be "
            "lost. Correct config.json, or take them out of the files"
        )
    if info.get("mismatched_keys"):
        sizes = [f"{name} is {list(there)}, not {list(own)}" for name, there, own in sorted(info["mismatched_keys"])]
        raise ValueError(f"model {model} does not fit its config.json: {listed(sizes)}")
    for kind in ("error_msgs", "conversion_errors"):
        if info.get(kind):
            raise ValueError(f"model {model} does not fit its config.json: {listed(map(str, info[kind]))}")


def processor_files(model: str, config: Any) -> dict[str, str]:
    """What lies beside ``model`` for its images and video, name -> text; none where its ``config`` is of text alone."""
    from transformers.utils import cached_file

    if not getattr(type(config), "sub_configs", None):
        return {}
    source, _ = _source(model)
    paths = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR}
    return {name: Path(path).read_text(encoding="utf-8") for name, path in paths.items() if path is not None}


def load_tokenizer(model: str) -> Any:
    """The tokenizer that belongs to ``model`` (as for :func:`load_model`)."""
    name, options = _source(model)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        if not Path(model).expanduser().exists() or "trust_remote_code" in str(error):
            raise _explain(model, error) from error
        raise ValueError(f"the tokenizer of {model} could not be read: {_words(error)[:300]}") from error
