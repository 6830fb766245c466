"""What a model costs, analytically: parameters, FLOPs, stored bits, inference energy.

XLA's own cost analysis counts a scanned body once, so none of this is measured; the tests compare
it with the parameter tree and with the products counted in an unrolled program.
"""

import dataclasses

from bitnet_jax.model import TransformerConfig
from bitnet_jax.precision import Precision


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameter counts by group. The groups are disjoint and sum to `total`."""

    embedding: int  # and the head, where it is not tied
    quantized: int  # kernels of the linear layers: what the arm's weight quantizer acts on
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.quantized + self.norms

    @property
    def non_embedding(self) -> int:
        return self.quantized + self.norms


def count_parameters(c: TransformerConfig) -> Parameters:
    """Parameters of a transformer, by group."""
    inputs = sum(n for n, _ in linear_shapes(c).values())
    norms = {
        "pre": 2 * c.width,
        "sub": 2 * c.width + c.width + c.ff_width,
        "inside": inputs,  # each linear layer's own
    }
    return Parameters(
        embedding=c.vocab_size * c.width * (1 if c.tied_embeddings else 2),
        quantized=c.layers * sum(n * p for n, p in linear_shapes(c).values()),
        norms=c.layers * norms[c.norms] + c.width,
    )


def linear_shapes(c: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer of a block, by the projection's name."""
    heads, kv_heads = c.heads * c.head_size, c.kv_heads * c.head_size
    gate = {"gate": (c.width, c.ff_width)} if c.gated else {}
    return {
        "q": (c.width, heads),
        "k": (c.width, kv_heads),
        "v": (c.width, kv_heads),
        "out": (heads, c.width),
        **gate,
        "up": (c.width, c.ff_width),
        "down": (c.ff_width, c.width),
    }


def forward_flops_per_token(c: TransformerConfig, sequence_length: int) -> int:
    """FLOPs of the matrix products of one forward pass, for one token of a sequence.

    A multiply-add is two. Counted: linear layers, head, and attention's two products over the full
    T x T square, as they are computed (causality is a mask) and as Hoffmann et al. (2022, appendix
    F) count them. Not counted: norms, softmax, activations, quantization, Hadamard rotations.
    """
    linear = 2 * count_parameters(c).quantized
    attention = 2 * 2 * c.layers * sequence_length * c.heads * c.head_size
    head = 2 * c.width * c.vocab_size
    return linear + attention + head


def training_flops_per_token(c: TransformerConfig, sequence_length: int) -> int:
    """Forward, and twice that backward: each product has two gradients. Remat is not counted.

    The same in every arm: a ternary model is trained in the operations of its 16-bit twin.
    """
    return 3 * forward_flops_per_token(c, sequence_length)


def model_bits(c: TransformerConfig, precision: Precision) -> float:
    """Bits of information in the stored model.

    Kernels at the arm's `weight_bits` (log2 3 for trits), with a 16-bit scale for each block of
    weights that shares one where they are quantized; embedding, head and norms at 16 bits (32 in
    the fp32 arm).
    """
    n = count_parameters(c)
    of_scales = 16 * c.layers * sum(scales(c, precision)) if precision.quantized else 0
    rest = (n.embedding + n.norms) * precision.float_bits
    return n.quantized * precision.weight_bits + rest + of_scales


def scales(c: TransformerConfig, precision: Precision) -> list[int]:
    """How many scales each linear layer of a block has."""
    kind, size = precision.granularity.kind, precision.granularity.size
    return [
        {"tensor": 1, "channel": p, "group": n // size * p, "shard": size}[kind]
        for n, p in linear_shapes(c).values()
    ]


# Picojoules of one addition and one multiplication by process, as BitNet's papers use them
# (arXiv:2310.11453, table 2; arXiv:2402.17764, figure 3): 45 nm by Horowitz (ISSCC 2014), 7 nm by
# Zhang et al. (2022).
ENERGY_PJ = {
    "7nm": {"fp32": (0.38, 1.31), "fp16": (0.16, 0.34), "int8": (0.007, 0.07)},
    "45nm": {"fp32": (0.9, 3.7), "fp16": (0.4, 1.1), "int8": (0.03, 0.2)},
}


def energy_per_token(
    c: TransformerConfig, precision: Precision, sequence_length: int, node: str = "7nm"
) -> float:
    """Picojoules of arithmetic for one token of inference, by process. Memory traffic is NOT in it.

    A dense product of a row of n by an n x p matrix adds (n-1)p times and multiplies np times.
    With codes of -1, 0 and 1 nothing but the scales is multiplied, in 16 bits, n + p times where
    activations are quantized (BitNet, arXiv:2310.11453, eq. 15-16) and p times where not, whatever
    the number of scales; longer codes multiply in int8. Additions are int8 where
    the activations are codes (of up to 8 bits), else floats. Attention and head are dense in every
    arm; attention is counted at the sequence's mean causal length.
    """
    units = ENERGY_PJ[node]
    linear = sum(_linear_energy(n, p, precision, units) for n, p in linear_shapes(c).values())
    floats = units["fp32" if precision.float_bits == 32 else "fp16"]
    keys = (sequence_length + 1) / 2
    scores = _dense_energy(c.head_size, keys, floats)
    values = _dense_energy(keys, c.head_size, floats)
    head = _dense_energy(c.width, c.vocab_size, floats)
    return c.layers * (linear + c.heads * (scores + values)) + head


def _linear_energy(n: int, p: int, precision: Precision, units: dict) -> float:
    floats = units["fp32" if precision.float_bits == 32 else "fp16"]
    if not precision.quantized:
        return _dense_energy(n, p, floats)
    add, multiply = units["int8"] if precision.activations != "none" else floats
    q = precision.weight_quantizer
    products = 0 if max(q.high, -q.low) == 1 else n * p
    scalings = n + p if precision.activations != "none" else p
    return add * (n - 1) * p + multiply * products + floats[1] * scalings


def _dense_energy(n: float, p: float, unit: tuple[float, float]) -> float:
    return unit[0] * (n - 1) * p + unit[1] * n * p
