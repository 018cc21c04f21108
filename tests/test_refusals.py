"""What would be pruned wrongly, or in a place that the model does not compute with, is refused by name before anything
is changed; what can be served is served."""

from __future__ import annotations

import copy
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from wanda_kernels import compress, perplexity, prune
from wanda_kernels.models import load_model
from wanda_kernels.pruning.blocks import find_blocks
from wanda_kernels.pruning.recording import record_calls
from wanda_kernels.streaming import stream_prune

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "model.layers.1.mlp.up_proj"


def peft_model(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def injected(model):
    """Adapters without a wrapper."""
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up_proj"]), model)


def parametrised(model):
    parametrizations.weight_norm(model.get_submodule(LAYER))
    return model


def masked_by_torch(model):
    torch_prune.l1_unstructured(model.get_submodule(LAYER), "weight", 0.5)
    return model


class Quantised(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.out_features, linear.in_features, dtype=torch.int8))
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.float() * self.scale[:, None])


def quantised(model):
    model.set_submodule(LAYER, Quantised(model.get_submodule(LAYER)))
    return model


def quantised_by_torch(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=False)


def compiled_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


REFUSED = {
    peft_model: r"holds adapters \(.*q_proj\): merge them first",
    injected: r"holds adapters \(model\.layers\.0\.mlp\.up_proj\)",
    parametrised: rf"{LAYER} is parametrised",
    masked_by_torch: rf"{LAYER} has no weight of its own but computes it",
    quantised: rf"{LAYER} \(Quantised\) holds quantised weights \(qweight\)",
    quantised_by_torch: "holds quantised weights|0 lists of blocks with linear layers",
    compiled_block: r"model\.layers\.1 is wrapped \(OptimizedModule\)",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_no_plain_weight_is_refused_and_nothing_is_changed(make):
    model = make(tiny.model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    for work in (lambda: prune(model, tiny.ids()), lambda: prune(model, method="magnitude"), lambda: compress(model)):
        with pytest.raises(ValueError, match=REFUSED[make]):
            work()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_a_compiled_model_is_the_model_inside():
    plain, compiled = tiny.model(), torch.compile(tiny.model())
    report = prune(compiled, tiny.ids())
    assert report.layers[0].name == prune(plain, tiny.ids()).layers[0].name
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x * 2, self.weight, self.bias)


def subclass(model):
    model.get_submodule(LAYER).__class__ = Scaled


def own_forward(model):
    layer = model.get_submodule(LAYER)
    layer.forward = lambda x: nn.functional.linear(x * 2, layer.weight)


def expanded(model):
    layer = model.get_submodule(LAYER)
    layer.weight = nn.Parameter(torch.randn(1, layer.in_features).expand(layer.out_features, -1))


def view_of_another(model):
    layer, head = model.get_submodule(LAYER), model.lm_head
    layer.weight = nn.Parameter(head.weight.data[: layer.out_features, : layer.in_features])


COMPUTES_OTHERWISE = {
    subclass: rf"{LAYER} cannot be pruned: it is a Scaled, which may compute something else",
    own_forward: rf"{LAYER} cannot be pruned: it has a forward of its own",
    expanded: rf"{LAYER}\.weight has several elements in one place",
    view_of_another: "lie in the same memory: shared weights",
}


@pytest.mark.parametrize("change", COMPUTES_OTHERWISE, ids=lambda change: change.__name__)
def test_a_layer_whose_input_says_nothing_of_its_weight_is_refused(change):
    model = tiny.model()
    change(model)
    with pytest.raises(ValueError, match=COMPUTES_OTHERWISE[change]):
        prune(model, tiny.ids())


def test_a_wrapper_of_the_whole_model_is_refused():
    for work in (lambda m: prune(m, tiny.ids()), lambda m: prune(m, method="magnitude"), compress):
        with pytest.raises(ValueError, match="DataParallel wraps the model: give the model inside it"):
            work(nn.DataParallel(tiny.model()))


def plain_wanda(model) -> dict[str, torch.Tensor]:
    """What is kept at 50 %, from hooks on the whole model: the norms of all tokens, a stable sort."""
    norms: dict[str, torch.Tensor] = {}
    in_a_block = re.compile(r"\.(layers|h|blocks)\.\d+\.")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and in_a_block.search(n)}

    def watch(name):
        def hook(_, inputs):
            norms[name] = norms.get(name, 0) + inputs[0].double().flatten(0, -2).square().sum(dim=0)

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    with torch.no_grad():
        model(input_ids=tiny.ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    kept = {}
    for name, linear in linears.items():
        score = linear.weight.detach().double().abs() * norms[name].sqrt()
        order = score.sort(dim=1, stable=True).indices[:, : score.shape[1] // 2]
        kept[name] = torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)
    return kept


def assert_masks(model, reference) -> None:
    expected = plain_wanda(reference)
    prune(model, tiny.ids(), propagate="dense")
    assert expected
    for name, kept in expected.items():
        differing = int((kept != (model.get_submodule(name).weight != 0)).sum())
        assert differing <= 2, f"{name}: {differing}"  # sums are added in another order


def steered(module, inputs, output):
    return output * torch.linspace(0.2, 3, output.shape[-1])


STEERED = {
    "norm": lambda block: block.input_layernorm.register_forward_hook(steered),
    "projection": lambda block: block.self_attn.q_proj.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * torch.linspace(0, 3, inputs[0].shape[-1]),)
    ),
    "activation": lambda block: block.mlp.act_fn.register_forward_hook(steered),
    "block": lambda block: block.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * torch.linspace(0, 3, 64), *inputs[1:])
    ),
    "block's output": lambda block: block.register_forward_hook(steered),
    "function": lambda block: setattr(block.mlp, "act_fn", None) or vars(block.mlp).update(act_fn=torch.relu)
    or block.mlp._modules.pop("act_fn"),
}  # fmt: skip


@pytest.mark.parametrize("where", STEERED)
@pytest.mark.parametrize("index", [0, 1])
def test_what_hangs_on_one_block_counts_for_that_block_alone(where, index):
    model, reference = tiny.model(), tiny.model()
    for each in (model, reference):
        STEERED[where](each.model.layers[index])
    assert_masks(model, reference)


def test_forwards_of_ones_own_stay():
    model = tiny.model()
    mlp, norm = model.model.layers[1].mlp, model.model.layers[1].input_layernorm
    mlp.forward = lambda x: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x))
    norm.forward = lambda x: x * 0.5
    mine = (vars(mlp)["forward"], vars(norm)["forward"])
    with torch.no_grad():
        before = model(input_ids=tiny.ids()).logits
        prune(model, tiny.ids(), sparsity=0.0)
        assert torch.equal(model(input_ids=tiny.ids()).logits, before)
    assert (vars(mlp)["forward"], vars(norm)["forward"]) == mine


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt"])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_models_that_take_the_first_of_what_a_block_returns(family, blocks):
    changes = {"n_layer": blocks, "n_head": 4, "num_hidden_layers": blocks}
    changes |= {"mpt": {"n_layers": blocks, "n_heads": 4, "d_model": 64, "max_seq_len": 64}}.get(family, {})
    assert_masks(tiny.model(family, **changes), tiny.model(family, **changes))


def test_positions_that_a_model_does_not_have(tmp_path):
    model = tiny.model("opt", max_position_embeddings=32)
    for work in (lambda ids: prune(model, ids), lambda ids: perplexity(model, ids, ids.shape[1])):
        with pytest.raises(ValueError, match=r"cannot take .*max_position_embeddings"):
            work(tiny.ids(2, 64))


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_streamed_positions_are_those_of_a_model_in_memory(family, tmp_path):
    """They are computed while the model is made, in float32, and then rounded."""
    changes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "rotary_dim": 8, "n_inner": 128}
    tiny.model(family, torch.bfloat16, **changes).save_pretrained(tmp_path / "m")
    model = load_model(str(tmp_path / "m"))
    prune(model, tiny.ids())
    stream_prune(tmp_path / "m", tmp_path / "out", tiny.ids())
    streamed = load_model(str(tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), streamed.parameters(), strict=True))


def test_pickled_weights_are_not_read(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    held = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(held, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no safetensors but pickled weights"):
        load_model(str(tmp_path / "m"))


def test_perplexity_is_of_the_model_without_dropout():
    model = tiny.model("opt", dropout=0.5)
    ids = tiny.ids().flatten()
    expected = perplexity(model, ids, 24)
    model.train()
    assert perplexity(model, ids, 24) == expected
    assert model.training
    for length, message in ((8, "windows of 24 tokens, length is 8"), (1, "length must be at least 2")):
        with pytest.raises(ValueError, match=message):
            perplexity(model, tiny.ids(), length)


def test_inference_mode_changes_nothing():
    plain, special = tiny.model(), tiny.model()
    prune(plain, tiny.ids())
    with torch.inference_mode():
        made_there = tiny.model()
        prune(special, tiny.ids())
        prune(made_there, tiny.ids())
        logits = compress(made_there) and made_there(input_ids=tiny.ids()).logits
    assert torch.isfinite(logits).all()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), special.parameters(), strict=True))


LOOPED = {"n_input_layers": 0, "n_output_layers": 0, "n_recurrent_layers": 3, "n_recurrent_loops": 2}
LOOPED |= {"head_dim": 16, "sliding_window": 8}


def test_a_stack_that_runs_twice_is_refused():
    pytest.importorskip("transformers.models.dory", reason="of later versions of transformers")
    with pytest.raises(
        ValueError, match=r"does not call each of its 3 blocks exactly once, in order \(it calls 0, 1, 2, 0"
    ):
        prune(tiny.model("dory", **LOOPED), tiny.ids())


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_blocks_get_what_the_ones_before_return(propagate):
    """RWKV's state. Pruning nothing, the last block's outputs are those of the whole model."""
    model = tiny.model("rwkv", attention_hidden_size=64)
    blocks, ids = find_blocks(model), tiny.ids(2)
    seen = []
    handle = blocks[-1].module.register_forward_hook(lambda _m, _args, output: seen.append(output[0]))
    with torch.no_grad():
        model(input_ids=ids)
        prune(model, ids, sparsity=0.0, propagate=propagate, batch_size=2, exact_error=True)
    handle.remove()
    assert len(seen) >= 2
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_a_run_whose_blocks_hand_on_more_is_not_resumed():
    model = tiny.model("rwkv", attention_hidden_size=64)
    recording = record_calls(model, find_blocks(model), [tiny.ids(2)])
    assert recording.blocks_hand_on_more()


def test_blocks_that_return_more_than_the_next_one_takes_are_pruned():
    model = tiny.model("xlstm", num_blocks=2, num_heads=2, qk_dim_factor=0.5, chunk_size=16)
    assert min(layer.sparsity for layer in prune(model, tiny.ids(), sparsity=0.5).layers) >= 0.5


def test_shared_keys_and_values_are_pruned_as_in_one_pass(tmp_path):
    """Gemma 4's last blocks use the keys of earlier ones."""
    changes = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16}
    changes |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "sliding_window": 8}
    model = tiny.model("gemma4_text", **changes, layer_types=["sliding_attention", "full_attention"] * 2)
    norms: dict[str, torch.Tensor] = {}

    def watch(name):
        def hook(_, inputs):
            norms[name] = inputs[0].flatten(0, -2).norm(dim=0)

        return hook

    whole = copy.deepcopy(model)
    linears = {n: m for n, m in whole.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    with torch.no_grad():
        whole(input_ids=tiny.ids())
    for handle in handles:
        handle.remove()
    prune(model, tiny.ids(), propagate="dense")
    for name, linear in linears.items():
        score = linear.weight.detach().abs() * norms[name]
        kept = torch.zeros_like(score, dtype=torch.bool)
        kept.scatter_(1, score.topk(score.shape[1] - score.shape[1] // 2, dim=1).indices, True)
        differing = int((kept != (model.get_submodule(name).weight != 0)).sum())
        assert differing <= 2, f"{name}: {differing}"  # norms of sequences are averaged, these are added


def lacking(name):
    return lambda held: {key: tensor for key, tensor in held.items() if key != name}


MISSING = {
    "embedding": (lacking("model.embed_tokens.weight"), "lack model.embed_tokens.weight"),
    "norm": (lacking("model.norm.weight"), "lack model.norm.weight"),
    "layer": (lacking(f"{LAYER}.weight"), f"lack {LAYER}.weight"),
    "bias": (lacking("model.layers.0.self_attn.q_proj.bias"), "lack model.layers.0.self_attn.q_proj.bias"),
    "head": (lacking("lm_head.weight"), "lack lm_head.weight"),
    "module.": (lambda held: {f"module.{k}": t for k, t in held.items()}, r"there as 'module\.\*'"),
    "_orig_mod.": (lambda held: {f"_orig_mod.{k}": t for k, t in held.items()}, r"there as '_orig_mod\.\*'"),
    "one too many": (lambda held: held | {"model.layers.9.x": torch.ones(2)}, r"no place for: model\.layers\.9\.x"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_checkpoint_with_other_tensors_is_refused_by_name(kind, tmp_path):
    change, message = MISSING[kind]
    tiny.model("llama biases").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "m"))
    with pytest.raises(ValueError, match="no place for" if kind == "one too many" else "has no tensor"):
        stream_prune(tmp_path / "m", tmp_path / "out", tiny.ids())
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_the_model_is_the_users_choice(tmp_path):
    tiny.model().save_pretrained(tmp_path / "m")
    peft_model(tiny.model()).save_pretrained(tmp_path / "m")
    for load in (
        lambda: load_model(str(tmp_path / "m")),
        lambda: stream_prune(tmp_path / "m", tmp_path / "o", tiny.ids()),
    ):
        with pytest.raises(ValueError, match=r"holds a LoRA adapter .*: merge it into the model first"):
            load()


def test_images_and_text_the_text_decoder_is_pruned(tmp_path):
    """In memory and streamed alike."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {k: v for k, v in tiny.COMMON.items() if k != "pad_token_id"} | {"head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = AutoConfig.for_model(
        "qwen3_vl", text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]}
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    model = load_model(str(tmp_path / "m"))
    report = prune(model, tiny.ids())
    stream_prune(tmp_path / "m", tmp_path / "out", tiny.ids())
    streamed = load_model(str(tmp_path / "out"))
    assert len(report.layers) == 21
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), streamed.parameters(), strict=True))


def test_arguments_of_another_kind_are_named():
    model = tiny.model()
    for work, message in (
        (lambda: prune("model", tiny.ids()), "model must be a model of transformers, got a str"),
        (lambda: prune(model, [[1, 2]]), "input_ids must be a tensor .* got a list"),
        (lambda: prune(model, tiny.ids(), batch_size=1.5), "batch_size must be a whole number, at least 1, got 1.5"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            work()


def test_a_layer_that_is_called_by_a_keyword_is_refused():
    model = tiny.model()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(ValueError, match=r"mlp\.down_proj is called by a keyword"):
        prune(model, tiny.ids())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt"])
def test_blocks_that_are_alike_share_a_plan(family):
    """A pass of one batch for each kind: functions with a name do not make each block a kind by itself."""
    from wanda_kernels.pruning.blocks import find_blocks
    from wanda_kernels.pruning.fusion import kind_of

    kinds = {kind_of(block) for block in find_blocks(tiny.model(family))}
    assert len(kinds) <= 2  # sliding and full attention
