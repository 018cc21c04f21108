"""lm-eval's tasks on dense and packed models, with a task of the test's own: no network."""

from __future__ import annotations

import json

import pytest
import saved
import tiny

from wanda_kernels import compress, prune
from wanda_kernels.cli.app import main
from wanda_kernels.models import save_pretrained
from wanda_kernels.text.tasks import PAPER_TASKS, TaskEvaluation, mean_accuracy, parse_tasks

pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks").mkdir()
    for number, name in enumerate(("words_a", "words_b")):
        lines = [
            {"question": saved.text(6, 10 * i + number), "choices": saved.text(4, i).split(), "answer": i % 4}
            for i in range(12)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, lines)))
        text = TASK.format(name=name, data=data, cache=folder / "cache")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    model = tiny.model(hidden_size=128, intermediate_size=192)
    prune(model, tiny.ids(), pattern="2:4")
    save_pretrained(folder / "plain", model, saved.tokenizer())
    compress(model)
    save_pretrained(folder / "packed", model, saved.tokenizer())
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def test_packed_and_plain_models_answer_alike(work, tmp_path, capsys):
    results = {}
    for name in ("plain", "packed"):
        out = tmp_path / f"{name}.json"
        assert run("eval", work / name, "--tasks", work / "tasks", "--json", out, "--batch-size", 3) == 0
        results[name] = json.loads(out.read_text())
        rows = results[name]["tasks"]
        assert [row["task"] for row in rows] == ["words_a", "words_b"]
        assert all(row["examples"] == 12 and row["few_shot"] == 0 for row in rows)
        accuracies = [row["metrics"]["acc"] for row in rows]
        assert results[name]["mean_acc"] == pytest.approx(sum(accuracies) / 2)
        shown = capsys.readouterr().out
        assert f"mean acc {sum(accuracies) / 2:.4f} over 2 tasks" in shown
        assert "acc_norm" in shown
    assert results["packed"]["tasks"] == results["plain"]["tasks"]


def test_accuracy_is_that_of_the_most_likely_answer(work):
    """Against the logits themselves."""
    import torch

    model, tokenizer = tiny.model(), saved.tokenizer()
    (row,) = TaskEvaluation([str(work / "tasks" / "words_a.yaml")]).run(model, tokenizer)
    correct = 0
    for line in (work / "words_a.jsonl").read_text().splitlines():
        example = json.loads(line)
        answers = tokenizer(example["choices"], add_special_tokens=False).input_ids
        ids = torch.tensor([tokenizer(example["question"], add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        correct += int(logits[[answer[0] for answer in answers]].argmax()) == example["answer"]
    assert row["metrics"]["acc"] == pytest.approx(correct / 12)


def test_few_shot_and_limit(work, capsys):
    task = work / "tasks" / "words_b.yaml"
    (row,) = TaskEvaluation([str(task)]).run(tiny.model(), saved.tokenizer(), few_shot=2, limit=5, batch_size=2)
    assert (row["few_shot"], row["examples"]) == (2, 5)
    assert mean_accuracy([row]) is None


def test_a_group_stands_for_its_tasks():
    rows = [
        {"metrics": {"acc": 0.5}, "group": None},
        {"metrics": {"acc": 0.1}, "group": "g"},
        {"metrics": {"acc": 0.7}, "group": None},
        {"metrics": {"perplexity": 9.0}, "group": None},
    ]
    assert mean_accuracy(rows) == (0.6, 2)


def test_parsing():
    assert parse_tasks("paper") == list(PAPER_TASKS)
    assert parse_tasks("boolq, rte") == ["boolq", "rte"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "a,,b"], "tasks must be task names or files, each once"),
        (["--tasks", "./none.yaml"], "task ./none.yaml does not exist"),
        (["--tasks", "boolq", "--text", "x.txt"], "--text has no meaning with --tasks"),
        (["--limit", "3"], "--limit has no meaning without --tasks"),
        (["--tasks", "boolq", "--json", "no/where.json"], "its folder does not exist"),
    ],
)
def test_wrong_use(work, capsys, arguments, message):
    assert run("eval", work / "plain", *arguments) == (1 if "does not exist" in message else 2)
    assert message in capsys.readouterr().err


def test_data_that_is_not_there(work, tmp_path, capsys):
    """As a task of the hub's without network: what to do, before the model is loaded."""
    (tmp_path / "hub.yaml").write_text(TASK.format(name="hub", data=tmp_path / "x", cache=tmp_path).replace(
        "dataset_path: json", "dataset_path: nobody/nothing"
    ))  # fmt: skip
    assert run("eval", work / "plain", "--tasks", tmp_path / "hub.yaml") == 1
    error = capsys.readouterr().err
    assert "hub.yaml could not be loaded" in error
    assert "copy the cache (HF_HOME), or give a task file" in error
    (tmp_path / "empty").mkdir()
    assert run("eval", work / "plain", "--tasks", tmp_path / "empty") == 1
    assert "holds no lm-eval task files" in capsys.readouterr().err


@pytest.mark.slow
def test_names_of_lm_eval(work, capsys):
    """Indexing its tasks takes seconds."""
    assert run("eval", work / "plain", "--tasks", "boolq,helaswag") == 1
    assert "lm-eval has no task 'helaswag' (near: hellaswag" in capsys.readouterr().err
    assert run("eval", work / "plain", "--tasks", "boolq", "--limit", "1") == 1
    assert "task boolq could not be loaded" in capsys.readouterr().err
