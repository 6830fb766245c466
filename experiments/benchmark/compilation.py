"""Compiling a program: how long it takes without help from a cache, and what it will hold."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Nothing is read from the persistent cache inside, nor written to it."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _enable_cache(False)
    try:
        yield
    finally:
        _enable_cache(before)


def _enable_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX asks for the setting once


def peak_bytes(program: Any) -> int:
    """The most that a program holds at once, as the compiler planned it: all but the code.

    A donated argument and the result in its place count once.
    """
    plan = program.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return held - plan.alias_size_in_bytes
