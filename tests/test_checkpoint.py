"""Checkpoints: a round trip to the bit, with and without the trunk set aside; the last two kept.
The model that a run leaves behind."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.checkpoint import Checkpointer, load_model, save_model
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.train_step import compiled_init

# A state without snapshots, and one with them whose kernels are bfloat16.
ARMS = {"fp32": {}, "bfloat16": {"precision": "ternary", "optim.latents": "bfloat16"}}


@pytest.fixture(scope="module", params=ARMS)
def state_of(request, tiny_config, tiny_corpus):
    """A state whose every leaf depends on the seed: counters, loss scale and codes included."""
    step = resolve(tiny_config(ARMS[request.param]), tiny_corpus).step

    def fill(x, seed):
        if x.dtype == jnp.int8:
            return jnp.roll(x, seed).at[0].set(seed % 3 - 1)
        return (
            x
            if jnp.issubdtype(x.dtype, jnp.integer)
            else x + jnp.asarray(0.1 * (seed + 1), x.dtype)
        )

    def make(seed):
        state = compiled_init(step)(seed)
        filled = jax.tree.map(lambda x: fill(x, seed), state)
        assert filled.seed == seed
        counters = {"good_steps": seed + 3, "skips": seed + 5, "steps": seed + 7}
        return filled.replace(**{key: jnp.int32(value) for key, value in counters.items()})

    return make


@pytest.fixture
def reopened(tmp_path, state_of):
    """What a new process would restore."""

    def restore():
        checkpointer = Checkpointer(tmp_path / "checkpoints")
        restored = checkpointer.restore_latest(state_of(9))
        checkpointer.close()
        return restored

    return restore


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    yield checkpointer
    checkpointer.close()


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("stash", [False, True])
def test_round_trip(checkpointer, reopened, state_of, stash):
    # Floats that JSON must not round, and what it may not forget.
    progress = {"has_stash": stash, "window": [0.1 + 0.2, 1e-300], "train_loss": None}
    set_aside = state_of(2) if stash else None
    checkpointer.save(17, state_of(1), set_aside, progress)
    checkpointer.close()
    state, restored_stash, restored = reopened()
    assert_bitwise_equal(state, state_of(1))
    assert (restored_stash is not None) == stash
    if stash:
        assert_bitwise_equal(restored_stash, state_of(2))
    assert restored == progress


def test_the_newest_of_two_kept(checkpointer, reopened, state_of, tmp_path):
    for tick in (5, 10, 15, 20):
        checkpointer.save(tick, state_of(tick), None, {"has_stash": False, "tick": tick})
    checkpointer.close()
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [15, 20]
    state, _, progress = reopened()
    assert progress["tick"] == 20
    assert_bitwise_equal(state, state_of(20))


def test_restores_the_newest_without_stash_after_one_with(checkpointer, reopened, state_of):
    checkpointer.save(1, state_of(1), state_of(2), {"has_stash": True})
    checkpointer.save(2, state_of(3), None, {"has_stash": False})
    checkpointer.close()
    state, stash, _ = reopened()
    assert stash is None
    assert_bitwise_equal(state, state_of(3))


def test_same_tick_is_saved_once(checkpointer, reopened, state_of):
    checkpointer.save(3, state_of(1), None, {"has_stash": False})
    checkpointer.save(3, state_of(1), None, {"has_stash": False})
    checkpointer.close()
    assert_bitwise_equal(reopened()[0], state_of(1))


def test_nothing_to_restore(checkpointer, state_of):
    assert checkpointer.restore_latest(state_of(0)) is None


def test_the_state_may_be_overwritten_while_it_is_written(checkpointer, reopened, state_of):
    """Steps donate their input: what is saved must have left it by the time `save` returns."""
    state = state_of(4)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpointer.save(1, state, None, {"has_stash": False})
    step(state)
    checkpointer.close()
    assert_bitwise_equal(reopened()[0], state_of(4))


# The model


def test_a_model_comes_back_to_the_bit(tmp_path, state_of):
    params, like = state_of(1).params, state_of(2).params
    save_model(tmp_path, params)
    assert_bitwise_equal(load_model(tmp_path, like), params)


def test_a_model_takes_the_place_of_an_earlier_one(tmp_path, state_of):
    """Endpoints are made again where a run was cut off after writing one."""
    for seed in (1, 2):
        save_model(tmp_path, state_of(seed).params)
    assert_bitwise_equal(load_model(tmp_path, state_of(0).params), state_of(2).params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_is_found_from_a_relative_path(tmp_path, state_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(Path("run"), state_of(1).params)
    monkeypatch.chdir("/")
    assert_bitwise_equal(load_model(tmp_path / "run", state_of(0).params), state_of(1).params)


def test_no_model_is_said_so(tmp_path, state_of):
    with pytest.raises(FileNotFoundError, match="holds no model.*checkpoint.keep_model=True"):
        load_model(tmp_path / "run", state_of(0).params)
    assert not (tmp_path / "run").exists()


def test_threads_may_save_models_at_once(tmp_path, state_of):
    """As two runs side by side do that end together."""
    params = state_of(1).params
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: save_model(tmp_path / str(i), params), range(12)))
    for i in range(12):
        assert_bitwise_equal(load_model(tmp_path / str(i), params), params)


def test_threads_may_save_checkpoints_at_once(tmp_path, state_of):
    """Written in the background, and each thread's in its own directory."""
    state, like = state_of(1), state_of(0)

    def run(i):
        checkpointer = Checkpointer(tmp_path / str(i))
        for tick in (1, 2, 3):
            checkpointer.save(tick, state, state, {"has_stash": True, "tick": tick})
        checkpointer.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    for i in range(4):
        checkpointer = Checkpointer(tmp_path / str(i))
        for tick in (2, 3):
            found, stash, progress = checkpointer.restore(tick, like)
            assert_bitwise_equal(found, state)
            assert_bitwise_equal(stash, state)
            assert progress["tick"] == tick
        checkpointer.close()
