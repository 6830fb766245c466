"""A finished run for the programs that people run models with. A command.

    python -m experiments.export --run=results/single/runs/RUN_ID --format=hf --out=model
    python -m experiments.export --run=results/single/runs/RUN_ID --format=gguf --out=model.gguf
    python -m experiments.export --run=results/single/runs/RUN_ID --format=packed --out=model.packed

`hf` is a directory that Hugging Face transformers loads, `gguf` a file for llama.cpp or bitnet.cpp,
`packed` one for experiments.generate.
What was written is read back and compared with the run before it gets its name: codes, scales, all
else, and the client's logits where the client is installed. A model that the client would compute
otherwise is refused.

Options of hf: --weights=packed|master  --scale=multiplies|divides (bitnet_jax/export/hf.py)
Options of gguf: --type=TQ2_0|TQ1_0|F16|F32|I2_S  --embedding=F32|F16|Q8_0
(bitnet_jax/export/gguf.py; I2_S is bitnet.cpp's)
Options of packed: --packing=base3|2bit  --floats=float32|bfloat16|float16
(bitnet_jax/export/packed.py)
--reference=FILE.npz also writes held-out tokens [B, T] and the run's own logits [B, T, V], computed
in float32, for others to check against; where activations are quantized, those without, too.
--json prints the comparison as JSON.
Exit status: 0; 1 where the comparison failed, and nothing is written; 2 with one line for what
cannot be done.
"""

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int32
from rich.table import Table

from bitnet_jax.data import DataError, validation_rows
from bitnet_jax.errors import ConfigError, choose, one_line
from bitnet_jax.export import gguf, hf, packed
from bitnet_jax.export.clients import able
from bitnet_jax.export.model import TrainedModel
from bitnet_jax.export.verify import Check, evaluate
from bitnet_jax.files import creating_directory, replacing
from experiments import display
from experiments.run import quiet_libraries
from experiments.runs import FinishedRun, load_run

REFERENCE_LOGITS = 1 << 22  # at most, or one row
PACKAGES = ("jax", "torch", "transformers", "gguf", "llama-cpp-python")  # that a result depends on


class Format(NamedTuple):
    """A kind of file.

    layout: makes what `write` and `verify` take of the format's own options, whose choices are
      `options`. creating: a context with a temporary name, whole or not at all.
    write: (model, path, layout). verify: (model, path, layout, rows) -> checks.
    """

    layout: Callable[..., Any]
    options: Mapping[str, tuple[str, ...]]
    creating: Callable[[Path], contextlib.AbstractContextManager[Path]]
    write: Callable[[TrainedModel, Path, Any], None]
    verify: Callable[[TrainedModel, Path, Any, np.ndarray], Iterator[Check]]


def _write_packed(model: TrainedModel, path: Path, layout: packed.Layout) -> None:
    packed.write(model, path, *layout)


def _verify_packed(
    model: TrainedModel, path: Path, layout: packed.Layout, rows: np.ndarray
) -> Iterator[Check]:
    facts = packed.verify(model, path)
    allowed = {"of the deviation": 0.0} if facts["exact"] else {}
    found = {"of the deviation": facts["logit_difference"]}
    yield Check("codes, scales and the rest: equal", {}, {}, True)
    yield Check("logits", found, allowed, True, "" if facts["exact"] else "16-bit floats: rounded")
    sizes = {name: facts[name] for name in ("weights", "bits_a_weight", "entropy")}
    yield Check("size", sizes, {}, None)


FORMATS = {
    "hf": Format(hf.Layout, hf.OPTIONS, creating_directory, hf.write, hf.verify),
    "gguf": Format(gguf.Layout, gguf.OPTIONS, replacing, gguf.write, gguf.verify),
    "packed": Format(packed.Layout, packed.OPTIONS, replacing, _write_packed, _verify_packed),
}


class Mismatch(Exception):
    """What was written is not the run."""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    quiet_libraries()
    try:
        options = _parser().parse_args(argv)
        document, failed = _export(options)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        _show(document)
    if failed:
        print(f"error: {options.out}: not what the run is; it was removed", file=sys.stderr)
    return int(failed)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m experiments.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--format", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--json", action="store_true")
    for name in {name: None for kind in FORMATS.values() for name in kind.options}:
        parser.add_argument(f"--{name}")
    return parser


def _export(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Write, compare, and only then rename. Gives what to show, and whether that failed."""
    choose("format", options.format, FORMATS)
    kind, layout = FORMATS[options.format], _layout(options)
    for key in ("out", "reference"):
        path = getattr(options, key)
        if path is not None and path.exists():
            raise ConfigError(f"{key}={str(path)!r}: it exists; remove it or name another")
    run = load_run(options.run)
    model, rows = run.trained_model(), _rows(run)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    checks: list[Check] = []
    failed = False
    try:
        with kind.creating(options.out) as path:
            kind.write(model, path, layout)
            checks = list(kind.verify(model, path, layout, rows))
            if any(check.holds is False for check in checks):
                raise Mismatch
        if options.reference:
            _write_reference(options.reference, model, rows)
    except (Mismatch, packed.Different) as error:
        if str(error):
            print(f"error: {one_line(error)}", file=sys.stderr)
        failed = True
    return _document(options, layout, model, checks), failed


def _layout(options: argparse.Namespace) -> Any:
    kind, given = FORMATS[options.format], {}
    for name, other in ((name, f) for f, row in FORMATS.items() for name in row.options):
        value = getattr(options, name)
        if value is None:
            continue
        if name not in kind.options:
            raise ConfigError(f"{name}={value!r}: it goes with --format={other}")
        choose(name, value, kind.options[name])
        given[name] = value
    return kind.layout(**given)


def _rows(run: FinishedRun) -> Int32[np.ndarray, "R T"]:
    """Held-out rows, without each one's last token, which is only ever predicted."""
    spec = run.spec
    rows = validation_rows(run.corpus.valid, spec.data.sequence_length, spec.data.eval_tokens)
    return np.asarray(rows)[:, :-1].astype(np.int32)


def _write_reference(path: Path, model: TrainedModel, rows: Int32[np.ndarray, "R T"]) -> None:
    most = max(1, REFERENCE_LOGITS // (rows.shape[1] * model.config.vocab_size))
    tokens = rows[:most]
    arrays: dict[str, Any] = {"tokens": tokens, "logits": evaluate(model, tokens)}
    if model.precision.activations != "none":
        arrays["logits_activations_not_quantized"] = evaluate(model, tokens, quantized=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _document(
    options: argparse.Namespace, layout: Any, model: TrainedModel, checks: list[Check]
) -> dict[str, Any]:
    out = options.out
    files = [out] if out.is_file() else sorted(out.iterdir()) if out.exists() else []
    return {
        "run_id": model.provenance["run_id"],
        "format": options.format,
        **layout._asdict(),
        "out": str(out),
        "bytes": sum(file.stat().st_size for file in files),
        "clients": able(model),
        "checks": [check._asdict() for check in checks],
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _show(document: dict[str, Any]) -> None:
    title = f"{document['run_id']} as {document['out']}, {document['bytes']:,} bytes"
    table = Table(title=title, title_justify="left")
    for column in ("compared with the run", "found", "allowed", ""):
        table.add_column(column)
    verdicts = {True: "ok", False: "WRONG", None: ""}
    for check in document["checks"]:
        found = check["note"] or _numbers(check["found"])
        table.add_row(check["what"], found, _numbers(check["allowed"]), verdicts[check["holds"]])
    display.console().print(table)
    print(f"clients that compute this model: {', '.join(document['clients'])}")


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}"


if __name__ == "__main__":
    sys.exit(main())
