"""A run's tokenizer in the words of other clients, with the ids that the model was trained on."""

import json
from typing import Any, NamedTuple

from bitnet_jax.data.readers import END_OF_TEXT
from bitnet_jax.errors import ConfigError
from bitnet_jax.export.model import TrainedModel

NUL = "\0"  # the end of text of plain bytes
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_document(model: TrainedModel) -> dict[str, Any]:
    """The content of a `tokenizer.json`: the run's own file, or one that makes bytes of text.

    Symbols that are no text are written as their numbers, with spaces between them.
    """
    if model.tokenizer is not None:
        return json.loads(model.tokenizer.read_text(encoding="utf-8"))
    if model.symbols is not None:
        return _numbers(model.config.vocab_size)
    # The character NUL is found in the text itself, before bytes become characters, so that the
    # character of byte 0 is in no one's way.
    names = [NUL, *byte_characters()[1:]]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split_nothing = {**_BYTE_LEVEL, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": NUL, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": split_nothing,
        "post_processor": None,
        "decoder": split_nothing,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: byte for byte, name in enumerate(names)},
            "merges": [],
        },
    }


def _numbers(count: int) -> dict[str, Any]:
    """A word that is no number below `count` is an error of the client's, not another symbol."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {str(symbol): symbol for symbol in range(count)},
            "unk_token": "no symbol",
        },
    }


def end_of_text(model: TrainedModel) -> str | None:
    """The text of the token between documents, if any, as `tokenizer_document` spells it."""
    if model.end_of_text is None:
        return None
    return NUL if model.tokenizer is None else END_OF_TEXT


class Vocabulary(NamedTuple):
    """What a GGUF file says of a byte-level BPE.

    tokens: one an id, special ones in `special`, ids that mean nothing in `unused`.
    merges: pairs of tokens with a space between them, the first merged first.
    """

    tokens: list[str]
    merges: list[str]
    special: set[int]
    unused: set[int]


def vocabulary(model: TrainedModel) -> Vocabulary:
    """The run's tokenizer as a GGUF file holds it.

    Raises:
      ConfigError: it is no byte-level BPE of GPT-2's kind, the only one that can be told of here,
        or the tokens are no text.
    """
    if model.symbols is not None:
        raise ConfigError(
            f"corpus {model.symbols!r}: its tokens are symbols and no text, and a GGUF file "
            "describes a tokenizer of text; export it with --format=hf or --format=packed"
        )
    if model.tokenizer is None:
        # Clients want merges, and the library writes no empty list. No text has these two tokens.
        never = f"{END_OF_TEXT} {END_OF_TEXT}"
        return Vocabulary([END_OF_TEXT, *byte_characters()[1:]], [never], {0}, set())
    document = tokenizer_document(model)
    pieces = document.get("pre_tokenizer") or {}
    gpt2 = document.get("normalizer") is None and document["model"].get("type") == "BPE"
    if not gpt2 or pieces.get("type") != "ByteLevel" or not pieces.get("use_regex", True):
        raise ConfigError(
            f"tokenizer {model.tokenizer}: a GGUF file describes byte-level BPEs that split text "
            "as GPT-2's does, which this one is not; export it with --format=hf"
        )
    named = {**document["model"]["vocab"]}
    added = document.get("added_tokens", [])
    named.update((token["content"], token["id"]) for token in added)
    by_id = {number: name for name, number in named.items()}
    unused = set(range(model.config.vocab_size)) - set(by_id)
    tokens = [by_id.get(i, f"<unused{i}>") for i in range(model.config.vocab_size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    return Vocabulary(tokens, merges, {token["id"] for token in added}, unused)
