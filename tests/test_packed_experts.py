"""Packed experts: their products, whole models in place and through transformers, and what damages them."""

from __future__ import annotations

import copy
import json
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_kernels import compress, decompress, prune
from wanda_kernels.models import load_model
from wanda_kernels.packed import PackedExperts, PackedLinear, dispatch, format, keep_prefill_copies
from wanda_kernels.packed.experts import PackedStack
from wanda_kernels.packed.model import dense_layers, packed_layers

pytestmark = pytest.mark.usefixtures("one_thread")

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "intermediate_size": 128}
ROUTED = {
    "intermediate_size": 128, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "mixtral": MOE,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 2},
    "gpt_oss": MOE | {"head_dim": 16, "sliding_window": 8},  # transposed, biases
    "deepseek_v3": ROUTED
    | {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
       "moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_key_value_heads": 4, "num_hidden_layers": 2},
    "nemotron_h": ROUTED  # no gate
    | {"layers_block_type": ["attention", "moe", "attention", "moe"], "num_hidden_layers": 4, "head_dim": 16,
       "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "mamba_num_heads": 4,
       "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    "llama4_text": MOE | {"intermediate_size_mlp": 64, "head_dim": 16, "interleave_moe_layer_step": 1},  # all tokens
    "longcat_flash": ROUTED  # more weights than experts, some of which hand on
    | {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
       "expert_ffn_hidden_size": 64, "ffn_hidden_size": 128, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2,
       "num_key_value_heads": 4, "head_dim": 16},
}  # fmt: skip
NAMES = dict.fromkeys(FAMILIES, "model.layers.1.mlp.experts") | {
    "nemotron_h": "model.layers.1.mixer.experts", "llama4_text": "model.layers.1.feed_forward.experts",
    "longcat_flash": "model.layers.0.mlp.experts",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fixed_dispatch():
    """Timed choices may differ from run to run, and with them the last bits."""
    dispatch.clear()
    yield
    dispatch.clear()


def pruned(family: str, pattern: str | None = None, dtype: torch.dtype = torch.float32, **changes):
    of = tiny.model(family, dtype, **FAMILIES[family] | changes)
    target = {"pattern": pattern} if pattern else {"sparsity": 0.5, "group": "row"}
    prune(of, method="magnitude", **target)
    return of


def logits(of, **options):
    with torch.no_grad():
        return of(input_ids=tiny.ids(), use_cache=False, **options).logits


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_in_place(family, dtype, pattern):
    of = pruned(family, pattern, dtype)
    before, expected = tiny.weights(of), logits(of)
    kinds = {name: type(module) for name, module in of.named_modules()}
    generated = of.generate(tiny.ids()[:2], max_new_tokens=6, do_sample=False)
    report = compress(of)
    experts = of.get_submodule(NAMES[family])
    assert isinstance(experts, PackedExperts)
    assert isinstance(experts, kinds[NAMES[family]])
    forms = {report.formats[f"{NAMES[family]}.{name}"] for name in experts.layout.names}
    if family == "longcat_flash":  # what is no expert's is not pruned either
        assert forms == {"bitmap", pattern or "bitmap"}
    else:
        assert forms == {pattern or "bitmap"}
        assert report.packed_bytes < report.dense_bytes * 0.6
    assert not any(parameter.dim() > 2 for name, parameter in of.named_parameters() if "experts" in name)
    tolerance = {"rtol": 0, "atol": 2e-2 if dtype != torch.float32 else 1e-5}
    torch.testing.assert_close(logits(of), expected, **tolerance)
    got = of.generate(tiny.ids()[:2], max_new_tokens=6, do_sample=False)
    if dtype == torch.float32:  # of bfloat16's logits many are the same
        assert torch.equal(got, generated)
    decompress(of)
    after = tiny.weights(of)
    assert list(before) == list(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: type(module) for name, module in of.named_modules()} == kinds
    torch.testing.assert_close(logits(of), expected, rtol=0, atol=0)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_through_transformers(tmp_path, family, pattern):
    """Under the hub's names for what is dense, whatever transformers converts on the way."""
    of = pruned(family, pattern, torch.bfloat16)
    dense = copy.deepcopy(of)
    compress(of)
    of.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(loaded.get_submodule(NAMES[family]), PackedExperts)
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="auto")
    ours = load_model(str(tmp_path / "a"), "auto", "cpu")
    for name, tensor in of.state_dict().items():
        for other in (loaded, again, ours):
            assert torch.equal(other.state_dict()[name].cpu(), tensor), name
    torch.testing.assert_close(logits(loaded), logits(of), rtol=0, atol=0)
    again.generate(tiny.ids()[:1].to(again.device), max_new_tokens=3, do_sample=False)
    decompress(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for (name, tensor), other in zip(dense.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_weight_is_packed_and_the_other_dense(tmp_path, family):
    of = pruned(family)
    experts = of.get_submodule(NAMES[family])
    experts.down_proj.data.fill_(0.5)
    expected = logits(of)
    report = compress(of)
    experts = of.get_submodule(NAMES[family])
    name = f"{NAMES[family]}.down_proj"
    assert report.formats[name] == "dense"
    assert "too few of its weights are zero" in report.dense[name]
    assert dense_layers(of) == {name: report.dense[name]}
    assert experts.stack_of("down_proj") is None
    torch.testing.assert_close(logits(of), expected, rtol=0, atol=1e-5)
    of.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(of), rtol=0, atol=0)
    decompress(loaded)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)


def test_what_stays_dense_is_named(monkeypatch):
    of = pruned("mixtral", intermediate_size=96)
    report = compress(of)
    assert report.formats["model.layers.0.mlp.experts.gate_up_proj"] == "bitmap"
    assert report.formats["model.layers.0.mlp.experts.down_proj"] == "bitmap"  # filled up
    of = pruned("mixtral")
    of.model.layers[0].mlp.experts.register_forward_hook(lambda module, inputs, output: output * 2)
    expected = logits(of)
    report = compress(of)
    assert report.dense["model.layers.0.mlp.experts.down_proj"] == "it has hooks, which would be lost"
    torch.testing.assert_close(logits(of), expected, rtol=0, atol=1e-5)
    jetmoe = tiny.model("jetmoe", **tiny.EXPERTS["jetmoe"])
    prune(jetmoe, method="magnitude", sparsity=0.5)
    report = compress(jetmoe)
    experts = {name: reason for name, reason in report.dense.items() if name.endswith("put_linear")}
    assert set(experts.values()) == {"experts of a JetMoeParallelExperts are not packed"}
    assert dense_layers(jetmoe) == report.dense
    monkeypatch.setattr(format, "MOST_VALUES", 20000)
    of = pruned("mixtral")
    assert compress(of).dense == {
        f"model.layers.{index}.mlp.experts.gate_up_proj": "it keeps 32768 values, a bitmap counts up to 20000"
        for index in range(2)
    }


def test_it_computes_by_itself_whatever_implementation_the_model_has():
    of = pruned("mixtral")
    compress(of)
    expected = logits(of)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        of.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(of), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_copies_and_types(family):
    of = pruned(family, dtype=torch.bfloat16)
    dense = copy.deepcopy(of)
    compress(of)
    expected = logits(of)
    again = copy.deepcopy(of)
    assert again.get_submodule(NAMES[family]).layout.module is again.get_submodule(NAMES[family])
    del of
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    make, made_of, state = again.get_submodule(
        NAMES[family]
    ).__reduce__()  # what copies, and processes, make it anew by
    rebuilt = make(*made_of)
    rebuilt.__dict__.update(state)
    again.set_submodule(NAMES[family], rebuilt)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(again.float()), logits(dense.float()), rtol=0, atol=1e-5)
    experts = again.get_submodule(NAMES[family]).to("meta")
    index = torch.zeros(5, 2, dtype=torch.long, device="meta")
    assert experts(torch.empty(5, 64, device="meta"), index, torch.empty(5, 2, device="meta")).shape == (5, 64)
    stack = experts.to_empty(device="cpu").packed_up
    stack.weight_starts.fill_(2**30)
    with pytest.raises(ValueError, match="row starts do not fit"):
        stack(torch.randn(1, stack.in_features), torch.ones(4, dtype=torch.int32))


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(pattern, dtype):
    packed = pruned("mixtral", pattern, dtype)
    dense = copy.deepcopy(packed)
    dense.set_experts_implementation("eager")  # which autocast reaches
    compress(packed)
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=kind):
            want, got = logits(dense), logits(packed)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


def test_gradients_of_inputs():
    of = pruned("mixtral")
    dense, experts = copy.deepcopy(of), NAMES["mixtral"]
    compress(of)
    found = []
    for one in (dense, of):
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        index = torch.arange(18).view(9, 2) % 3
        one.get_submodule(experts)(x, index, torch.full((9, 2), 0.5)).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_prefill_copies_are_for_linear_layers():
    of = pruned("mixtral", "2:4")
    for layer in of.model.layers:
        layer.self_attn = torch.nn.Identity()
    stack = PackedStack.from_weight(of.model.layers[0].mlp.experts.down_proj.data, "2:4")
    with pytest.raises(ValueError, match="no linear layer that is packed as 2:4"):
        keep_prefill_copies(torch.nn.ModuleList([stack]))


def test_torch_compile():
    of = pruned("mixtral")
    compress(of)
    experts = of.get_submodule(NAMES["mixtral"])
    x, index, shares = torch.randn(5, 64), torch.arange(10).view(5, 2) % 4, torch.full((5, 2), 0.5)
    expected = experts(x, index, shares)  # validates
    torch.compiler.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, shares), expected)


def saved(tmp_path, pattern=None, family="qwen3_moe"):
    of = pruned(family, pattern, torch.bfloat16)
    compress(of)
    of.save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


STACK = f"{NAMES['qwen3_moe']}.packed_down"


@pytest.mark.parametrize(
    ("pattern", "name", "damage", "message"),
    [
        (None, "weight", lambda t: t[:-1], r"weight is BF16 \[\d+\], it must be bfloat16 \[\d+\]"),
        (None, "weight_bitmap", lambda t: t ^ 1, "is damaged: its row starts do not fit its bitmap"),
        (None, "weight_starts", lambda t: t + 2**30, "is damaged: its row starts do not fit its bitmap"),
        (None, "weight_starts", lambda t: t[:-4], "weight_starts is I32"),
        ("2:4", "weight_indices", lambda t: t * 0, "is damaged: a group's two indices do not ascend"),
        ("2:4", "weight", lambda t: t[:-2], "weight is BF16"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, pattern, name, damage, message):
    file = saved(tmp_path, pattern)
    tensors = load_file(file)
    tensors[f"{STACK}.{name}"] = damage(tensors[f"{STACK}.{name}"]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises((ValueError, RuntimeError), match=message) as raised:
            load(str(tmp_path))
        assert STACK in str(raised.value)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # under other names in the files, and under the model's
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_checkpoint_that_lacks_a_tensor_or_has_another_size_is_refused(tmp_path, pattern, family):
    file = saved(tmp_path, pattern, family)
    held = load_file(file)
    names = [name for name in held if re.search(r"layers\.1\..*packed_(up|down)\.", name)]
    assert len(names) == (4 if pattern else 6)
    for name in (*names, *(name for name in held if name.endswith("_bias"))):
        save_file({key: tensor for key, tensor in held.items() if key != name}, file, {"format": "pt"})
        for load in (AutoModelForCausalLM.from_pretrained, load_model):
            with pytest.raises(ValueError, match=r"lack .*" + re.escape(name.partition("experts.")[2])):
                load(str(tmp_path))
    for name in names:
        save_file({**held, name: held[name][1:].contiguous()}, file, {"format": "pt"})
        for load in (AutoModelForCausalLM.from_pretrained, load_model):
            with pytest.raises((ValueError, RuntimeError)):
                load(str(tmp_path))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"model.layers.0.mlp.experts": {"format": "2:4"}}, "names model.layers.0.mlp.experts, which is no linear"),
        ({"model.layers.0.mlp.experts.up": {"format": "2:4"}}, r"names .*experts.up, which is no .* nor a weight of"),
        ({"model.layers.0.mlp.gate.weight": {"format": "2:4"}}, r"names .*gate.weight, which is no linear"),
        ({f"{NAMES['qwen3_moe']}.down_proj": {"format": "bitmap", "kept": 4 * 64 * 64 + 1}}, "cannot be packed as"),
        ({"gate_up_proj": {"format": "2:4"}}, "names gate_up_proj, which is no linear"),
    ],
)
def test_strange_configs_are_refused(tmp_path, layers, message):
    saved(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"] |= layers
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_names_weights_as_the_dense_model_does(tmp_path):
    saved(tmp_path, "2:4")
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert layers["model.layers.0.mlp.experts.gate_up_proj"] == {"format": "2:4"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(packed_layers(loaded)) == len(layers)
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, PackedLinear)
    assert "experts=4, in_features=64" in str(loaded.model.layers[0].mlp.experts)
