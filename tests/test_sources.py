"""Calibration from several sources in shares, and windows that begin with BOS."""

from __future__ import annotations

import re

import pytest
import saved
import tiny
import torch
from safetensors.torch import save_file
from test_text import jsonl

from wanda_kernels.text import evaluation_windows, load_calibration, sample_windows, split_windows
from wanda_kernels.text.calibration import check_sources, expected_length
from wanda_kernels.text.sources import parse_sources, split_samples
from wanda_kernels.text.windows import needs_bos, tokenize


def shares(given):
    return [(source.name, float(source.share)) for source in parse_sources(given)]


def test_sources_and_their_shares(tmp_path, monkeypatch):
    assert shares("a.txt") == shares(["a.txt"]) == shares("a.txt=1") == [("a.txt", 1.0)]
    assert shares(["a.txt", "c4"]) == [("a.txt", 0.5), ("c4", 0.5)]
    assert shares(["a.txt=.75", "me/data:en=25e-2"]) == [("a.txt", 0.75), ("me/data:en", 0.25)]
    assert shares(["a=0.5", "b", "c"]) == [("a", 0.5), ("b", 0.25), ("c", 0.25)]
    assert shares(["a=0.333", "b=0.333", "c=0.333"]) == [(name, 1 / 3) for name in "abc"]
    # what is no number belongs to the name
    for name in ("x=y", "a=0.5/notes.txt", "=0.5", "a=nan", "a=inf", "a=1e999", "a=", "a=0x1", "a=" + "9" * 50):
        assert shares(name) == [(name, 1.0)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=0.5").write_text("w1")
    assert shares(["x=0.5", "b"]) == [("x=0.5", 0.5), ("b", 0.5)]  # a file that has the whole name
    assert shares(["x=0.5=0.25", "b"]) == [("x=0.5", 0.25), ("b", 0.75)]
    folder = tmp_path / "a=0.5"
    folder.mkdir()
    (folder / "notes.txt").write_text("w1")
    assert shares([f"{folder}/notes.txt=0.25", "b"]) == [(f"{folder}/notes.txt", 0.25), ("b", 0.75)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "must name at least one source, got none"),
        (["a", "b", "a"], "must name each source once, got a twice"),
        (["a=0.5", "a=0.5"], "must name each source once, got a twice"),
        (["a=0", "b"], "must give a a share above 0 and at most 1, got 0"),
        (["a=-0.5", "b"], "must give a a share above 0 and at most 1, got -0.5"),
        (["a=1.5", "b"], "must give a a share above 0 and at most 1, got 1.5"),
        (["a=1e99", "b"], "must give a a share above 0 and at most 1, got 1e\\+99"),
        (["a=0.5"], "must have shares that add up to 1, got 0.5"),
        (["a=0.5", "b=0.4"], "must have shares that add up to 1, got 0.9"),
        (["a=0.7", "b=0.7"], "must have shares that add up to 1, got 1.4"),
        (["a=1", "b"], "must leave a share for every source, got shares of 1 and 1 without"),
        (["a=0.7", "b=0.6", "c"], "must leave a share for every source, got shares of 1.3 and 1 without"),
    ],
)
def test_sources_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=f"^calibration {message}"):
        load_calibration(given, None)


def test_one_file_under_two_names_is_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "link.txt").symlink_to("a.txt")
    for other in ("./a.txt", str(tmp_path / "a.txt"), "link.txt"):
        with pytest.raises(ValueError, match="must name each source once"):
            parse_sources(["a.txt", other])


def test_samples_are_split_by_largest_remainder():
    def split(samples, *given):
        return split_samples(samples, parse_sources(given))

    assert split(16, "a", "b") == [8, 8]
    assert split(16, "a=0.75", "b") == [12, 4]
    assert split(3, "a", "b") == [2, 1]  # equal remainders: the first
    assert split(10, "a=0.55", "b=0.26", "c=0.19") == [5, 3, 2]
    assert split(128, "a", "b", "c") == [43, 43, 42]
    for samples in range(3, 60):
        assert sum(split(samples, "a=0.333", "b=0.333", "c=0.333")) == samples
    with pytest.raises(ValueError, match=r"^samples must be enough for each calibration source, got 2: c has a share"):
        split(2, "a", "b", "c")
    with pytest.raises(ValueError, match=r"got 16: b has a share of 0.01, less than one sample"):
        check_sources(["a=0.99", "b=0.01"], 16)
    check_sources(["a", "b"], None)
    check_sources("a", 1)


def test_a_mixture_has_the_sequences_of_its_sources(tmp_path):
    tokenizer = saved.tokenizer()
    names = [str(tmp_path / f"{name}.txt") for name in "abc"]
    for number, name in enumerate(names):
        (tmp_path / name).write_text(saved.text(1000, seed=number))

    def alone(name, samples, seed=0, **how):
        return load_calibration(name, tokenizer, samples, 32, seed, **how)

    mixed = load_calibration(names, tokenizer, 8, 32, 5)
    assert torch.equal(mixed, torch.cat([alone(name, n, 5) for name, n in zip(names, (3, 3, 2), strict=True)]))
    shared = load_calibration([f"{names[0]}=0.75", names[1]], tokenizer, 8, 32)
    assert torch.equal(shared, torch.cat([alone(names[0], 6), alone(names[1], 2)]))
    assert torch.equal(load_calibration([names[2]], tokenizer, 4, 32), alone(names[2], 4))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        load_calibration([names[0], "nowhere.txt=0.5"], tokenizer, 8, 32)
    with pytest.raises(ValueError, match=f"calibration text {re.escape(names[0])} has 1000 tokens"):
        load_calibration(names[:2], tokenizer, 100, 32)
    with pytest.raises(ValueError, match=r"pack puts documents together: calibration data .*b\.txt has none"):
        load_calibration([jsonl(tmp_path / "d.jsonl", [40, 50]), names[1]], tokenizer, 2, 32, pack=True)


def test_token_ids_say_how_long_the_others_are(tmp_path):
    text, one, two = tmp_path / "a.txt", tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    text.write_text(saved.text(1000))
    save_file({"input_ids": tiny.ids(6, 20)}, one)
    save_file({"input_ids": tiny.ids(6, 24)}, two)
    mixed = load_calibration([str(text), f"{one}=0.25"], saved.tokenizer(), samples=8)
    assert torch.equal(mixed[:6], load_calibration(str(text), saved.tokenizer(), 6, 20))
    assert torch.equal(mixed[6:], tiny.ids(6, 20)[:2])
    assert load_calibration([str(text), str(one)], saved.tokenizer(), 8, 10).shape == (8, 10)
    assert load_calibration([str(one), str(two)], None, 8, 20).shape == (8, 20)
    with pytest.raises(ValueError, match=r"one length, got 20 in .*one\.safetensors and 24 in .*two\.safetensors"):
        load_calibration([str(text), str(one), str(two)], saved.tokenizer(), samples=9)
    with pytest.raises(ValueError, match="has length 20, length 32 was asked for"):
        load_calibration([str(text), str(one)], saved.tokenizer(), 8, 32)
    with pytest.raises(ValueError, match="has samples 6, samples 64 was asked for"):
        load_calibration([str(text), str(one)], saved.tokenizer())  # half of 128
    assert expected_length([str(text), f"{one}=0.25"], None) is None
    assert expected_length([str(text), str(one)], 10) == 10
    assert expected_length("c4", None) == 2048


class WithBos:
    """A tokenizer that puts BOS first by itself, as Gemma's and LLaMA's do."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [1] * add_special_tokens + saved.tokenizer()(text)["input_ids"]}


def test_windows_that_each_begin_with_bos(tmp_path):
    source = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(saved.text(1000))
    ids = tokenize(saved.tokenizer(), saved.text(1000))
    found = evaluation_windows(source, WithBos(), 32, 3, bos=True)
    assert torch.equal(found[:, 0], torch.ones(3, dtype=torch.int64))
    assert torch.equal(found[:, 1:], split_windows(ids, 31)[:3])
    assert torch.equal(evaluation_windows(source, WithBos(), 32, 3)[0], torch.cat([torch.tensor([1]), ids[:31]]))
    drawn = load_calibration(source, WithBos(), 4, 32, 7, bos=True)
    assert torch.equal(drawn[:, 1:], sample_windows(ids, 4, 31, 7, "x"))
    assert (drawn[:, 0] == 1).all()
    documents = jsonl(tmp_path / "d.jsonl", [40, 50, 60])
    assert (load_calibration(documents, WithBos(), 3, 32, bos=True)[:, 0] == 1).all()
    packed = load_calibration(documents, WithBos(), 4, 32, bos=True, pack=True)
    assert packed.shape == (4, 32)
    assert (packed[:, 1:] == 2).any()
    with pytest.raises(ValueError, match=r"text .*a\.txt has 1000 tokens, one window needs 2000: lower length"):
        evaluation_windows(source, WithBos(), 2000, bos=True)
    with pytest.raises(ValueError, match="length must be at least 3 tokens, BOS and two of text, got 2"):
        evaluation_windows(source, WithBos(), 2, bos=True)
    without = saved.tokenizer()
    without.bos_token = None
    with pytest.raises(ValueError, match="bos puts the tokenizer's BOS token first, and this tokenizer has none"):
        load_calibration(source, without, 4, 32, bos=True)


def test_gemma_needs_bos():
    assert needs_bos(tiny.model("gemma3").config)
    assert not needs_bos(tiny.model().config)
