"""docs/models.md: a dozen families through the code that makes it, and the page against its results file."""

from __future__ import annotations

import copy
import functools
import json
import re

import pytest
import torch
import transformers

from benchmarks import families, models_page, plain_wanda
from benchmarks.family import BATCH, calibration, judge, tiny_model
from benchmarks.tiny_configs import KINDS, SPECIAL, USED_MOST, tiny_config
from wanda_kernels import prune

# Of each kind that is found by other code: how blocks and weights are laid out, what goes from block to block.
REPRESENTATIVE = [
    ("causal", "llama"),
    ("causal", "gpt2"),
    ("causal", "gemma4_text"),
    ("causal", "mixtral"),
    ("causal", "gpt_oss"),
    ("causal", "deepseek_v3"),
    ("causal", "llama4_text"),
    ("causal", "jetmoe"),
    ("causal", "longcat_flash"),
    ("causal", "qwen3_next"),
    ("causal", "mamba2"),
    ("image-text", "llava"),
    ("image-text", "qwen3_vl_moe"),
    ("image-text", "step3p7"),
]
RESULT = json.loads(models_page.RESULT.read_text())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "family"), REPRESENTATIVE)
def test_a_family_gets_the_plain_masks_or_a_refusal_that_names_what_is_in_the_way(kind, family):
    row = judge(kind, family, files=False)
    assert row["runs"], row["why"]
    if row["pruned"]:
        for differ, bits in row["bits"].values():
            assert differ == 0
            assert bits > 0
        assert row["dense"]["share"] < 0.2
    else:
        assert re.search(rf"\w+\.\d+\.\w+|{row['class']}", row["why"])


def test_other_masks_are_counted(monkeypatch):
    monkeypatch.setattr("benchmarks.family.prune", functools.partial(prune, method="magnitude"))
    row = judge("causal", "mixtral", files=False)
    assert all(0 < differ < bits for differ, bits in row["bits"].values())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_files_of_a_family(family):
    row = judge("causal", family)
    assert row["packed"]["ok"]
    assert row["streamed"]["ok"] or "/tmp" not in row["streamed"]["why"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_the_eager_forward_shows_what_the_models_own_computes(family):
    """Experts' masks from the class's own loop, and from the grouped products that the model really makes."""
    model = tiny_model("causal", family)
    eager, own = copy.deepcopy(model), copy.deepcopy(model)
    names = plain_wanda.prune(eager, calibration(), BATCH, only=lambda name: ".experts." in name)
    plain_wanda.prune(own, calibration(), BATCH, only=names.__contains__, forward=lambda kind: kind.forward)
    for name, weight in eager.named_parameters():
        assert torch.equal(weight, own.get_parameter(name))
        if name in names:
            assert (weight == 0).double().mean() == 0.5


def test_idle_experts_take_all_experts_norms_and_those_that_compute_nothing_stay():
    sums = plain_wanda.ExpertSums(torch.ones(4, 2, 3), count=3)
    sums.add(0, torch.tensor([[1.0, 0.0, 2.0]]), stride=1)
    sums.add(1, torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), stride=1)
    assert sums.columns == 2
    assert sums.tokens == {0: 1, 1: 1}
    squares = torch.tensor([[1.0, 0.0, 4.0], [0.0, 9.0, 0.0], [1.0, 9.0, 4.0]])
    assert torch.equal(sums.norms(samples=1), squares.sqrt())


def test_plain_masks():
    weight = torch.tensor([[1.0, -1.0, 2.0, 0.5, 3.0, 3.0, 3.0, 3.0]])
    whole, groups = weight.clone(), weight.clone()
    plain_wanda._prune(whole, torch.ones(8), 0.5, None)
    plain_wanda._prune(groups, torch.ones(8), 0.5, (2, 4))
    assert whole.tolist() == [[0, 0, 0, 0, 3, 3, 3, 3]]
    assert groups.tolist() == [[0, -1, 2, 0, 0, 0, 3, 3]]


def test_configurations_are_the_same_every_time_and_hold_no_calibration_token():
    first, second = (tiny_config("qwen2_5_vl").to_dict() for _ in range(2))
    assert first == second
    assert int(calibration().max()) < SPECIAL.start
    assert first["image_token_id"] in SPECIAL


def test_the_page_says_what_the_results_file_says():
    assert models_page.PAGE.read_text() == models_page.page(RESULT)


@pytest.mark.skipif(
    transformers.__version__ != RESULT["circumstances"]["transformers"], reason="the page is of another transformers"
)
def test_every_family_has_a_row():
    rows = [(row["kind"], row["family"]) for row in RESULT["rows"]]
    assert rows == [(kind, family) for kind in KINDS for family in sorted(KINDS[kind])]
    assert models_page.missing_names() == set()


def test_the_families_used_most_are_marked():
    page = models_page.PAGE.read_text()
    assert len(USED_MOST) == 57
    assert all(f"| **{family}** |" in page for family in USED_MOST)


def test_what_got_worse():
    equal = {"kind": "causal", "family": "llama", "pruned": True, "bits": {"50 %": [0, 8]}}
    refused = {"kind": "causal", "family": "llama", "pruned": False, "why": "x"}
    differs = equal | {"bits": {"50 %": [1, 8]}}
    assert families.worse([equal], [equal]) == families.worse([refused], [refused]) == families.worse([], [equal]) == []
    assert "llama (causal) is not pruned any more: x" in families.worse([equal], [refused])
    assert "other masks" in families.worse([equal], [differs])[0]
    assert families.worse([differs], [differs]) == []


def test_unknown_families_are_refused():
    assert ("image-text", "llama4") in families.chosen("llama4", None)
    with pytest.raises(ValueError, match="transformers has no family llamma"):
        families.chosen("llama,llamma", None)


def test_a_family_that_takes_too_long_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(families, "SECONDS", 0.0)
    rows = list(families.survey([("causal", "llama"), ("causal", "opt")], jobs=1))
    assert [row["family"] for row in rows] == ["llama", "opt"]
    assert all(row["why"].startswith("it took more than") for row in rows)
