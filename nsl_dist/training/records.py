"""Records sent to the driver by workers, evaluations during training and the node monitor.

They pass through a queue actor that imports this module, so it must stay cheap to import.
"""

from dataclasses import dataclass

from nsl_dist.retrieval.results import EvaluationResults


@dataclass(frozen=True)
class AttemptStarted:
    """The workers have finished their first iteration since they were started.

    Attributes:
        step: that iteration, counted from 0.
        checkpoint: the checkpoint they started from; None if they started from the beginning.
        bytes_read: bytes of the checkpoint read by the first worker.
        num_left_out: number of classes left out because their shards are damaged.
        compile_seconds: time that the first worker took to compile the model; None: it did not.

    """

    step: int
    world_size: int
    checkpoint: str | None
    bytes_read: int
    num_left_out: int
    compile_seconds: float | None


@dataclass(frozen=True)
class StepMetrics:
    """Progress after `step` iterations; rates are averages since the last report.

    Attributes:
        seconds_left: estimated time to the last iteration; None after the first, which includes waiting for data.

    """

    step: int
    loss: float
    accuracy_sampled: float  # share of the batch whose class is the nearest of the sampled ones
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
        step: number of iterations before it.
        name: name of its folder.
        seconds: time to write it in the background.
        waited: seconds that training waited for the copy.

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
    """Nodes have joined or left; `described` is the new size of the cluster in words."""

    step: int
    described: str


@dataclass(frozen=True)
class NodeMeasured:
    """Metrics of one node, by MLflow metric name."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class Warned:
    """A worker has a problem that does not stop it."""

    step: int
    text: str


@dataclass(frozen=True)
class Left:
    """The workers left as ordered after `step` iterations, with a checkpoint."""

    step: int


Record = AttemptStarted | StepMetrics | CheckpointWritten | Evaluated | ClusterChanged | NodeMeasured | Warned | Left
