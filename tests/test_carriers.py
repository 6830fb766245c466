"""The carrier of int8 codes: what `auto` is on a device, measured or not."""

import re

import pytest

from bitnet_jax import carriers


@pytest.fixture
def on(monkeypatch):
    """Pretend to run on a device, with a table of our own."""
    table = {"fast int8": 0.7, "slow int8": 1.3, "equal": 1.0}
    monkeypatch.setattr(carriers, "MEASURED", table)
    return lambda device: monkeypatch.setattr(carriers, "device", lambda: device)


@pytest.mark.parametrize(
    "device, faster",
    [("fast int8", "int8"), ("slow int8", "bfloat16"), ("equal", "bfloat16"),
     ("never measured", "bfloat16")],
)  # fmt: skip
def test_auto_is_the_faster_one_where_it_was_measured(on, device, faster):
    on(device)
    assert carriers.resolve("auto") == faster
    assert [carriers.resolve(c) for c in ("int8", "bfloat16")] == ["int8", "bfloat16"]


def test_the_table_holds_ratios_of_devices_by_name():
    for device, ratio in carriers.MEASURED.items():
        assert re.fullmatch(r"\S.*\S", device) and 0.1 < ratio < 10


@pytest.mark.parametrize(
    "flags, name",
    [("fpu sse2", "cpu"), ("avx512_vnni avx512_bf16", "cpu, AVX512-BF16"),
     ("avx512_vnni", "cpu, AVX512-VNNI"), ("avx512_bf16 amx_int8 amx_tile", "cpu, AMX"),
     ("not_amx_int8", "cpu"), (None, "cpu")],
)  # fmt: skip
def test_a_cpu_is_named_by_its_best_unit(monkeypatch, tmp_path, flags, name):
    """By whole words of its flags; `cpu` where the system does not say."""
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"model name\t: some CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(carriers, "Path", lambda path: file)
    assert carriers.device.__wrapped__() == name


def test_an_accelerator_is_named_by_its_kind(monkeypatch):
    class Device:
        device_kind = "Some GPU"

    monkeypatch.setattr(carriers.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(carriers.jax, "devices", lambda: [Device()])
    assert carriers.device.__wrapped__() == "Some GPU"
