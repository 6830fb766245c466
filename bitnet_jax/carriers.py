"""In what dtype int8 codes enter the forward product: a measured choice between two equal ways.

int8 codes are multiplied as they are, summed in int32; or carried in bfloat16, which holds integers
up to 256 exactly, and summed in float32, which is exact below 2^24. The results are equal bit for
bit, so this is a matter of speed alone, and of the device. `python -m experiments.benchmark
--suite=carriers` measures it.
"""

import functools
from pathlib import Path

import jax

CARRIERS = ("auto", "bfloat16", "int8")

# int8's time over bfloat16's for the forward products of a block, by device, the median over the
# shapes of a few sizes and where it came from. A device that is not here has not been measured.
MEASURED = {
    "cpu, AVX512-BF16": 1.2,  # 2 cores, AMD EPYC: 1.1 to 1.4 at 95k, 7m, 24m
    "cpu, AMX": 0.8,  # 2 cores, Intel; a prototype at width 256, on an idle machine
}


def resolve(carrier: str) -> str:
    """`bfloat16` or `int8`; for `auto`, the faster one on this device, bfloat16 if unmeasured."""
    if carrier != "auto":
        return carrier
    return "int8" if MEASURED.get(device(), 1.0) < 1 else "bfloat16"


@functools.cache
def device() -> str:
    """The device's kind, as the table names it: a CPU's is what its matrix products run on."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "cpu"
    units = {"amx_int8": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI"}
    return next((f"cpu, {unit}" for flag, unit in units.items() if flag in flags), "cpu")
