"""Manifests as they should be: the .yaml files beside this one.

python -m tests.k8s.golden     # writes them anew; read the difference before you keep it
"""

from pathlib import Path

from bitnet_jax.configs import default
from experiments.launch import k8s, k8s_options

FOLDER = Path(__file__).parent
IMAGE = "registry.example.org:5000/team/bitnet_jax:v1"
COMMAND = ["python", "-m", "experiments.run", "--sweep", "--worker", "--workdir=/results",
           "--config=sweeps/isoflop.py:size=800k"]  # fmt: skip
CASES = {
    "cpu": {},
    "gpu": {
        "image": f"registry.example.org/bitnet_jax@sha256:{'0123456789abcdef' * 4}",
        "mount": "/mnt/filestore/results",
        "namespace": "research",
        "queue": "team.gpus",
        "service_account": "trainer",
        "workers": 16,
        "gpus": 1,
        "cpus": 8,
        "memory": "32Gi",
        "node_selector": "cloud.google.com/gke-accelerator=nvidia-l4,spot=",
        "grace": 25,
        "crashes": 3,
    },
    "tpu": {
        "queue": "tpus",
        "workers": 4,
        "tpu_accelerator": "tpu-v6e-slice",
        "tpu_topology": "2x4",
    },
    "gpu_gangs": {"queue": "team.gpus", "workers": 2, "hosts": 2, "gpus": 8},
    "tpu_slice": {"tpu_accelerator": "tpu-v6e-slice", "tpu_topology": "4x4", "queue": "tpus"},
    "objects": {"url": "gs://team/sweeps", "claim": None, "gpus": 1, "service_account": "trainer"},
}


def options(url: str | None = None, **section: object) -> k8s_options.Options:
    """A section k8s with an image and a claim, checked."""
    config = default.get_config()
    config.k8s.update({"image": IMAGE, "claim": "results", **section})
    return k8s_options.options(config, url)


def made(case: str) -> str:
    """The manifest of a case."""
    wanted = options(**CASES[case])
    at = [f"--workdir={wanted.url}", f"--scratch={wanted.mount}"] if wanted.url else None
    command = COMMAND if at is None else [*COMMAND[:5], *at, *COMMAND[6:]]
    return k8s.manifest(wanted, "isoflop_800k", 1, command)


def path(case: str) -> Path:
    return FOLDER / f"{case}.yaml"


if __name__ == "__main__":
    for case in CASES:
        path(case).write_text(made(case))
