"""What a study would cost at sizes that no machine here can train: analytic, nothing is trained.

    python -m experiments.scaling

Prints the tables of docs/scaling.md: FLOPs and chip-hours, memory of a device, bytes that travel in
a step, bytes of a checkpoint.
"""

import sys
from collections.abc import Iterator

from bitnet_jax import cost, ladder, packing
from bitnet_jax.memory import Batch, Memory, step_memory
from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import OptimizerConfig
from bitnet_jax.precision import get_precision
from bitnet_jax.train_step import StepConfig
from experiments.benchmark.peak import known_peak

SIZES = ("7b", "70b")
ARMS = ("ternary", "bf16")
VOCABULARY, LENGTH = 32_000, 2048
BUDGETS = (5, 10, 20)  # tokens a parameter: branches of one trunk
DECAY = 0.2  # of a budget, as `schedule.decay_fraction`
UTILISATIONS = (0.3, 0.4, 0.5)
DEVICES = (8, 64, 512)
TOGETHER = {"7b": 64, "70b": 1024}  # chips of a run, for its days
GB = 1e9

# GB of memory by the makers' data sheets; peak rates are those of benchmark/peak.py.
CHIPS = {"NVIDIA H200": 141, "TPU v5p": 95}


def model(size: str) -> TransformerConfig:
    """An entry of the ladder as it would be trained: with remat."""
    return TransformerConfig(VOCABULARY, **ladder.get_shape(size)._asdict(), remat=True)


def run_tokens(size: str) -> float:
    """Tokens of an arm's run: a trunk up to the last decay, and a decay for each budget."""
    per_parameter = (1 - DECAY) * max(BUDGETS) + DECAY * sum(BUDGETS)
    return per_parameter * cost.count_parameters(model(size)).total


def run_flops(size: str) -> float:
    """FLOPs of an arm's run, without what remat makes again."""
    return run_tokens(size) * cost.training_flops_per_token(model(size), LENGTH)


def chip_hours(flops: float, chip: str, utilisation: float) -> float:
    """FLOPs / (peak FLOP/s x utilisation) / 3600."""
    peak = known_peak(chip)
    assert peak is not None
    return flops / (peak * utilisation) / 3600


def memory(size: str, arm: str, devices: int) -> Memory:
    """On one of the devices that share a run (FSDP), a row of tokens on each at a time."""
    step = StepConfig(model(size), get_precision(arm), OptimizerConfig())
    return step_memory(step, Batch(devices, LENGTH), data=devices)


def device_bytes(size: str, arm: str, devices: int) -> int:
    """Of a step, and of the state that a run sets aside while a branch decays."""
    own = memory(size, arm, devices)
    return own.total + own.state


def fewest_devices(size: str, arm: str, gigabytes: float) -> int:
    """The least power of two of devices on which the estimate fits."""
    counts = (2**k for k in range(20))
    return next(n for n in counts if device_bytes(size, arm, n) <= gigabytes * GB)


def gathered_bytes(size: str, bits: float, devices: int) -> float:
    """Received by a device in a microbatch: all kernels but its own part, for forward and again for
    backward: 2 x kernels x bits / 8 x (n - 1) / n."""
    return 2 * cost.count_parameters(model(size)).quantized * bits / 8 * (devices - 1) / devices


def reduced_bytes(size: str, devices: int) -> float:
    """Sent by a device in a microbatch: float32 gradients of all parameters but its own part."""
    return 4 * cost.count_parameters(model(size)).total * (devices - 1) / devices


def _markdown(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = (header, tuple("---" for _ in header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compute_table() -> str:
    """FLOPs of both arms, chip-hours by chip and utilisation, and days where both arms train at
    once: chip-hours / 24 / 2 / chips of a run."""

    def rows() -> Iterator[tuple[str, ...]]:
        for size in SIZES:
            flops = len(ARMS) * run_flops(size)
            head = f"{run_tokens(size):.3g}", f"{flops:.3g}"
            for chip in CHIPS:
                hours = [chip_hours(flops, chip, u) for u in UTILISATIONS]
                days = (h / 24 / len(ARMS) / TOGETHER[size] for h in (hours[0], hours[-1]))
                told = f"2 x {TOGETHER[size]:,}", " to ".join(f"{d:,.1f}" for d in days)
                yield size, *head, chip, *(f"{h:,.0f}" for h in hours), *told

    shares = (f"chip-hours at {u:.0%}" for u in UTILISATIONS)
    header = ("size", "tokens of an arm", "FLOPs of both", "chip", *shares, "chips", "days")
    return _markdown(header, rows())


def memory_table() -> str:
    """GB of one device, by how many share a run."""

    def rows() -> Iterator[tuple[str, ...]]:
        for size in SIZES:
            for arm in ARMS:
                sizes = (f"{device_bytes(size, arm, n) / GB:,.1f}" for n in DEVICES)
                least = (str(fewest_devices(size, arm, gb)) for gb in CHIPS.values())
                yield size, arm, *sizes, *least

    on = (f"GB on each of {n}" for n in DEVICES)
    fits = (f"fewest {chip} ({gb} GB)" for chip, gb in CHIPS.items())
    return _markdown(("size", "arm", *on, *fits), rows())


def wire_table() -> str:
    """GB that a device receives and sends in a microbatch, at the largest number of devices."""
    devices = max(DEVICES)
    travels = {"bf16": 16.0, "int8 codes": 8.0, "2-bit codes": packing.TWO_BITS.bits}

    def rows() -> Iterator[tuple[str, ...]]:
        for size in SIZES:
            for name, bits in travels.items():
                weights = gathered_bytes(size, bits, devices)
                ratio = weights / gathered_bytes(size, travels["bf16"], devices)
                gradients = reduced_bytes(size, devices)
                total = f"{(weights + gradients) / GB:,.1f}"
                yield size, name, f"{weights / GB:,.1f}", f"{ratio:.3f}", total

    header = ("size", "weights travel as", "GB of weights", "of bf16's", "GB with gradients")
    return _markdown(header, rows())


def checkpoint_table() -> str:
    """GB of a checkpoint, and of one taken in a decay, which holds the trunk's state too."""

    def rows() -> Iterator[tuple[str, ...]]:
        for size in SIZES:
            for arm in ARMS:
                state = memory(size, arm, 1).state / GB
                stored = cost.model_bits(model(size), get_precision(arm)) / 8 / GB
                yield size, arm, f"{state:,.0f}", f"{2 * state:,.0f}", f"{stored:,.1f}"

    header = ("size", "arm", "GB of a checkpoint", "GB within a decay", "GB of the stored model")
    return _markdown(header, rows())


def tables() -> dict[str, str]:
    """Every table of docs/scaling.md in Markdown, by its heading there."""
    return {
        "FLOPs and chips": compute_table(),
        "Memory of a device": memory_table(),
        "Bytes on the wire": wire_table(),
        "Checkpoints": checkpoint_table(),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        helps = arguments[0] in ("-h", "--help")
        print(__doc__ if helps else f"error: {arguments[0]}: it takes no arguments",
              file=sys.stdout if helps else sys.stderr)  # fmt: skip
        return 0 if helps else 2
    print("\n\n".join(f"## {title}\n\n{table}" for title, table in tables().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
