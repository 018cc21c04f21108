"""What would be pruned wrongly, or in a place that the model does not compute with, is refused by name before anything
is changed; what can be served is served."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from wanda_kernels import compress, prune
from wanda_kernels.models import load_model
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


def test_a_compiled_model_is_the_model_inside():
    plain, compiled = tiny.model(), torch.compile(tiny.model())
    report = prune(compiled, tiny.ids())
    assert report.layers[0].name == prune(plain, tiny.ids()).layers[0].name
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))


def test_subclasses_and_hooked_layers_are_pruned_by_what_they_take():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, special = tiny.model(), tiny.model()
    special.get_submodule(LAYER).__class__ = Doubled
    special.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda module, x, y: y)
    prune(plain, tiny.ids(), propagate="dense")
    prune(special, tiny.ids(), propagate="dense")
    assert torch.equal(plain.get_submodule(LAYER).weight == 0, special.get_submodule(LAYER).weight == 0)


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
    with pytest.raises(
        ValueError, match=r"does not call each of its 3 blocks exactly once, in order \(it calls 0, 1, 2, 0"
    ):
        prune(tiny.model("dory", **LOOPED), tiny.ids())


def test_blocks_that_hand_on_more_than_hidden_states_are_refused():
    model = tiny.model("xlstm", num_blocks=2, num_heads=2, qk_dim_factor=0.5, chunk_size=16)
    with pytest.raises(ValueError, match="wants more of its blocks than their hidden states"):
        prune(model, tiny.ids())


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
    if kind == "one too many":
        stream_prune(tmp_path / "m", tmp_path / "out", tiny.ids())
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.layers.9.x"], torch.ones(2))
    else:
        with pytest.raises(ValueError, match="has no tensor"):
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
