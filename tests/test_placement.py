"""Where the files' tensors lie in the model: against from_pretrained itself, and streamed there and back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_resume import EndsAt, digest
from test_streaming import one_thread, tensors  # noqa: F401  (a fixture)
from torch import Tensor
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps, WeightConverter

from wanda_kernels import prune
from wanda_kernels.models import placement as placements
from wanda_kernels.models.checkpoint import Checkpoint
from wanda_kernels.models.load import auto_class, load_model
from wanda_kernels.models.watch import Watch
from wanda_kernels.pruning.blocks import Block
from wanda_kernels.pruning.source import Done
from wanda_kernels.pruning.stopwatch import Stopwatch
from wanda_kernels.streaming import stream_prune
from wanda_kernels.streaming.blocks import StreamedBlocks
from wanda_kernels.streaming.output import SameFiles
from wanda_kernels.streaming.skeleton import build

TEXT = tiny.COMMON | {"head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DENSE = {  # whose files have other names
    "gpt_neox": {},
    "exaone": {},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 16,
        "head_dim": 16,
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0] * 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 8},
        "vision_config": VISION | {"image_size": 32, "patch_size": 8},
        "mm_tokens_per_image": 4,
    },
    "got_ocr2": {
        "text_config": tiny.COMMON | {"model_type": "qwen2"},
        "vision_config": VISION
        | {"image_size": 32, "patch_size": 8, "output_channels": 16, "global_attn_indexes": [1], "mlp_dim": 64},
        "image_token_id": 5,
    },
    "fuyu": {"text_config": tiny.COMMON | {"model_type": "persimmon"}, "image_size": 32, "patch_size": 8},
}
OTHERS = {  # whose files also hold other shapes, or that have experts
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 16},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "deepseek_v3": EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "jamba": {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
}


IN_FLOAT32 = [f"model.layers.{i}.mlp.gate.weight" for i in range(3)]  # DeepSeek's routers, which a run in memory widens


def save(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes):
    """A random model, in many files, and its class."""
    config = AutoConfig.for_model(family, **(tiny.COMMON | (DENSE | OTHERS).get(family, {}) | changes))
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=dtype)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.1)  # norms and biases begin with ones and zeros
    model.save_pretrained(folder, max_shard_size="60KB")
    return type(model)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("family", [*DENSE, *OTHERS])
def test_equals_from_pretrained(family, tmp_path):
    kind = save(tmp_path, family)
    loaded = kind.from_pretrained(tmp_path, dtype="auto")
    expected = loaded.state_dict()
    checkpoint = Checkpoint(tmp_path)
    model, placement = build(tmp_path, checkpoint, "auto")
    assert placement.left == []
    assert placement.files.keys() == checkpoint.entries.keys()
    for name, own in model.state_dict().items():
        assert own.dtype == expected[name].dtype
        if name in placement.parts:
            found = torch.full(own.shape, 7, dtype=own.dtype)
            placement.read(name, found)
            assert torch.equal(found, expected[name]), name
    for (name, found), (other, buffer) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other
        assert name in placement.parts or same(found, buffer), name
    tied = {tensor.data_ptr() for name, tensor in expected.items() if name in placement.parts}
    assert all(tensor.data_ptr() in tied for tensor in expected.values())


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_come_and_go_as_they_are(family, tmp_path, monkeypatch):
    save(tmp_path / "model", family)
    (tmp_path / "out").mkdir()
    checkpoint = Checkpoint(tmp_path / "model")
    model, placement = build(tmp_path / "model", checkpoint, "auto")
    blocks = [Block(f"model.layers.{i}", module, {}) for i, module in enumerate(model.model.layers)]
    output = SameFiles(tmp_path / "out", blocks, placement)
    # Nothing goes through a second tensor: experts lie in the files one by one, each in one piece.
    monkeypatch.setattr(checkpoint, "load", lambda tensor: pytest.fail(f"{tensor} was loaded beside its place"))
    source = StreamedBlocks(model, blocks, placement, output, None, torch.device("cpu"), Stopwatch(torch.device("cpu")))
    source.begin(0)
    for index, block in enumerate(blocks):
        with source.holding(index):
            assert not any(tensor.is_meta for tensor in block.module.state_dict().values())
        source.finished(index, Done(index + 1), None)
    source.finish()
    output.check_whole()
    source.close()
    for path in (tmp_path / "model").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", [*DENSE, "mixtral", "deepseek_v3", "jamba"])
def test_streamed_under_other_names_it_equals_the_run_in_memory(family, tmp_path):
    save(tmp_path / "model", family)
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    whole = load_model(str(tmp_path / "model"))
    report = prune(whole, tiny.ids())
    whole.save_pretrained(tmp_path / "in memory")
    with pytest.raises(OSError, match="full"):
        stream_prune(tmp_path / "model", tmp_path / "out", tiny.ids(), progress=EndsAt(OSError("full"), block=1))
    stream_prune(tmp_path / "model", tmp_path / "out", tiny.ids(), resume=True)
    stream_prune(tmp_path / "model", tmp_path / "at once", tiny.ids())
    assert digest(tmp_path / "out") == digest(tmp_path / "at once")
    before, after, expected = (tensors(tmp_path / name) for name in ("model", "out", "in memory"))
    assert list(after) == list(before)
    assert all(same(after[name], expected[name]) for name in after if name not in IN_FLOAT32)
    assert all(same(after[name], before[name]) for name in IN_FLOAT32 if name in after)
    pruned = sum(layer.shape[0] if len(layer.shape) > 2 else 1 for layer in report.layers)
    gated = sum(layer.shape[0] for layer in report.layers if layer.name.endswith("gate_up_proj"))  # two in the files
    assert sum(not torch.equal(after[name], before[name]) for name in after) == pruned + gated
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "model").iterdir()
    } | {"pruning_report.json"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routers_may_have_another_dtype_than_the_model(dtype, tmp_path):
    """DeepSeek's files hold routers in bfloat16, which are loaded in float32, and their biases in float32."""
    save(tmp_path, "deepseek_v3")
    path = next(p for p in tmp_path.glob("*.safetensors") if "model.layers.1.mlp.gate.weight" in load_file(p))
    held = load_file(path)
    held["model.layers.1.mlp.gate.weight"] = held["model.layers.1.mlp.gate.weight"].to(getattr(torch, dtype))
    save_file(held, path, {"format": "pt"})
    model, placement = build(tmp_path, Checkpoint(tmp_path), "auto")
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32
    found = torch.empty(4, 64)
    placement.read("model.layers.1.mlp.gate.weight", found)
    assert torch.equal(found, held["model.layers.1.mlp.gate.weight"].float())


def _change(folder: Path, change) -> None:
    held = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
OTHER = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
DAMAGE = {
    "no expert": (lambda held: held.pop(EXPERT), r"MergeModulelist, Concatenate that transformers applies to model\."),
    "no last expert": (lambda held: held.pop(OTHER), r"is BF16 \[3, 64, 96\] in the checkpoint and .*\[4, 64, 96\]"),
    "another shape": (lambda held: held.update({EXPERT: held[EXPERT][:, :-1].clone()}), "is not known: .*size"),
    "twice": (
        lambda held: held.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 192, 64)}),
        "holds model.layers.1.mlp.experts.gate_up_proj twice",
    ),
    "unknown": (lambda held: held.update(x=torch.zeros(1)), "has no place for: x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused_by_name(damage, tmp_path):
    change, message = DAMAGE[damage]
    save(tmp_path, "mixtral")
    _change(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, Checkpoint(tmp_path), "auto")


class Halve(ConversionOps):
    """Computes."""

    def convert(self, input_dict, source_patterns, target_patterns, **_kwargs):
        return {target_patterns[0]: input_dict[source_patterns[0]][0] / 2}

    @property
    def reverse_op(self):
        return self


def test_an_operation_that_computes_is_refused_by_name(tmp_path, monkeypatch):
    import transformers.conversion_mapping as mapping

    save(tmp_path, "llama")
    converter = WeightConverter("up_proj.weight", "up_proj.weight", [Halve()])
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(
        ValueError, match=r"operation Halve that transformers applies to model\.layers\.0\.mlp\.up_proj"
    ):
        build(tmp_path, Checkpoint(tmp_path), "auto")


def test_a_tensor_of_two_blocks_is_refused(tmp_path):
    save(tmp_path, "llama")
    placement = build(tmp_path, Checkpoint(tmp_path), "auto")[1]
    name = "model.layers.0.mlp.up_proj.weight"
    part = placement.files[name][0]
    placement.files[name].append(placements.Part(name, part.there, name.replace("0", "1"), part.here))
    assert name in placement.files_of("model.layers.0.mlp.")
    placement.files[name] = [
        placements.Part(name, part.there, name.replace("0", "1"), part.here),
        placements.Part(name, placements.View((1,), (1,), 0), name, placements.View((1,), (1,), 0)),
    ]
    with pytest.raises(ValueError, match=r"up_proj\.weight holds .* and more than model\.layers\.0\.\*"):
        placement.files_of("model.layers.0.")


def _scramble(draw: random.Random, x: Tensor, y: Tensor) -> Tensor:
    """Some operations on both, the same for the same ``draw`` and shapes."""
    for _ in range(draw.randint(1, 6)):
        dim, other = draw.randrange(x.dim()), draw.randrange(x.dim())
        operation = {
            "transpose": lambda t, a=dim, b=other: t.transpose(a, b),
            "contiguous": lambda t: t.contiguous(),
            "chunk": lambda t, a=dim: torch.chunk(t, 2, a)[-1],
            "narrow": lambda t, a=dim: t.narrow(a, t.shape[a] // 2, t.shape[a] - t.shape[a] // 2),
            "flatten": lambda t, a=dim: t.flatten(max(0, a - 1), a),
            "unflatten": lambda t, a=dim: t.unflatten(a, (2, -1)) if t.shape[a] % 2 == 0 else t,
            "cat": lambda t, a=dim, u=x, v=y: torch.cat([u, v] if t is u else [v, u], a),
            "stack": lambda t, a=dim, u=x, v=y: torch.stack([u, v] if t is u else [v, u], a),
        }[draw.choice(["transpose", "contiguous", "chunk", "narrow", "flatten", "unflatten", "cat", "stack"])]
        x, y = operation(x), operation(y)
    return x


def test_what_is_watched_is_what_happens():
    """Chains of operations on numbered elements: moved as the watched chain says, they come out the same."""
    followed = 0
    for seed in range(400):
        files = {"a": torch.arange(96).view(8, 12), "b": torch.arange(96, 192).view(8, 12)}
        empty = {name: tensor.to("meta") for name, tensor in files.items()}
        with Watch(empty) as watch:
            value = _scramble(random.Random(seed), *empty.values())
        expected = _scramble(random.Random(seed), *files.values())
        try:
            moves = watch.moves(value)
        except ValueError:  # it has no strides
            continue
        followed += 1
        found = torch.full(expected.shape, -1)
        for here, name, there in moves:
            here.within(found).copy_(there.within(files[name]))
        assert torch.equal(found, expected), seed
        assert sum(here.numel for here, _, _ in moves) == expected.numel()
    assert followed > 300
