"""The baselines on a real model, against plain reimplementations of the official codes; and training after 2:4."""

from __future__ import annotations

import copy
import functools

import pytest
import real
import torch

from benchmarks import official_methods as official
from benchmarks.end_to_end import differing_bits
from wanda_kernels import perplexity, prune
from wanda_kernels.finetune import fit, masked_lora, merge
from wanda_kernels.pruning.blocks import find_blocks

pytestmark = real.SMOLLM2


@pytest.fixture(scope="module")
def loaded():
    model, _, calibration, evaluation = real.loaded()
    yield model, calibration, evaluation
    real.loaded.cache_clear()


def weights(model):
    return [linear.weight.detach() for block in find_blocks(model) for linear in block.matrices.values()]


def first_blocks(model, count):
    """A copy that is cut down: the whole model takes minutes."""
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    return model


def test_variant_is_the_official_one(loaded):
    dense, calibration = first_blocks(loaded[0], 6), loaded[1][:4]
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune(ours, calibration, variant=True)
    official.prune_layer_by_layer(plain, calibration, functools.partial(official.variant, sparsity=0.5))
    assert differing_bits(ours, plain) <= 20
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.005)


def test_magnitude_is_the_official_one(loaded):
    dense = first_blocks(loaded[0], 6)
    unstructured, pattern = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(unstructured, method="magnitude")
    prune(pattern, method="magnitude", pattern="2:4")
    for before, half, groups in zip(weights(dense), weights(unstructured), weights(pattern), strict=True):
        size = before.abs()
        threshold = torch.sort(size.flatten()).values[size.numel() // 2]
        assert torch.equal(half, before.masked_fill(size <= threshold, 0))
        # a sixth of the groups tie (4-bit weights), and topk decides those as it likes: what is kept adds up the same
        kept = size.view(-1, 4).topk(2, dim=1).values.double().sum()
        assert groups.abs().double().sum() == pytest.approx(float(kept), rel=1e-12)


def inputs_of_layers(model, ids):
    """Layer -> its inputs, [tokens, C_in]."""
    found, handles = {}, []
    for name, matrix in find_blocks(model)[0].matrices.items():
        told = functools.partial(lambda name, x: found.update({name: x.flatten(0, -2)}), name)
        handles.append(matrix.module.register_forward_pre_hook(lambda _m, inputs, told=told: told(inputs[0])))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_is_the_official_one(loaded, pattern):
    """Each layer of a block: the same output error within 1 %, and masks that differ where float32 rounds."""
    dense, calibration = first_blocks(loaded[0], 1), loaded[1][:8]  # its inputs are the same whatever is pruned
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune(ours, calibration, method="sparsegpt", pattern=pattern)
    rule = functools.partial(official.sparsegpt, sparsity=0.5, pattern=(2, 4) if pattern else None)
    official.prune_layer_by_layer(plain, calibration, rule)
    assert {layer.damping for layer in report.layers} == {0.01}
    assert report.achieved_sparsity == pytest.approx(0.5, abs=1e-3)
    x = inputs_of_layers(dense, calibration)
    before, after, expected = (find_blocks(model)[0].matrices for model in (dense, ours, plain))
    for name, linear in before.items():
        errors = [
            torch.linalg.norm((x[name] @ (pruned[name].weight - linear.weight).detach().t()).double())
            for pruned in (after, expected)
        ]
        assert errors[0] == pytest.approx(float(errors[1]), rel=0.01), name
        differ = (after[name].weight == 0) != (expected[name].weight == 0)
        assert differ.float().mean() < 0.01, name


def test_lora_after_2_4_improves_held_out_text(loaded):
    dense, calibration, evaluation = loaded
    model = copy.deepcopy(dense)
    prune(model, calibration[:2], pattern="2:4")
    masks = [weight == 0 for weight in weights(model)]
    held_out = evaluation[:1]
    before = perplexity(model, held_out, 512, 2)
    torch.manual_seed(0)
    wrapped = masked_lora(model, rank=8)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    fit(wrapped, torch.optim.AdamW(trained, lr=2e-3), calibration.view(-1, 128), steps=4, batch_size=1)
    with torch.no_grad():
        logits = wrapped(input_ids=held_out[:1]).logits
    merged = merge(wrapped)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=held_out[:1]).logits, logits, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(weight == 0, mask) for weight, mask in zip(weights(merged), masks, strict=True))
    after = perplexity(merged, held_out, 512, 2)
    assert after < 0.95 * before, (before, after)
