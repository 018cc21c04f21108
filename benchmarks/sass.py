"""What the compiler made of each CUDA kernel, without a GPU: registers, spills, 128-bit accesses, instructions.

    python -m benchmarks.sass            writes benchmarks/results/sass.csv (make sass)
    python -m benchmarks.sass --check    says where that file differs from what the compiler makes now

Needs nvcc (CUDA_HOME or PATH) and nvdisasm (the toolkit's, or the one in Triton's wheel).

Columns: `registers`, `shared_bytes` (static), `spill_bytes` (stores + loads); `global_128`/`global_all`: the global
memory instructions that move 16 bytes a lane (LDG, STG, LDGSTS) among all of them on the common path, but for FEW;
`common`/`rare` split the SASS instructions by source line, see RARE; `elements` a thread handles in one pass of
the kernel's code, and `per_element` = common / elements. Unrolled code counts as often as it stands there, a loop
that was not unrolled once.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = ROOT / "csrc" / "cuda"
RESULT = ROOT / "benchmarks" / "results" / "sass.csv"
ARCHITECTURES = (80, 90)
COLUMNS = (
    "kernel", "arch", "nvcc", "registers", "shared_bytes", "spill_bytes", "global_128", "global_all", "common", "rare",
    "elements", "per_element",
)  # fmt: skip

# Functions whose instructions run for few rows or few elements only (norms with a sign bit, brackets that miss,
# lists of more than 32, buckets of zeros), or once for all rows of a block.
RARE = {
    "score.cuh": ("ordered_key",),
    "group.cuh": ("keep_flags_any",),
    "block.cuh": ("radix_select",),
    "rows_any.cuh": ("select_segment",),
    "bracket.cuh": ("move",),
    "rows.cuh": ("drop_padding", "has_ordinary_norms", "clear_padding"),
}
# Functions that access memory for few elements of a row, or once a row.
FEW = {"rows.cuh": ("key_at",), "rows_any.cuh": ("write_sums", "select_segment")}
GENERAL_PATHS = ("rows_any_kernel", "nm_any_kernel")  # slow by design: nothing in them is rare


def _toolkit(name: str) -> str | None:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / name).exists():
            return str(Path(home) / "bin" / name)
    return shutil.which(name)


def nvcc() -> str | None:
    return _toolkit("nvcc")


def nvdisasm() -> str | None:
    triton = importlib.util.find_spec("triton")
    if _toolkit("nvdisasm") is None and triton is not None and triton.origin is not None:
        wheel = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        return str(wheel) if wheel.exists() else None
    return _toolkit("nvdisasm")


@functools.cache
def nvcc_version() -> str:
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r", V([\d.]+)", text)[1]  # type: ignore[index]


def _lines_of(functions: dict[str, tuple[str, ...]]) -> dict[str, set[int]]:
    """File name -> lines of its functions named, from a definition to the brace that closes it."""
    found: dict[str, set[int]] = {}
    for file, names in functions.items():
        lines = (CUDA_SOURCES / file).read_text().splitlines()
        for name in names:
            start = next(i for i, line in enumerate(lines) if re.search(rf"(WANDA_DEVICE|__device__).* {name}\(", line))
            indent = re.match(" *", lines[start])[0]  # type: ignore[index]
            end = next(i for i in range(start + 1, len(lines)) if lines[i] == indent + "}")
            found.setdefault(file, set()).update(range(start + 1, end + 2))
    return found


def _elements(kernel: str) -> int | None:
    """Elements that a thread handles in one pass of the code."""
    if match := re.match(r"rows_kernel<\w+, (\d+),", kernel):
        return 4 * int(match[1])
    if match := re.match(r"nm_kernel<(\w+), (\d+),", kernel):
        rows = 4 if int(match[2]) <= 8 else 1
        return rows * max(int(match[2]), 4 if match[1] == "float32" else 8)
    return 128 if "pack_24" in kernel else None


def _short(mangled: str) -> str:
    """rows_kernel<bfloat16, 16, prune, staged> from the mangled name."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void ", "", name).rsplit("(", 1)[0].replace("wanda::cuda::", "").replace("wanda::", "")
    for number, dtype in enumerate(("float32", "bfloat16", "float16")):
        name = name.replace(f"(Dtype){number}", dtype)
    for number, output in enumerate(("prune", "prune+sums", "mask")):
        name = re.sub(rf"\((Rows|Nm)Output\){number}\b", output, name)
    true, false = ("staged", "direct") if name.startswith("rows_kernel") else ("select", "pack only")
    return name.replace("true", true).replace("false", false)


def _compile(source: Path, arch: int, target: Path) -> str:
    flags = ["-std=c++17", "-O3", "-lineinfo", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
    command = [str(nvcc()), *flags, str(source), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Mangled kernel -> registers, static shared bytes, spill bytes, from ptxas -v."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part.split("Used")[0]))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers
        found[part.split("'")[0]] = (int(registers[1]), int(shared[1]) if shared else 0, spills)
    return found


def _instructions(cubin: Path) -> dict[str, list[tuple[str, bool, bool]]]:
    """Mangled function -> its SASS instructions, each with whether it is of a RARE and of a FEW function."""
    text = subprocess.run([str(nvdisasm()), "-gi", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[tuple[str, bool, bool]]] = {}
    rare, few = _lines_of(RARE), _lines_of(FEW)
    current: list[tuple[str, bool, bool]] | None = None
    where: set[tuple[str, int]] = set()
    is_fresh = True
    for line in text.splitlines():
        if match := re.match(r"^\.text\.(\S+):$", line):
            current = functions.setdefault(match[1], [])
        elif "//## File" in line:
            if is_fresh:  # a new location; the lines after it say where that was inlined
                where, is_fresh = set(), False
            where |= {(Path(file).name, int(number)) for file, number in re.findall(r'"([^"]+)", line (\d+)', line)}
        elif current is not None and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)):
            is_in = [any(number in lines.get(file, ()) for file, number in where) for lines in (rare, few)]
            current.append((match[1], is_in[0], is_in[1]))
            is_fresh = True
    return functions


def measure() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        for arch in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as directory:
                cubin = Path(directory) / "kernels.cubin"
                resources = _resources(_compile(source, arch, cubin))
                functions = _instructions(cubin)
            for mangled, (registers, shared, spills) in resources.items():
                name = _short(mangled)
                code = [(re.sub(r"^@!?\w+ ", "", text), rare, few) for text, rare, few in functions[mangled]]
                code = [line for line in code if not re.match(r"NOP|BRA `\(\.L_x_\d+\)$", line[0])]
                common = [(text, few) for text, rare, few in code if not rare or name.startswith(GENERAL_PATHS)]
                bulk = [text for text, few in common if re.match(r"LDG|STG", text) and not few]
                elements = _elements(name)
                rows.append({
                    "kernel": name, "arch": arch, "nvcc": nvcc_version(),
                    "registers": registers, "shared_bytes": shared, "spill_bytes": spills,
                    "global_128": sum(".128" in text for text in bulk), "global_all": len(bulk),
                    "common": len(common), "rare": len(code) - len(common), "elements": elements or "",
                    "per_element": round(len(common) / elements, 1) if elements else "",
                })  # fmt: skip
    return sorted(rows, key=lambda row: (str(row["kernel"]), row["arch"]))


def table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    if nvcc() is None or nvdisasm() is None:
        print("needs nvcc and nvdisasm", file=sys.stderr)
        return 2
    text = table(measure())
    if arguments.check:
        old, new = RESULT.read_text().splitlines(), text.splitlines()
        for line in sorted(set(old) ^ set(new)):
            print(("- " if line in old else "+ ") + line)
        return int(old != new)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
