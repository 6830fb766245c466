"""Scaling laws: each is a formula, its parameters and where a search for them starts.

A law maps inputs to a loss in nats a token. The inputs are `n` (parameters), `d` (training tokens)
and `c` (training FLOPs); every parameter is positive, so that a fit may work in logarithms.

To add a law, write its formula with plain numpy arithmetic (the solver differentiates it by complex
steps, so no `abs`, `maximum` or comparisons) and one entry of `LAWS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.tables import AnalysisError

Params = Mapping[str, Any]
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One positive parameter of a law.

    `starts` and `bounds` hold for inputs divided by their geometric means and a loss divided by its
    median, so that they depend on no unit: there an offset or an amplitude is a share of the loss.
    """

    name: str
    starts: tuple[float, ...]
    bounds: tuple[float, float]
    in_loss_units: bool = False
    scales_with: tuple[str, str] | None = None  # (input, exponent): it multiplies input^-exponent


@dataclass(frozen=True)
class Law:
    """A law: `function(params, inputs)` broadcasts over arrays and returns nats a token."""

    name: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[str, ...]
    distinct: int  # different values of each input without which the parameters are not determined
    function: Callable[[Params, Inputs], Any]
    equation: str  # with {parameter} where a parameter's name or value goes
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, named and ordered as in the paper."""
        return tuple(parameter.name for parameter in self.parameters)

    def write(self, params: Params | None = None) -> str:
        """The equation in symbols or, given `params`, in numbers of four digits."""
        if params is None:
            return self.equation.format(**{name: name for name in self.names})
        return self.equation.format(**{name: f"{params[name]:.4g}" for name in self.names})

    def in_units(
        self, params: Params, scales: Mapping[str, float], loss_scale: float
    ) -> dict[str, Any]:
        """Parameters in the inputs' own units, from those found for `input / scales[input]`."""
        natural = dict(params)
        for parameter in self.parameters:
            if parameter.in_loss_units:
                natural[parameter.name] = natural[parameter.name] * loss_scale
            if parameter.scales_with is not None:
                name, exponent = parameter.scales_with
                natural[parameter.name] = natural[parameter.name] * scales[name] ** params[exponent]
        return natural


def _offset(name: str) -> Parameter:
    return Parameter(name, starts=(0.2, 0.5, 0.8), bounds=(1e-6, 1.0), in_loss_units=True)


def _amplitude(name: str, of: str, exponent: str) -> Parameter:
    return Parameter(
        name,
        starts=(0.03, 0.1, 0.3),
        bounds=(1e-8, 2.0),
        in_loss_units=True,
        scales_with=(of, exponent),
    )


def _exponent(name: str) -> Parameter:
    return Parameter(name, starts=(0.1, 0.3, 0.8), bounds=(0.005, 4.0))


def _chinchilla(p: Params, x: Inputs) -> Any:
    return p["E"] + p["A"] * x["n"] ** -p["alpha"] + p["B"] * x["d"] ** -p["beta"]


def _power(p: Params, x: Inputs) -> Any:
    return p["E"] + p["A"] * x["c"] ** -p["alpha"]


_CHINCHILLA = Law(
    name="chinchilla",
    parameters=(
        _offset("E"),
        _amplitude("A", "n", "alpha"),
        _amplitude("B", "d", "beta"),
        _exponent("alpha"),
        _exponent("beta"),
    ),
    inputs=("n", "d"),
    # An additive table of r sizes and s budgets determines E, B and beta only from s = 3 on.
    distinct=3,
    function=_chinchilla,
    equation="L = {E} + {A} / N^{alpha} + {B} / D^{beta}",
    source="Hoffmann et al. 2022 (arXiv:2203.15556), eq. 10",
)

_POWER = Law(
    name="power",
    parameters=(_offset("E"), _amplitude("A", "c", "alpha"), _exponent("alpha")),
    inputs=("c",),
    distinct=3,
    function=_power,
    equation="L = {E} + {A} / C^{alpha}",
    source="Henighan et al. 2020 (arXiv:2010.14701), eq. 1.1, in compute",
)

LAWS: dict[str, Law] = {law.name: law for law in (_CHINCHILLA, _POWER)}


def get_law(name: str) -> Law:
    """The law called `name`; AnalysisError names the known ones."""
    if name not in LAWS:
        raise AnalysisError(f"unknown law {name!r}: choose one of {', '.join(LAWS)}")
    return LAWS[name]


@dataclass(frozen=True)
class Frontier:
    """The best split of each compute between parameters and tokens.

    `measured` is False where the optimum lies outside the observed parameters or tokens.
    """

    compute: np.ndarray  # [K] FLOPs
    n: np.ndarray  # [K] parameters
    d: np.ndarray  # [K] tokens
    loss: np.ndarray  # [K] nats a token
    measured: np.ndarray  # [K] bool


def frontier(
    params: Params,
    compute: np.ndarray,
    *,
    flops_per_parameter_token: float = 6.0,
    n_range: tuple[float, float] | None = None,
    d_range: tuple[float, float] | None = None,
) -> Frontier:
    """The compute-optimal frontier of a `chinchilla` law under C = k N D (Hoffmann et al., eq. 4).

    `compute` [K] is in FLOPs and k is `flops_per_parameter_token`. N_opt = G (C/k)^a and
    D_opt = (C/k)^b / G with G = (alpha A / (beta B))^(1 / (alpha + beta)), a = beta / (alpha +
    beta) and b = alpha / (alpha + beta). With `n_range` N stays within the observed sizes: the loss
    at a fixed compute has one minimum in N, so the nearest observed size is the constrained best.
    """
    alpha, beta = params["alpha"], params["beta"]
    product = np.asarray(compute, float) / flops_per_parameter_token
    balance = (alpha * params["A"] / (beta * params["B"])) ** (1 / (alpha + beta))
    n_best = balance * product ** (beta / (alpha + beta))
    n = n_best if n_range is None else np.clip(n_best, *n_range)
    d = product / n
    measured = n == n_best
    if d_range is not None:
        measured &= (d >= d_range[0]) & (d <= d_range[1])
    loss = LAWS["chinchilla"].function(params, {"n": n, "d": d})
    return Frontier(np.asarray(compute, float), n, d, loss, measured)
