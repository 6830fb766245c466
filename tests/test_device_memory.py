"""What the dry run says of memory, and what is refused before anything trains."""

import re

import jax
import pytest

from bitnet_jax.errors import ConfigError
from experiments import device_memory, display
from experiments.device_memory import Change, needed, run_memory
from experiments.plan import make_plan
from experiments.run import main


@pytest.fixture
def plan_of(tiny_config, tiny_corpus, tmp_path):
    def make(overrides=None, points=({},)):
        return make_plan(tiny_config(overrides), list(points), tiny_corpus, tmp_path / "w")

    return make


# 800k: state 10.5 MB and an anchor of as much, gradients 3.5 MB; a batch of 64 rows of 64 tokens.
LARGE = {"model.size": "800k", "model.layers": None, "model.width": None, "model.ff_width": None,
         "model.heads": None, "model.kv_heads": None, "data.sequence_length": 64,
         "train.batch_tokens": 4096, "train.tokens": (40960,)}  # fmt: skip


def refusal(plan):
    with pytest.raises(ConfigError) as caught:
        device_memory.check(plan)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(plan.runs[0].spec.run_id)
    return message


def with_gb(gigabytes):
    return {**LARGE, "launch.device_memory_gb": gigabytes}


def test_what_the_config_says_is_what_a_device_has(plan_of):
    assert device_memory.available(plan_of(with_gb(80.0)))[0] == 80 * 10**9
    has, source = device_memory.available(plan_of())
    assert has is None or has > 10**8 and source == "this machine"


def test_a_batch_that_is_too_large_is_told_how_to_be_cut(plan_of):
    """The remedies are true: with each of them the run fits, and with a smaller change not."""
    message = refusal(plan_of(with_gb(0.06)))
    assert "where a device has 60 MB" in message
    (run,) = plan_of(with_gb(0.06)).runs
    parts = int(re.search(r"train\.microbatches=(\d+)", message).group(1))
    devices = int(re.search(r"set mesh.data=(\d+), over as many such devices", message).group(1))
    corpus, counts = plan_of(LARGE).corpus.train.nbytes, [1, 2, 4, 8, 16, 32, 64]
    fits = [needed(run, corpus, Change(n)) <= 6e7 for n in counts]
    assert fits == sorted(fits) and parts == counts[fits.index(True)] > 1
    assert needed(run, corpus, Change(data=devices)) <= 6e7
    assert needed(run, corpus, Change(data=devices // 2)) > 6e7
    device_memory.check(plan_of({**with_gb(0.06), "train.microbatches": parts}))


def test_a_state_that_is_too_large_can_only_be_shared(plan_of):
    """Two states and the gradients take 24 MB, however the batch is cut."""
    message = refusal(plan_of(with_gb(0.02)))
    assert "microbatches" not in message and "remat" not in message
    assert re.search(r"20 MB; set mesh.data=\d+, over as many such devices$", message)


def test_an_estimate_alone_refuses_nothing(plan_of):
    """Between what is sure and the whole estimate, a run is let through."""
    (run,) = (plan := plan_of(with_gb(0.001))).runs
    memory = run_memory(run, plan.corpus.train.nbytes)
    sure = memory.at_least(on_cpu=False) + memory.state
    assert sure < needed(run)
    device_memory.check(plan_of(with_gb(1.001 * sure / 1e9)))
    refusal(plan_of(with_gb(0.98 * sure / 1e9)))


def test_an_accelerator_is_judged_by_a_row_at_a_time(plan_of, monkeypatch):
    """Its loop cuts the batch by itself; a CPU's cannot."""
    (run,) = (plan := plan_of(LARGE)).runs
    rows = run.spec.batch_size
    monkeypatch.setattr(
        device_memory, "available", lambda plan: (int(1.05 * needed(run, change=Change(rows))), "")
    )
    refusal(plan)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device_memory.check(plan)


def test_finished_runs_are_not_refused(plan_of, monkeypatch):
    plan = plan_of(with_gb(0.001))
    monkeypatch.setattr(type(plan.runs[0]), "finished", property(lambda run: True))
    device_memory.check(plan)


def test_remat_and_the_corpus_count(plan_of):
    (run,) = plan_of(LARGE).runs
    plain, again = run_memory(run), run_memory(run, change=Change(remat=True))
    assert again.activations < plain.activations / 5 and again.total < plain.total
    assert run_memory(run, 10**6).total - plain.total == 10**6
    resident = run.config.launch.resident_bytes
    assert run_memory(run, resident + 1).data < run_memory(run, resident).data


def test_a_row_a_shape_and_arm(plan_of, capsys):
    points = [{"seed": 1}, {"seed": 2}, {"precision": "ternary"}]
    plan = plan_of({"launch.device_memory_gb": 1.5}, points)
    device_memory.show(display.console(), plan)
    out = capsys.readouterr().out
    assert "which is 1.5 GB (launch.device_memory_gb)" in out
    assert sum(" yes " in line for line in out.splitlines()) == 2
    row = next(line for line in out.splitlines() if " ternary " in line)
    assert f" {device_memory.amount(run_memory(plan.runs[2]).optimizer)} " in row


def test_the_dry_run_shows_the_plan_and_refuses(tiny_overrides, tmp_path, capsys):
    arguments = [f"--config.{key}={value}" for key, value in tiny_overrides.items()]
    command = ["run", *arguments, f"--workdir={tmp_path / 'w'}"]
    tiny = "--config.launch.device_memory_gb=0.0001"
    for more in (["--dry_run"], []):
        assert main([*command, tiny, *more]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert "where a device has 100 kB" in captured.err
        assert ("what a run needs of a device's memory" in captured.out) == bool(more)
        assert not (tmp_path / "w").exists()
    assert main([*command, "--dry_run"]) == 0


def test_a_negative_memory_is_refused(plan_of):
    with pytest.raises(ConfigError, match=r"launch\.device_memory_gb=-1\.0: it must not be neg"):
        plan_of({"launch.device_memory_gb": -1.0})


def test_amounts():
    sizes = (25_300_000_000, 141_000, 2_000_000, 7)
    assert [device_memory.amount(n) for n in sizes] == ["25.3 GB", "141 kB", "2 MB", "7 B"]
