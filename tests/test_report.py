"""The README says what the result files say."""

from __future__ import annotations

import json

import pytest

from benchmarks import report


def test_readme_is_up_to_date():
    text = report.README.read_text()
    assert report.render(text) == text


def test_a_changed_figure_is_noticed(tmp_path):
    for path in (report.RESULTS / "cpu").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    result = json.loads((tmp_path / "demo.json").read_text())
    result["rows"][0]["perplexity"] = 3.14159
    (tmp_path / "demo.json").write_text(json.dumps(result))
    text = report.README.read_text()
    changed = report.render(text, tmp_path)
    assert changed != text
    assert "3.14" in changed


def test_missing_results_are_not_measured(tmp_path):
    text = report.render(report.README.read_text(), tmp_path)
    assert text.count("\nnot measured\n") == len(report.SECTIONS)


def test_a_readme_without_markers_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no markers for demo"):
        report.render("no markers", tmp_path)
