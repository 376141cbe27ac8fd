"""What a training found, as `results.json` of its run holds it. Needs neither Ray nor torch."""

from dataclasses import dataclass
from typing import Any

from nsl_dist.retrieval.results import EvaluationResults


@dataclass(frozen=True, kw_only=True)
class TrainingResults:
    """A finished training.

    Attributes:
        evaluation: of the trained model.
        untrained: evaluation before the first iteration; None: there was none.
        run_name: the run's folder.
        mlflow_run_id: MLflow's id of the run.
        steps: iterations.
        seconds: by phase ("setup", "train", "evaluate").
        train_images_per_second: median throughput; None: the training was too short to measure it.
        data: digest, source and splits.
        left_out_shards: damaged shards whose classes were not trained on.
        config: of the run, as JSON.

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
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: the evaluation's keys beside those of the training.

        `seconds` are the training's; those of the evaluation are `evaluation_seconds`.
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
            "config": self.config,
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TrainingResults":
        """Return what `to_json` was called on; other keys of `content` are ignored."""
        own = ("run_name", "mlflow_run_id", "steps", "seconds", "train_images_per_second", "data", "left_out_shards")
        return cls(
            evaluation=EvaluationResults.from_json(content | {"seconds": content["evaluation_seconds"]}),
            untrained=EvaluationResults.from_json(content["untrained"]) if "untrained" in content else None,
            config=content["config"],
            **{name: content[name] for name in own},
        )
