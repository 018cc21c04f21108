"""Every family: the block loop is the model's own forward, and pruning reaches every linear layer of the blocks."""

from __future__ import annotations

import pytest
import tiny
import torch

from wanda_kernels import prune
from wanda_kernels.pruning.blocks import find_blocks
from wanda_kernels.pruning.recording import record_calls, run_block

LLAMA_INPUTS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
LLAMA_INPUTS |= {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
INPUTS = {
    "phi3": {name: name for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")},
    "opt": {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "out_proj": "out_proj"}
    | {"fc1": "fc1", "fc2": "fc2"},
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_loop_equals_the_models_forward(family, dtype):
    model = tiny.model(family, dtype)
    ids = tiny.ids()
    blocks = find_blocks(model)
    expected = []
    handle = blocks[-1].module.register_forward_hook(
        lambda _module, _args, output: expected.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for batch in ids.split(2):
            model(input_ids=batch, use_cache=False)
        handle.remove()
        recording = record_calls(model, blocks, list(ids.split(2)))
        for batch, hidden in enumerate(recording.hidden):
            for block, calls in zip(blocks, recording.calls, strict=True):
                hidden = run_block(block, hidden, calls[batch])
            assert torch.equal(hidden, expected[batch])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_linear_of_the_blocks_is_pruned_and_nothing_else(family):
    model = tiny.model(family)
    before = tiny.weights(model)
    report = prune(model, tiny.ids(), sparsity=0.5)
    pruned = {layer.name for layer in report.layers}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in pruned:
            assert ((parameter == 0).sum(dim=1) == parameter.shape[1] // 2).all()
        else:
            assert torch.equal(parameter, before[name])
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    outside = {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}
    assert pruned == linears - outside


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_distinct_inputs(family):
    report = prune(tiny.model(family), tiny.ids(), sparsity=0.5)
    expected = INPUTS.get(family.split()[0], LLAMA_INPUTS)
    found = {layer.name.split(".")[-1]: layer.input_of.split(".")[-1] for layer in report.layers}
    assert found == expected


def test_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="is an encoder-decoder model"):
        prune(T5ForConditionalGeneration(config), tiny.ids())


def test_large_weights_outside_linear_layers_are_refused():
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=128, d_model=64, n_layer=1, n_head=4, d_inner=96)).eval()
    with pytest.raises(ValueError, match=r"layer\.0\.rel_attn\.\w \[64, 4, 16\] is in no linear layer"):
        prune(model, tiny.ids())


def test_transposed_linear_layers_are_pruned():
    """GPT-2's Conv1D."""
    model = tiny.model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64)
    report = prune(model, tiny.ids(), sparsity=0.5)
    assert [layer.shape for layer in report.layers[:2]] == [(192, 64), (64, 64)]
    assert ((model.transformer.h[0].attn.c_attn.weight == 0).sum(dim=0) == 32).all()


def test_shared_weights_are_refused():
    model = tiny.model()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is shared with model\.layers\.0"):
        prune(model, tiny.ids())


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = tiny.model()
    with pytest.raises(ValueError, match="on one device that holds data, they are on: meta"):
        prune(model, tiny.ids())
