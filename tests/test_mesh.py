"""A run on a mesh of devices, eight of them made up on a CPU, in a process of its own: what it
comes to is what one device comes to, and what travels is what should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax import sharding
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.sharding import MeshShape
from experiments.benchmark import wire
from experiments.run import main

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "1x2": (1, 2)}
STEPS = [("8x1", "fp32"), ("4x2", "fp32"), ("1x2", "fp32"), ("4x2", "bf16"), ("8x1", "ternary"),
         ("4x2", "ternary")]  # fmt: skip
SHORT = {"train.tokens": (640, 1280), "log.every": 3, "model.kv_heads": 2, "model.layers": 2}

SCRIPT = """
import json, sys
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import programs
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import load
from bitnet_jax.latents import latent_codes
from bitnet_jax.member import Job
from bitnet_jax.sharding import ONE_DEVICE
from bitnet_jax.train import Interrupted, train_group
from experiments.benchmark import wire

overrides, workdir, meshes = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
cases = json.loads(sys.argv[4])
overrides["train.tokens"] = tuple(overrides["train.tokens"])
assert jax.device_count() == 8
corpus = load(overrides["data.source"])


def configured(mesh, arm, **more):
    config = default.get_config()
    config.update_from_flattened_dict(overrides)
    config.precision = arm
    config.mesh.data, config.mesh.tensor = meshes[mesh] if mesh in meshes else (1, 1)
    config.update_from_flattened_dict(more)
    return config


def train(folder, config, stop=None):
    job = Job(resolve(config, corpus), workdir / folder, config.to_dict())
    try:
        train_group([job], corpus, loop_options(config), should_stop=lambda tick: tick == stop)
    except Interrupted:
        pass


def leaves(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x) for path, x in paths]


def one_step(name, mesh, arm):
    "State before and after, and where it lies."
    spec = resolve(configured(mesh, arm), corpus)
    shape, length = spec.step.mesh, spec.data.sequence_length
    state = programs.place(programs.compiled_init(spec.step, 1)(np.zeros(1, np.int32)), 1, shape)
    params = programs.part(state, 0).params
    codes = latent_codes(params, spec.step.precision) if arm == "ternary" else {}
    found = {"codes/" + key: np.asarray(value) for key, value in codes.items()}
    found |= {"init/" + key: np.asarray(x) for key, x in leaves(state.params)}
    starts = np.arange(spec.batch_size, dtype=np.int32)[None, None] * length
    starts = np.concatenate([starts, starts], 1)
    rates = np.full((1, 2), 1e-3, np.float32)
    schedule = programs.Schedule(rates, rates, rates[0], np.zeros(2, bool))
    tokens = programs.replicate(np.asarray(corpus.train), 1, shape)
    steps = programs.compiled_steps(spec.step, 1, length)
    state, metrics = steps(state, tokens, starts, schedule, np.int32(1))
    found["loss"] = np.asarray(metrics["loss"])[:, 0]
    moments = [(key, x) for key, x in leaves(state.opt_state) if ".mu" in key]
    found |= {"gradient/" + key: np.asarray(x) for key, x in moments}
    np.savez(workdir / f"{name}-{arm}.npz", **found)
    kernels = [x for tree in (state.params, state.opt_state) for key, x in leaves(tree)
               if key.endswith("['kernel']")]
    return sorted({x.addressable_shards[0].data.size / x.size for x in kernels})


for arm in {arm for _, arm in cases}:
    one_step("one", "one", arm)
parts = [one_step(name, name, arm) for name, arm in cases]
for name in ("one", "4x2"):
    train("fp32-" + name, configured(name, "fp32"))
for stop in (3, 5, 8):
    train("resumed", configured("4x2", "fp32"), stop)
train("resumed", configured("4x2", "fp32"))
train("moved", configured("4x2", "fp32"), 5)
train("moved", configured("one", "fp32"))
for way in ("int8", "packed"):
    train(way, configured("8x1", "ternary", **{"matmul.wire": way}))
wires = {}
for arm, way in (("bf16", "int8"), ("ternary", "int8"), ("ternary", "packed")):
    wider = {"matmul.wire": way, "model.width": 32, "model.ff_width": 64}
    spec = resolve(configured("8x1", arm, **wider), corpus)
    wires[arm + " " + way] = wire.collectives(wire.compiled_step(spec.step, 8, 16))
(workdir / "found.json").write_text(json.dumps({"parts": parts, "wires": wires}))
"""


@pytest.fixture(scope="module")
def workdir(tiny_overrides, tmp_path_factory):
    """What a process with eight devices has left behind."""
    directory = tmp_path_factory.mktemp("mesh")
    arguments = [{**tiny_overrides, **SHORT}, str(directory), MESHES, STEPS]
    texts = [a if isinstance(a, str) else json.dumps(a) for a in arguments]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"]}
    environment = {**os.environ, **cache, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SCRIPT, *texts]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def found(workdir, key):
    return json.loads((workdir / "found.json").read_text())[key]


def losses(workdir, name):
    """Of the log: the training's and the held-out ones."""
    lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return np.array([row[key] for row in rows for key in ("loss", "valid_loss") if key in row])


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "arm"), STEPS)
def test_a_step_is_that_of_one_device(workdir, mesh, arm):
    """The same parameters and codes to the bit, the loss within 1e-5, and gradients (Adam's first
    moment after one step) to the rounding of the arm's products."""
    one, cut = (dict(np.load(workdir / f"{name}-{arm}.npz")) for name in ("one", mesh))
    assert one.keys() == cut.keys()
    assert sum(key.startswith("gradient/") for key in one) == 13
    exact = [key for key in one if key.startswith(("init/", "codes/"))]
    assert sum(key.startswith("codes/") for key in exact) == (7 if arm == "ternary" else 0)
    for key in exact:
        np.testing.assert_array_equal(one[key], cut[key], err_msg=key)
    np.testing.assert_allclose(cut["loss"], one["loss"], rtol=0, atol=1e-5)
    rounding = 1e-5 if arm == "fp32" else 2e-2
    for key in one:
        if key.startswith("gradient/"):
            size = np.abs(one[key]).max()
            np.testing.assert_allclose(
                cut[key], one[key], rtol=0, atol=rounding * size, err_msg=key
            )


@pytest.mark.slow
def test_a_device_holds_its_part_of_kernels_and_moments(workdir):
    assert found(workdir, "parts") == [
        [1 / (data * tensor)] for data, tensor in (MESHES[m] for m, _ in STEPS)
    ]


@pytest.mark.slow
def test_a_float32_run_is_that_of_one_device(workdir):
    """To 1e-5 in every logged and every held-out loss; its summary says how it was cut."""
    one, cut = (losses(workdir, f"fp32-{name}") for name in ("one", "4x2"))
    assert len(one) > 4
    np.testing.assert_allclose(cut, one, rtol=0, atol=1e-5)
    one, cut = (
        json.loads((workdir / f"fp32-{n}" / "summary.json").read_text()) for n in ("one", "4x2")
    )
    assert one["run_id"] == cut["run_id"]
    assert cut["device"] == one["device"] + ", mesh data=4 tensor=2"
    assert [row["device"] for row in cut["endpoints"]] == [cut["device"]] * 2


@pytest.mark.slow
def test_a_run_on_a_mesh_is_resumed_to_the_bit(workdir):
    resumed, undisturbed = (workdir / name / "metrics.jsonl" for name in ("resumed", "fp32-4x2"))
    assert resumed.read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_of_a_mesh_goes_on_on_one_device(workdir):
    """Told: its provenance has both."""
    np.testing.assert_allclose(losses(workdir, "moved"), losses(workdir, "fp32-one"), atol=1e-5)
    device = json.loads((workdir / "moved" / "summary.json").read_text())["device"]
    assert device.count(" + ") == 1 and device.count("mesh data=4 tensor=2") == 1


@pytest.mark.slow
def test_both_wires_give_the_same_bits(workdir):
    logs = [(workdir / wire / "metrics.jsonl").read_bytes() for wire in ("int8", "packed")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) > 4


@pytest.mark.slow
def test_codes_travel_and_nothing_else(workdir):
    """Of a block: seven kernels, forward and again backward, in 16 bits, in 8, and in 2. Beside
    them only sums: no row of activations moves from device to device."""
    kernels = 4 * 32 * 32 + 3 * 32 * 64
    wires = {
        name: [wire.Collective(*c) for c in cs] for name, cs in found(workdir, "wires").items()
    }
    for name, size, dtype in (("bf16 int8", 2, "u16"), ("ternary int8", 1, "s8"),
                              ("ternary packed", 1 / 4, "u8")):  # fmt: skip
        gathers = [c for c in wires[name] if c.kind == "all-gather" and c.in_block]
        assert len(gathers) == 14 and {kind for c in gathers for kind in c.dtypes} == {dtype}
        assert sum(c.bytes for c in gathers) == 2 * size * kernels
        assert {c.kind for c in wires[name]} == {"all-gather", "all-reduce"}
        sums = sum(c.bytes for c in wires[name] if c.kind == "all-reduce" and c.in_block)
        assert 4 * kernels <= sums <= 1.1 * 4 * kernels


def test_collectives_of_a_program():
    text = """
      %all-gather.1 = s8[1,64,16]{2,0,1} all-gather(%x), metadata={"while/body/while/body/a"}
      %g.1 = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%y), metadata={"while/body/b"}
      %all-reduce.2 = (f32[64]{0}, f32[], /*index=2*/f32[2,3]{1,0}) all-reduce(%a, %b, %c)
      %fusion = f32[8]{0} fusion(%all-reduce.2)
    """
    assert wire.collectives(text) == [
        ("all-gather", ("s8",), 1024, True),
        ("all-gather", ("bf16",), 512, False),
        ("all-reduce", ("f32", "f32", "f32"), 4 * (64 + 1 + 6), False),
    ]


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        (MeshShape(0, 1), "mesh.data=0: it must be at least 1"),
        (MeshShape(1, -1), "mesh.tensor=-1: it must be at least 1"),
        (MeshShape(3, 1), "mesh.data=3: it must divide the 8 rows of a microbatch"),
        (MeshShape(4, 1), "mesh.data=4: it must divide model.width=6"),
        (MeshShape(1, 4), "mesh.tensor=4: it must divide model.kv_heads=2"),
        (MeshShape(1, 2), "mesh.tensor=2: it must divide model.ff_width=9"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_divide_what_it_cuts(mesh, names):
    with pytest.raises(ConfigError, match="^" + names.replace(".", "[.]")) as error:
        sharding.check(mesh, {"width": 6, "ff_width": 9, "kv_heads": 2}, 8)
    assert "\n" not in str(error.value)


def test_a_mesh_of_devices_that_are_not_there(tiny_overrides, tmp_path, capsys):
    """The plan can be shown, for a machine that has them."""
    few = {**tiny_overrides, "mesh.data": 8}
    flags = [f"--config.{key}={value}" for key, value in few.items() if key != "name"]
    assert main(["run", *flags, f"--workdir={tmp_path}", "--dry_run"]) == 0
    capsys.readouterr()
    assert main(["run", *flags, f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err == "error: mesh.data * mesh.tensor=8: there are 1 devices\n"
    assert not list(tmp_path.glob("single/runs/*"))


def test_a_mesh_is_not_part_of_what_a_run_is(tiny_config, tiny_corpus):
    """Neither of its id nor of its name; of its program it is."""
    plain = resolve(tiny_config({"model.kv_heads": 2}), tiny_corpus)
    cut = resolve(tiny_config({"model.kv_heads": 2, "mesh.data": 4, "mesh.tensor": 2}), tiny_corpus)
    assert plain.run_id == cut.run_id and plain.group != cut.group
