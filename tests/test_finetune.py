"""Training that keeps the mask: exact zeros after training and merging, and the model that was trained."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import typing

import pytest
import tiny
import torch

from wanda_kernels import compress, prune
from wanda_kernels.finetune import fit, hold_masks, load_masked_lora, masked_lora, merge

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(dtype=torch.float32, pattern="2:4", family="llama"):
    model = tiny.model(family, dtype=dtype)
    prune(model, method="magnitude", pattern=pattern, sparsity=None if pattern else 0.5)
    return model


def zeros(model):
    return {name: parameter == 0 for name, parameter in model.named_parameters() if (parameter == 0).any()}


def train_lora(model, steps=5, **options):
    torch.manual_seed(1)
    wrapped = masked_lora(model, **options)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    losses = fit(wrapped, torch.optim.AdamW(trained, lr=2e-2), tiny.ids(6, 16), steps=steps, batch_size=2)
    return wrapped, losses


@pytest.mark.parametrize("family", ["llama", "llama biases", "llama tied", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_keeps_zeros_and_merging_keeps_the_logits(family, dtype):
    model = pruned(dtype, family=family)
    before, masks = tiny.weights(model), zeros(model)
    wrapped, losses = train_lora(model, steps=8)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = wrapped(input_ids=tiny.ids(2, 16)).logits
        merged = merge(wrapped)
        logits = merged(input_ids=tiny.ids(2, 16)).logits
    assert torch.equal(trained, logits)  # the same sum, rounded the same way
    assert zeros(merged).keys() == masks.keys()
    for name, mask in masks.items():
        weight = merged.get_parameter(name)
        assert torch.equal(weight == 0, mask), name
        if mask.dim() == 2 and ".layers." in name:
            assert (weight != before[name]).any(), name
    assert type(merged) is type(tiny.model(family))
    compress(merged)  # 2:4 still


def test_what_is_trained_is_the_masked_sum():
    model = pruned()
    dense_like = copy.deepcopy(model)
    wrapped, _ = train_lora(model, rank=4, alpha=12, target_modules=["up_proj"])
    adapted = [name for name, module in wrapped.named_modules() if hasattr(module, "mask")]
    assert len(adapted) == 3
    for name in adapted:
        layer = wrapped.get_submodule(name)
        weight = layer.get_base_layer().weight
        expected = weight + 3 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * (weight != 0)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ expected.t())
        assert torch.equal(weight, dense_like.get_parameter(f"{name.removeprefix('base_model.model.')}.weight"))
    with wrapped.disable_adapter(), torch.no_grad():
        ids = tiny.ids(1, 8)
        assert torch.equal(wrapped(input_ids=ids).logits, dense_like(input_ids=ids).logits)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.Rprop(p, lr=1e-3),
    ],
    ids=["SGD", "AdamW", "Adafactor", "Rprop"],
)
@pytest.mark.parametrize("pattern", ["2:4", None])
def test_dense_training_keeps_zeros(optimizer, pattern):
    model = pruned(pattern=pattern)
    before, masks = tiny.weights(model), zeros(model)
    opt = optimizer(model.parameters())
    held = hold_masks(model, opt)
    losses = fit(model, opt, tiny.ids(6, 16), steps=6, batch_size=3)
    assert losses[-1] < losses[0]
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        if mask.dim() == 2 and ".layers." in name:
            assert (weight[mask] == 0).all(), name
            assert not torch.signbit(weight[mask]).any(), name
            assert (weight != before[name])[~mask].float().mean() > 0.9, name
    held.remove()
    fit(model, opt, tiny.ids(6, 16), steps=1)
    assert any((model.get_parameter(name)[mask] != 0).any() for name, mask in masks.items() if ".layers." in name)


def test_momentum_from_before_does_not_fill_the_zeros():
    model = tiny.model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.99)
    fit(model, opt, tiny.ids(4, 16), steps=2)
    prune(model, method="magnitude", pattern="2:4")
    hold_masks(model, opt)
    fit(model, opt, tiny.ids(4, 16), steps=2)
    assert ((model.model.layers[0].mlp.up_proj.weight.view(-1, 4) == 0).sum(dim=1) >= 2).all()


def test_gradients_of_pruned_weights_are_zero():
    model = pruned()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    hold_masks(model, opt)
    fit(model, opt, tiny.ids(2, 16), steps=1, clip=None)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.grad[weight == 0] == 0).all()
    assert (weight.grad != 0).any()


def test_fit_is_repeatable_and_leaves_the_mode():
    first, second = pruned(), pruned()
    for model in (first, second):
        model.eval()
        seen = []
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, opt, tiny.ids(4, 16), steps=3, seed=2, on_step=lambda n, loss, seen=seen: seen.append(n))
        assert seen == [1, 2, 3]
        assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="no linear layer of the model holds zeros: prune it first"):
        masked_lora(tiny.model())
    model = pruned()
    with pytest.raises(ValueError, match="r: give rank"):
        masked_lora(model, r=4)
    with pytest.raises(ValueError, match=r"target_modules \['x_proj'\] are none of the model's pruned"):
        masked_lora(model, target_modules=["x_proj"])
    with pytest.raises(ValueError, match="target_modules None, layers_to_transform 7 are none of the model's pruned"):
        masked_lora(model, layers_to_transform=7)
    other = torch.optim.SGD(tiny.model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer trains none of the model's pruned weights"):
        hold_masks(model, other)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"windows must be \[samples, length\] .* got \[3, 1\]"):
        fit(model, opt, tiny.ids(3, 1), steps=1)
    with pytest.raises(ValueError, match="steps and batch_size must be at least 1, got 0 and 1"):
        fit(model, opt, tiny.ids(3, 8), steps=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="the loss of step 1 is nan: lower the learning rate"):
        fit(model, opt, tiny.ids(3, 8), steps=1)


def count_zeros(model):
    return sum(int((parameter == 0).sum()) for name, parameter in model.named_parameters() if "proj" in name)


def documented_inits():
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    literal = next(part for part in typing.get_args(hint) if typing.get_origin(part) is typing.Literal)
    return [True, False, *typing.get_args(literal), "lora_ga", "pissa_niter_4", "OLoRA", "later", 1, None, ["pissa"]]


@pytest.mark.parametrize("init", documented_inits(), ids=str)
def test_an_initialisation_keeps_the_zeros_or_is_refused(init):
    model = pruned()
    before, weights = count_zeros(model), tiny.weights(model)
    if init in ("gaussian", "orthogonal") or isinstance(init, bool):
        wrapped, _ = train_lora(model, steps=3, init_lora_weights=init)
        assert count_zeros(merge(wrapped)) == before
        return
    with pytest.raises(ValueError, match="init_lora_weights must be one of True, False, 'gaussian', 'orthogonal'"):
        masked_lora(model, init_lora_weights=init)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_dropout", 0.1), ("use_dora", True), ("lora_bias", True), ("bias", "all"), ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1]), ("layer_replication", [(0, 2), (1, 3)]),
        ("target_parameters", ["mlp.up_proj.weight"]), ("megatron_config", {}), ("alora_invocation_tokens", [1]),
        ("use_qalora", True), ("ensure_weight_tying", True), ("loftq_config", {"loftq_bits": 4}),
        ("arrow_config", peft.ArrowConfig()), ("eva_config", peft.EvaConfig()), ("of_no_version", 1),
    ],
)  # fmt: skip
def test_other_options_are_refused_by_name(name, value):
    model = pruned()
    with pytest.raises(ValueError, match=f"^{name}: a masked adapter cannot have it, got .* it has alpha_pattern, .*"):
        masked_lora(model, **{name: value})
    assert not isinstance(model.model.layers[0].mlp.up_proj, peft.tuners.lora.LoraLayer)
    default = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if name in default:
        masked_lora(model, **{name: getattr(peft.LoraConfig(), name)})  # as it is anyway


def test_options_that_choose_layers_ranks_and_scale():
    model = pruned()
    before = count_zeros(model)
    wrapped, _ = train_lora(
        model, target_modules=["up_proj", "q_proj"], exclude_modules=["q_proj"], layers_to_transform=[0, 2],
        rank_pattern={"layers.2.mlp.up_proj": 3}, alpha_pattern={"layers.0.mlp.up_proj": 5}, use_rslora=True,
    )  # fmt: skip
    adapted = {name: layer for name, layer in wrapped.named_modules() if hasattr(layer, "mask")}
    assert [name.removeprefix("base_model.model.model.") for name in adapted] == [
        "layers.0.mlp.up_proj", "layers.2.mlp.up_proj",
    ]  # fmt: skip
    first, second = adapted.values()
    assert first.scaling["default"] == pytest.approx(5 / 8**0.5)
    assert (second.r["default"], second.scaling["default"]) == (3, pytest.approx(16 / 3**0.5))
    assert count_zeros(merge(wrapped)) == before


@pytest.fixture
def saved_adapter(tmp_path):
    """A pruned model, its logits with a trained adapter, and where that lies."""
    model = pruned()
    base = copy.deepcopy(model)
    wrapped, _ = train_lora(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        return base, wrapped(input_ids=tiny.ids(2, 16)).logits, tmp_path


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.ids(2, 16)).logits


@pytest.mark.parametrize("load", [load_masked_lora, peft.PeftModel.from_pretrained])
def test_a_saved_adapter_is_the_trained_model(saved_adapter, load):
    base, trained, folder = saved_adapter
    before = count_zeros(base)
    loaded = load(base, folder / "adapter")
    assert torch.equal(logits(loaded), trained)
    merged = merge(loaded)
    assert torch.equal(logits(merged), trained)
    assert count_zeros(merged) == before


def test_several_adapters(saved_adapter):
    base, trained, folder = saved_adapter
    before, dense = count_zeros(base), logits(base)
    wrapped, _ = train_lora(base, rank=4, init_lora_weights=False)
    first = logits(wrapped)
    wrapped.load_adapter(folder / "adapter", "again")
    assert torch.equal(logits(wrapped), first)
    wrapped.set_adapter("again")
    assert torch.equal(logits(wrapped), trained)
    wrapped.merge_adapter(["default", "again"])
    assert count_zeros(wrapped.get_base_model()) == before + sum(
        int((p == 0).sum()) for n, p in wrapped.named_parameters() if "lora_" in n
    )
    wrapped.unmerge_adapter()
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), dense)
    wrapped.save_pretrained(folder / "both")
    with pytest.raises(ValueError, match="adapter_names: a masked adapter serves whole batches"):
        wrapped.eval()(input_ids=tiny.ids(2, 16), adapter_names=["again", "default"])
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        wrapped.add_adapter("plain", peft.LoraConfig(target_modules=["up_proj"]))
    assert count_zeros(merge(wrapped)) == before
    other = load_masked_lora(pruned(), folder / "both" / "again", trainable=True)
    assert torch.equal(logits(other), trained)
    assert any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.slow
def test_plain_peft_refuses_a_saved_adapter(saved_adapter):
    """In a process of its own, where nothing imported this package."""
    _, _, folder = saved_adapter
    program = (
        "import peft, transformers\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({str(folder / 'base')!r})\n"
        f"for load in (lambda: peft.PeftModel.from_pretrained(base, {str(folder / 'adapter')!r}),\n"
        f"             lambda: base.load_adapter({str(folder / 'adapter')!r})):\n"
        "    try:\n        load()\n"
        "    except KeyError as error:\n        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["'WANDA_MASKED_LORA (import wanda_kernels.finetune)'"] * 2


def test_adapters_that_do_not_fit(saved_adapter):
    base, _, folder = saved_adapter
    with pytest.raises(ValueError, match="no linear layer of the model holds zeros"):
        load_masked_lora(tiny.model(), folder / "adapter")
    with pytest.raises(ValueError, match="is no linear layer with zeros: a masked adapter belongs to the pruned model"):
        peft.PeftModel.from_pretrained(tiny.model(), folder / "adapter")
    other = tiny.model()
    prune(other, method="magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match="has other zeros than the one that the adapter was trained on"):
        load_masked_lora(other, folder / "adapter")
    smaller = copy.deepcopy(base)
    smaller.model.layers = smaller.model.layers[:2]
    with pytest.raises(ValueError, match=r"the model has no layer for base_model.*layers\.2.*14 tensors"):
        load_masked_lora(smaller, folder / "adapter")
    with pytest.raises(ValueError, match=r"a masked adapter is loaded by wanda_kernels.finetune.load_masked_lora"):
        copy.deepcopy(base).load_adapter(str(folder / "adapter"))
    # one that is taken for plain LoRA's: its tensors are not plain LoRA's
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
    with pytest.raises(ValueError, match="holds an adapter of type LORA, not one that masked_lora made"):
        load_masked_lora(copy.deepcopy(base), folder / "adapter")
    file.write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights must be one of"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")


def test_models_that_cannot_be_wrapped():
    wrapped = masked_lora(pruned())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    plain = peft.get_peft_model(pruned(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, plain, plain.get_base_model()):
        for use in (masked_lora, lambda model: hold_masks(model, optimizer)):
            with pytest.raises(ValueError, match=r"the model has adapters already \(peft\): merge them first"):
                use(model)
    with pytest.raises(ValueError, match=r"merge needs what masked_lora returned, got a PeftModel.* without"):
        merge(plain)
    compiled = torch.compile(pruned(), backend="eager")
    for use in (masked_lora, lambda model: hold_masks(model, optimizer)):
        with pytest.raises(ValueError, match=r"the model is compiled: give the one that torch.compile was given"):
            use(compiled)
    packed = tiny.model(hidden_size=128, intermediate_size=192)
    prune(packed, method="magnitude", pattern="2:4")
    compress(packed)
    for use in (masked_lora, lambda model: hold_masks(model, optimizer)):
        with pytest.raises(ValueError, match="the model is packed: unpack it first"):
            use(packed)
    masked_lora(merge(wrapped))  # as the message says


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'wanda_kernels\[finetune\]'"):
        masked_lora(pruned())


def test_an_adapter_is_loaded_onto_the_masks_that_it_was_trained_on(tmp_path):
    pytest.importorskip("peft")
    trained, other = tiny.model(), tiny.model()
    prune(trained, tiny.ids(), sparsity=0.5)
    prune(other, tiny.ids(), sparsity=0.5, propagate="dense", method="magnitude")
    masked_lora(trained).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has other zeros than the one that the adapter was trained on"):
        load_masked_lora(other, tmp_path)
    again = tiny.model()
    prune(again, tiny.ids(), sparsity=0.5)
    load_masked_lora(again, tmp_path)
