"""What every size of the ladder costs in every arm: analytic, nothing is trained.

    python -m experiments.ladder [--csv=FILE] [--vocab_size=32000] [--sequence_length=2048]
        [--node=7nm|45nm]

Parameters, training FLOPs a token, bits of the stored model, and the energy of one token's
arithmetic by process, from `bitnet_jax/cost.py`.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from rich.table import Table

from bitnet_jax import cost, ladder
from bitnet_jax.model import TransformerConfig
from bitnet_jax.precision import PRECISIONS
from experiments import display


def costs(vocab_size: int, sequence_length: int, node: str = "7nm") -> pd.DataFrame:
    """One row a size and arm. node: of the energy, a key of `cost.ENERGY_PJ`."""
    rows = []
    for size, shape in ladder.LADDER.items():
        model = TransformerConfig(vocab_size=vocab_size, **shape._asdict())
        parameters = cost.count_parameters(model)
        for name, arm in PRECISIONS.items():
            rows.append(
                {
                    "size": size,
                    "precision": name,
                    "params_total": parameters.total,
                    "params_non_embedding": parameters.non_embedding,
                    "params_quantized": parameters.quantized,
                    "training_flops_per_token": cost.training_flops_per_token(
                        model, sequence_length
                    ),
                    "model_bits": cost.model_bits(model, arm),
                    "energy_pj_per_token": cost.energy_per_token(model, arm, sequence_length, node),
                }
            )
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--node", default="7nm", choices=cost.ENERGY_PJ)
    options = parser.parse_args(argv)
    if options.vocab_size < 1 or options.sequence_length < 1:
        print("error: --vocab_size and --sequence_length must be positive", file=sys.stderr)
        return 2
    table = costs(options.vocab_size, options.sequence_length, options.node)
    if options.csv:
        try:
            table.to_csv(options.csv, index=False)
        except OSError as error:
            reason = error.strerror or error  # pandas has checks of its own
            print(f"error: {options.csv}: cannot write there ({reason})", file=sys.stderr)
            return 2
    _show(table, options.node)
    return 0


def _show(table: pd.DataFrame, node: str) -> None:
    shown = Table(
        title="bits: of the stored model; energy: of one token's arithmetic, microjoules",
        title_justify="left",
    )
    shown.add_column("size")
    arms = list(table["precision"].unique())
    columns = ["params", "non-emb.", "train FLOPs a token"]
    columns += [f"bits {arm}" for arm in arms] + [f"energy {arm}" for arm in arms]
    columns += ["fp16 / ternary"]
    for column in columns:
        shown.add_column(column, justify="right")
    for size, rows in table.groupby("size", sort=False):
        first, by_arm = rows.iloc[0], rows.set_index("precision")
        shown.add_row(
            str(size),
            display.count(first["params_total"]),
            display.count(first["params_non_embedding"]),
            display.count(first["training_flops_per_token"]),
            *(display.count(by_arm["model_bits"][arm]) for arm in arms),
            *(f"{by_arm['energy_pj_per_token'][arm] / 1e6:.3g}" for arm in arms),
            f"{energy_ratio(by_arm):.1f}",
        )
    screen = display.console()
    screen.print(shown)
    screen.print(assumptions(node), soft_wrap=True)


def energy_ratio(by_arm: pd.DataFrame) -> float:
    """The energy of float16's token over ternary's. by_arm: rows of a size, by precision."""
    energy = by_arm["energy_pj_per_token"]
    return energy["fp16"] / energy["ternary"]


def assumptions(node: str) -> str:
    """What the energies are made of."""
    units = "; ".join(
        f"{kind} {add:g} / {multiply:g}" for kind, (add, multiply) in cost.ENERGY_PJ[node].items()
    )
    return (
        f"energy: additions / multiplications at {node}, picojoules: {units} (BitNet's papers, "
        "arXiv:2310.11453 and 2402.17764). Ternary products add in int8 and multiply by scales in "
        "fp16; attention and head are fp16 (fp32 in that arm). Arithmetic alone: moving weights "
        "and activations is not in it"
    )


if __name__ == "__main__":
    sys.exit(main())
