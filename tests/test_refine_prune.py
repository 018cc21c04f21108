"""prune(refine=True): other weights of each row go, as many, for a smaller error; what is kept stays as it was."""

from __future__ import annotations

import json

import pytest
import saved
import tiny
import torch
from test_cli import call

from wanda_kernels import PruneSpec, prune
from wanda_kernels.pruning.blocks import find_blocks, matrices_of

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = [{"sparsity": 0.5}, {"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "4:8"}]
WAYS = [
    {}, {"method": "magnitude"}, {"method": "ria"}, {"method": "sparsegpt", "weight_update": False},
    {"propagate": "dense", "batch_size": 1}, {"exact_error": True},
]  # fmt: skip


def weights(of) -> dict[str, torch.Tensor]:
    return {name: matrix.weight.detach().clone() for name, matrix in matrices_of(find_blocks(of)).items()}


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_kept_weights_are_the_dense_models_and_errors_are_smaller(family, way, target):
    plain, refined = tiny.model(family), tiny.model(family)
    dense = weights(refined)
    ids = tiny.ids(8, 32)
    prune(plain, ids, **target, **way)
    report = prune(refined, ids, refine=True, **target, **way)
    for name, weight in weights(refined).items():
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])
    for layer in report.layers:
        before, after = layer.gram_errors
        assert after <= before * (1 + 1e-6)
        assert layer.swaps >= 0
    first = find_blocks(refined)[0].name  # later blocks get other inputs
    for name, weight in weights(plain).items():
        if name.startswith(f"{first}."):
            assert torch.equal((weight == 0).sum(dim=-1), (weights(refined)[name] == 0).sum(dim=-1))
    assert sum(layer.swaps for layer in report.layers) > 0
    assert "refined (damping 0.3): " in str(report)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_a_large_damping_leaves_the_mask_of_wanda(family, target):
    plain, refined = tiny.model(family), tiny.model(family)
    prune(plain, tiny.ids(), **target)
    report = prune(refined, tiny.ids(), refine=True, refine_damping=1e7, **target)
    assert all(layer.swaps == 0 for layer in report.layers)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), refined.parameters(), strict=True))


def test_the_error_is_that_of_the_calibration_data():
    """By the Gram matrix, and by the products themselves."""
    of = tiny.model()
    report = prune(of, tiny.ids(), sparsity=0.5, refine=True, exact_error=True)
    for layer in report.layers:
        assert layer.gram_errors[1] == pytest.approx(layer.exact_error, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"refine": True, "method": "sparsegpt"},
            "refine is for methods that keep the weights as they are, and 'spars",
        ),
        ({"refine": True, "method": "ablate_wanda_seq"}, "refine is for methods that keep the weights"),
        ({"refine_damping": 1.0}, "refine_damping 1 needs refine=True"),
        ({"refine": True, "refine_damping": -1.0}, "refine_damping must be at least 0 and finite, got -1.0"),
        ({"refine": True, "refine_damping": float("nan")}, "refine_damping must be at least 0 and finite, got nan"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny.model(), tiny.ids(), **options)


def test_command(tmp_path, capsys):
    saved.save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(saved.text(4000))
    data = ["--calibration", tmp_path / "text.txt", "--samples", "8", "--length", "32"]
    command = ["prune", tmp_path / "model", "--out", tmp_path / "out", "--refine", "--refine-damping", "1", *data]
    code, stdout, _ = call(capsys, *command)
    assert code == 0
    assert "refined (damping 1): " in stdout
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert all(layer["gram_errors"][1] <= layer["gram_errors"][0] for layer in report["layers"])
    assert report["refine_damping"] == 1
    code, _, stderr = call(capsys, *command, "--method", "sparsegpt", "--overwrite")
    assert code == 2
    assert "--refine is for methods that keep the weights as they are" in stderr


def test_a_spec_says_its_steps_by_their_arguments():
    """What a run was begun with, and how it differs from one that goes on with it."""
    told = PruneSpec(sparsity=0.5, refine=True, refine_damping=1.0).to_dict()
    assert (told["refine"], told["refine_damping"]) == (True, 1.0)
    assert (told["update"], told["update_damping"], told["update_steps"]) == (False, None, None)
