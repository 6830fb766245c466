"""The part of JobSet's published schema that the tests hold manifests against.

    python -m tests.k8s.schema jobset.x-k8s.io_jobsets.yaml     # config/components/crd/bases there

writes jobset.schema.json beside this file. Of the CustomResourceDefinition's openAPIV3Schema it
leaves out the descriptions, the status, and whole fields that no manifest here uses. Since `strict`
refuses every field that it does not know, what is left out is refused, and not let pass.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
SCHEMA = FOLDER / "jobset.schema.json"
COMMENT = (
    "Part of config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of "
    "https://github.com/kubernetes-sigs/jobset at v0.12.0 (f22e565a), Copyright The Kubernetes "
    "Authors, Apache License 2.0 (LICENSE-jobset). Changed: descriptions, the status and unused "
    "fields are left out, by tests/k8s/schema.py."
)
LEFT_OUT = {
    "spec": {"coordinator", "startupPolicy", "successPolicy", "volumeClaimPolicies"},
    "job": {"selector", "successPolicy"},
    "pod": {"affinity", "dnsConfig", "ephemeralContainers", "hostAliases", "initContainers",
            "overhead", "resourceClaims", "resources", "topologySpreadConstraints"},
    "container": {"lifecycle", "livenessProbe", "ports", "readinessProbe",
                  "resizePolicy", "restartPolicyRules", "startupProbe", "volumeDevices"},
}  # fmt: skip
VOLUMES = {"emptyDir", "name", "persistentVolumeClaim"}


def extract(definition: dict[str, Any]) -> dict[str, Any]:
    """The schema of v1alpha2 of a CustomResourceDefinition, as this file's docstring says."""
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1alpha2")
    schema = _without_descriptions(version["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    spec = schema["properties"]["spec"]["properties"]
    job = spec["replicatedJobs"]["items"]["properties"]["template"]["properties"]["spec"]
    pod = job["properties"]["template"]["properties"]["spec"]["properties"]
    container = pod["containers"]["items"]["properties"]
    volume = pod["volumes"]["items"]["properties"]
    for name, fields in (("spec", spec), ("job", job["properties"]), ("pod", pod),
                         ("container", container)):  # fmt: skip
        for field in LEFT_OUT[name]:
            del fields[field]
    for field in volume.keys() - VOLUMES:
        del volume[field]
    return {"$comment": COMMENT, **schema}


def _without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_descriptions(each) for key, each in value.items()
                if not (key == "description" and isinstance(each, str))}  # fmt: skip
    return [_without_descriptions(each) for each in value] if isinstance(value, list) else value


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON Schema that refuses unknown fields, where the former drops them.

    metadata, of which a CustomResourceDefinition says nothing, has the fields that are used.
    """
    metadata = {"name": _STRING, "namespace": _STRING, "labels": _STRINGS, "annotations": _STRINGS}
    top = {**schema["properties"], "metadata": {"type": "object", "properties": metadata}}
    needed = ["apiVersion", "kind", "metadata", "spec"]
    return _closed({**schema, "properties": top, "required": needed})


_STRING = {"type": "string"}
_STRINGS = {"type": "object", "additionalProperties": _STRING}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {key: _closed(each) for key, each in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            closed[key] = _closed(schema[key])
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not is_open:
        closed["additionalProperties"] = False
    return closed


if __name__ == "__main__":
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    SCHEMA.write_text(json.dumps(extract(definition), indent=1) + "\n")
