"""Checkpoints without a run."""

from pathlib import Path

from nsl_dist.config import DataConfig, ModelConfig, TrainConfig
from nsl_dist.embedder import describe, weights_of
from nsl_dist.model import build_model
from nsl_dist.run import DESCRIPTION_FILE, MODEL_FILE
from nsl_dist.training.checkpoint import Checkpointer
from nsl_dist.training.step import TrainingStep


def write_step(training: TrainingStep, folder: Path, *, step: int, digest: str = "d") -> None:
    """Write this worker's part of the checkpoint of a training."""

    def fail(error: OSError) -> None:
        raise error

    checkpointer = Checkpointer(training, digest=digest)
    checkpointer.copy(step=step)
    checkpointer.write(str(folder), on_failure=fail)


def write_model(location: Path, *, dim: int, image_size: int) -> Path:
    """Write an untrained model as a checkpoint that can be searched with."""
    config = TrainConfig(model=ModelConfig(dim=dim), data=DataConfig(image_size=image_size))
    location.mkdir(parents=True)
    (location / DESCRIPTION_FILE).write_bytes(describe(config))
    model = build_model(config.model, seed=0, pretrained=False)
    (location / MODEL_FILE).write_bytes(weights_of(model.state_dict()))
    return location
