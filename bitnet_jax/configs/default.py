"""Every key of a run, its default, and what it means. Sweeps and the command line override these.

A key without a value (`placeholder`) is derived when the config is resolved; a comment says how.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The default run: 330k non-embedding parameters, ternary, 1M bytes of WikiText-2."""
    c = ConfigDict()
    c.name = "single"  # results go to <workdir>/<name>/
    c.precision = "ternary"  # the arm: ternary, binary, fp16, bf16, fp32 (bitnet_jax/precision.py)
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
    c.model.activation = "relu2"  # relu2 (BitNet 2B4T), silu, gelu
    c.model.gated = True  # MLP is act(gate x) * (up x), else act(up x)
    c.model.norms = "sub"  # pre (LLaMA), sub (also before out and down), inside (each linear)
    c.model.init = "fan_in"  # of kernels: fan_in, flax, nanotron, subln, quantizer
    c.model.tied_embeddings = True  # head = embedding transposed
    c.model.rope_theta = 500_000.0  # base of the rotary frequencies
    c.model.norm_epsilon = 1e-5  # inside every RMSNorm
    c.model.attention = "blocks"  # how it is computed: blocks, cudnn (NVIDIA GPUs, 16 bits)
    c.model.remat = False  # recompute each block in the backward pass: less memory, more time

    c.quantization = ConfigDict()  # changes to the arm; without a value, the arm's own
    c.quantization.weights = config_dict.placeholder(str)  # a name in bitnet_jax/quantize.py
    c.quantization.activations = config_dict.placeholder(str)  # the same table; a scale a token
    c.quantization.granularity = config_dict.placeholder(str)  # tensor, channel, group, shard
    c.quantization.granularity_size = config_dict.placeholder(int)  # weights a group, or shards
    c.quantization.estimator = config_dict.placeholder(str)  # identity, clipped, trust, stochastic
    c.quantization.activation_estimator = config_dict.placeholder(str)  # the same
    c.quantization.rotate = config_dict.placeholder(bool)  # Hadamard before out and down
    c.quantization.warmup = "none"  # strength of quantization: linear, exponential, sigmoid
    c.quantization.warmup_fraction = 0.25  # of the smallest budget
    c.quantization.steepness = 8.0  # k of the exponential and sigmoid warm-ups
    c.quantization.late_activations = config_dict.placeholder(str)  # of each endpoint's last part
    c.quantization.late_fraction = 0.05  # of each budget, at its end

    c.matmul = ConfigDict()
    c.matmul.carrier = "auto"  # of int8 codes, forward: bfloat16, int8 or the faster; equal results
    c.matmul.wire = "int8"  # how codes of weights travel between devices: int8, packed (2 bits)

    c.mesh = ConfigDict()  # devices that one run is cut over; results do not depend on it
    c.mesh.data = 1  # batch, kernels and optimizer state (FSDP)
    c.mesh.tensor = 1  # heads and feed-forward width

    c.data = ConfigDict()
    c.data.source = "wikitext-2"  # wikitext-2, synthetic, or a directory that `prepare` wrote
    c.data.sequence_length = 64  # tokens a row

    c.train = ConfigDict()
    c.train.tokens = (1_000_000,)  # budgets, increasing; several only with schedule wsd
    c.train.batch_tokens = 1024  # tokens an optimizer step
    c.train.microbatches = 1  # gradient accumulation: the batch is cut into so many parts
    c.train.rollbacks = 2  # a run that diverges goes back and tries other data, so often at most

    c.schedule = ConfigDict()
    c.schedule.name = "wsd"  # wsd (several endpoints), cosine, two_stage (BitNet's), trilm
    c.schedule.warmup_fraction = 0.1  # of the smallest budget
    c.schedule.decay_fraction = 0.2  # of each budget, at its end (wsd)
    c.schedule.final_ratio = 0.0  # last learning rate over peak
    c.schedule.second_peak = 2 / 3  # second peak over first (two_stage, trilm)

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw, lion, muon (kernels), bop (kernels: flips of their codes)
    c.optim.peak_lr = config_dict.placeholder(float)  # default: tuned for arm and size (optim.py)
    c.optim.weight_decay = 0.1  # decoupled, times the learning rate; matrices only
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.epsilon = 1e-8
    c.optim.clip_norm = 1.0  # global gradient norm
    c.optim.latents = "float32"  # kernels between steps: float32, bfloat16, bfloat16_stochastic
    c.optim.latent_clip = 0.0  # kernels stay within this many initial deviations; 0 for free
    c.optim.bop_ratio = 0.2  # Bop's adaptivity rate over the learning rate
    c.optim.bop_threshold = 1e-5  # momentum that flips a code

    c.loss = ConfigDict()
    c.loss.z_loss = 0.0  # weight of mean log^2 Z
    c.loss.regularizer = "none"  # on latent weights: none, sin2, dampening
    c.loss.regularizer_weight = 0.0  # its coefficient; negative pushes weights off their levels

    c.eval = ConfigDict()
    c.eval.tokens = 262_144  # held-out tokens, the same for every run; 0 for all
    c.eval.every = 0  # optimizer steps between evaluations on the way; 0 for endpoints only

    c.log = ConfigDict()
    c.log.every = 50  # optimizer steps a line of metrics.jsonl
    c.log.layers = True  # a further line with the statistics of every projection of every block
    c.log.gradient_sample = 0  # weights on which an endpoint's gradient meets finite differences

    c.checkpoint = ConfigDict()
    c.checkpoint.seconds = 60.0  # between checkpoints
    c.checkpoint.keep_model = True  # the last endpoint's parameters, in the run's model/

    c.launch = ConfigDict()  # how runs are laid on the machine
    c.launch.group = config_dict.placeholder(
        int
    )  # runs of a shape and arm trained as one program; default: 1 on a CPU, else 8 a device
    c.launch.parallel = config_dict.placeholder(
        int
    )  # programs that train side by side, in threads; default: 2 on a CPU of several cores, else 1
    c.launch.dispatch = config_dict.placeholder(
        int
    )  # optimizer steps a call of the compiled program; default: 1 on a CPU, else 16
    c.launch.resident_bytes = 2**30  # token files up to this size are put on the device
    c.launch.device_memory_gb = 0.0  # 10^9 bytes a device has, to plan for another; 0: ask it
    c.launch.failures = 3  # so often in a row, without getting on: workers give a run up

    c.slurm = ConfigDict()  # what --launcher=slurm asks for; the same for all runs of a sweep
    c.slurm.workers = 1  # jobs of the array, each one worker; no more are made than runs are left
    c.slurm.minutes = 60  # of a job; a worker that is cut short is requeued and goes on
    c.slurm.partition = config_dict.placeholder(str)  # default: the cluster's
    c.slurm.account = config_dict.placeholder(str)  # default: the user's
    c.slurm.processes = 1  # that train one run together
    c.slurm.nodes = 1  # over which these are spread
    c.slurm.gpus = 0  # of each node
    c.slurm.cpus = config_dict.placeholder(int)  # of each process; default: the cluster's
    c.slurm.memory = config_dict.placeholder(str)  # of each node, as 16G; default: the cluster's
    c.slurm.mixed_code = False  # go on with a sweep that another commit has begun

    c.k8s = ConfigDict()  # what --launcher=k8s asks for; the same for all runs of a sweep
    c.k8s.image = config_dict.placeholder(str)  # of the Dockerfile; to be given
    c.k8s.claim = config_dict.placeholder(str)  # volume claim for the results; to be given
    c.k8s.mount = "/results"  # where pods have the claim; it is their workdir
    c.k8s.workers = 1  # no more are made than runs are left; each a pod, or one a host
    c.k8s.hosts = config_dict.placeholder(
        int
    )  # that train a run together; default: 1, of TPUs those of the slice
    c.k8s.namespace = config_dict.placeholder(str)  # default: kubectl's
    c.k8s.queue = config_dict.placeholder(str)  # of Kueue; default: none, pods start as they can
    c.k8s.secret = config_dict.placeholder(str)  # whose entries pods have as environment variables
    c.k8s.service_account = config_dict.placeholder(str)  # default: the namespace's
    c.k8s.gpus = 0  # NVIDIA's, of each pod
    c.k8s.tpu_accelerator = config_dict.placeholder(str)  # of GKE, as tpu-v6e-slice
    c.k8s.tpu_topology = config_dict.placeholder(str)  # of each worker's slice, as 2x4
    c.k8s.cpus = config_dict.placeholder(int)  # of each pod; default: the namespace's
    c.k8s.memory = config_dict.placeholder(str)  # of each pod, as 16Gi; likewise
    c.k8s.node_selector = config_dict.placeholder(str)  # labels of the nodes, as spot=true,zone=a
    c.k8s.grace = 60  # seconds that a worker that is stopped has to save
    c.k8s.crashes = 10  # so often a crashed worker is started again; preemption does not count
    c.k8s.mixed_code = False  # go on with a sweep that another commit has begun

    c.tracking = ConfigDict()
    c.tracking.wandb = config_dict.placeholder(
        str
    )  # online, offline, disabled; default: $WANDB_MODE, else offline
    c.tracking.project = "bitnet_jax"  # Weights & Biases project

    c.tags = ConfigDict()  # words a sweep wants beside its results, in columns tag_...; no effect
    c.sweep = ConfigDict()  # the axes of a sweep; each sweep file fills in its own
    return c
