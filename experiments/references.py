"""Lines to read a loss by: what n-grams trained on the same text reach on the same tokens."""

import math

from analysis.ngram import ngram_table
from bitnet_jax.data import validation_positions
from experiments.plan import Plan

NAMES = {2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}
LARGEST_CORPUS = 50_000_000  # tokens; beyond it, counting takes longer than it tells


def references(plan: Plan) -> dict[str, float]:
    """Label to nats a token on the plan's own validation rows.

    Interpolated Witten-Bell n-grams up to five tokens, and the exact entropy rate where the corpus
    is the synthetic language. Cached beside the results.
    """
    corpus, data = plan.corpus, plan.runs[0].spec.data
    found = {}
    if "entropy_rate_nats" in corpus.manifest:
        found["entropy rate of the language"] = corpus.manifest["entropy_rate_nats"]
    highest = min(max(NAMES), math.ceil(63 / math.log2(corpus.vocab_size)) - 1)
    if highest < 2 or len(corpus.train) > LARGEST_CORPUS:
        return found
    positions = validation_positions(corpus.valid, data.sequence_length, data.eval_tokens)
    table = ngram_table(
        corpus.train,
        corpus.valid,
        corpus.vocab_size,
        highest,
        positions=positions,
        cache_path=plan.directory / "ngrams.json",
    )
    kind = "byte" if corpus.manifest["tokenizer"]["name"] == "bytes" else "token"
    found |= {f"{kind} {NAMES[n]} (Witten-Bell)": table[n] for n in NAMES if n in table}
    return found
