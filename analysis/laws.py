"""Scaling laws: each is a formula, its parameters and where a search for them starts.

A law maps inputs to a loss in nats a token. Its inputs may be `n` (parameters), `d` (training
tokens), `c` (training FLOPs), `u` (unique tokens), a measure of precision, and `group`, an arm.

To add a law, write its formula in jax.numpy, in the units and with the names of its paper, and one
entry of `_ALL`. A search works in coordinates of its own: logarithms of positive parameters, and
amplitudes for inputs divided by their geometric means (`Parameter.scales_with`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from analysis.tables import COUNT_INPUTS, AnalysisError

Params = Mapping[str, Any]
Inputs = Mapping[str, Any]

COUNTS = COUNT_INPUTS  # the inputs that are divided by their geometric means


@dataclass(frozen=True)
class Scaled:
    """A factor (input / unit)^(sign * exponent) that a parameter's value takes up."""

    input: str
    exponent: str
    sign: int = 1
    unit: float = 1.0


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law.

    starts, bounds: of its coordinate, for inputs divided by their geometric means; as shares of
      the median loss where `in_loss_units`. They depend on no unit.
    scales_with: what turns the coordinate into the parameter of the paper: an amplitude A of
      n^-alpha is its coordinate times (geometric mean of n)^alpha.
    domain: `positive` parameters are searched as logarithms.
    group_value: of the baseline, where each further group has a parameter of its own.
    each_group: every group has one of its own, the baseline too.
    """

    name: str
    starts: tuple[float, ...]
    bounds: tuple[float, float]
    in_loss_units: bool = False
    scales_with: tuple[Scaled, ...] = ()
    domain: Literal["positive", "real"] = "positive"
    group_value: float | None = None
    each_group: bool = False
    group: str = ""

    @property
    def is_grouped(self) -> bool:
        """Whether groups have values of their own."""
        return self.each_group or self.group_value is not None

    @property
    def full_name(self) -> str:
        """With the group that it belongs to: rho[ternary]."""
        return f"{self.name}[{self.group}]" if self.group else self.name


@dataclass(frozen=True)
class Law:
    """A law. Call it with parameters and inputs, in the units of its paper, for nats a token.

    formula: of parameters and inputs that broadcast, in jax.numpy; trace it in float64.
    distinct: different values of each count without which the parameters are not determined.
    equation: with {parameter} where a parameter's name or value goes.
    groups: labels, the baseline first, once the law is bound to them.
    natural: coordinates to those parameters of which `Parameter.scales_with` cannot say it.
    """

    name: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[str, ...]
    distinct: int
    formula: Callable[[Params, Inputs], Any]
    equation: str
    source: str
    groups: tuple[str, ...] = ()
    natural: Callable[[Params, Mapping[str, Any]], Params] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, named and ordered as in the paper; a group's own behind its label."""
        return tuple(parameter.full_name for parameter in self.parameters)

    @property
    def is_grouped(self) -> bool:
        """Whether groups have parameters of their own."""
        return any(p.is_grouped for p in self.parameters)

    def bind(self, groups: Sequence[str]) -> "Law":
        """The law for these groups, the baseline first, with the parameters of each."""
        expanded: list[Parameter] = []
        for parameter in self.parameters:
            if not parameter.is_grouped:
                expanded.append(parameter)
            else:
                own = groups if parameter.each_group else groups[1:]
                expanded.extend(replace(parameter, group=label) for label in own)
        return replace(self, parameters=tuple(expanded), groups=tuple(groups))

    def evaluate(self, params: Params, inputs: Inputs) -> Any:
        """The loss, traceable. `group` is an index into `groups`."""
        if not self.groups:
            return self.formula(params, inputs)
        own = {p.name: p for p in self.parameters if p.is_grouped}
        index = jnp.asarray(inputs["group"], int)
        shared = {name: value for name, value in params.items() if "[" not in name}
        for name, parameter in own.items():
            values = [params[f"{name}[{label}]"] for label in self.groups[1:]]
            if parameter.group_value is None:
                baseline = params[f"{name}[{self.groups[0]}]"]
            else:
                baseline = jnp.full_like(values[0], parameter.group_value)
            shared[name] = _choose([baseline, *values], index)
        return self.formula(shared, inputs)

    def __call__(self, params: Params, inputs: Inputs) -> np.ndarray:
        """Nats a token, in float64, for parameters and inputs that broadcast."""
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            cast = {name: np.asarray(value, float) for name, value in params.items()}
            return np.asarray(self.evaluate(cast, {k: np.asarray(x) for k, x in inputs.items()}))

    def write(self, params: Params | None = None) -> str:
        """The equation in symbols or, given `params`, in numbers of four digits."""
        names = {parameter.name: parameter.name for parameter in self.parameters}
        if params is not None:
            names |= {k: f"{v:.4g}" for k, v in params.items() if k in names}
        return self.equation.format(**names)

    def in_units(self, coordinates: Params, scales: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of the paper from those for `input / scales[input]`."""
        natural = {} if self.natural is None else dict(self.natural(coordinates, scales))
        for parameter in self.parameters:
            if parameter.full_name in natural:
                continue
            value = coordinates[parameter.full_name]
            for by in parameter.scales_with:
                exponent = f"{by.exponent}[{parameter.group}]" if parameter.group else by.exponent
                value = value * (scales[by.input] / by.unit) ** (by.sign * coordinates[exponent])
            natural[parameter.full_name] = value
        return natural


def _choose(values: list[Any], index: Any) -> Any:
    """values[index], where both broadcast: groups are few, so a chain of selections."""
    chosen = values[0]
    for i, value in enumerate(values[1:], start=1):
        chosen = jnp.where(index == i, value, chosen)
    return chosen


# ---- Parameters that laws share ------------------------------------------------------------------


def _offset(name: str = "E") -> Parameter:
    return Parameter(name, starts=(0.2, 0.5, 0.8), bounds=(1e-6, 1.0), in_loss_units=True)


def _amplitude(name: str, of: str, exponent: str, unit: float = 1.0) -> Parameter:
    return Parameter(
        name,
        starts=(0.03, 0.1, 0.3),
        bounds=(1e-8, 2.0),
        in_loss_units=True,
        scales_with=(Scaled(of, exponent, unit=unit),),
    )


def _exponent(name: str) -> Parameter:
    return Parameter(name, starts=(0.1, 0.3, 0.8), bounds=(0.005, 4.0))


def _sum_of_powers(units: tuple[float, float] = (1.0, 1.0)) -> tuple[Parameter, ...]:
    """E, A, B, alpha and beta, of the Chinchilla form."""
    return (
        _offset(),
        _amplitude("A", "n", "alpha", units[0]),
        _amplitude("B", "d", "beta", units[1]),
        _exponent("alpha"),
        _exponent("beta"),
    )


def _of_each_group(*parameters: Parameter) -> tuple[Parameter, ...]:
    """With fewer starts each: the grid of starts grows with the groups too."""
    return tuple(replace(p, starts=p.starts[:2], each_group=True) for p in parameters)


# ---- Formulas ------------------------------------------------------------------------------------


def _to(exponent: Any, x: Any) -> Any:
    """x^exponent. As an exponential it takes a fraction of a power's time in float64."""
    return jnp.exp(exponent * jnp.log(x))


def _chinchilla(p: Params, x: Inputs) -> Any:
    return p["E"] + p["A"] * _to(-p["alpha"], x["n"]) + p["B"] * _to(-p["beta"], x["d"])


def _spectra(p: Params, x: Inputs) -> Any:
    return _chinchilla(p, {"n": x["n"] / 1e6, "d": x["d"] / 1e9})


def _power(of: str) -> Callable[[Params, Inputs], Any]:
    def formula(p: Params, x: Inputs) -> Any:
        return p["E"] + p["A"] * _to(-p["alpha"], x[of])

    return formula


def _kaplan(p: Params, x: Inputs) -> Any:
    capacity = _to(p["alpha_N"] / p["alpha_D"], p["N_c"] / x["n"])
    return _to(p["alpha_D"], capacity + p["D_c"] / x["d"])


def _kaplan_natural(q: Params, scales: Mapping[str, Any]) -> Params:
    """Its critical counts grow like loss^(1 / .08); their coordinates are losses."""
    return {
        "N_c": q["N_c"] ** (1 / q["alpha_N"]) * scales["n"],
        "D_c": q["D_c"] ** (1 / q["alpha_D"]) * scales["d"],
    }


def _data_constrained(p: Params, x: Inputs) -> Any:
    """Repeated tokens, and parameters beyond what the unique tokens can feed, decay in value."""
    unique = jnp.minimum(x["u"], x["d"])
    balance = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / p["alpha"])
    fed = jnp.minimum(balance * _to(p["beta"] / p["alpha"], unique), x["n"])
    return _chinchilla(
        p, {"n": _worth(x["n"], fed, p["R_N"]), "d": _worth(x["d"], unique, p["R_D"])}
    )


def _worth(count: Any, full: Any, decay: Any) -> Any:
    """Of `count`, the first `full` count fully; of the rest each multiple decays."""
    return full * (1 + decay * (1 - jnp.exp(-(count / full - 1) / decay)))


def _kumar(p: Params, x: Inputs) -> Any:
    kept = -jnp.expm1(-x["weight_bits"] / p["gamma_w"])
    kept = kept * -jnp.expm1(-x["activation_bits"] / p["gamma_a"])
    return _chinchilla(p, {"n": x["n"] * kept, "d": x["d"]})


def _kumar_weights(p: Params, x: Inputs) -> Any:
    kept = -jnp.expm1(-x["weight_bits"] / p["gamma_w"])
    return _chinchilla(p, {"n": x["n"] * kept, "d": x["d"]})


def _frantar(p: Params, x: Inputs) -> Any:
    return p["a"] * _to(-p["b"], x["n"] * p["eff"]) + p["c"] * _to(-p["d"], x["d"]) + p["e"]


def _qat(p: Params, x: Inputs) -> Any:
    """A group of 1 weight stands for no quantization: log2(1) = 0."""
    levels = jnp.log2(x["group_size"])
    coarseness = jnp.where(levels > 0, _to(p["gamma_G"], jnp.where(levels > 0, levels, 1.0)), 0.0)
    error = p["k"] * _to(p["gamma_D"], x["d"]) * coarseness * _to(-p["gamma_N"], x["n"])
    return _chinchilla(p, x) + error


def _unified(p: Params, x: Inputs) -> Any:
    """A representation without error (gmse 0) counts fully."""
    error = jnp.maximum(x["gmse"], 1e-30)
    capacity = jnp.tanh(p["F"] * jnp.log(error) / math.log(1 / 4)) ** p["C"]
    return _chinchilla(p, {"n": x["n"] * capacity, "d": x["d"]})


EPM_REFERENCE = {"n": 1e6, "d": 1e8}  # where rho is the multiplier itself


def effective_multiplier(p: Params, x: Inputs, group: str) -> Any:
    """EPM(N, D) of a group: what a parameter of it is worth in parameters of the baseline."""
    n, d = (np.asarray(x[name]) / EPM_REFERENCE[name] for name in ("n", "d"))
    own = {name: p.get(f"{name}[{group}]", 0.0) for name in ("rho", "mu", "nu")}
    return own["rho"] * n ** own["mu"] * d ** own["nu"]


def _constant(p: Params, x: Inputs) -> Inputs:
    """What a group's parameters are worth, wherever: rho of the baseline's."""
    return {"n": x["n"] * p["rho"], "d": x["d"]}


def _moving(p: Params, x: Inputs) -> Inputs:
    """What they are worth where that moves with N and D."""
    n, d = (x[name] / EPM_REFERENCE[name] for name in ("n", "d"))
    return {"n": x["n"] * p["rho"] * _to(p["mu"], n) * _to(p["nu"], d), "d": x["d"]}


# ---- The laws ------------------------------------------------------------------------------------


def _gamma(name: str) -> Parameter:
    return Parameter(name, starts=(0.5, 2.0), bounds=(0.01, 100.0))


def _power_law(name: str, of: str, source: str) -> Law:
    return Law(
        name=name,
        parameters=(_offset(), _amplitude("A", of, "alpha"), _exponent("alpha")),
        inputs=(of,),
        distinct=3,
        formula=_power(of),
        equation=f"L = {{E}} + {{A}} / {of.upper()}^{{alpha}}",
        source=source,
    )


_CHINCHILLA_EQUATION = "L = {E} + {A} / N^{alpha} + {B} / D^{beta}"
_SEPARATE_EQUATION = "A_g / N^alpha_g + B_g / D^beta_g for each group g"
_KAPLAN_EQUATION = "L = (({N_c} / N)^({alpha_N} / {alpha_D}) + {D_c} / D)^{alpha_D}"
_MOVING_EQUATION = "N_eff = rho (N / 10^6)^mu (D / 10^8)^nu N"
_EFFECTIVE_EQUATION = "L = {E} + {A} / N_eff^{alpha} + {B} / D^{beta}, "

_CRITICAL_COUNTS = (
    Parameter("N_c", (0.3, 0.6, 0.9), (1e-3, 2.0), in_loss_units=True),
    Parameter("D_c", (0.3, 0.6, 0.9), (1e-3, 2.0), in_loss_units=True),
    Parameter("alpha_N", (0.05, 0.1, 0.3), (0.005, 4.0)),
    Parameter("alpha_D", (0.05, 0.1, 0.3), (0.005, 4.0)),
)
_MULTIPLIER = Parameter("rho", (0.5,), (1e-5, 1e3), group_value=1.0)
_MOVING_MULTIPLIER = (
    replace(
        _MULTIPLIER,
        scales_with=(
            Scaled("n", "mu", -1, EPM_REFERENCE["n"]),
            Scaled("d", "nu", -1, EPM_REFERENCE["d"]),
        ),
    ),
    Parameter("mu", (0.0,), (-1.0, 1.0), domain="real", group_value=0.0),
    Parameter("nu", (0.0,), (-1.0, 1.0), domain="real", group_value=0.0),
)

_ALL = (
    Law(
        name="chinchilla",
        parameters=_sum_of_powers(),
        inputs=("n", "d"),
        # An additive table of r sizes and s budgets determines E, B and beta only from s = 3 on.
        distinct=3,
        formula=_chinchilla,
        equation=_CHINCHILLA_EQUATION,
        source="Hoffmann et al. 2022 (arXiv:2203.15556), eq. 10",
    ),
    _power_law("power", "c", "Henighan et al. 2020 (arXiv:2010.14701), eq. 1.1, in compute"),
    _power_law("power_n", "n", "Kaushal et al. 2024 (arXiv:2407.12327), of TriLMs and FloatLMs"),
    _power_law("power_d", "d", "Henighan et al. 2020 (arXiv:2010.14701), eq. 1.1, in tokens"),
    Law(
        name="spectra",
        parameters=_sum_of_powers((1e6, 1e9)),
        inputs=("n", "d"),
        distinct=3,
        formula=_spectra,
        equation="L = {E} + {A} / (N / 10^6)^{alpha} + {B} / (D / 10^9)^{beta}",
        source="Vaidhya et al. 2025 (Spectra 1.1, arXiv:2506.23025)",
    ),
    Law(
        name="kaplan",
        parameters=_CRITICAL_COUNTS,
        inputs=("n", "d"),
        distinct=2,
        formula=_kaplan,
        equation=_KAPLAN_EQUATION,
        source="Kaplan et al. 2020 (arXiv:2001.08361), eq. 1.5",
        natural=_kaplan_natural,
    ),
    Law(
        name="data_constrained",
        parameters=(
            *_sum_of_powers(),
            Parameter("R_N", (1.0, 10.0), (0.01, 1e4)),
            Parameter("R_D", (3.0, 30.0), (0.01, 1e4)),
        ),
        inputs=("n", "d", "u"),
        distinct=3,
        formula=_data_constrained,
        equation="L = {E} + {A} / N'^{alpha} + {B} / D'^{beta}, R_N* = {R_N}, R_D* = {R_D}",
        source="Muennighoff et al. 2023 (arXiv:2305.16264), eq. 5 and 6",
    ),
    Law(
        name="kumar",
        parameters=(*_sum_of_powers(), _gamma("gamma_w"), _gamma("gamma_a")),
        inputs=("n", "d", "weight_bits", "activation_bits"),
        distinct=3,
        formula=_kumar,
        equation=_EFFECTIVE_EQUATION
        + "N_eff = N (1 - e^(-P_w / {gamma_w})) (1 - e^(-P_a / {gamma_a}))",
        source="Kumar et al. 2024 (arXiv:2411.04330), eq. 3, for weights and activations",
    ),
    Law(
        name="kumar_weights",
        parameters=(*_sum_of_powers(), _gamma("gamma_w")),
        inputs=("n", "d", "weight_bits"),
        distinct=3,
        formula=_kumar_weights,
        equation=_EFFECTIVE_EQUATION + "N_eff = N (1 - e^(-P_w / {gamma_w}))",
        source="Kumar et al. 2024 (arXiv:2411.04330), eq. 3, for weights alone",
    ),
    Law(
        name="frantar",
        parameters=(
            _amplitude("a", "n", "b"),
            _exponent("b"),
            _amplitude("c", "d", "d"),
            _exponent("d"),
            _offset("e"),
            Parameter("eff", (0.5,), (1e-5, 1e3), group_value=1.0),
        ),
        inputs=("n", "d", "group"),
        distinct=3,
        formula=_frantar,
        equation="L = {a} / (N eff)^{b} + {c} / D^{d} + {e}",
        source="Frantar et al. 2025 (arXiv:2502.16440), of effective parameters",
    ),
    Law(
        name="qat",
        parameters=(
            *_sum_of_powers(),
            Parameter(
                "k",
                (0.003, 0.03),
                (1e-9, 1.0),
                in_loss_units=True,
                scales_with=(Scaled("n", "gamma_N"), Scaled("d", "gamma_D", -1)),
            ),
            Parameter("gamma_N", (0.2,), (0.001, 4.0)),
            Parameter("gamma_D", (0.1,), (0.001, 4.0)),
            Parameter("gamma_G", (1.0,), (0.001, 8.0)),
        ),
        inputs=("n", "d", "group_size"),
        distinct=3,
        formula=_qat,
        equation=_CHINCHILLA_EQUATION + " + {k} D^{gamma_D} log2(G)^{gamma_G} / N^{gamma_N}",
        source="Chen et al. 2025 (arXiv:2505.14302), the unified law of QAT error",
    ),
    Law(
        name="unified",
        parameters=(
            *_sum_of_powers(),
            Parameter("F", (0.3, 1.0), (1e-3, 1e3)),
            Parameter("C", (0.5, 2.0), (1e-2, 50.0)),
        ),
        inputs=("n", "d", "gmse"),
        distinct=3,
        formula=_unified,
        equation=_EFFECTIVE_EQUATION + "N_eff = N tanh({F} log_1/4 GMSE)^{C}",
        source="Panferov et al. 2025 (arXiv:2506.01863), with a capacity of 1 at no error",
    ),
    Law(
        name="rho",
        parameters=(*_sum_of_powers(), _MULTIPLIER),
        inputs=("n", "d", "group"),
        distinct=3,
        formula=lambda p, x: _chinchilla(p, _constant(p, x)),
        equation=_EFFECTIVE_EQUATION + "N_eff = rho N",
        source="Frantar et al. 2025 (arXiv:2502.16440), in Chinchilla's letters",
    ),
    Law(
        name="epm",
        parameters=(*_sum_of_powers(), *_MOVING_MULTIPLIER),
        inputs=("n", "d", "group"),
        distinct=3,
        formula=lambda p, x: _chinchilla(p, _moving(p, x)),
        equation=_EFFECTIVE_EQUATION + _MOVING_EQUATION,
        source="this project: a multiplier that moves with N and D",
    ),
    Law(
        name="kaplan_rho",
        parameters=(*_CRITICAL_COUNTS, _MULTIPLIER),
        inputs=("n", "d", "group"),
        distinct=2,
        formula=lambda p, x: _kaplan(p, _constant(p, x)),
        equation=_KAPLAN_EQUATION.replace("/ N)", "/ N_eff)") + ", N_eff = rho N",
        source="this project: a multiplier of N in Kaplan et al.'s form",
        natural=_kaplan_natural,
    ),
    Law(
        name="kaplan_epm",
        parameters=(*_CRITICAL_COUNTS, *_MOVING_MULTIPLIER),
        inputs=("n", "d", "group"),
        distinct=2,
        formula=lambda p, x: _kaplan(p, _moving(p, x)),
        equation=_KAPLAN_EQUATION.replace("/ N)", "/ N_eff)") + f", {_MOVING_EQUATION}",
        source="this project: a multiplier that moves with N and D, in Kaplan et al.'s form",
        natural=_kaplan_natural,
    ),
    Law(
        name="shared_offset",
        parameters=(_offset(), *_of_each_group(*_sum_of_powers()[1:])),
        inputs=("n", "d", "group"),
        distinct=3,
        formula=_chinchilla,
        equation="L = {E} + " + _SEPARATE_EQUATION,
        source="Hoffmann et al. 2022 (arXiv:2203.15556), eq. 10, of groups that share E",
    ),
    Law(
        name="separate",
        parameters=_of_each_group(*_sum_of_powers()),
        inputs=("n", "d", "group"),
        distinct=3,
        formula=_chinchilla,
        equation="L = E_g + " + _SEPARATE_EQUATION,
        source="Hoffmann et al. 2022 (arXiv:2203.15556), eq. 10, of each group alone",
    ),
)

LAWS: dict[str, Law] = {law.name: law for law in _ALL}


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
    loss = LAWS["chinchilla"](params, {"n": n, "d": d})
    return Frontier(np.asarray(compute, float), n, d, loss, measured)
