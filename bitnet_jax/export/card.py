"""The README of an exported directory: what the model is, and the run that it came from."""

from bitnet_jax.cost import count_parameters
from bitnet_jax.export.model import TrainedModel


def card(model: TrainedModel) -> str:
    """A model card, Markdown."""
    c, arm = model.config, model.precision
    count = count_parameters(c)
    tokenizer, prompt, what = "byte-level BPE", "The", "text"
    if model.symbols is not None:
        what = "rows of symbols"
        tokenizer, prompt = f"none: symbols of {model.symbols}, which is no text, as numbers", "0 1"
    elif model.tokenizer is None:
        tokenizer = "bytes of UTF-8"
    rows = {
        "parameters": f"{count.total:,}, {count.non_embedding:,} without embedding and head",
        "shape": f"{c.layers} blocks, width {c.width}, feed-forward {c.ff_width}, {c.heads} heads, "
        f"{c.kv_heads} key-value heads",
        "block": f"norms {c.norms}, {c.activation} gate, head {_head(c.tied_embeddings)}",
        "weights": arm.weights if arm.quantized else arm.name,
        "activations": arm.activations,
        "trained on rows of": f"{model.context_length} tokens",
        "tokenizer": f"{tokenizer}, {c.vocab_size} ids",
        **model.provenance,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    name = model.provenance.get("run_id", "model")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A base language model from a scaling-law experiment with bitnet_jax: it continues {what}.

| | |
|---|---|
{table}

```
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

Needs torch, transformers and accelerate. `TORCHDYNAMO_DISABLE=1` spares minutes of compiling on a
CPU and gives the same numbers.
"""


def _head(tied: bool) -> str:
    return "tied to the embedding" if tied else "of its own"
