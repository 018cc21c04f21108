"""plan: what is counted is right; the estimates move as they must."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
from transformers import AutoConfig, LlamaConfig

from wanda_kernels.cli.app import main
from wanda_kernels.plan import H100, predict, shape_of
from wanda_kernels.pruning.blocks import find_blocks

LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=32000, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "llama tied", "gemma2", "opt"])
def test_counts_what_the_model_has(family, tmp_path):
    model = tiny.model(family)
    model.save_pretrained(tmp_path)
    shape = shape_of(AutoConfig.from_pretrained(tmp_path))
    assert shape.model_bytes == sum(p.numel() * 4 for p in model.parameters())
    block = find_blocks(model)[0]
    assert shape.block_weights == sum(linear.weight.numel() for linear in block.matrices.values())
    assert (shape.blocks, shape.width, shape.itemsize) == (3, 64, 4)


def test_experts_that_are_not_chosen_are_memory_and_no_work(tmp_path, capsys):
    model = tiny.model("mixtral")
    model.save_pretrained(tmp_path)
    shape = shape_of(AutoConfig.from_pretrained(tmp_path))
    sizes = {name: matrix.weight.numel() for name, matrix in find_blocks(model)[0].matrices.items()}
    in_experts = sum(size for name, size in sizes.items() if "experts" in name)
    assert (shape.experts, shape.chosen) == (4, 2)
    assert shape.block_weights == sum(sizes.values())
    assert shape.token_weights == sum(sizes.values()) - in_experts // 2
    assert shape.inner == 192
    assert shape.inputs == 4 * 64 + 4 * (64 + 96)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path)])
    assert "4 experts a layer, 2 for a token: it reads" in capsys.readouterr().out


def test_of_a_70b_model():
    shape = shape_of(LLAMA_70B)
    assert shape.model_bytes == 2 * 68_976_648_192  # LLaMA-2-70B's parameters
    one, eight = predict(shape, H100), predict(shape, H100, devices=8)
    assert one.bytes_in_memory > 80e9 > one.bytes_streamed
    assert eight.bytes_mapped < 80e9
    assert eight.seconds["forward"] == pytest.approx(one.seconds["forward"] / 8)
    assert one.seconds["exchange"] == 0 < eight.seconds["exchange"]
    assert predict(shape, H100, passes=1).seconds["forward"] == one.seconds["forward"] / 2
    # 2 passes x 262,144 tokens x 2 operations x the blocks' 68.5e9 weights, at a rate of 1e15; attention adds 2 %
    ideal = predict(shape, dataclasses.replace(H100, flops=1e15)).seconds["forward"]
    assert ideal == pytest.approx(2 * 262144 * 2 * 68.5e9 / 1e15, rel=0.03)
    assert predict(shape, H100, devices=64).seconds["forward"] == one.seconds["forward"] / 16  # 16 batches


def test_gram_matrices_are_counted():
    shape = shape_of(LLAMA_70B)
    assert shape.input_squares == 6 * 8192**2 + 28672**2
    assert shape.widest == 28672
    plain, refined = predict(shape, H100), predict(shape, H100, grams=True)
    solved, eight = predict(shape, H100, grams=True, copies=3), predict(shape, H100, devices=8, grams=True)
    assert refined.bytes_streamed - plain.bytes_streamed == 4 * shape.input_squares
    assert solved.bytes_streamed - refined.bytes_streamed == 3 * 4 * 28672**2
    held = 128 * 2048 // 8 * (6 * 8192 + 28672) * 2
    assert eight.bytes_streamed - predict(shape, H100, devices=8).bytes_streamed == 4 * shape.input_squares + held
    assert refined.seconds["Gram matrices"] == 8 * eight.seconds["Gram matrices"]
    assert "Gram matrices" not in plain.seconds


def test_the_document_says_what_the_model_says():
    from benchmarks import cost_model

    assert cost_model.render(cost_model.DOC.read_text()) == cost_model.DOC.read_text()


def test_command(tmp_path, capsys):
    LLAMA_70B.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path), "--gpus", "8", "--memory", "80"])
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert "138 GB in 80 blocks of 1.71 GB" in shown
    assert "estimated, not measured" in shown
    for way in (["--refine"], ["--update"], ["--method", "sparsegpt"]):
        with pytest.raises(SystemExit):
            main(["plan", str(tmp_path), *way])
        assert "Gram matrices of a block's inputs: at most 4.9 GB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path), "--method", "wonder"])
    assert ended.value.code == 2
    assert "--method must be one of wanda" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    assert "nowhere does not exist" in capsys.readouterr().err
