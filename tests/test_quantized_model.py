"""compress(values=int8 | int4): what is stored, what a model with it computes, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import saved
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import call

from wanda_kernels import compress, decompress, ops, prune, reference
from wanda_kernels._checks_quantized import group_of
from wanda_kernels.packed import PackedLinear
from wanda_kernels.packed.model import packed_layers
from wanda_kernels.packed.values import BYTES_AFTER, ValueType, pack_quantized, quantize, quantized_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [ValueType(8, 0), ValueType(8, 64), ValueType(4, 128), ValueType(4, 32)]
NAMES = [f"{kind.name}/{kind.group}" for kind in KINDS]


def sparse(rows, cols, seed=0, pattern=None, dtype=torch.float32):
    torch.manual_seed(seed)
    weight = (torch.randn(rows, cols) * torch.rand(rows, 1)).to(dtype)
    norm = torch.rand(cols)
    mask = reference.nm_mask(weight, norm, 2, 4) if pattern else reference.row_mask(weight, norm, 0.5)
    return weight.masked_fill(mask, 0)


def dequantize(levels, scales):
    """[C_out, C_in], float32: of each level times its scale."""
    group = group_of(levels.shape[1], scales.shape[1])
    return levels.float() * scales.float().repeat_interleave(group, dim=1)[:, : levels.shape[1]]


def arguments(packed):
    """What :func:`pack_quantized` gave, as the operators take it."""
    values, *codes, scales = packed
    codes = [*codes, None, None][:2]
    return values, scales.view(torch.bfloat16), *codes


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7), cols=st.sampled_from([64, 128, 192, 320]), seed=st.integers(0, 99),
    form=st.sampled_from(["bitmap", "2:4", "dense"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_what_is_packed_is_what_was_chosen(kind, rows, cols, seed, form, dtype):
    weight = sparse(rows, cols, seed, form == "2:4", dtype)
    weight[torch.rand(rows) < 0.2] = 0  # rows of which nothing is kept
    levels, scales = quantize(weight, kind)
    packed, kept = pack_quantized(weight, form, kind)
    if form == "dense":
        packed = (packed[0].view(kind.rows(rows), cols), *packed[1:])
    got = ops.unpack_quantized(*arguments(packed), kind.bits, torch.float32)
    assert torch.equal(got, dequantize(levels, scales))
    assert not got[weight == 0].any()
    assert sum(tensor.nbytes for tensor in packed) == quantized_bytes(weight, form, kind)
    assert kept == (packed[0].numel() - BYTES_AFTER if form == "bitmap" else 0)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_the_nearest_values_of_a_good_scale(kind):
    weight = sparse(40, 256)
    levels, scales = quantize(weight, kind)
    most = 1 << (kind.bits - 1)
    assert levels.min() >= -most
    assert levels.max() <= most - 1
    step = scales.float().repeat_interleave(kind.columns(256), dim=1)
    inside = (levels > -most) & (levels < most - 1)
    error = (dequantize(levels, scales) - weight).abs()
    assert (error[inside] <= step[inside] * 0.5001).all()
    relative = float(error.square().sum() / weight.square().sum()) ** 0.5
    assert relative < (0.01 if kind.bits == 8 else 0.1)
    largest = weight.view(40, -1, kind.columns(256)).abs().amax(dim=2)
    plain = (largest / (most - 1)).repeat_interleave(kind.columns(256), dim=1)
    nearest = (weight / plain).round() * plain
    assert error.square().sum() <= (nearest - weight).square().sum() * 1.01


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad):
    weight = sparse(4, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="weight holds NaN or inf: it cannot be quantised"):
        quantize(weight, KINDS[0])


def test_small_and_large_weights_have_a_scale():
    weight = sparse(8, 64) * torch.tensor([1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e30, 0.0])[:, None]
    for kind in KINDS:
        back = dequantize(*quantize(weight, kind))
        for row, one in zip(weight, back, strict=True):
            assert ((row - one).norm() <= 0.15 * row.norm()).all()


@pytest.mark.parametrize(
    ("values", "group_size", "message"),
    [
        ("int3", None, "values must be float, int8 or int4, got 'int3'"),
        ("float", 64, "group_size 64 needs values int8 or int4"),
        ("int4", 0, "group_size must be 32, 64 or 128 with values int4, got 0"),
        ("int8", 48, r"group_size must be 0, 32, 64 or 128 with values int8 \(0: a whole row\), got 48"),
    ],
)
def test_what_is_no_kind_of_value(values, group_size, message):
    with pytest.raises(ValueError, match=message):
        ValueType.parse(values, group_size)
    with pytest.raises(ValueError, match=message):
        compress(tiny.model(), values=values, group_size=group_size)


def pruned(family="llama", **how):
    model = tiny.model(family, intermediate_size=128)  # a multiple of 64
    prune(model, tiny.ids(), **(how or {"sparsity": 0.5}))
    return model


WAYS = [
    {"values": "int8"}, {"values": "int8", "group_size": 64}, {"values": "int4"}, {"values": "int4", "group_size": 32},
    {"values": "int8", "head": "int8"}, {"head": "int8"},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_a_model_computes_with_what_is_stored(way, target):
    model = pruned(**target)
    report = compress(model, **way)
    assert report.packed_bytes == sum(layer.nbytes() for layer in packed_layers(model).values())
    assert f"{report.bits_per_weight:.2f} bits a weight" in str(report)
    dense = copy.deepcopy(model)
    decompress(dense)
    ids = tiny.ids()
    got, want = model(ids).logits, dense(ids).logits
    bound = 0.02 if way.get("values") == "int4" else 1e-3  # x is rounded, too
    assert (got - want).norm() <= bound * want.norm()
    if way.get("values") == "int8" and "head" not in way:
        plain = pruned(**target)(ids).logits
        assert (got - plain).norm() <= 0.05 * plain.norm()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["llama tied", "mixtral", "gemma2"])
def test_saved_and_loaded(way, family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = pruned(family)
    compress(model, **way)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = tiny.ids()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    for name, layer in packed_layers(model).items():
        again = packed_layers(loaded)[name]
        assert layer.describe() == again.describe()
        assert torch.equal(layer.unpacked(), again.unpacked())
    if "head" in way:
        assert isinstance(loaded.get_output_embeddings(), PackedLinear)
        assert loaded.get_input_embeddings().weight.is_floating_point()
        assert not loaded.config.tie_word_embeddings


def test_what_is_read_outside_of_its_layer_stays_dense(tmp_path):
    from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, time_step_rank=64))
    prune(model, None, method="magnitude")
    with pytest.raises(ValueError, match=r"head must be float for a MambaForCausalLM: lm_head cannot be packed"):
        compress(model, values="int8", head="int8")
    for values in ("float", "int8", "int4"):
        packed = copy.deepcopy(model)
        report = compress(packed, values=values)
        why = "its model uses dt_proj.weight outside of the layer"
        assert report.dense["backbone.layers.0.mixer.dt_proj"] == why
        packed.save_pretrained(tmp_path / values)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / values)
        ids = tiny.ids()
        assert torch.equal(loaded(ids).logits, packed(ids).logits)


def test_nothing_is_packed_where_something_cannot_be():
    model = pruned()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj holds NaN or inf"):
        compress(model, values="int8")
    assert not packed_layers(model)
    model = pruned()
    model.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="lm_head holds NaN or inf"):
        compress(model, head="int8")
    assert not packed_layers(model)


def test_another_width_is_refused_before_it_is_filled_up():
    torch.manual_seed(0)
    layer = torch.nn.Linear(100, 36, bias=False)
    layer.weight.data.masked_fill_(torch.rand(36, 100) < 0.5, 0)
    for kind in (None, KINDS[0]):
        packed = PackedLinear.from_linear(layer, "bitmap", kind)
        packed(torch.randn(2, 100))
        for width in (65, 110, 128):
            with pytest.raises(ValueError, match=rf"x must be \[\.\., 100\], got \[2, {width}\]"):
                packed(torch.randn(2, width))


def test_a_tied_embedding_that_stays_is_told():
    for family, is_tied in (("llama tied", True), ("llama", False)):
        model = tiny.model(family, hidden_size=128)
        prune(model, method="magnitude")
        report = compress(model, head="int8")
        held = model.get_input_embeddings().weight.nbytes if is_tied else 0
        assert report.embedding_bytes == held
        assert ("the embedding keeps the weight that the output layer shared" in str(report)) == is_tied


def test_a_head_that_would_not_shrink_stays():
    model = tiny.model(intermediate_size=128)
    prune(model, tiny.ids())
    report = compress(model, head="int8")
    assert report.formats["lm_head"] == "dense int8"
    model = tiny.model(hidden_size=16, head_dim=4, intermediate_size=128)  # filled up to 64
    prune(model, tiny.ids())
    report = compress(model, head="int8")
    assert report.formats["lm_head"] == "dense"
    assert report.dense["lm_head"] == "8 bits would not shrink it"


def test_large_float16_weights_stay_finite():
    weight = sparse(4, 64, dtype=torch.float16)
    weight[0, :2] = torch.tensor([-65504.0, 65504.0])
    for kind in KINDS:
        packed = pack_quantized(weight, "bitmap", kind)[0]
        assert ops.unpack_quantized(*arguments(packed), kind.bits, torch.float16).isfinite().all()


def test_types_go_with_the_model_and_scales_stay():
    model = pruned()
    compress(model, values="int8")
    layer = next(iter(packed_layers(model).values()))
    before = layer.unpacked()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert layer.dtype == dtype
        assert layer.unpacked().dtype == dtype
        assert model(tiny.ids()).logits.dtype == dtype
    assert torch.equal(layer.unpacked(), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, before.sum(dim=0).expand(2, -1))


def damaged(tensors, name, change):
    tensors[name] = change(tensors[name].clone())


def shifted(starts):
    starts[1] += 1
    return starts


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight_scales", lambda t: t.fill_(0x7FC0), "its scales must be finite"),
        ("weight_scales", lambda t: t.fill_(-0x4080), "its scales must be finite and >= 0"),
        ("weight_starts", shifted, "its row starts do not fit its bitmap"),
        ("weight_bitmap", lambda t: t.fill_(255), "its row starts do not fit its bitmap"),
    ],
)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_damaged_file_is_refused(values, part, change, message, tmp_path):
    from transformers import AutoModelForCausalLM

    model = pruned()
    compress(model, values=values)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    damaged(tensors, f"model.layers.1.mlp.down_proj.{part}", change)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"packed layer model.layers.1.mlp.down_proj is damaged: {message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"format": "dense"}, {"format": "bitmap", "kept": 9, "values": "int5"}, {"format": "2:4", "values": 8},
        {"format": "2:4", "values": "int4", "group_size": 0}, {"format": "2:4", "values": "int8", "group_size": "64"},
        {"format": "2:4", "group_size": 64},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_says_something_else_is_refused(said, tmp_path):
    from transformers import AutoModelForCausalLM

    model = pruned()
    compress(model, values="int8")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"] = said
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj is described as"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_on_the_command_line(tmp_path, capsys):
    pruned().save_pretrained(tmp_path / "pruned")
    saved.tokenizer().save_pretrained(tmp_path / "pruned")
    out = tmp_path / "packed"
    code, said, _ = call(capsys, "compress", tmp_path / "pruned", "--out", out, "--values", "int4", "--head", "int8")
    assert code == 0
    assert "bitmap int4, 1 dense int8" in said
    assert "bits a weight" in said
    for wrong, message in (
        (["--values", "int2"], "--values must be float, int8 or int4, got 'int2'"),
        (["--group-size", "64"], "--group-size 64 needs values int8 or int4"),
        (["--head", "int4"], "--head must be float or int8, got 'int4'"),
    ):
        code, _, error = call(capsys, "compress", tmp_path / "pruned", "--out", tmp_path / "other", *wrong)
        assert code == 2
        assert message in error
