"""Whole experts go: those with the smallest router-weighted outputs; what is left is a model of transformers."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_experts import model
from transformers import AutoModelForCausalLM

from wanda_kernels import drop_experts, prune
from wanda_kernels.pruning.blocks import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def expected_scores(of, ids) -> list[torch.Tensor]:
    """Of Mixtral's layers, token by token, through each expert's own two products."""
    sums: list[torch.Tensor] = []

    def hook(experts, args):
        hidden, index, shares = args
        total, count = torch.zeros(2, 4, dtype=torch.float64)
        for token, chosen, weights in zip(hidden, index, shares, strict=True):
            for expert, weight in zip(chosen.tolist(), weights, strict=True):
                gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                out = experts.down_proj[expert] @ (experts.act_fn(gate) * up)
                total[expert] += float(weight) * float(out.norm())
                count[expert] += 1
        sums.append(total / count.clamp(min=1))

    handles = [layer.mlp.experts.register_forward_pre_hook(hook) for layer in of.model.layers]
    with torch.no_grad():
        of(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def test_scores_are_the_mean_of_weighted_output_norms():
    of = model("mixtral")
    expected = expected_scores(of, tiny.ids())
    report = drop_experts(of, tiny.ids(), 0.25)
    for layer, scores in zip(report.layers, expected, strict=True):
        assert layer.scores == pytest.approx(scores.tolist(), rel=1e-5)
        assert layer.dropped == [int(scores.argmin())]
        assert sum(layer.tokens) == tiny.ids().numel() * 2
    assert "1 of 4 experts dropped in each of 2 layers" in str(report)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_is_left_loads_in_plain_transformers(family, tmp_path):
    of = model(family)
    experts = {name: p.detach().clone() for name, p in of.named_parameters() if ".experts." in name}
    report = drop_experts(of, tiny.ids(), 0.5)
    assert (report.experts, report.left) == (4, 2)
    for layer in report.layers:
        kept = [expert for expert in range(4) if expert not in layer.dropped]
        for name, parameter in of.named_parameters():
            if name.startswith(layer.name):
                assert torch.equal(parameter, experts[name][kept])
    of.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = tiny.ids(2, 8)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, of(input_ids=ids).logits)
    assert of.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 11)


def test_groups_lose_equally():
    of = model("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1)
    report = drop_experts(of, tiny.ids(), 0.5)
    assert all(sum(expert < 4 for expert in layer.dropped) == 2 for layer in report.layers)


def test_it_can_be_pruned_afterwards():
    of = model("mixtral")
    drop_experts(of, tiny.ids(), 0.25)
    prune(of, tiny.ids(), sparsity=0.5)
    assert find_blocks(of)[0].matrices["mlp.experts.down_proj"].weight.shape == (3, 64, 96)


@pytest.mark.parametrize(
    ("family", "share", "message"),
    [
        ("llama", 0.5, "LlamaForCausalLM has no fused experts"),
        ("mixtral", 0.2, r"share 0\.2 of 4 experts drops none"),
        ("mixtral", 0.75, r"share 0\.75 leaves 1 of 4 experts, a token takes 2"),
        ("mixtral", 0.0, r"share must be in \(0, 1\), got 0"),
        ("mixtral", 1.0, r"share must be in \(0, 1\), got 1"),
        ("longcat_flash", 0.5, "its router also chooses experts that compute nothing"),
        ("llama4_text", 0.5, "AllTokensExperts cannot be dropped"),
    ],
)
def test_what_cannot_be_dropped_is_refused(family, share, message):
    of = tiny.model(family) if family == "llama" else model(family)
    before = tiny.weights(of)
    with pytest.raises(ValueError, match=message):
        drop_experts(of, tiny.ids(), share)
    assert all(torch.equal(p, before[n]) for n, p in of.named_parameters())
