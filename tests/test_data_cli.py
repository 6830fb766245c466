"""The command: exit status 0, or 2 with one line that says what is wrong."""

import logging
import subprocess
import sys

import pytest

from bitnet_jax.data import load
from bitnet_jax.data.__main__ import main


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>\n".join(f"document number {i}\n" for i in range(50)))
    return path


def prepare_arguments(text, out, *more):
    return ["prepare", f"--source={text}", "--tokenizer=bytes", f"--out={out}", *more]


def test_prepare_and_info(tmp_path, text, capsys):
    out = tmp_path / "out"
    assert main(prepare_arguments(text, out, "--valid_fraction=.3")) == 0
    printed = capsys.readouterr().out
    assert f"{len(load(out).train):,} tokens" in printed
    assert main(["info", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_same_again_says_so(tmp_path, text, capsys):
    arguments = prepare_arguments(text, tmp_path / "out", "--valid_fraction=.3")
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().err
    assert main([*arguments, "--seed=1"]) == 2
    assert "has other content" in capsys.readouterr().err


def test_the_logging_of_the_process_is_left_as_it_was(tmp_path, text):
    """A handler left behind writes to a stderr that may be closed by the time others log."""
    loggers = [logging.getLogger(), logging.getLogger("bitnet_jax")]
    before = [(each.level, each.propagate, list(each.handlers)) for each in loggers]
    assert main(prepare_arguments(text, tmp_path / "out")) == 0
    assert main(prepare_arguments(text, tmp_path / "out", "--seed=1")) == 2
    assert [(each.level, each.propagate, list(each.handlers)) for each in loggers] == before


def test_explicit_validation_text(tmp_path, text):
    valid = tmp_path / "valid.txt"
    valid.write_text("held out")
    assert main(prepare_arguments(text, tmp_path / "out", f"--valid={valid}")) == 0
    assert bytes(load(tmp_path / "out").valid) == b"held out"


def test_mistakes_are_one_line(tmp_path, text, capsys):
    (tmp_path / "bad.jsonl").write_text("{")
    for arguments in (
        prepare_arguments(tmp_path / "absent.txt", tmp_path / "out"),
        prepare_arguments(tmp_path / "bad.jsonl", tmp_path / "out"),
        prepare_arguments(text, tmp_path / "out", "--valid_fraction=2"),
        prepare_arguments(text, tmp_path / "out", "--megabytes=0"),
        prepare_arguments(text, tmp_path / "out", "--megabytes=nan"),
        ["info", str(tmp_path / "absent")],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["prepare"], ["unknown"], ["prepare", "--sauce=x"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_train_tokenizer(tmp_path, text):
    pytest.importorskip("tokenizers")
    tokenizer = tmp_path / "tokenizer.json"
    command = ["train_tokenizer", f"--source={text}", f"--out={tokenizer}"]
    assert main([*command, "--vocab_size=280"]) == 0
    arguments = ["prepare", f"--source={text}", f"--tokenizer={tokenizer}"]
    assert main([*arguments, f"--out={tmp_path / 'out'}", "--valid_fraction=.3"]) == 0
    assert load(tmp_path / "out").vocab_size == 280


def test_as_a_process(tmp_path):
    command = [sys.executable, "-m", "bitnet_jax.data"]
    command += prepare_arguments(tmp_path / "absent.txt", tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: source ") and done.stderr.count("\n") == 1
