"""Calibration data and perplexity."""

from __future__ import annotations

import codecs
import json
import math
import os
import re

import pytest
import saved
import tiny
import torch
from safetensors.torch import save_file

from wanda_kernels import perplexity
from wanda_kernels.text import evaluation_ids, hub, load_calibration, sample_windows, split_windows
from wanda_kernels.text.windows import tokenize


def test_windows_do_not_overlap_and_depend_on_the_seed():
    ids = torch.arange(1000)
    windows = sample_windows(ids, 10, 50, seed=0, source="x")
    assert windows.shape == (10, 50)
    assert len(windows.flatten().unique()) == 500
    assert torch.equal(windows, sample_windows(ids, 10, 50, seed=0, source="x"))
    assert not torch.equal(windows, sample_windows(ids, 10, 50, seed=1, source="x"))
    assert split_windows(ids, 300).shape == (3, 300)


def test_text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(saved.text(500))
    ids = load_calibration(str(path), saved.tokenizer(), samples=4, length=32)
    assert ids.shape == (4, 32)
    assert ids.dtype == torch.int64


def test_safetensors_ids(tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.ids(6, 20)}, path)
    assert torch.equal(load_calibration(str(path), None), tiny.ids(6, 20))
    assert torch.equal(load_calibration(str(path), None, samples=2, length=10), tiny.ids(6, 20)[:2, :10])
    with pytest.raises(ValueError, match="has samples 6, samples 7 was asked for"):
        load_calibration(str(path), None, samples=7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": torch.zeros(2, 2)}, "must hold input_ids, it holds: ids"),
        ({"input_ids": torch.zeros(2, 2)}, r"input_ids must be .*int64.* got \[2, 2\], torch.float32"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"got \[4\]"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, r"not empty, got \[0, 4\]"),
    ],
)
def test_bad_safetensors(tmp_path, content, message):
    path = tmp_path / "ids.safetensors"
    save_file(content, path)
    with pytest.raises(ValueError, match=message):
        load_calibration(str(path), None)


def test_broken_files(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_calibration(str(broken), None)
    with pytest.raises(FileNotFoundError, match=r"c4, .*owner/name.* or a file; .*missing.txt does not exist"):
        load_calibration(str(tmp_path / "missing.txt"), None)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        load_calibration(str(empty), None)
    short = tmp_path / "short.txt"
    short.write_text(saved.text(100))
    with pytest.raises(ValueError, match="has 100 tokens, 3 windows of 32; 8 samples are required"):
        load_calibration(str(short), saved.tokenizer(), samples=8, length=32)


WORDS = "w1 w\u00e9 \u4f60\u597d \U0001f600"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
    ids=["utf-8", "utf-8 marked", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"],
)  # fmt: skip
def test_every_encoding_and_line_end_is_the_same_text(tmp_path, mark, encoding, end):
    seen = []

    def spy(text, **options):
        seen.append(text)
        return {"input_ids": [1] * 8}

    text = f"{WORDS}{end}{end}a\0b\x0c\x85\u2028c{end}"
    path = tmp_path / "text.txt"
    path.write_bytes(mark + text.encode(encoding))
    load_calibration(str(path), spy, samples=1, length=4)
    evaluation_ids(str(path), spy)
    assert seen == [text.replace(end, "\n")] * 2
    seen.clear()
    lines = end.join(json.dumps({"text": text + str(n)}, ensure_ascii=False) for n in range(3))
    path = path.with_suffix(".jsonl")
    path.write_bytes(mark + lines.encode(encoding))
    load_calibration(str(path), spy, samples=3, length=4)
    assert sorted(seen) == [text + str(n) for n in range(3)]


@pytest.mark.parametrize("load", [lambda path: load_calibration(path, None), lambda path: evaluation_ids(path, None)])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("caf\u00e9".encode("latin-1"), r"is not UTF-8 text \(byte 3: .*\): save it as UTF-8"),
        (codecs.BOM_UTF8 + b"ab\xff", r"is not UTF-8 text \(byte 5: .*\): save it as UTF-8"),
        (b"\xff\xfe\x00", r"is not UTF-16-LE text \(byte 2: .*\): save it as UTF-8"),
        (codecs.BOM_UTF32_BE + b"\x7f" * 4, r"is not UTF-32-BE text \(byte 4: .*\): save it as UTF-8"),
        ("caf\u00e9 au lait".encode("utf-16-le"), r"is not UTF-8 text \(byte 6: .*\): save it as UTF-8"),
        ("au lait".encode("utf-16-le"), r"is not UTF-8 text \(byte 1: every second one is NUL"),
        ("au lait".encode("utf-16-be"), r"is not UTF-8 text \(byte 0: every second one is NUL"),
        ("au lait".encode("utf-32-le"), r"is not UTF-8 text \(byte 1: every second one is NUL"),
        (codecs.BOM_UTF16_LE, "is empty"),
        (b"\r\n \r", "is empty"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_text(tmp_path, load, suffix, data, message):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"file {re.escape(str(path))} {message}"):
        load(str(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".safetensors"])
def test_what_is_no_regular_file(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, what in (("pipe", "a pipe, a socket or a device"), ("folder", "a folder")):
        with pytest.raises(ValueError, match=f"{name}{suffix} is {what}: give a regular file"):
            load_calibration(str(tmp_path / f"{name}{suffix}"), None)
        with pytest.raises(ValueError, match=f"{name}{suffix} is {what}: give a regular file"):
            evaluation_ids(str(tmp_path / f"{name}{suffix}"), None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1")
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"text\.txt"):
        evaluation_ids(str(path), None)


class Documents(list):
    """What ``datasets.load_dataset`` returns, as far as it is used: rows, or a column."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_c4_draws_windows_of_long_documents(monkeypatch):
    documents = Documents({"text": saved.text(10 + 30 * (i % 2), seed=i)} for i in range(50))
    monkeypatch.setattr(hub, "load", lambda name, split: documents)
    ids = load_calibration("c4", saved.tokenizer(), samples=9, length=16, seed=3)
    assert ids.shape == (9, 16)
    assert torch.equal(ids, load_calibration("c4", saved.tokenizer(), samples=9, length=16, seed=3))
    with pytest.raises(ValueError, match="none of 20000 documents of c4 is longer than 64 tokens"):
        load_calibration("c4", saved.tokenizer(), samples=1, length=64)


def test_c4_packed(monkeypatch):
    documents = Documents({"text": saved.text(10, seed=i)} for i in range(20))
    monkeypatch.setattr(hub, "load", lambda name, split: documents)
    ids = load_calibration("c4", saved.tokenizer(), samples=3, length=64, pack=True)
    assert ids.shape == (3, 64)
    assert int((ids == 2).sum()) == 3 * 64 // 11  # documents of 10 words, </s> after each


def jsonl(path, sizes, column="text"):
    path.write_text("".join(json.dumps({column: saved.text(n, seed=n)}) + "\n" for n in sizes) + "\n")
    return str(path)


def test_jsonl_documents_are_skipped_or_packed(tmp_path):
    source = jsonl(tmp_path / "documents.jsonl", [10, 20, 33, 40, 50, 31, 32])
    ids = load_calibration(source, saved.tokenizer(), samples=3, length=32)
    long = [tokenize(saved.tokenizer(), saved.text(n, seed=n)).tolist() for n in (33, 40, 50)]
    for window in ids.tolist():
        assert any(window == one[begin : begin + 32] for one in long for begin in range(len(one) - 31))
    assert torch.equal(ids, load_calibration(source, saved.tokenizer(), samples=3, length=32))
    assert not torch.equal(ids, load_calibration(source, saved.tokenizer(), samples=3, length=32, seed=1))
    with pytest.raises(
        ValueError, match=r"3 of 7 documents are longer than 32 tokens, 4 samples .* documents together \(pack\)"
    ):
        load_calibration(source, saved.tokenizer(), samples=4, length=32)
    # 216 words and 7 ends of text
    assert load_calibration(source, saved.tokenizer(), samples=6, length=32, pack=True).shape == (6, 32)
    with pytest.raises(ValueError, match="packed, 7 documents make 6 windows, 7 samples of 32 are required"):
        load_calibration(source, saved.tokenizer(), samples=7, length=32, pack=True)


def test_bad_jsonl(tmp_path):
    path = tmp_path / "documents.jsonl"
    source = jsonl(path, [40], column="body")
    with pytest.raises(ValueError, match=r"line 1 has no text in column 'text' \(it has: body\): name another column"):
        load_calibration(source, saved.tokenizer(), samples=1, length=32)
    assert load_calibration(source, saved.tokenizer(), samples=1, length=32, column="body").shape == (1, 32)
    for content, message in (
        ("\n", "is empty"),
        ('{"text": "x"}\n{', "line 2 is not JSON"),
        ("3", "it has: int"),
        ('{"text": "\\ud83d"}', "line 1 has half a surrogate pair in column 'text'"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("9" * 5000, "line 1 is not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_calibration(source, saved.tokenizer(), samples=1, length=32)


def test_hub_data_sets(monkeypatch):
    asked = []

    def stream(*arguments):
        asked.append(arguments)
        return iter([{"text": saved.text(40)}, {"text": saved.text(9)}, {"text": saved.text(50)}])

    monkeypatch.setattr(hub, "stream", stream)
    assert load_calibration("me/my.data:en", saved.tokenizer(), 2, 32, 5, split="validation").shape == (2, 32)
    assert load_calibration("me/data", saved.tokenizer(), 3, 32, pack=True).shape == (3, 32)
    assert asked == [("me/my.data", "en", "validation", 5), ("me/data", None, "train", 0)]
    with pytest.raises(ValueError, match="data set me/data has no text in column 'x'"):
        load_calibration("me/data", saved.tokenizer(), 2, 32, column="x")


@pytest.mark.parametrize("source", ["wikitext2", "notes.txt", "ids.safetensors"])
def test_pack_needs_documents(source):
    with pytest.raises(ValueError, match=f"pack puts documents together: calibration data {source} has none"):
        load_calibration(source, None, pack=True)


def test_wikitext2(monkeypatch):
    documents = Documents({"text": saved.text(50, seed=i)} for i in range(10))
    monkeypatch.setattr(hub, "load", lambda name, split: documents)
    assert load_calibration("wikitext2", saved.tokenizer(), samples=5, length=64).shape == (5, 64)
    assert len(evaluation_ids("wikitext2", saved.tokenizer())) == 500
    with pytest.raises(ValueError, match="wikitext2 has 500 tokens here, length 500 is too long"):
        load_calibration("wikitext2", saved.tokenizer(), samples=5, length=500)


def test_without_network_the_hub_says_so():
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match=r"data set c4 could not be had from the Hugging Face hub.* give a file: .txt"):
        hub.load("c4", "train")
    with pytest.raises(OSError, match=r"data set me/nothing could not be had from the Hugging Face hub"):
        load_calibration("me/nothing", saved.tokenizer(), 1, 32)


def test_perplexity_is_exp_of_the_mean_loss_over_windows():
    model = tiny.model()
    ids = tiny.ids(1, 100)[0]
    losses = []
    with torch.no_grad():
        for begin in (0, 32, 64):
            window = ids[None, begin : begin + 32]
            losses.append(float(model(input_ids=window, labels=window).loss))
    expected = math.exp(sum(losses) / 3)
    for batch_size in (1, 2, 3):
        assert perplexity(model, ids, 32, batch_size) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="the text has 100 tokens, one window needs 101"):
        perplexity(model, ids, 101)


def test_perplexity_of_a_broken_model_is_nan_and_of_a_hopeless_one_inf():
    model, ids = tiny.model(), tiny.ids(3, 16)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, ids, 16) == math.inf
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    assert math.isnan(perplexity(model, ids, 16))


@pytest.mark.parametrize("ids", [[0, 128, 3, 4], [0, -1, 3, 4]])
def test_token_ids_that_the_model_has_not(ids):
    with pytest.raises(ValueError, match=r"must be 0 to 127, the model's vocabulary has 128; got (0 to 128|-1 to 4)"):
        perplexity(tiny.model(), torch.tensor(ids), 4)


def test_data_sets_run_no_code_of_their_own(monkeypatch):
    pytest.importorskip("datasets")
    asked = []

    def version_3(path, name=None, split=None, trust_remote_code=None, **more):
        asked.append(trust_remote_code)
        return Documents()

    def version_5(path, name=None, split=None, **more):
        asked.append("trust_remote_code" in more)
        return Documents()

    for version in (version_3, version_5):
        monkeypatch.setattr("datasets.load_dataset", version)
        hub.load("c4", "train")
        hub.load("wikitext2", "test")
    assert asked == [False] * 4
