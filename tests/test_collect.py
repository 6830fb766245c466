"""Summaries into one table, and the latents' last statistics into another."""

import dataclasses
import hashlib
import json
import math
import random

import pandas as pd
import pytest
from run_files import flipped

from bitnet_jax import cost
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.files import write_json
from bitnet_jax.results import endpoint_row
from experiments.collect import collect, collect_latents, main

# fmt: off
CONTRACT = [
    "run_id", "sweep", "size", "precision", "seed", "params_total", "params_non_embedding",
    "params_quantized", "tokens", "unique_tokens", "flops", "flops_6nd", "loss", "loss_stderr",
    "bits_per_byte", "train_loss", "model_bits", "energy_pj_per_token", "peak_lr", "weight_decay",
    "weight_mse", "batch_tokens", "schedule", "warmup_tokens",
    "status", "wall_s", "device", "jax_version", "git_commit",
]
# fmt: on
PROVENANCE = {"device": "1x cpu", "jax_version": "0.0", "git_commit": "abc"}


@pytest.fixture
def spec_of(tiny_config, tiny_corpus):
    return lambda **overrides: resolve(tiny_config(overrides), tiny_corpus)


def rows_of(spec, loss=3.0, status="ok"):
    endpoint = {"loss": loss, "loss_stderr": 0.1, "bits_per_byte": 4.0, "train_loss": 2.5}
    if status != "ok":
        endpoint = dict.fromkeys(endpoint)
    more = {"unique_tokens": 9, "status": status, "wall_s": 1.0}
    return [endpoint_row(spec, {"end": end, **endpoint, **more}, PROVENANCE) for end in spec.ends]


@pytest.fixture
def sweep(tmp_path):
    """Writes summaries of runs into a sweep's directory."""
    folder = tmp_path / "mysweep"

    def finish(spec, **kwargs):
        run = folder / "runs" / spec.run_id
        run.mkdir(parents=True)
        write_json(run / "summary.json", {"endpoints": rows_of(spec, **kwargs)})
        return run / "summary.json"

    folder.mkdir()
    finish.folder = folder
    return finish


def test_columns_of_the_contract(sweep, spec_of):
    spec = spec_of(precision="ternary")
    sweep(spec)
    table = collect(sweep.folder)
    assert [column for column in table if column in CONTRACT] == CONTRACT
    row = table.iloc[1]
    assert (row["sweep"], row["run_id"]) == ("mysweep", spec.run_id)
    assert (row["precision"], row["seed"], row["tokens"]) == ("ternary", 0, 5120)
    assert row["flops"] == 5120 * spec.flops_per_token
    assert row["flops_6nd"] == 6 * row["params_non_embedding"] * 5120
    assert row["params_non_embedding"] == row["params_total"] - 256 * 16
    assert row["params_quantized"] == 2 * 256 + 2 * 128 + 3 * 512
    floats = row["params_total"] - row["params_quantized"]
    assert row["model_bits"] >= row["params_quantized"] * math.log2(3) + 16 * floats
    assert (row["warmup_tokens"], row["schedule"]) == (256, "wsd")
    assert (row["batch_tokens"], row["peak_lr"]) == (128, 0.01)


def normal_mse(level, threshold):
    """Mean squared error of trits of a standard normal, in closed form (Max 1960)."""
    beyond = math.erfc(threshold / math.sqrt(2))
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 4 * level * density + level**2 * beyond


def test_weight_error_of_the_arm(spec_of):
    """Of normal weights: absmean's level sqrt(2/pi) with the threshold at half; none for floats."""
    mean = math.sqrt(2 / math.pi)
    twn = spec_of(**{"precision": "ternary", "quantization.weights": "ternary_twn"})
    density = math.exp(-((0.7 * mean) ** 2) / 2) / math.sqrt(2 * math.pi)
    level = 2 * density / math.erfc(0.7 * mean / math.sqrt(2))
    expected = {
        spec_of(precision="ternary"): normal_mse(mean, mean / 2),
        twn: normal_mse(level, 0.7 * mean),
        spec_of(precision="binary"): 1 - mean**2,
        spec_of(precision="fp16"): 0,
    }
    for spec, error in expected.items():
        for row in rows_of(spec):
            assert row["weight_mse"] == pytest.approx(error, rel=1e-3, abs=1e-12)


def test_tags_are_columns(sweep, spec_of):
    """Of the runs that have them; a run without is empty there."""
    tagged = dataclasses.replace(spec_of(), tags=(("base", "full"), ("change", "sub-norms")))
    assert [key for key in rows_of(tagged)[0] if key.startswith("tag_")] == [
        "tag_base",
        "tag_change",
    ]
    assert not any(key.startswith("tag_") for key in rows_of(spec_of())[0])
    sweep(tagged)
    sweep(spec_of(seed=1))
    table = collect(sweep.folder)
    assert list(table["tag_change"].fillna("")) == ["sub-norms", ""] * 2
    assert set(table["tag_base"].dropna()) == {"full"}


def test_what_a_late_arm_costs(spec_of):
    """Bits and energy are of the arm that is deployed; the row's name says both."""
    arm = {"precision": "ternary", "quantization.weights": "ternary_twn"}
    late = spec_of(**arm, **{"quantization.late_activations": "none"})
    base = spec_of(**arm)
    floats = spec_of(**arm, **{"quantization.activations": "none"})
    (row, _), (base_row, _), (float_row, _) = map(rows_of, (late, base, floats))
    assert row["precision"] == "ternary+weights=ternary_twn+late=none"
    assert row["energy_pj_per_token"] == float_row["energy_pj_per_token"]
    assert row["energy_pj_per_token"] != base_row["energy_pj_per_token"]
    for key in ("model_bits", "weight_mse", "flops"):
        assert row[key] == float_row[key]
    deployed = late.deployed.precision
    expected = cost.energy_per_token(late.step.model, deployed, late.data.sequence_length)
    assert row["energy_pj_per_token"] == expected


def test_order_and_file(sweep, spec_of):
    """By size, tokens, arm and seed; the file is the table that is returned, and alone."""
    for size, precision, seed in (("56k", "fp16", 1), ("56k", "fp16", 0), ("56k", "ternary", 0)):
        sweep(spec_of(**{"model.size": size, "precision": precision, "seed": seed}))
    sweep(spec_of(**{"model.ff_width": 16}))
    table = collect(sweep.folder)
    assert len(table) == 8 and list(table.index) == list(range(8))
    keys = list(zip(table["params_non_embedding"], table["tokens"], table["precision"],
                    table["seed"], strict=True))  # fmt: skip
    assert keys == sorted(keys) and len(set(keys)) == 8
    pd.testing.assert_frame_equal(pd.read_parquet(sweep.folder / "endpoints.parquet"), table)
    names = sorted(path.name for path in sweep.folder.iterdir())
    assert names == ["endpoints.parquet", "runs"]


def test_failed_and_diverged_runs_are_rows(sweep, spec_of):
    """Never a missing row; losses are NaN in columns that stay numbers."""
    diverged, failed = spec_of(seed=1), spec_of(seed=2)
    sweep(diverged, status="diverged")
    table = collect(sweep.folder, {failed.run_id: rows_of(failed, status="failed")})
    assert list(table["status"]) == ["diverged", "failed"] * 2
    assert table["loss"].dtype == "float64" and table["loss"].isna().all()
    assert set(table["sweep"]) == {"mysweep"}
    assert pd.read_parquet(sweep.folder / "endpoints.parquet")["loss"].dtype == "float64"


def test_what_failed_here_and_was_finished_by_another_launch_has_not_failed(sweep, spec_of):
    mended, failed = spec_of(seed=1), spec_of(seed=2)
    sweep(mended)
    failures = {spec.run_id: rows_of(spec, status="failed") for spec in (mended, failed)}
    table = collect(sweep.folder, failures)
    assert {run: set(rows["status"]) for run, rows in table.groupby("run_id")} == {
        mended.run_id: {"ok"},
        failed.run_id: {"failed"},
    }
    assert len(table) == 4


def test_unfinished_runs_are_not_rows(sweep, spec_of):
    sweep(spec_of())
    unfinished = sweep.folder / "runs" / spec_of(seed=1).run_id
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    assert set(collect(sweep.folder)["seed"]) == {0}


def test_only_the_runs_of_the_plan(sweep, spec_of):
    """What an earlier config left in the same directory is not mixed in."""
    old, new = spec_of(seed=1), spec_of(seed=2)
    sweep(old)
    sweep(new)
    alone = collect(sweep.folder, tags={new.run_id: {"change": "other"}})
    assert set(alone["seed"]) == {2} and set(alone["tag_change"]) == {"other"}
    assert set(collect(sweep.folder)["seed"]) == {1, 2}


def test_nothing_finished(sweep, capsys):
    with pytest.raises(FileNotFoundError, match="no run has finished"):
        collect(sweep.folder)
    assert not (sweep.folder / "endpoints.parquet").exists()
    assert main([str(sweep.folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_command(sweep, spec_of, capsys):
    sweep(spec_of())
    assert main([str(sweep.folder)]) == 0
    assert "endpoints.parquet: 2 endpoints" in capsys.readouterr().out
    assert len(pd.read_parquet(sweep.folder / "endpoints.parquet")) == 2


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}"])
def test_a_damaged_summary_is_named(tmp_path, damaged, capsys):
    path = tmp_path / "runs" / "a-run" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(damaged)
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and "delete it" in message and message.count("\n") == 1
    assert not (tmp_path / "endpoints.parquet").exists()


def refused(folder, capsys, *more):
    """The one line of a command that wrote nothing."""
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    assert main([str(folder), *more]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before
    return message


def test_a_flipped_bit_is_not_collected(sweep, spec_of, capsys):
    """Losses and sizes are not what a bit makes of them: every value is under the digest."""
    path = sweep(spec_of())
    content, whole = path.read_bytes(), collect(sweep.folder)
    for bit in random.Random(0).sample(range(8 * len(content)), 200):
        path.write_bytes(content)
        flipped(path, bit)
        try:
            pd.testing.assert_frame_equal(collect(sweep.folder), whole, check_exact=True)
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("where", ["rows", "header"])
def test_a_summary_of_another_run_is_refused(sweep, spec_of, capsys, where):
    spec, other = spec_of(), spec_of(seed=1)
    path = sweep(spec)
    header = {"run_id": other.run_id if where == "header" else spec.run_id}
    rows = rows_of(other if where == "rows" else spec)
    write_json(path, {**header, "endpoints": rows})
    message = refused(sweep.folder, capsys)
    assert f"{path}: it is the summary of {other.run_id}" in message


def test_a_run_that_lies_out_of_the_sweep_is_refused(sweep, spec_of, capsys, tmp_path):
    path = sweep(spec_of())
    out = tmp_path / "out"
    path.parent.rename(out)
    path.parent.symlink_to(out)
    message = refused(sweep.folder, capsys)
    assert f"{path.parent}: a symbolic link that leads out of {sweep.folder}" in message


def test_a_summary_of_a_newer_version_is_refused(sweep, spec_of, capsys):
    path = sweep(spec_of())
    write_json(path, {"schema_version": 99, "endpoints": rows_of(spec_of())})
    assert f"{path}: schema_version=99: " in refused(sweep.folder, capsys)


# Latents

STATISTICS = {"latent_flips": 0.25, "latent_zeros": 0.5, "latent_entropy": None}


def train_line(step, **values):
    return {"kind": "train", "step": step, "tokens": step * 128, "decay_to": None,
            "loss": 3.0, "grad_norm": 1.0, **values}  # fmt: skip


def endpoint_line(step, **values):
    return {"kind": "endpoint", "step": step, "tokens": step * 128, "decay_to": step * 128,
            "valid_loss": 3.0, **values}  # fmt: skip


def ternary_lines():
    """The log of a run with endpoints at steps 20 and 40: what is last is not what is first."""
    early = {key: 0.75 for key in STATISTICS}
    return [
        train_line(7, **early),
        {"kind": "layers", "step": 7, "layers": {"latent_flips": 9.0}},
        train_line(20, **early),
        endpoint_line(20, gradient_cosine=0.1),
        train_line(40, **STATISTICS),
        {"kind": "layers", "step": 40, "layers": {"latent_flips": 9.0}},
        {"kind": "eval", "step": 40, "valid_loss": 3.0, "latent_flips": 9.0},
        endpoint_line(40, gradient_cosine=0.9),
    ]


@pytest.fixture
def logged(sweep):
    """Writes a run's summary and its metrics; gives the metrics' path."""

    def finish(spec, lines, **kwargs):
        sweep(spec, **kwargs)
        path = sweep.folder / "runs" / spec.run_id / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    finish.folder = sweep.folder
    return finish


def test_last_statistics(logged, spec_of):
    """Of the last train line and the last endpoint; who it is comes from the summary."""
    spec = spec_of(precision="ternary", seed=3)
    logged(spec, ternary_lines())
    (row,) = collect_latents(logged.folder).to_dict("records")
    assert row == {
        "run_id": spec.run_id, "size": spec.size, "precision": "ternary", "seed": 3,
        "tokens": 5120, "loss": 3.0, "status": "ok", **STATISTICS, "gradient_cosine": 0.9,
    }  # fmt: skip


def test_a_cosine_of_an_earlier_endpoint_is_not_the_last_ones(logged, spec_of):
    lines = ternary_lines()
    del lines[-1]["gradient_cosine"]
    logged(spec_of(precision="ternary"), lines)
    assert "gradient_cosine" not in collect_latents(logged.folder)


def test_tags_stay_and_floats_are_left_out(logged, spec_of):
    tagged = dataclasses.replace(spec_of(precision="ternary"), tags=(("change", "sub-norms"),))
    logged(tagged, ternary_lines())
    logged(spec_of(precision="binary", seed=1), ternary_lines())
    for seed in (0, 1):
        lines = [train_line(40), endpoint_line(40)]
        logged(spec_of(precision="fp16", seed=seed), lines)
    table = collect_latents(logged.folder)
    assert sorted(table["precision"]) == ["binary", "ternary"]
    by_arm = table.set_index("precision")["tag_change"]
    assert by_arm["ternary"] == "sub-norms" and pd.isna(by_arm["binary"])
    assert len(collect(logged.folder)) == 8, "they are endpoints all the same"


def test_a_diverged_run_keeps_its_statistics(logged, spec_of):
    """Its trunk may end before any endpoint is logged."""
    logged(spec_of(precision="ternary"), [train_line(30, **STATISTICS)], status="diverged")
    (row,) = collect_latents(logged.folder).to_dict("records")
    assert row["status"] == "diverged" and row["latent_flips"] == 0.25


def test_latents_command(logged, spec_of, capsys):
    logged(spec_of(precision="ternary"), ternary_lines())
    logged(spec_of(precision="fp16"), [train_line(40), endpoint_line(40)])
    assert main([str(logged.folder)]) == 0
    assert not (logged.folder / "latents.csv").exists(), "only when asked for"
    capsys.readouterr()
    assert main([str(logged.folder), "--latents"]) == 0
    out = capsys.readouterr().out
    assert "latents.csv: 1 runs" in out and "endpoints.parquet: 4 endpoints" in out
    written = pd.read_csv(logged.folder / "latents.csv")
    table = collect_latents(logged.folder)
    assert list(written) == list(table)
    empty = table.isna()
    assert list(empty.columns[empty.iloc[0]]) == ["latent_entropy"]
    assert (written.isna() == empty).all(axis=None)
    assert (written == table)[~empty].fillna(True).all(axis=None)


def test_no_latents_among_floats(logged, spec_of, capsys):
    logged(spec_of(precision="fp16"), [train_line(40), endpoint_line(40)])
    assert main([str(logged.folder), "--latents"]) == 2
    error = capsys.readouterr().err
    assert "no run with quantized weights" in error and error.count("\n") == 1
    assert not (logged.folder / "latents.csv").exists()


@pytest.mark.parametrize(
    "damaged",
    [
        "", "{", "[]", "3", "{}", '{"kind": []}', "\x00",
        json.dumps(train_line(40, **STATISTICS)),  # it does not reach the endpoint
        json.dumps(endpoint_line(20)),  # another run's, or half of this one
        json.dumps(endpoint_line(40)) + '\n{"kind": "tra',
    ],
)  # fmt: skip
def test_damaged_metrics_are_named(logged, spec_of, damaged, capsys):
    path = logged(spec_of(precision="ternary"), [])
    path.write_text(damaged)
    assert main([str(logged.folder), "--latents"]) == 2
    message = capsys.readouterr().err
    assert f"{path}: not a run's metrics" in message and message.count("\n") == 1
    assert not (logged.folder / "latents.csv").exists()


@pytest.mark.parametrize("change", ["flip", "cut", "append", "lose"])
def test_metrics_that_the_summary_was_not_written_with_are_named(logged, spec_of, capsys, change):
    """However well they read."""
    spec = spec_of(precision="ternary")
    path = logged(spec, ternary_lines())
    content = path.read_bytes()
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(path.with_name("summary.json"), {"endpoints": rows_of(spec), "metrics": known})
    assert len(collect_latents(logged.folder)) == 1
    changed = {
        "flip": content.replace(b"0.25", b"0.24"),
        "cut": content[: content.rindex(b"{")],
        "append": content + content.splitlines(keepends=True)[-1],
    }
    if change == "lose":
        path.unlink()
    else:
        path.write_bytes(changed[change])
    assert main([str(logged.folder), "--latents"]) == 2
    message = capsys.readouterr().err
    assert f"{path}: damaged, it is not the log that" in message and message.count("\n") == 1
    assert not (logged.folder / "latents.csv").exists()


def test_metrics_of_a_newer_version_are_refused(logged, spec_of, capsys):
    header = {"kind": "header", "schema_version": 99, "run_id": "x"}
    path = logged(spec_of(precision="ternary"), [header, *ternary_lines()])
    assert main([str(logged.folder), "--latents"]) == 2
    assert f"{path}: schema_version=99: " in capsys.readouterr().err


def test_missing_metrics_are_named(logged, spec_of, capsys):
    path = logged(spec_of(precision="ternary"), [])
    path.unlink()
    assert main([str(logged.folder), "--latents"]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_damaged_run_of_another_config_is_not_read(sweep, spec_of):
    old, new = spec_of(seed=1), spec_of(seed=2)
    sweep(old)
    sweep(new)
    (sweep.folder / "runs" / old.run_id / "summary.json").write_text("{")
    assert set(collect(sweep.folder, tags={new.run_id: {}})["seed"]) == {2}
