"""Results of a training run, as stored in its `results.json`. Imports neither Ray nor torch."""

from dataclasses import dataclass
from typing import Any

from nsl_dist.retrieval.results import EvaluationResults


@dataclass(frozen=True, kw_only=True)
class TrainingResults:
    """Results of a finished training run.

    Attributes:
        evaluation: evaluation of the trained model.
        untrained: evaluation before the first iteration, if requested.
        run_name: name of the run and of its folder.
        steps: number of iterations.
        seconds: duration by phase ("setup", "train", "evaluate").
        train_images_per_second: median throughput; None if training was too short to measure it.
        data: digest, source and splits.
        left_out_shards: damaged shards whose classes were left out of training.
        growth: see `growth.Growth`, in JSON form; None for a run that did not start from another.
        config: configuration of the run in JSON form.

    """

    evaluation: EvaluationResults
    untrained: EvaluationResults | None = None
    run_name: str
    mlflow_run_id: str
    steps: int
    seconds: dict[str, float]
    train_images_per_second: float | None
    data: dict[str, Any]
    left_out_shards: list[str]
    growth: dict[str, Any] | None = None
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dict with the keys of the evaluation and of the training.

        `seconds` is for the whole run; the evaluation's are under `evaluation_seconds`.
        """
        untrained = {"untrained": self.untrained.to_json()} if self.untrained is not None else {}
        evaluation = self.evaluation.to_json()
        return untrained | evaluation | {
            "evaluation_seconds": evaluation["seconds"],
            "run_name": self.run_name,
            "mlflow_run_id": self.mlflow_run_id,
            "steps": self.steps,
            "seconds": self.seconds,
            "train_images_per_second": self.train_images_per_second,
            "data": self.data,
            "left_out_shards": self.left_out_shards,
            "growth": self.growth,
            "config": self.config,
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainingResults":
        """Restore results from the output of `to_json`; unknown keys are ignored."""
        own = ("run_name", "mlflow_run_id", "steps", "seconds", "train_images_per_second", "data", "left_out_shards")
        return cls(
            evaluation=EvaluationResults.from_json(content | {"seconds": content["evaluation_seconds"]}),
            untrained=EvaluationResults.from_json(content["untrained"]) if "untrained" in content else None,
            growth=content.get("growth"),
            config=content["config"],
            **{name: content[name] for name in own},
        )
