"""The compiled programs of a group of runs: init, several optimizer steps, evaluation, telemetry.

Runs of one shape and arm train as a leading `runs` axis R of one program: their seeds, learning
rates and weight decays are its inputs, so every group of that shape, arm and number shares it. A
lone run has an axis of one, which its program takes off again. Where there are several devices the
axis is spread over them, each device computing its own runs: nothing is communicated. A run too
large for a device is alone in its program, which is cut over a mesh (`sharding.py`).

Programs are kept while they are in use (the last PROGRAMS of each kind), and on disk between
processes where `keep_programs` says so.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax import sharding, telemetry
from bitnet_jax.precision import Precision
from bitnet_jax.sharding import ONE_DEVICE, MeshShape
from bitnet_jax.train_step import StepConfig, TrainState, eval_step, init_state, train_step

PROGRAMS = 16  # of each kind; one of 95k parameters takes about 15 MB
CACHE_BYTES = 2 * 2**30  # of programs on disk; the least recently used go first


class Schedule(NamedTuple):
    """What the host decides of K steps. A learning rate and a weight decay are a run's own.

    remember: whether telemetry keeps the codes that a step starts from (`telemetry.remember`).
    """

    learning_rate: Float[np.ndarray, "R K"] | P
    weight_decay: Float[np.ndarray, "R K"] | P
    strength: Float[np.ndarray, "K"] | P
    remember: Bool[np.ndarray, "K"] | P


def keep_programs(directory: Path) -> None:
    """Keep compiled programs there, so that a later launch need not compile them again.

    Leaves a directory that the user has set (as by JAX_COMPILATION_CACHE_DIR) alone.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def devices(runs: int) -> int:
    """Over how many devices a group of so many runs is spread: as many as divide it."""
    return math.gcd(runs, jax.device_count()) if runs > 1 else 1


def place(tree: Any, runs: int, mesh: MeshShape = ONE_DEVICE) -> Any:
    """Arrays with a leading runs axis, each run's part on its device, or a lone run's cut over a
    mesh; or the shapes of such."""
    if mesh != ONE_DEVICE:
        return sharding.place(tree, mesh)
    where = NamedSharding(_mesh(devices(runs)), P("runs"))

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.device_put(x, where)

    return jax.tree.map(one, tree)


def replicate(tree: Any, runs: int, mesh: MeshShape = ONE_DEVICE) -> Any:
    """Arrays that all runs of a group read, on each of their devices."""
    where = _mesh(devices(runs)) if mesh == ONE_DEVICE else sharding.mesh(mesh)
    return jax.device_put(tree, NamedSharding(where, P()))


@functools.lru_cache(PROGRAMS)
def compiled_init(config: StepConfig, runs: int) -> Any:
    """Seeds [R] to the states of the runs."""

    def one(seed: Int[Array, ""]) -> TrainState:
        return sharding.constrain_tree(init_state(config, seed))

    def build(local: int) -> Callable:
        take, give, over_runs = _runs_axis(local)

        def init(seeds: Int[Array, "R"]) -> TrainState:
            return give(over_runs(one)(take(seeds)))

        return init

    return _compile(build, runs, (P("runs"),), config.mesh)


@functools.lru_cache(PROGRAMS)
def compiled_steps(config: StepConfig, runs: int, length: int) -> Any:
    """(states, tokens [N], starts [R, K, B], schedule, count) to (states, metrics [R, K]).

    Makes the first `count` of K optimizer steps, on rows of `length` + 1 tokens that begin at
    `starts`; the metrics of the others are zero. The number of steps is an input, so that a run
    passes through the same program however its steps are cut into calls. States are donated.
    """
    specs = P("runs"), P(), P("runs"), Schedule(P("runs"), P("runs"), P(), P()), P()
    build = functools.partial(_steps, config, length)
    return _compile(build, runs, specs, config.mesh, donate_argnums=0)


def _steps(config: StepConfig, length: int, local: int) -> Callable:
    take, give, over_runs = _runs_axis(local)

    def one_step(i, state: TrainState, tokens, starts, schedule: Schedule):
        columns = jnp.arange(length + 1).reshape(1, 1, -1)
        rows = tokens[starts[:, i, :, None] + columns].astype(jnp.int32)
        rows = sharding.constrain(rows, None, "batch")
        if state.snapshots is not None:
            remember = functools.partial(telemetry.remember, precision=config.precision)
            snapshots = jax.lax.cond(
                schedule.remember[i],
                lambda: over_runs(remember)(state.snapshots, state.params),
                lambda: state.snapshots,
            )
            state = state.replace(snapshots=snapshots)
        step = functools.partial(train_step, config, strength=schedule.strength[i])
        rates = schedule.learning_rate[:, i], schedule.weight_decay[:, i]
        return over_runs(step)(state, *take((rows, *rates)))

    def steps(state: TrainState, tokens, starts, schedule: Schedule, count):
        state = take(state)
        shapes = jax.eval_shape(one_step, 0, state, tokens, starts, schedule)[1]
        size = starts.shape[1]
        metrics = jax.tree.map(lambda m: jnp.zeros((size, *m.shape), m.dtype), shapes)

        def body(i, carry):
            state, metrics = carry
            state, new = one_step(i, state, tokens, starts, schedule)
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), metrics, new)

        state, metrics = jax.lax.fori_loop(0, count, body, (state, metrics))
        metrics = jax.tree.map(lambda m: m.reshape(size, local).T, metrics)
        return give(state), sharding.everywhere(metrics)

    return steps


@functools.lru_cache(PROGRAMS)
def compiled_eval(config: StepConfig, runs: int) -> Any:
    """(parameters of the runs, tokens [B, T+1]) to the mean nats of each row [R, B]."""

    def build(local: int) -> Callable:
        take, give, over_runs = _runs_axis(local)

        def evaluate(params: dict, tokens: Array) -> Array:
            nats = give(over_runs(lambda p: eval_step(config, p, tokens))(take(params)))
            return sharding.everywhere(nats)

        return evaluate

    return _compile(build, runs, (P("runs"), P()), config.mesh)


@functools.lru_cache(PROGRAMS)
def compiled_observe(precision: Precision, runs: int, mesh: MeshShape = ONE_DEVICE) -> Any:
    """`telemetry.observe` of each run: (snapshots, parameters) to (snapshots, statistics)."""

    def build(local: int) -> Callable:
        take, give, over_runs = _runs_axis(local)
        one = functools.partial(telemetry.observe, precision=precision)

        def observe(snapshots: telemetry.Snapshots, params: dict) -> tuple:
            snapshots, stats = give(over_runs(one)(*take((snapshots, params))))
            return snapshots, sharding.everywhere(stats)

        return observe

    return _compile(build, runs, (P("runs"), P("runs")), mesh, donate_argnums=0)


@jax.jit
def part(tree: Any, run: Int[Array, ""]) -> Any:
    """One run's part of arrays with a leading runs axis."""
    return jax.tree.map(lambda x: x[run], tree)


@jax.jit
def copied(tree: Any) -> Any:
    """Copies, for what a donated argument would take away."""
    return jax.tree.map(jnp.copy, tree)


def _runs_axis(local: int) -> tuple[Callable, Callable, Callable]:
    """How a program of so many runs takes their axis off, puts it back, and maps over it."""
    if local > 1:
        return (lambda tree: tree), (lambda tree: tree), jax.vmap
    take = functools.partial(jax.tree.map, lambda a: a[0])
    give = functools.partial(jax.tree.map, lambda a: a[None])
    return take, give, lambda function: function


def _compile(build: Callable, runs: int, specs: tuple, mesh: MeshShape, **options: Any) -> Any:
    """jit of build(runs a device), whose arguments lie on the devices as `specs` say; of a lone run
    on a mesh as they are laid out when it is called."""
    if mesh != ONE_DEVICE:
        alone = build(runs)

        @functools.wraps(alone)
        def cut(*arguments: Any) -> Any:
            with sharding.over(mesh):
                return alone(*arguments)

        return jax.jit(cut, **options)
    count = devices(runs)
    function = build(runs // count)
    if count > 1:
        function = jax.shard_map(
            function,
            mesh=_mesh(count),
            in_specs=specs,
            out_specs=P("runs"),
            check_vma=False,  # the body knows nothing of the other devices
        )
    return jax.jit(function, **options)


@functools.cache
def _mesh(count: int) -> Mesh:
    return jax.make_mesh(
        (count,), ("runs",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
