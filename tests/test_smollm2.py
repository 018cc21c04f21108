"""A real pretrained model, end to end: the paper's masks, the order of perplexities, a folder others can load."""

from __future__ import annotations

import copy

import pytest
import real
import torch
from transformers import AutoModelForCausalLM

from benchmarks import smollm2, texts
from benchmarks.end_to_end import differing_bits
from benchmarks.official import OfficialRun
from wanda_kernels import compress, perplexity, prune
from wanda_kernels.models import load_model, save_pretrained
from wanda_kernels.ops import bitmap_linear, sparse24_linear
from wanda_kernels.pruning.blocks import find_blocks

pytestmark = real.SMOLLM2


@pytest.fixture(scope="module")
def loaded():
    return real.loaded()


@pytest.fixture(scope="module")
def dense_perplexity(loaded) -> float:
    return perplexity(loaded[0], loaded[3][:2], 512, 2)


def test_text_halves_share_no_paragraph(loaded):
    first, second = ({" ".join(p.split()) for p in half.split("\n\n")} - {""} for half in texts.help_halves())
    assert len(first) > 500
    assert not first & second
    assert loaded[2].shape == loaded[3].shape == (16, 512)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_masks_of_the_official_loop(loaded, dense_perplexity, pattern):
    dense, _, calibration, evaluation = loaded
    calibration = calibration[:2]
    ours, official = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune(ours, calibration, pattern=pattern)
    OfficialRun(stable=True).prune(official, calibration, 0.5, (2, 4) if pattern else None)
    assert sum(layer.numel for layer in report.layers) == 106_168_320
    assert differing_bits(ours, official) <= 20

    magnitude = copy.deepcopy(dense)
    prune(magnitude, method="magnitude", pattern=pattern)
    values = [dense_perplexity, *(perplexity(model, evaluation[:2], 512, 2) for model in (ours, magnitude))]
    assert values == sorted(values), values


def test_bfloat16_masks_overlap(loaded):
    dense, _, calibration, _ = loaded
    ours = copy.deepcopy(dense).bfloat16()
    official = copy.deepcopy(ours)
    prune(ours, calibration[:2])
    OfficialRun().prune(official, calibration[:2], 0.5, None)
    weights = sum(linear.weight.numel() for block in find_blocks(ours) for linear in block.matrices.values())
    assert differing_bits(ours, official) <= 0.005 * weights


def test_pruned_gguf_becomes_a_plain_folder(loaded, tmp_path):
    model = load_model(str(smollm2.model_file()), "bfloat16", "cpu")
    prune(model, method="magnitude", pattern="2:4")
    save_pretrained(tmp_path / "out", model, loaded[1])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert getattr(again.config, "quantization_config", None) is None
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    ids = loaded[1]("The capital of France is", return_tensors="pt").input_ids
    assert again.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_packed_layers_are_smaller_and_as_exact_as_dense_ones(loaded, pattern):
    """Layer by layer against float64: through 30 blocks of bfloat16 either's rounding is amplified at random."""
    model = copy.deepcopy(loaded[0]).to(torch.bfloat16)
    prune(model, method="magnitude", pattern=pattern)
    dense = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    report = compress(model)
    assert report.packed_bytes <= 0.57 * report.dense_bytes
    assert set(report.formats.values()) == {pattern or "bitmap"}
    generator = torch.Generator().manual_seed(0)
    for name in report.formats:
        packed = model.get_submodule(name)
        x = torch.randn(12, packed.in_features, generator=generator).to(torch.bfloat16)
        exact = x.double() @ dense[name].weight.double().T
        product = sparse24_linear if pattern else bitmap_linear
        errors = [(y.double() - exact).square().mean().sqrt() for y in (product(x, *packed.packed()), dense[name](x))]
        assert errors[0] <= 1.02 * errors[1], name
