"""What tests/mutations.py does to a model folder. Each mutator changes the folder and says what it did."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from mutators_tensors import (
    HOSTILE,
    INDEX,
    byte_edit,
    header_edit,
    load_json,
    packed_edit,
    put,
    shards,
    tensor_edit,
    tensors,
    value_edit,
)


def index_edit(folder: Path, draw: random.Random) -> str:
    path = folder / INDEX
    held = {name: file.name for file in shards(folder) for name in tensors(file)}
    index = load_json(path) or {"metadata": {"total_size": 1}, "weight_map": dict(held)}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or path.is_dir():
        return "no index"
    name, names = draw.choice(sorted(places)), sorted({str(place) for place in places.values()})
    kind = draw.choice(["gone", "elsewhere", "unknown", "left out", "outside", "junk", "text", "both", "none", "place"])
    if kind == "gone":
        (folder / draw.choice(names)).unlink(missing_ok=True)
    elif kind == "elsewhere":
        places[name] = draw.choice([*names, "model-00099-of-00099.safetensors", "config.json"])
    elif kind == "unknown":
        places[draw.choice(["model.layers.9.x", "", name + "x"])] = draw.choice(names)
    elif kind == "left out":
        del places[name]
    elif kind == "outside":
        places[name] = draw.choice(
            ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".", "", "x" * 5000, "\0"]
        )
    elif kind == "junk":
        index[draw.choice(["weight_map", "metadata"])] = draw.choice([None, [], "x", 5, {}, {"total_size": -1}])
    elif kind == "place":
        places[name] = draw.choice(HOSTILE)
    elif kind == "both":  # one file beside an index of shards, with other values
        draw_from = {key: value for file in shards(folder) for key, value in tensors(file).items()}
        put(folder / "model.safetensors", {key: (d, s, bytes(len(v))) for key, (d, s, v) in draw_from.items()})
        index["weight_map"] = draw.choice([index["weight_map"], dict.fromkeys(held, "model.safetensors")])
    elif kind == "none":
        path.unlink(missing_ok=True)
        return "no index"
    if kind == "text":
        twice = '{"weight_map": {"a": "b", ' + json.dumps(places)[1:] + ', "weight_map": ' + json.dumps(places) + "}"
        path.write_bytes(
            draw.choice([b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 10**5, b'{"x":' * 10**5, twice.encode()])
        )
    else:
        path.write_text(json.dumps(index))
    return f"index: {kind} {name}"


def config_edit(folder: Path, draw: random.Random) -> str:
    path = folder / "config.json"
    config = load_json(path)
    if not config:
        return "no config"
    kind = draw.choice(["number", "number", "number", "any", "known", "known", "text", "remove", "other"])
    fields = [key for key, value in config.items() if isinstance(value, int | float)]
    if kind == "number" and fields:
        key = draw.choice(fields)
        old = config[key]
        config[key] = draw.choice([*HOSTILE, old + 1, old - 1, old * 2, old // 2, -old, str(old), float(old), [old]])
    elif kind == "any":
        key = draw.choice(sorted(config))
        config[key] = draw.choice(HOSTILE)
    elif kind == "remove":
        key = draw.choice(sorted(config))
        del config[key]
    elif kind == "known":
        key, value = draw.choice(
            [("tie_word_embeddings", not config.get("tie_word_embeddings")), ("architectures", ["GPT2LMHeadModel"])]
            + [
                ("dtype", name)
                for name in ("float64", "int8", "float99", "nn", "complex64", "float8_e4m3fn", "auto", 5)
            ]
            + [("torch_dtype", name) for name in ("float16", "junk", [], {})]
            + [("dtype", {"": "float16"}), ("dtype", {"model": "x"}), ("dtype", None)]
            + [("model_type", name) for name in ("gpt2", "mistral", "gemma2", "opt", "bert", "t5", "x", "", "llava")]
            + [("architectures", value) for value in (None, [], "x", [5], ["Nothing"])]
            + [("num_hidden_layers", value) for value in (0, 1, 3, 50, 10**5, 10**7, 10**12)]
            + [("transformers_weights", value) for value in ("other.safetensors", "../x.safetensors", "x.bin", 5)]
            + [("auto_map", {"AutoModelForCausalLM": "x.Y"}), ("text_config", {"num_hidden_layers": 10**9})]
            + [("rope_parameters", {"rope_type": "x"}), ("rope_scaling", {"type": "yarn", "factor": -1})]
            + [("hidden_act", "x"), ("layer_types", ["x"]), ("layer_types", []), ("sliding_window", -3)]
            + [("quantization_config", {"quant_method": name}) for name in ("gptq", "bitsandbytes", "fp8", "x", 5)]
            + [("id2label", {"0": "x"}), ("num_labels", 10**8), ("return_dict", False), ("use_cache", "x")]
            + [("attn_implementation", "x"), ("_attn_implementation", "flash_attention_2"), ("is_decoder", "x")]
        )
        config[key] = value
    else:
        key = kind
        raw = draw.choice(["", "{", "[]", "null", "5", '"x"', "[" * 10**5, '{"a":' * 10**5, "\0", "{}", None])
        path.unlink() if raw is None else path.write_text(raw)
        return f"config.json: {str(raw)[:20]}"
    path.write_text(json.dumps(config))
    return f"config: {key} = {str(config.get(key, 'removed'))[:80]}"


def quant_edit(folder: Path, draw: random.Random) -> str:
    path = folder / "config.json"
    config = load_json(path)
    if not config:
        return "no config"
    quant = config.get("quantization_config")
    if not isinstance(quant, dict) or not isinstance(quant.get("layers"), dict) or not quant["layers"]:
        config["quantization_config"] = draw.choice(
            [
                {
                    "quant_method": "wanda_packed",
                    "layers": {"model.layers.0.mlp.up_proj": {"format": "2:4"}},
                    "version": 1,
                }
            ]
            + [{"quant_method": "wanda_packed", "version": 1}, {"quant_method": "wanda_packed", "layers": {}}]
        )
        path.write_text(json.dumps(config))
        return "quantization_config added"
    layers = quant["layers"]
    name = draw.choice(sorted(layers))
    kind = draw.choice(
        ["removed", "left out", "swap", "kept", "kept", "kept", "version", "layers", "layer", "add", "method"]
    )
    if kind == "removed":
        del config["quantization_config"]
    elif kind == "left out":
        del layers[name]
    elif kind == "swap":
        layers[name] = draw.choice([{"format": "2:4"}, {"format": "bitmap", "kept": 100}, {"format": "bitmap"}])
    elif kind == "kept":
        kept = layers[name].get("kept", 5) if isinstance(layers[name], dict) else 5
        layers[name] = {"format": "bitmap", "kept": draw.choice([kept - 1, kept + 1, kept + 32, 2**31 - 1, *HOSTILE])}
    elif kind == "version":
        quant["version"] = draw.choice(HOSTILE)
    elif kind == "layers":
        quant["layers"] = draw.choice(HOSTILE)
    elif kind == "layer":
        layers[name] = draw.choice([*HOSTILE, {"format": 5}, {"format": []}, {"format": "2:4", "kept": -1}])
    elif kind == "add":
        to = draw.choice(
            ["lm_head", "model", "", "model.layers.9.mlp.up_proj", "model.norm", ".", "model.embed_tokens"]
        )
        layers[to] = draw.choice([{"format": "2:4"}, {"format": "bitmap", "kept": 5}])
    else:
        quant["quant_method"] = draw.choice(["x", None, 5, "fp8", "gptq", "bitsandbytes", "compressed-tensors", []])
    path.write_text(json.dumps(config))
    return f"quantization_config: {kind} {name} {str(layers.get(name))[:80]}"


def file_edit(folder: Path, draw: random.Random) -> str:
    names = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
        INDEX,
    ]
    path = folder / draw.choice(names)
    kind = draw.choice(["empty", "folder", "link", "dangling", "junk", "adapter", "more", "gone", "json"])
    if kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
        return "an adapter"
    if kind == "more":
        (folder / draw.choice(["pytorch_model.bin", "adapter_model.safetensors", "model.bin", "x.py"])).write_bytes(
            b"x"
        )
        return "another file"
    if kind == "link":  # the hub's cache: every file is one
        (folder.parent / "blobs").mkdir(exist_ok=True)
        for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
            if not file.is_symlink():
                to = folder.parent / "blobs" / str(number)
                file.rename(to)
                file.symlink_to(to)
        return "links"
    if path.is_file() or path.is_symlink():
        path.unlink()
    if kind == "folder":
        path.mkdir(exist_ok=True)
    elif kind == "dangling":
        path.symlink_to(folder.parent / "nothing")
    elif kind in ("empty", "junk", "json") and not path.is_dir():
        junk = [b"junk", b"\xff\xfe\x00", b"{" * 1000, b"\0" * 4096]
        json_junk = [
            b"{}",
            b"[]",
            b"null",
            b'{"eos_token_id": "x"}',
            b'{"max_length": -1, "do_sample": 5}',
            b'{"model": 5}',
        ]
        path.write_bytes({"empty": b"", "junk": draw.choice(junk), "json": draw.choice(json_junk)}[kind])
    return f"{kind} {path.name}"


Mutator = Callable[[Path, random.Random], str]
MUTATORS: tuple[Mutator, ...] = (
    tensor_edit, tensor_edit, value_edit, value_edit, header_edit, header_edit, byte_edit, index_edit, config_edit,
    config_edit, quant_edit, packed_edit, packed_edit, file_edit,
)  # fmt: skip


def mutate(folder: Path, draw: random.Random) -> str:
    """One to three mutations; now and then none, which must load."""
    times = draw.choice((0, 1, 1, 1, 1, 1, 1, 2, 2, 3)) if draw.random() < 0.5 else 1
    return "; ".join(draw.choice(MUTATORS)(folder, draw) for _ in range(times)) or "none"
