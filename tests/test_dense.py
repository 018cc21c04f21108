"""Products with dense weights: the operator on every backend, and the layers of a packed model that stay dense."""

from __future__ import annotations

import copy
import json

import backends
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, WIDTHS, weight_of
from test_quantized import AtTheEnd
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from wanda_kernels import compress, decompress, ops, prune
from wanda_kernels.packed import dense, dispatch
from wanda_kernels.packed.dense import DenseLinear
from wanda_kernels.packed.model import dense_layers

BACKENDS = [name for name in backends.names() if name != "cuda-simt"]  # on CUDA it is torch's product
ON_CPU = [name for name in BACKENDS if name.startswith("cpu")]
FINITE = ("normal", "ties", "heavy tail", "zeros", "denormal", "four bits")
DENORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # the smallest ones


@pytest.fixture(autouse=True)
def no_choices():
    dispatch.clear()
    yield
    dispatch.clear()


def product_of(backend):
    return backends.implementation(backend, "dense_linear")


def near(got, x, weight, bias=None):
    """As near to float64 as a float32 sum, rounded once: test_packed.py's tolerance."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + 1
    unit = torch.finfo(got.dtype).eps / 2
    return bool(((got.double() - exact).abs() <= 2e-6 * size + unit * exact.abs() * 1.01).all())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_products_against_float64(backend, data):
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, cols = data.draw(st.sampled_from([1, 2, 3, 7, 8, 9, 63, 130])), data.draw(st.sampled_from(WIDTHS))
    tokens = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33]))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight = torch.from_numpy(weight_of(data.draw(st.sampled_from(FINITE)), rows, cols, generator)).clamp(-30, 30)
    x = torch.from_numpy(generator.standard_normal((tokens, cols)))
    bias = torch.from_numpy(generator.standard_normal(rows)).to(dtype) if data.draw(st.booleans()) else None
    weight, x = weight.to(dtype), x.to(dtype)
    got = product_of(backend)(x, weight, bias)
    assert got.dtype == dtype
    assert near(got, x, weight, bias)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_nan_and_infinity_go_through(backend, dtype, tokens):
    generator = np.random.default_rng(tokens)
    for cols in (1, 15, 64, 100):
        weight = torch.from_numpy(weight_of("non-finite", 40, cols, generator))
        weight[::2].nan_to_num_(0, 0, 0)  # rows without any
        weight, x = weight.to(dtype), torch.from_numpy(generator.standard_normal((tokens, cols))).to(dtype)
        x[:, ::3] = 0  # beside infinity: NaN
        exact = (x.double()[:, None] * weight.double()).sum(dim=2)
        got = product_of(backend)(x, weight)
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(got.isposinf(), exact.isposinf())
        assert torch.equal(got.isneginf(), exact.isneginf())
        assert got[:, ::2].isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_count(backend, dtype):
    """Multiples of the smallest one: every sum is exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7, 8, (13, 100), generator=generator) * DENORMAL[dtype]
    x = torch.randint(-1, 2, (3, 100), generator=generator)
    exact = (x.double() @ weight.double().T).to(dtype)
    assert bool(exact.count_nonzero())
    assert torch.equal(product_of(backend)(x.to(dtype), weight.to(dtype)), exact)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "cpu-reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_any_batch_and_for_any_number_of_threads(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, 300, generator=generator).to(dtype) for size in (701, 32))
    expected = product_of(backend)(x, weight)
    for tokens in (1, 2, 3, 4, 8, 16):
        assert torch.equal(torch.cat([product_of(backend)(part, weight) for part in x.split(tokens)]), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(product_of(backend)(x, weight), expected)
    finally:
        torch.set_num_threads(threads)


def test_shapes():
    weight, bias = torch.randn(10, 33), torch.randn(10)
    for shape in ((33,), (2, 33), (2, 3, 33), (0, 33), (2, 0, 33), (40, 33)):
        x = torch.randn(shape)
        torch.testing.assert_close(ops.dense_linear(x, weight, bias), linear(x, weight, bias))
    transposed = torch.randn(33, 5).t()
    torch.testing.assert_close(ops.dense_linear(transposed, weight), linear(transposed, weight))
    for rows, cols in ((0, 5), (5, 0), (0, 0)):
        assert torch.equal(ops.dense_linear(torch.ones(2, cols), torch.ones(rows, cols)), torch.zeros(2, rows))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
def test_nothing_is_read_past_the_tensors(backend, dtype, rows):
    at_the_end = AtTheEnd()
    for cols in (1, 7, 8, 15, 33, 64, 250):
        weight, bias = at_the_end(torch.randn(rows, cols).to(dtype)), at_the_end(torch.randn(rows).to(dtype))
        for tokens in (1, 2, 4, 8, 9):
            x = at_the_end(torch.randn(tokens, cols).to(dtype))
            assert near(product_of(backend)(x, weight, bias), x, weight, bias)


# ---- The layer.


def layer_of(rows=40, cols=64, dtype=torch.bfloat16, bias=True):
    layer = nn.Linear(cols, rows, bias).to(dtype).requires_grad_(False)
    dense.serve_dense(layer)
    assert type(layer) is DenseLinear
    return layer


@pytest.fixture
def products(monkeypatch):
    """The rows of x of each call of our operator by a layer."""
    seen = []

    def product(x, weight, bias):
        seen.append(x.numel() // x.shape[-1])
        return ops.dense_linear(x, weight, bias)

    monkeypatch.setattr(dense, "_PRODUCT", product)
    return seen


def test_a_shape_is_timed_once_and_can_be_fixed(tmp_path, products, monkeypatch):
    layer, x = layer_of(), torch.randn(1, 3, 64).bfloat16()
    assert near(layer(x)[0], x[0], layer.weight, layer.bias)
    ((name, chosen),) = dispatch.choices().items()
    assert name.startswith("dense bfloat16 40x64 tokens 4 cpu ")
    assert chosen in dispatch.DENSE_WAYS
    assert len(products) >= 3
    monkeypatch.setattr(dispatch, "_fastest", lambda *_: pytest.fail("timed again"))
    layer(x)
    for way in dispatch.DENSE_WAYS:
        (tmp_path / "choices.json").write_text(json.dumps({name: way}))
        dispatch.clear()
        dispatch.load(tmp_path / "choices.json")
        products.clear()
        layer(x)
        assert products == ([3] if way == "own" else [])
    dispatch.clear()
    dispatch.choices()[name] = "packed"
    with pytest.raises(ValueError, match=r"has 'packed' for dense .*, it must be own or torch"):
        layer(x)


@pytest.mark.parametrize("bias", [False, True])
def test_all_else_is_torchs(products, bias, monkeypatch):
    """Many tokens, gradients, autocast, other types and devices, wrong shapes, computed weights."""
    monkeypatch.setattr(dispatch, "choose", lambda *_: pytest.fail("asked"))
    layer = layer_of(dtype=torch.float32, bias=bias)
    plain = nn.Linear(64, 40, bias).requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    many = torch.randn(3, 3, 64)
    assert torch.equal(layer(many), plain(many))
    assert layer(many[:0]).shape == (0, 3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
        assert layer(x).dtype == torch.bfloat16
    for learning in (x, *layer.parameters()):
        layer.zero_grad()
        learning.requires_grad_()
        layer(x).sum().backward()
        assert learning.grad.count_nonzero()
        learning.requires_grad_(False)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    for wrong in (torch.randn(2, 63), torch.randn(2, 64).bfloat16(), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            layer(wrong)
    other = {"weight": torch.zeros(40, 64)}
    assert torch.equal(torch.func.functional_call(layer, other, x), linear(x, other["weight"], layer.bias))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(2, 64)).shape == (2, 40)
    assert layer.to("meta")(x.to("meta")).shape == (2, 40)
    assert not products


def test_columns_in_another_order_are_torchs(products):
    layer = layer_of(64, 40)
    layer.weight.data = torch.randn(40, 64).bfloat16().t()
    x = torch.randn(2, 40).bfloat16()
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    assert not products


@pytest.mark.parametrize(("dtype", "tokens", "is_ours"), [
    (torch.bfloat16, 8, True), (torch.float16, 1, True), (torch.float32, 1, False), (torch.bfloat16, 9, False),
])  # fmt: skip
@pytest.mark.parametrize("has_vectors", [True, False])
def test_compiled(dtype, tokens, is_ours, has_vectors, monkeypatch):
    monkeypatch.setattr(dense, "_HAS_VECTORS", has_vectors)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    layer, x = layer_of(dtype=dtype), torch.randn(tokens, 64).to(dtype)
    with torch.no_grad():
        got = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert near(got, x, layer.weight, layer.bias)
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert (torch.ops.wanda.dense_linear.default in targets) == (is_ours and has_vectors)


# ---- Models.


def packed_model(family="llama tied", dtype=torch.float32):
    model = tiny.model(family, dtype, hidden_size=128, intermediate_size=192)
    prune(model, tiny.ids(), sparsity=0.5)
    return model


@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_ties_hooks_and_files_stay_as_they_are(family, tmp_path):
    model = packed_model(family, torch.bfloat16)
    head, weight, called = model.lm_head, model.lm_head.weight, []
    head.register_forward_hook(lambda *_: called.append(True))
    compress(model)
    assert model.lm_head is head
    assert type(head) is DenseLinear
    assert head.weight is weight
    assert (model.model.embed_tokens.weight is weight) == (family == "llama tied")
    model(tiny.ids())
    assert called
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="cpu")
    assert type(loaded.lm_head) is DenseLinear
    assert (loaded.model.embed_tokens.weight is loaded.lm_head.weight) == (family == "llama tied")
    copied = copy.deepcopy(loaded)
    assert type(copied.lm_head) is DenseLinear
    assert (copied.model.embed_tokens.weight is copied.lm_head.weight) == (family == "llama tied")
    loaded.save_pretrained(tmp_path / "b")
    dequantized = copy.deepcopy(loaded).dequantize()  # transformers' config has the dtype's name by now
    assert (type(dequantized.lm_head), dequantized.dtype) == (nn.Linear, torch.bfloat16)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    decompress(loaded)
    assert {type(module) for module in loaded.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_generation_is_that_of_torchs_products(products, monkeypatch):
    model, prompt = packed_model(), tiny.ids(2, 5)
    compress(model)
    found = {}
    for way in dispatch.DENSE_WAYS:
        dispatch.clear()
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "_fastest", lambda ways, *_, way=way: way if way in ways else "packed")
            with torch.no_grad():
                logits = model(prompt[:, :4]).logits
            found[way] = logits, model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert products.count(2) >= 6
    torch.testing.assert_close(found["own"][0], found["torch"][0])
    assert torch.equal(found["own"][1], found["torch"][1])


def test_large_weights_move_together(monkeypatch):
    """Into huge pages, as one: what is tied is not there twice."""
    model = packed_model()
    monkeypatch.setattr(dense, "in_huge_pages", torch.clone)
    before = model.lm_head.weight.clone()
    compress(model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, before)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    model = packed_model("llama")
    model.lm_head.forward = lambda x: x[..., :5]
    compress(model)
    assert type(model.lm_head) is nn.Linear
    assert model(tiny.ids()).logits.shape == (5, 24, 5)


def test_why_a_layer_is_dense_is_not_its_class():
    model = packed_model("llama biases")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    compress(model)
    assert type(model.model.layers[0].mlp.up_proj) is DenseLinear
    ((name, reason),) = dense_layers(model).items()
    assert name == "model.layers.0.mlp.up_proj"
    assert reason.startswith("too few of its weights are zero")


def test_an_adapter_on_a_dense_layer_learns():
    peft = pytest.importorskip("peft")
    model = packed_model("llama")
    compress(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model(tiny.ids(1, 4)).logits.square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient.count_nonzero() for gradient in gradients)
