"""The law of the distance of two arms: known answers, draws of whole runs, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.gap_law import fit_gap_law, main, new_gaps
from analysis.tables import AnalysisError

SIZES = {"27k": 27e3, "56k": 56e3, "95k": 95e3, "330k": 330e3}
K, A, B = 0.06, -0.4, 0.25


def truth(n, d):
    return K * (n / 1e5) ** A * (d / 1e6) ** B


def table(noise=0.0, run_noise=0.0, seeds=3, seed=0, sizes=SIZES, ratios=(10, 40, 160)):
    """Endpoints of two arms, far from any law of their own. run_noise: of a whole pair of runs."""
    rng, rows = np.random.default_rng(seed), []
    for size, n in sizes.items():
        for at in range(seeds):
            luck = run_noise * rng.normal()
            for ratio in ratios:
                d, base = ratio * n, 1.5 + rng.uniform()
                gap = truth(n, d) + luck + noise * rng.normal()
                for arm, loss in (("fp16", base), ("ternary", base + gap)):
                    rows.append({"run_id": f"{size}-{arm}-{at}", "precision": arm, "size": size,
                                 "seed": at, "tokens": d, "params_non_embedding": n, "loss": loss,
                                 "loss_stderr": 0.004, "status": "ok"})  # fmt: skip
    return pd.DataFrame(rows)


def test_finds_the_truth():
    law = fit_gap_law(table(), "fp16", "ternary", bootstrap=100)
    np.testing.assert_allclose([law.k, law.a, law.b], [K, A, B], rtol=1e-6)
    assert (law.pairs, law.runs) == (36, 12) and law.scatter < 1e-9
    found = new_gaps(law, table(sizes={"800k": 8e5}, ratios=(5,), seeds=1))
    np.testing.assert_allclose(found["predicted"], truth(8e5, 4e6), rtol=1e-6)
    np.testing.assert_allclose(found["measured"], truth(8e5, 4e6), rtol=1e-6)


def test_intervals_are_of_whole_runs():
    """What all budgets of a pair of runs share is noise of the pair: intervals that took each
    endpoint as a draw of its own would hold the exponent of D well, and k far too rarely."""
    held = {"k": 0, "a": 0, "b": 0}
    for seed in range(40):
        frame = table(noise=0.002, run_noise=0.008, seed=seed)
        law = fit_gap_law(frame, "fp16", "ternary", bootstrap=200)
        for name, value in (("k", K), ("a", A), ("b", B)):
            low, high = law.intervals[name]
            held[name] += low <= value <= high
    assert all(count >= 33 for count in held.values()), held


def test_new_pairs_lie_where_they_should():
    """Parameters and scatter both: of an extrapolation by four, and of one in the range."""
    inside = []
    for seed in range(40):
        law = fit_gap_law(table(noise=0.01, seed=seed), "fp16", "ternary", bootstrap=100)
        new = table(noise=0.01, seed=1000 + seed, sizes={"56k": 56e3, "1.5m": 1.5e6}, seeds=1)
        inside += new_gaps(law, new)["inside"].tolist()
    assert 0.88 <= np.mean(inside) <= 0.99


def test_planned_endpoints_need_both_arms():
    law = fit_gap_law(table(), "fp16", "ternary", bootstrap=100)
    planned = table(sizes={"800k": 8e5, "1.5m": 1.5e6}, seeds=1).drop(columns="loss")
    lone = planned[(planned["size"] == "800k") | (planned["precision"] == "fp16")]
    assert set(new_gaps(law, lone)["size"]) == {"800k"}
    with pytest.raises(AnalysisError, match="no size and budget has 'fp16' and 'ternary'"):
        new_gaps(law, lone[lone["size"] == "1.5m"])


@pytest.mark.parametrize(
    ("frame", "says"),
    [(table(seeds=1), "4 pairs of runs of 4 sizes: at least 5"),
     (table(sizes={"27k": 27e3, "95k": 95e3}), "6 pairs of runs of 2 sizes"),
     (table().assign(precision=table()["precision"].map({"fp16": "ternary", "ternary": "fp16"})),
      "'ternary' is not above 'fp16'"),
     (table().drop(columns="tokens"), "no column 'tokens'")],
)  # fmt: skip
def test_refuses(frame, says):
    with pytest.raises(AnalysisError, match=says):
        fit_gap_law(frame, "fp16", "ternary", bootstrap=100)


def test_command(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("grid.csv", "new.csv")]
    table(noise=0.002).to_csv(paths[0], index=False)
    table(sizes={"800k": 8e5}, seeds=1).to_csv(paths[1], index=False)
    assert main([paths[0], f"--new={paths[1]}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ternary - fp16 = 0.06") and "measured" in out and "a + b" in out
    assert main([paths[0], f"--new={paths[1]}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 12 and len(found["new"]) == 3
    assert main([paths[0], "--treatment=binary"]) == 2
    assert main([paths[0], "--bootstrap=9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no arm 'binary': the table has fp16, ternary")
    assert "--bootstrap=9: at least" in error


def test_a_fixed_ratio_cannot_tell_the_exponents_apart():
    """But for the rounding of budgets to batches, which an exact rank is fooled by."""
    frame = table(ratios=(10,), sizes={f"{n}k": n * 1e3 for n in (27, 56, 95, 160, 330)})
    frame["tokens"] = (frame["tokens"] / 1024).round() * 1024
    with pytest.raises(AnalysisError, match="nearly a fixed ratio"):
        fit_gap_law(frame, "fp16", "ternary", bootstrap=100)
