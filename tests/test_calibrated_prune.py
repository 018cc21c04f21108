"""prune(values="int4"): weights that are levels times scales, on the mask of any method, and packed as they are."""

from __future__ import annotations

import json

import pytest
import saved
import tiny
import torch
from safetensors.torch import load_file
from test_cli import call
from test_refine_prune import weights

from wanda_kernels import compress, decompress, prune
from wanda_kernels.models import load_model
from wanda_kernels.packed.model import Packing, packed_layers
from wanda_kernels.packed.values import ValueType, quantize, quantized_before
from wanda_kernels.pruning.blocks import find_blocks
from wanda_kernels.streaming import stream_prune

pytestmark = pytest.mark.usefixtures("one_thread")

KIND = ValueType(4, 32)
INT4 = {"values": "int4", "group_size": 32}
WAYS = [
    {"refine": True, "update": True}, {"pattern": "2:4", "update": True}, {"method": "sparsegpt", "block_size": 32},
    {"method": "magnitude"}, {"propagate": "dense", "exact_error": True, "batch_size": 1},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_packing_finds_what_pruning_chose(family, way, dtype):
    plain, of = tiny.model(family, dtype), tiny.model(family, dtype)
    ids = tiny.ids(8, 32)
    prune(plain, ids, **way)
    report = prune(of, ids, **way, **INT4)
    first = find_blocks(of)[0].name  # later blocks get other inputs
    before, now = weights(plain), weights(of)
    for name, weight in now.items():
        rows = weight.flatten(0, -2)
        assert quantized_before(rows, KIND) is not None, name
        if name.startswith(f"{first}."):
            assert not weight[before[name] == 0].any()
            assert not torch.equal(before[name], weight)
    for layer in report.layers:
        assert len(layer.gram_errors) == 2 + ("refine" in way) + ("update" in way)
        assert layer.gram_errors[-1] > 0
    assert "rounded to int4 (groups of 32); mean error of a layer " in str(report)
    dense = tiny.weights(of)
    expected = of(ids).logits
    compress(of, **INT4)
    assert packed_layers(of)
    # its products round their inputs, too
    torch.testing.assert_close(of(ids).logits, expected, rtol=0.1, atol=0.1)
    decompress(of)
    for name, weight in tiny.weights(of).items():
        assert torch.equal(weight, dense[name]), name


def test_the_error_is_that_of_the_calibration_data():
    """By the Gram matrix, and by the products themselves."""
    report = prune(tiny.model(), tiny.ids(8, 32), exact_error=True, **INT4)
    for layer in report.layers:
        assert layer.gram_errors[1] == pytest.approx(layer.exact_error, rel=1e-3)


def inputs_of(of, block, names, ids):
    """Layer -> [tokens, C_in]."""
    inputs = {}
    hooks = []
    for name in names:

        def keep(_, args, name=name):
            inputs[name] = args[0].detach().flatten(0, 1)

        hooks.append(block.module.get_submodule(name).register_forward_pre_hook(keep))
    of(ids)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_model_that_is_pruned_already(pattern):
    """sparsity=0 prunes nothing: zeros stay, and outputs are nearer to what they were than the nearest values'."""
    ids = tiny.ids(16, 32)
    of = tiny.model()
    prune(of, ids, pattern=pattern)
    before = weights(of)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # whose inputs rounding does not change
    first = find_blocks(of)[0]
    inputs = inputs_of(of, first, names, ids)
    report = prune(of, ids, sparsity=0, **INT4)
    for name, weight in weights(of).items():
        assert not weight[before[name] == 0].any()
    norms = {layer.name: layer.gram_errors for layer in report.layers}
    assert all(errors[0] == 0 for errors in norms.values())
    for name in names:
        whole = f"{first.name}.{name}"
        dense, x = before[whole], inputs[name]
        levels, scales = quantize(dense, KIND)
        nearest = levels * scales.float().repeat_interleave(32, dim=1)
        errors = [
            float((x @ (weight - dense).T).norm() / (x @ dense.T).norm()) for weight in (weights(of)[whole], nearest)
        ]
        assert errors[0] == pytest.approx(norms[whole][1], rel=1e-3)
        assert errors[0] < errors[1]


def test_layers_that_stay_dense_are_not_rounded():
    for family, options in (("gpt2", {"update": True}), ("llama", {"sparsity": 0})):
        of, plain = tiny.model(family), tiny.model(family)
        report = prune(of, tiny.ids(), **options, **INT4)
        prune(plain, tiny.ids(), **options)
        assert all(torch.equal(a, b) for a, b in zip(of.parameters(), plain.parameters(), strict=True))
        assert all(layer.gram_errors[-1] == layer.gram_errors[-2] for layer in report.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int8"}, "values must be float or int4, got 'int8': calibration wins nothing"),
        ({"values": "int3"}, "values must be float, int8 or int4, got 'int3'"),
        ({"values": "int4", "group_size": 48}, "group_size must be 32, 64 or 128 with values int4, got 48"),
        ({"group_size": 64}, "group_size 64 needs values int8 or int4"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny.model(), tiny.ids(), **options)
    with pytest.raises(ValueError, match=r"method 'magnitude'.* needs input_ids"):
        prune(tiny.model(), method="magnitude", **INT4)


def test_streamed_then_packed(tmp_path):
    saved.save_model(tmp_path / "model", dtype=torch.bfloat16)
    stream_prune(tmp_path / "model", tmp_path / "pruned", tiny.ids(), update=True, **INT4)
    of = load_model(str(tmp_path / "pruned"), "auto", "cpu")
    assert all(quantized_before(weight, KIND) is not None for weight in weights(of).values())


def packed_values(folder):
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if n.endswith((".weight", "scales"))}


def test_a_format_that_some_weights_do_not_fit_takes_no_chosen_values(tmp_path):
    """They would be rounded, and stay dense; said before the work."""
    saved.save_model(tmp_path / "model")
    how = {"sparsity": 0.5, "values": "int4", "packing": Packing("2:4", "int4")}
    with pytest.raises(ValueError, match="format must be auto or bitmap where values are chosen, got 2:4"):
        stream_prune(tmp_path / "model", tmp_path / "out", tiny.ids(), **how)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path, capsys):
    saved.save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(saved.text(4000))
    data = ["--calibration", tmp_path / "text.txt", "--samples", "8", "--length", "32"]
    int4 = ["--values", "int4", "--group-size", "64"]
    int8 = ["--values", "int8", "--group-size", "0"]
    command = ["prune", tmp_path / "model", "--compress", *int4, *data]
    for name, options, is_calibrated in (
        ("updated", ["--update"], True),
        ("nearest", ["--update", "--no-calibrate"], False),
        ("plain", [], False),
        ("asked for", ["--calibrate"], True),
    ):
        code, said, _ = call(capsys, *command, *options, "--out", tmp_path / name)
        assert code == 0
        assert "21 bitmap int4" in said
        assert ("rounded to int4 (groups of 64); mean error of a layer " in said) == is_calibrated
        report = json.loads((tmp_path / name / "pruning_report.json").read_text())
        assert report.get("values") == ("int4" if is_calibrated else None)
    found = [packed_values(tmp_path / name) for name in ("updated", "nearest")]
    assert not all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    assert call(capsys, "prune", tmp_path / "model", "--out", tmp_path / "pruned", *data)[0] == 0
    compressed = ["compress", tmp_path / "pruned", *int4]
    code, said, _ = call(capsys, *compressed, "--calibrate", *data, "--out", tmp_path / "calibrated")
    assert code == 0
    assert "rounded to int4 (groups of 64); mean error of a layer 0.000 before, " in said
    assert "21 bitmap int4" in said
    for wrong, message in (
        ([*command, "--calibrate", *int8], "--calibrate needs --values int4, got int8"),
        (["prune", tmp_path / "model", "--calibrate"], "--calibrate needs --values int4"),
        (["compress", tmp_path / "pruned", "--calibrate"], "--calibrate needs --values int4"),
        ([*compressed, *data], "options of the calibration data need --calibrate"),
        (
            [*compressed, *data, "--calibrate", "--format", "2:4"],
            "--format must be auto or bitmap",
        ),
    ):
        code, _, error = call(capsys, *wrong, "--out", tmp_path / "other")
        assert code == 2
        assert message in error
