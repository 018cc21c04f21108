"""``python -m wanda_kernels.official``: the official flags and log."""

from __future__ import annotations

import pytest
import saved
from transformers import AutoModelForCausalLM

from wanda_kernels.official import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    saved.save_model(folder / "model")
    (folder / "text.txt").write_text(saved.text(3000))
    return folder


def arguments(files, *more):
    text = str(files / "text.txt")
    fixed = ["--model", str(files / "model"), "--calibration", text, "--text", text, "--length", "64"]
    return [*fixed, "--nsamples", "8", *map(str, more)]


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        (("--prune_method", "wanda", "--sparsity_ratio", "0.5", "--sparsity_type", "2:4"), "0.5000"),
        (("--prune_method", "sparsegpt", "--sparsity_ratio", "0.5", "--sparsity_type", "unstructured"), "0.50"),
        (("--prune_method", "wanda", "--sparsity_ratio", "0.4", "--use_variant"), "0.4"),
        (("--prune_method", "magnitude", "--sparsity_ratio", "0.3"), "0.30"),
        (("--prune_method", "ablate_mag_iter", "--sparsity_ratio", "0.5"), "0.50"),
        ((), "0.0000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_the_official_log(files, tmp_path, capsys, flags, share):
    out, folder = tmp_path / "out" / "here", tmp_path / "model"
    main(arguments(files, *flags, "--save", out, "--save_model", folder))
    stdout = capsys.readouterr().out
    assert stdout.count("layer ") == 3
    assert f"sparsity sanity check {share}" in stdout
    method = flags[1] if flags else "wanda"
    header, line = (out / f"log_{method}.txt").read_text().splitlines()
    assert header == "method\tactual_sparsity\tppl_test"
    name, sparsity, value = line.split("\t")
    assert name == method
    assert sparsity.startswith(share)
    assert f"perplexity {value}"[:-1] in stdout  # the screen has more digits
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--sparsity_ratio", "0.6", "--sparsity_type", "2:4"), 2, "--sparsity_ratio must be 0.5 for 2:4, got 0.6"),
        (("--sparsity_ratio", "1.5"), 2, "--sparsity_ratio must be in [0, 1), got 1.5"),
        (("--use_variant", "--prune_method", "magnitude"), 2, "--use_variant is an option of wanda, not of magnitude"),
        (("--sparsity_ratio", "0.5", "--nsamples", "5000"), 1, "5000 samples are required"),
        (("--calibration", "c4=0"), 2, "--calibration must give c4 a share above 0 and at most 1, got 0"),
        (("--calibration", "c4", "--nsamples", "1"), 2, "--nsamples must be enough for each calibration source, got 1"),
        (("--length", "9000"), 1, "--length 9000 is longer than the model's context of 256 tokens"),
    ],
)
def test_errors_are_one_line(files, tmp_path, capsys, flags, code, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments(files, *flags, "--save", tmp_path / "out"))
    assert ended.value.code == code
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_cache_dir_of_the_hub(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "unset")
    with pytest.raises(SystemExit):
        main(["--model", "nobody/nothing", "--cache_dir", str(tmp_path / "weights")])
    assert "nobody/nothing is no local path and could not be had" in capsys.readouterr().err


def test_ctrl_c(files, monkeypatch, capsys):
    import signal

    def pressed(*_arguments, **_options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("wanda_kernels.official.run", pressed)
    with pytest.raises(SystemExit) as ended:
        main(arguments(files))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "wanda_kernels.official: error: interrupted\n"
