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

A worker on several hosts (`k8s.hosts`, or a TPU slice of more than one) is a gang: a JobSet of its
own with a pod on each host, which train every run together. None can go on without the others, so
Kubernetes ends them all when one ends badly, and starts them anew together, by the same table: the
rule that its Job fails by, and the message that the Job controller writes then, tell JobSet (0.10
and later) whether to count it. A pod that vanishes without a word, so that another notices first
and crashes, counts as a crash.
"""

import hashlib
import json
import re
from typing import Any

import yaml

from experiments.launch.k8s_options import HOME, TPU_LABELS, Options

USER = 1000  # whom the Dockerfile makes
STOPPED, CRASHED = [143], [134, 137, 139]  # see above; Kubernetes wants them in order
SWEEP_LABEL = "bitnet-jax/sweep"
HOSTS_LABEL = "bitnet-jax/hosts"  # of each worker
INDEX = "WORKER_INDEX"  # variable of a pod: which of its gang it is
# All pods of a slice on one slice, and no others there.
ONE_SLICE = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
SHARED_MEMORY = "shared-memory"
PORT = 8476  # of a gang's first pod, where the others find it

HEADER = """\
# Workers, by `python -m experiments.run --launcher=k8s`, of the sweep
#     {name}
# A pod that is stopped (143) or disrupted is replaced without being counted; one that crashes or
# runs out of memory (134, 137, 139) {crashes} times. What is known of the runs is {where}.
"""
GANGS = """\
# Each worker is {hosts} pods, which are replaced together; a JobSet a worker.
"""


def sweep_id(wanted: Options, name: str) -> str:
    """Of a sweep's folder on a claim or at a URL, as a label and the start of names. At most 36
    characters, since Kubernetes makes names of 63 of it for pods."""
    words = re.sub("[^a-z0-9]+", "-", name.lower())[:16].strip("-")
    digest = hashlib.sha256(json.dumps([wanted.url or wanted.claim, name]).encode()).hexdigest()[:8]
    return "-".join(word for word in ("bitnet-jax", words, digest) if word)


def manifest(wanted: Options, name: str, number: int, command: list[str]) -> str:
    """The YAML of the workers: one JobSet, or of gangs one each. name: the sweep's. number: of the
    first JobSet, from 1."""
    documents = (
        [_jobset(wanted, name, number, command)]
        if wanted.hosts == 1
        else [_jobset(wanted, name, number + i, command) for i in range(wanted.workers)]
    )
    where = "on the claim" if wanted.url is None else "where --workdir says"
    header = HEADER.format(name=name, crashes=wanted.crashes, where=where)
    if wanted.hosts > 1:
        header += GANGS.format(hosts=wanted.hosts)
    return header + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=96)


def _jobset(wanted: Options, name: str, number: int, command: list[str]) -> dict[str, Any]:
    sweep, gang = sweep_id(wanted, name), wanted.hosts > 1
    labels = {SWEEP_LABEL: sweep}
    if gang:
        labels[HOSTS_LABEL] = str(wanted.hosts)
    queue = {"kueue.x-k8s.io/queue-name": wanted.queue} if wanted.queue else {}
    namespace = {"namespace": wanted.namespace} if wanted.namespace else {}
    jobset = f"{sweep}-{number}"
    pods = wanted.hosts if gang else wanted.workers
    pod = _pod_spec(wanted, [argument.replace("$", "$$") for argument in command]
                    + (_together(wanted, jobset) if gang else []))  # fmt: skip
    # JobSet's own count of restarts is for gangs. The Job of single workers fails once each of them
    # has ended, some badly: nothing is left to restart.
    policy = _gang_policy(wanted) if gang else {"maxRestarts": 0}
    job = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        **({"backoffLimit": 0} if gang else {"backoffLimitPerIndex": wanted.crashes}),
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _gang_rules() if gang else _failure_rules()},
        "template": {"metadata": {"labels": {SWEEP_LABEL: sweep}}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": jobset,
            **namespace,
            "labels": {**labels, **queue},
            **({"annotations": ONE_SLICE} if gang and wanted.tpus else {}),
        },
        "spec": {
            "failurePolicy": policy,
            "network": {"enableDNSHostnames": gang},
            "replicatedJobs": [{"name": "worker", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _together(wanted: Options, jobset: str) -> list[str]:
    """The arguments by which the pods of a gang find each other. GKE tells JAX of a TPU slice."""
    if wanted.tpus:
        return ["--distributed=auto"]
    first = f"{jobset}-worker-0-0.{jobset}:{PORT}"  # JobSet's name of the pod and of their service
    return [f"--distributed={first}", f"--processes={wanted.hosts}", f"--process=$({INDEX})"]


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


def _gang_rules() -> list[dict[str, Any]]:
    """By which the Job of a gang fails, and says why. What fits none fails it, too, since no pod of
    it is tried again, but for another reason."""
    codes = {"containerName": "worker", "operator": "In", "values": sorted(STOPPED + CRASHED)}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        {"action": "FailJob", "onPodConditions": disrupted},
        {"action": "FailJob", "onExitCodes": codes},
    ]


def _gang_policy(wanted: Options) -> dict[str, Any]:
    """What JobSet does about a gang whose Job has failed: the first rule that fits."""
    by_rule = {"onJobFailureReasons": ["PodFailurePolicy"]}
    stopped = ["has condition DisruptionTarget", *(f"failed with exit code {n} " for n in STOPPED)]
    return {
        "maxRestarts": wanted.crashes,
        "rules": [
            {"name": "stopped", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_rule,
             "onJobFailureMessagePatterns": stopped},
            {"name": "crashed", "action": "RestartJobSet", **by_rule},
            {"name": "ended", "action": "FailJobSet"},
        ],
    }  # fmt: skip


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
        "volumes": [{"name": "results", **_volume(wanted)}, *_shared_memory(wanted)],
    }


def _shared_memory(wanted: Options) -> list[dict[str, Any]]:
    """By which the GPUs of a pod talk where they have no link of their own; 64 MB are usual."""
    several = wanted.gpus > 1
    return [{"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory"}}] if several else []


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
        "command": command,
        "env": [*_index(wanted), *({"name": k, "value": v} for k, v in environment.items())],
        **({"envFrom": [{"secretRef": {"name": wanted.secret}}]} if wanted.secret else {}),
        **(resources if requests else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "results", "mountPath": wanted.mount},
            *({"name": v["name"], "mountPath": "/dev/shm"} for v in _shared_memory(wanted)),
        ],
    }


def _index(wanted: Options) -> list[dict[str, Any]]:
    """Which of its gang a pod is, where JAX is not told by the node."""
    if wanted.hosts == 1 or wanted.tpus:
        return []
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [{"name": INDEX, "valueFrom": {"fieldRef": {"fieldPath": path}}}]


def _device(wanted: Options) -> tuple[str, int]:
    """What Kubernetes calls the accelerator, and how many of it each pod has."""
    return ("google.com/tpu", wanted.tpus) if wanted.tpus else ("nvidia.com/gpu", wanted.gpus)
