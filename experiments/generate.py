"""Text from a trained model: from a run, or from a packed file.

    python -m experiments.generate --run=results/single/runs/RUN_ID --prompt="The"
    python -m experiments.generate --packed=model.packed --prompt="The" --temperature=0 --json

Options: --tokens=N (as many as the context has room for)  --temperature=T (1; 0: the likeliest)
--top_k=K  --top_p=P  --seed=N  --count=N texts  --activations=none (those of the arm are not
quantized)  --beyond (the context that the model was trained on)  --tokenizer=FILE (of a packed
model that was trained with one)  --products=auto|xla|pallas (of packed trits; auto: on a GPU
pallas, not tried there yet, elsewhere xla)  --json
A text ends with the end of text, too. Equal options give equal texts on the same machine.
Exit status: 0, or 2 with one line for what cannot be done.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from bitnet_jax.data import DataError
from bitnet_jax.data.readers import Document, sha256_of
from bitnet_jax.data.tokenizers import Tokenizer, open_tokenizer
from bitnet_jax.deployed import Deployed, deploy
from bitnet_jax.errors import ConfigError, choose, one_line, require
from bitnet_jax.export import packed
from bitnet_jax.generate import Sampling, decoder, generate
from bitnet_jax.model import TransformerConfig
from bitnet_jax.packed_dot import chosen_products
from bitnet_jax.precision import Precision, without_activation_quantization
from experiments.run import quiet_libraries
from experiments.runs import load_run

MOST = 2**20  # tokens, texts, or a position


class Source(NamedTuple):
    """A model and what turns its tokens into text. name: of where it is from."""

    name: str
    config: TransformerConfig
    precision: Precision
    model: Deployed
    context_length: int
    tokenizer: Tokenizer
    end_of_text: int


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    quiet_libraries()
    try:
        options = _parser().parse_args(argv)
        document = _generate(options)
    except (ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        for text in document["texts"]:
            print(document["prompt"] + text["text"], end="\n\n" if options.count > 1 else "\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """Its complaints are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m experiments.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path)
    source.add_argument("--packed", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--activations")
    parser.add_argument("--beyond", action="store_true")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--products", default="auto")
    parser.add_argument("--json", action="store_true")
    return parser


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    sampling = _sampling(options)
    source = _of_run(options) if options.run else _of_file(options)
    prompt = _prompt(options.prompt, source)
    tokens = _room(options, source, len(prompt))
    config, precision = source.config, source.precision
    if options.activations:
        precision = without_activation_quantization(precision)
    model = decoder(config, precision, source.model, products=options.products)
    began = time.perf_counter()
    drawn = generate(
        config, precision, model, prompt, options.seed, tokens, options.count, sampling,
        source.end_of_text,
    )  # fmt: skip
    texts = [_text(source, row) for row in drawn.tolist()]
    return {
        "model": source.name,
        "precision": precision.name,
        "prompt": options.prompt,
        "prompt_tokens": len(prompt),
        "sampling": sampling._asdict(),
        "seed": options.seed,
        "seconds": time.perf_counter() - began,
        "texts": texts,
    }


def _sampling(options: argparse.Namespace) -> Sampling:
    """The options that need no model, checked before one is read."""
    for key in ("tokens", "count", "top_k"):
        value = getattr(options, key)
        require(value is None or 1 <= value <= MOST, key, value, f"it must be from 1 to {MOST}")
    require(0 <= options.seed < 2**31, "seed", options.seed, "it must be from 0 to 2^31 - 1")
    temperature = options.temperature
    finite = math.isfinite(temperature) and temperature >= 0
    require(finite, "temperature", temperature, "it must be 0 or more")
    require(0 < options.top_p <= 1, "top_p", options.top_p, "it must be above 0 and at most 1")
    if options.activations is not None:
        choose("activations", options.activations, ("none",))
    chosen_products(options.products)
    return Sampling(temperature, options.top_k, options.top_p)


def _of_run(options: argparse.Namespace) -> Source:
    if options.tokenizer:
        raise ConfigError(f"tokenizer={str(options.tokenizer)!r}: a run has its own; leave it out")
    run = load_run(options.run)
    model = run.trained_model()
    if model.symbols is not None:
        raise ConfigError(
            f"run={str(options.run)!r}: its corpus {run.corpus.name!r} is no text (tokenizer "
            f"{model.symbols!r}); give a run of one that is"
        )
    assert model.end_of_text is not None  # of text
    tokenizer = open_tokenizer(str(model.tokenizer) if model.tokenizer else "bytes")
    return Source(
        run.spec.run_id,
        dataclasses.replace(model.config, attention="blocks"),
        model.precision,
        deploy(model.params, model.precision),
        model.context_length,
        tokenizer,
        model.end_of_text,
    )


def _of_file(options: argparse.Namespace) -> Source:
    found = packed.read(options.packed)
    name, sha256 = found.tokenizer["name"], found.tokenizer["sha256"]
    if sha256 is None and name != "bytes":
        raise ConfigError(
            f"packed={str(options.packed)!r}: its tokens are symbols of {name!r} and no text; give "
            "a model of text"
        )
    tokenizer = _tokenizer_of_file(options, sha256)
    assert found.end_of_text is not None  # of text, as `packed.read` has made sure
    vocab = found.config.vocab_size
    require(vocab <= tokenizer.vocab_size, "packed", str(options.packed), f"{vocab} tokens")
    return Source(
        found.provenance.get("run_id", str(options.packed)),
        found.config,
        found.precision,
        found.model,
        found.context_length,
        tokenizer,
        found.end_of_text,
    )


def _tokenizer_of_file(options: argparse.Namespace, sha256: str | None) -> Tokenizer:
    """Bytes, or the tokenizer file that the model was trained with and no other."""
    given = options.tokenizer
    if sha256 is None:
        if given:
            raise ConfigError(f"tokenizer={str(given)!r}: the model reads bytes; leave it out")
        return open_tokenizer("bytes")
    wanted = f"the file with sha256 {sha256}, tokenizer.json of the corpus"
    if given is None:
        raise ConfigError(f"packed={str(options.packed)!r}: give --tokenizer={wanted}")
    if not given.is_file() or sha256_of(given) != sha256:
        raise ConfigError(f"tokenizer={str(given)!r}: not the model's; give {wanted}")
    return open_tokenizer(str(given))


def _prompt(text: str, source: Source) -> np.ndarray:
    """Its tokens; an empty one is the end of another text."""
    if not text:
        return np.asarray([source.end_of_text], np.int32)
    try:
        document = Document(text.encode(), "prompt")
    except UnicodeEncodeError as error:
        raise ConfigError("prompt: it must be UTF-8") from error
    tokens = source.tokenizer.encode([document])[0].astype(np.int32)
    vocab = source.config.vocab_size
    require(int(tokens.max()) < vocab, "prompt", text, f"a token beyond the model's {vocab}")
    return tokens


def _room(options: argparse.Namespace, source: Source, prompt: int) -> int:
    """How many tokens to draw."""
    context, tokens = source.context_length, options.tokens
    if options.beyond:
        tokens = context if tokens is None else tokens
        if prompt + tokens > context:
            print(
                f"note: positions beyond the {context} that the model was trained on",
                file=sys.stderr,
            )
        return tokens
    room = context - prompt
    if room < 1:
        raise ConfigError(
            f"prompt: {prompt} tokens, and the model was trained on {context} positions; give "
            f"fewer than {context}, or --beyond"
        )
    if tokens is not None and tokens > room:
        raise ConfigError(
            f"tokens={tokens}: with the prompt's {prompt} more than the {context} positions that "
            f"the model was trained on; give at most {room}, or --beyond"
        )
    return tokens or room


def _text(source: Source, tokens: list[int]) -> dict[str, Any]:
    ended = source.end_of_text in tokens
    if ended:
        tokens = tokens[: tokens.index(source.end_of_text)]
    return {"text": source.tokenizer.decode(tokens), "tokens": tokens, "ended": ended}


if __name__ == "__main__":
    sys.exit(main())
