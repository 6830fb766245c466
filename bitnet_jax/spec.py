"""A run, resolved: every number that decides its result, and the identity that follows."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from bitnet_jax import cost
from bitnet_jax.optim import OptimizerConfig, Schedule
from bitnet_jax.phases import Phases
from bitnet_jax.train_step import StepConfig
from bitnet_jax.trajectory import Segment, plan_segments, total_ticks


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Which tokens. `sha256` covers the token files, so a path is not part of a run's identity."""

    name: str
    sha256: str
    sequence_length: int
    eval_tokens: int  # held-out tokens of every evaluation; 0 for all


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One training trajectory. `ends` are the optimizer steps at which an endpoint is measured.

    rollbacks: how often a run that diverges may go back and try other data (`member.py`).
    tags: words that a sweep wants beside the results; they are no part of the identity.
    """

    size: str
    seed_init: int
    seed_data: int
    step: StepConfig
    data: DataSpec
    batch_size: int  # sequences an optimizer step
    ends: tuple[int, ...]
    schedule: Schedule
    peak_lr: float
    weight_decay: float
    phases: Phases = Phases()
    rollbacks: int = 2
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.data.sequence_length

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.step.optimizer

    @property
    def deployed(self) -> StepConfig:
        """The arm that endpoints are evaluated in: the late one, where there is one."""
        return self.phases.deployed(self.step)

    @property
    def variant(self) -> str:
        """What differs from the default recipe beside the arm and its rates: `norms=pre,..`."""
        shape = {
            "vocab_size",
            "layers",
            "width",
            "ff_width",
            "heads",
            "kv_heads",
            "remat",
            "attention",
        }
        defaults: list[tuple[Any, set[str]]] = [
            (self.step.model, shape),
            (self.step.optimizer, set()),
            (self.step, {"model", "precision", "optimizer", "microbatches", "mesh", "warming"}),
            (self.phases, {"warmup_steps", "steepness", "late", "late_fraction"}),
        ]
        changed = [
            f"{field.name}={getattr(part, field.name)}"
            for part, left_out in defaults
            for field in dataclasses.fields(part)
            if field.name not in left_out and getattr(part, field.name) != field.default
        ]
        schedule = [] if self.schedule.name == "wsd" else [f"schedule={self.schedule.name}"]
        return ",".join(changed + schedule)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return plan_segments(self.schedule, self.ends)

    @property
    def flops_per_token(self) -> int:
        """Exact training FLOPs a token, attention included."""
        return cost.training_flops_per_token(self.step.model, self.data.sequence_length)

    @property
    def total_flops(self) -> int:
        """What training the whole run costs: the trunk once and every decay."""
        return total_ticks(self.segments) * self.batch_tokens * self.flops_per_token

    @property
    def independent_flops(self) -> int:
        """What the same endpoints would cost as runs of their own, each trained from its start."""
        return sum(self.ends) * self.batch_tokens * self.flops_per_token

    def identity(self) -> dict[str, Any]:
        """Everything that can change the result, as plain JSON values."""
        values = _plain(dataclasses.asdict(self))
        del values["tags"], values["step"]["model"]["attention"], values["step"]["mesh"]
        for precision in (values["step"]["precision"], values["phases"]["late"]):
            if precision:
                del precision["carrier"], precision["wire"]  # their choices are equal bit for bit
        return values

    @property
    def group(self) -> str:
        """Equal for runs that one program can train side by side: those that differ in seeds,
        learning rate and weight decay alone."""
        values = self.identity()
        for key in ("seed_init", "seed_data", "peak_lr", "weight_decay"):
            del values[key]
        arms = [(arm.carrier, arm.wire) for arm in (self.step.precision, self.deployed.precision)]
        machine = [arms, self.step.mesh, self.step.model.attention]
        return json.dumps([values, machine], sort_keys=True)

    @property
    def run_id(self) -> str:
        """Readable, and ending in a hash of the identity: same config, same run."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.size}-{self.step.precision.name}-s{self.seed_init}-{digest}"


def _plain(value: Any) -> Any:
    """Nested dataclass values as what JSON can hold; dtypes by name."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return np.dtype(value).name
