"""The named sizes."""

import re

import pytest

from bitnet_jax.cost import count_parameters
from bitnet_jax.errors import ConfigError
from bitnet_jax.ladder import LADDER, get_shape
from bitnet_jax.model import TransformerConfig

UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def named_count(size):
    return float(size[:-1]) * UNITS[size[-1]]


@pytest.mark.parametrize("size", LADDER)
def test_size_is_what_its_name_says(size):
    config = TransformerConfig(vocab_size=1000, **get_shape(size)._asdict())
    assert count_parameters(config).non_embedding == pytest.approx(named_count(size), rel=0.1)


@pytest.mark.parametrize("size", LADDER)
def test_shape_is_valid(size):
    shape = get_shape(size)
    assert shape.width % shape.heads == 0 and shape.heads % shape.kv_heads == 0
    assert shape.width // shape.heads % 2 == 0  # rotary positions turn pairs
    assert 2.5 <= shape.ff_width / shape.width <= 3.5
    if named_count(size) >= 7e6:  # what packed formats need
        assert shape.width % 256 == shape.ff_width % 256 == 0


def test_sizes_ascend():
    assert list(LADDER) == sorted(LADDER, key=named_count)
    assert all(re.fullmatch(r"[\d.]+[kmb]", size) for size in LADDER)


def test_unknown_size_lists_the_known_ones():
    with pytest.raises(ConfigError, match="model.size='60' is unknown.*7m, 24m, 60m"):
        get_shape("60")
