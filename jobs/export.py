r"""Export a trained model.

To MLflow's model registry:

    python jobs/export.py --checkpoint ~/nsl_dist/runs/NAME --register sop

To an ONNX file, verified against torch:

    python jobs/export.py --checkpoint ~/nsl_dist/runs/NAME --onnx sop.onnx
"""

import dataclasses
from pathlib import Path

import tyro

from nsl_dist.commandline import run_job


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to export, and where."""

    checkpoint: str
    """Folder or URI of a run, whose best model is exported, or of a checkpoint."""
    register: str | None = None
    """Name in MLflow's model registry. The new version can be loaded with mlflow.pyfunc and mlflow.pytorch."""
    onnx: Path | None = None
    """ONNX file to write, from uint8 images [N, 3, size, size] to unit vectors [N, dim]; verified against torch."""
    tracking_uri: str | None = None
    """MLflow server or database. If None, that of the checkpoint's training."""


def main() -> None:
    """Parse, export, print where to."""
    config = tyro.cli(ExportConfig, description=__doc__)
    if config.register is None and config.onnx is None:
        raise ValueError("nothing to do: give --register NAME, --onnx FILE or both")

    from nsl_dist.run import RunFolder, model_of_run  # after parsing: --help needs no pyarrow

    checkpoint = model_of_run(config.checkpoint)
    if checkpoint is None:
        raise FileNotFoundError(f"no model in {config.checkpoint}; give a run that was evaluated, or a checkpoint")

    if config.onnx is not None:
        from nsl_dist.onnx_export import export_onnx

        difference = export_onnx(checkpoint, config.onnx)
        print(f"{config.onnx}: {config.onnx.stat().st_size / 2**20:.1f} MiB; differs from torch by {difference:.1e}")
    if config.register is not None:
        from nsl_dist.tracking.tracker import Tracker

        folder = RunFolder.holding(checkpoint)
        if folder is None:
            raise ValueError(f"{checkpoint} is of no run that MLflow knows; give a run's `best` or checkpoint")
        tracker = Tracker(config.tracking_uri or folder.tracking_uri(), storage_root=folder.storage_root)
        tracker.add_to(str(folder.mlflow_run_id()))
        print(f"{tracker.uri}: {tracker.register(checkpoint, name=config.register)}")


if __name__ == "__main__":
    run_job(main)
