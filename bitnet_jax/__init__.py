"""BitNet b1.58 in JAX: ternary transformers and their 16-bit twins, for scaling-law experiments."""

__version__ = "0.1.0"
