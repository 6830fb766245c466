"""From config to run: what is derived, and the one line that each mistake gets."""

import dataclasses
import re

import pytest

from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import SHAPE_KEYS, group_size, loop_options, parallel, resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.optim import OptimizerConfig, Schedule, tuned_peak_lr
from bitnet_jax.phases import Phases
from bitnet_jax.precision import PRECISIONS, get_precision

INF, NAN = float("inf"), float("nan")

# Overrides, the key that the message names, and a part of what it says would be right.
BAD = [
    ({"precision": "fp17"}, "precision='fp17'", "choose from ternary, binary, fp16, bf16, fp32"),
    ({"matmul.carrier": "int4"}, "matmul.carrier='int4'", "auto, bfloat16, int8"),
    ({"model.size": "5k"}, "model.size='5k'", "choose from 27k"),
    ({"model.width": 18, "model.heads": 4}, "model.width=18", "divide by model.heads=4"),
    ({"model.width": 6}, "model.width=6", "must be even"),
    ({"model.heads": 4, "model.kv_heads": 3}, "model.kv_heads=3", "divide model.heads=4"),
    ({"model.kv_heads": 4}, "model.kv_heads=4", "divide model.heads=2"),
    *(({f"model.{k}": 0}, f"model.{k}=0", "at least 1") for k in ("layers", "width", "ff_width")),
    *(({f"model.{k}": 0}, f"model.{k}=0", "at least 1") for k in ("heads", "kv_heads")),
    ({"model.layers": -1}, "model.layers=-1", "at least 1"),
    ({"model.activation": "tanh"}, "model.activation='tanh'", "relu2, silu, gelu"),
    ({"model.norms": "post"}, "model.norms='post'", "sub, pre, inside"),
    ({"model.init": "zero"}, "model.init='zero'", "fan_in, flax, nanotron, subln, quantizer"),
    ({"model.norm_epsilon": 0.0}, "model.norm_epsilon=0.0", "positive"),
    ({"model.rope_theta": 1.0}, "model.rope_theta=1.0", "above 1"),
    ({"data.sequence_length": 1}, "data.sequence_length=1", "at least 2"),
    ({"data.sequence_length": 30_000, "train.batch_tokens": 30_000, "train.tokens": (60_000,)},
     "data.sequence_length=30000", "train split of corpus has only"),
    ({"data.sequence_length": 4096, "train.batch_tokens": 4096, "train.tokens": (8192,)},
     "data.sequence_length=4096", "valid split of corpus has only"),
    ({"train.batch_tokens": 100}, "train.batch_tokens=100", "multiple of data.sequence_length=16"),
    ({"train.batch_tokens": 0}, "train.batch_tokens=0", "multiple of data.sequence_length=16"),
    ({"train.microbatches": 3}, "train.microbatches=3", "divide the batch of 8 sequences"),
    ({"train.microbatches": 0}, "train.microbatches=0", "divide the batch of 8 sequences"),
    ({"train.tokens": ()}, "train.tokens=()", "positive whole numbers"),
    ({"train.tokens": (0, 2560)}, "train.tokens=(0, 2560)", "positive whole numbers"),
    ({"train.tokens": (-5,)}, "train.tokens=(-5,)", "positive whole numbers"),
    ({"train.tokens": (1.5,)}, "train.tokens=(1.5,)", "positive whole numbers"),
    ({"train.tokens": (INF,)}, "train.tokens=(inf,)", "positive whole numbers"),
    ({"train.tokens": (NAN,)}, "train.tokens=(nan,)", "positive whole numbers"),
    ({"train.tokens": ("2560",)}, "train.tokens=('2560',)", "positive whole numbers"),
    ({"train.tokens": (5120, 2560)}, "train.tokens=(5120, 2560)", "increasing"),
    ({"train.tokens": (2560, 2560)}, "train.tokens=(2560, 2560)", "increasing"),
    ({"train.tokens": (2560, 2570)}, "train.tokens=(2560, 2570)", "further batch of 128"),
    ({"train.tokens": (50,)}, "train.tokens=(50,)", "further batch of 128"),
    ({"schedule.name": "linear"}, "schedule.name='linear'", "wsd, cosine, two_stage, trilm"),
    ({"schedule.name": "cosine"}, "train.tokens=(2560, 5120)", "one budget"),
    ({"schedule.name": "two_stage"}, "train.tokens=(2560, 5120)", "one budget"),
    ({"schedule.name": "trilm"}, "train.tokens=(2560, 5120)", "one budget"),
    *(({"schedule.second_peak": v}, f"schedule.second_peak={v}", "(0, 1]")
      for v in (0.0, 1.5, NAN)),
    ({"schedule.warmup_fraction": 1.0}, "schedule.warmup_fraction=1.0", "[0, 1)"),
    ({"schedule.warmup_fraction": -0.1}, "schedule.warmup_fraction=-0.1", "[0, 1)"),
    ({"schedule.warmup_fraction": 0.9}, "schedule.warmup_fraction=0.9", "before the first decay"),
    ({"schedule.decay_fraction": 0.0}, "schedule.decay_fraction=0.0", "(0, 1]"),
    ({"schedule.decay_fraction": 1.1}, "schedule.decay_fraction=1.1", "(0, 1]"),
    ({"schedule.final_ratio": -1.0}, "schedule.final_ratio=-1.0", "[0, 1]"),
    ({"schedule.final_ratio": 2.0}, "schedule.final_ratio=2.0", "[0, 1]"),
    ({"optim.name": "sgd"}, "optim.name='sgd'", "adamw, lion, muon, bop"),
    ({"optim.latents": "float16"}, "optim.latents='float16'",
     "float32, bfloat16, bfloat16_stochastic"),
    *(({"optim.latent_clip": v}, f"optim.latent_clip={v}", "0 for none, or 0.01 to 1000")
      for v in (-1.0, NAN)),
    ({"optim.b1": 1.0}, "optim.b1=1.0", "[0, 1)"),
    ({"optim.b2": -0.5}, "optim.b2=-0.5", "[0, 1)"),
    *(({f"optim.{k}": v}, f"optim.{k}={v}", "positive")
      for k in ("peak_lr", "epsilon", "clip_norm", "bop_ratio", "bop_threshold")
      for v in (0.0, -1.0, NAN)),
    *(({key: v}, f"{key}={v}", "must not be negative")
      for key in ("optim.weight_decay", "loss.z_loss") for v in (-0.1, NAN)),
    *(({k: INF}, f"{k}=inf", "finite")
      for k in ("optim.peak_lr", "model.rope_theta", "quantization.steepness",
                "loss.regularizer_weight", "optim.latent_clip")),
    ({"seed": -1}, "seeds.init=-1", "[0, 2^31)"),
    ({"seeds.data": 2**31}, f"seeds.data={2**31}", "[0, 2^31)"),
    ({"eval.tokens": 5}, "eval.tokens=5", "at least data.sequence_length=16"),
    ({"eval.tokens": -16}, "eval.tokens=-16", "at least data.sequence_length=16"),
    ({"log.every": 0}, "log.every=0", "at least 1"),
    ({"log.gradient_sample": -1}, "log.gradient_sample=-1", "0 for none, or 2 to 4096"),
    ({"eval.every": -1}, "eval.every=-1", "must not be negative"),
    ({"checkpoint.seconds": -1.0}, "checkpoint.seconds=-1.0", "must not be negative"),
    ({"tracking.wandb": "yes"}, "tracking.wandb='yes'", "online, offline, disabled"),
    *(({f"launch.{k}": v}, f"launch.{k}={v}", "at least 1")
      for k in ("group", "dispatch", "parallel") for v in (0, -2)),
    ({"launch.resident_bytes": -1}, "launch.resident_bytes=-1", "must not be negative"),
    ({"model.attention": "flash"}, "model.attention='flash'", "choose from blocks, cudnn"),
    *(({"model.attention": "cudnn", **more}, "model.attention='cudnn'",
       "NVIDIA GPU, a 16-bit arm and heads of up to 128 in multiples of 8")
      for more in ({}, {"precision": "bf16"})),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "right"), BAD, ids=lambda value: str(value)[:60])
def test_mistakes(tiny_config, tiny_corpus, overrides, key, right):
    config = tiny_config(overrides)
    with pytest.raises(ConfigError) as error:
        resolve(config, tiny_corpus)
        loop_options(config)
        group_size(config)
    message = str(error.value)
    assert message.startswith(key) and right in message[len(key) :]
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_split_shorter_than_a_row(tiny_config, tiny_corpus, split):
    """A row of T inputs takes T + 1 tokens: 16 are too few, 17 are enough."""
    tokens = getattr(tiny_corpus, split)
    for size, enough in ((0, False), (16, False), (17, True)):
        corpus = dataclasses.replace(tiny_corpus, **{split: tokens[:size]})
        if enough:
            resolve(tiny_config(), corpus)
            continue
        with pytest.raises(ConfigError, match=f"{split} split of corpus has only {size} tokens"):
            resolve(tiny_config(), corpus)


def test_defaults_resolve(tiny_corpus):
    """The default config is a run, of the shape that its comments say."""
    config = default.get_config()
    spec = resolve(config, tiny_corpus)
    loop_options(config)
    assert (spec.size, spec.step.precision) == ("330k", PRECISIONS["ternary"])
    assert (spec.step.optimizer, spec.phases) == (OptimizerConfig(), Phases())
    assert (spec.step.regularizer, spec.step.microbatches, spec.step.warming) == ("none", 1, False)
    assert spec.tags == ()
    assert (spec.step.model.layers, spec.step.model.width) == (3, 96)
    assert spec.step.model.vocab_size == tiny_corpus.vocab_size
    assert spec.ends == (round(1_000_000 / config.train.batch_tokens),)


def test_every_default_is_explained():
    """Every key of the default config has a comment on its own line, the next, or its group's."""
    lines = open(default.__file__).read().splitlines()
    keys = [line for line in lines if re.match(r"    c\.[\w.]+ = ", line)]
    bare = [k for k in keys if "#" not in k and "ConfigDict()" not in k and not k.endswith("(")]
    shape = [f"c.model.{key}" for key in SHAPE_KEYS]  # "the five below"
    grouped = ["c.optim.b1", "c.optim.b2", "c.optim.epsilon", *shape]
    assert [k for k in bare if k.split()[0] not in grouped] == []
    assert len(keys) > 60


def test_derived_values(tiny_config, tiny_corpus):
    spec = resolve(tiny_config({"optim.peak_lr": None, "seed": 4, "seeds.data": 9}), tiny_corpus)
    assert (spec.seed_init, spec.seed_data) == (4, 9)
    # Width 16, 2 heads and 1 key-value head of 8: q and out 16x16, k and v 16x8; three of 16x32;
    # norms of 16, 16, 16, 32 and the last of 16.
    parameters = 2 * 256 + 2 * 128 + 3 * 512 + 4 * 16 + 32
    assert spec.peak_lr == tuned_peak_lr(PRECISIONS["fp32"], parameters)
    assert spec.batch_size == 8 and spec.ends == (20, 40)
    assert spec.schedule.warmup_steps == 2, "a tenth of the smallest budget"
    ternary = resolve(tiny_config({"optim.peak_lr": None, "precision": "ternary"}), tiny_corpus)
    assert ternary.peak_lr == tuned_peak_lr(get_precision("ternary"), parameters)
    assert ternary.peak_lr > spec.peak_lr


def test_overrides_of_the_shape(tiny_config, tiny_corpus):
    model = resolve(tiny_config(), tiny_corpus).step.model
    assert (model.layers, model.width, model.ff_width) == (1, 16, 32)
    assert (model.heads, model.kv_heads, model.vocab_size) == (2, 1, 256)
    shape = {"activation": "silu", "gated": False, "norms": "inside", "init": "subln"}
    other = tiny_config({f"model.{key}": value for key, value in shape.items()})
    model = resolve(other, tiny_corpus).step.model
    assert {key: getattr(model, key) for key in shape} == shape
    default_model = resolve(default.get_config(), tiny_corpus).step.model
    assert {key: getattr(default_model, key) for key in shape} == {
        "activation": "relu2", "gated": True, "norms": "sub", "init": "fan_in",
    }  # fmt: skip


def test_optimizer_and_losses_reach_the_step(tiny_config, tiny_corpus):
    """Each key to the field of its name, and to no other."""
    optim = {
        "name": "lion", "b1": 0.8, "b2": 0.99, "epsilon": 1e-7, "clip_norm": 2.0,
        "latents": "bfloat16_stochastic", "latent_clip": 1.5, "bop_ratio": 0.3,
        "bop_threshold": 1e-4,
    }  # fmt: skip
    loss = {"z_loss": 1e-3, "regularizer": "dampening", "regularizer_weight": -2.0}
    overrides = {f"optim.{key}": value for key, value in optim.items()}
    overrides |= {f"loss.{key}": value for key, value in loss.items()}
    overrides |= {"precision": "ternary", "train.microbatches": 4}
    step = resolve(tiny_config(overrides), tiny_corpus).step
    assert dataclasses.asdict(step.optimizer) == optim
    assert {key: getattr(step, key) for key in loss} == loss
    assert step.microbatches == 4


def test_schedule_of_the_config(tiny_config, tiny_corpus):
    keys = {"name": "trilm", "warmup_fraction": 0.25, "final_ratio": 0.1, "second_peak": 0.625}
    overrides = {f"schedule.{key}": value for key, value in keys.items()}
    spec = resolve(tiny_config({**overrides, "train.tokens": (5120,)}), tiny_corpus)
    assert spec.schedule == Schedule("trilm", 10, 0.2, 0.1, 0.625)


def test_tags_are_words_in_order(tiny_config, tiny_corpus):
    config = tiny_config()
    config.tags.kind, config.tags.base, config.tags.number = "with", "full", 3
    spec = resolve(config, tiny_corpus)
    assert spec.tags == (("base", "full"), ("kind", "with"), ("number", "3"))


def test_budgets_round_to_whole_batches(tiny_config, tiny_corpus):
    assert resolve(tiny_config({"train.tokens": (2500, 1e4)}), tiny_corpus).ends == (20, 78)


def test_loop_options(tiny_config):
    overrides = {"eval.every": 3, "checkpoint.seconds": 0.0, "tracking.wandb": "offline"}
    options = loop_options(tiny_config(overrides))
    assert (options.log_every, options.eval_every, options.checkpoint_seconds) == (7, 3, 0.0)
    assert (options.wandb_mode, options.wandb_project) == ("offline", "bitnet_jax")
    assert (options.log_layers, options.gradient_sample, options.keep_model) == (True, 0, True)
    other = {"log.layers": False, "log.gradient_sample": 5, "checkpoint.keep_model": False}
    options = loop_options(tiny_config(other))
    assert (options.log_layers, options.gradient_sample, options.keep_model) == (False, 5, False)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_how_runs_are_laid_on_the_machine(tiny_config, monkeypatch, backend, devices):
    """Where nothing is said: one run and one step on a CPU, elsewhere 8 a device and 16."""
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    monkeypatch.setattr("jax.device_count", lambda: devices)
    plain, options = tiny_config(), loop_options(tiny_config())
    expected = (1, 1) if backend == "cpu" else (8 * devices, 16)
    assert (group_size(plain), options.dispatch) == expected
    said = tiny_config({f"launch.{k}": 3 for k in ("group", "dispatch", "resident_bytes")})
    options = loop_options(said)
    assert (group_size(said), options.dispatch, options.resident_bytes) == (3, 3, 3)


@pytest.mark.parametrize(
    "backend, cores, programs",
    [("cpu", 1, 1), ("cpu", 2, 2), ("cpu", 64, 2), ("cpu", None, 1), ("gpu", 64, 1)],
)
def test_programs_that_train_side_by_side(
    tiny_config, tiny_corpus, monkeypatch, backend, cores, programs
):
    """Where nothing is said: two on the cores of a CPU that are the process's, one elsewhere. It is
    no part of a run."""
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    if cores is None:  # as on a Mac
        monkeypatch.delattr("os.sched_getaffinity", raising=False)
    else:
        bound = set(range(cores))
        monkeypatch.setattr("os.sched_getaffinity", lambda process: bound, raising=False)
        monkeypatch.setattr("os.cpu_count", lambda: 128)
    plain, said = tiny_config(), tiny_config({"launch.parallel": 3})
    assert parallel(plain) == loop_options(plain).parallel == programs
    assert parallel(said) == loop_options(said).parallel == 3
    assert resolve(said, tiny_corpus).run_id == resolve(plain, tiny_corpus).run_id


@pytest.mark.parametrize(
    "arm, width, good",
    [("ternary", 16, True), ("bf16", 256, True), ("fp16", 16, True), ("bf16", 272, False),
     ("bf16", 24, False), ("fp32", 16, False)],
)  # fmt: skip
def test_the_flash_kernel_where_it_runs(tiny_config, tiny_corpus, monkeypatch, arm, width, good):
    """On a GPU, with 16 bits, and heads of up to 128 in multiples of 8: here two of width/2."""
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    flash = tiny_config({"model.attention": "cudnn", "model.width": width, "precision": arm})
    if not good:
        with pytest.raises(ConfigError, match=r"^model.attention='cudnn': .* multiples of 8"):
            resolve(flash, tiny_corpus)
        return
    spec = resolve(flash, tiny_corpus)
    assert spec.step.model.attention == "cudnn"
    flash.model.attention = "blocks"
    assert resolve(flash, tiny_corpus).run_id == spec.run_id, "it changes a run by rounding alone"
