"""Which client computes which model, and the refusal of what none of them does.

A client has the block's shape built in, and takes a file of another shape without a word where only
a function differs: a squared ReLU model in llama.cpp gives text, and it is wrong.
"""

from collections.abc import Iterator
from typing import NamedTuple

from bitnet_jax.errors import ConfigError
from bitnet_jax.export.model import TrainedModel
from bitnet_jax.model import TransformerConfig


class Family(NamedTuple):
    """An architecture that a client has built in.

    norms, activations, tied: what it computes, of `TransformerConfig`.
    trits_only: whether it computes only trits under int8 activations, not 16-bit weights.
    """

    client: str
    architecture: str
    norms: str
    activations: tuple[str, ...]
    tied: tuple[bool, ...]
    trits_only: bool = False


HUGGING_FACE, LLAMA_CPP, BITNET_CPP = "transformers", "llama.cpp", "bitnet.cpp"
FLAGS = {
    HUGGING_FACE: "--format=hf",
    LLAMA_CPP: "--format=gguf",
    BITNET_CPP: "--format=gguf --type=I2_S",
}
_ANY_ACTIVATION, _ANY_HEAD = ("relu2", "silu", "gelu"), (True, False)

FAMILIES = (
    Family(HUGGING_FACE, "bitnet", "sub", _ANY_ACTIVATION, _ANY_HEAD),
    Family(HUGGING_FACE, "llama", "pre", _ANY_ACTIVATION, _ANY_HEAD),
    Family(LLAMA_CPP, "bitnet", "sub", ("silu",), (True,)),
    Family(LLAMA_CPP, "llama", "pre", ("silu",), _ANY_HEAD),
    Family(BITNET_CPP, "bitnet-b1.58", "sub", ("relu2",), (True,), trits_only=True),
)


class Obstacle(NamedTuple):
    """Why a client cannot compute a model: a config key, its value, and what would be right."""

    key: str
    value: object
    right: str


def family(model: TrainedModel, client: str) -> Family:
    """The architecture of a client that computes a model.

    Raises:
      ConfigError: it has none; says which clients do.
    """
    found = [f for f in FAMILIES if f.client == client and not list(_obstacles(model, f))]
    if found:
        return found[0]
    key, value, right = _nearest(model, client)
    who = " and ".join(f"{name} ({FLAGS[name]})" for name in able(model)) or "no client known here"
    raise ConfigError(f"{key}={value}: {client} {right}; {who} can run this model")


def able(model: TrainedModel) -> list[str]:
    """The clients that compute a model."""
    return [f.client for f in FAMILIES if not list(_obstacles(model, f))]


def _nearest(model: TrainedModel, client: str) -> Obstacle:
    """The first thing in the way of the architecture that has the fewest."""
    lists = [list(_obstacles(model, f)) for f in FAMILIES if f.client == client]
    return min(lists, key=len)[0]


def keeps_codes(model: TrainedModel) -> bool:
    """Whether the projections leave as trits with one scale each."""
    q = model.precision.weight_quantizer
    trits = model.precision.quantized and (q.low, q.high) == (-1, 1)
    return trits and model.precision.granularity.kind == "tensor"


def _obstacles(model: TrainedModel, f: Family) -> Iterator[Obstacle]:
    c = model.config
    if not c.gated:
        yield Obstacle("model.gated", False, "computes gated MLPs alone")
    if c.norms != f.norms:
        known = sorted({other.norms for other in FAMILIES if other.client == f.client})
        right = f"has RMSNorms where model.norms={' or '.join(known)} has them"
        yield Obstacle("model.norms", repr(c.norms), right)
    if c.activation not in f.activations:
        right = f"has {' or '.join(f.activations)} built in"
        yield Obstacle("model.activation", repr(c.activation), right)
    if c.tied_embeddings not in f.tied:
        right = "has no head of its own there: it would take the embedding for it"
        yield Obstacle("model.tied_embeddings", c.tied_embeddings, right)
    yield from _precision_obstacles(model, f)


def _precision_obstacles(model: TrainedModel, f: Family) -> Iterator[Obstacle]:
    arm = model.precision
    if arm.rotate:
        yield Obstacle("quantization.rotate", True, "rotates nothing")
    if arm.activations == "none" and not f.trits_only:
        return  # whatever the weights are made of, they leave as the numbers they stand for
    if arm.activations != "int8_absmax":
        right = f"quantizes activations by int8_absmax{'' if f.trits_only else ' or not at all'}"
        yield Obstacle("quantization.activations", repr(arm.activations), right)
    if not arm.quantized:
        yield Obstacle("quantization.weights", repr(arm.weights), "computes trits alone")
    elif not keeps_codes(model) and arm.granularity.kind != "tensor":
        right = "has one scale a matrix (tensor) under quantized activations"
        yield Obstacle("quantization.granularity", repr(arm.granularity.kind), right)
    elif not keeps_codes(model):
        right = "has codes -1, 0 and 1 under quantized activations"
        yield Obstacle("quantization.weights", repr(arm.weights), right)


def require_multiples(config: TransformerConfig, what: str, multiple: int, instead: str) -> None:
    """Refuse widths that blocks of so many inputs do not divide.

    Raises:
      ConfigError: names the width, the next one that would do, and what can hold it as it is.
    """
    for key, width in (("model.width", config.width), ("model.ff_width", config.ff_width)):
        if width % multiple:
            higher = -(-width // multiple) * multiple
            raise ConfigError(
                f"{key}={width}: {what} holds rows of a multiple of {multiple}, the next is "
                f"{higher}; {instead}"
            )
