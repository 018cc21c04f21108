"""What a study's files hold: names that are no markup, files that somebody wrote, figures that are no numbers."""

from __future__ import annotations

import copy
import csv
import html.parser
import json
import math
import re
import xml.dom.minidom

import pytest
from test_study import outcome, results_in

from wanda_kernels.study import Results, Run, report, write_report
from wanda_kernels.study.pictures import all_pictures
from wanda_kernels.study.tables import all_tables


@pytest.fixture
def done(tmp_path):
    return results_in(tmp_path)


HOSTILE = [
    "<script>alert(1)</script>", "</svg><img src=x onerror=alert(1)>", '"><img src=x>', "' onload='x", "$x$", "$",
    "\\\\frac{1}{0}", "[bold]x[/bold]", "&lt;b&gt;", "{x}", "a\nb\0\x1b[31m", "x" * 10_000, "\udc80", "-->", "]]>",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_is_markup(tmp_path, monkeypatch, name):
    """Of a model, a file, a machine or a layer."""
    text = dict.fromkeys(("model", "calibration", "text", "dtype"), name)
    texts = {"further_texts": [name], "further_windows": [2]}
    results = Results(tmp_path, {**text, **texts, "length": 9, "windows": 2, "pack": False}, {name: name})
    run = Run("wanda", 0.5, samples=4, detail=True)
    layers = outcome(run, 9.0)["layers"]
    if name.isprintable() and len(name) < 1000:  # a layer's is refused otherwise, below
        layers += [layer | {"name": f"model.layers.1.{name}"} for layer in layers]
    further = {"further": [6.0]}
    results.set_dense({"perplexity": 5.0} | further)
    results.add(run, outcome(run, 9.0) | {"layers": layers} | further)
    results.add(Run("magnitude", 0.5), outcome(run, 11.0) | {"layers": layers} | further)
    for damping in (0.1, 1):
        results.add(Run("wanda", 0.5, samples=4, refine=True, refine_damping=damping), outcome(run, 8.0) | further)
    again = Results(tmp_path, results.data["settings"], {name: name})
    assert again.data["circumstances"] == [{name: name}]
    pictures = all_pictures(again.data | {"runs": again.runs})
    monkeypatch.setattr(report, "all_pictures", lambda data: pictures)  # drawn once, which takes a second
    write_report(tmp_path / "report.html", again.data | {"runs": again.runs})
    page = (tmp_path / "report.html").read_text()
    assert len(pictures["texts"]) == len(pictures["damping"]) == 1
    for drawn in pictures.values():
        for _, svg in drawn:
            xml.dom.minidom.parseString(svg)
    found = Tags()
    found.feed(page)
    assert found.tags.isdisjoint({"script", "img", "b", "foreignobject"})
    assert not any(attribute.startswith("on") for attribute in found.attributes)
    assert found.open == []
    assert re.sub(r"\s", "", name[:40].replace("\udc80", "?")) in re.sub(r"\s", "", "".join(found.text))


class Tags(html.parser.HTMLParser):
    """What a browser would see of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = set(), set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text.append(data)


def changed(data, path, value):
    """``data`` with another value at ``path``; ``...``: without it."""
    if not path:
        return value
    if value is ... and len(path) == 1:
        return {key: old for key, old in data.items() if key != path[0]}
    new = copy.copy(data)
    new[path[0]] = changed(data[path[0]], path[1:], value)
    return new


KEY = "wanda 50%, 16 samples, seed 0"


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (["runs"], [[], 3, None]),
        (["runs", KEY], ["x", None, [1]]),
        (["runs", KEY, "perplexity"], ["<b>", "12", [], None, {}, 0, -1.5, True, 10**400, ...]),
        (["runs", KEY, "method"], ["<b>", None, 3, ["wanda"], "wonda", "x" * 10_000, ...]),
        (["runs", KEY, "sparsity"], ["0.5", 1.5, -0.1, [], None, "nan", True, 1, ...]),
        (["runs", KEY, "pattern"], ["<b>", 3, [], "4:2", "2:4", "2:" + "9" * 5000]),
        (["runs", KEY, "samples"], ["<b>", 1.5, -1, None, [], 10**30, True]),
        (["runs", KEY, "seed"], ["0", 0.5, None, []]),
        (["runs", KEY, "group"], ["<b>", 3, [], "row\n"]),
        (["runs", KEY, "variant"], ["yes", 1, None]),
        (["runs", KEY, "weight_update"], ["no", 0]),
        (["runs", KEY, "owl"], ["no", 0, None]),
        (["runs", KEY, "seconds"], ["<b>", None, -1, "nan", "inf", [], ...]),
        (["runs", KEY, "parts"], ["<b>", None, [1], {"forward": "<b>"}, {"forward": None}, {"<b>": -1}, ...]),
        (["runs", KEY, "peak_memory_bytes"], ["<b>", 0.5, [], ...]),
        (["runs", KEY, "achieved_sparsity"], ["<b>", None, 2]),
        (["runs", KEY, "damped"], ["<b>", None, -1, 0.5, ...]),
        (["runs", KEY, "refine"], ["no", 0, None]),
        (["runs", KEY, "refine_damping"], ["<b>", -1, "inf", "nan", [], True]),
        (["runs", KEY, "update"], ["no", 0, None]),
        (["runs", KEY, "update_damping"], ["<b>", -1, "inf", []]),
        (["runs", KEY, "further"], ["<b>", None, {}, 9.0, [0], ["<b>"], [None], [9.0]]),
        (["dense", "further"], ["<b>", None, [0], [9.0]]),
        (["settings", "further_texts"], ["<b>", None, {}, ["<b>"], [["a"]], [None]]),
        (["settings", "further_windows"], ["<b>", None, [3], [-1]]),
        (["runs", KEY, "layers"], ["<b>", {}, ["<b>"], [None]]),
        (["runs", KEY, "layers", 0, "name"], [None, 3, [], "a\nb", "x" * 10_000, ...]),
        (["runs", KEY, "layers", 0, "exact_error"], ["<b>", [], True, ...]),
        (["runs", KEY, "layers", 0, "threshold"], ["<b>", {}]),
        (["runs", KEY, "layers", 0, "sparsity"], ["<b>", 7]),
        (["dense"], ["<b>", [], {}, {"perplexity": "<b>"}, {"perplexity": None}]),
        (["circumstances"], ["<b>", {}, ["<b>"], [{"device": ["<b>"]}], None]),
        (["settings"], ["<b>", [], None, {}]),
        (["settings", "model"], [["<b>"], None, ...]),
    ],
)
def test_a_results_file_that_somebody_wrote(done, tmp_path, path, values):
    file = tmp_path / "results.json"
    good = json.loads(file.read_text())
    for value in values:
        data = changed(good, path, value)
        file.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}") as error:
            Results(tmp_path, done.data["settings"], {})
        said = str(error.value)
        if len(path) == 3 and path[1] == KEY and path[2] not in ("layers", "pattern"):
            assert path[2].split("_")[0] in said
        assert len(said) < 600 + len(str(file))
        if isinstance(data.get("runs"), dict):
            with pytest.raises(ValueError, match=r"^results"):
                write_report(tmp_path / "report.html", data | {"runs": list(data["runs"].values())})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"runs": {}}'])
def test_a_results_file_that_is_none(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not the file of a study: choose another folder"):
        Results(tmp_path, {}, {})


def test_names_in_a_results_file_are_made_anew(done, tmp_path):
    """Labels and keys follow from a run's options; files of earlier versions rounded the sparsity in theirs."""
    file = tmp_path / "results.json"
    data = json.loads(file.read_text())
    record = data["runs"][KEY]
    old = record | {"sparsity": 0.625, "label": "<b>", "target": "62%"}
    data["runs"] = {"wanda 62%, 16 samples, seed 0": old, KEY: record | {"target": "<script>"}}
    file.write_text(json.dumps(data))
    again = Results(tmp_path, done.data["settings"], {})
    assert list(again.data["runs"]) == ["wanda 62.5%, 16 samples, seed 0", KEY]
    assert [(run["label"], run["target"]) for run in again.runs] == [("wanda", "62.5%"), ("wanda", "50%")]
    assert Run("wanda", 0.625, samples=16, detail=True) in again
    assert Run("wanda", 0.62, samples=16) not in again


def test_perplexities_that_are_no_numbers(done, tmp_path):
    for number, value in enumerate((math.nan, math.inf, 1e300)):
        for share in (0.5, 0.7):
            for seed in (0, 1):
                run = Run("wanda", share, samples=number + 1, seed=seed)
                done.add(run, outcome(run, value))
    base = Run("wanda", 0.5, samples=16, detail=True)
    bad = outcome(base, math.inf)
    bad["layers"][0] |= {"exact_error": math.nan, "threshold": math.inf}
    done.add(base, bad)
    done.add(Run("sparsegpt", 0.5, samples=16), outcome(Run("wanda"), math.nan))
    done.set_dense({"perplexity": math.nan})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert stored["dense"]["perplexity"] == "nan"
    assert stored["runs"][base.key]["perplexity"] == "inf"
    again = Results(tmp_path, done.data["settings"], {})
    assert math.isnan(again.data["dense"]["perplexity"])
    assert again.data["runs"][base.key]["perplexity"] == math.inf
    data = again.data | {"runs": again.runs}
    rows = {row[0]: row for row in all_tables(data, None)["perplexity"].rows}
    assert (rows["dense"][1], rows["wanda"][1], rows["sparsegpt"][1]) == ("nan", "inf", "nan")
    assert any(row[-1] == "nan" for row in all_tables(data, None)["seeds"].rows)
    write_report(tmp_path / "report.html", data)
    ((_, svg),) = all_pictures(data)["perplexity"]
    assert "nan" not in svg
    assert "inf" not in svg
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert math.isnan(float(next(row["perplexity"] for row in rows if row["method"] == "sparsegpt")))


def test_nothing_is_written_through_links(done, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("results.json", "results.csv", "report.html"):
        for place in (tmp_path / name, tmp_path / f".{name}.partial"):
            place.unlink(missing_ok=True)
            place.symlink_to(mine)
    done.set_dense({"perplexity": 5.0})
    write_report(tmp_path / "report.html", done.data | {"runs": done.runs})
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "report.html", "results.csv", "results.json"]
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
