"""The README's Python runs as it is printed, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import saved

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/training.md")  # the second goes on where the first ends
# Smaller than what is printed, so that a tiny model and a moment suffice; packed models are not trained.
SMALLER = {
    "samples=16, length=512": "samples=8, length=32", "steps=100": "steps=2",
    "wanda_kernels.compress(model)": "wanda_kernels.compress(model); wanda_kernels.decompress(model)",
}  # fmt: skip


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, one_thread):
    pytest.importorskip("peft")
    text = "".join((ROOT / page).read_text() for page in PAGES)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    runnable = [block for block in blocks if "import" in block]
    assert len(runnable) == 2
    saved.save_model(tmp_path / "model", hidden_size=128, intermediate_size=192)
    (tmp_path / "notes.txt").write_text(saved.text(3000))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in runnable:
        for printed, smaller in SMALLER.items():
            block = block.replace(printed, smaller)
        exec(compile(block, "README.md", "exec"), names)
    assert all(float((p == 0).float().mean()) >= 0.5 for n, p in names["model"].named_parameters() if "proj" in n)


def test_the_pages_that_all_read_are_short():
    assert {page: len((ROOT / page).read_text().splitlines()) < 150 for page in ("README.md", "docs/design.md")} == {
        "README.md": True, "docs/design.md": True,
    }  # fmt: skip
