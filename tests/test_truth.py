"""Training and fitting against a truth known exactly: languages whose entropy rate is a formula.

Nothing can predict better than the language itself does, so these tests find a leak of targets into
inputs, a loss that is averaged wrongly, and a fit that extrapolates to the wrong floor.
"""

import numpy as np
import pytest

from analysis.fitting import fit
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import SyntheticLanguage, load, synthetic, validation_rows
from bitnet_jax.train import train_and_evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Writes a corpus of a language, shorter than the built-in one."""

    def make(language, train_tokens):
        out = tmp_path_factory.mktemp("language") / "synthetic"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "SyntheticLanguage", lambda: language)
            patch.setattr(synthetic, "_TRAIN_TOKENS", train_tokens)
            patch.setattr(synthetic, "_VALID_TOKENS", 131_200)
            synthetic.prepare_synthetic(out)
        return load(out)

    return make


def endpoints(corpus, directory, overrides):
    config = default.get_config()
    config.update_from_flattened_dict({"tracking.wandb": "disabled", "eval.tokens": 0, **overrides})
    spec = resolve(config, corpus)
    run_dir = directory / spec.run_id
    summary = train_and_evaluate(spec, corpus, run_dir, loop_options(config), config.to_dict())
    assert summary["status"] == "ok"
    return summary["endpoints"]


def floor(language, corpus, length):
    """What the language itself costs on the targets that are evaluated: no model can do better."""
    rows = validation_rows(corpus.valid, length)
    return -language.log_prob(rows)[:, 1:].mean()


@pytest.mark.parametrize(("precision", "percent"), [("fp16", 4), ("ternary", 5)])
def test_held_out_loss_against_the_entropy_rate(prepared, tmp_path, precision, percent):
    """Never below it; and 27k parameters come close to it within 800k tokens.

    Measured when written: 2.7 % (float) and 3.7 % (ternary) above the rate of 2.5995 nats. A model
    of one symbol of context instead of two could not come within 10 %.
    """
    language = SyntheticLanguage()
    corpus = prepared(language, 1_000_000)
    assert corpus.manifest["entropy_rate_nats"] == language.entropy_rate
    overrides = {
        "precision": precision,
        "model.size": "27k",
        "data.sequence_length": 128,
        "train.batch_tokens": 2048,
        "train.tokens": (100_000, 800_000),
    }
    early, late = endpoints(corpus, tmp_path, overrides)
    for row in (early, late):
        assert row["loss"] > language.entropy_rate - 3 * row["loss_stderr"]
        assert row["loss"] > floor(language, corpus, 128)
        assert 0 < row["loss_stderr"] < 0.01
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2))
    assert early["loss"] > 3.2, "100k tokens are too few to see two symbols back"
    assert late["loss"] < (1 + percent / 100) * language.entropy_rate


def test_fitted_floor_is_the_entropy_of_the_language(prepared, tmp_path):
    """E of a power law through 7 budgets of one model, within .005 nats of the truth.

    A language of 16 symbols, small enough that the model's size does not limit its loss: tokens
    alone separate it from the floor. Measured when written, with seeds 0 to 3 on two versions of
    jax: E from 1.9631 to 1.9685, the truth being 1.9656. The five parameters of a law in parameters
    and tokens are not determined by what trains within a minute, so it is not tested here.
    """
    language = SyntheticLanguage(alphabet_size=16, classes=4)
    corpus = prepared(language, 2_000_000)
    truth = floor(language, corpus, 64)
    assert truth == pytest.approx(language.entropy_rate, rel=5e-3), "rows cost a little more"
    budgets = (200_000, 280_000, 400_000, 560_000, 800_000, 1_130_000, 1_600_000)
    overrides = {
        "precision": "fp32",
        "model.size": "27k",
        "data.sequence_length": 64,
        "train.batch_tokens": 1024,
        "train.tokens": budgets,
        "schedule.warmup_fraction": 0.05,
        "optim.peak_lr": 0.01,
    }
    rows = endpoints(corpus, tmp_path, overrides)
    loss = np.array([row["loss"] for row in rows])
    found = fit("power", {"c": np.array([row["flops"] for row in rows])}, loss)
    assert found.params["E"] == pytest.approx(truth, abs=0.005)
    assert found.params["E"] < loss.min(), "a floor lies below all that was measured"
    assert loss.max() > truth + 0.01, "the points are not all at the floor already"
    residuals = np.log(found.predict(found.inputs) / loss)
    assert np.sqrt(np.mean(residuals**2)) < 0.002
