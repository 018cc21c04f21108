"""The paper's baselines and ablations, against plain reimplementations of the official codes' rules."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import itertools
import re
import weakref
from pathlib import Path

import backends
import pytest
import tiny
import torch

from benchmarks import official_methods as official
from wanda_kernels import Owl, PruneSpec, methods, prune
from wanda_kernels.methods import METHODS, create, sparsegpt
from wanda_kernels.methods.inputs import LayerInputs, factor_of
from wanda_kernels.methods.owl import outlier_ratio
from wanda_kernels.methods.ria import Ria
from wanda_kernels.methods.select import Group, kth_smallest
from wanda_kernels.methods.sparsegpt import Score, _walk
from wanda_kernels.pruning.blocks import find_blocks, matrices_of

pytestmark = pytest.mark.usefixtures("one_thread")


def both(rule, family="llama", **options):
    """The model pruned by us and by the plain loop, and our report."""
    ours = tiny.model(family)
    plain = copy.deepcopy(ours)
    report = prune(ours, tiny.ids(), **options)
    official.prune_layer_by_layer(plain, tiny.ids(), rule)
    return ours, plain, report


def pairs(ours, plain):
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if a.dim() == 2 and ".layers." in name:
            yield name, a.detach(), b.detach()


def assert_masks_and_weights(ours, plain, bits=2):
    """Masks up to ``bits`` a layer: products are added in another order, and a threshold may fall between."""
    for name, a, b in pairs(ours, plain):
        same = (a == 0) == (b == 0)
        assert int((~same).sum()) <= bits, name
        torch.testing.assert_close(a[same], b[same], rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_variant(sparsity):
    ours, plain, report = both(functools.partial(official.variant, sparsity=sparsity), sparsity=sparsity, variant=True)
    assert all(torch.equal(a, b) for _, a, b in pairs(ours, plain))
    # one alpha a matrix: rows of different sparsity, the matrix near the target
    assert report.achieved_sparsity == pytest.approx(sparsity, abs=0.02)
    zeros = (ours.model.layers[0].mlp.up_proj.weight == 0).sum(dim=1)
    assert zeros.min() < zeros.max()


def test_ria():
    ours, plain, report = both(functools.partial(official.ria, sparsity=0.5), method="ria")
    assert_masks_and_weights(ours, plain)
    assert report.achieved_sparsity == pytest.approx(0.5, abs=1e-4)
    assert report.options == {}


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8", "block_size": 32}])
def test_sparsegpt(family, target):
    pattern = tuple(map(int, target["pattern"].split(":"))) if "pattern" in target else None
    rule = functools.partial(official.sparsegpt, sparsity=0.5, pattern=pattern, block=target.get("block_size", 128))
    ours, plain, report = both(rule, family, method="sparsegpt", **target)
    assert_masks_and_weights(ours, plain, bits=12)
    dense = tiny.model(family)
    changed = [(a != b)[a != 0].float().mean() for _, a, b in pairs(ours, dense)]
    assert min(changed) > 0.5  # what is kept was updated
    assert all(layer.damping == 0.01 for layer in report.layers)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize(("metric", "order"), [*itertools.product(("mag", "wanda"), ("seq", "iter"))])
def test_ablations(metric, order, pattern):
    n_m = (2, 4) if pattern else None

    def rule(weight, inputs):
        if order == "iter":
            return official.sparsegpt(weight, inputs, 0.5, n_m, metric)
        score = weight.abs() * (official.norms(inputs) if metric == "wanda" else 1)
        if pattern:
            mask = official.lowest(score.view(-1, 4), 2).view_as(score)
        elif metric == "wanda":
            mask = official.lowest(score, score.shape[1] // 2)
        else:
            mask = score <= torch.sort(score.flatten()).values[score.numel() // 2]
        return official.sparsegpt(weight, inputs, 0.5, n_m, mask=mask)

    ours, plain, _ = both(rule, method=f"ablate_{metric}_{order}", pattern=pattern)
    assert_masks_and_weights(ours, plain, bits=12)


@pytest.mark.parametrize("backend", backends.statistics_names()[-1:])
@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 8), (1, 5)])
@pytest.mark.parametrize("is_squared", [True, False])
def test_sparsegpt_walks_a_block_in_one_launch(backend, pattern, is_squared):
    """The zeros of the loop over columns, and its values to the rounding of up to 128 updates, 6e-8 each."""
    from wanda_kernels.triton import sparsegpt_block

    if backend not in ("triton-interpreter", "cuda"):
        pytest.skip("Triton's interpreter does not run here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for columns, rows in ((40, 7), (128, 3), (5, 3)):
        columns -= columns % (pattern[1] if pattern else 1)
        if columns == 0:
            continue
        inputs = torch.randn(3 * columns, 2 * columns, generator=generator)
        upper = factor_of(inputs.T @ inputs, 0.01).upper[columns:, columns:]
        work = torch.randn(columns, rows, generator=generator).mul(4).round().div(4)  # ties
        pruned = None if pattern else torch.rand(columns, rows, generator=generator) < 0.5
        score = Score(torch.rand(columns, generator=generator).mul(4).ceil(), is_squared)
        want = work.clone()
        want_errors = _walk(want, upper, pruned, score, pattern and methods.Pattern(*pattern))
        got = work.to(device)
        mask = None if pruned is None else pruned.to(device)
        n, m = pattern or (0, 0)
        errors = sparsegpt_block(got, upper.to(device), mask, score.scale.to(device), is_squared, n, m)
        assert torch.equal(got.cpu() == 0, want == 0)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(errors.cpu(), want_errors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", ["sparsegpt", "ablate_wanda_seq", "ablate_mag_iter"])
def test_sparsegpt_solves_a_layer_in_triton_as_in_the_loop(method, target, monkeypatch):
    if not backends.has_interpreter() or torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(300, 80, generator=generator)
    inputs = LayerInputs(tokens.norm(dim=0), 2 / 300 * tokens.T @ tokens)
    spec = PruneSpec(method=method, block_size=32, **target)
    found = []
    for walk in (sparsegpt._walk, sparsegpt._walk_in_triton):
        monkeypatch.setattr(sparsegpt, "_walk", walk)
        weight = torch.randn(9, 80, generator=torch.Generator().manual_seed(2))
        found.append((weight, spec.method.prune_(weight, inputs, 0.5, spec.pattern)))
    (loop, sums), (kernel, other_sums) = found
    assert torch.equal(kernel == 0, loop == 0)
    torch.testing.assert_close(kernel, loop, rtol=1e-5, atol=1e-5)
    assert float(other_sums.sums[0, 0]) == pytest.approx(float(sums.sums[0, 0]), rel=1e-5)


def test_sparsegpt_loses_less_than_its_mask_alone():
    """The update makes up for something, and the error that the solver reports is the one that is measured."""
    updated, alone = tiny.model(), tiny.model()
    with_update = prune(updated, tiny.ids(), method="sparsegpt", exact_error=True, damping=1e-4)
    without = prune(alone, tiny.ids(), method="sparsegpt", weight_update=False, exact_error=True)
    for mine, other in zip(with_update.layers[:7], without.layers[:7], strict=True):
        assert mine.exact_error < other.exact_error, mine.name
        assert mine.estimated_error == pytest.approx(mine.exact_error, rel=0.02), mine.name
    assert without.options == {"weight_update": False}


def test_hessian_once_per_distinct_input_and_for_any_batch_size(monkeypatch):
    made = []
    monkeypatch.setattr("wanda_kernels.methods.inputs.factor_of", lambda *a: made.append(1) or factor_of(*a))
    models = []
    for batch_size in (1, 2, 5):
        models.append(tiny.model())
        prune(models[-1], tiny.ids(), method="sparsegpt", batch_size=batch_size, propagate="dense")
    assert len(made) == 3 * 3 * 4  # runs, blocks, distinct inputs
    for other in models[1:]:
        assert all(torch.equal(a, b) for _, a, b in pairs(models[0], other))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"method": "sparsegpt"}, {"refine": True, "update": True}], ids=str)
def test_gram_matrices_are_let_go_after_their_last_layer(how, monkeypatch):
    seen, held = [], []
    original = LayerInputs.let_go

    def let_go(inputs):
        seen.append(weakref.ref(inputs.hessian))
        original(inputs)
        gc.collect()
        held.append(sum(one() is not None for one in seen))

    monkeypatch.setattr(LayerInputs, "let_go", let_go)
    prune(tiny.model(), tiny.ids(), **how)
    assert len(seen) == 3 * 4  # blocks, distinct inputs
    assert not any(held)


def test_a_hessian_that_cannot_be_factorised_gets_more_damping_and_says_so():
    singular = torch.ones(8, 8)  # of rank 1
    singular[7] = singular[:, 7] = 0  # a dead channel
    factor = factor_of(singular, 0.0)
    assert factor.damping == 0.01
    assert factor.dead.tolist() == [False] * 7 + [True]
    identity = factor.upper.T @ factor.upper @ factor.hessian
    torch.testing.assert_close(identity, torch.eye(8), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="not positive definite, even with damping 100"):
        factor_of(-singular - torch.eye(8), 0.01)

    model = tiny.model(hidden_size=256)  # more channels than the 5 x 24 tokens: singular without damping
    report = prune(model, tiny.ids(), method="sparsegpt", damping=0)
    assert {layer.damping for layer in report.layers if "mlp.down" not in layer.name} == {0.01}
    assert "model.layers.0.self_attn.q_proj: the Hessian could not be factorised; damping 0.01 did" in str(report)


def test_dead_channels_are_zeroed():
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0
    prune(model, tiny.ids(), method="sparsegpt")
    assert (model.model.layers[0].self_attn.q_proj.weight[:, 5] == 0).all()


@pytest.mark.parametrize("name", ["row", "layer", "column", "row:3", "column:4"])
def test_groups(name):
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 9, (10, 12), generator=generator).float()  # many equals
    mask = Group.parse(name).mask(score, 0.4)
    kind, _, width = name.partition(":")
    width = int(width or 1)
    whole = {"row": (width, 12), "column": (10, width), "layer": (10, 12)}[kind]
    for part, chosen in zip(*(blocks_of(t, *whole) for t in (score, mask)), strict=True):
        expected = official.lowest(part.reshape(1, -1), int(part.numel() * 0.4)).view_as(part)
        assert torch.equal(chosen, expected)


def blocks_of(tensor, rows, cols):
    return [part for strip in tensor.split(rows, 0) for part in strip.split(cols, 1)]


@pytest.mark.parametrize("group", ["row", "layer", "column"])
@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt", "ria"])
def test_metric_by_group(method, group):
    """The first block, whose inputs no mask has touched: the lowest scores of each group."""
    model = tiny.model()
    dense = copy.deepcopy(model)
    extra = {"weight_update": False} if method == "sparsegpt" else {}
    report = prune(model, tiny.ids(), method=method, group=group, sparsity=0.3, **extra)
    assert report.options == {"group": group} | extra
    seen = {}

    def scores(weight, inputs):
        norm = official.norms(inputs)
        size = weight.abs()
        h = official.hessian(inputs)
        damped = h + 0.01 * torch.diag(h).mean() * torch.eye(len(h))
        u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        seen[len(seen)] = {
            "wanda": size * norm,
            "magnitude": size,
            "sparsegpt": size / torch.diag(u),
            "ria": (size / size.sum(0) + size / size.sum(1)[:, None]) * norm.sqrt(),
        }[method]
        return weight

    official.prune_layer_by_layer(dense, tiny.ids(), scores)
    for score, (name, a, _) in zip(seen.values(), itertools.islice(pairs(model, dense), 7), strict=False):
        parts = {"row": (1, score.shape[1]), "column": (score.shape[0], 1), "layer": tuple(score.shape)}[group]
        wrong = 0
        for part, pruned in zip(blocks_of(score, *parts), blocks_of(a == 0, *parts), strict=True):
            expected = official.lowest(part.reshape(1, -1), int(part.numel() * 0.3)).view_as(part)
            assert int(pruned.sum()) == int(part.numel() * 0.3)
            wrong += int((expected != pruned).sum())
        assert wrong <= 4, name  # rounding of the Hessian


def test_owl():
    owl = Owl(limit=0.1, outlier=2.0)
    model = tiny.model()
    expected = official.owl_sparsities(copy.deepcopy(model), tiny.ids(), 0.6, owl.limit, owl.outlier)
    report = prune(model, tiny.ids(), sparsity=0.6, owl=owl)
    assert max(expected) - min(expected) == pytest.approx(0.2)
    for index, share in enumerate(expected):
        layers = [layer for layer in report.layers if f"layers.{index}." in layer.name]
        for layer in layers:
            assert layer.sparsity == int(layer.shape[1] * share) / layer.shape[1], layer.name
    assert report.options == {"owl": {"limit": 0.1, "outlier": 2.0}}


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "ria", "ablate_wanda_iter"])
def test_owl_on_top_of_any_method(method):
    report = prune(tiny.model(), tiny.ids(), sparsity=0.6, method=method, owl=Owl(outlier=2.0))
    shares = sorted({round(layer.sparsity, 2) for layer in report.layers})
    assert shares[-1] - shares[0] > 0.1
    assert report.achieved_sparsity == pytest.approx(0.6, abs=0.02)


def test_owl_ratio_and_limits():
    weights = {"a": torch.tensor([[1.0, 1.0, 1.0, 9.0]]), "b": torch.ones(1, 4)}
    inputs = dict.fromkeys("ab", LayerInputs(torch.ones(4)))
    assert outlier_ratio(weights, inputs, 4.0) == 1 / 8
    assert Owl().sparsities([3.0, 3.0], 0.5) == [0.5, 0.5]
    assert Owl().sparsities([0.0, 1.0], 0.5) == pytest.approx([0.58, 0.42])
    assert Owl().sparsities([0.0, 1.0], 0.5, [3, 1]) == pytest.approx([0.54, 0.38])


def test_owl_reaches_the_sparsity_where_some_blocks_have_experts():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 4}
    model = tiny.model("qwen3_moe", **sizes, mlp_only_layers=[0])
    report = prune(model, tiny.ids(), sparsity=0.5, owl=Owl(outlier=2.0))
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.008)  # whole columns of a row of 64


@pytest.mark.parametrize("method", ["sparsegpt", "ria", "ablate_mag_seq", "ablate_wanda_iter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(method, dtype):
    model = tiny.model(dtype=dtype)
    report = prune(model, tiny.ids(), method=method, pattern="2:4")
    assert next(model.parameters()).dtype == dtype
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.01)
    for _, weight, _ in pairs(model, model):
        assert ((weight.view(-1, 4) != 0).sum(dim=1) <= 2).all()


@pytest.mark.parametrize("method", ["sparsegpt", "ria", "ablate_mag_iter"])
def test_sparsity_zero_changes_nothing(method):
    model = tiny.model()
    before = tiny.weights(model)
    prune(model, tiny.ids(), sparsity=0, method=method)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "rows"}, "group must be row, layer or column, or row:N or column:N, got 'rows'"),
        ({"group": "layer:2"}, "group must be row, layer or column"),
        ({"group": "layer", "pattern": "2:4"}, "group is for a sparsity, a pattern leaves it no choice"),
        ({"variant": True, "pattern": "2:4"}, "variant is for a sparsity"),
        ({"owl": True, "pattern": "2:4"}, "owl is for a sparsity"),
        ({"variant": True, "method": "magnitude"}, "variant is an option of wanda, not of magnitude"),
        ({"variant": True, "group": "layer"}, "give variant or group, not both"),
        ({"block_size": 64}, "block_size is an option of sparsegpt, ablate_mag_seq, .* not of wanda"),
        ({"damping": 0}, "damping is an option of sparsegpt, .* not of wanda"),
        ({"damping": -1, "method": "sparsegpt"}, r"damping must be in \[0, 100\), got -1"),
        ({"block_size": 0, "method": "sparsegpt"}, "block_size must be at least 1, got 0"),
        (
            {"block_size": 6, "method": "sparsegpt", "pattern": "2:4"},
            "block_size must be a multiple of the pattern's M = 4, got 6",
        ),
        ({"group": "row", "method": "sparsegpt"}, "a group needs weight_update=False"),
        ({"ria_power": -1, "method": "ria"}, r"ria_power must be in \[0, 10\], got -1"),
        ({"owl": Owl(limit=0.6)}, r"owl's limit must be in \(0, 0.5\), got 0.6"),
        ({"owl": Owl(outlier=0)}, "owl's outlier must be above 0, got 0"),
        ({"owl": True, "sparsity": 0.9}, r"sparsity must be in \[0.16, 0.84\), got 0.9"),
        ({"owl": True, "method": "magnitude", "input_ids": None}, "method 'magnitude' with owl needs input_ids"),
    ],
    ids=str,
)
def test_bad_options_change_nothing(options, message):
    model = tiny.model()
    before = tiny.weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **({"input_ids": tiny.ids()} | options))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_unknown_options_are_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'blocksize'"):
        prune(tiny.model(), tiny.ids(), blocksize=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kth_smallest_is_that_of_a_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(33, 65, generator=generator)
    special = torch.tensor([0.0, 1e-41, float("inf"), float("nan"), -float("nan"), 1.0, 1.0, 1.0])
    for values in (drawn, (drawn * 4).round(), special, special[:1], torch.full((7,), 0.5)):
        values = torch.where(values.isnan(), values, values.abs()).to(dtype)
        ordered = values.flatten().sort().values
        for rank in range(1, values.numel() + 1, max(1, values.numel() // 7)):
            found = kth_smallest(values, rank)
            torch.testing.assert_close(found, ordered[rank - 1], rtol=0, atol=0, equal_nan=True)


def test_a_method_is_one_file(tmp_path, monkeypatch):
    """The one of docs/design.md: registered, it is pruned with, and refused, as the package's own."""
    monkeypatch.setattr(methods, "METHODS", registry := dict(methods.METHODS))
    text = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    shown = re.search(r"## How to add a method.*?```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "blend_method.py").write_text(f"from __future__ import annotations\n{shown}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("blend_method")
    assert [*registry][-1] == "blend"
    model, plain = tiny.model(), tiny.model()
    report = prune(model, tiny.ids(), method="blend", power=1.0, pattern="2:4")
    prune(plain, tiny.ids(), method="wanda", pattern="2:4")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert (report.method, report.options) == ("blend", {"power": 1.0})
    with pytest.raises(ValueError, match="power is an option of blend, not of ria"):
        prune(model, tiny.ids(), method="ria", power=2.0)
    with pytest.raises(ValueError, match="another method 'blend'"):
        methods.register(type("Other", (registry["wanda"],), {"name": "blend"}))


def test_a_spec_is_its_arguments():
    spec = PruneSpec(sparsity=0.6, method="ria", ria_power=0.7, batch_size=2)
    one, other = tiny.model(), tiny.model()
    said = prune(one, tiny.ids(), spec=spec)
    assert said.spec == spec == PruneSpec(sparsity=0.6, method=Ria(ria_power=0.7), batch_size=2)
    prune(other, tiny.ids(), sparsity=0.6, method="ria", ria_power=0.7, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="give spec or its parts, not both: got spec and sparsity"):
        prune(one, tiny.ids(), spec=spec, sparsity=0.5)
    with pytest.raises(TypeError, match="spec must be a PruneSpec, got a str"):
        prune(one, tiny.ids(), spec="wanda")
    with pytest.raises(ValueError, match=r"method has its options already: ria_power belongs into Ria\(\.\.\)"):
        PruneSpec(method=Ria(), ria_power=0.7)


IMPROVED = [(name, {"refine": True, "update": True}) for name in METHODS if create(name, {}).keeps_weights]


@pytest.mark.parametrize(("name", "how"), [*itertools.product(METHODS, [{}, {"pattern": "2:4"}]), *IMPROVED], ids=str)
def test_what_is_pruned_is_plus_zero(name, how):
    """A bitmap keeps whatever is not: -0.0, too."""
    model = tiny.model()
    prune(model, tiny.ids(), method=name, **how)
    for matrix in matrices_of(find_blocks(model)).values():
        zeros = matrix.weight == 0
        assert zeros.any()
        assert not torch.signbit(matrix.weight[zeros]).any()
