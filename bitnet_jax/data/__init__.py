"""Text to token files to batches. In short:

    corpus = load(resolve("wikitext-2"))
    batch = train_batches(corpus.train, sequence_length=128, batch_size=32, seed=0)[step]
    inputs, targets = batch[:, :-1], batch[:, 1:]

What a user can get wrong raises `DataError`, whose message is one line.
"""

from bitnet_jax.data.batches import (
    RowReader,
    TrainBatches,
    train_batches,
    validation_positions,
    validation_rows,
)
from bitnet_jax.data.corpora import BUILT_IN, resolve
from bitnet_jax.data.corpus import Corpus, load
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.prepare import prepare
from bitnet_jax.data.synthetic import SyntheticLanguage
from bitnet_jax.data.tokenizers import train_tokenizer

__all__ = [
    "BUILT_IN",
    "Corpus",
    "DataError",
    "RowReader",
    "SyntheticLanguage",
    "TrainBatches",
    "load",
    "prepare",
    "resolve",
    "train_batches",
    "train_tokenizer",
    "validation_positions",
    "validation_rows",
]
