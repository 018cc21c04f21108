"""What tests/mutations.py does to the safetensors files of a folder. Each mutator changes it and says what it did."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
STRANGE_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "U16", "U32", "U64", "F31", "", None, 5, "f32")
HOSTILE: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 8, 63, 10**4, 10**6, 10**9, 2**31, 2**32 + 1, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "8", "", "x", True, False, None, [], {}, [1], {"a": 1},
)  # fmt: skip
Tensors = dict[str, tuple[Any, Any, bytes]]


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a sound file; of a damaged one, an empty header."""
    data = path.read_bytes()
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        return (header, data[8 + length :]) if isinstance(header, dict) else ({}, b"")
    except (ValueError, struct.error, RecursionError):
        return {}, b""


def write(path: Path, header: str | bytes | dict[str, Any], data: bytes) -> None:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def tensors(path: Path) -> Tensors:
    header, data = read(path)
    found: Tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            try:
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], data[begin:end])
            except (KeyError, TypeError, ValueError):
                continue
    return found


def put(path: Path, held: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, data) in held.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    write(path, header, b"".join(data for _, _, data in held.values()))


def load_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def agree(folder: Path) -> None:
    """The index says what the shards hold."""
    index = load_json(folder / INDEX)
    if index:
        index["weight_map"] = {name: path.name for path in shards(folder) for name in tensors(path)}
        (folder / INDEX).write_text(json.dumps(index))


def pick(folder: Path, draw: random.Random, kind: str = "") -> tuple[Path, Tensors, str] | None:
    """A shard, its tensors and one of them whose name ends in ``kind``."""
    found = [(path, name) for path in shards(folder) for name in tensors(path) if name.endswith(kind)]
    if not found:
        return None
    path, name = draw.choice(found)
    return path, tensors(path), name


# --- tensors: added, removed, renamed


def tensor_edit(folder: Path, draw: random.Random) -> str:
    chosen = pick(folder, draw)
    if chosen is None:
        return "no tensors"
    path, held, name = chosen
    other = draw.choice(sorted(held))
    kind = draw.choice(
        [
            "remove",
            "rename",
            "prefix one",
            "prefix all",
            "swap",
            "duplicate",
            "add",
            "no prefix",
            "twice",
            "old",
            "file",
        ]
    )
    if kind == "remove":
        del held[name]
    elif kind == "rename":
        to = draw.choice([name.replace(".0.", ".1."), name + "x", name[:-1], name.upper(), "", "weight", "__metadata"])
        held[to] = held.pop(name)
    elif kind.startswith("prefix"):
        prefix = draw.choice(["module.", "_orig_mod.", "base_model.model.", "model.", "transformer."])
        for file in shards(folder) if kind == "prefix all" else []:
            put(file, {prefix + key: value for key, value in tensors(file).items()})
        held = {prefix + key if kind == "prefix all" or key == name else key: v for key, v in held.items()}
    elif kind == "swap":
        held[name], held[other] = held[other], held[name]
    elif kind == "duplicate":
        to = draw.choice(shards(folder))
        there = tensors(to)
        dtype, shape, data = held[name]
        put(to, {**there, name: (dtype, shape, data[::-1])})
        held = tensors(path)
    elif kind == "add":
        to = draw.choice(["model.layers.7.mlp.up_proj.weight", "lm_head.bias", "extra", "model.norm.bias", name + "_g"])
        held[to] = held[name]
    elif kind == "old":
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", [8], bytes(32))
    elif kind == "no prefix":
        for file in shards(folder):
            put(file, {key.removeprefix("model."): value for key, value in tensors(file).items()})
        held = tensors(path)
    elif kind == "twice":
        dtype, shape, data = held[name]
        held[name.removeprefix("model.")] = (dtype, shape, bytes(len(data)))
        held["lm_head.weight"] = held.get("lm_head.weight", held[name])
    else:  # a stray file
        put(folder / draw.choice(["model-00009-of-00009.safetensors", "consolidated.safetensors"]), held)
        return "a stray file"
    put(path, held)
    if draw.random() < 0.7:
        agree(folder)
    return f"{kind} {name} in {path.name}"


def value_edit(folder: Path, draw: random.Random) -> str:
    """Other dtypes, shapes and values; the file stays a sound one."""
    chosen = pick(folder, draw)
    if chosen is None:
        return "no tensors"
    path, held, name = chosen
    dtype, shape, data = held[name]
    width = WIDTHS.get(dtype, 1)
    kind = draw.choice(["dtype", "cast", "transpose", "flatten", "empty", "longer", "shorter", "bits", "nan"])
    if kind == "dtype":
        dtype = draw.choice([name for name, size in WIDTHS.items() if size == width])
    elif kind == "cast":
        dtype, data = draw.choice([("F64", data * (8 // width)), ("I64", data * (8 // width)), ("U8", data[::width])])
    elif kind == "transpose":
        shape = shape[::-1]
    elif kind == "flatten":
        shape = [len(data) // width, *draw.choice([[], [1]])]
    elif kind == "empty":
        shape, data = draw.choice([([0], b""), ([0, *shape[1:]], b""), ([], data[:width])])
    elif kind == "longer" and shape:
        shape, data = [shape[0] + 1, *shape[1:]], data + data[: len(data) // max(shape[0], 1)]
    elif kind == "shorter" and shape and shape[0]:
        shape, data = [shape[0] - 1, *shape[1:]], data[: len(data) - len(data) // shape[0]]
    elif kind == "bits":
        data = flipped(data, draw, draw.choice([1, 3, 100]))
    else:
        junk = draw.choice([b"\xff" * 8, b"\x00\x00\x80\x7f" * 2, b"\x80\x7f\x80\x7f" * 2, bytes(8)])
        place = draw.randrange(0, max(len(data) // 8, 1)) * 8
        data = data[:place] + junk + data[place + 8 :] if len(data) >= 8 else data
    held[name] = (dtype, shape, data)
    put(path, held)
    return f"{kind} {name}: {dtype} {shape}"


def flipped(data: bytes, draw: random.Random, times: int) -> bytes:
    changed = bytearray(data)
    for _ in range(times if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


# --- headers and bytes


def header_edit(folder: Path, draw: random.Random) -> str:
    chosen = pick(folder, draw)
    if chosen is None:
        return "no tensors"
    path, _, name = chosen
    header, data = read(path)
    entry = header[name]
    kind = draw.choice(["dtype", "shape", "offsets", "entry", "metadata", "twice", "text", "length", "spaces", "order"])
    text: str | bytes | None = None
    if kind == "dtype":
        entry["dtype"] = draw.choice([*WIDTHS, *STRANGE_DTYPES])
    elif kind == "shape":
        shape = list(entry["shape"])
        if shape and draw.random() < 0.6:
            shape[draw.randrange(len(shape))] = draw.choice(HOSTILE)
            entry["shape"] = shape
        else:
            entry["shape"] = draw.choice([None, 5, "64", [2**32, 2**32], [2**62, 4], shape[::-1], [[64]], [-1]])
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [[begin + 4, end + 4], [begin, end + 8], [end, begin], [0, end - begin], [begin, 2**40], [-8, end], [begin]]
            + [None, [begin, end, end], ["0", "8"], [begin, begin], [2**64, 2**64 + 8], [begin + 0.5, end]]
        )
    elif kind == "entry":
        header[name] = draw.choice([None, [], 5, "x", {}, {**entry, "more": 1}, {"dtype": "F32"}])
    elif kind == "metadata":
        header["__metadata__"] = draw.choice([None, [], "pt", {}, {"format": "tf"}, {"format": 5}, {"x": "y" * 10**5}])
    elif kind == "twice":
        body = json.dumps(header)[1:]
        text = "{" + json.dumps(name) + ": " + json.dumps(entry | {"shape": entry["shape"][::-1]}) + ", " + body
    elif kind == "text":
        text = draw.choice(["", "{", "[]", "null", "5", '"x"', "[" * 10**5, '{"a":' * 10**4, b"\xff\xfe", "{}"])
    elif kind == "length":
        raw = path.read_bytes()
        length = draw.choice(
            [0, 1, 2**63, 2**64 - 1, 2**27, 10**8 + 1, len(raw), len(raw) - 8, len(json.dumps(header)) - 1]
        )
        path.write_bytes(struct.pack("<Q", length) + raw[8:])
        return f"header length {length} in {path.name}"
    elif kind == "spaces":
        text = json.dumps(header, indent=draw.choice([1, 8])) + " " * draw.choice([0, 7, 10**6])
    else:
        header = dict(sorted(header.items(), key=lambda _: draw.random()))
    write(path, header if text is None else text, data)
    return f"header: {kind} {name}: {str(header.get(name))[:120]}"


def byte_edit(folder: Path, draw: random.Random) -> str:
    found = shards(folder)
    if not found:
        return "no shards"
    path = draw.choice(found)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
    head = 8 + min(length, len(data))
    kind = draw.choice(["header", "header", "anywhere", "length", "cut", "cut header", "more", "empty", "zeros"])
    if kind in ("header", "length"):
        size = head if kind == "header" else 8
        data = flipped(data[:size], draw, draw.choice([1, 1, 2, 20])) + data[size:]
    elif kind == "anywhere":
        data = flipped(data, draw, draw.choice([1, 10, 1000]))
    elif kind.startswith("cut"):
        data = data[: draw.randrange(len(data) if kind == "cut" else min(head, len(data)) or 1) if data else 0]
    elif kind == "more":
        data += bytes(draw.choice([1, 8, 10**5]))
    else:
        data = b"" if kind == "empty" else bytes(len(data))
    path.write_bytes(data)
    return f"bytes: {kind} of {path.name}"


# --- packed tensors


def packed_edit(folder: Path, draw: random.Random) -> str:
    kind = draw.choice(["starts", "starts", "bitmap", "indices", "padding", "values", "bias", "wide", "stray", "pair"])
    suffixes = {"starts": "weight_starts", "wide": "weight_starts", "indices": "weight_indices", "bias": ".bias"}
    suffix = suffixes.get(kind, "weight_bitmap")
    chosen = pick(folder, draw, suffix) or pick(folder, draw, "weight_indices")
    if chosen is None:
        return "nothing packed"
    path, held, name = chosen
    dtype, shape, data = held[name]
    if kind == "starts" and dtype == "I32":
        starts = list(struct.unpack(f"<{len(data) // 4}i", data))
        place = draw.randrange(len(starts))
        starts[place] = draw.choice([-1, 0, 2**31 - 1, -(2**31), starts[place] + 1, starts[place] - 1, 2**24])
        data = struct.pack(f"<{len(starts)}i", *(starts[::-1] if draw.random() < 0.2 else starts))
    elif kind == "wide" and dtype == "I32":
        starts = list(struct.unpack(f"<{len(data) // 4}i", data))
        dtype, form = draw.choice([("I64", "q"), ("F32", "f"), ("I16", "h"), ("F64", "d")])
        data = struct.pack(f"<{len(starts)}{form}", *starts)
    elif kind in ("bitmap", "indices"):
        data = draw.choice(
            [flipped(data, draw, draw.choice([1, 2, 50])), data[::-1], b"\xff" * len(data), bytes(len(data))]
        )
    elif kind in ("padding", "values"):
        name = name.rpartition("_")[0]
        if name not in held:
            return "values elsewhere"
        dtype, shape, data = held[name]
        size = 32 * WIDTHS.get(dtype, 2)
        data = data[:-size] + b"\xff" * size if kind == "padding" else b"\xff\x7f\x80\x7f" * (len(data) // 4)
    elif kind == "bias":
        del held[name]
    elif kind == "stray":
        held[draw.choice(["model.norm.weight_starts", "lm_head.weight_bitmap", "model.layers.5.x.weight_indices"])] = (
            held[name]
        )
    elif kind == "pair":  # the codes of another layer
        data = held[draw.choice([key for key, value in held.items() if len(value[2]) == len(data)])][2]
    if name in held:
        held[name] = (dtype, shape, data)
    put(path, held)
    agree(folder)
    return f"packed: {kind} {name} {dtype}"
