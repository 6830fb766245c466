"""The orthonormal Hadamard rotation that spreads outliers (BitNet v2, arXiv:2504.18415).

A Hadamard matrix H of order n has entries +-1 and H H^T = n I. Ladder widths are not all powers of
two, so H is a Kronecker product: Sylvester's matrices for the power of two and at most one of
Paley's for what is left (352 = 8 * 44). It is applied factor by factor and never formed.

Matrices, factors and their order are part of what a model has learned: to change any of them is
to change the weights of every checkpoint trained with it.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

# Powers of two are split further, Paley's matrices cannot be: the second bound is one of cost.
LARGEST_SYLVESTER = 64
LARGEST_PALEY = 256


def supported(width: int) -> bool:
    """Whether `rotate_hadamard` can rotate vectors of this width."""
    return _remainder(width) is not None


def factors(width: int) -> tuple[int, ...]:
    """Orders whose product is `width`: powers of two, the larger first, then Paley's if needed.

    The rotation costs 2 * sum(factors) operations an element. Powers of two are as few factors as
    LARGEST_SYLVESTER allows, as equal as can be; Paley's order is the smallest that serves. Width 1
    has no factors.

    Raises:
      ValueError: no such factors.
    """
    order = _remainder(width)
    if order is None:
        raise ValueError(
            f"no Hadamard rotation of width {width}: it is not a power of two times 1 or times "
            f"q + 1 <= {LARGEST_PALEY} for a prime q = 3 mod 4"
        )
    exponent = (width // order).bit_length() - 1
    count = -(-exponent // (LARGEST_SYLVESTER.bit_length() - 1))
    powers = tuple(2 ** ((exponent + count - 1 - i) // count) for i in range(count))
    return powers if order == 1 else (*powers, order)


def hadamard_matrix(order: int) -> Int8[np.ndarray, "n n"]:
    """A Hadamard matrix with entries +-1: Sylvester's for powers of two, otherwise Paley's first.

    Sylvester: H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]; symmetric.
    Paley (J. Math. Phys. 12, 1933): for a prime q = 3 mod 4, I + [[0, 1], [-1, Q]] with
    Q_ij = chi(i - j), chi(a) = 0, 1 or -1 as a is 0, a square or not modulo q; not symmetric.

    Raises:
      ValueError: `order` is neither a power of two nor q + 1.
    """
    if _is_power_of_two(order):
        matrix = np.ones((1, 1), np.int8)
        while len(matrix) < order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix
    if not _is_paley(order):
        raise ValueError(
            f"no Hadamard matrix of order {order}: it is neither a power of two nor q + 1 for a "
            "prime q = 3 mod 4"
        )
    q = order - 1
    residues = np.arange(q)
    character = np.full(q, -1, np.int8)
    character[residues**2 % q] = 1
    matrix = np.ones((order, order), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(residues[:, None] - residues[None, :]) % q]
    np.fill_diagonal(matrix, 1)  # chi(0) = 0, plus I
    return matrix


def rotate_hadamard(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x @ H / sqrt(D) over the last axis, H the Kronecker product of the factors of D, in order.

    Computed in float32 and returned so. Orthonormal: norms and inner products are kept, and the
    gradient is the product with H^T / sqrt(D).

    Raises:
      ValueError: D has no factors.
    """
    *batch, width = x.shape
    orders = factors(width)
    y = x.astype(jnp.float32).reshape(*batch, *orders)
    for order in orders:
        # Each product takes the foremost factor's axis out and puts it last: after all of them the
        # axes stand as they did.
        y = lax.dot_general(
            y,
            jnp.asarray(hadamard_matrix(order), jnp.float32),
            (((len(batch),), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,  # a GPU's default for float32 operands is TF32
        )
    return y.reshape(x.shape) / math.sqrt(width)


def _remainder(width: int) -> int | None:
    """The least m, 1 or Paley's, for which width is m times a power of two; None without one."""
    if width < 1:
        return None
    order = width // (width & -width)  # the odd part
    while order != 1 and not _is_paley(order):
        order *= 2
        if width % order:
            return None
    return order if order <= LARGEST_PALEY else None


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _is_paley(order: int) -> bool:
    """Whether order - 1 is a prime = 3 mod 4."""
    q = order - 1
    return q % 4 == 3 and q > 2 and all(q % d for d in range(3, math.isqrt(q) + 1, 2))
