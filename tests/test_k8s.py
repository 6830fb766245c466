"""--launcher=k8s where kubectl is a stand-in: the manifest, what is refused, and the tables.

No cluster has seen these manifests. What can be known without one: they are what the files in
`tests/k8s` have, they fit JobSet's published schema without a field that it does not know, they
keep the rules that the API server adds to it, and the pods' exit statuses lead where they should.
"""

import functools
import json
import math
import os
import re

import jsonschema
import pytest
import yaml
from run_files import write_summary
from test_cluster import calls, fake
from test_config_fuzz import VALUES
from test_launch_local import write_sweep

from bitnet_jax.errors import ConfigError
from bitnet_jax.files import write_json
from experiments import cluster, cluster_k8s
from experiments.launch import k8s, k8s_options, store
from experiments.launch.leases import Leases
from experiments.plan import load_config, load_points, make_plan
from experiments.run import main
from tests.k8s import golden
from tests.k8s.schema import SCHEMA, strict

GANGS = [case for case in golden.CASES if golden.options(**golden.CASES[case]).hosts > 1]
OPEN_STORE = store.open_store
VALIDATOR = jsonschema.Draft202012Validator(strict(json.loads(SCHEMA.read_text())))


def job_of(document):
    (replicated,) = document["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(document):
    return job_of(document)["template"]["spec"]


def container_of(document):
    (container,) = pod_of(document)["containers"]
    return container


def all_made(command=("true",), name="tiny", number=1, **section):
    text = k8s.manifest(golden.options(**section), name, number, list(command))
    return list(yaml.safe_load_all(text))


def made(*args, **section):
    (document,) = all_made(*args, **section)
    return document


def documents(case):
    return list(yaml.safe_load_all(golden.made(case)))


# The manifest


@pytest.mark.parametrize("case", golden.CASES)
def test_the_manifest_is_as_it_was(case):
    """Where that is intended: python -m tests.k8s.golden."""
    assert golden.made(case) == golden.path(case).read_text()


@pytest.mark.parametrize("case", golden.CASES)
def test_the_manifest_fits_the_published_schema(case):
    for document in documents(case):
        errors = VALIDATOR.iter_errors(document)
        assert [f"{error.json_path}: {error.message}" for error in errors] == []


def change(document, path, value):
    """The manifest with a value at a path of keys and places."""
    *parents, last = path.split(".")
    for key in parents:
        document = document[int(key) if key.isdigit() else key]
    document[last] = value


JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.failurePolicies", {"maxRestarts": 0}),
        ("spec.failurePolicy.rules", [{"name": "a", "action": "Restart"}]),
        ("metadata.label", {}),
        ("metadata.labels.number", 3),
        ("spec.network.enableDNSHostnames", "no"),
        ("spec.replicatedJobs.0.replicas", "one"),
        (f"{JOB}.backoffLimitPerIndex", "3"),
        (f"{JOB}.backOffLimit", 3),
        (f"{JOB}.podFailurePolicy.rules.1.onExitCodes.value", [1]),
        (f"{POD}.terminationGracePeriod", 3),
        (f"{POD}.containers.0.env.0.value", 1),
        (f"{POD}.containers.0.resources.limits.memory", "16 GB"),
        (f"{POD}.volumes.0.persistentVolumeClaim.claim", "x"),
    ],
)
def test_the_schema_sees(path, value):
    document = yaml.safe_load(golden.made("gpu"))
    change(document, path, value)
    assert not VALIDATOR.is_valid(document), "strict: also on fields that the API server would drop"


@pytest.mark.parametrize("case", golden.CASES)
def test_the_rules_that_no_schema_has(case):
    """Of the API server (batch and core validation) and of JobSet's webhook."""
    for document in documents(case):
        check_rules(document)


def check_rules(document):
    job, pod, container = job_of(document), pod_of(document), container_of(document)
    assert pod["restartPolicy"] == "Never", "which a podFailurePolicy demands"
    assert job["podReplacementPolicy"] == "Failed", "likewise"
    assert job["completionMode"] == "Indexed", "which backoffLimitPerIndex demands"
    assert job["parallelism"] == job["completions"], "else some worker would wait for another's end"
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == container["name"]
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
        assert rule["action"] != "FailIndex" or "backoffLimitPerIndex" in job
    rules = document["spec"]["failurePolicy"].get("rules", [])
    names = [rule["name"] for rule in rules]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name) for name in names)
    resources = container.get("resources", {"limits": {}, "requests": {}})
    for name, count in resources["limits"].items():
        if "/" in name:
            assert resources["requests"][name] == count, "extended resources: both, and equal"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    pod_name = f"{document['metadata']['name']}-worker-0-{job['completions'] - 1}-abcde"
    assert re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", pod_name)
    labels = {**document["metadata"]["labels"], **job["template"]["metadata"]["labels"]}
    assert all(
        re.fullmatch("[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", text) for text in labels.values()
    )


def test_the_longest_names_are_short_enough():
    """63 characters; of many workers, of many submissions, of a sweep with any name."""
    for name in ("x" * 200, "A b_c." * 30, "größe", "-", "9"):
        document = made(name=name, number=9999, workers=10_000)
        pod_name = f"{document['metadata']['name']}-worker-0-9999-abcde"
        assert re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])", pod_name), pod_name


def test_sweeps_are_told_apart():
    """By the claim and the name as it is given, whatever is left of it in the label."""
    ids = [k8s.sweep_id(golden.options(claim=claim), name)
           for claim in ("a", "b") for name in ("a_b", "a-b", "A_b", "x" * 30)]  # fmt: skip
    assert len(set(ids)) == len(ids)


def outcome(rules, status, disrupted=False):
    """What the Job controller does about a pod that has failed: the first rule that fits, else
    it is counted."""
    for rule in rules:
        if "onPodConditions" in rule:
            fits = disrupted
        else:
            codes = rule["onExitCodes"]
            fits = (status in codes["values"]) == (codes["operator"] == "In")
        if fits:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize(
    ("status", "disrupted", "action"),
    [(143, False, "Ignore"), (143, True, "Ignore"), (137, True, "Ignore"), (1, True, "Ignore"),
     (134, False, "Count"), (137, False, "Count"), (139, False, "Count"),
     (1, False, "FailIndex"), (2, False, "FailIndex"), (130, False, "FailIndex"),
     (127, False, "FailIndex")],
)  # fmt: skip
def test_what_becomes_of_a_worker_that_ends(status, disrupted, action):
    """As Slurm's script has it: stopped or preempted, again, uncounted; crashed, counted; else
    not again."""
    job = job_of(made())
    assert outcome(job["podFailurePolicy"]["rules"], status, disrupted) == action


def test_the_statuses_are_those_of_the_slurm_launcher():
    from experiments.launch import slurm

    (stopped,) = re.findall(r"^ *([\d |]+)\) requeue ;;", slurm.SCRIPT, re.MULTILINE)
    (crashed,) = re.findall(r"^ *([\d |]+)\) crashed ;;", slurm.SCRIPT, re.MULTILINE)
    assert [int(status) for status in stopped.split("|")] == k8s.STOPPED
    assert [int(status) for status in crashed.split("|")] == k8s.CRASHED


def test_a_worker_that_has_ended_badly_does_not_end_the_others():
    document = made(workers=3, crashes=5)
    job = job_of(document)
    assert job["backoffLimitPerIndex"] == 5, "each worker's own"
    assert "maxFailedIndexes" not in job and "backoffLimit" not in job
    assert all(rule["action"] != "FailJob" for rule in job["podFailurePolicy"]["rules"])
    assert document["spec"]["failurePolicy"] == {"maxRestarts": 0}


# Gangs


def job_failure(rules, status, disrupted):
    """Reason and message of the condition that the Job controller gives a Job of which a pod has
    failed and none may be tried again (kubernetes/pkg/controller/job/pod_failure_policy.go)."""
    action = outcome(rules, status, disrupted)
    if action == "Count":
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    index = next(i for i, rule in enumerate(rules) if outcome([rule], status, disrupted) == action)
    said = (
        f"Pod default/w-0-0-abcde has condition DisruptionTarget matching {action} rule"
        if "onPodConditions" in rules[index]
        else f"Container worker for pod default/w-0-0-abcde failed with exit code {status} "
        f"matching {action} rule"
    )
    assert action == "FailJob", "a pod of a gang is not tried again alone"
    return "PodFailurePolicy", f"{said} at index {index}"


def jobset_action(policy, reason, message):
    """What JobSet does then: the first rule of which reason and a pattern fit
    (jobset/pkg/controllers/failure_policy.go)."""
    for rule in policy["rules"]:
        reasons = rule.get("onJobFailureReasons", [reason])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "disrupted", "action"),
    [(143, False, "RestartJobSetAndIgnoreMaxRestarts"),
     (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
     (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
     (1, True, "RestartJobSetAndIgnoreMaxRestarts"),
     (134, False, "RestartJobSet"), (137, False, "RestartJobSet"), (139, False, "RestartJobSet"),
     (1, False, "FailJobSet"), (2, False, "FailJobSet"), (130, False, "FailJobSet")],
)  # fmt: skip
@pytest.mark.parametrize("case", GANGS)
def test_what_becomes_of_a_gang_of_which_a_pod_ends(case, status, disrupted, action):
    """The same as of a worker of one pod, but that all of them start anew."""
    for document in documents(case):
        job, policy = job_of(document), document["spec"]["failurePolicy"]
        assert job["backoffLimit"] == 0 and "backoffLimitPerIndex" not in job
        failure = job_failure(job["podFailurePolicy"]["rules"], status, disrupted)
        assert jobset_action(policy, *failure) == action
        assert policy["maxRestarts"] == golden.options(**golden.CASES[case]).crashes


def expanded(document, index):
    """The command as pod `index` of a Job gets it: $(NAME) replaced, $$ halved."""
    container = container_of(document)
    (variable,) = [each for each in container["env"] if "valueFrom" in each]
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    known = {f"$({variable['name']})": str(index), "$$": "$"}
    return [re.sub(r"\$\$|\$\([^)]*\)", lambda m: known[m[0]], a) for a in container["command"]]


def test_pods_of_a_gang_find_each_other():
    """The first pod's name as JobSet gives it in DNS, and each pod its own place; what the command
    line takes."""
    from experiments import command_line

    command = ["python", "-m", "experiments.run", "--sweep", "--worker", "--config.name=a$b"]
    first, second = all_made(command=command, hosts=3, gpus=8, workers=2, number=5)
    names = [document["metadata"]["name"] for document in (first, second)]
    assert [name.rpartition("-")[2] for name in names] == ["5", "6"]
    for document, name in zip((first, second), names, strict=True):
        job = job_of(document)
        assert job["completions"] == job["parallelism"] == 3
        assert document["spec"]["network"] == {"enableDNSHostnames": True}
        assert [each["replicas"] for each in document["spec"]["replicatedJobs"]] == [1]
        for index in range(3):
            values = command_line.parse(expanded(document, index)[2:])
            assert values.distributed == f"{name}-worker-0-0.{name}:8476"
            assert (values.processes, values.process) == (3, index)
            assert values.config.name == "a$b"


@pytest.mark.parametrize(
    ("accelerator", "topology", "hosts"),
    [("tpu-v6e-slice", "4x4", 4), ("tpu-v6e-slice", "16x16", 64),
     ("tpu-v5-lite-podslice", "4x8", 8),
     ("tpu-v5p-slice", "2x2x2", 2), ("tpu-v4-podslice", "4x4x8", 32), ("tpu7x", "2x4x4", 8)],
)  # fmt: skip
def test_a_slice_of_several_hosts(accelerator, topology, hosts):
    """Four chips a host, all of a slice, where GKE tells JAX who there is."""
    document = made(tpu_accelerator=accelerator, tpu_topology=topology)
    container = container_of(document)
    assert job_of(document)["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["command"][-1] == "--distributed=auto"
    assert document["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert all("valueFrom" not in each for each in container["env"])
    wanted = golden.options(tpu_accelerator=accelerator, tpu_topology=topology, hosts=hosts)
    cores = 2 if accelerator == "tpu7x" else 1
    assert k8s_options.devices(wanted) == cores * math.prod(int(n) for n in topology.split("x"))


@pytest.mark.parametrize("value", ["$(HOME)", "$$(HOME)", "$", "a$$b$", "$(id)$$$(x)"])
def test_kubernetes_puts_no_variables_into_the_command(value):
    """It replaces $(NAME) and halves $$; nothing but what is written here twice is left."""
    (written,) = container_of(made(command=[value]))["command"]
    assert re.sub(r"\$(\$|\([^)]*\))", lambda m: "$" if m[1] == "$" else "?", written) == value


@pytest.mark.parametrize("value", ["yes", "1e3", "null", "a: b # c", "'", '"', "[1,2]", "  x", "é"])
def test_yaml_leaves_every_argument_as_it_is(value):
    document = made(command=["python", value])
    assert container_of(document)["command"] == ["python", value]


def test_of_what_is_not_set_nothing_is_asked():
    document = made()
    pod, container = pod_of(document), container_of(document)
    assert document["metadata"]["labels"].keys() == {k8s.SWEEP_LABEL}
    assert "namespace" not in document["metadata"]
    assert pod.keys() & {"nodeSelector", "tolerations", "serviceAccountName"} == set()
    assert "resources" not in container
    assert "JAX_PLATFORMS" not in {each["name"] for each in container["env"]}


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips"),
    [("tpu-v4-podslice", "2x2x1", 4), ("tpu-v5-lite-podslice", "1x1", 1),
     ("tpu-v5-lite-podslice", "2x4", 8), ("tpu-v5p-slice", "2x2x1", 4),
     ("tpu-v6e-slice", "2x2", 4), ("tpu7x", "2x2x1", 4)],
)  # fmt: skip
def test_a_slice_of_one_host(accelerator, topology, chips):
    document = made(tpu_accelerator=accelerator, tpu_topology=topology, workers=3)
    pod, container = pod_of(document), container_of(document)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert container["resources"]["limits"] == {"google.com/tpu": str(chips)}
    assert job_of(document)["completions"] == 3, "a host a slice, a worker a host"


def test_chips_are_what_a_topology_multiplies_to():
    for topologies in k8s_options.TPUS.values():
        for topology, chips in topologies.items():
            assert math.prod(int(side) for side in topology.split("x")) == chips


# What is refused

DNS = "the name of a"
REFUSED = [
    ({"image": None}, "k8s.image=None: give the image that the Dockerfile made"),
    ({"image": ""}, "k8s.image='': give the image"),
    ({"image": "Registry/x:v1"}, "k8s.image='Registry/x:v1': give the image"),
    ({"image": "a b:v1"}, "k8s.image='a b:v1': give the image"),
    ({"image": "x:v1\nevil: true"}, "k8s.image='x:v1\\nevil: true': give the image"),
    ({"image": "bitnet_jax"}, "k8s.image='bitnet_jax': give a tag other than latest"),
    ({"image": "r.org:5000/x"}, "k8s.image='r.org:5000/x': give a tag"),
    ({"image": "x:latest"}, "k8s.image='x:latest': give a tag"),
    ({"image": "x@sha256:12"}, "k8s.image='x@sha256:12': give the image"),
    ({"claim": None}, f"k8s.claim=None: {DNS} PersistentVolumeClaim"),
    ({"claim": "Results"}, f"k8s.claim='Results': {DNS} PersistentVolumeClaim"),
    ({"claim": "-a"}, "k8s.claim='-a': the name"),
    ({"claim": "a..b"}, "k8s.claim='a..b': the name"),
    ({"claim": "a" * 64}, f"k8s.claim='{'a' * 64}': the name"),
    ({"claim": ".".join(["a" * 60] * 5)}, "k8s.claim='aaaa"),
    ({"namespace": "a.b"}, "k8s.namespace='a.b': the name of a namespace"),
    ({"namespace": "team_a"}, "k8s.namespace='team_a': the name of a namespace"),
    ({"namespace": ""}, "k8s.namespace='': the name of a namespace"),
    ({"queue": "a b"}, "k8s.queue='a b': the name of a LocalQueue"),
    ({"queue": "a.b" * 30}, "k8s.queue='a.ba"),
    ({"service_account": "me@x"}, "k8s.service_account='me@x': the name of a service account"),
    ({"secret": "A_b"}, "k8s.secret='A_b': the name of a Secret"),
    ({"mount": "results"}, "k8s.mount='results': an absolute path"),
    ({"mount": "/"}, "k8s.mount='/': an absolute path"),
    ({"mount": "/a/../etc"}, "k8s.mount='/a/../etc': an absolute path"),
    ({"mount": "/a b"}, "k8s.mount='/a b': an absolute path"),
    ({"mount": "/opt"}, "k8s.mount='/opt': an absolute path"),
    ({"mount": k8s_options.HOME}, f"k8s.mount='{k8s_options.HOME}': an absolute path"),
    ({"mount": f"{k8s_options.HOME}/results"}, "k8s.mount='/opt/bitnet_jax/results': an absolute"),
    ({"workers": 0}, "k8s.workers=0: it must lie in [1, 10000]"),
    ({"gpus": -1}, "k8s.gpus=-1: it must lie in [0, 64]"),
    ({"cpus": 0}, "k8s.cpus=0: it must lie in [1, 4096]"),
    ({"grace": 0}, "k8s.grace=0: it must lie in [1, 3600]"),
    ({"crashes": -1}, "k8s.crashes=-1: it must lie in [0, 1000]"),
    ({"memory": "16G"}, "k8s.memory='16G': a number and Mi, Gi or Ti"),
    ({"memory": "0Gi"}, "k8s.memory='0Gi': a number"),
    ({"tpu_topology": "2x2"}, "k8s.tpu_topology='2x2': give k8s.tpu_accelerator, too"),
    ({"tpu_accelerator": "v6e"}, "k8s.tpu_accelerator='v6e' is unknown; choose from tpu-v4-pod"),
    ({"tpu_accelerator": "tpu-v6e-slice"},
     "k8s.tpu_topology=None: choose from 1x1, 2x2, 2x4, or of several hosts 4x4, 4x8, 8x8, 8x16, "),
    ({"tpu_accelerator": "tpu-v5p-slice", "tpu_topology": "4x4"},
     "k8s.tpu_topology='4x4': choose from 2x2x1, or of several hosts 2x2x2, 2x2x4, 2x4x4, 4x4x4 "),
    *(({"tpu_accelerator": "tpu-v6e-slice", "tpu_topology": topology},
       f"k8s.tpu_topology={topology!r}: choose from 1x1, 2x2, 2x4, or")
      for topology in ("3x1", "big", "2x2x2", "8x4", "4x4x4", "", "4x4\n", "0x4")),
    *(({"tpu_accelerator": "tpu7x", "tpu_topology": topology},
       f"k8s.tpu_topology={topology!r}: choose from 2x2x1, or") for topology in ("8x4x4", "6x6x6")),
    ({"hosts": 0}, "k8s.hosts=0: it must lie in [1, 10000]"),
    ({"hosts": 2, "tpu_accelerator": "tpu-v6e-slice", "tpu_topology": "4x4"},
     "k8s.hosts=2: a slice of 4x4 has 4; leave it out"),
    ({"hosts": 2, "tpu_accelerator": "tpu-v6e-slice", "tpu_topology": "2x4"},
     "k8s.hosts=2: a slice of 2x4 has 1; leave it out"),
    ({"hosts": 2, "url": "gs://a/b", "claim": None},
     "k8s.hosts=2: several hosts that train a run together need a folder"),
    ({"tpu_accelerator": "tpu-v6e-slice", "tpu_topology": "2x2", "gpus": 1},
     "k8s.gpus=1: a worker has GPUs or TPUs"),
    ({"node_selector": "spot"}, "k8s.node_selector='spot': labels of nodes, each as key=value"),
    ({"node_selector": ""}, "k8s.node_selector='': labels"),
    ({"node_selector": "a=b,"}, "k8s.node_selector='a=b,': labels"),
    ({"node_selector": "a b=c"}, "k8s.node_selector='a b=c': labels"),
    ({"node_selector": "a=b=c"}, "k8s.node_selector='a=b=c': labels"),
    ({"node_selector": "/a=b"}, "k8s.node_selector='/a=b': labels"),
    ({"node_selector": "a/=b"}, "k8s.node_selector='a/=b': labels"),
    ({"node_selector": "a=-b"}, "k8s.node_selector='a=-b': labels"),
    ({"node_selector": "a=b,a=c"}, "k8s.node_selector='a=b,a=c': a is asked for twice"),
    ({"tpu_accelerator": "tpu-v6e-slice", "tpu_topology": "2x2",
      "node_selector": "cloud.google.com/gke-tpu-topology=2x4"},
     "k8s.node_selector='cloud.google.com/gke-tpu-topology=2x4': cloud.google.com/gke-tpu-"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_is_refused(section, says):
    with pytest.raises(ConfigError) as refusal:
        golden.options(**section)
    assert str(refusal.value).startswith(says) and "\n" not in str(refusal.value)


TEXT_KEYS = ("image", "claim", "mount", "namespace", "queue", "service_account", "tpu_accelerator",
             "tpu_topology", "memory", "node_selector")  # fmt: skip
STRANGE = [
    *VALUES,
    *(
        f"{text}{end}"
        for end in ("", "\n", "!", "=", "=a", ":v1", "x1")
        for text in ("a" * 100_000, "a-" * 50_000, "/a" * 50_000, "a.b," * 9, "1x")
    ),
]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_any_text_is_refused_in_a_line_or_fits(key):
    """Without the time that a regular expression can take, and without a way out of the YAML."""
    for text in STRANGE:
        section = {"tpu_accelerator": "tpu-v6e-slice"} if key == "tpu_topology" else {}
        try:
            document = made(**{**section, key: text})
        except ConfigError as refusal:
            assert str(refusal).startswith("k8s.") and "\n" not in str(refusal), text[:80]
            assert len(str(refusal)) < 1000, text[:80]
        else:
            assert VALIDATOR.is_valid(document), text[:80]


# The command


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A cluster that has nothing of this sweep."""
    folder = fake(
        tmp_path / "bin",
        kubectl=f"""if [ $1 = apply ]; then cat > {tmp_path}/applied; fi
[ $1 = get ] && echo '{{"items": []}}'; true""",
    )
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def flags(tiny_overrides, tmp_path, monkeypatch):
    """Of a sweep whose corpus lies where the claim is mounted, in a repository of one file."""
    source = tiny_overrides["data.source"]
    monkeypatch.setattr(cluster_k8s, "ROOT", tmp_path)
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("precision", ("fp32", "ternary")))
    return ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'w'}",
            "--launcher=k8s", "--config.k8s.image=x:v1", "--config.k8s.claim=results",
            f"--config.k8s.mount={os.path.dirname(source)}"]  # fmt: skip


@pytest.fixture
def plan(flags, tiny_corpus, tmp_path):
    path = str(tmp_path / "tiny.py")
    config = load_config(path)
    return make_plan(config, load_points(path, config), tiny_corpus, tmp_path / "w")


def test_dry_run_prints_a_file_for_kubectl(flags, tmp_path, monkeypatch, capsys):
    """The plan in comments, then the manifest; the workers have the submission's config, with the
    paths of the image and the claim. No kubectl is needed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    more = ["--config.log.every=5", "--config.k8s.workers=9", "--config.name=it's"]
    assert main([*flags, *more, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# it's: 4 runs\n")
    document = yaml.safe_load(out)
    assert VALIDATOR.is_valid(document)
    assert job_of(document)["completions"] == 4, "no more workers than runs"
    mount = flags[-1].partition("=")[2]
    assert container_of(document)["command"] == [
        "python", "-m", "experiments.run", "--sweep", "--worker", f"--workdir={mount}",
        "--config=tiny.py", *flags[5:], *more,
    ]  # fmt: skip
    assert not (tmp_path / "w").exists()


def opened(folder, url, reachable=True):
    """A store that calls itself by a URL and lies in a folder; or that cannot be reached."""
    found = OPEN_STORE(folder.as_uri())
    found.url = url
    if not reachable:
        found.names = unreachable
    return found


def unreachable(prefix=""):
    raise store.Unreachable("it is away")


def test_a_workdir_in_object_storage(flags, tiny_corpus_path, tmp_path, monkeypatch, capsys):
    """No claim: each pod trains on its own disk, for the URL. Files that no pod has are refused."""
    pytest.importorskip("obstore")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = "gs://bucket/path"
    monkeypatch.setattr(store, "open_store", functools.partial(opened, tmp_path / "bucket"))
    others = ("--workdir", "--config.k8s.claim", "--config.k8s.mount")
    kept = [flag for flag in flags if not flag.startswith(others)]
    given = [*kept, f"--workdir={url}", "--dry_run", "--config.data.source=wikitext-2",
             "--config.k8s.mount=/scratch"]  # fmt: skip
    monkeypatch.setattr("bitnet_jax.data.resolve", lambda source: tiny_corpus_path)
    assert main(given) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    assert VALIDATOR.is_valid(document)
    assert pod_of(document)["volumes"] == [{"name": "results", "emptyDir": {}}]
    assert {f"--workdir={url}", "--scratch=/scratch"} < set(container_of(document)["command"])
    assert main([*given, "--config.k8s.claim=results"]) == 2
    assert "k8s.claim='results': leave it out" in capsys.readouterr().err
    assert main([*given, "--config.data.source=/scratch/corpus"]) == 2
    assert "data.source='/scratch/corpus': pods have" in capsys.readouterr().err
    away = functools.partial(opened, tmp_path / "bucket", reachable=False)
    monkeypatch.setattr(store, "open_store", away)
    assert main(given) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: it is away; how far the sweep is stays unknown\n"
    assert f"# results would go to {url}/tiny\n" in captured.out
    assert VALIDATOR.is_valid(yaml.safe_load(captured.out))
    assert main([flag for flag in given if flag != "--dry_run"]) == 2


def test_files_of_each_pod_are_no_workdir(flags, tmp_path, capsys):
    kept = [flag for flag in flags if not flag.startswith("--workdir")]
    assert main([*kept, f"--workdir=file://{tmp_path}/w", "--dry_run"]) == 2
    assert "each pod has files of its own; give k8s.claim" in capsys.readouterr().err


def test_what_cannot_fit_is_not_submitted(flags, capsys):
    """Where it is said what a device has; this machine's is not asked."""
    assert main([*flags, "--dry_run"]) == 0
    assert "memory, which is unknown: launch.device_memory_gb says it" in capsys.readouterr().out
    small = "--config.launch.device_memory_gb=0.0001"
    for more in (["--dry_run"], []):
        assert main([*flags, small, *more]) == 2
        assert "where a device has 100 kB" in capsys.readouterr().err


def test_a_secret_and_shared_memory():
    """Credentials as variables; more than 64 MB for GPUs that talk with each other."""
    wanted = golden.options(secret="keys", gpus=8)
    (document,) = yaml.safe_load_all(k8s.manifest(wanted, "x", 1, ["python"]))
    assert VALIDATOR.is_valid(document)
    container, volumes = container_of(document), pod_of(document)["volumes"]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    (shm,) = [v["name"] for v in volumes if v.get("emptyDir") == {"medium": "Memory"}]
    assert {"name": shm, "mountPath": "/dev/shm"} in container["volumeMounts"]
    (document,) = yaml.safe_load_all(k8s.manifest(golden.options(gpus=1), "x", 1, ["python"]))
    assert len(pod_of(document)["volumes"]) == 1 and "envFrom" not in container_of(document)


def test_what_is_submitted(flags, commands, plan, tmp_path, capsys):
    """The manifest, kept in the sweep's folder; a second one beside what is there."""
    assert main(flags) == 0
    sweep = k8s.sweep_id(golden.options(claim="results"), "tiny")
    out = capsys.readouterr().out
    assert f"submitted {sweep}-1: 1 workers" in out
    path = tmp_path / "w" / "tiny" / "k8s" / f"{sweep}-1.yaml"
    asked = calls(commands, "kubectl")
    assert asked[-1] == "apply --filename=-"
    assert (tmp_path / "applied").read_text() == path.read_text()
    assert asked[0].endswith(f"--selector=bitnet-jax/sweep={sweep} --output=json")
    assert yaml.safe_load(path.read_text())["metadata"]["name"] == f"{sweep}-1"
    assert not (tmp_path / "w" / "tiny" / "runs").exists(), "nothing trains here"

    fake(commands, kubectl=f"[ $1 = get ] && echo '{cluster_has(sweep)}'; true")
    assert main(flags) == 0
    assert f"submitted {sweep}-8: 1 workers, beside 5 that are there" in capsys.readouterr().out


def cluster_has(sweep):
    """JobSets: one that is done, one at work, one that waits for its quota."""

    def jobset(number, workers, hosts=None, **more):
        job = {"template": {"spec": {"parallelism": workers * (hosts or 1)}}}
        more.setdefault("status", {})
        spec = {"replicatedJobs": [job], "suspend": more.pop("suspend", False)}
        labels = {"labels": {"bitnet-jax/hosts": str(hosts)}} if hosts else {}
        return {"metadata": {"name": f"{sweep}-{number}", **labels}, "spec": spec, **more}

    return json.dumps({"items": [
        jobset(7, 3, suspend=True), jobset(1, 4, status={"terminalState": "Completed"}),
        jobset(2, 2, hosts=4), jobset(3, 1, status={"terminalState": "Failed"}),
    ]})  # fmt: skip


def test_a_finished_sweep_is_not_submitted(flags, plan, commands, capsys):
    for run in plan.runs:
        write_summary(run.directory, run.spec)
    assert main(flags) == 0
    assert "all 4 runs are finished" in capsys.readouterr().out
    assert calls(commands, "kubectl") == []


@pytest.mark.parametrize("also", [[], ["--status"], ["--cancel"]])
def test_without_kubectl(flags, tmp_path, monkeypatch, capsys, also):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*flags, *also]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: kubectl: not found; --launcher=k8s") and "--dry_run" in error
    assert error.count("\n") == 1 and not (tmp_path / "w").exists()


def test_what_the_cluster_refuses_is_said_in_a_line(flags, commands, capsys):
    says = 'error: the server does not have a resource type "jobsets"'
    fake(commands, kubectl=f"printf '{says}\\nsorry\\n' >&2; exit 1")
    assert main(flags) == 2
    assert capsys.readouterr().err == f"error: kubectl: {says} sorry\n"


@pytest.mark.parametrize("answer", ["", "[]", "no", "{}", "null"])
def test_an_answer_that_is_no_list(flags, commands, capsys, answer):
    fake(commands, kubectl=f"echo '{answer}'")
    assert main([*flags, "--status"]) == 2
    error = capsys.readouterr().err
    assert error == "error: kubectl: get jobsets.jobset.x-k8s.io did not print a list in JSON\n"


def test_a_config_file_that_is_not_in_the_image(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster_k8s, "ROOT", tmp_path / "elsewhere")
    assert main([*flags, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --config={tmp_path}/tiny.py: pods have only what is in the")


def test_a_config_file_as_the_image_has_it(tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    monkeypatch.chdir(tmp_path / "sweeps")
    assert cluster_k8s.in_image("x.py:size=8k", tmp_path) == "sweeps/x.py:size=8k"
    assert cluster_k8s.in_image("../x.py", tmp_path) == "x.py"
    with pytest.raises(ConfigError, match="pods have only"):
        cluster_k8s.in_image("../../x.py", tmp_path)


@pytest.mark.parametrize("mount", ["/results", "/tm"])
def test_a_corpus_that_pods_do_not_have(flags, capsys, mount):
    flags[-1] = f"--config.k8s.mount={mount}"
    assert main([*flags, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.source=") and f"k8s.mount={mount!r}" in error


@pytest.mark.parametrize(
    ("section", "mesh", "says"),
    [({"hosts": 2, "gpus": 4}, 4, "=4: each worker has 8 devices on 2 hosts; cut each run over"),
     ({"gpus": 2}, 4, "=4: each worker has 2 devices on 1 hosts"),
     ({"hosts": 2, "gpus": 2}, 4, None), ({"hosts": 2}, 2, None), ({}, 2, None),
     ({"tpu_accelerator": "tpu7x", "tpu_topology": "2x2x1"}, 8, None)],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_the_gang(flags, capsys, section, mesh, says):
    """Before anything is submitted."""
    given = [f"--config.k8s.{key}={value}" for key, value in section.items()]
    status = main([*flags, *given, f"--config.mesh.data={mesh}", "--dry_run"])
    out, error = capsys.readouterr()
    if says is None:
        assert status == 0, error
        assert all(map(VALIDATOR.is_valid, yaml.safe_load_all(out)))
    else:
        assert status == 2 and error.startswith(f"error: mesh.data * mesh.tensor{says}")


def test_k8s_is_the_same_for_all_runs(tiny_config, tiny_corpus, tmp_path):
    points = [{"k8s.gpus": 1}, {"k8s.gpus": 2, "seed": 1}]
    with pytest.raises(ConfigError, match="all runs of a sweep share it"):
        make_plan(tiny_config(), points, tiny_corpus, tmp_path)


def test_a_sweep_of_another_commit_is_not_gone_on_with(flags, plan, monkeypatch, capsys):
    run = plan.runs[0]
    run.directory.mkdir(parents=True)
    write_json(run.directory / "config.json", {"schema_version": 2, "git_commit": "def"})
    monkeypatch.setattr(cluster, "git_commit", lambda: "abc")
    assert main([*flags, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "trained by commit def, the code here is abc" in error and "k8s.mixed_code" in error
    assert main([*flags, "--config.k8s.mixed_code=True", "--dry_run"]) == 0


# Status and cancelling

PODS = {"items": [
    {"metadata": {"name": "w-0"}, "spec": {"nodeName": "n1"},
     "status": {"phase": "Running", "startTime": "2026-01-02T03:04:05Z",
                "containerStatuses": [{"state": {"running": {}}}]}},
    {"metadata": {"name": "w-1", "deletionTimestamp": "x"}, "spec": {"nodeName": "n2"},
     "status": {"phase": "Running"}},
    {"metadata": {"name": "w-2"}, "spec": {"nodeName": "n3"},
     "status": {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {
         "exitCode": 137, "reason": "OOMKilled", "message": "one\n[no] memory\n"}}}]}},
    {"metadata": {"name": "w-3"}, "spec": {},
     "status": {"phase": "Pending", "conditions": [
         {"type": "Ready", "status": "True", "message": "no"},
         {"type": "PodScheduled", "status": "False", "message": "0 of 3 nodes fit"}]}},
    {"metadata": {"name": "w-4"}, "spec": {"nodeName": "n4"},
     "status": {"phase": "Pending", "containerStatuses": [
         {"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}},
    {"metadata": {"name": "w-5"}, "spec": {}},
]}  # fmt: skip


def test_status(flags, plan, commands, capsys):
    """What the cluster knows, and what the sweep's folder does."""
    done, held, *_ = plan.runs
    write_summary(done.directory, done.spec)
    (commands / "pods").write_text(json.dumps(PODS))
    (commands / "jobsets").write_text(cluster_has("s"))
    fake(commands, kubectl=f'cat "{commands}/${{2%%.*}}"')
    with Leases(plan.directory / "leases") as leases:
        leases.claim([held.spec.run_id])
        assert main([*flags, "--config.k8s.namespace=team", "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()

    def words(word):
        (found,) = [line for line in lines if f" {word} " in line]
        return [cell.strip() for cell in re.split("[│|]", found) if cell.strip()]

    assert words("s-1") == ["s-1", "completed", "4"] and words("s-3") == ["s-3", "failed", "1"]
    assert words("s-2") == ["s-2", "active", "2"] and words("s-7") == ["s-7", "suspended", "3"]
    assert words("w-0") == ["w-0", "running", "2026-01-02T03:04:05Z", "n1"]
    assert words("w-1") == ["w-1", "terminating", "n2"]
    assert words("w-2") == ["w-2", "failed", "n3", "status 137: OOMKilled: [no] memory"]
    assert words("w-3") == ["w-3", "pending", "0 of 3 nodes fit"]
    assert words("w-4") == ["w-4", "pending", "n4", "ImagePullBackOff"]
    assert words("w-5") == ["w-5", "unknown"]
    assert words(held.spec.run_id)[1] == "running"
    assert lines[-1] == "4 runs: 1 done, 1 running, 2 waiting, 0 failed"
    assert all("--namespace=team" in asked.split() for asked in calls(commands, "kubectl"))


def test_cancel(flags, commands, capsys):
    """What has ended is left alone, for its logs."""
    fake(commands, kubectl=f"[ $1 = get ] && echo '{cluster_has('s')}'; true")
    assert main([*flags, "--cancel"]) == 0
    assert "deleted 2 JobSets: s-2, s-7" in capsys.readouterr().out
    *_, asked = calls(commands, "kubectl")
    assert asked == "delete jobsets.jobset.x-k8s.io --wait=false s-2 s-7"


def test_nothing_to_cancel(flags, commands, capsys):
    assert main([*flags, "--cancel"]) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert [asked.split()[0] for asked in calls(commands, "kubectl")] == ["get"]
