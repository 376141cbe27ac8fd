"""The embedding model as ONNX, checked against torch before anyone relies on it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from nsl_dist.data.transforms import normalise
from nsl_dist.embedder import load_embedder

MOST_DIFFERENCE = 1e-4  # of a coordinate of a unit vector
CHECKED_BATCHES = (1, 7)


class _FromPixels(nn.Module):
    """Normalises as training did, so that whoever runs the graph need not know how."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        embeddings_BD: Tensor = self.model(normalise(images_BCHW))
        return embeddings_BD


def export_onnx(checkpoint: str, out: Path) -> float:
    """Write the model of a checkpoint as ONNX: `images`, uint8 `[B, 3, size, size]`, to `embeddings`, `[B, dim]`.

    The pixels are those of `nsl_dist.data.transforms.eval_transform`: resized, aspect ignored, and the centre cut out.

    Args:
        checkpoint: folder or URI.
        out: file to write.

    Returns:
        The greatest difference from torch of a coordinate, over batches of several sizes.

    Raises:
        ValueError: the packages for it are not installed, or the graph does not do what torch does.

    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it, and says so less clearly
    except ImportError as error:
        raise ValueError(f"{error}; install nsl_dist[onnx]") from error

    embedder = load_embedder(checkpoint)
    model = _FromPixels(embedder.model).eval()
    random = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(256, (size, 3, embedder.image_size, embedder.image_size), dtype=torch.uint8, generator=random)
        for size in CHECKED_BATCHES
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model,
        (batches[-1],),
        out,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    difference = 0.0
    for images_BCHW in batches:
        (found_BD,) = session.run(["embeddings"], {"images": images_BCHW.numpy()})
        with torch.inference_mode():
            difference = max(difference, float((model(images_BCHW) - torch.from_numpy(found_BD)).abs().max()))
    if not difference < MOST_DIFFERENCE:
        raise ValueError(f"{out} differs from torch by {difference:.1e} > {MOST_DIFFERENCE:.0e}: do not use it")
    return difference
