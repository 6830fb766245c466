"""--launcher=slurm where Slurm is a stand-in: the batch script and what it does, what is refused,
and the tables. `tests/slurm` has the real one."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import write_summary
from test_launch_local import write_sweep

from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.files import write_json
from experiments import cluster
from experiments.launch import slurm
from experiments.launch.failures import count_failure
from experiments.launch.leases import Leases
from experiments.plan import load_config, load_points, make_plan
from experiments.run import main


def fake(folder, **scripts):
    """Commands that note their arguments and then do this."""
    folder.mkdir(exist_ok=True)
    for name, body in scripts.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def calls(folder, name):
    """The arguments of each call of a command."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A Slurm with two partitions and no jobs."""
    folder = fake(
        tmp_path / "bin",
        sinfo="printf 'low*|1:00:00\\nhigh|infinite\\n'",
        sbatch="echo '12;ci'",
        squeue="",
        scancel="",
        scontrol="",
    )
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def flags(tiny_overrides, tmp_path):
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("precision", ("fp32", "ternary")))
    return ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'w'}",
            "--launcher=slurm"]  # fmt: skip


@pytest.fixture
def plan(flags, tiny_corpus, tmp_path):
    path = str(tmp_path / "tiny.py")
    config = load_config(path)
    return make_plan(config, load_points(path, config), tiny_corpus, tmp_path / "w")


def options(**section):
    config = default.get_config()
    config.slurm.update(section)
    return slurm.options(config)


# The batch script


def test_the_script_of_every_option(tmp_path):
    wanted = options(
        workers=4, minutes=90, partition="gpu,long", account="lab-1", gpus=1, cpus=8, memory="32G"
    )
    text = slurm.script(
        wanted, Path("/data/results/tiny"), Path("/home/a b"), ["python", "-m", "x$"]
    )
    name = slurm.job_name(Path("/data/results/tiny"))
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        f"#SBATCH --job-name={name}",
        "#SBATCH --array=0-3",
        "#SBATCH --output=/data/results/tiny/slurm/%A_%a.log",
        "#SBATCH --time=90",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        "#SBATCH --partition=gpu,long",
        "#SBATCH --account=lab-1",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=32G",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@30",
    ]
    assert text.startswith("#!/bin/bash\n#SBATCH")
    assert "cd '/home/a b' || exit 2\n" in text
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=8 \\\n    python -m 'x$'\n" in text
    assert name.startswith("bitnet_jax.tiny.") and name != slurm.job_name(Path("/data/other/tiny"))


def test_of_what_is_not_set_nothing_is_asked(tmp_path):
    text = slurm.script(options(), tmp_path, tmp_path, ["true"])
    for absent in ("partition", "account", "gpus", "cpus", "mem="):
        assert f"--{absent}" not in text


def run_script(tmp_path, status, state="RUNNING", before=lambda: None, failures=3):
    """The script's exit status and what it asked for, with a worker that ends like this."""
    sweep = tmp_path / "sweep"
    (sweep / "slurm").mkdir(parents=True, exist_ok=True)
    (sweep / "runs" / "a").mkdir(parents=True, exist_ok=True)
    folder = fake(tmp_path / "bin", srun=f"exit {status}", squeue=f"echo {state}", scontrol="")
    config = default.get_config()
    config.launch.failures = failures
    text = slurm.script(slurm.options(config), sweep, tmp_path, ["worker"])
    before()
    (folder / "calls").unlink(missing_ok=True)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    # As of the last job of an array, whose own id is the array's.
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    env = {**os.environ, "PATH": path, **job}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, calls(folder, "scontrol")


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_worker_that_is_done_has_failed_or_is_misused_is_not_requeued(tmp_path, status):
    assert run_script(tmp_path, status) == (status, [])


@pytest.mark.parametrize("status", [143, 137, 139, 134])
def test_a_worker_that_was_stopped_or_killed_is_requeued(tmp_path, status):
    assert run_script(tmp_path, status) == (status, ["requeue 7_1"])


@pytest.mark.parametrize("status", [143, 137])
@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", ""])
def test_what_slurm_has_ended_is_not_requeued(tmp_path, status, state):
    assert run_script(tmp_path, status, state) == (status, [])


def test_crashes_are_counted_while_nothing_gets_on(tmp_path):
    """Not stops, of which there may be any number; what any run writes begins the count anew."""
    again = ["requeue 7_1"]
    assert [run_script(tmp_path, 143)[1] for _ in range(5)] == [again] * 5
    assert [run_script(tmp_path, 139)[1] for _ in range(3)] == [again, again, []]

    def get_on():
        path = tmp_path / "sweep" / "runs" / "a" / "checkpoint"
        path.touch()
        later = path.stat().st_mtime + 100
        os.utime(path, (later, later))

    assert run_script(tmp_path, 137, before=get_on)[1] == again
    assert run_script(tmp_path, 0) == (0, [])
    assert not list((tmp_path / "sweep" / "slurm").glob("*.crashes"))


def test_crashes_before_there_is_any_run_are_counted(tmp_path):
    """While there is no folder of runs there is nothing that could get on."""

    def none_yet():
        shutil.rmtree(tmp_path / "sweep" / "runs")

    asked = [run_script(tmp_path, 139, before=none_yet, failures=2)[1] for _ in range(2)]
    assert asked == [["requeue 7_1"], []]


# What is submitted


def test_what_is_submitted(flags, commands, tmp_path, monkeypatch, capsys):
    """The script in the sweep's folder; its workers have the submission's config and no more flags
    than they need; no more workers than runs are left."""
    monkeypatch.chdir(tmp_path)
    flags[3] = "--workdir=w"
    more = ["--config.slurm.workers=9", "--config.slurm.minutes=30", "--config.log.every=5"]
    assert main([*flags, *more]) == 0
    out = capsys.readouterr().out
    assert "submitted array 12: 4 workers" in out and "12_*.log" in out
    path = tmp_path / "w" / "tiny" / "slurm" / "worker.sh"
    assert calls(commands, "sbatch") == [f"--parsable {path}"]
    text = path.read_text()
    assert "#SBATCH --array=0-3\n" in text
    (line,) = [line.strip() for line in text.splitlines() if "experiments.run" in line]
    assert line == (f"{sys.executable} -m experiments.run --sweep --worker "
                    f"--workdir={tmp_path / 'w'} --config={tmp_path / 'tiny.py'} "
                    + " ".join(more))  # fmt: skip
    assert not (tmp_path / "w" / "tiny" / "runs").exists(), "nothing trains here"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--sweep --launcher slurm --config a.py --workdir w", "--config a.py"),
        ("--launcher=slurm --sweep=true --config.seed=3", "--config.seed=3"),
        ("-launcher slurm -sweep --dry_run --config.name=sweep", "--config.name=sweep"),
    ],
)
def test_the_flags_that_workers_have(given, kept):
    assert cluster.worker_flags(["run", *given.split()]) == kept.split()


def test_a_finished_sweep_is_not_submitted(flags, plan, commands, capsys):
    for run in plan.runs:
        write_summary(run.directory, run.spec)
    assert main(flags) == 0
    assert "all 4 runs are finished" in capsys.readouterr().out
    assert calls(commands, "sbatch") == []


def test_dry_run_shows_the_script_and_the_plan(flags, commands, tmp_path, capsys):
    assert main([*flags, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "tiny: 4 runs" in out and "#SBATCH --requeue" in out and "--sweep --worker" in out
    assert not (tmp_path / "w").exists() and calls(commands, "sbatch") == []


def test_dry_run_without_slurm(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*flags, "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert "#SBATCH --requeue" in captured.out and "sbatch: not found" in captured.err


# What is refused, before anything is submitted


REFUSED = [
    ("partition=gpu", "slurm.partition='gpu': unknown to this cluster; choose from high, low"),
    ("partition='low;x'", "slurm.partition=\"'low;x'\": it must be a partition"),
    ("partition=$(id)", "slurm.partition='$(id)': it must be a partition"),
    ("account=a b", "slurm.account='a b': it must be an account"),
    ("account=", "slurm.account='': it must be an account"),
    ("memory=lots", "slurm.memory='lots': a number and K, M, G or T"),
    ("memory=16G\n#SBATCH --uid=0", "slurm.memory='16G\\n#SBATCH --uid=0': a number"),
    ("minutes=0", "slurm.minutes=0: it must lie in [1, 525600]"),
    ("minutes=61", "slurm.minutes=61: partition low allows 60"),
    ("workers=0", "slurm.workers=0: it must lie in [1, 100000]"),
    ("workers=-3", "slurm.workers=-3: it must lie in"),
    ("gpus=-1", "slurm.gpus=-1: it must lie in [0, 64]"),
    ("cpus=0", "slurm.cpus=0: it must lie in [1, 4096]"),
    ("nodes=2", "slurm.nodes=2: it must be at most slurm.processes=1"),
    ("processes=2", "slurm.processes=2: it must divide the 1 devices of mesh.data * mesh.tensor"),
    ("minutes=soon", "config.slurm.minutes='soon': it must be of type int"),
]


@pytest.mark.parametrize(("setting", "says"), REFUSED, ids=[repr(s) for s, _ in REFUSED])
def test_what_is_refused(flags, commands, tmp_path, capsys, setting, says):
    assert main([*flags, f"--config.slurm.{setting}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
    assert calls(commands, "sbatch") == [] and not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["a b", "x;id", "$(id)", "100%", "a'b"])
def test_a_folder_that_a_shell_would_read_otherwise(flags, commands, tmp_path, capsys, name):
    assert main([*flags, f"--config.name={name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: directory=") and "letters, digits" in error
    assert calls(commands, "sbatch") == [] and not (tmp_path / "w").exists()


def test_without_slurm(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith("error: sbatch: not found; --launcher=slurm needs")


def test_what_slurm_refuses_is_said_in_a_line(flags, commands, tmp_path, capsys):
    fake(commands, sbatch="printf 'sbatch: error: no\\nsbatch: error: really\\n' >&2; exit 1")
    assert main(flags) == 2
    assert capsys.readouterr().err == "error: sbatch: error: no sbatch: error: really\n"


def test_the_last_line_of_a_long_complaint_is_what_is_said(flags, commands, capsys):
    fake(commands, sinfo="for i in $(seq 40); do echo sinfo: try $i >&2; done; "
         "echo 'sinfo: fatal: no controller' >&2; exit 1")  # fmt: skip
    assert main([*flags, "--status"]) == 2
    assert capsys.readouterr().err == "error: sinfo: fatal: no controller\n"


def test_what_cannot_fit_is_not_submitted(flags, commands, capsys):
    small = "--config.launch.device_memory_gb=0.0001"
    for more in (["--dry_run"], []):
        assert main([*flags, small, *more]) == 2
        assert "where a device has 100 kB" in capsys.readouterr().err
    assert not calls(commands, "sbatch")


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("1:00:00", 60), ("30:00", 30), ("2-00:00:00", 2880), ("1-12:30:00", 2190),
     ("infinite", float("inf")), ("n/a", float("inf")), ("45", 0.75)],
)  # fmt: skip
def test_limits_of_time(limit, minutes):
    assert slurm._minutes(limit) == minutes


def test_a_sweep_of_another_commit_is_not_gone_on_with(flags, plan, commands, monkeypatch, capsys):
    """Two codes in one table; unless that is asked for."""
    run = plan.runs[0]
    run.directory.mkdir(parents=True)
    write_json(run.directory / "config.json", {"schema_version": 2, "git_commit": "abc + def"})
    monkeypatch.setattr(cluster, "git_commit", lambda: "abc")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert f"{run.directory}: trained by commit def, the code here is abc" in error
    assert main([*flags, "--cancel"]) == 0, "which trains nothing"
    assert main([*flags, "--status"]) == 0
    assert main([*flags, "--config.slurm.mixed_code=True"]) == 0
    write_json(run.directory / "config.json", {"schema_version": 2, "git_commit": "abc"})
    assert main(flags) == 0
    assert len(calls(commands, "sbatch")) == 2


def test_slurm_is_the_same_for_all_runs(tiny_config, tiny_corpus, tmp_path):
    points = [{"slurm.partition": "low"}, {"slurm.partition": "high", "seed": 1}]
    with pytest.raises(ConfigError, match="all runs of a sweep share it"):
        make_plan(tiny_config(), points, tiny_corpus, tmp_path)


def test_who_trains_a_run_is_not_part_of_it(tiny_config, tiny_corpus):
    one, two = (resolve(tiny_config({"slurm.workers": n, "launch.failures": n}), tiny_corpus)
                for n in (1, 2))  # fmt: skip
    assert one.run_id == two.run_id


# Status and cancelling

JOBS = """echo '12_0|12|RUNNING|1:02|node-1|None
12_1|12|PENDING|0:00||Resources
9_0|9|CANCELLED|3:00|node-2|None'"""


def test_status(flags, plan, commands, tmp_path, capsys):
    done, failed, held, waiting = plan.runs
    write_summary(done.directory, done.spec)
    count_failure(failed.directory, failed.spec.run_id, "no memory", 1, lambda: [{}])
    count_failure(waiting.directory, waiting.spec.run_id, "node down", 3, lambda: [{}])
    fake(commands, squeue=JOBS)
    with Leases(plan.directory / "leases") as leases:
        leases.claim([held.spec.run_id])
        assert main([*flags, "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()

    def line(word):
        (found,) = [line for line in lines if word in line]
        return found

    assert "running" in line("12_0") and "1:02" in line("12_0") and "node-1" in line("12_0")
    assert "pending" in line("12_1") and "Resources" in line("12_1")
    assert "done" in line(done.spec.run_id)
    assert "failed" in line(failed.spec.run_id) and "1 times: no memory" in line(failed.spec.run_id)
    assert "running" in line(held.spec.run_id) and f"pid {os.getpid()}" in line(held.spec.run_id)
    assert "waiting" in line(waiting.spec.run_id) and "node down" in line(waiting.spec.run_id)
    assert lines[-1] == "4 runs: 1 done, 1 running, 1 waiting, 1 failed"
    (asked,) = calls(commands, "squeue")
    assert f"--name={slurm.job_name(plan.directory)}" in asked.split() and "--me" in asked.split()


def test_cancel(flags, commands, capsys):
    """By the ids that the name has; what has ended is left alone."""
    fake(commands, squeue=JOBS)
    assert main([*flags, "--cancel"]) == 0
    assert "cancelled 2 jobs: 12_0, 12_1" in capsys.readouterr().out
    assert calls(commands, "scancel") == ["12"]
