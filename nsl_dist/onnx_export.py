"""Export of the embedding model to ONNX, verified against torch."""

from pathlib import Path

import torch

from nsl_dist.embedder import load_embedder

MOST_DIFFERENCE = 1e-4  # per coordinate of a unit vector
CHECKED_BATCHES = (1, 7)


def export_onnx(checkpoint: str, out: Path) -> float:
    """Export the model of a checkpoint: `images`, uint8 `[B, 3, size, size]`, to `embeddings`, `[B, dim]`.

    Pixels must be prepared as by `nsl_dist.data.transforms.eval_transform`: resized, ignoring the aspect ratio, and
    centre-cropped.

    Returns:
        The largest difference of a coordinate from torch, over batches of several sizes.

    Raises:
        ValueError: required packages are not installed, or the graph's output differs from torch's.

    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # needed by torch.onnx, whose own error is less clear
    except ImportError as error:
        raise ValueError(f"{error}; install nsl_dist[onnx]") from error

    embedder = load_embedder(checkpoint)
    model = embedder.network.eval()
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
