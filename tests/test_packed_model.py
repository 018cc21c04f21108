"""Packed models: in place, through transformers, on the command line, and what damages them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import saved
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_kernels import compress, decompress, prune
from wanda_kernels.cli.app import main
from wanda_kernels.models import load_model
from wanda_kernels.packed import PackedLinear, dispatch, keep_prefill_copies

WIDE = {"hidden_size": 128, "intermediate_size": 192}


@pytest.fixture(autouse=True)
def fixed_dispatch():
    """Timed choices may differ from run to run, and with them the last bits."""
    dispatch.clear()
    yield
    dispatch.clear()


def pruned(pattern: str | None = None, dtype: torch.dtype = torch.bfloat16, family: str = "llama"):
    model = tiny.model(family, dtype, **WIDE)
    prune(model, tiny.ids(), sparsity=None if pattern else 0.5, pattern=pattern)
    return model


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama biases", "llama tied", "phi3"])
def test_round_trip_in_place(pattern, dtype, family):
    model = pruned(pattern, dtype, family)
    before = tiny.weights(model)
    with torch.no_grad():
        expected = model(tiny.ids()).logits
        report = compress(model)
        assert set(report.formats.values()) == {pattern or "bitmap"}
        assert report.packed_bytes < report.dense_bytes * (0.6 if dtype != torch.float32 else 0.56)
        tolerance = {"rtol": 0, "atol": 2e-2 if dtype != torch.float32 else 1e-5}
        torch.testing.assert_close(model(tiny.ids()).logits, expected, **tolerance)
        one = tiny.ids()[:1, :3]  # few enough tokens for the packed product
        got = model(one).logits
        decompress(model)
        torch.testing.assert_close(got, model(one).logits, **tolerance)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_through_transformers(tmp_path, pattern):
    model = pruned(pattern)
    compress(model)
    model.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, PackedLinear)
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(again.state_dict()[name], tensor)
    generated = again.generate(tiny.ids()[:1].to(again.device), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 28)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert wide.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    decompress(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


WITHOUT_THE_IMPORT = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError:  # of transformers, to which the packed tensors are others than the model's
    import wanda_kernels
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    sys.exit("it was loaded")
"""
AFTER_THE_IMPORT = """
import sys, wanda_kernels
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_without_the_import_loading_fails(tmp_path):
    """Never a model with random weights."""
    model = pruned()
    compress(model)
    model.save_pretrained(tmp_path)
    for program in (WITHOUT_THE_IMPORT, AFTER_THE_IMPORT):
        command = [sys.executable, "-c", program, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [2, 40])  # more than the operators multiply with the packed weight, too
@pytest.mark.parametrize("values", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile(tokens, values, dtype):
    model = pruned("2:4", dtype)
    compress(model, values=values)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(tokens, 192).to(dtype)
    layer(x)  # validates
    torch.compiler.reset()
    called = []

    def backend(graph, _inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if "wanda" in str(node.target))
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    assert called == [f"wanda.{'sparse24' if values == 'float' else 'quantized'}_linear.default"]  # no unpacked weight


@pytest.mark.parametrize("form", ["bitmap", "2:4"])
def test_many_tokens_unpack_no_whole_weight(form):
    dense = torch.nn.Linear(64, 100000)  # 24 MiB: two bands at least
    dense.weight.data[:, 2:] = 0
    layer = PackedLinear.from_linear(dense, form)
    x = torch.randn(1, 40, 64)  # y: 15 MiB; more tokens than the packed product takes at once
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        y = layer._dense_product(x, layer.packed(), layer.bias)
    assert 2 << 20 <= max(event.self_cpu_memory_usage for event in profile.events()) <= 16 << 20
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(layer._packed_product(x, layer.packed(), layer.bias), dense(x))
    torch.testing.assert_close(layer(x), dense(x))
    x.requires_grad_()
    layer(x).sum().backward()  # with gradients, in one piece
    torch.testing.assert_close(x.grad[0, 0], dense.weight.sum(0))
    meta = layer(torch.randn(40, 64)).shape
    dispatch.clear()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(40, 64)).shape == meta


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "weight",
            lambda t: t[:-1],
            r"does not fit its config.json: weight is BF16 \[\d+\], it must be bfloat16 \[\d+\]",
        ),
        ("weight_bitmap", lambda t: t ^ 1, "is damaged: its row starts do not fit its bitmap"),
        ("weight_starts", lambda t: t + 2**30, "is damaged: its row starts do not fit its bitmap"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, name, damage, message):
    model = pruned()
    compress(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = f"model.layers.1.self_attn.o_proj.{name}"
    tensors[key] = damage(tensors[key]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "packed in version 2, this wanda_kernels knows 1"),
        ({"version": "1"}, "packed in version '1', this wanda_kernels knows 1"),
        (
            {"layers": {"model.layers.9.mlp.up_proj": {"format": "2:4"}}},
            "names model.layers.9.mlp.up_proj, which is no",
        ),
        ({"layers": {"model.norm": {"format": "2:4"}}}, "names model.norm, which is no linear layer"),
        ({"layers": {"model.layers.0.mlp.up_proj": {"format": "zip"}}}, "is described as"),
        ({"layers": {"model.layers.0.mlp.up_proj": {"format": "bitmap", "kept": -40}}}, "is described as"),
    ],
)
def test_strange_configs_are_refused(tmp_path, change, message):
    model = pruned()
    compress(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_refusals():
    model = tiny.model(**WIDE)
    with pytest.raises(
        ValueError, match=r"can be packed: q_proj, .* too few of its weights are zero .*: prune it first"
    ):
        compress(model)
    with pytest.raises(ValueError, match=r"can be packed as 2:4: .*keep more than two weights"):
        compress(pruned(), "2:4")
    with pytest.raises(ValueError, match="format must be auto, bitmap or 2:4, got 'zip'"):
        compress(model, "zip")
    with pytest.raises(ValueError, match="the model is not packed"):
        decompress(model)
    model = pruned()
    compress(model)
    with pytest.raises(ValueError, match="the model is packed already"):
        compress(model)
    with pytest.raises(ValueError, match="the model is packed: unpack it first"):
        prune(model, tiny.ids())


def test_layers_that_do_not_shrink_stay_dense():
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    report = compress(model)
    assert report.formats["model.layers.0.mlp.up_proj"] == "dense"
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert "1 dense" in str(report)
    assert "dense: up_proj (1 layers, the first is model.layers.0.mlp.up_proj): too few" in str(report)


def test_what_is_not_a_plain_linear_layer_stays_dense_and_computes_what_it_did():
    class Rounded(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, torch.round(self.weight * 64) / 64, self.bias)

    model = pruned()
    layers = model.model.layers
    layers[0].mlp.up_proj.__class__ = Rounded
    layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    layers[2].mlp.up_proj.forward = lambda x: x.repeat(1, 1, 2)[..., :192]
    with torch.no_grad():
        before = model(input_ids=tiny.ids()).logits
        report = compress(model)
        after = model(input_ids=tiny.ids()).logits
    reasons = [report.dense[f"model.layers.{index}.mlp.up_proj"] for index in range(3)]
    for reason, cause in zip(reasons, ("it is a Rounded", "it has hooks", "it has a forward of its own"), strict=True):
        assert cause in reason
    assert len(report.dense) == 3
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_any_width_is_packed(target, values, tmp_path):
    model = tiny.model(hidden_size=96, intermediate_size=160, head_dim=24)
    prune(model, tiny.ids(), **target)
    dense = copy.deepcopy(model)
    report = compress(model, values=values)
    assert not report.dense
    layer = model.model.layers[0].mlp.gate_proj
    assert (layer.in_features, layer.columns) == (96, 128)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tiny.ids()).logits, model(tiny.ids()).logits, rtol=0, atol=0)
    x = torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.unpacked().sum(dim=0).expand(2, -1))
    if values == "float":
        torch.testing.assert_close(model(tiny.ids()).logits, dense(tiny.ids()).logits)
        decompress(model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_compiled_model_is_packed_under_its_own_names(tmp_path):
    model = torch.compile(pruned())
    compress(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    decompress(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_dense_layer(pattern, dtype):
    packed = pruned(pattern=pattern).to(dtype)
    dense = copy.deepcopy(packed)
    compress(packed)
    for kind in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=kind):
            want, got = dense(input_ids=tiny.ids()).logits, packed(input_ids=tiny.ids()).logits
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


def test_memory_that_was_never_filled_is_refused():
    model = pruned()
    compress(model)
    shapes = copy.deepcopy(model).to("meta")(input_ids=tiny.ids().to("meta")).logits
    assert shapes.shape == (5, 24, 128)
    empty = model.to("meta").to_empty(device="cpu")
    layer = empty.model.layers[0].mlp.up_proj
    layer.weight_starts.fill_(2**30)
    with pytest.raises(ValueError, match="row starts do not fit"):
        layer(torch.randn(1, layer.in_features, dtype=torch.bfloat16))


@pytest.mark.parametrize("form", ["bitmap", "2:4"])
def test_a_packed_checkpoint_that_lacks_a_tensor_is_refused(form, tmp_path):
    """By transformers' own from_pretrained, which would fill it with what is in memory."""
    model = pruned("2:4" if form == "2:4" else None, family="llama biases")
    compress(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    layer = "model.layers.1.self_attn.q_proj"
    names = [name for name in held if name.startswith(layer)]
    assert len(names) == {"bitmap": 4, "2:4": 3}[form]
    for name in (*names, "model.norm.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"):
        save_file({key: tensor for key, tensor in held.items() if key != name}, path, {"format": "pt"})
        for load in (AutoModelForCausalLM.from_pretrained, load_model):
            with pytest.raises(ValueError, match=f"lack {name}"):
                load(str(tmp_path))


def test_command_line(tmp_path, capsys):
    source = saved.save_model(tmp_path / "dense", **WIDE)
    (tmp_path / "text.txt").write_text(saved.text(3000))
    common = ["--calibration", str(tmp_path / "text.txt"), "--samples", "4", "--length", "64"]
    packed, plain, back = (str(tmp_path / name) for name in ("packed", "plain", "back"))
    assert run("prune", str(source), "--out", packed, *common, "--dtype", "bfloat16", "--compress") == 0
    assert "packed 21 bitmap" in capsys.readouterr().out
    assert run("prune", str(source), "--out", plain, *common, "--dtype", "bfloat16") == 0
    assert run("decompress", packed, "--out", back) == 0
    for name, tensor in load_file(Path(plain) / "model.safetensors").items():
        assert torch.equal(load_file(Path(back) / "model.safetensors")[name], tensor)
    assert run("compress", plain, "--out", packed) == 1
    assert "is not empty" in capsys.readouterr().err
    assert run("compress", plain, "--out", packed, "--overwrite", "--format", "zip") == 2
    assert "format must be auto, bitmap or 2:4, got 'zip'" in capsys.readouterr().err
    assert run("compress", packed, "--out", str(tmp_path / "x")) == 1
    assert "the model is packed already" in capsys.readouterr().err
    assert run("decompress", plain, "--out", str(tmp_path / "x")) == 1
    assert "the model is not packed" in capsys.readouterr().err
    assert run("eval", packed, "--text", str(tmp_path / "text.txt"), "--length", "64") == 0
    assert "perplexity" in capsys.readouterr().out


def test_prefill_copies_that_cannot_be():
    layer = torch.nn.Linear(64, 32).to(torch.bfloat16)
    layer.weight.data[:, ::2] = 0
    message = r"needs 2:4 in a 16-bit type on CUDA, got a layer of \[32, 64\], {}, torch.bfloat16 on cpu"
    for form in ("bitmap", "2:4"):
        with pytest.raises(ValueError, match=message.format(form)):
            PackedLinear.from_linear(layer, form).keep_prefill_copy()
    with pytest.raises(ValueError, match="no linear layer that is packed as 2:4"):
        keep_prefill_copies(layer)
