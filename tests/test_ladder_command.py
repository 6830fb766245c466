"""The ladder's costs as a table, and the command that prints it."""

import pandas as pd
import pytest

from bitnet_jax import cost
from bitnet_jax.ladder import LADDER
from bitnet_jax.model import TransformerConfig
from bitnet_jax.precision import PRECISIONS
from experiments.ladder import costs, main


@pytest.fixture(scope="module")
def table():
    return costs(1000, 128)


def row_of(table, size, precision):
    (row,) = table[(table["size"] == size) & (table["precision"] == precision)].to_dict("records")
    return row


def test_a_row_each_size_and_arm(table):
    """In the ladder's order, which is that of size."""
    pairs = list(zip(table["size"], table["precision"], strict=True))
    assert pairs == [(size, arm) for size in LADDER for arm in PRECISIONS]
    assert table["params_non_embedding"].is_monotonic_increasing
    assert table.notna().all(axis=None)


@pytest.mark.parametrize("arm", ["ternary", "fp32"])
def test_a_row_is_what_the_functions_say(table, arm):
    model = TransformerConfig(1000, layers=2, width=64, ff_width=160, heads=2, kv_heads=2)
    count = cost.count_parameters(model)
    assert row_of(table, "95k", arm) == {
        "size": "95k",
        "precision": arm,
        "params_total": count.total,
        "params_non_embedding": count.non_embedding,
        "params_quantized": count.quantized,
        "training_flops_per_token": cost.training_flops_per_token(model, 128),
        "model_bits": cost.model_bits(model, PRECISIONS[arm]),
        "energy_pj_per_token": cost.energy_per_token(model, PRECISIONS[arm], 128),
    }


def test_counted_by_hand(table):
    """95k: two blocks of four 64 x 64 and three 64 x 160; norms of 3 * 64 + 160 and one of 64."""
    row = row_of(table, "95k", "fp32")
    kernels = 2 * (4 * 64 * 64 + 3 * 64 * 160)
    assert row["params_quantized"] == kernels
    assert row["params_non_embedding"] == kernels + 2 * (3 * 64 + 160) + 64
    assert row["params_total"] == row["params_non_embedding"] + 64 * 1000
    assert row["model_bits"] == 32 * row["params_total"]
    forward = 2 * kernels + 2 * 64 * 1000 + 2 * (2 * 2 * 128 * 64)
    assert row["training_flops_per_token"] == 3 * forward


def test_what_arms_share_and_what_not(table):
    """Parameters and FLOPs are the model's; bits and energy are the arm's."""
    shared = ["params_total", "params_non_embedding", "params_quantized"]
    by_size = table.groupby("size")
    assert (by_size[[*shared, "training_flops_per_token"]].nunique() == 1).all(axis=None)
    for size in LADDER:
        bits, energy = (
            [row_of(table, size, arm)[key] for arm in ("binary", "ternary", "fp16", "fp32")]
            for key in ("model_bits", "energy_pj_per_token")
        )
        assert bits == sorted(bits) and len(set(bits)) == 4
        assert energy[1] < energy[2] < energy[3]


def test_command(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[1]: line for line in out.splitlines() if "│" in line}
    assert set(LADDER) <= set(lines)
    table = costs(32_000, 2048)
    energy = row_of(table, "7b", "ternary")["energy_pj_per_token"] / 1e6
    assert f" {energy:.3g} " in lines["7b"]
    assert "microjoules" in out


def test_the_process_is_a_choice_and_stands_beside_the_numbers(capsys):
    """45 nm in place of 7: other energies, the same bits; a ratio, and what it is made of."""
    assert main(["--node=45nm", "--vocab_size=1000", "--sequence_length=128"]) == 0
    out = capsys.readouterr().out
    old, new = costs(1000, 128, "45nm"), costs(1000, 128)
    assert (old["energy_pj_per_token"] > new["energy_pj_per_token"]).all()
    assert (old["model_bits"] == new["model_bits"]).all()
    lines = {line.split()[1]: line for line in out.splitlines() if "│" in line}
    energies = [row_of(old, "7b", arm)["energy_pj_per_token"] for arm in ("fp16", "ternary")]
    assert lines["7b"].split()[-2] == f"{energies[0] / energies[1]:.1f}"
    assert "at 45nm, picojoules: fp32 0.9 / 3.7; fp16 0.4 / 1.1; int8 0.03 / 0.2" in out
    with pytest.raises(SystemExit) as caught:
        main(["--node=3nm"])
    assert caught.value.code == 2 and "7nm" in capsys.readouterr().err


def test_csv_is_the_table(tmp_path, table, capsys):
    path = tmp_path / "ladder.csv"
    assert main([f"--csv={path}", "--vocab_size=1000", "--sequence_length=128"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_dtype=False)
    assert "95k" in capsys.readouterr().out


def test_vocabulary_and_length_count(table):
    more, longer = costs(2000, 128), costs(1000, 256)
    key = "training_flops_per_token"
    base = row_of(table, "95k", "ternary")[key]
    assert row_of(more, "95k", "ternary")[key] - base == 3 * 2 * 64 * 1000
    assert row_of(longer, "95k", "ternary")[key] - base == 3 * 2 * (2 * 2 * 128 * 64)


@pytest.mark.parametrize(
    "argument", ["--vocab_size=0", "--vocab_size=-5", "--sequence_length=0", "--sequence_length=-1"]
)
def test_bad_numbers(argument, tmp_path, capsys):
    assert main([argument, f"--csv={tmp_path / 'ladder.csv'}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert argument.split("=")[0] in captured.err and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["--vocab_size=many", "--size=7b"])
def test_bad_usage(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        main([argument])
    assert caught.value.code == 2 and argument.split("=")[0] in capsys.readouterr().err


def test_a_csv_that_cannot_be_written(tmp_path, capsys):
    """A folder that is missing, and one in the file's place: named, with a reason."""
    for path in (tmp_path / "missing" / "ladder.csv", tmp_path):
        assert main([f"--csv={path}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: cannot write there (") and error.count("\n") == 1
        assert "None" not in error and "directory" in error
