"""The config's section `k8s`, checked as far as it can be without the cluster."""

import dataclasses
import math
import re
from collections.abc import Collection
from pathlib import PurePosixPath

from ml_collections import ConfigDict

from bitnet_jax.errors import ConfigError, choose, clipped, require, shown

# Chips of the slices that are one host, by accelerator and topology as GKE labels its nodes.
_FLAT = {"1x1": 1, "2x2": 4, "2x4": 8}
_CUBE = {"2x2x1": 4}
TPUS = {"tpu-v4-podslice": _CUBE, "tpu-v5-lite-podslice": _FLAT, "tpu-v5p-slice": _CUBE,
        "tpu-v6e-slice": _FLAT, "tpu7x": _CUBE}  # fmt: skip
HOST_CHIPS = 4  # of each host of a slice that several make up
_FLAT_SLICES = ("4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE_SLICES = ("2x2x2", "2x2x4", "2x4x4")  # and those of which every side is a multiple of 4
CORES = {"tpu7x": 2}  # devices of JAX a chip, where that is not 1

BOUNDS = {"workers": (1, 10_000), "hosts": (1, 10_000), "gpus": (0, 64), "cpus": (1, 4096),
          "grace": (1, 3600), "crashes": (0, 1000)}  # fmt: skip
LONGEST = 500  # characters of an image or a path
HOME = "/opt/bitnet_jax"  # where the Dockerfile puts this code
TPU_LABELS = ("cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology")

_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # DNS-1123
_NAME = rf"{_LABEL}(\.{_LABEL})*"
_WORD = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # of a label's key and value
_PART = "[a-z0-9]+([._-]+[a-z0-9]+)*"
_IMAGE = (
    rf"{_PART}(:[0-9]+)?(/{_PART})*"
    r"(?P<tag>:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?P<digest>@sha256:[0-9a-f]{64})?"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The config's section `k8s`, checked. hosts: of each worker, a pod on each. tpus: chips of a
    pod. url: of the workdir, where it is not on a claim; then `mount` is each pod's own scratch."""

    image: str
    claim: str | None
    mount: str
    workers: int
    hosts: int
    namespace: str | None
    queue: str | None
    secret: str | None
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
    hosts, tpus = _hosts_and_chips(section)
    right = "several hosts that train a run together need a folder: give k8s.claim, not a URL"
    require(hosts == 1 or url is None, "k8s.hosts", hosts, right)
    _check_selector(section.node_selector, tpus)
    return Options(**{**section.to_dict(), "hosts": hosts}, tpus=tpus, url=url)


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
        ("secret", "a Secret", _NAME, 253),
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


def _hosts_and_chips(section: ConfigDict) -> tuple[int, int]:
    """Hosts of each worker, and TPU chips of each host; 0 where no TPU is asked for."""
    accelerator, topology, hosts = section.tpu_accelerator, section.tpu_topology, section.hosts
    if accelerator is None:
        right = "give k8s.tpu_accelerator, too"
        require(topology is None, "k8s.tpu_topology", topology, right)
        return hosts or 1, 0
    choose("k8s.tpu_accelerator", accelerator, TPUS)
    right = "a worker has GPUs or TPUs; give one of them"
    require(section.gpus == 0, "k8s.gpus", section.gpus, right)
    known = TPUS[accelerator]
    chips = known.get(topology, HOST_CHIPS)
    found = 1 if topology in known else slice_chips(accelerator, topology) // chips
    right = f"a slice of {topology} has {found}; leave it out"
    require(hosts in (None, found), "k8s.hosts", hosts, right)
    return found, chips


def slice_chips(accelerator: str, topology: str | None) -> int:
    """Of a slice that several hosts make up.

    Raises:
      ConfigError: there is none of that shape.
    """
    flat = TPUS[accelerator] is _FLAT
    if topology is not None and _matches("[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}", topology):
        sides = [int(side) for side in topology.split("x")]
        tall = len(sides) == 3 and sides == sorted(sides) and all(side % 4 == 0 for side in sides)
        if topology in _FLAT_SLICES if flat else topology in _CUBE_SLICES or tall:
            return math.prod(sides)
    more = ", ".join(_FLAT_SLICES) if flat else f"{', '.join(_CUBE_SLICES)}, 4x4x4 and so on by 4"
    right = f"choose from {', '.join(TPUS[accelerator])}, or of several hosts {more}"
    raise ConfigError(f"k8s.tpu_topology={shown(topology)}: {right} for {accelerator}")


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


def devices(wanted: Options) -> int | None:
    """That a worker has, as JAX counts them; None where its nodes decide."""
    if wanted.tpus:
        return wanted.hosts * wanted.tpus * CORES.get(wanted.tpu_accelerator or "", 1)
    return wanted.hosts * (wanted.gpus or 1) if wanted.gpus or wanted.hosts > 1 else None
