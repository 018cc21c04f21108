"""What the compilers made of each GPU kernel, without a GPU: registers, local memory, 128-bit accesses, instructions.

    python -m benchmarks.sass            writes benchmarks/results/sass.csv (make sass)
    python -m benchmarks.sass --check    says where that file differs from what the compiler makes now

Needs nvcc (CUDA_HOME or PATH), nvdisasm (the toolkit's, or the one in Triton's wheel) and Triton, whose kernels
benchmarks/triton_ptx.py compiles.

Columns: `compiler` and its version; `registers`, `shared_bytes` (static), `local_bytes` (spills, and arrays that are
not in registers); `global_128`/`global_all`: the global memory instructions that move 16 bytes a lane (LDG, STG,
LDGSTS) among all of them on the common path, but for FEW; `common`/`rare` split the SASS instructions by source line,
see RARE; `elements` a thread handles in one pass of the kernel's code, and `per_element` = common / elements; `loop`:
of the common ones, those of the longest innermost loop with global memory in it; `float64`: of those, what the float64
units do; `made_of`: a digest of what the kernel was compiled from, and of this program. Unrolled code counts as often
as it stands there, a loop that was not unrolled once. Triton's kernels are loops: no `rare`, no `per_element`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = ROOT / "csrc" / "cuda"
TRITON = "Triton"  # beside the .cu files: all of Triton's kernels
RESULT = ROOT / "benchmarks" / "results" / "sass.csv"
ARCHITECTURES = (80, 90)
COLUMNS = (
    "kernel", "arch", "compiler", "registers", "shared_bytes", "local_bytes", "global_128", "global_all", "common",
    "rare", "elements", "per_element", "loop", "float64", "made_of",
)  # fmt: skip

# Functions whose instructions run for few rows or few elements only (norms with a sign bit, brackets that miss,
# lists of more than 32, buckets of zeros), or once for all rows of a block.
RARE = {
    "score.cuh": ("ordered_key",),
    "group.cuh": ("keep_flags_any",),
    "block.cuh": ("radix_select",),
    "rows_any.cuh": ("select_segment",),
    "bracket.cuh": ("move",),
    "rows.cuh": ("drop_padding",),
    "rows_part.cuh": ("has_ordinary_norms", "fill"),
}
# Functions that access memory for few elements of a row, or once a row.
FEW = {
    "rows.cuh": ("key_at",),
    "rows_any.cuh": ("write_sums", "select_segment"),
    "nm_any.cuh": ("load_ends", "store_ends"),
}
GENERAL_PATHS = ("rows_any_kernel",)  # slow by design: nothing in them is rare


@dataclass
class Instruction:
    """``rare``, ``few``: of a function of RARE, of FEW."""

    text: str
    rare: bool
    few: bool

    @property
    def is_float64(self) -> bool:
        return re.match(r"(@!?U?P\d+ )?(DFMA|DMUL|DADD|DSETP|F2F\.F\d+\.F\d+)\b", self.text) is not None

    @property
    def is_bulk(self) -> bool:
        """Whether it accesses global memory for many elements."""
        return not self.few and re.match(r"(@!?U?P\d+ )?(LDG|LDGSTS|STG)\.", self.text) is not None


@dataclass
class Code:
    """A function's instructions, and before which of them its labels stand."""

    lines: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loop(self) -> list[Instruction]:
        """The common instructions of the longest innermost loop with bulk accesses, if there is one."""
        spans = []
        for end, line in enumerate(self.lines):
            if (match := re.search(r"\bBRA\b.* `\((\.L_\w+)\)", line.text)) and self.labels[match[1]] <= end:
                spans.append((self.labels[match[1]], end))
        found: list[Instruction] = []
        for first, last in spans:
            inside = [line for line in self.lines[first : last + 1] if not line.rare]
            is_innermost = not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
            if is_innermost and len(inside) > len(found) and any(line.is_bulk for line in inside):
                found = inside
        return found


def _toolkit(name: str) -> str | None:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / name).exists():
            return str(Path(home) / "bin" / name)
    return shutil.which(name)


def nvcc() -> str | None:
    return _toolkit("nvcc")


def _in_triton(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    wheel = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(wheel) if wheel.exists() else None


def nvdisasm() -> str | None:
    return _toolkit("nvdisasm") or _in_triton("nvdisasm")


def missing() -> str | None:
    """What this machine lacks to make the table."""
    found = {"nvcc": nvcc(), "nvdisasm": nvdisasm(), "Triton": _in_triton("ptxas")}
    return next((name for name, path in found.items() if path is None), None)


@functools.cache
def nvcc_version() -> str:
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r", V([\d.]+)", text)[1]  # type: ignore[index]


def triton_version() -> str:
    return f"triton {importlib.metadata.version('triton')}"


def sources() -> dict[str, str]:
    """What is compiled -> a digest of its code. While that is the same, compiling it anew finds the same rows."""
    own = Path(__file__).read_text()
    triton = [*sorted((ROOT / "wanda_kernels" / "triton").glob("*.py")), Path(__file__).with_name("triton_ptx.py")]
    texts = {source.name: _code(source, set()) for source in sorted(CUDA_SOURCES.glob("*.cu"))}
    texts[TRITON] = "".join(path.read_text() for path in triton)
    return {name: hashlib.sha256((own + text).encode()).hexdigest()[:12] for name, text in texts.items()}


def _code(path: Path, seen: set[Path]) -> str:
    """A file and what it includes of this repository, without comments and spaces."""
    seen.add(path)
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
    found = ((path.parent / name).resolve() for name in re.findall(r'#include "(.+)"', text))
    included = "".join(_code(file, seen) for file in found if file.exists() and file not in seen)
    return re.sub(r"\s+", " ", text) + included


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
        m, is_mask = int(match[2]), kernel.endswith("mask>")
        rows = 1 if m > 8 else 2 if is_mask else 4
        return rows * max(m, 16 if is_mask else 4 if match[1] == "float32" else 8)
    if match := re.match(r"nm_any_kernel<\w+, (\d+)>", kernel):
        return int(match[1])
    return 128 if "pack_24" in kernel else None


def _short(mangled: str) -> str:
    """rows_kernel<bfloat16, 16, prune, staged> from the mangled name."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void ", "", name).rsplit("(", 1)[0].replace("wanda::cuda::", "").replace("wanda::", "")
    for number, dtype in enumerate(("float32", "bfloat16", "float16")):
        name = name.replace(f"(Dtype){number}", dtype)
    for number, form in enumerate(("bitmap", "2:4", "dense")):
        name = name.replace(f"(QuantizedForm){number}", form)
    for number, output in enumerate(("prune", "prune+sums", "mask")):
        name = re.sub(rf"\(Output\){number}\b", output, name)
    if name.startswith("sparse24_linear"):
        return re.sub(r", (\d+), (\d+)>", lambda m: f", {16 * int(m[1])} rows, {m[2]} tokens>", name)
    if name.startswith("bitmap_linear"):
        return re.sub(r", (\d+), (\d+)>", r", \1 rows, \2 tokens>", name)
    if "quantized" in name:
        name = name.replace(", true, ", ", groups, ").replace(", false, ", ", rows, ")
        return re.sub(r"<(\d), (.*\D)(\d)>", r"<int\1, \2\3 tokens>", re.sub(r"<(\d), ([^,]*)>", r"<int\1, \2>", name))
    if name.startswith("refine_kernel"):
        name = name.replace(", true, ", ", staged, ").replace(", false, ", ", wide, ")
        return name.replace(", true>", ", groups>").replace(", false>", ", rows>")
    true, false = ("staged", "direct") if name.startswith("rows_kernel") else ("select", "pack only")
    return name.replace("true", true).replace("false", false)


def _compile(source: Path, arch: int, target: Path) -> str:
    flags = ["-std=c++17", "-O3", "-lineinfo", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
    command = [str(nvcc()), *flags, str(source), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Mangled kernel -> registers, static shared bytes, bytes of local memory, from ptxas -v."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack = re.search(r"(\d+) bytes stack frame", part)
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers
        found[part.split("'")[0]] = (int(registers[1]), int(shared[1]) if shared else 0, int(stack[1]) if stack else 0)
    return found


def _instructions(cubin: Path) -> dict[str, Code]:
    """Mangled function -> its SASS."""
    text = subprocess.run([str(nvdisasm()), "-gi", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions: dict[str, Code] = {}
    rare, few = _lines_of(RARE), _lines_of(FEW)
    current: Code | None = None
    where: set[tuple[str, int]] = set()
    is_fresh = True
    for line in text.splitlines():
        if match := re.match(r"^\.text\.(\S+):$", line):
            current = functions.setdefault(match[1], Code())
        elif "//## File" in line:
            if is_fresh:  # a new location; the lines after it say where that was inlined
                where, is_fresh = set(), False
            where |= {(Path(file).name, int(number)) for file, number in re.findall(r'"([^"]+)", line (\d+)', line)}
        elif current is not None and (match := re.match(r"^(\.L_\w+):", line)):
            current.labels[match[1]] = len(current.lines)
        elif current is not None and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)):
            is_in = [any(number in lines.get(file, ()) for file, number in where) for lines in (rare, few)]
            current.lines.append(Instruction(match[1], *is_in))
            is_fresh = True
    return functions


def _row(name: str, arch: int, compiler: str, made_of: str, resources: tuple[int, int, int], code: Code) -> dict:
    """One line of the table."""
    lines = [line for line in code.lines if not re.match(r"(@!?U?P\d+ )?(NOP|BRA `\(\.L_x_\d+\)$)", line.text)]
    common = [line for line in lines if not line.rare or name.startswith(GENERAL_PATHS)]
    bulk = [line.text for line in common if line.is_bulk]
    elements, loop = _elements(name), code.loop()
    return {
        "kernel": name, "arch": arch, "compiler": compiler,
        "registers": resources[0], "shared_bytes": resources[1], "local_bytes": resources[2],
        "global_128": sum(".128" in text for text in bulk), "global_all": len(bulk),
        "common": len(common), "rare": len(lines) - len(common), "elements": elements or "",
        "per_element": round(len(common) / elements, 1) if elements else "", "loop": len(loop) or "",
        "float64": sum(line.is_float64 for line in loop) or "", "made_of": made_of,
    }  # fmt: skip


def _measure_cuda(source: Path, made_of: str, arch: int, directory: Path) -> list[dict]:
    cubin = directory / "kernels.cubin"
    resources = _resources(_compile(source, arch, cubin))
    functions = _instructions(cubin)
    return [
        _row(_short(name), arch, nvcc_version(), made_of, found, functions[name]) for name, found in resources.items()
    ]


def _measure_triton(made_of: str, arch: int, directory: Path) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.triton_ptx", str(directory), str(arch)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    rows = []
    for ptx in sorted(directory.glob("*.ptx")):
        cubin = directory / "kernel.cubin"
        target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
        assert target
        command = [str(_in_triton("ptxas")), "-v", f"-arch={target[1]}", str(ptx), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        ((name, resources),) = _resources(log).items()
        rows.append(_row(ptx.stem, arch, triton_version(), made_of, resources, _instructions(cubin)[name]))
    return rows


def measure(architectures: Sequence[int] = ARCHITECTURES, names: Collection[str] | None = None) -> list[dict]:
    """The rows of ``names`` of :func:`sources` (None: of all); two at a time, as one takes up to a minute of a core."""

    def measured(job: tuple[int, str]) -> list[dict]:
        arch, name = job
        with tempfile.TemporaryDirectory() as directory:
            if name == TRITON:
                return _measure_triton(made_of[name], arch, Path(directory))
            return _measure_cuda(CUDA_SOURCES / name, made_of[name], arch, Path(directory))

    made_of = sources()
    with ThreadPoolExecutor(2) as pool:
        jobs = itertools.product(architectures, made_of if names is None else names)
        rows = list(itertools.chain.from_iterable(pool.map(measured, jobs)))
    return sorted(rows, key=lambda row: (str(row["kernel"]), row["arch"]))


def table(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    if missing():
        print(f"{missing()} is not installed here", file=sys.stderr)
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
