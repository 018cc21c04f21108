"""Training that keeps the mask: exact zeros after training and merging, and the model that was trained."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from wanda_kernels import compress, prune
from wanda_kernels.finetune import fit, hold_masks, masked_lora, merge

pytest.importorskip("peft")

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
    with pytest.raises(ValueError, match="lora_dropout: a masked adapter cannot have it"):
        masked_lora(model, lora_dropout=0.1)
    with pytest.raises(ValueError, match="r: give rank"):
        masked_lora(model, r=4)
    with pytest.raises(ValueError, match=r"target_modules \['x_proj'\] are none of the model's pruned"):
        masked_lora(model, target_modules=["x_proj"])
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


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'wanda_kernels\[finetune\]'"):
        masked_lora(pruned())
