"""Every key of a run, its default, and what it means. Sweeps and the command line override these.

A key without a value (`placeholder`) is derived when the config is resolved; a comment says how.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The default run: 330k non-embedding parameters, ternary, 1M bytes of WikiText-2."""
    c = ConfigDict()
    c.name = "single"  # results go to <workdir>/<name>/
    c.precision = "ternary"  # the arm: ternary, fp16, bf16, fp32 (bitnet_jax/precision.py)
    c.seed = 0  # what both seeds below are unless set

    c.seeds = ConfigDict()
    c.seeds.init = config_dict.placeholder(int)  # initial parameters; default: seed
    c.seeds.data = config_dict.placeholder(int)  # order of the training rows; default: seed

    c.model = ConfigDict()
    c.model.size = "330k"  # an entry of bitnet_jax/ladder.py; the five below override its shape
    c.model.layers = config_dict.placeholder(int)
    c.model.width = config_dict.placeholder(int)
    c.model.ff_width = config_dict.placeholder(int)
    c.model.heads = config_dict.placeholder(int)
    c.model.kv_heads = config_dict.placeholder(int)
    c.model.activation = "relu2"  # relu2 (BitNet 2B4T) or silu, of the gate
    c.model.sub_norms = True  # RMSNorm before the attention output and MLP down projections
    c.model.tied_embeddings = True  # head = embedding transposed
    c.model.rope_theta = 500_000.0  # base of the rotary frequencies
    c.model.norm_epsilon = 1e-5  # inside every RMSNorm
    c.model.remat = False  # recompute each block in the backward pass: less memory, more time

    c.matmul = ConfigDict()
    c.matmul.carrier = "bfloat16"  # dtype that carries int8 codes forward; int8 gives equal results

    c.data = ConfigDict()
    c.data.source = "wikitext-2"  # wikitext-2, synthetic, or a directory that `prepare` wrote
    c.data.sequence_length = 64  # tokens a row

    c.train = ConfigDict()
    c.train.tokens = (1_000_000,)  # budgets, increasing; several only with schedule wsd
    c.train.batch_tokens = 1024  # tokens an optimizer step
    c.train.microbatches = 1  # gradient accumulation: the batch is cut into so many parts

    c.schedule = ConfigDict()
    c.schedule.name = "wsd"  # wsd (several endpoints), cosine, two_stage (BitNet's)
    c.schedule.warmup_fraction = 0.1  # of the smallest budget
    c.schedule.decay_fraction = 0.2  # of each budget, at its end (wsd)
    c.schedule.final_ratio = 0.0  # last learning rate over peak

    c.optim = ConfigDict()
    c.optim.name = "adamw"
    c.optim.peak_lr = config_dict.placeholder(float)  # default: tuned for arm and size (optim.py)
    c.optim.weight_decay = 0.1  # decoupled, times the learning rate; matrices only
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.epsilon = 1e-8
    c.optim.clip_norm = 1.0  # global gradient norm

    c.loss = ConfigDict()
    c.loss.z_loss = 0.0  # weight of mean log^2 Z

    c.eval = ConfigDict()
    c.eval.tokens = 262_144  # held-out tokens, the same for every run; 0 for all
    c.eval.every = 0  # optimizer steps between evaluations on the way; 0 for endpoints only

    c.log = ConfigDict()
    c.log.every = 50  # optimizer steps a line of metrics.jsonl

    c.checkpoint = ConfigDict()
    c.checkpoint.seconds = 60.0  # between checkpoints

    c.tracking = ConfigDict()
    c.tracking.wandb = config_dict.placeholder(
        str
    )  # online, offline, disabled; default: $WANDB_MODE, else offline
    c.tracking.project = "bitnet_jax"  # Weights & Biases project

    c.sweep = ConfigDict()  # the axes of a sweep; each sweep file fills in its own
    return c
