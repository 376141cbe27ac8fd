"""What workers, evaluations during training and the node monitor tell the driver: one dataclass for each kind of news.

They pass through a queue in an actor, which imports this module: it must stay cheap to import.
"""

from dataclasses import dataclass

from nsl_dist.retrieval.results import EvaluationResults


@dataclass(frozen=True)
class AttemptStarted:
    """The workers have finished the first iteration since they were started.

    Attributes:
        step: that iteration, counted from 0.
        world_size: number of workers.
        checkpoint: that they started from; None: from the beginning.
        bytes_read: of the checkpoint, by the first worker.
        num_left_out: classes of damaged shards that the attempt does without.

    """

    step: int
    world_size: int
    checkpoint: str | None
    bytes_read: int
    num_left_out: int


@dataclass(frozen=True)
class StepMetrics:
    """Progress after `step` iterations; rates are averages since the last report.

    Attributes:
        seconds_left: until the last iteration; None after the first, which waits for the first batch.

    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    learning_rate_proxies: float
    images_per_second: float
    step_seconds: float
    data_wait_share: float
    seconds_left: float | None


@dataclass(frozen=True)
class CheckpointWritten:
    """A checkpoint is complete.

    Attributes:
        step: iterations before it.
        name: of its folder.
        seconds: that writing took, beside the training.
        waited: seconds that the training waited for the copy.

    """

    step: int
    name: str
    seconds: float
    waited: float


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint was evaluated during training."""

    step: int
    results: EvaluationResults


@dataclass(frozen=True)
class ClusterChanged:
    """Nodes have joined or left; `described` says in words what the cluster has now."""

    step: int
    described: str


@dataclass(frozen=True)
class NodeMeasured:
    """Metrics of one node by MLflow's names."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class Warned:
    """A worker has trouble that does not stop it."""

    step: int
    text: str


@dataclass(frozen=True)
class Left:
    """The workers have left after `step` iterations, as they were told to, with a checkpoint."""

    step: int


Record = AttemptStarted | StepMetrics | CheckpointWritten | Evaluated | ClusterChanged | NodeMeasured | Warned | Left
