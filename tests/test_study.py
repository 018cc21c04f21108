"""``wanda-kernels study``: which runs, on one model, resumed; tables, pictures, report."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import xml.dom.minidom
from types import SimpleNamespace

import pytest
import saved
import tiny
import torch
from test_cli import call

from wanda_kernels import perplexity, prune
from wanda_kernels.study import Results, Run, Runner, Scale, grid, paper_plan, write_report
from wanda_kernels.study import runner as runner_module
from wanda_kernels.study.paper import published
from wanda_kernels.study.pictures import all_pictures, bars
from wanda_kernels.study.tables import all_tables, figure

pytestmark = pytest.mark.usefixtures("one_thread")


def test_grid():
    runs = grid(["magnitude", "sparsegpt", "ablate_mag_seq"], [0.5], ["2:4"], [None, "row"], [4, 8], [0, 1])
    assert len(runs) == len({run.key for run in runs})
    assert sum(run.method == "magnitude" for run in runs) == 3  # once a target and group, without calibration
    assert sum(run.group == "row" for run in runs) == 1 + 2 * 2
    assert all(run.weight_update is False for run in runs if run.group and run.method == "sparsegpt")
    with pytest.raises(ValueError, match="method must be one of"):
        grid(["wonda"], [0.5], [], [None], [4], [0])


def test_the_papers_plan():
    runs = paper_plan(Scale(16, 64, 4, (0.5, 0.7), (1, 16), (0, 1)))
    keys = {run.key for run in runs}
    assert len(keys) == len(runs)
    for key in (
        "wanda 2:4, 16 samples, seed 0",
        "sparsegpt 70%, 16 samples, seed 0",
        "wanda 50%, 1 samples, seed 0",
        "magnitude group column:128 50%, no calibration",
        "ablate_wanda_iter 2:4, 16 samples, seed 0",
        "wanda variant 50%, 16 samples, seed 0",
        "magnitude + OWL 60%, 16 samples, seed 0",
        "sparsegpt 50%, 16 samples, seed 1",
        "wanda, refined 2:4, 16 samples, seed 0",
        "wanda, refined and updated 60%, 16 samples, seed 0",
    ):
        assert key in keys
    detailed = {f"{method} 50%, 16 samples, seed 0" for method in ("sparsegpt", "wanda")}
    assert {run.key for run in runs if run.detail and run.samples} == detailed


def test_no_two_sparsities_share_a_name():
    names = {
        0.5: "50%", 0.625: "62.5%", 0.999: "99.9%", 0.001: "0.1%", 0.07: "7%", 0.0: "0%", 0.9999999: "99.99999%",
        0.29: "29%", 1 / 3: "33.33333333333333%", math.nextafter(0.5, 1): "50.00000000000001%", 1e-7: "0.00001%",
    }  # fmt: skip
    assert {share: Run("wanda", share).target for share in names} == names
    assert len({run.key for run in grid(["wanda"], list(names), [], [None], [4], [0])}) == len(names)
    assert Run("wanda", pattern=" 02:4 ").target == "2:4"


def calibration(samples, seed):
    return (tiny.ids(samples, 16) + seed) % 128


def test_runs_leave_the_model_dense_and_give_what_prune_gives():
    model = tiny.model()
    before = tiny.weights(model)
    windows = tiny.ids(3, 16)
    runner = Runner(model, calibration, [windows])
    assert runner.dense()["perplexity"] == perplexity(model, windows, 16)
    outcome = runner.run(Run("wanda", 0.5, samples=4, seed=1, detail=True))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    other = tiny.model()
    report = prune(other, calibration(4, 1), exact_error=True)
    assert outcome["perplexity"] == perplexity(other, windows, 16)
    assert outcome["layers"][3]["exact_error"] == report.layers[3].exact_error
    threshold = outcome["layers"][0]["threshold"]
    assert 0 < threshold == report.layers[0].threshold
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or inf"):
        runner.run(Run("wanda", 0.5, samples=4))
    before["model.layers.1.input_layernorm.weight"][0] = float("nan")
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


def test_each_text_has_its_perplexity():
    model = tiny.model()
    texts = [tiny.ids(3, 16), (tiny.ids(2, 16) + 5) % 128]
    told = []
    runner = Runner(model, calibration, texts, on_window=told.append)
    dense = runner.dense()
    assert told == [1, 2, 3, 4, 5]
    assert [dense["perplexity"], *dense["further"]] == [perplexity(model, ids, 16) for ids in texts]
    found = runner.run(Run("wanda", 0.5, samples=4, refine=True, refine_damping=1, update=True))
    assert runner.dense() == dense
    prune(model, calibration(4, 0), refine=True, refine_damping=1, update=True)
    assert [found["perplexity"], *found["further"]] == [perplexity(model, ids, 16) for ids in texts]
    assert found["parts"]["refinement"] > 0
    assert found["parts"]["update"] > 0


def outcome(run, value):
    layers = {"layers": [
        {"name": f"model.layers.{b}.mlp.{kind}", "exact_error": 0.1 * b, "estimated_error": 0.2, "threshold": 1.0,
         "sparsity": 0.5} for b in range(3) for kind in ("up_proj", "down_proj")
    ]}  # fmt: skip
    return {
        "perplexity": value, "further": [], "achieved_sparsity": 0.5, "seconds": 1.5, "damped": 1,
        "parts": {"forward": 1.0, "selection": 0.5}, "peak_memory_bytes": 3 << 20,
    } | (layers if run.detail else {})  # fmt: skip


def results_in(folder):
    """Of the paper's plan, with figures that are made up."""
    results = Results(folder, {"model": "m<b>", "calibration": "c4", "length": 9, "text": "t", "windows": 2,
                                 "dtype": "float32"}, {"device": "here"})  # fmt: skip
    results.set_dense({"perplexity": 5.0})
    for number, run in enumerate(paper_plan(Scale(16, 64, 4, (0.5, 0.7), (1, 16), (0, 1)))):
        results.add(run, outcome(run, 10.0 + number))
    return results


@pytest.fixture
def done(tmp_path):
    return results_in(tmp_path)


def test_results_are_gone_on_with(done, tmp_path):
    again = Results(tmp_path, done.data["settings"], {"device": "there"})
    assert Run("wanda", 0.5, samples=16, detail=True) in again
    assert Run("wanda", 0.5, samples=1, detail=True) not in again  # there without details
    assert Run("wanda", 0.5, samples=17) not in again
    assert [session["device"] for session in again.data["circumstances"]] == ["here", "there"]
    with pytest.raises(ValueError, match=r"is of a study with length 9, this one has 10: .* overwrite it"):
        Results(tmp_path, done.data["settings"] | {"length": 10}, {})
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the file of a study"):
        Results(tmp_path, {}, {})


def test_tables_have_the_runs_figures(done):
    data = done.data | {"runs": done.runs}
    tables = all_tables(data, published(config()))
    value = {run["label"] + " " + run["target"]: figure(run["perplexity"]) for run in done.runs if run["seed"] == 0}
    rows = {row[0]: row for row in tables["perplexity"].rows}
    assert rows["dense"] == ["dense", "5.00", "5.00", "5.00"]
    assert rows["wanda"][3] == value["wanda 2:4"]
    assert rows["wanda, LLaMA-2 as published"][1:] == ["6.42", "7.97", "11.02"]
    by_group = {row[0]: row[1:] for row in tables["groups"].rows}
    assert by_group["sparsegpt"][0] == value["sparsegpt group layer 50%"]
    assert tables["update"].rows[1][:3] == ["magnitude", "sequential", value["ablate_mag_seq 50%"]]
    assert tables["seeds"].rows[0][2] == "2"
    assert ["wanda", "50%", "1.5", "1.0", "0.0", "0.5", "3"] in tables["cost"].rows
    assert figure(12345.6) == "1.23e+04"
    assert set(tables) == {
        "perplexity", "texts", "sparsity", "calibration", "groups", "update", "others", "seeds", "cost",
    }  # fmt: skip


def config(**changes):
    llama_2 = {
        "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "hidden_size": 4096,
        "num_hidden_layers": 32,
    }  # fmt: skip
    return SimpleNamespace(**(llama_2 | changes))


def test_published_figures_are_for_llama_2_alone():
    assert published(config())["2:4"]["wanda"] == 11.02
    assert published(config(max_position_embeddings=2048)) is None
    assert published(tiny.model().config) is None


def test_the_report_stands_alone(done, tmp_path):
    data = done.data | {"runs": done.runs}
    pictures = all_pictures(data)
    assert {name: len(drawn) for name, drawn in pictures.items()} == {
        "perplexity": 1, "texts": 0, "damping": 0, "sparsity": 1, "calibration": 1, "cost": 1, "layers": 4 + 2,
    }  # fmt: skip
    ids = []
    for _, svg in (picture for drawn in pictures.values() for picture in drawn):
        xml.dom.minidom.parseString(svg)
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "<text" in svg  # not outlines
        ids += re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    write_report(tmp_path / "report.html", data)
    page = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert "m&lt;b&gt;" in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert "LLaMA-2 as published" not in page
    # the same results, the same picture
    assert bars(data) == pictures["perplexity"][0][1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    saved.save_model(folder / "model")
    (folder / "text.txt").write_text(saved.text(2000))
    return folder


def arguments(work, out, *more):
    text = work / "text.txt"
    fixed = ["study", work / "model", "--out", out, "--calibration", text, "--text", text]
    return [*fixed, "--length", 32, "--samples", 4, "--windows", 2, "--methods", "magnitude,wanda", *more]


def test_study_and_its_continuation(work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    real, left = runner_module.prune, [3]  # wanda with details is pruned twice

    def prune_twice(*args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **options)

    monkeypatch.setattr(runner_module, "prune", prune_twice)
    code, _, stderr = call(capsys, *arguments(work, out, "--patterns", "2:4"))
    assert code == 0, stderr
    code, _, stderr = call(capsys, *arguments(work, out, "--patterns", "2:4", "--sparsities", "0.5"))
    assert code == 130
    assert "2 of 4 runs are in" in stderr
    assert "interrupted; 2 of 4 runs are in" in " ".join(stderr.split())
    monkeypatch.setattr(runner_module, "prune", real)
    code, stdout, stderr = call(capsys, *arguments(work, out, "--patterns", "2:4", "--sparsities", "0.5"))
    assert code == 0, stderr
    assert "4 runs: " in stdout
    assert "<h2>Perplexity</h2>" in (out / "report.html").read_text()
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["method"], row["pattern"]) for row in rows] == [
        ("magnitude", "2:4"), ("wanda", "2:4"), ("magnitude", ""), ("wanda", ""),
    ]  # fmt: skip
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert float(rows[1]["perplexity"]) == runs["wanda 2:4, 4 samples, seed 0"]["perplexity"]

    code, _, stderr = call(capsys, *arguments(work, out, "--dtype", "bfloat16"))
    assert code == 1
    assert "is of a study with dtype float32, this one has bfloat16" in stderr
    code, stdout, _ = call(
        capsys, *arguments(work, out, "--dtype", "bfloat16", "--overwrite", "--methods", "magnitude")
    )
    assert code == 0
    assert "1 runs: " in stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "huge"], "--scale must be one of full, small, tiny, got 'huge'"),
        (["--sparsities", "half"], "--sparsities must be numbers with commas between them, got 'half'"),
        (["--methods", "wanda,x"], "method must be one of wanda"),
        (["--groups", "own,diagonal"], "group must be row, layer or column"),
        (["--paper", "--samples", "4,8"], "--paper varies the samples by itself: give --samples one number, got 4,8"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--samples", "500"], "500 samples are required"),
        (["--length", "3000"], "--length 3000 is longer than the model's context of 256 tokens"),
        (["--groups", "row", "--patterns", "2:4"], "no run is left: groups go with sparsities"),
        (["--sparsities", "nan"], "sparsity must be in [0, 1), got nan"),
        (["--patterns", "4:2"], "pattern must be N:M with 0 < N < M"),
        (["--refine-damping", "1"], "--refine-damping 1 needs --refine"),
        (["--refine", "--refine-damping", "x"], "--refine-damping must be numbers with commas between them, got 'x'"),
        (["--refine", "--refine-damping", "-1"], "--refine-damping must be at least 0 and finite, got -1"),
        (["--refine", "--refine-damping", "inf"], "--refine-damping must be at least 0 and finite, got inf"),
        (["--refine", "--methods", "sparsegpt"], "--refine is for methods that keep the weights"),
        (["--paper", "--refine"], "--refine is of the grid: --paper has such rows of its own"),
        (["--text", "TEXT"], "--text must name each text once, got "),
        (["--text", "elsewhere/text.txt"], "--text must name files with different names"),
        (["--calibration", "TEXT=0.5"], "--calibration must name each source once"),
        (["--calibration", "c4=0"], "--calibration must give c4 a share above 0 and at most 1, got 0"),
        (["--calibration", "c4=2"], "--calibration must give c4 a share above 0 and at most 1, got 2"),
        (["--calibration", "c4", "--samples", "1"], "--samples must be enough for each calibration source, got 1"),
        (["--calibration", "c4", "--paper"], "--paper calibrates on 1 samples, too: give one --calibration"),
    ],
)
def test_bad_options_write_nothing(work, tmp_path, capsys, options, message):
    if "elsewhere/text.txt" in options:
        (work / "elsewhere").mkdir()
        (work / "elsewhere" / "text.txt").write_text("w1")
    options = [option.replace("TEXT", str(work / "text.txt")).replace("else", f"{work}/else") for option in options]
    code, _, stderr = call(capsys, *arguments(work, tmp_path / "out", *options))
    assert code == (1 if options in (["--samples", "500"], ["--length", "3000"]) else 2)
    assert message in stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a file", "a broken file", "another study", "its report a folder", "too long"])
def test_what_can_be_known_before_the_model_is_loaded(work, tmp_path, capsys, monkeypatch, what):
    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("wanda_kernels.models.load_model", load)
    out = tmp_path / "out"
    if what == "too long":
        out, message = tmp_path / ("x" * 300), "too long"
    elif what == "a file":
        out.write_text("")
        message = "is a file"
    else:
        out.mkdir()
        if what == "its report a folder":
            (out / "report.html").mkdir()
            message = "its report.html is a folder"
        elif what == "a broken file":
            (out / "results.json").write_text("x")
            message = "results.json is not the file of a study"
        else:
            settings = {"model": "m", "calibration": "c4", "text": "t", "length": 9, "windows": 2, "dtype": "float32"}
            Results(out, settings, {}).set_dense({"perplexity": 5.0})
            message = "is of a study with calibration c4, this one has text.txt"
    code, _, stderr = call(capsys, *arguments(work, out))
    assert code == 1
    assert message in stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_study_that_is_ended_says_by_what(work, tmp_path, number, code):
    out = tmp_path / "a [b] c"
    command = [sys.executable, "-m", "wanda_kernels", *map(str, arguments(work, out))]
    many = ["--sparsities", ",".join(f"0.{n}" for n in range(10, 90))]
    process = subprocess.Popen([*command, *many], stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "80"})
    while not (out / "results.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(r"interrupted; \d+ of 160 runs are in .*/a \[b\] c: the same command goes on", stderr)
    assert Results(out, json.loads((out / "results.json").read_text())["settings"], {}).data["dense"] is not None
