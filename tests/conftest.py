"""Data and clusters that the tests share."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

OMNIGLOT = Path(__file__).parents[2] / "shared" / "data" / "omniglot_sop.zip"


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images in the layout of Stanford Online Products."""
    if not OMNIGLOT.exists():
        pytest.skip(f"the real images are not here: {OMNIGLOT}")
    root = tmp_path_factory.mktemp("omniglot")
    zipfile.ZipFile(OMNIGLOT).extractall(root)
    return next(root.rglob("Ebay_train.txt")).parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real Ray on this machine, on loopback."""
    import ray

    from nsl_dist.cluster import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()


def encode(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    """Encode an image."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_sop(root: Path, sizes: dict[str, list[int]], *, edge: int = 24, seed: int = 0) -> Path:
    """Write a small data set in the SOP layout: noisy images of one colour a class, some of them grayscale."""
    rng = np.random.default_rng(seed)
    image_id = class_id = 0
    for split, name in (("train", "Ebay_train.txt"), ("test", "Ebay_test.txt")):
        lines = ["image_id class_id super_class_id path"]
        for size in sizes[split]:
            class_id += 1
            colour = rng.integers(40, 215, 3)
            for _ in range(size):
                image_id += 1
                pixels = np.clip(colour + rng.normal(0, 12, (edge, edge, 3)), 0, 255).astype(np.uint8)
                pixels = pixels[..., 0] if image_id % 7 == 0 else pixels
                path = root / "thing_final" / f"{class_id}_{image_id}.JPG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(pixels))
                lines.append(f"{image_id} {class_id} 1 thing_final/{path.name}")
        (root / name).write_text("\n".join(lines) + "\n")
    return root
