"""Compiles the Triton kernels for a GPU that need not be here: one PTX file each, for benchmarks/sass.py.

    python -m benchmarks.triton_ptx DIRECTORY ARCHITECTURE

A process of its own: the kernels of one that runs Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = ("rms_norm_sqnorm", "act_mul_sqnorm", "sqnorm", "partials", "norm_of_sequences", "sparsegpt_block", "packing")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def variants(arch: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, pointers' types, constants, warps) of what runs for LLaMA's shapes: aligned, without a mask."""
    modules = {name: importlib.import_module(f"wanda_kernels.triton.{name}") for name in MODULES}
    rms, act, alone, partials, norms, sparsegpt, packing = (modules[name] for name in MODULES)
    run = {"MASKED": False, "OVERLAP": arch >= 90}
    for dtype, name in DTYPES.items():
        for cols in (4096, 8192, 16384):
            shape = rms.block_shape(cols, int(dtype[-2:]) // 8)
            warps = shape.pop("num_warps")
            constants = {"UNIT_OFFSET": False, **run, "CHUNK": rms.CHUNK, **shape}
            pointers = {"x": f"*{dtype}", "weight": f"*{dtype}", "y": f"*{dtype}"}
            yield f"rms_norm_sqnorm_kernel<{name}, {cols}>", rms.rms_norm_sqnorm_kernel, pointers, constants, warps
        constants = {"UNIT_OFFSET": False, **run, "CHUNK": rms.CHUNK, "BLOCK": rms.WIDE_BLOCK}
        yield f"rms_norm_sqnorm_wide_kernel<{name}>", rms.rms_norm_sqnorm_wide_kernel, pointers, constants, 16
        for activation in ("silu", "gelu_tanh"):
            pointers = {"gate": f"*{dtype}", "up": f"*{dtype}", "y": f"*{dtype}"}
            constants = {**run, "CHUNK": act.CHUNK, "ROWS": act.ROWS, "BLOCK": act.BLOCK}
            constants["ACTIVATION"] = activation
            yield f"act_mul_sqnorm_kernel<{name}, {activation}>", act.act_mul_sqnorm_kernel, pointers, constants, 4
        constants = {**run, "CHUNK": alone.CHUNK, "ROWS": alone.ROWS, "BLOCK": alone.BLOCK}
        yield f"sqnorm_kernel<{name}>", alone.sqnorm_kernel, {"x": f"*{dtype}"}, constants, 4
        constants = {"CHUNK": alone.CHUNK, "ROWS": alone.ROWS, "BLOCK": alone.BLOCK}
        pointers = {"x": f"*{dtype}", "segment_of": "*i32", "ends": "*i32"}
        yield f"segment_sqnorm_kernel<{name}>", alone.segment_sqnorm_kernel, pointers, constants, 4
    constants = {"SHARED": False, "OVERLAP": arch >= 90, "ROWS": partials.TOTAL_ROWS, "BLOCK": partials.TOTAL_BLOCK}
    yield "total_kernel", partials.total_kernel, {}, constants, 4
    constants = {"CHUNK": alone.CHUNK, "ROWS": partials.TOTAL_ROWS, "BLOCK": partials.TOTAL_BLOCK}
    yield "segment_total_kernel", alone.segment_total_kernel, {"ends": "*i32"}, constants, 4
    constants = {"AHEAD": norms.AHEAD, "BLOCK": norms.BLOCK}
    yield "mean_kernel", norms.mean_kernel, {"mean": "*fp32"}, constants, 1
    pointers = {"work": "*fp32", "upper": "*fp32", "scale": "*fp32", "errors": "*fp32"}
    for name, pruned, n, m in (("decided", "*u8", 0, 0), ("2:4", "*fp32", 2, 4)):
        constants = {"N": n, "M": m, "SQUARED": True, "ROWS": sparsegpt.ROWS, "BLOCK": 128}
        types = {"pruned": pruned, **pointers}
        yield f"sparsegpt_block_kernel<{name}>", sparsegpt.sparsegpt_block_kernel, types, constants, 1

    for bits in ("i16", "i32"):
        pointers = {"weight": f"*{bits}", "values": f"*{bits}", "indices": "*u8", "overfull": "*i32"}
        yield f"pack_sparse24_kernel<{bits}>", packing.pack_sparse24_kernel, pointers, {"PAIRS": packing.PAIRS}, 4
        pointers = {"weight": f"*{bits}", "values": f"*{bits}", "bitmap": "*u8", "starts": "*i32"}
        yield f"pack_bitmap_kernel<{bits}>", packing.pack_bitmap_kernel, pointers, {"BLOCK": packing.BLOCK}, 4


def compile_ptx(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, arch: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"partial": "*fp32", "sqnorm": "*fp32", "token_mask": "*fp32", "eps": "fp32", **pointers}
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # What a launch finds of aligned tensors: pointers, columns and strides that 16 divides.
    aligned = [n for n in names if signature[n].startswith("*") or n == "cols" or n.endswith("stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}).asm["ptx"]


def main() -> None:
    directory, arch = Path(sys.argv[1]), int(sys.argv[2])
    for name, kernel, pointers, constants, warps in variants(arch):
        (directory / f"{name}.ptx").write_text(compile_ptx(kernel, pointers, constants, warps, arch))


if __name__ == "__main__":
    main()
