"""The suite `decode`: what it counts, what it divides, and how it ends."""

import math

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import cost
from bitnet_jax.deployed import deploy
from bitnet_jax.generate import decoder
from bitnet_jax.model import init_params
from bitnet_jax.precision import get_precision
from experiments.benchmark import decode
from experiments.benchmark.workload import Workload

WORKLOAD = Workload(sizes=("27k",), layers=1, vocab=16, sequence_length=32, batch_tokens=32,
                    repeats=2)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "AT_LEAST", 0.0)
        patch.setattr(decode, "BANDWIDTH_BYTES", 2**18)
        return decode.run(WORKLOAD, said.append)


def test_rows_and_ratios(result):
    """Every case beside float32, within each round, and its floor."""
    assert [row["case"] for row in result.measurements] == list(decode.CASES)
    assert result.ratios.keys() == {
        *(f"decode_time/{name}/float32" for name in ("bfloat16", "2bit", "base3")),
        *(f"decode_floor/{name}" for name in decode.CASES),
    }
    rows = {row["case"]: row for row in result.measurements}
    for name, row in rows.items():
        assert len(row["rounds_seconds"]) == 2 and row["tokens_per_s"] == 1 / row["seconds"]
        assert row["bytes_per_s"] == row["weight_bytes"] / row["seconds"]
        assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        if name != "float32":
            turns = zip(row["rounds_seconds"], rows["float32"]["rounds_seconds"], strict=True)
            found, quotients = (
                result.ratios[f"decode_time/{name}/float32"],
                [a / b for a, b in turns],
            )
            assert (found.min, found.max) == (min(quotients), max(quotients))
            assert found.goal is None  # a narrow model stays in a cache


def test_bytes_by_hand(result):
    """One block of width 32 and 96: each kernel's bytes, 32-bit scales, norms and head."""
    model = WORKLOAD.model("27k")
    kernels = cost.linear_shapes(model).values()
    rest = 4 * (3 * 32 + 96 + 32 + 16 * 32)
    found = {row["case"]: row["weight_bytes"] for row in result.measurements}
    weights = sum(n * p for n, p in kernels)
    assert found["float32"] == 4 * weights + rest
    assert found["bfloat16"] == 2 * weights + rest
    for name, codes in (("2bit", 4), ("base3", 5)):
        in_fours = sum(math.ceil(math.ceil(n / codes) / 4) * 4 * p for n, p in kernels)
        assert found[name] == in_fours + 4 * len(kernels) + rest


def test_the_goal_is_that_of_a_wide_model():
    seconds, decodings = {name: [1.0, 2.0] for name in decode.CASES}, {}
    wide = Workload(sizes=("60m",), repeats=2)
    ratios = decode._ratios(wide, "60m", seconds, decodings, [1.0, 1.0])
    goals = {name: ratio.goal for name, ratio in ratios.items()}
    on_cpu = jax.default_backend() == "cpu"
    assert goals["decode_time/2bit/float32"] == goals["decode_time/base3/float32"]
    assert goals["decode_time/2bit/float32"] == (0.5 if on_cpu else None)
    assert goals["decode_time/bfloat16/float32"] is None


def test_the_embedding_is_not_read_but_for_a_row():
    precision = get_precision("ternary")
    model = WORKLOAD.model("27k")
    laid_out = decoder(
        model, precision, deploy(init_params(model, precision, jax.random.key(0)), precision)
    )
    more = laid_out._replace(embedding=jnp.zeros((1000, 32)))
    assert decode.read_bytes(more) == decode.read_bytes(laid_out)
