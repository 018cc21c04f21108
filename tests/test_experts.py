"""Fused experts: their masks are those of each expert's own inputs; every way of running gives the same."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.tiny_configs import tiny_config
from wanda_kernels import prune
from wanda_kernels.models.experts import AllTokensLayout, Routing, layout_of
from wanda_kernels.pruning.blocks import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = tiny.EXPERTS


def model(family: str, **changes):
    return tiny.model(family, **changes)


class Spy(torch.overrides.TorchFunctionMode):
    """Sums the squares of what each slice of a parameter [E, ..] is multiplied with, in float64: an independent view of
    the experts' inputs, through the module's own (eager) forward."""

    def __init__(self, stored: dict[str, Tensor]) -> None:
        super().__init__()
        self._places = {
            weight[expert].data_ptr(): (name, expert)
            for name, weight in stored.items()
            for expert in range(len(weight))
        }
        self._stored = stored
        self.sums: dict[tuple[str, int], Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.nn.functional.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__):
            x, weight = args[:2]
            place = self._places.get(weight.data_ptr())
            if function is torch.bmm and place is not None:
                for expert in range(len(weight)):
                    self._add((place[0], expert), x[expert])
            elif place is not None:
                self._add(place, x)
        return function(*args, **kwargs or {})

    def _add(self, place, x):
        with torch._C.DisableTorchFunctionSubclass():
            squares = x.detach().double().square().sum(dim=0)
        self.sums[place] = self.sums.get(place, 0) + squares


def expected_masks(whole, ids: Tensor) -> dict[str, Tensor]:
    """Of the first block's experts at 50 %, from their own inputs: [E, C_out, C_in] -> True is pruned."""
    block = find_blocks(whole)[0]
    experts = {name: matrix for name, matrix in block.matrices.items() if matrix.experts is not None}
    whole.config._experts_implementation = "eager"
    spy = Spy({name: matrix.stored for name, matrix in experts.items()})
    with torch.no_grad(), spy:
        whole(input_ids=ids, use_cache=False)
    masks = {}
    for name, matrix in experts.items():
        weight = matrix.weight.detach()
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        for expert, one in enumerate(weight):
            score = one.abs() * spy.sums[name, expert].sqrt().float()
            lowest = torch.sort(score, dim=1, stable=True).indices[:, : one.shape[1] // 2]
            mask[expert].scatter_(1, lowest, True)
        masks[f"{block.name}.{name}"] = mask
    return masks


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_each_experts_own_inputs(family):
    ids = tiny.ids()
    ours = model(family)
    expected = expected_masks(copy.deepcopy(ours), ids)
    report = prune(ours, ids, sparsity=0.5)
    block = find_blocks(ours)[0]
    assert expected
    for name, mask in expected.items():
        assert torch.equal(block.matrices[name.removeprefix(f"{block.name}.")].weight == 0, mask), name
    told = [layer for layer in report.layers if layer.tokens is not None]
    assert told
    assert all(layer.pooled == [] for layer in told)
    assert "tokens an expert (routed)" in str(report)
    assert any("router" in name or "gate" in name for name in report.dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stand_in_computes_what_the_module_does(family, dtype):
    """Its outputs are the next block's inputs where statistics come from the dense model."""
    of = model(family).to(dtype)
    ids = tiny.ids()
    with torch.no_grad():
        own = of(input_ids=ids, use_cache=False).logits
    one, other = copy.deepcopy(of), of
    prune(one, ids, sparsity=0.0, propagate="dense")
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids, use_cache=False).logits, own)
    for module in other.modules():
        layout = layout_of(module)
        if layout is None:
            continue
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(17, 64, generator=generator).to(dtype)
        if isinstance(layout, AllTokensLayout):
            for_each = torch.cat([hidden * (torch.rand(17, 1, generator=generator) > 0.5)] * layout.experts)
            with torch.no_grad():
                got = layout.call([for_each], {}, layout.dense_product)
                torch.testing.assert_close(got, module(for_each))
            continue
        index = torch.stack([torch.randperm(layout.experts, generator=generator)[:2] for _ in range(17)])
        shares = torch.rand(17, 2, generator=generator).to(dtype)
        with torch.no_grad():
            got = layout.forward(hidden, index, shares, layout.dense_product)
            assert torch.equal(got, module(hidden, index, shares))


@pytest.mark.parametrize("method", ["wanda", "magnitude", "ria", "sparsegpt", "ablate_wanda_seq"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_method_reaches_the_sparsity(family, method, target):
    of = model(family)
    report = prune(of, None if method == "magnitude" else tiny.ids(), method=method, **target)
    assert abs(report.achieved_sparsity - 0.5) < 0.005
    if "pattern" in target:
        for block in find_blocks(of):
            for matrix in block.matrices.values():
                groups = (matrix.weight != 0).unflatten(-1, (-1, 4)).sum(dim=-1)
                assert int(groups.max()) <= 2


@pytest.mark.parametrize("group", ["layer", "column", "row:4"])
def test_groups_are_inside_one_expert(group):
    of = model("mixtral")
    prune(of, tiny.ids(), sparsity=0.5, group=group)
    weight = of.model.layers[0].mlp.experts.down_proj
    assert [(one == 0).float().mean().item() for one in weight] == [0.5] * 4


@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "jetmoe"])
def test_batches_change_nothing(family):
    one, other = model(family), model(family)
    prune(one, tiny.ids(), sparsity=0.5, batch_size=1)
    report = prune(other, tiny.ids(), sparsity=0.5, batch_size=1, propagate="pruned")
    assert report.layers
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def idle(of, expert: int = 3):
    """The router never chooses one expert."""
    for layer in of.model.layers:
        layer.mlp.gate.weight.data[expert] = 0
        layer.mlp.gate.weight.data[expert] -= 0.0
        layer.mlp.gate.register_forward_hook(
            lambda _m, _x, out: (out[0], out[1], torch.where(out[2] == expert, 0, out[2]))
        )
    return of


def test_an_idle_expert_takes_the_pooled_norms_and_is_named():
    of = idle(model("mixtral"))
    report = prune(of, tiny.ids(), sparsity=0.5)
    layers = [layer for layer in report.layers if layer.tokens is not None]
    assert all(layer.tokens[3] == 0 and layer.pooled == [3] for layer in layers)
    assert "pooled norms (fewer than 1 tokens): 4 experts of 4 layers, the first are 3 of model.layers.0" in " ".join(
        str(report).split()
    )
    magnitude = idle(model("mixtral"))
    prune(magnitude, method="magnitude", pattern=None, group="row", sparsity=0.5)
    weights = [m.model.layers[0].mlp.experts.gate_up_proj[3] == 0 for m in (of, magnitude)]
    assert not torch.equal(*weights), "an idle expert was pruned by magnitude"


def test_min_tokens_pools_more():
    few = prune(model("mixtral"), tiny.ids(), sparsity=0.5)
    counts = next(layer.tokens for layer in few.layers if layer.tokens is not None)
    more = prune(model("mixtral"), tiny.ids(), sparsity=0.5, min_tokens=max(counts))
    pooled = next(layer.pooled for layer in more.layers if layer.tokens is not None)
    assert pooled == [expert for expert, count in enumerate(counts) if count < max(counts)]


def test_all_tokens_through_every_expert():
    """gate_up then has one norm for all experts, that of all tokens; the outputs stay the routed ones."""
    routed, every = model("mixtral"), model("mixtral")
    prune(routed, tiny.ids(), sparsity=0.5)
    report = prune(every, tiny.ids(), sparsity=0.5, experts="all")
    layer = next(layer for layer in report.layers if layer.tokens is not None)
    assert sum(layer.tokens) == tiny.ids().numel() * 2, "the router's tokens are told"
    assert report.to_dict()["experts"] == "all"
    masks = [m.model.layers[0].mlp.experts.gate_up_proj == 0 for m in (routed, every)]
    assert not torch.equal(*masks)
    attention = [m.model.layers[0].self_attn.q_proj.weight for m in (routed, every)]
    assert torch.equal(*attention)


def test_all_tokens_go_through_idle_experts_too():
    """Their norms are their own: those of the others' inputs would be what ``all`` is to do without."""
    of = model("mixtral")
    of.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _x, out: (*out[:2], out[2].clamp(max=2)))
    whole = copy.deepcopy(of)
    seen = []
    handle = whole.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        whole(input_ids=tiny.ids(), use_cache=False)
    handle.remove()
    report = prune(of, tiny.ids(), sparsity=0.5, experts="all")
    layer = next(layer for layer in report.layers if layer.name == "model.layers.0.mlp.experts.down_proj")
    assert layer.tokens[3] == 0
    assert layer.pooled == []
    experts = whole.model.layers[0].mlp.experts
    gate, up = (seen[0] @ experts.gate_up_proj[3].t()).detach().chunk(2, dim=-1)
    norm = (experts.act_fn(gate) * up).double().square().sum(dim=0).sqrt().float()
    weight = experts.down_proj[3].detach()
    lowest = torch.sort(weight.abs() * norm, dim=1, stable=True).indices[:, :48]
    mask = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, lowest, True)
    assert torch.equal(of.model.layers[0].mlp.experts.down_proj[3] == 0, mask)


def test_all_tokens_have_the_norm_of_all_tokens():
    of = model("mixtral")
    whole = copy.deepcopy(of)
    seen = []
    handle = whole.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        whole(input_ids=tiny.ids(), use_cache=False)
    handle.remove()
    prune(of, tiny.ids(), sparsity=0.5, experts="all")
    norm = seen[0].double().square().sum(dim=0).sqrt().float()
    for expert, weight in enumerate(whole.model.layers[0].mlp.experts.gate_up_proj.detach()):
        lowest = torch.sort(weight.abs() * norm, dim=1, stable=True).indices[:, :32]
        mask = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, lowest, True)
        assert torch.equal(of.model.layers[0].mlp.experts.gate_up_proj[expert] == 0, mask)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"experts": "all"}, "experts is for models with fused experts"),
        ("llama", {"min_tokens": 8}, "min_tokens is for models with fused experts"),
        ("mixtral", {"experts": "some"}, "experts must be one of routed, all, got 'some'"),
        ("mixtral", {"min_tokens": 0}, "min_tokens must be a whole number, at least 1, got 0"),
        ("mixtral", {"experts": "all", "min_tokens": 8}, "min_tokens is for experts 'routed', got 8"),
        ("mixtral", {"min_tokens": True}, "min_tokens must be a whole number, at least 1, got True"),
        (
            "mixtral",
            {"min_tokens": 10**30},
            "min_tokens must be a whole number, at least 1, at most 9223372036854775807",
        ),
        ("mixtral", {"batch_size": True}, "batch_size must be a whole number, at least 1, got True"),
        ("mixtral", {"batch_size": 10**30}, "batch_size must be a whole number, at least 1, at most"),
        ("mixtral", {"experts": "all", "method": "magnitude"}, "experts is for methods that calibrate"),
        ("mixtral", {"require_all": True}, r"layers\.0\.mlp\.gate\.weight \[4, 64\] would stay dense"),
        ("llama4_text", {"experts": "all"}, "experts must be 'routed' for Llama4TextExperts"),
    ],
)
def test_what_makes_no_sense_is_refused(family, options, message):
    of = model(family) if family in FAMILIES else tiny.model(family)
    before = tiny.weights(of)
    with pytest.raises(ValueError, match=message):
        prune(of, tiny.ids(), **options)
    assert all(torch.equal(p, before[n]) for n, p in of.named_parameters())


def test_exact_error_of_experts():
    report = prune(model("mixtral"), tiny.ids(), sparsity=0.5, exact_error=True)
    for layer in report.layers:
        assert 0 < layer.exact_error < 1
        assert layer.threshold > 0


def test_owl_counts_experts():
    report = prune(model("mixtral"), tiny.ids(), sparsity=0.5, owl=True)
    assert abs(report.achieved_sparsity - 0.5) < 0.01


def test_rows_are_sorted_by_expert_sequence_and_token():
    index = torch.tensor([[1, 0], [0, 2], [1, 2], [2, 0]])  # two sequences of two tokens
    routing = Routing.of(index, 3)
    assert routing.token.tolist() == [0, 1, 3, 0, 2, 1, 2, 3]
    assert routing.ends.tolist() == [3, 5, 8]
    assert routing.ends_by_sequence(4, 2).tolist() == [2, 3, 4, 5, 6, 8]


def called_by_keywords(of):
    """Its experts get their last two arguments by name, in the other order."""
    for layer in of.model.layers:
        names = list(inspect.signature(type(layer.mlp.experts).forward).parameters)[2:]
        layer.mlp.experts.register_forward_pre_hook(
            lambda _m, args, _k, names=names: (args[:1], {names[1]: args[2], names[0]: args[1]}), with_kwargs=True
        )
    return of


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_may_be_called_by_keywords_in_any_order(family):
    plain, by_name = model(family), called_by_keywords(model(family))
    for of in (plain, by_name):
        prune(of, tiny.ids(), sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), by_name.parameters(), strict=True))


def test_llama4_experts_may_be_called_by_a_keyword():
    plain, by_name = model("llama4_text"), model("llama4_text")
    for layer in by_name.model.layers:
        layer.feed_forward.experts.register_forward_pre_hook(
            lambda _m, args, _k: ((), {"hidden_states": args[0]}), with_kwargs=True
        )
    for of in (plain, by_name):
        prune(of, tiny.ids(), sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), by_name.parameters(), strict=True))


def test_all_tokens_are_refused_before_the_first_block_is_pruned():
    """Experts may begin in the second."""
    of = model("llama4_text", interleave_moe_layer_step=2)
    before = tiny.weights(of)
    with pytest.raises(ValueError, match=r"experts must be 'routed' for Llama4TextExperts \(model\.layers\.1\.feed"):
        prune(of, tiny.ids(), experts="all")
    assert all(torch.equal(p, before[n]) for n, p in of.named_parameters())


def test_a_subclass_that_computes_something_else_is_refused():
    of = model("mixtral")
    experts = of.model.layers[0].mlp.experts

    class Louder(type(experts)):
        def forward(self, hidden, index, shares):
            return super().forward(2 * hidden, index, shares)

    experts.__class__ = Louder
    with pytest.raises(ValueError, match=r"gate_up_proj \[4, 192, 64\] is a fused expert tensor of a form that is not"):
        prune(of, tiny.ids())


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.1.mlp.experts", "model.layers.0.self_attn"])
def test_what_is_compiled_in_place_gives_the_same(part):
    """torch's own grouped product has no fake implementation for float32: the stand-ins are not traced."""
    plain, compiled = model("mixtral"), model("mixtral")
    compiled.get_submodule(part).compile(backend="eager")
    for of in (plain, compiled):
        prune(of, tiny.ids(), sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))
    assert compiled.get_submodule(part)._compiled_call_impl is not None


def test_all_layers_of_a_router_stay_dense():
    """Zaya's is an MLP, and has an output more than there are experts."""
    with torch.device("meta"):
        of = AutoModelForCausalLM.from_config(tiny_config("zaya"))
    blocks = find_blocks(of, meta=True)
    assert {"mlp.gate.down_proj.weight", "mlp.gate.router_mlp.out_proj.weight"} <= set(blocks[0].dense)
    assert not any(name.startswith("mlp.gate.") for block in blocks for name in block.matrices)
