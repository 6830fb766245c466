"""The sizes, as data. A size is named by its non-embedding parameters, norms included.

From `7m` up, widths are multiples of 256, as the packed formats of other engines need. Below it
are the sizes that train within minutes on a laptop. Feed-forward width is 2.5 to 3 times the width
(8/3 in LLaMA), so that the MLP's three matrices hold about twice what attention's four hold.
"""

from typing import NamedTuple

from bitnet_jax.errors import choose


class Shape(NamedTuple):
    """What a size fixes of a transformer."""

    layers: int
    width: int
    ff_width: int
    heads: int
    kv_heads: int


LADDER: dict[str, Shape] = {
    #              L     D      F    N   K
    "27k": Shape(2, 32, 96, 2, 2),
    "56k": Shape(2, 48, 128, 3, 3),
    "95k": Shape(2, 64, 160, 2, 2),
    "160k": Shape(3, 64, 192, 2, 2),
    "330k": Shape(3, 96, 256, 3, 3),
    "800k": Shape(4, 128, 352, 4, 4),
    "1.5m": Shape(5, 160, 416, 5, 5),
    "2.7m": Shape(6, 192, 512, 6, 6),
    "7m": Shape(8, 256, 768, 4, 4),
    "24m": Shape(8, 512, 1280, 8, 8),
    "60m": Shape(9, 768, 2048, 12, 12),
    "200m": Shape(16, 1024, 2816, 16, 16),
    "570m": Shape(20, 1536, 4096, 24, 24),
    "1.2b": Shape(24, 2048, 5632, 16, 16),
    "3b": Shape(26, 3072, 8192, 24, 24),
    "7b": Shape(32, 4096, 11008, 32, 32),
    "70b": Shape(80, 8192, 28672, 64, 8),
}


def get_shape(size: str) -> Shape:
    """The ladder's entry called `size`.

    Raises:
      ConfigError: no such size.
    """
    choose("model.size", size, LADDER)
    return LADDER[size]
