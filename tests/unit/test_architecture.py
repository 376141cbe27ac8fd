"""Imports point one way, and what must run without Ray does not import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nsl_dist"
LAYERS = {
    "config": 0, "storage": 0, "device": 0, "background": 0, "progress": 0, "memory_map": 0, "ray_internals": 0,
    "cluster": 1, "schedule": 1, "stopping": 1, "recipes": 2, "data": 2, "proxies": 2, "run": 3, "model": 4,
    "commandline": 4, "embedder": 5, "tracking": 6, "onnx_export": 6, "retrieval": 7, "pyfunc": 8, "training": 8,
    "ablation": 9,
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "nsl_dist" and len(parts) > 1 and parts[1] != layer:
            assert LAYERS[parts[1]] < LAYERS[layer] or (parts[1] in ("data", "model") and LAYERS[layer] > 1), (
                f"{path.name} of layer {layer} imports {name}"
            )
        if name.startswith("ray.train"):
            assert layer == "training", f"{path.name} imports {name}; only training and jobs may"
        if name.startswith("mlflow"):
            assert layer == "tracking", f"{path.name} imports {name}; only tracking may"


def test_data_does_not_import_model_nor_model_data() -> None:
    for path in modules():
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        peers = {"data", "model", "proxies"} - {layer}
        if layer in ("data", "model", "proxies"):
            assert not {f"nsl_dist.{peer}" for peer in peers} & imports_of(path), path


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        (["training.step", "data.sampler", "proxies.matrix", "recipes"], {"ray", "mlflow"}),
        (["retrieval.metrics", "retrieval.neighbours", "retrieval.ties"], {"ray", "torch", "pyarrow", "faiss"}),
        (["retrieval.results", "training.results"], {"ray", "torch", "mlflow", "faiss"}),
    ],
)
def test_what_must_run_without_ray_does_not_import_it(modules: list[str], unneeded: set[str]) -> None:
    imports = "; ".join(f"import nsl_dist.{module}" for module in modules)
    done = subprocess.run([sys.executable, "-c", f"{imports}; import sys; print(*sys.modules)"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not unneeded & set(done.stdout.decode().split())
