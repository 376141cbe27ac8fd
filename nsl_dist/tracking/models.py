"""Registers embedding models with MLflow. This module is the model flavour that MLflow's `Model.log` saves with.

A registered model contains a checkpoint's model for `mlflow.pyfunc` (takes images, see `nsl_dist/pyfunc.py`) and for
`mlflow.pytorch` (the bare network, takes normalised pixels), plus the code and package versions that both need.
"""

import io
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image

import nsl_dist
from nsl_dist import storage
from nsl_dist.embedder import load_embedder, read_description
from nsl_dist.model import TIMM
from nsl_dist.run import DESCRIPTION_FILE, MODEL_FILE

# Imports of nsl_dist/pyfunc.py; timm is added for its backbones.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pyarrow", "safetensors", "simplejpeg", "torch", "torchvision")


def register(checkpoint: str, *, name: str, run_id: str, step: int, tracking_uri: str) -> int:
    """Log the model of a checkpoint to a run and register it.

    Args:
        checkpoint: folder or URI.
        name: name in the registry, created if it does not exist.
        run_id: id of the training's MLflow run.
        step: iterations before the checkpoint.
        tracking_uri: MLflow server or database, also of the registry unless MLFLOW_REGISTRY_URI is set.

    Returns:
        The version number.

    """
    logging.getLogger("mlflow.pytorch").setLevel(
        logging.ERROR
    )  # suppress its warning about pickle, which is chosen below
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_experiment(experiment_id=mlflow.get_run(run_id).info.experiment_id)
    info = Model.log(
        None,
        flavor=sys.modules[__name__],
        name="embedder",
        registered_model_name=name,
        run_id=run_id,
        step=step,
        checkpoint=checkpoint,
    )
    return int(info.registered_model_version)


def save_model(path: str, mlflow_model: Model, *, checkpoint: str) -> None:
    """Save the model of a checkpoint in both flavours to the folder `path`; called by MLflow."""
    embedder = load_embedder(checkpoint)
    backbone = read_description(checkpoint)[0].backbone
    packages = [*REQUIREMENTS, *(["timm"] if backbone.startswith(TIMM) else [])]
    signature = ModelSignature(
        inputs=Schema(
            [ColSpec(DataType.binary, "image", required=False), ColSpec(DataType.string, "path", required=False)]
        ),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, embedder.dim))]),
        params=ParamSchema([ParamSpec("binary", DataType.boolean, default=False)]),
    )
    mlflow.pytorch.save_model(
        embedder.model,
        path,
        mlflow_model=mlflow_model,
        code_paths=[str(Path(nsl_dist.__file__).parent)],
        serialization_format="pickle",  # unlike a traced graph, the network can be trained further
        pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in packages],
        signature=signature,
        input_example=pd.DataFrame({"image": [_example(shade) for shade in (64, 192)]}),
    )
    for name in (MODEL_FILE, DESCRIPTION_FILE):
        storage.write_bytes(str(Path(path, "embedder", name)), storage.read_bytes(storage.join(checkpoint, name)))
    served: dict[str, Any] = mlflow_model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    served |= {mlflow.pyfunc.MAIN: "nsl_dist.pyfunc", mlflow.pyfunc.DATA: "embedder"}
    del served[mlflow.pyfunc.MODEL_CONFIG]  # only used by the loader of mlflow.pytorch
    mlflow_model.save(str(Path(path, "MLmodel")))


def _example(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, shade, shade)).save(stream, "JPEG")
    return stream.getvalue()
