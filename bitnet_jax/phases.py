"""How an arm changes along a trajectory: quantization that warms up, and a late switch.

Both are known on the host before a step runs, so that a phase is one more compiled program and the
steps of ordinary training pay nothing for it.
"""

import dataclasses
import math

from bitnet_jax.precision import Precision
from bitnet_jax.train_step import StepConfig

WARMUPS = ("none", "linear", "exponential", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Phases:
    """When quantization is weaker than it will be, and when the arm switches.

    warmup, warmup_steps: the strength of quantization grows from 0 to 1 over so many steps.
    steepness: k of the curved warm-ups.
    late: the arm of the last `late_fraction` of an endpoint's steps; the optimizer's state is kept
      (BitNet a4.8, arXiv:2411.04965, section 2.3: 8-bit activations, then 4-bit ones).
    """

    warmup: str = "none"
    warmup_steps: int = 0
    steepness: float = 8.0
    late: Precision | None = None
    late_fraction: float = 0.05

    def strength(self, step: int) -> float:
        """lambda in x + lambda (q(x) - x), from "Fine-tuning LLMs to 1.58bit" (Hugging Face, 2024).

        With t the share of the warm-up that has passed: linear t; exponential 1 - (1 - t)^k;
        sigmoid 1 / (1 + exp(-k (t - 1/2))). From the warm-up's end on it is 1, whatever the curve
        says there.
        """
        if self.warmup == "none" or step >= self.warmup_steps:
            return 1.0
        t = step / self.warmup_steps
        if self.warmup == "exponential":
            return 1 - (1 - t) ** self.steepness
        if self.warmup == "sigmoid":
            return 1 / (1 + math.exp(-self.steepness * (t - 0.5)))
        return t

    def late_start(self, end: int) -> int:
        """The step at which an endpoint at step `end` switches."""
        return end - max(1, round(self.late_fraction * end)) if self.late else end

    def deployed(self, base: StepConfig) -> StepConfig:
        """What an endpoint is evaluated, counted and exported as."""
        return base if self.late is None else dataclasses.replace(base, precision=self.late)

    def programs(self, base: StepConfig) -> list[StepConfig]:
        """Every config that some step of a run has."""
        warming = [dataclasses.replace(base, warming=True)] if self.warmup != "none" else []
        return [*warming, base, *([self.deployed(base)] if self.late else [])]

    def program(
        self, base: StepConfig, step: int, decay: tuple[int, int] | None
    ) -> tuple[StepConfig, float]:
        """The config of a step, and its strength. decay: as in `Schedule.factors`."""
        if decay is not None and step >= self.late_start(decay[1]):
            return self.deployed(base), 1.0
        strength = self.strength(step)
        return dataclasses.replace(base, warming=strength < 1), strength
