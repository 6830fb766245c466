"""Published recipes: each resolves, and is what its source says."""

import dataclasses

import jax
import pytest

from bitnet_jax.configs import default, presets
from bitnet_jax.configs.presets import PRESETS, get_config
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.train_step import init_state
from experiments.run import main

# What the sources say: weights, activations, where norms stand, the MLP, schedule.
RECIPES = {
    "bitnet_b158": ("ternary_absmean", "int8_absmax", "inside", "silu", True, "two_stage"),
    "bitnet_2b4t": ("ternary_absmean", "int8_absmax", "sub", "relu2", True, "two_stage"),
    "bitnet_1bitllm": ("ternary_absmean", "int8_absmax", "sub", "silu", True, "two_stage"),
    "bitnet_b1": ("binary", "int8_absmax", "inside", "gelu", False, "wsd"),
    "trilm": ("ternary_absmean_trilm", "none", "pre", "silu", True, "trilm"),
    "bitnet_a48": ("ternary_absmean", "int8_absmax", "sub", "relu2", True, "two_stage"),
    "blog_bitnet15": ("ternary_absmean", "int8_absmax", "inside", "silu", True, "cosine"),
    "blog_llama": ("none", "none", "pre", "silu", True, "cosine"),
}
END = 20  # steps: warm-up takes 2 of them


@pytest.fixture(scope="module")
def tiny(tiny_overrides):
    """A preset's config at the tiny size, one budget. Its arm and rate stay the preset's."""
    own = {"name", "precision", "optim.peak_lr"}
    sizes = {key: value for key, value in tiny_overrides.items() if key not in own}

    def make(name, **overrides):
        config = get_config(name)
        config.update_from_flattened_dict({**sizes, "train.tokens": (END * 128,), **overrides})
        return config

    return make


@pytest.fixture(scope="module")
def resolved(tiny, tiny_corpus):
    return {name: resolve(tiny(name), tiny_corpus) for name in PRESETS}


def factors(spec):
    """(learning rate, weight decay) of every step, as multiples of their peaks."""
    decay_start = spec.schedule.decay_start(END)
    return [
        spec.schedule.factors(step, (decay_start, END) if step >= decay_start else None)
        for step in range(END)
    ]


def test_all_of_them():
    assert set(PRESETS) == set(RECIPES)
    assert all(preset.__doc__ for preset in PRESETS.values())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(resolved, name):
    spec = resolved[name]
    arm, model = spec.step.precision, spec.step.model
    assert RECIPES[name] == (
        arm.weights, arm.activations, model.norms, model.activation, model.gated,
        spec.schedule.name,
    )  # fmt: skip
    assert arm.granularity.kind == "tensor" and arm.estimator == "identity" and not arm.rotate
    assert spec.phases.warmup == "none"
    assert spec.optimizer.name == "adamw" and spec.optimizer.latents == "float32"
    assert spec.step.z_loss == 0 and spec.step.regularizer == "none"


@pytest.mark.parametrize("name", RECIPES)
def test_where_the_norms_are(resolved, name):
    """In the tree of parameters itself; and a gate, where the MLP has one."""
    params = jax.eval_shape(lambda: init_state(resolved[name].step, 0).params)
    blocks = params["blocks"]
    norms = resolved[name].step.model.norms
    linear = {key for group in ("attention", "mlp") for key in blocks[group]} - {"sub_norm"}
    assert linear == {"q", "k", "v", "out", "up", "down"} | ({"gate"} & set(blocks["mlp"]))
    assert ("gate" in blocks["mlp"]) == (name != "bitnet_b1")
    for group in ("attention", "mlp"):
        assert (f"{group}_norm" in blocks) == (norms in ("pre", "sub"))
        assert ("sub_norm" in blocks[group]) == (norms == "sub")
        for key in linear & set(blocks[group]):
            assert ("norm" in blocks[group][key]) == (norms == "inside")
    assert "final_norm" in params


@pytest.mark.parametrize("name", RECIPES)
def test_the_rest_is_the_users(name):
    """Sizes, corpus, budgets, warm-up, seeds and evaluation are the default's."""
    config, plain = get_config(name), default.get_config()
    assert config.name == name
    for section in ("data", "train", "eval", "log", "checkpoint", "seeds", "loss", "matmul"):
        assert config[section].to_dict() == plain[section].to_dict()
    for key in ("size", "layers", "width", "ff_width", "heads", "kv_heads"):
        assert config.model[key] == plain.model[key]
    assert config.schedule.warmup_fraction == plain.schedule.warmup_fraction
    if not name.startswith("blog"):
        assert config.optim.peak_lr is None
    changed = {key for key, value in PRESETS[name]().items()}
    for key in changed:  # of a key that exists
        section, _, last = key.rpartition(".")
        assert last in (plain[section] if section else plain)


@pytest.mark.parametrize("name", ["bitnet_b158", "bitnet_2b4t", "bitnet_a48", "trilm"])
def test_two_stages(resolved, name):
    """Half way the peak rate drops; weight decay ends there, or at TriLM's two thirds."""
    rates, decays = zip(*factors(resolved[name]), strict=True)
    second = 1.5 / 2.4 if name == "trilm" else 2 / 3
    # Linear from step 2 to 20.
    assert rates[9] == pytest.approx(1 - 7 / 18)
    assert rates[10] == pytest.approx(second * (1 - 8 / 18))
    ends = 14 if name == "trilm" else 10
    assert decays == (1,) * ends + (0,) * (END - ends)
    assert resolved[name].weight_decay == 0.1


def test_b1(resolved):
    """Linear decay right after the warm-up, SubLN's initialisation, the paper's optimizer."""
    spec = resolved["bitnet_b1"]
    rates, decays = zip(*factors(spec), strict=True)
    assert rates == pytest.approx([1 / 2, 1, 1, *(1 - i / 17 for i in range(17))])
    assert set(decays) == {1} and spec.weight_decay == 0.01
    assert spec.step.model.init == "subln" and spec.optimizer.b2 == 0.98


def test_a48_is_2b4t_with_late_activations(resolved):
    late, base = resolved["bitnet_a48"], resolved["bitnet_2b4t"]
    assert base.phases.late is None
    assert late.phases.late.activations == "int4_absmean"
    assert late.deployed.precision.activations == "int4_absmean"
    assert late.phases.late_start(1000) == 950, "the last 5 %"

    def unnamed(arm):
        return dataclasses.replace(arm, name="", activations="")

    assert unnamed(late.phases.late) == unnamed(late.step.precision)
    assert unnamed(late.step.precision) == unnamed(base.step.precision)
    assert dataclasses.replace(late.step, precision=base.step.precision) == base.step
    assert (late.schedule, late.weight_decay) == (base.schedule, base.weight_decay)


def test_the_others_have_no_late_phase(resolved):
    assert {name for name, spec in resolved.items() if spec.phases.late} == {"bitnet_a48"}


def test_the_blogs_two(resolved):
    """One rate for both; they differ in precision and norms only."""
    bitnet, llama = resolved["blog_bitnet15"], resolved["blog_llama"]
    assert bitnet.peak_lr == llama.peak_lr == 5e-4
    assert llama.step.precision.name == "bf16" and bitnet.step.precision.name == "ternary"
    model = dataclasses.replace(llama.step.model, norms="inside")
    step = dataclasses.replace(llama.step, model=model, precision=bitnet.step.precision)
    assert dataclasses.replace(llama, step=step) == bitnet
    rates = [rate for rate, _ in factors(llama)]
    assert rates[11] == pytest.approx(0.5), "half way down its cosine"


def test_trilm_in_shards(tiny, tiny_corpus):
    """The docstring's way to TriLM's own scales."""
    shards = {"quantization.granularity": "shard", "quantization.granularity_size": 2}
    arm = resolve(tiny("trilm", **shards), tiny_corpus).step.precision
    assert (arm.weights, arm.granularity.kind, arm.granularity.size) == (
        "ternary_absmean_trilm", "shard", 2,
    )  # fmt: skip


def test_presets_are_not_shared():
    """Whoever changes one preset's keys does not change another's, or the next call's."""
    first = PRESETS["blog_llama"]()
    first["model.norms"] = "sub"
    assert PRESETS["blog_llama"]()["model.norms"] == presets.LLAMA["model.norms"] == "pre"


@pytest.mark.parametrize("name", ["bitnet_b2", "", None, "Trilm"])
def test_unknown_preset(name):
    with pytest.raises(ConfigError) as caught:
        get_config(name)
    message = str(caught.value)
    assert f"preset {name!r} is unknown" in message and "\n" not in message
    assert all(known in message for known in PRESETS)


def test_as_a_config_file(tiny_overrides, tmp_path, capsys):
    """A preset plans from the main command; an unknown one is status 2 and a line."""
    file = presets.__file__
    sizes = [
        f"--config.{key}={value}"
        for key, value in {**tiny_overrides, "train.tokens": (END * 128,)}.items()
        if key not in ("name", "precision", "optim.peak_lr")
    ]
    where = f"--workdir={tmp_path / 'w'}"
    assert main(["run", f"--config={file}:blog_bitnet15", *sizes, where, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "blog_bitnet15: 1 runs" in out and " ternary " in out and " 0.0005 " in out
    assert main(["run", f"--config={file}:nothing", *sizes, where, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "'nothing' is unknown" in error and "trilm" in error and error.count("\n") == 1
