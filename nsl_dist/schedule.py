"""Phases and learning rates of a run."""

import math
from dataclasses import dataclass

from nsl_dist.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """The iterations of a run: `num_new_layers_steps` train only the new layers, the following ones train all."""

    config: OptimConfig
    steps_per_epoch: int

    @property
    def num_new_layers_steps(self) -> int:
        """Iterations of the first phase."""
        return self.config.new_layers_epochs * self.steps_per_epoch

    @property
    def num_steps(self) -> int:
        """Iterations of the run."""
        return self.num_new_layers_steps + self.config.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the backbone's learning rate at a step. It is constant in the first phase (paper, section 4.1)."""
        config, step = self.config, step - self.num_new_layers_steps
        if step < 0:
            return config.lr
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "step":
            return config.lr * warmup * (1.0 if step < config.step_epochs * self.steps_per_epoch else 0.1)
        progress = step / (config.epochs * self.steps_per_epoch)
        return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
