"""The numbers of docs/scaling.md are what the command prints, and are right."""

from pathlib import Path

import pytest

from bitnet_jax import cost
from experiments import scaling

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"


def test_the_document_has_the_tables_that_the_command_prints(capsys):
    assert scaling.main([]) == 0
    printed = capsys.readouterr().out
    document = DOCUMENT.read_text(encoding="utf-8")
    for title, table in scaling.tables().items():
        assert table in printed and f"## {title}\n" in document
        own = document.partition(f"## {title}\n")[2].partition("\n## ")[0]
        assert [line for line in own.splitlines() if line.startswith("|")] == table.splitlines()


def test_flops_by_hand():
    """7b: 6 FLOPs a weight and token, and attention's and the head's; 23 tokens a parameter."""
    c, n = scaling.model("7b"), cost.count_parameters(scaling.model("7b"))
    attention = 12 * c.layers * scaling.LENGTH * c.width
    per_token = 6 * n.quantized + attention + 6 * c.width * 32_000
    assert scaling.run_flops("7b") == pytest.approx(23 * n.total * per_token)
    one_chip = 3.6e3 * 989e12 * 0.4
    assert scaling.chip_hours(one_chip, "NVIDIA H200", 0.4) == pytest.approx(1)


def test_wire_bytes():
    kernels = cost.count_parameters(scaling.model("70b")).quantized
    assert scaling.gathered_bytes("70b", 16, 2) == 2 * kernels
    assert scaling.gathered_bytes("70b", 8, 512) / scaling.gathered_bytes("70b", 16, 512) == 0.5
    assert scaling.gathered_bytes("70b", 2, 512) / scaling.gathered_bytes("70b", 16, 512) == 0.125
    assert scaling.reduced_bytes("7b", 1) == 0


def test_fewest_devices_are_the_fewest():
    n = scaling.fewest_devices("7b", "ternary", 95)
    fits = [scaling.device_bytes("7b", "ternary", k) <= 95e9 for k in (n // 2, n)]
    assert fits == [False, True]


def test_usage(capsys):
    assert scaling.main(["--size=7b"]) == 2
    assert capsys.readouterr().err == "error: --size=7b: it takes no arguments\n"
    assert scaling.main(["--help"]) == 0
