"""The command of this package: prepares text for training, and tells what was prepared."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from bitnet_jax.data.corpora import BUILT_IN, resolve
from bitnet_jax.data.corpus import SPLITS, load
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.prepare import prepare
from bitnet_jax.data.tokenizers import train_tokenizer
from bitnet_jax.errors import one_line

_DESCRIPTION = "Prepares text for training, and tells what was prepared."
_SOURCE_HELP = (
    "text: a .txt, .jsonl (also .gz, .xz, .zst) or .parquet file, a directory or glob of those, "
    "hf:NAME[:CONFIG[:SPLIT]], or wikitext-2; may be repeated"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see -h\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit status: 0, or 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        with _progress_on_stderr():
            arguments.run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Shows what this package logs, and leaves the process's logging as it was.

    The root logger is absl's, which grain brings along: hence our own, and no propagation.
    """
    logger = logging.getLogger("bitnet_jax")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bitnet_jax.data", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("prepare", help="turn text into token files")
    command.set_defaults(run=_prepare)
    _add_text(command)
    command.add_argument(
        "--valid", action="append", metavar="PATH", help="validation text, instead of a split"
    )
    command.add_argument(
        "--tokenizer", required=True, metavar="bytes|FILE", help="a byte a token, or a tokenizer"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the directory to make")
    command.add_argument(
        "--valid_fraction", type=float, default=0.01, metavar="X", help="of documents (%(default)s)"
    )
    command.add_argument(
        "--megabytes", type=float, metavar="X", help="of the sources, at most; default: all of them"
    )
    command.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    command.add_argument(
        "--keep_duplicates", action="store_true", help="equal documents stay; default: the first"
    )

    command = commands.add_parser("info", help="print what a prepared corpus holds")
    command.set_defaults(run=_info)
    command.add_argument("corpus", metavar="DIR|NAME", help=f"NAME: {', '.join(BUILT_IN)}")

    command = commands.add_parser("train_tokenizer", help="train a byte-level BPE tokenizer")
    command.set_defaults(run=_train_tokenizer)
    _add_text(command)
    command.add_argument("--vocab_size", type=int, default=8192, metavar="N", help="(%(default)s)")
    command.add_argument(
        "--characters", type=int, default=24_000_000, metavar="N", help="of text (%(default)s)"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    return parser


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--source", action="append", required=True, metavar="PATH", help=_SOURCE_HELP
    )
    command.add_argument(
        "--text_field", default="text", metavar="NAME", help="field of .jsonl, column of .parquet"
    )


def _prepare(arguments: argparse.Namespace) -> None:
    megabytes = arguments.megabytes
    if megabytes is not None and not 1e-6 <= megabytes < math.inf:
        raise DataError(f"megabytes={megabytes}: must be positive and finite")
    prepare(
        arguments.source,
        arguments.tokenizer,
        arguments.out,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        valid_sources=arguments.valid,
        text_field=arguments.text_field,
        most_bytes=None if megabytes is None else round(megabytes * 1e6),
        keep_duplicates=arguments.keep_duplicates,
    )
    _print_corpus(arguments.out)


def _info(arguments: argparse.Namespace) -> None:
    _print_corpus(resolve(arguments.corpus))


def _print_corpus(path) -> None:
    corpus = load(path)
    tokenizer = corpus.manifest["tokenizer"]["name"]
    print(f"{corpus.name}: tokenizer {tokenizer}, vocab_size {corpus.vocab_size}, {corpus.path}")
    for split in SPLITS:
        counts = corpus.manifest["splits"][split]
        print(
            f"  {split}: {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, "
            f"{counts['documents']:,} documents"
            + (f", {counts['duplicates']:,} duplicates left out" if "duplicates" in counts else "")
        )


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    train_tokenizer(
        arguments.source,
        arguments.vocab_size,
        arguments.out,
        arguments.characters,
        arguments.text_field,
    )


if __name__ == "__main__":
    sys.exit(main())
