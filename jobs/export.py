r"""Export a trained model.

To MLflow's model registry:

    python jobs/export.py --checkpoint ~/nsl_dist/runs/NAME/best --register sop

To an ONNX file, verified against torch:

    python jobs/export.py --checkpoint ~/nsl_dist/runs/NAME/best --onnx sop.onnx
"""

import dataclasses
from pathlib import Path

import tyro

from nsl_dist import storage
from nsl_dist.commandline import run_job


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to export, and where."""

    checkpoint: str
    """Folder or URI of a checkpoint, or of a run's `best`."""
    register: str | None = None
    """Name in MLflow's model registry. The new version can be loaded with mlflow.pyfunc and mlflow.pytorch."""
    onnx: Path | None = None
    """ONNX file to write, from uint8 images [N, 3, size, size] to unit vectors [N, dim]; verified against torch."""
    storage: str = "~/nsl_dist"
    """Folder or URI of the training, which contains MLflow's database unless --tracking-uri is set."""
    tracking_uri: str | None = None
    """MLflow server or database. If None, MLFLOW_TRACKING_URI if set, else sqlite:///STORAGE/mlflow.db, or
    ~/nsl_dist/mlflow.db if the storage is remote."""


def main() -> None:
    """Parse, export, print where to."""
    config = tyro.cli(ExportConfig, description=__doc__)
    checkpoint = storage.absolute(config.checkpoint).rstrip("/")
    if config.register is None and config.onnx is None:
        raise ValueError("nothing to do: give --register NAME, --onnx FILE or both")

    from nsl_dist.run import RunFolder  # after parsing: --help needs no pyarrow

    if config.onnx is not None:
        from nsl_dist.onnx_export import export_onnx

        difference = export_onnx(checkpoint, config.onnx)
        print(f"{config.onnx}: {config.onnx.stat().st_size / 2**20:.1f} MiB; differs from torch by {difference:.1e}")
    if config.register is not None:
        from nsl_dist.tracking.tracker import Tracker

        tracker = Tracker(config.tracking_uri, storage_root=config.storage)
        folder = checkpoint.rpartition("/")[0]
        run_id = RunFolder(folder).mlflow_run_id()
        if run_id is None:
            raise ValueError(f"{folder} has no MLflow run to register a model of; give a checkpoint within a run")
        tracker.add_to(run_id)
        print(f"{tracker.uri}: {tracker.register(checkpoint, name=config.register)}")


if __name__ == "__main__":
    run_job(main)
