"""``wanda-kernels study``: rows of refined masks and updated weights, several texts side by side."""

from __future__ import annotations

import csv
import json
import re
import xml.dom.minidom

import pytest
import saved
from test_cli import call
from test_study import arguments, outcome, results_in

from wanda_kernels.pruning.spec import REFINE_DAMPING, UPDATE_DAMPING
from wanda_kernels.study import Results, Run, grid, write_report
from wanda_kernels.study.pictures import all_pictures
from wanda_kernels.study.tables import all_tables

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_refined_masks_stand_beside_the_plain_ones():
    runs = grid(["wanda", "sparsegpt", "magnitude"], [0.5], ["2:4"], [None, "row"], [4], [0], refine=[None, 1, 0.0])
    assert [run.label for run in runs if run.target == "2:4"] == [
        "wanda", "wanda, refined", "wanda, refined (damping 1.0)", "wanda, refined (damping 0.0)", "sparsegpt",
        "magnitude", "magnitude, refined", "magnitude, refined (damping 1.0)", "magnitude, refined (damping 0.0)",
    ]  # fmt: skip
    assert not any(run.refine for run in runs if run.group)
    assert {run.samples for run in runs if run.method == "magnitude" and run.refine} == {4}
    assert {run.spec().refine_damping for run in runs if run.refine} == {REFINE_DAMPING, 1.0, 0.0}
    assert not any(run.detail for run in runs if run.refine)
    # the default by its number is the default
    assert grid(["wanda"], [0.5], [], [None], [4], [0], refine=[REFINE_DAMPING, None])[1:] == [
        Run("wanda", 0.5, samples=4, refine=True)
    ]
    assert len({Run("wanda", refine=True, refine_damping=d).key for d in (0.1, 1 / 3, 0.3333, 1, 1e-9)}) == 5
    assert not any(run.detail for run in grid(["wanda"], [0.5], [], [None], [4], [0], detail=False))
    for methods, groups in ((["sparsegpt"], [None]), (["wanda"], ["row"])):
        with pytest.raises(ValueError, match="refine is for methods that keep the weights, compared as they do by"):
            grid(methods, [0.5], [], groups, [4], [0], refine=[None])


def test_rows_of_updated_weights():
    def labels(**steps):
        return [run.label for run in grid(["wanda", "sparsegpt"], [0.5], [], [None], [4], [0], **steps)]

    assert labels(update=[None]) == ["wanda", "wanda, updated", "sparsegpt"]
    assert labels(refine=[None], update=[None]) == [
        "wanda", "wanda, refined", "wanda, refined and updated", "sparsegpt",
    ]  # fmt: skip
    assert labels(refine=[1], update=[0.1, UPDATE_DAMPING]) == [
        "wanda", "wanda, refined (damping 1.0)", "wanda, refined (damping 1.0) and updated (damping 0.1)",
        "wanda, refined (damping 1.0) and updated", "sparsegpt",
    ]  # fmt: skip
    spec = Run("wanda", 0.5, samples=4, refine=True, update=True, update_damping=0.1).spec()
    assert (spec.refine, spec.refine_damping, spec.update, spec.update_damping) == (True, REFINE_DAMPING, True, 0.1)
    with pytest.raises(ValueError, match="update is for methods that keep the weights, compared as they do by"):
        grid(["sparsegpt"], [0.5], [], [None], [4], [0], update=[None])


def results_on_two_texts(folder):
    """Of a grid with refined masks, with figures that are made up: 100 more a seed, 1000 more on the second text."""
    settings = {
        "model": "m", "calibration": "a, b", "length": 9, "text": "first", "windows": 2, "dtype": "float32",
        "further_texts": ["<b>second</b>"], "further_windows": [3],
    }  # fmt: skip
    results = Results(folder, settings, {"device": "here"})
    results.set_dense({"perplexity": 5.0, "further": [1005.0]})
    runs = grid(
        ["sparsegpt", "wanda"], [0.5], ["2:4"], [None], [16], [0, 1], refine=[0.1, None, 1], update=[None], detail=False
    )
    for number, run in enumerate(runs):
        value = 10.0 + number % 16 + 100 * run.seed
        results.add(run, outcome(run, value) | {"further": [1000 + value], "parts": {"refinement": 0.25}})
    return results


def test_two_texts_side_by_side(tmp_path):
    results = results_on_two_texts(tmp_path)
    data = results.data | {"runs": results.runs}
    tables = all_tables(data, None)
    assert tables["texts"].heading == ["method", "target", "seeds", "on first", "on <b>second</b>", "seconds"]
    rows = {tuple(row[:2]): row[2:] for row in tables["texts"].rows}
    assert rows["dense", ""] == ["", "5.00", "1e+03", ""]
    assert rows["sparsegpt", "50%"] == ["2", "60.00", "1.06e+03", "1.5"]
    assert rows["wanda, refined", "50%"] == ["2", "63.00", "1.06e+03", "1.5"]
    assert rows["wanda, refined (damping 0.1) and updated", "50%"][0] == "2"
    assert rows["wanda, refined (damping 1.0)", "2:4"][0] == "2"
    assert tables["seeds"].heading[5:] == ["mean on <b>second</b>", "standard deviation"]
    assert ["wanda, refined", "50%", "2", "63.00", "70.711", "1.06e+03", "70.711"] in tables["seeds"].rows
    assert tables["cost"].heading[3:7] == ["forward", "statistics", "selection", "refinement"]
    assert [row[0] for row in tables["perplexity"].rows] == ["dense", "sparsegpt", "wanda"]  # without refined ones
    pictures = all_pictures(data)
    assert [caption for caption, _ in pictures["damping"]] == [
        f"Refined masks at {target}: damping against perplexity, means over the seeds." for target in ("50%", "2:4")
    ]
    for _, svg in pictures["damping"] + pictures["texts"]:
        xml.dom.minidom.parseString(svg)
        assert "&lt;b&gt;second&lt;/b&gt;" in svg
    write_report(tmp_path / "report.html", data)
    page = (tmp_path / "report.html").read_text()
    assert "first, 2 windows of 9 tokens and &lt;b&gt;second&lt;/b&gt;, 3 windows of 9 tokens" in page
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert (rows[3]["refine"], rows[3]["refine_damping"], rows[3]["perplexity on <b>second</b>"]) == (
        "True", "0.3", "1013.0",
    )  # fmt: skip


def test_what_was_measured_on_one_text_is_still_read(tmp_path):
    done = results_in(tmp_path)
    file = tmp_path / "results.json"
    data = json.loads(file.read_text())
    later = ("refine", "refine_damping", "update", "update_damping", "further")
    for record in (*data["runs"].values(), data["dense"]):
        for name in later:
            record.pop(name, None)
    del data["settings"]["further_texts"], data["settings"]["further_windows"]
    runs = {key: run for key, run in data["runs"].items() if "refined" not in key}
    file.write_text(json.dumps(data | {"runs": runs}))
    again = Results(tmp_path, done.data["settings"], {"device": "here"})
    assert again.data == done.data | {"runs": {key: run for key, run in done.data["runs"].items() if key in runs}}
    with pytest.raises(
        ValueError, match=r"is of a study with further texts \[\], this one has \['b'\]: choose another"
    ):
        Results(tmp_path, done.data["settings"] | {"further_texts": ["b"]}, {})


def test_a_study_on_two_texts_with_a_mixture_and_refined_masks(tmp_path, capsys):
    work = tmp_path / "work"
    saved.save_model(work / "model")
    (work / "text.txt").write_text(saved.text(2000))
    other = work / "other=0.5.txt"
    other.write_text(saved.text(500, seed=3))
    out = tmp_path / "out"
    more = ["--text", other, "--calibration", f"{other}=0.25", "--refine", "--refine-damping", "0.3,1", "--no-layers"]
    code, stdout, stderr = call(capsys, *arguments(work, out, *more))
    assert code == 0, stderr
    assert "6 runs: " in stdout
    assert re.search(r"dense: perplexity \d+\.\d\d / \d+\.\d\d\n", stderr)
    data = json.loads((out / "results.json").read_text())
    assert data["settings"]["calibration"] == "text.txt=0.75, other=0.5.txt=0.25"
    assert data["settings"]["further_texts"] == ["other=0.5.txt"]
    assert data["settings"]["further_windows"] == [2]
    assert all(len(run["further"]) == 1 and "layers" not in run for run in data["runs"].values())
    assert "wanda, refined (damping 1.0) 50%, 4 samples, seed 0" in data["runs"]
    assert "<h2>Damping</h2>" in (out / "report.html").read_text()
    # as prune and eval have it
    code, _, stderr = call(
        capsys, "prune", work / "model", "--out", tmp_path / "pruned", "--refine", "--refine-damping", "1",
        "--samples", 4, "--length", 32, "--calibration", work / "text.txt", "--calibration", f"{other}=0.25",
    )  # fmt: skip
    assert code == 0, stderr
    code, stdout, stderr = call(
        capsys, "eval", tmp_path / "pruned", "--text", work / "text.txt", "--text", other, "--length", 32,
        "--windows", 2, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert code == 0, stderr
    run = data["runs"]["wanda, refined (damping 1.0) 50%, 4 samples, seed 0"]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [one["perplexity"] for one in found["texts"]] == [run["perplexity"], *run["further"]]
    assert [one["text"] for one in found["texts"]] == [str(work / "text.txt"), str(other)]
    assert (found["text"], found["perplexity"]) == (str(work / "text.txt"), run["perplexity"])
    assert stdout.count("(2 windows of 32 tokens, ") == 2
    # another second text is another study
    code, _, stderr = call(capsys, *arguments(work, out, "--text", work / "model" / "config.json", *more[2:]))
    assert code == 1
    assert "is of a study with further texts ['other=0.5.txt'], this one has ['config.json']" in " ".join(
        stderr.split()
    )
