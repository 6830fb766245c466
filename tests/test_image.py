"""The Dockerfile, as far as it can be checked without Docker: what it copies, installs and sets."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_k8s import job_of
from test_launch_local import write_sweep

from bitnet_jax import tracking
from experiments import cluster_k8s
from experiments.launch import k8s, k8s_options
from experiments.run import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def instructions(name):
    """What follows the name of each such instruction, in their order."""
    return [line.removeprefix(f"{name} ") for line in TEXT.splitlines()
            if line.startswith(f"{name} ")]  # fmt: skip


def copied():
    """(source, where to) of everything that is copied into the working directory."""
    for line in instructions("COPY"):
        *sources, target = line.split()
        yield from ((source, Path(target) / source if target == "./" else Path(target))
                    for source in sources)  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The image's working directory: what .dockerignore lets the Dockerfile copy."""
    folder = tmp_path_factory.mktemp("image")
    _, *lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*" and all(line[:1] == "!" or line[:3] == "**/" for line in lines[1:])
    let_in = {line[1:] for line in lines if line.startswith("!")}
    without = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    for source, target in copied():
        assert source in let_in, f"{source} is copied, and ignored by .dockerignore"
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns(*without))
        else:
            shutil.copy(ROOT / source, folder / target)
    return folder


def test_what_is_copied_is_all_that_the_command_needs(tree):
    """Each package of setup.cfg, and the files that it names; the main command starts in it."""
    for pattern in SETUP["options.packages.find"]["include"].split():
        assert (tree / pattern.rstrip("*") / "__init__.py").exists(), pattern
    for key in ("long_description",):
        assert (tree / SETUP["metadata"][key].removeprefix("file: ")).exists()
    command = [sys.executable, "-m", "experiments.run", "--help"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--launcher=slurm|k8s" in done.stdout
    where = [sys.executable, "-c", "import experiments.run as r; print(r.__file__)"]
    done = subprocess.run(where, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tree / "experiments" / "run.py"), "the copy, not this tree"


@pytest.mark.slow
def test_what_the_manifest_has_a_pod_do_trains_the_sweep(
    tree, tiny_overrides, tmp_path, monkeypatch, capsys
):
    """Its command, environment and folder, with another Python."""
    monkeypatch.setattr(cluster_k8s, "ROOT", tree)
    claim = tmp_path / "claim"
    sweep = {**tiny_overrides, "data.source": str(claim / "corpus")}
    shutil.copytree(tiny_overrides["data.source"], sweep["data.source"])
    write_sweep(tree / "sweeps" / "tiny.py", sweep, ("precision", ("fp32",)))
    flags = [f"--config={tree}/sweeps/tiny.py", "--launcher=k8s", "--dry_run"]
    section = {"image": "x:v1", "claim": "c", "mount": claim}
    of_pods = [f"--config.k8s.{key}={value}" for key, value in section.items()]
    assert main(["run", "--sweep", *flags, *of_pods]) == 0
    pod = job_of(yaml.safe_load(capsys.readouterr().out))["template"]["spec"]
    (container,) = pod["containers"]
    python, *arguments = container["command"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    environment |= {"HOME": str(tmp_path / "home"), "WANDB_MODE": "disabled"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout and python == "python"
    assert len(list(claim.glob("tiny/runs/*/summary.json"))) == 2


def test_no_tests_tools_or_results_are_in_it(tree):
    assert {path.name for path in tree.iterdir()} == {
        "setup.cfg", "pyproject.toml", "README.md", "LICENSE",
        "bitnet_jax", "sweeps", "experiments", "analysis",
    }  # fmt: skip
    assert not list(tree.rglob("*.ipynb")) and not list(tree.rglob("test_*.py"))
    assert "[test" not in TEXT and "[dev" not in TEXT and "apt-get" not in TEXT


def test_the_extras_that_it_names_are_there():
    (line,) = re.findall(r"# EXTRAS: (.*)", (ROOT / "Dockerfile").read_text())
    named = set(re.findall(r"\b(cuda|tpu|data|test|dev|export)\b", line))
    assert named == {"cuda", "tpu", "data"} <= set(SETUP["options.extras_require"])
    assert "--build-arg EXTRAS=cuda" in TEXT


@pytest.mark.parametrize(
    ("extras", "target"), [("", "."), ("cuda", ".[cuda]"), ("cuda,data", ".[cuda,data]")]
)
def test_what_pip_is_told(extras, target):
    (install,) = [line for line in instructions("RUN") if line.startswith("pip install")]
    command = install.partition(" && ")[0].replace("pip install", "printf '%s\n'")
    done = subprocess.run(["sh", "-c", command], env={"EXTRAS": extras}, capture_output=True)
    assert done.stdout.decode().splitlines()[-1] == target


@pytest.mark.parametrize(("commit", "status"), [("", 1), ("0123abc", 0)])
def test_an_image_without_a_commit_is_not_made(commit, status):
    (check,) = [line for line in instructions("RUN") if line.startswith("test")]
    done = subprocess.run(["sh", "-c", check], env={"COMMIT": commit}, capture_output=True)
    assert done.returncode == status


def test_it_is_what_the_manifest_takes_it_for():
    """The folder, a user who is not root, and a Python that the code supports."""
    assert instructions("WORKDIR") == [k8s_options.HOME]
    (user,) = instructions("USER")
    assert f"useradd --uid {k8s.USER} --create-home {user}" in instructions("RUN")
    assert TEXT.index("\nUSER ") > TEXT.index("pip install") and user != "root"
    (base,) = instructions("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim", base)[1]
    assert f"Programming Language :: Python :: {version}" in SETUP["metadata"]["classifiers"]


def test_the_commit_of_code_that_is_in_no_git(monkeypatch):
    """The image's; where git answers, git's."""
    monkeypatch.delenv("BITNET_JAX_COMMIT", raising=False)
    here = tracking.git_commit()
    monkeypatch.setenv("BITNET_JAX_COMMIT", "0123abc")
    assert tracking.git_commit() == ("0123abc" if here == "unknown" else here)
    monkeypatch.setenv("PATH", "")
    assert tracking.git_commit() == "0123abc"
    monkeypatch.delenv("BITNET_JAX_COMMIT")
    assert tracking.git_commit() == "unknown"
