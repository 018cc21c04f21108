"""Fused statistics in the driver: which modules are taken, that nothing else changes, that everything comes back."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from wanda_kernels import prune
from wanda_kernels.pruning import fusion
from wanda_kernels.pruning.blocks import find_blocks
from wanda_kernels.pruning.recording import record_calls, run_block

GATED = {"q_proj": "rms_norm", "k_proj": "rms_norm", "v_proj": "rms_norm", "o_proj": "standalone"}
GATED |= {"gate_proj": "rms_norm", "up_proj": "rms_norm"}
PHI3 = {"qkv_proj": "rms_norm", "o_proj": "standalone", "gate_up_proj": "rms_norm", "down_proj": "silu_mul"}


def expected_paths(family: str) -> dict[str, str]:
    if family.startswith("opt"):
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), "standalone")
    return PHI3 if family == "phi3" else GATED | {"down_proj": "gelu_tanh_mul" if "gemma" in family else "silu_mul"}


def paths(report) -> dict[str, str]:
    return {layer.name.split(".")[-1]: layer.statistics for layer in report.layers}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paths_and_that_no_bit_changes(family, dtype):
    fused, alone = tiny.model(family, dtype), tiny.model(family, dtype)
    assert paths(prune(fused, tiny.ids())) == expected_paths(family)
    assert set(paths(prune(alone, tiny.ids(), fuse_statistics=False)).values()) == {"standalone"}
    for (name, left), right in zip(fused.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(left, right), name


def row_collector(sums: list[torch.Tensor]):
    def rows_of(_layer: str, x: torch.Tensor) -> torch.Tensor:
        sums.append(torch.zeros(x.shape[-1]))
        return sums[-1]

    return rows_of


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3"])
def test_a_block_with_fused_forwards_gives_the_same_bits(family):
    model = tiny.model(family)
    blocks = find_blocks(model)
    with torch.no_grad():
        recording = record_calls(model, blocks, [tiny.ids()])
        for block, (call,) in zip(blocks, recording.calls, strict=True):
            plan = fusion.observe(block, recording.hidden[0], call)
            assert len(plan.fused) == 3
            expected = run_block(block, recording.hidden[0], call)
            sums: list[torch.Tensor] = []
            with plan.installed(block, row_collector(sums), lambda *_: None):
                assert torch.equal(run_block(block, recording.hidden[0], call), expected)
            assert len(sums) == 3
            assert all((total > 0).all() for total in sums)
            recording.hidden[0] = expected


def test_norms_that_feed_no_linear_layer_are_left_alone():
    names = {fused.module for fused in plan_of(tiny.model("qwen3")).fused}
    assert names == {"input_layernorm", "post_attention_layernorm", "mlp"}
    names = {fused.module for fused in plan_of(tiny.model("gemma3")).fused}
    assert names == {"input_layernorm", "pre_feedforward_layernorm", "mlp"}


def plan_of(model) -> fusion.Plan:
    blocks = find_blocks(model)
    with torch.no_grad():
        recording = record_calls(model, blocks, [tiny.ids()])
        return fusion.observe(blocks[0], recording.hidden[0], recording.calls[0][0])


class CenteredRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class ClampedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1e-3, 1e-3))


class ScaledMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", [CenteredRMSNorm, ClampedMLP, ScaledMLP])
def test_a_name_alone_is_not_enough(kind):
    model = tiny.model()
    for layer in model.model.layers:
        (layer.mlp if issubclass(kind, LlamaMLP) else layer.input_layernorm).__class__ = kind
    report = prune(model, tiny.ids())
    changed = {"q_proj"} if kind is CenteredRMSNorm else {"down_proj"}
    assert {name for name in changed if paths(report)[name] != "standalone"} == set()
    assert paths(report)["gate_proj"] == "rms_norm"


def test_a_forward_that_someone_put_on_a_module_is_kept():
    model = tiny.model()
    norm = model.model.layers[0].input_layernorm
    own = norm.forward
    norm.forward = own
    assert "input_layernorm" not in {fused.module for fused in plan_of(model).fused}
    prune(model, tiny.ids())
    assert norm.__dict__["forward"] is own


@pytest.mark.parametrize("where", ["mlp.gate_proj", "self_attn.o_proj"])
def test_everything_comes_back_after_an_error(where):
    model = tiny.model()
    calls = []

    def fail(_module, _args):
        calls.append(where)
        if len(calls) == 3:  # the first two batches: one that is watched, one that counts
            raise RuntimeError("stop")

    model.model.layers[0].get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        prune(model, tiny.ids(), batch_size=2)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_the_probe_off_the_cpu():
    """Two values apart by one unit pass, by three do not; on the CPU only equal bits do."""
    want = torch.linspace(0.5, 1.5, 64).to(torch.bfloat16)
    near, far = (want.view(torch.int16).add(units).view(torch.bfloat16) for units in (1, 3))
    assert fusion.agree(want, want.clone())
    assert not fusion.agree(near, want)
    assert fusion.is_close(near, want)
    assert not fusion.is_close(far, want)
    assert fusion.is_close(want.float() * (1 + 1e-6), want.float())
    assert not fusion.is_close(want.float() * (1 + 1e-5), want.float())
    assert not fusion.is_close(torch.full_like(want, torch.nan), want)
