"""The folder of a run of gpu_suite.py: at any moment at most seven plain files, each of them whole, whatever ends it.

log.txt is written by the stages themselves; every other file is replaced as a whole, every few seconds.
"""

from __future__ import annotations

import json
import re
from collections import deque
from pathlib import Path

from benchmarks.records import COLUMNS

FILE_BYTES = 16 << 20
LOG_BYTES = 800_000  # of a stage: twenty of them fit a file
HEAD_BYTES, TAIL_BYTES = LOG_BYTES // 4, LOG_BYTES // 2  # what stays of a longer one: the traceback is at its end
CUT = b"\n[%12d bytes cut here]\n"
LINES = 400  # of a stage, for the summary
PROFILE = "ncu.csv"


class Results:
    """Written to ``out`` from what stages print and from the files that they leave in ``parts``."""

    def __init__(self, out: Path, parts: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.parts = out, parts
        self.log = (out / "log.txt").open("ab", buffering=0)  # a stage inherits it: both append
        self._begin = self._read = self._cut = 0  # in the log: where the stage begins, how far it was read
        self._lines: dict[str, deque[str]] = {}  # of each stage, the last ones
        self._stage = ""
        self._summary: list[str] = []
        self._figures: list[str] = []
        self._environment = ""
        self._written: dict[str, bytes] = {}

    def tell(self, line: str) -> None:
        """One more line of the summary."""
        print(line, flush=True)
        self._summary.append(line)
        self.update()

    def begin(self, stage: str) -> None:
        """What is appended to the log from now on is the stage's."""
        self.log.write(f"==== {stage}\n".encode())
        self._begin = self._read = self.log.seek(0, 2)
        self._cut, self._stage, self._lines[stage] = 0, stage, deque(maxlen=LINES)

    def end(self) -> None:
        """The stage has ended."""
        self._read_log(is_over=True)
        if (self.out / "log.txt").stat().st_size > self._begin:
            self.log.write(b"\n")  # the last line may have no end
        self.update()

    def update(self, running: str = "") -> None:
        """Brings all files up to date; ``running`` is the summary's last line for now."""
        self._read_log()
        self._replace("summary.txt", "".join(f"{line}\n" for line in [*self._summary, *([running] * bool(running))]))
        self._replace("figures.jsonl", "".join(f"{line}\n" for line in self._figures))
        rows = [body for path in self._row_files() for body in _rows(path)]
        self._replace("rows.csv", "".join([f"{','.join(COLUMNS)}\n", *rows]))
        if self._environment:
            self._replace("environment.json", self._environment)
        if (self.parts / PROFILE).exists():
            self._replace(PROFILE, (self.parts / PROFILE).read_bytes())

    def note(self, failed: bool) -> str:
        """What the running stage says of itself."""
        lines = self._lines[self._stage]
        found = [line.removeprefix("summary: ") for line in lines if line.startswith("summary: ")]
        if found:
            return found[-1]
        return lines[-1] if lines and (failed or "passed" in lines[-1] or "collected" in lines[-1]) else ""

    def reason(self, stage: str) -> list[str]:
        """Why a stage failed, as its log has it: lines that speak of an error, and the last ones."""
        lines = list(self._lines.get(stage, ()))
        telling = [line for line in lines[:-5] if re.search(r"\berror\b|^FAILED|^wanda_kernels: ", line, re.I)]
        return [line[:300] for line in [*telling[-8:], *lines[-5:]]]

    def row_count(self, suite: str) -> int:
        return sum(body.count("\n") for path in self._row_files(suite) for body in _rows(path))

    def _row_files(self, suite: str = "*") -> list[Path]:
        """``.csv``, or ``.csv.partial`` while it is written and where that ended early."""
        return sorted(path for path in self.parts.glob(f"{suite}.csv*") if path.name != PROFILE)

    def _read_log(self, is_over: bool = False) -> None:
        with (self.out / "log.txt").open("r+b") as file:
            file.seek(self._read)
            new = file.read()
            is_long = file.tell() - self._begin > LOG_BYTES
            if not is_over and not is_long:
                new = new[: new.rfind(b"\n") + 1]  # the rest of the line comes later
            self._read += len(new)
            for line in new.decode(errors="replace").splitlines():
                self._take(line.strip())
            if is_long:
                # In place, for the stage has the file open. What it appends just now is lost.
                end = file.tell()
                self._cut += end - self._begin - HEAD_BYTES - TAIL_BYTES - (len(CUT % 0) if self._cut else 0)
                file.seek(end - TAIL_BYTES)
                tail = file.read(TAIL_BYTES)
                file.seek(self._begin + HEAD_BYTES)
                file.write(CUT % self._cut + tail)
                self._read = file.truncate()

    def _take(self, line: str) -> None:
        if line and self._stage:
            self._lines[self._stage].append(line)
        if not line.startswith("figures: "):
            return
        text = line.removeprefix("figures: ")
        try:
            found = json.loads(text)
        except ValueError:
            self._summary.append(f"{self._stage}: a figure was cut off: {text[:80]}")
            return
        if "environment" in found:
            self._environment = json.dumps(found["environment"], indent=2) + "\n"
        else:
            self._figures.append(json.dumps(found))

    def _replace(self, name: str, content: str | bytes) -> None:
        data = (content.encode() if isinstance(content, str) else content)[:FILE_BYTES]
        if self._written.get(name) != data:
            new = self.out / f"{name}.new"
            new.write_bytes(data)
            new.replace(self.out / name)
            self._written[name] = data


def _rows(path: Path) -> list[str]:
    """The whole lines of a result file after the first, which names the columns."""
    try:
        text = path.read_text()
    except FileNotFoundError:  # <suite>.csv.partial has taken its name <suite>.csv
        text = path.with_suffix("").read_text()
    body = text[: text.rfind("\n") + 1].partition("\n")[2]
    return [body] if body else []
