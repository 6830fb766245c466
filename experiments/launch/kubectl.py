"""What is asked of a Kubernetes cluster, by kubectl: submit workers, list them, delete them."""

import dataclasses
import json
import re
from typing import Any

from bitnet_jax.errors import ConfigError
from experiments.launch import commands, k8s
from experiments.launch.commands import ask
from experiments.launch.k8s_options import Options

JOBSETS = "jobsets.jobset.x-k8s.io"


@dataclasses.dataclass(frozen=True)
class JobSet:
    """What was submitted at once. state: active, suspended, completed or failed."""

    name: str
    state: str
    workers: int

    @property
    def ended(self) -> bool:
        return self.state in ("completed", "failed")


@dataclasses.dataclass(frozen=True)
class Pod:
    """A worker. state: as Kubernetes says, in small letters. reason: why it waits or has ended."""

    name: str
    state: str
    since: str
    node: str
    reason: str


def check_there() -> None:
    """Raises ConfigError where it is not installed."""
    right = ("--launcher=k8s asks the cluster by it; install it, or take the manifest that "
             "--dry_run prints to where it is: kubectl apply -f FILE")  # fmt: skip
    commands.check_there(["kubectl"], right)


def apply(manifest: str) -> None:
    """Raises ConfigError where the cluster refuses it."""
    ask("kubectl", "apply", "--filename=-", given=manifest)


def jobsets(wanted: Options, sweep: str) -> list[JobSet]:
    """What was submitted for a sweep and was not deleted since, in this order.

    Raises:
      ConfigError: the cluster does not answer.
    """
    found = []
    for item in _get(wanted, sweep, JOBSETS):
        spec, status = item["spec"], item.get("status", {})
        going = "suspended" if spec.get("suspend") else "active"
        state = (status.get("terminalState") or going).lower()
        pods = sum(job["template"]["spec"]["parallelism"] for job in spec["replicatedJobs"])
        hosts = int(item["metadata"].get("labels", {}).get(k8s.HOSTS_LABEL, 1))
        found.append(JobSet(item["metadata"]["name"], state, pods // hosts))
    return sorted(found, key=lambda one: submission(one.name))


def submission(name: str) -> int:
    """Its number, of its JobSet's name; 0 where another gave the name."""
    last = name.rpartition("-")[2]
    return int(last) if re.fullmatch("[1-9][0-9]{0,8}", last, re.ASCII) else 0


def pods(wanted: Options, sweep: str) -> list[Pod]:
    """A sweep's workers that the cluster knows of, those that have ended included.

    Raises:
      ConfigError: the cluster does not answer.
    """
    return [_pod(item) for item in _get(wanted, sweep, "pods")]


def delete(wanted: Options, found: list[JobSet]) -> None:
    """Raises ConfigError where the cluster refuses it."""
    if found:
        names = [one.name for one in found]
        ask("kubectl", "delete", JOBSETS, *_namespace(wanted), "--wait=false", *names)


def _namespace(wanted: Options) -> list[str]:
    return [f"--namespace={wanted.namespace}"] if wanted.namespace else []


def _get(wanted: Options, sweep: str, kind: str) -> list[dict[str, Any]]:
    selector = f"--selector={k8s.SWEEP_LABEL}={sweep}"
    text = ask("kubectl", "get", kind, *_namespace(wanted), selector, "--output=json")
    try:
        return json.loads(text)["items"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"kubectl: get {kind} did not print a list in JSON") from error


def _pod(item: dict[str, Any]) -> Pod:
    metadata, status = item["metadata"], item.get("status", {})
    state = "terminating" if "deletionTimestamp" in metadata else status.get("phase", "unknown")
    return Pod(
        name=metadata["name"],
        state=state.lower(),
        since=status.get("startTime", ""),
        node=item["spec"].get("nodeName", ""),
        reason=_reason(status),
    )


def _reason(status: dict[str, Any]) -> str:
    """Why a pod waits or how it has ended, as far as Kubernetes says so."""
    for container in status.get("containerStatuses", []):
        state = container.get("state", {})
        if "terminated" in state:
            ended = state["terminated"]
            said = (ended.get("message") or "").strip().splitlines()
            words = [f"status {ended['exitCode']}", ended.get("reason", ""), *said[-1:]]
            return ": ".join(word for word in words if word)
        if "waiting" in state:
            return state["waiting"].get("reason", "")
    unmet = [each for each in status.get("conditions", []) if each.get("status") == "False"]
    return status.get("reason") or next((each.get("message", "") for each in unmet), "")
