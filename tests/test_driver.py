"""prune(): against a plain loop, repeatability, options, refusals, and what it leaves behind."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from benchmarks.official import OfficialRun
from wanda_kernels import prune
from wanda_kernels.memory import in_files
from wanda_kernels.pruning.blocks import count_zeros, find_blocks
from wanda_kernels.pruning.report import Progress


def masks(model) -> dict[str, torch.Tensor]:
    return {name: parameter == 0 for name, parameter in model.named_parameters() if ".layers." in name}


def assert_same_model(left, right):
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "phi3"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_masks_of_the_official_loop(family, target):
    ours = tiny.model(family)
    official = copy.deepcopy(ours)
    prune(ours, tiny.ids(), **target)
    pattern = tuple(map(int, target["pattern"].split(":"))) if "pattern" in target else None
    OfficialRun(stable=True).prune(official, tiny.ids(), target.get("sparsity", 0.5), pattern)
    assert_same_model(ours, official)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_size_and_threads_do_not_change_a_bit(dtype):
    expected = tiny.model(dtype=dtype)
    prune(expected, tiny.ids(), batch_size=1)
    threads = torch.get_num_threads()
    try:
        for batch_size, count in ((2, 1), (5, 2), (3, 4)):
            torch.set_num_threads(count)
            model = tiny.model(dtype=dtype)
            prune(model, tiny.ids(), batch_size=batch_size)
            assert_same_model(model, expected)
    finally:
        torch.set_num_threads(threads)


def test_dense_propagation_takes_all_statistics_from_the_dense_model():
    model = tiny.model()
    hidden_sizes = tiny.ids()
    inputs = {}

    def keep(name):
        return lambda _module, args: inputs.setdefault(name, []).append(args[0].flatten(0, -2))

    dense = copy.deepcopy(model)
    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        dense(input_ids=hidden_sizes, use_cache=False)
    for handle in handles:
        handle.remove()
    prune(model, tiny.ids(), propagate="dense")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            norm = torch.cat(inputs[name]).norm(dim=0)
            original = dense.get_submodule(name).weight
            order = torch.sort(original.abs() * norm, dim=1, stable=True).indices
            mask = torch.zeros_like(original, dtype=torch.bool).scatter_(1, order[:, : original.shape[1] // 2], True)
            # the norms here are not the driver's to the last bit
            assert ((module.weight == 0) != mask).sum() <= 2, name


def test_magnitude_is_the_official_threshold_per_matrix():
    model = tiny.model()
    before = tiny.weights(model)
    report = prune(model, method="magnitude", sparsity=0.3)
    for layer in report.layers:
        weight = before[f"{layer.name}.weight"]
        threshold = torch.sort(weight.abs().flatten()).values[int(weight.numel() * 0.3)]
        assert torch.equal(model.get_submodule(layer.name).weight, weight.masked_fill(weight.abs() <= threshold, 0))
    assert report.samples == 0


def test_magnitude_at_2_4():
    model = tiny.model()
    before = tiny.weights(model)
    prune(model, method="magnitude", pattern="2:4")
    name = "model.layers.1.mlp.up_proj.weight"
    groups = before[name].abs().view(96, -1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(2, dim=2, largest=False).indices, True)
    assert torch.equal(model.get_parameter(name), before[name].masked_fill(mask.view(96, 64), 0))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_sparsity_zero_changes_nothing(method, propagate):
    model = tiny.model()
    before = tiny.weights(model)
    report = prune(model, tiny.ids(), sparsity=0, method=method, propagate=propagate)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(layer.estimated_error == 0 for layer in report.layers)


def test_more_than_128_samples():
    report = prune(tiny.model(), tiny.ids(samples=150, length=8))
    assert report.samples == 150
    assert report.achieved_sparsity == pytest.approx(0.5)


def test_report(capsys):
    report = prune(tiny.model(), tiny.ids(), pattern="2:4", exact_error=True)
    data = json.loads(report.to_json())
    assert data["pattern"] == "2:4"
    assert data["samples"] == 5
    assert data["achieved_sparsity"] == 0.5
    assert len(data["layers"]) == 21
    assert data["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert data["layers"][0]["shape"] == [64, 64]
    assert set(data["seconds"]) == {"forward", "statistics", "selection", "exact error"}
    text = str(report)
    assert "down_proj" in text
    assert "50.00%" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "seconds" not in json.dumps(report.to_dict(seconds=False))


def test_errors_of_the_report_are_what_they_say():
    model = tiny.model()
    dense = copy.deepcopy(model)
    inputs = []
    handle = dense.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        dense(input_ids=tiny.ids(), use_cache=False)
    handle.remove()
    report = prune(model, tiny.ids(), exact_error=True)
    layer = next(layer for layer in report.layers if layer.name == "model.layers.0.mlp.gate_proj")
    x = inputs[0].flatten(0, 1)
    before = dense.model.layers[0].mlp.gate_proj.weight.detach()
    after = model.model.layers[0].mlp.gate_proj.weight.detach()
    exact = (x @ (before - after).t()).norm() / (x @ before.t()).norm()
    assert layer.exact_error == pytest.approx(float(exact), rel=1e-4)
    scores = before.abs() * x.norm(dim=0)
    estimated = scores.masked_fill(after != 0, 0).norm() / scores.norm()
    assert layer.estimated_error == pytest.approx(float(estimated), rel=1e-4)


def test_exact_error_does_not_change_the_masks():
    plain, measured = tiny.model(), tiny.model()
    prune(plain, tiny.ids())
    prune(measured, tiny.ids(), exact_error=True)
    assert_same_model(plain, measured)


def test_progress_counts_every_step():
    class Counting(Progress):
        total = done = blocks = 0

        def start(self, steps):
            self.total = steps

        def advance(self):
            self.done += 1

        def block(self, name, layers):
            self.blocks += 1

    for options in ({}, {"propagate": "dense"}, {"exact_error": True}, {"method": "magnitude"}):
        progress = Counting()
        prune(tiny.model(), tiny.ids(), batch_size=2, progress=progress, **options)
        assert progress.done == progress.total > 0
        assert progress.blocks == 3


def test_the_model_is_left_as_it_was_found():
    model = tiny.model().train()
    model.model.layers[0].eval()
    prune(model, tiny.ids())
    assert model.training
    assert not model.model.layers[0].training
    assert all("forward" not in block.__dict__ for block in model.model.layers)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_on_the_way_leaves_no_hook_behind():
    model = tiny.model()
    model.model.layers[1].mlp.act_fn.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        prune(model, tiny.ids())
    assert all("forward" not in block.__dict__ for block in model.model.layers)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_name_the_layer_and_change_nothing(value):
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    before = tiny.weights(model)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or inf"):
        prune(model, tiny.ids())
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


def test_non_finite_inputs_name_the_layer():
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"the input of model\.layers\.1\.mlp\.gate_proj holds NaN or inf"):
        prune(model, tiny.ids())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.5}, r"sparsity must be in \[0, 1\), got -0.5"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), got nan"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give sparsity or pattern, not both"),
        ({"pattern": "4:2"}, "pattern must be N:M with 0 < N < M, for instance 2:4, got '4:2'"),
        ({"pattern": "4:4"}, "pattern must be N:M"),
        ({"pattern": "0:4"}, "pattern must be N:M"),
        ({"pattern": "two"}, "pattern must be N:M"),
        ({"pattern": "2:5"}, r"model\.layers\.0\.self_attn\.q_proj has 64 input columns, not a multiple of .* M = 5"),
        (
            {"method": "wonda"},
            "method must be one of wanda, magnitude, sparsegpt, ria, .*, got 'wonda'",
        ),
        ({"propagate": "both"}, "propagate must be one of pruned, dense, got 'both'"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"input_ids": None}, "method 'wanda' needs input_ids"),
        ({"input_ids": torch.zeros(0, 8, dtype=torch.int64)}, r"input_ids must be .* not empty, got \[0, 8\]"),
        ({"input_ids": torch.zeros(8, dtype=torch.int64)}, r"input_ids must be \[samples, length\]"),
        ({"input_ids": torch.full((2, 8), 128)}, r"input_ids must be in \[0, 128\), .* from 128 to 128"),
    ],
    ids=str,
)
def test_bad_arguments_change_nothing(options, message):
    model = tiny.model()
    before = tiny.weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **({"input_ids": tiny.ids()} | options))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_float_input_ids_are_refused():
    with pytest.raises(TypeError, match=r"input_ids must be int64, got torch.float32"):
        prune(tiny.model(), torch.zeros(2, 8))


def test_a_layer_that_gets_no_input_is_refused():
    model = tiny.model()
    for name in ("unused", "unused_too"):  # none is large, both together are
        model.model.layers[0].mlp.add_module(name, torch.nn.Linear(64, 80))
    told = r"unused received no input .* leave \d+\.\d% of its block's weights dense \(.* 2\d\.\d%\)"
    with pytest.raises(ValueError, match=told):
        prune(model, tiny.ids())


def test_a_small_layer_that_gets_no_input_stays_dense_and_is_listed():
    model = tiny.model()
    model.model.layers[0].mlp.unused = torch.nn.Linear(64, 16)
    before = model.model.layers[0].mlp.unused.weight.clone()
    report = prune(copy.deepcopy(model), tiny.ids())
    assert {name: round(share, 4) for name, share in report.dense.items()} == {"model.layers.0.mlp.unused": 0.0323}
    assert "stays dense: mlp.unused (3.2% of a block, 1 blocks)" in str(report)
    assert torch.equal(model.model.layers[0].mlp.unused.weight, before)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.unused received no input during calibration"):
        prune(model, tiny.ids(), require_all=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (300, 64), (1, 1), (0, 4), (3, 0)], ids=str)
def test_zeros_of_both_signs_are_counted(dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[weight.abs() < 0.5] = 0
    weight[weight < -1] = -0.0
    for view in (weight, weight.t(), weight[:, ::2]):
        assert count_zeros(view) == int((view == 0).sum())


def test_a_mapped_model_is_pruned_in_memory_of_its_own(tmp_path):
    """The same bits; the file stays as it is, whatever is written; nothing of a block is left in the mapping."""
    tiny.model(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    held = copy.deepcopy(model)
    seen = model.model.layers[0].mlp.up_proj.weight.data  # by somebody who has written to it
    for changed in (model, held):
        changed.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    written = seen.clone()
    weights = [matrix.weight for block in find_blocks(model) for matrix in block.matrices.values()]
    assert len(in_files(weights)) == len(weights)
    report = prune(model, tiny.ids())
    assert in_files(weights) == []
    prune(held, tiny.ids())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), held.parameters(), strict=True))
    assert torch.equal(seen, written)
    assert report.seconds["load"] > 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
