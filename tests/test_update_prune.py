"""prune(update=True): what is kept makes up for what is not, on the mask of any method, refined or not."""

from __future__ import annotations

import json

import pytest
import saved
import tiny
import torch
from test_cli import call
from test_refine_prune import TARGETS, WAYS, weights

from wanda_kernels import compress, prune
from wanda_kernels.pruning.blocks import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_the_mask_stays_and_errors_are_smaller(family, way, target, refine):
    plain, updated = tiny.model(family), tiny.model(family)
    dense = weights(updated)
    ids = tiny.ids(8, 32)
    prune(plain, ids, refine=refine, **target, **way)
    report = prune(updated, ids, refine=refine, update=True, **target, **way)
    for layer in report.layers:
        assert len(layer.gram_errors) == 2 + refine
        *_, before, after = layer.gram_errors
        assert 0 < after <= before * (1 + 1e-6)
        assert (layer.swaps is not None) == refine
    first = find_blocks(updated)[0].name  # later blocks get other inputs
    before, now = weights(plain), weights(updated)
    for name, weight in now.items():
        if name.startswith(f"{first}."):
            assert torch.equal(before[name] == 0, weight == 0)
            assert not torch.equal(before[name], weight)
            assert not torch.equal(weight[weight != 0], dense[name][weight != 0])
        if target.get("pattern"):
            n, m = map(int, target["pattern"].split(":"))
            assert (weight.unflatten(-1, (-1, m)).ne(0).sum(-1) <= n).all()
    assert "updated (damping 0.3, 10 steps); mean error of a layer " in str(report)
    assert ("refined" in str(report)) == refine


def test_the_error_is_that_of_the_calibration_data():
    """By the Gram matrix, and by the products themselves; and no error of a layer is larger than one step before."""
    of = tiny.model()
    report = prune(of, tiny.ids(), sparsity=0.5, refine=True, update=True, update_damping=0.03, exact_error=True)
    for layer in report.layers:
        assert layer.gram_errors[2] == pytest.approx(layer.exact_error, rel=1e-3)
        assert layer.gram_errors == sorted(layer.gram_errors, reverse=True)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_large_damping_leaves_the_weights(family):
    plain, updated = tiny.model(family), tiny.model(family)
    prune(plain, tiny.ids(), sparsity=0.5)
    report = prune(updated, tiny.ids(), sparsity=0.5, update=True, update_damping=1e12)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), updated.parameters(), strict=True))
    assert all(layer.gram_errors[0] == layer.gram_errors[1] for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updated_weights_of_16_bits_pack(dtype):
    of = tiny.model("llama", dtype)
    prune(of, tiny.ids(), pattern="2:4", refine=True, update=True)
    expected = of(tiny.ids()).logits
    compress(of)
    # another order of the sums of 16-bit products
    torch.testing.assert_close(of(tiny.ids()).logits, expected, rtol=0.05, atol=0.05)


def test_owl_gives_each_block_its_own_share():
    of = tiny.model()
    report = prune(of, tiny.ids(), sparsity=0.6, owl=True, update=True)
    assert all(layer.gram_errors[1] <= layer.gram_errors[0] for layer in report.layers)
    assert report.achieved_sparsity == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"update": True, "method": "sparsegpt"},
            "update is for methods that keep the weights as they are, and 'spars",
        ),
        ({"update": True, "method": "ablate_mag_iter"}, "update is for methods that keep the weights"),
        ({"update_damping": 1.0}, "update_damping 1 needs update=True"),
        ({"update_steps": 5, "refine": True}, "update_steps 5 needs update=True"),
        ({"update": True, "update_damping": -1.0}, "update_damping must be at least 0 and finite, got -1.0"),
        ({"update": True, "update_damping": float("inf")}, "update_damping must be at least 0 and finite, got inf"),
        ({"update": True, "update_steps": 0}, "update_steps must be a whole number, at least 1, got 0"),
        ({"update": True, "update_steps": 2.5}, "update_steps must be a whole number, at least 1, got 2.5"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny.model(), tiny.ids(), **options)


def test_command(tmp_path, capsys):
    saved.save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(saved.text(4000))
    data = ["--calibration", tmp_path / "text.txt", "--samples", "8", "--length", "32"]
    command = ["prune", tmp_path / "model", "--out", tmp_path / "out", *data]
    code, stdout, _ = call(capsys, *command, "--refine", "--update", "--update-damping", "1", "--update-steps", "4")
    assert code == 0
    assert "refined (damping 0.3): " in stdout
    assert "updated (damping 1, 4 steps); mean error of a layer " in stdout
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert all(len(layer["gram_errors"]) == 3 for layer in report["layers"])
    assert (report["refine_damping"], report["update_damping"], report["update_steps"]) == (0.3, 1, 4)
    for options, message in [
        (["--update", "--method", "sparsegpt"], "--update is for methods that keep the weights as they are"),
        (["--update-damping", "1"], "--update-damping 1 needs --update"),
        (["--update-steps", "1"], "--update-steps 1 needs --update"),
    ]:
        code, _, stderr = call(capsys, *command, *options, "--overwrite")
        assert code == 2
        assert message in stderr
