"""Whether an exported file is the run: its content against the run's, and the client's logits.

Rounding of activations is chaotic: a last-bit difference moves a value to the next code, and that a
position's logits by a hundredth of their deviation. So the exact check is without quantization of
activations on both sides; with it, of a small model, most positions of many short rows must agree.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from bitnet_jax.cost import count_parameters
from bitnet_jax.export.model import Linear, TrainedModel, linears
from bitnet_jax.export.parts import Stored, parts, values
from bitnet_jax.model import apply_model

Logits = Float32[np.ndarray, "B T V"]
Rounding = Callable[[np.ndarray], np.ndarray]  # numbers to the largest error of each

# Of logits, in units of their deviation where that is above 1.
EXACT = 1e-4  # at any size, activations not quantized
ALIKE = 2e-5  # of a position where no code flips
FLIPPED = 0.05  # of the positions, at most
TINY = 2_000_000  # parameters up to which so few positions flip
TOO_LARGE = f"not compared: above {TINY:,} parameters most positions flip"
LONG = (4, 64)  # rows and tokens for what does not flip
SHORT = (64, 3)  # and for what does


class Check(NamedTuple):
    """A comparison.

    found, allowed: the largest of each measure, by its name. holds: None where nothing could be
    compared, which note says the reason of.
    """

    what: str
    found: dict[str, float]
    allowed: dict[str, float]
    holds: bool | None
    note: str = ""


def evaluate(
    model: TrainedModel, tokens: Int32[np.ndarray, "B T"], quantized: bool = True
) -> Logits:
    """The run's logits, what is not quantized in float32. quantized: whether activations are."""
    arm = dataclasses.replace(model.precision, compute_dtype=jnp.float32)
    if not quantized:
        arm = dataclasses.replace(arm, activations="none", activation_estimator="identity")
    return np.asarray(apply_model(model.config, arm, model.params, jnp.asarray(tokens)))


def exactly(x: np.ndarray) -> np.ndarray:
    """No rounding: what is stored is float32."""
    return np.zeros_like(x)


def content(
    model: TrainedModel,
    stored: Stored,
    matrices: Rounding = exactly,
    embedding: Rounding = exactly,
    scale: float = 0.0,
    own: Callable[[Linear], np.ndarray] = values,
) -> Iterator[Check]:
    """Everything that a file holds against the run.

    matrices, embedding: how far numbers may be off by the type that they are stored in; the
      embedding's is the head's, too. scale: how far scales may be, relatively.
    own: what a projection stored without codes should be.
    """
    wrong = codes = 0
    scale_errors, numbers, rest = [0.0], _Errors(), _Errors()
    for linear in linears(model):
        found = stored.matrices[linear.block, linear.name]
        if found.scale is None:
            numbers.add(found.numbers, own(linear), matrices)
            continue
        assert linear.codes is not None and linear.scale is not None
        wrong, codes = wrong + int((found.numbers != linear.codes).sum()), codes + linear.codes.size
        scale_errors.append(abs(found.scale / float(linear.scale.item()) - 1))
    for part in parts(model):
        rounds = embedding if part.name in ("embedding", "head") else exactly
        rest.add(stored.parts[part.block, part.name], part.values, rounds)
    if codes:
        yield Check("codes", {"different": wrong, "of": codes}, {"different": 0}, wrong == 0)
        largest = float(np.max(scale_errors))  # a NaN, if there is one
        yield Check("scales", {"relative": largest}, {"relative": scale}, largest <= scale)
    else:
        yield numbers.check("weights")
    yield rest.check("embedding, head, norms")


class _Errors:
    """The largest difference of several arrays, and whether rounding explains all."""

    def __init__(self) -> None:
        self.largest, self.allowed, self.explained = 0.0, 0.0, True

    def add(self, found: np.ndarray, own: np.ndarray, rounding: Rounding) -> None:
        if found.shape != own.shape:
            self.largest, self.explained = np.inf, False
            return
        error, allowed = np.abs(found - own), rounding(own)
        self.explained &= bool((error <= allowed).all())  # false of a NaN, too
        self.largest = max(self.largest, float(error.max()))
        self.allowed = max(self.allowed, float(allowed.max()))

    def check(self, what: str) -> Check:
        return Check(what, {"largest": self.largest}, {"largest": self.allowed}, self.explained)


def exact_logits(what: str, own: Logits, client: Logits) -> Check:
    """Without quantized activations: every position near, and the same most likely token."""
    apart, unit = _apart(own, client)
    agree = float((own.argmax(-1) == client.argmax(-1)).mean())
    found = {"largest": float(apart.max()), "top1": agree}
    holds = found["largest"] <= EXACT * unit and agree == 1
    return Check(what, found, {"largest": EXACT * unit, "top1": 1.0}, holds)


def mostly_equal_logits(what: str, own: Logits, client: Logits) -> Check:
    """With quantized activations, where a few positions flip and the others must be near."""
    apart, unit = _apart(own, client)
    near = apart <= ALIKE * unit  # false of a NaN
    found = {
        "largest": float(apart[near].max(initial=0.0)),
        "flipped": float(1 - near.mean()),
        "by": float(apart.max()),
    }
    holds = found["flipped"] <= FLIPPED
    return Check(what, found, {"largest": ALIKE * unit, "flipped": FLIPPED}, holds)


def median_logits(what: str, own: Logits, client: Logits, allowed: float) -> Check:
    """Of the positions. allowed: in units of the logits' deviation."""
    apart, _ = _apart(own, client)
    found = {"median": float(np.median(apart)), "largest": float(apart.max())}
    allowed *= float(own.std())
    return Check(what, found, {"median": allowed}, found["median"] <= allowed)


def _apart(own: Logits, client: Logits) -> tuple[Float32[np.ndarray, "B T"], float]:
    """Each position's largest difference, and the unit of the allowed ones."""
    return np.abs(own - client).max(axis=-1), max(1.0, float(own.std()))


def tiny(model: TrainedModel) -> bool:
    """Whether so few activations are rounded that most positions have no flip."""
    return count_parameters(model.config).non_embedding <= TINY


def long_rows(rows: Int32[np.ndarray, "R T"]) -> Int32[np.ndarray, "B t"]:
    """A few rows of held-out text, for exact checks."""
    count, length = LONG
    return rows[:count, :length]


def short_rows(rows: Int32[np.ndarray, "R T"]) -> Int32[np.ndarray, "B t"]:
    """Many rows of few tokens, out of rows of held-out text: flips do not spread in them."""
    count, length = SHORT
    cut = rows[:, : rows.shape[1] // length * length].reshape(-1, length)
    return cut[np.linspace(0, len(cut) - 1, min(count, len(cut))).astype(int)]
