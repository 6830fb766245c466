"""A run's identity: what can change a result is in it, and nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax.configs.resolve import resolve

SAME = [
    {"log.every": 3},
    {"eval.every": 5},
    {"log.layers": False},
    {"log.gradient_sample": 4},
    {"checkpoint.seconds": 0.5},
    {"checkpoint.keep_model": False},
    {"tracking.wandb": "online"},
    {"tracking.project": "other"},
    {"launch.group": 8},
    {"launch.parallel": 3},
    {"launch.dispatch": 4},
    {"launch.resident_bytes": 0},
    {"launch.failures": 9},
    {"launch.device_memory_gb": 80.0},
    {"slurm.workers": 2, "slurm.minutes": 5, "slurm.partition": "p", "slurm.account": "a"},
    {"slurm.processes": 2, "slurm.nodes": 2, "slurm.gpus": 1, "slurm.cpus": 3},
    {"slurm.memory": "1G", "slurm.mixed_code": True},
    {"k8s.workers": 2, "k8s.image": "x:1", "k8s.claim": "c", "k8s.gpus": 1, "k8s.mount": "/r"},
    {"k8s.tpu_accelerator": "tpu7x", "k8s.tpu_topology": "2x2x1", "k8s.cpus": 3, "k8s.grace": 9},
    {"k8s.namespace": "n", "k8s.queue": "q", "k8s.service_account": "s", "k8s.memory": "1Gi"},
    {"k8s.node_selector": "a=b", "k8s.crashes": 0, "k8s.mixed_code": True, "k8s.hosts": 2},
    {"k8s.secret": "s"},
    {"name": "other"},
    {"seeds.init": 0},  # what it is without being said
    {"seeds.init": 0, "seeds.data": 0, "seed": 7},
    {"train.tokens": (2600, 5100)},  # the same whole batches
    {"matmul.carrier": "int8"},  # equal to bfloat16's, bit for bit: test_train
    {"precision": "fp32", "matmul.wire": "packed"},  # equal to int8's, bit for bit: test_mesh
    {"precision": "fp32", "quantization.granularity": "tensor"},  # what it is without being said
    {"quantization.estimator": "identity", "quantization.rotate": False},
]
# Keys that the default config does not have.
NEW = [{"sweep.anything": 3}, {"tags.base": "full", "tags.change": "none"}]
T = {"precision": "ternary"}
DIFFERENT = [
    {"seed": 1},
    {"seeds.init": 1},
    {"seeds.data": 1},
    {"precision": "ternary"},
    {"model.size": "56k"},
    {"model.layers": 2},
    {"model.width": 32},
    {"model.ff_width": 64},
    {"model.kv_heads": 2},
    {"model.activation": "silu"},
    {"model.gated": False},
    {"model.norms": "pre"},
    {"model.norms": "inside"},
    {"model.init": "flax"},
    {"model.tied_embeddings": False},
    {"model.rope_theta": 10_000.0},
    {"model.norm_epsilon": 1e-6},
    {"model.remat": True},
    {"data.sequence_length": 32},
    {"train.tokens": (2560,)},
    {"train.tokens": (2560, 6400)},
    {"train.batch_tokens": 256},
    {"train.microbatches": 2},
    {"train.rollbacks": 0},
    {"schedule.name": "cosine", "train.tokens": (5120,)},
    {"schedule.warmup_fraction": 0.2},
    {"schedule.decay_fraction": 0.3},
    {"schedule.final_ratio": 0.1},
    {"schedule.second_peak": 0.5},
    {"schedule.name": "trilm", "train.tokens": (5120,)},
    {"optim.peak_lr": 0.010001},
    {"optim.weight_decay": 0.0},
    {"optim.b1": 0.8},
    {"optim.b2": 0.9},
    {"optim.epsilon": 1e-6},
    {"optim.clip_norm": 2.0},
    *({"optim.name": name} for name in ("lion", "muon")),
    *({"optim.latents": latents} for latents in ("bfloat16", "bfloat16_stochastic")),
    {"optim.latent_clip": 2.0},
    {"optim.bop_ratio": 0.3},
    {"optim.bop_threshold": 1e-6},
    {"loss.z_loss": 1e-4},
    {"eval.tokens": 0},
    {"precision": "binary"},
    {"quantization.weights": "ternary_absmean"},
    {"quantization.activations": "int8_absmax"},
    {**T, "quantization.weights": "ternary_twn"},
    {**T, "quantization.activations": "none"},
    {**T, "quantization.granularity": "channel"},
    *({**T, "quantization.granularity": kind, "quantization.granularity_size": size}
      for kind in ("group", "shard") for size in (2, 4)),
    {**T, "quantization.estimator": "trust"},
    {**T, "quantization.activation_estimator": "trust"},
    {**T, "quantization.rotate": True},
    *({**T, "quantization.warmup": name} for name in ("linear", "sigmoid")),
    {**T, "quantization.warmup": "linear", "quantization.warmup_fraction": 0.5},
    {**T, "quantization.warmup": "sigmoid", "quantization.steepness": 4.0},
    {**T, "quantization.late_activations": "int4_absmean"},
    {**T, "quantization.late_activations": "int4_absmax"},
    {**T, "quantization.late_activations": "int4_absmean", "quantization.late_fraction": 0.1},
    *({**T, "loss.regularizer": "sin2", "loss.regularizer_weight": w} for w in (1.0, -1.0)),
    {**T, "loss.regularizer": "dampening", "loss.regularizer_weight": 1.0},
    {**T, "optim.name": "bop"},
]  # fmt: skip


@pytest.fixture(scope="module")
def spec_of(tiny_config, tiny_corpus):
    def make(overrides=None, corpus=tiny_corpus):
        return resolve(tiny_config(overrides), corpus)

    return make


@pytest.mark.parametrize("overrides", SAME, ids=str)
def test_same_run(spec_of, overrides):
    assert spec_of(overrides).run_id == spec_of().run_id


@pytest.mark.parametrize("overrides", NEW, ids=str)
def test_a_sweeps_own_words_are_no_part_of_a_run(spec_of, tiny_config, tiny_corpus, overrides):
    config = tiny_config()
    for key, value in overrides.items():
        group, name = key.split(".")
        config[group][name] = value
    spec = resolve(config, tiny_corpus)
    assert spec.run_id == spec_of().run_id
    assert "full" not in json.dumps(spec.identity())
    tags = {key: value for key, value in overrides.items() if key.startswith("tags.")}
    assert {f"tags.{key}": value for key, value in spec.tags} == tags


def test_carriers_share_a_run_with_a_late_arm_too(spec_of):
    late = {**T, "quantization.late_activations": "int4_absmean"}
    assert spec_of({**late, "matmul.carrier": "int8"}).run_id == spec_of(late).run_id
    assert spec_of({**late, "matmul.carrier": "int8"}).deployed.precision.carrier == "int8"


@pytest.mark.parametrize("overrides", DIFFERENT, ids=str)
def test_another_run(spec_of, overrides):
    assert spec_of(overrides).run_id != spec_of().run_id


def test_every_difference_is_a_different_one(spec_of):
    ids = {spec_of(overrides).run_id for overrides in DIFFERENT}
    assert len(ids) == len(DIFFERENT)


def test_every_key_is_accounted_for(tiny_config):
    """A new key must be listed above, as one that changes a run or one that does not."""
    listed = {key for overrides in SAME + DIFFERENT for key in overrides}
    elsewhere = {
        "data.source",  # by the tokens' hash: test_data_by_content
        "model.heads",  # with a size of its own
        "model.attention",  # of a GPU: test_attention_s_implementation_is_no_part_of_a_run
        "mesh.data",  # of several devices: test_mesh
        "mesh.tensor",
    }
    keys = set(flatten(tiny_config().to_dict()))
    assert keys - listed - elsewhere == set()


def test_attention_s_implementation_is_no_part_of_a_run(spec_of):
    spec = spec_of({})
    model = dataclasses.replace(spec.step.model, attention="cudnn")
    other = dataclasses.replace(spec, step=dataclasses.replace(spec.step, model=model))
    assert (other.run_id, other.variant) == (spec.run_id, spec.variant)


def flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_data_by_content_not_by_path(spec_of, tiny_corpus, tmp_path):
    moved = dataclasses.replace(tiny_corpus, path=tmp_path)
    assert spec_of(corpus=moved).run_id == spec_of().run_id
    for split in ("train", "valid"):
        splits = dict(tiny_corpus.manifest["splits"])
        splits[split] = {**splits[split], "sha256": "0" * 64}
        other = dataclasses.replace(
            tiny_corpus, manifest={**tiny_corpus.manifest, "splits": splits}
        )
        assert spec_of(corpus=other).run_id != spec_of().run_id


def test_run_id_is_readable_and_a_file_name(spec_of):
    run_id = spec_of({"precision": "fp16", "seeds.init": 3}).run_id
    assert run_id.startswith("27k-layers1-width16-ff_width32-heads2-kv_heads1-fp16-s3-")
    digest = run_id.rsplit("-", 1)[1]
    assert len(digest) == 10 and int(digest, 16) >= 0
    assert Path(run_id).name == run_id


def test_run_id_says_how_an_arm_was_changed(spec_of):
    q = {"weights": "ternary_twn", "granularity": "group", "granularity_size": 8, "rotate": True,
         "late_activations": "int4_absmean"}  # fmt: skip
    run_id = spec_of({**T, **{f"quantization.{key}": value for key, value in q.items()}}).run_id
    arm = run_id.split("kv_heads1-")[1].rsplit("-s0-", 1)[0]
    name, *changes, late = arm.split("+")
    assert (name, late) == ("ternary", "late=int4_absmean")
    assert set(changes) == {"weights=ternary_twn", "granularity=group8", "rotate=true"}
    assert Path(run_id).name == run_id


def test_the_deployed_arm_is_the_late_one(spec_of):
    assert spec_of(T).deployed == spec_of(T).step
    late = spec_of({**T, "quantization.late_activations": "int4_absmean"})
    assert late.step.precision.activations == "int8_absmax"
    assert late.deployed.precision.activations == "int4_absmean"
    assert dataclasses.replace(late.deployed, precision=late.step.precision) == late.step


def test_identity_is_json_and_complete(spec_of):
    identity = spec_of().identity()
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert identity["step"]["precision"]["compute_dtype"] == "float32"
    assert identity["ends"] == [20, 40] and identity["peak_lr"] == 0.01
    assert identity["data"]["name"] == "corpus" and len(identity["data"]["sha256"]) == 64
    assert "path" not in json.dumps(identity)
    assert "tags" not in identity and identity["phases"]["late"] is None
    late = spec_of({**T, "quantization.late_activations": "int4_absmean"}).identity()
    assert json.loads(json.dumps(late, allow_nan=False)) == late
    assert late["phases"]["late"]["activations"] == "int4_absmean"


SCRIPT = """
import json, sys
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.data import load
overrides = json.loads(sys.argv[1])
config = default.get_config()
config.update_from_flattened_dict({**overrides, "train.tokens": tuple(overrides["train.tokens"])})
print(resolve(config, load(config.data.source)).run_id)
"""


def test_run_id_is_the_same_in_another_process(spec_of, tiny_overrides):
    """Whatever Python's hash seed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(tiny_overrides)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == spec_of().run_id


def test_costs(spec_of):
    spec = spec_of()
    assert spec.batch_tokens == 128
    assert sum(s.steps for s in spec.segments) == 44
    assert spec.total_flops == 44 * 128 * spec.flops_per_token
    alone = spec_of({"train.tokens": (5120,)})
    assert alone.total_flops == 40 * 128 * spec.flops_per_token


def test_costs_by_hand(spec_of):
    """Tiny: 1 layer, width 16, ff 32, two heads of 8 on one key-value head, 16 tokens of 256."""
    linear = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)  # q, k and v, out, MLP
    attention, head = 4 * 16 * 16, 2 * 16 * 256
    token = 3 * (linear + attention + head)
    spec = spec_of()
    assert spec.flops_per_token == token == 41472
    assert spec.total_flops == (16 + 4 + 16 + 8) * 128 * token == 233_570_304
    assert spec.independent_flops == (20 + 40) * 128 * token == 318_504_960
    three = spec_of({"train.tokens": (1280, 2560, 5120)})  # 10, 20 and 40 steps
    assert three.independent_flops == 70 * 128 * token
    alone = spec_of({"train.tokens": (5120,)})
    assert alone.independent_flops == alone.total_flops == 40 * 128 * token
    cosine = spec_of({"train.tokens": (5120,), "schedule.name": "cosine"})
    assert cosine.independent_flops == cosine.total_flops == alone.total_flops
