"""Workers as an indexed Job of a Kubernetes JobSet: the config's section `k8s`, and the manifest.

Kubernetes, and Kueue where a queue is given, start, evict and replace the pods; what is done and
what is left stands in the sweep's folder on the claim alone, so that pods may be lost, added and
deleted at any time. What is submitted for a sweep is known by a label, which holds a digest of the
claim and the sweep's name.

The statuses that a worker ends with mean what they mean to the Slurm launcher:

    0                       nothing is left for it
    143, or any where the pod was disrupted: evicted, preempted, drained, its node lost
                            a new pod in its place, however often
    134, 137, 139           crashed, killed or out of memory: a new pod, k8s.crashes times
    any other               it is not started again; the other workers go on

Unlike there, what a worker gets done between two crashes does not begin its count anew; that of
each run's failures, in the sweep's folder, does (failures.py).

A worker sees the devices of one host, since a run trains in one process so far. A TPU slice of
several hosts is therefore refused: libtpu waits there until all of them have come.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

import yaml
from ml_collections import ConfigDict

from bitnet_jax.errors import ConfigError, choose, clipped, require, shown

# Chips of the slices that are one host, by accelerator and topology as GKE labels its nodes.
_FLAT = {"1x1": 1, "2x2": 4, "2x4": 8}
_CUBE = {"2x2x1": 4}
TPUS = {"tpu-v4-podslice": _CUBE, "tpu-v5-lite-podslice": _FLAT, "tpu-v5p-slice": _CUBE,
        "tpu-v6e-slice": _FLAT, "tpu7x": _CUBE}  # fmt: skip

BOUNDS = {"workers": (1, 10_000), "gpus": (0, 64), "cpus": (1, 4096), "grace": (1, 3600),
          "crashes": (0, 1000)}  # fmt: skip
LONGEST = 500  # characters of an image or a path
HOME = "/opt/bitnet_jax"  # where the Dockerfile puts this code
USER = 1000  # whom the Dockerfile makes
STOPPED, CRASHED = [143], [134, 137, 139]  # see above; Kubernetes wants them in order
SWEEP_LABEL = "bitnet-jax/sweep"
TPU_LABELS = ("cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology")

_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # DNS-1123
_NAME = rf"{_LABEL}(\.{_LABEL})*"
_WORD = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # of a label's key and value
_PART = "[a-z0-9]+([._-]+[a-z0-9]+)*"
_IMAGE = (
    rf"{_PART}(:[0-9]+)?(/{_PART})*"
    r"(?P<tag>:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?P<digest>@sha256:[0-9a-f]{64})?"
)

HEADER = """\
# Workers, by `python -m experiments.run --launcher=k8s`, of the sweep
#     {name}
# A pod that is stopped (143) or disrupted is replaced without being counted; one that crashes or
# runs out of memory (134, 137, 139) {crashes} times. What is known of the runs is {where}.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The config's section `k8s`, checked. tpus: chips of each worker. url: of the workdir, where
    it is not on a claim; then `mount` is each pod's own scratch."""

    image: str
    claim: str | None
    mount: str
    workers: int
    namespace: str | None
    queue: str | None
    service_account: str | None
    gpus: int
    tpu_accelerator: str | None
    tpu_topology: str | None
    tpus: int
    cpus: int | None
    memory: str | None
    node_selector: str | None
    grace: int
    crashes: int
    mixed_code: bool
    url: str | None


# What is wanted


def options(config: ConfigDict, url: str | None = None) -> Options:
    """The section of a config. url: the workdir, if it is one.

    Raises:
      ConfigError: a value that is missing or cannot work.
    """
    section = config.k8s
    for key, (least, most) in BOUNDS.items():
        fits = section[key] is None or least <= section[key] <= most
        require(fits, f"k8s.{key}", section[key], f"it must lie in [{least}, {most}]")
    _check_image(section.image)
    if url is not None:
        right = f"leave it out: the workdir is {clipped(url)}"
        require(section.claim is None, "k8s.claim", section.claim, right)
    _check_names(section, () if url is not None else ("claim",))
    _check_mount(section.mount)
    memory, right = section.memory, "a number and Mi, Gi or Ti, such as 16Gi"
    fits = memory is None or _matches("[1-9][0-9]{0,8}(Mi|Gi|Ti)", memory)
    require(fits, "k8s.memory", memory, right)
    tpus = _tpu_chips(section)
    _check_selector(section.node_selector, tpus)
    return Options(**section.to_dict(), tpus=tpus, url=url)


def _matches(pattern: str, value: str) -> bool:
    return re.fullmatch(pattern, value, re.ASCII) is not None


def _check_image(image: str | None) -> None:
    right = "give the image that the Dockerfile made, such as registry/bitnet_jax:v1"
    found = re.fullmatch(_IMAGE, image, re.ASCII) if image and len(image) <= LONGEST else None
    require(found is not None, "k8s.image", image, right)
    assert found is not None
    fixed = found["digest"] or (found["tag"] or ":latest") != ":latest"
    right = "give a tag other than latest, or a digest: all pods of a sweep must run the same code"
    require(bool(fixed), "k8s.image", image, right)


def _check_names(section: ConfigDict, needed: Collection[str]) -> None:
    """Of what has to be there in the cluster, by the rules for its names (DNS-1123)."""
    for key, what, pattern, most in (
        ("claim", "a PersistentVolumeClaim that many nodes can write", _NAME, 253),
        ("namespace", "a namespace", _LABEL, 63),
        ("queue", "a LocalQueue of Kueue", _NAME, 63),
        ("service_account", "a service account", _NAME, 253),
    ):
        value = section[key]
        fits = value is not None and len(value) <= most and _matches(pattern, value)
        right = f"the name of {what}: a-z, 0-9 and -, at most {most} characters"
        require(fits or (value is None and key not in needed), f"k8s.{key}", value, right)


def _check_mount(mount: str) -> None:
    plain = len(mount) <= LONGEST and _matches("(/[A-Za-z0-9_.-]+)+", mount)
    plain = plain and ".." not in mount.split("/")
    apart = not PurePosixPath(HOME).is_relative_to(mount) and not mount.startswith(f"{HOME}/")
    right = f"an absolute path of letters, digits and . _ -, apart from {HOME}, where the code is"
    require(plain and apart, "k8s.mount", mount, right)


def _tpu_chips(section: ConfigDict) -> int:
    """Of each worker; 0 where no TPU is asked for."""
    accelerator, topology = section.tpu_accelerator, section.tpu_topology
    if accelerator is None:
        right = "give k8s.tpu_accelerator, too"
        require(topology is None, "k8s.tpu_topology", topology, right)
        return 0
    choose("k8s.tpu_accelerator", accelerator, TPUS)
    right = "a worker has GPUs or TPUs; give one of them"
    require(section.gpus == 0, "k8s.gpus", section.gpus, right)
    known = TPUS[accelerator]
    if topology in known:
        return known[topology]
    several = "" if topology is None else _hosts(topology, known)
    right = f"{several}choose from {', '.join(known)} for {accelerator}"
    raise ConfigError(f"k8s.tpu_topology={shown(topology)}: {right}")


def _hosts(topology: str, known: dict[str, int]) -> str:
    """What is said of a slice that several hosts make up; nothing of what is no slice at all."""
    (dimensions,) = {name.count("x") for name in known}
    sides = topology.split("x")
    if not _matches("[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}", topology):
        return ""
    chips = math.prod(int(side) for side in sides)
    if len(sides) != dimensions + 1 or chips <= max(known.values()):
        return ""
    return (f"its {chips} chips are on several hosts, and a run trains in one process so far; give "
            "more k8s.workers, each a slice of one host: ")  # fmt: skip


def _check_selector(selector: str | None, tpus: int) -> None:
    seen = set(TPU_LABELS) if tpus else set()
    for label in [] if selector is None else selector.split(","):
        right = "labels of nodes, each as key=value, with commas between them"
        require(_is_label(label), "k8s.node_selector", selector, right)
        key = label.partition("=")[0]
        right = f"{key} is asked for twice; give each label once, TPUs by k8s.tpu_..."
        require(key not in seen, "k8s.node_selector", selector, right)
        seen.add(key)


def _is_label(label: str) -> bool:
    key, equals, value = label.partition("=")
    prefix, slash, word = key.rpartition("/")
    prefixed = not slash or (len(prefix) <= 253 and _matches(_NAME, prefix))
    return bool(equals) and prefixed and _matches(_WORD, word) and _matches(f"({_WORD})?", value)


# The manifest


def sweep_id(wanted: Options, name: str) -> str:
    """Of a sweep's folder on a claim or at a URL, as a label and the start of names. At most 36
    characters, since Kubernetes makes names of 63 of it for pods."""
    words = re.sub("[^a-z0-9]+", "-", name.lower())[:16].strip("-")
    digest = hashlib.sha256(json.dumps([wanted.url or wanted.claim, name]).encode()).hexdigest()[:8]
    return "-".join(word for word in ("bitnet-jax", words, digest) if word)


def manifest(wanted: Options, name: str, number: int, command: list[str]) -> str:
    """The YAML of a JobSet of workers. name: the sweep's. number: of the submission, from 1."""
    sweep = sweep_id(wanted, name)
    labels = {SWEEP_LABEL: sweep}
    queue = {"kueue.x-k8s.io/queue-name": wanted.queue} if wanted.queue else {}
    namespace = {"namespace": wanted.namespace} if wanted.namespace else {}
    job = {
        "completionMode": "Indexed",
        "completions": wanted.workers,
        "parallelism": wanted.workers,
        "backoffLimitPerIndex": wanted.crashes,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": {"metadata": {"labels": labels}, "spec": _pod_spec(wanted, command)},
    }
    document = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": f"{sweep}-{number}", **namespace, "labels": {**labels, **queue}},
        "spec": {
            # The Job fails once each worker has ended, some badly: nothing is left to restart.
            "failurePolicy": {"maxRestarts": 0},
            "network": {"enableDNSHostnames": False},
            "replicatedJobs": [{"name": "worker", "replicas": 1, "template": {"spec": job}}],
        },
    }
    where = "on the claim" if wanted.url is None else "where --workdir says"
    header = HEADER.format(name=name, crashes=wanted.crashes, where=where)
    return header + yaml.dump(document, Dumper=_Plain, sort_keys=False, width=96)


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice out twice: an alias is hard to read, and to edit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _failure_rules() -> list[dict[str, Any]]:
    """The first that fits decides; what none fits counts against the worker."""

    def exits(operator: str, values: list[int]) -> dict[str, Any]:
        return {"containerName": "worker", "operator": operator, "values": values}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        {"action": "Ignore", "onPodConditions": disrupted},
        {"action": "Ignore", "onExitCodes": exits("In", STOPPED)},
        {"action": "FailIndex", "onExitCodes": exits("NotIn", CRASHED)},
    ]


def _pod_spec(wanted: Options, command: list[str]) -> dict[str, Any]:
    device, count = _device(wanted)
    labels = wanted.node_selector.split(",") if wanted.node_selector else []
    selector: dict[str, Any] = dict(label.split("=") for label in labels)
    if wanted.tpus:
        accelerator, topology = TPU_LABELS
        selector |= {accelerator: wanted.tpu_accelerator, topology: wanted.tpu_topology}
    account = {"serviceAccountName": wanted.service_account} if wanted.service_account else {}
    taint = {"key": device, "operator": "Exists", "effect": "NoSchedule"}
    return {
        **account,
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": wanted.grace,
        # Else the worker is process 1, to which SIGTERM does nothing until Python handles it.
        "shareProcessNamespace": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"nodeSelector": selector} if selector else {}),
        **({"tolerations": [taint]} if count else {}),
        "containers": [_container(wanted, command)],
        "volumes": [{"name": "results", **_volume(wanted)}],
    }


def _volume(wanted: Options) -> dict[str, Any]:
    if wanted.url is not None:  # each pod trains on its node's disk, and sends what it has
        return {"emptyDir": {}}
    return {"persistentVolumeClaim": {"claimName": wanted.claim}}


def _container(wanted: Options, command: list[str]) -> dict[str, Any]:
    device, count = _device(wanted)
    environment = {"PYTHONUNBUFFERED": "1", "BITNET_JAX_CACHE": f"{wanted.mount}/.cache"}
    if count:  # alone: with cpu beside it a worker that sees no GPU would go on on the CPU
        environment["JAX_PLATFORMS"] = "tpu" if wanted.tpus else "cuda"
    limits = {device: str(count)} if count else {}
    requests = dict(limits)
    if wanted.cpus:
        requests["cpu"] = str(wanted.cpus)
    if wanted.memory:
        requests["memory"] = limits["memory"] = wanted.memory
    asked = {"requests": requests, "limits": limits}
    resources = {"resources": {key: value for key, value in asked.items() if value}}
    return {
        "name": "worker",
        "image": wanted.image,
        "workingDir": HOME,
        "command": [argument.replace("$", "$$") for argument in command],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        **(resources if requests else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "results", "mountPath": wanted.mount}],
    }


def _device(wanted: Options) -> tuple[str, int]:
    """What Kubernetes calls the accelerator, and how many of it each worker has."""
    return ("google.com/tpu", wanted.tpus) if wanted.tpus else ("nvidia.com/gpu", wanted.gpus)
