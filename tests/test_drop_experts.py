"""Whole experts go: those with the smallest router-weighted outputs; what is left is a model of transformers."""

from __future__ import annotations

import json
import re

import pytest
import saved
import tiny
import torch
from test_cli import call
from test_experts import called_by_keywords, model
from transformers import AutoConfig, AutoModelForCausalLM

from wanda_kernels import drop_experts, prune
from wanda_kernels.cli.app import main
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
        ("mixtral", 0.2, r"share must be larger: 0\.2 of 4 experts drops none"),
        ("mixtral", 0.75, r"share must be smaller: 0\.75 leaves 1 of 4 experts, a token takes 2"),
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


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    saved.save_model(folder / "model", "mixtral")
    saved.save_model(folder / "dense")
    (folder / "text.txt").write_text(saved.text(4000))
    return folder


def calibrated(work) -> list[str]:
    return ["--calibration", str(work / "text.txt"), "--samples", "4", "--length", "32"]


def test_command(work, tmp_path, capsys):
    out = tmp_path / "smaller"
    code, stdout, _ = call(capsys, "drop-experts", work / "model", "--out", out, "--share", "0.25", *calibrated(work))
    assert code == 0
    assert "1 of 4 experts dropped in each of 2 layers" in stdout
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    told = json.loads((out / "dropped_experts.json").read_text())
    assert [layer["name"] for layer in told["layers"]] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    code, stdout, _ = call(capsys, "prune", out, "--out", tmp_path / "pruned", "--pattern", "2:4", *calibrated(work))
    assert code == 0


def test_dropped_and_pruned_in_one_run(work, tmp_path, capsys):
    out = tmp_path / "pruned"
    options = ["--drop-experts", "0.25", "--min-tokens", "1000"]
    code, stdout, _ = call(capsys, "prune", work / "model", "--out", out, *options, *calibrated(work))
    assert code == 0
    assert "pooled norms (fewer than 1000 tokens): 12 experts of 4 layers" in " ".join(stdout.split())
    report = json.loads((out / "pruning_report.json").read_text())
    assert (report["experts"], report["min_tokens"]) == ("routed", 1000)
    assert {tuple(layer["shape"]) for layer in report["layers"] if layer["tokens"]} == {(3, 192, 64), (3, 64, 96)}
    assert report["dense"].keys() == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 3


@pytest.mark.parametrize(
    ("model", "command", "options", "code", "message"),
    [
        ("model", "drop-experts", ["--share", "1.5"], 2, "--share must be in (0, 1), got 1.5"),
        ("model", "drop-experts", ["--share", "0.1"], 1, "--share must be larger: 0.1 of 4 experts drops none"),
        ("dense", "drop-experts", [], 1, "LlamaForCausalLM has no fused experts"),
        ("dense", "prune", ["--experts", "all"], 1, "--experts is for models with fused experts"),
        ("model", "prune", ["--experts", "some"], 2, "--experts must be one of routed, all, got 'some'"),
        ("model", "prune", ["--require-all"], 1, "would stay dense, which --require-all forbids"),
        ("model", "prune", ["--drop-experts", "0.5", "--stream"], 2, "--drop-experts does not go with --stream"),
    ],
)
def test_what_the_command_line_refuses(model, command, options, code, message, work, tmp_path, capsys):
    arguments = [command, work / model, "--out", tmp_path / "out", *options, *calibrated(work)]
    found, _, stderr = call(capsys, *arguments)
    assert found == code
    assert message in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_loss_of_balance_counts_what_is_left(family, tmp_path):
    """It goes by a number that the whole model remembers, beside its config."""
    of = model(family)
    drop_experts(of, tiny.ids(), 0.5)
    of.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    outputs = [one(input_ids=tiny.ids(), labels=tiny.ids(), output_router_logits=True) for one in (of, again)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    outputs[0].loss.backward()
    assert all(parameter.grad is not None for parameter in of.parameters())


def test_what_is_left_of_a_drop_in_inference_mode_can_be_trained():
    of = model("mixtral")
    with torch.inference_mode():
        drop_experts(of, tiny.ids(), 0.5)
    of(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_called_by_keywords_it_loses_the_same(family):
    plain, by_name = model(family), called_by_keywords(model(family))
    assert drop_experts(plain, tiny.ids(), 0.5).layers == drop_experts(by_name, tiny.ids(), 0.5).layers


def test_compiled_in_place_it_loses_the_same():
    plain, compiled = model("mixtral"), model("mixtral")
    compiled.model.layers[0].mlp.experts.compile(backend="eager")
    assert drop_experts(plain, tiny.ids(), 0.5).layers == drop_experts(compiled, tiny.ids(), 0.5).layers


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_routed_experts": 4, "n_group": 2, "topk_group": 2},  # one in a group: its two best make the group's score
        {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 6},  # six of two groups of two
    ],
    ids=str,
)
def test_groups_keep_as_many_as_routing_needs(sizes):
    of = model("deepseek_v3", **sizes)
    with pytest.raises(ValueError, match=r"share must be smaller: 0\.5 leaves . of . experts in each of . groups: a"):
        drop_experts(of, tiny.ids(), 0.5)


def test_numbers_by_layer_are_counted():
    """HunYuan's."""
    from wanda_kernels.models.experts import experts_per_token

    assert experts_per_token(AutoConfig.for_model("hunyuan_v1_moe", moe_topk=[2, 4, 2])) == 4


def refuses_and_changes_nothing(of, message, ids=None, share=0.5, **options):
    before, config = tiny.weights(of), of.config.to_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        drop_experts(of, tiny.ids() if ids is None else ids, share, **options)
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in of.named_parameters())
    assert of.config.to_dict() == config


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    of = model("mixtral")
    of.model.layers[1].mlp.experts.down_proj.data[1, 2, 3] = value
    refuses_and_changes_nothing(of, r"layers\.1\.mlp\.experts\.down_proj holds NaN or inf")


def test_outputs_that_are_no_numbers_are_refused():
    of = model("mixtral")
    of.model.embed_tokens.weight.data[int(tiny.ids()[0, 0])] = float("nan")
    refuses_and_changes_nothing(of, r"layers\.0\.mlp\.experts: outputs of the experts .* hold NaN or inf")


def test_experts_that_compute_something_else_are_refused():
    of = model("mixtral")
    experts = of.model.layers[1].mlp.experts
    own = experts.forward
    experts.forward = lambda hidden, *rest: own(2 * hidden, *rest)
    refuses_and_changes_nothing(of, r"layers\.1\.mlp\.experts: none can be dropped: it has a forward of its own")


def test_a_router_with_a_table_of_experts_is_refused():
    """DeepSeek V4's first layers look up which experts a token goes to."""
    of = model("mixtral")
    of.model.layers[0].mlp.gate.register_buffer("tid2eid", torch.randint(4, (128, 2)))
    refuses_and_changes_nothing(of, r"its router looks experts up in a table \(gate\.tid2eid\)")


@pytest.mark.parametrize("share", [True, "0.5", None, float("nan"), 10**400, torch.tensor([0.5, 0.5])], ids=repr)
def test_a_share_that_is_no_share_is_refused(share):
    refuses_and_changes_nothing(model("mixtral"), r"share must be in \(0, 1\), got ", share=share)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "2", 10**20])
def test_a_batch_size_that_is_none_is_refused(size):
    refuses_and_changes_nothing(model("mixtral"), "batch_size must be a whole number, at least 1", batch_size=size)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a model of transformers, got a str"):
        drop_experts("mixtral", tiny.ids(), 0.5)
    with pytest.raises(ValueError, match="drop_experts needs input_ids"):
        drop_experts(model("mixtral"), None, 0.5)


@pytest.mark.parametrize(
    ("command", "share", "code", "message"),
    [
        (["prune", "--drop-experts"], "2", 2, r"--drop-experts must be in \(0, 1\), got 2\.0"),
        (["prune", "--drop-experts"], "0.1", 1, r"--drop-experts must be larger: 0\.1 of 4 experts drops none"),
        (["prune", "--drop-experts"], "0.9", 1, r"--drop-experts must be smaller: 0\.9 leaves 1 of 4 experts"),
        (["drop-experts", "--share"], "2", 2, r"--share must be in \(0, 1\), got 2\.0"),
        (["drop-experts", "--share"], "0.1", 1, r"--share must be larger: 0\.1 of 4 experts drops none"),
        (["drop-experts", "--batch-size"], "9" * 30, 2, "--batch-size must be a whole number, at least 1, at most"),
    ],
)
def test_commands_name_their_option(command, share, code, message, tmp_path, capsys):
    model("mixtral").save_pretrained(tmp_path / "model")
    name, option = command
    with pytest.raises(SystemExit) as ended:
        main([name, str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--length", "8", option, share])
    assert ended.value.code == code
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
