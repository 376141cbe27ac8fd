"""A whole run of several workers against one, and checkpoints between different numbers of workers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from chaos import compare as greatest_difference

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig
from nsl_dist.data.images import decode
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.transforms import Normalise, eval_transform
from nsl_dist.embedder import load_embedder
from nsl_dist.proxies.partition import Partition
from nsl_dist.run import MODEL_FILE, OPTIMIZER_FILE, RunFolder, rows_file
from nsl_dist.schedule import Schedule
from nsl_dist.training import checkpoint
from nsl_dist.training.step import TrainingStep
from tests.support.checkpoints import write_step
from tests.support.images import encode
from tests.support.networks import remove_kinks
from tests.support.ranks import Ranks

CONFIG = TrainConfig(
    precision="float32",
    data=DataConfig(batch_size=12, images_per_class=2, image_size=32),
    model=ModelConfig(backbone="shufflenet_v2_x0_5", dim=16, batch_norm="frozen"),  # free of batch statistics
    proxies=ProxyConfig(sample_rate=1.0),
    optim=OptimConfig(epochs=4, new_layers_epochs=1, lr=0.01, warmup_steps=3),
)
PLAN = ClassBalancedPlan(np.full(11, 5), batch_size=12, images_per_class=2, seed=0)  # 4 steps an epoch, 11 classes
NUM_STEPS = 10
# ResNet-18 does not amplify rounding errors from step to step as ShuffleNet with random weights does.
LONG = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, backbone="resnet18"),
    optim=dataclasses.replace(CONFIG.optim, epochs=9, lr=0.001),
)


def images_of(step: int) -> torch.Tensor:
    batch = PLAN.batch(step)
    rng = np.random.default_rng((9, step))
    pixels = batch.labels[:, None, None, None] * 20 + rng.integers(0, 30, (PLAN.batch_size, 3, 32, 32))
    return torch.from_numpy(pixels.astype(np.uint8))


def train(
    rank: int,
    world_size: int,
    *,
    first_step: int,
    last_step: int,
    load: Path | None,
    proxies: ProxyConfig = CONFIG.proxies,
    long: bool = False,
) -> TrainingStep:
    training = TrainingStep(
        LONG if long else dataclasses.replace(CONFIG, proxies=proxies),
        num_classes=PLAN.num_classes,
        schedule=Schedule((LONG if long else CONFIG).optim, PLAN.steps_per_epoch),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        group=dist.group.WORLD if world_size > 1 else None,
    )
    if long:
        remove_kinks(training.model)
    if load is not None:
        loaded = checkpoint.load(str(load), training, digest="d")
        assert loaded.step == first_step
        own = sum(rows_CD.nbytes for rows_CD in training.proxies.state().values())
        whole = sum((load / name).stat().st_size for name in (MODEL_FILE, OPTIMIZER_FILE))
        assert whole + own <= loaded.num_bytes <= whole + own + 512 * 4  # headers of four files at most
    size = PLAN.batch_size // world_size
    for step in range(first_step, last_step):
        training.run(images_of(step)[rank * size : (rank + 1) * size], PLAN.batch(step).labels, step=step)
    if last_step == NUM_STEPS:
        training.proxies.complete(step=last_step)
    return training


def state_of(training: TrainingStep) -> dict[str, torch.Tensor]:
    rows = {f"proxies.{name}": rows_CD for name, rows_CD in training.proxies.state().items()}
    return training.model.state_dict() | rows


def compare(rank: int, world_size: int, expected: Path, *, tolerance: float, training: TrainingStep) -> None:
    exact = torch.load(expected)
    part = Partition(PLAN.num_classes, rank, world_size)
    for name, ours in state_of(training).items():
        theirs = exact[name]
        if name.startswith("proxies."):
            theirs = theirs[part.start : part.stop]
        assert ours.shape == theirs.shape
        if theirs.numel():
            scale = float(theirs.double().abs().max()) or 1.0
            assert float((ours.double() - theirs.double()).abs().max()) <= tolerance * scale, name


def run_and_compare(rank: int, world_size: int, expected: Path) -> None:
    training = train(rank, world_size, first_step=0, last_step=NUM_STEPS, load=None)
    compare(rank, world_size, expected, tolerance=2e-3, training=training)


def save(rank: int, world_size: int, folder: Path, step: int, proxies: ProxyConfig) -> None:
    """Write a checkpoint after `step` iterations, then train to the end."""
    training = train(rank, world_size, first_step=0, last_step=step, load=None, proxies=proxies)
    write_step(training, folder, step=step)
    torch.save(state_of(training), folder / f"rank{rank}.pt")


def load_and_compare(rank: int, world_size: int, folder: Path, expected: Path, step: int, proxies: ProxyConfig) -> None:
    training = train(rank, world_size, first_step=step, last_step=step, load=folder, proxies=proxies)
    compare(rank, world_size, expected, tolerance=0.0, training=training)


def interrupt_and_compare(rank: int, world_size: int, folder: Path, step: int, proxies: ProxyConfig) -> None:
    """A run that is saved and one that goes on from there end as one that was neither, to the last bit."""
    whole = train(rank, world_size, first_step=0, last_step=NUM_STEPS, load=None, proxies=proxies)
    torch.save(state_of(whole), folder / f"whole{rank}.pt")
    save(rank, world_size, folder, step, proxies)
    if world_size > 1:
        dist.barrier()
    ours = state_of(train(rank, world_size, first_step=step, last_step=NUM_STEPS, load=folder, proxies=proxies))
    expected = torch.load(folder / f"whole{rank}.pt")
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def go_on(rank: int, world_size: int, folders: list[Path], first_step: int, last_step: int) -> None:
    """Train from the checkpoint in one folder, or from the start, and write another."""
    load = folders[0] if first_step > 0 else None
    training = train(rank, world_size, first_step=first_step, last_step=last_step, load=load, long=True)
    write_step(training, folders[1], step=last_step)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "state.pt"
    torch.save(state_of(train(0, 1, first_step=0, last_step=NUM_STEPS, load=None)), path)
    return path


@pytest.mark.parametrize("world_size", [2, 4])
def test_ten_steps_equal_one_workers(ranks: Ranks, one_worker: Path, world_size: int) -> None:
    ranks.run(run_and_compare, world_size, one_worker)


def test_training_learns() -> None:
    training = train(0, 1, first_step=0, last_step=0, load=None)
    losses = [training.run(images_of(0), PLAN.batch(0).labels, step=step).item() for step in range(16)]
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize(
    ("step", "proxies"),
    [
        (4, ProxyConfig()),
        (6, ProxyConfig(sample_rate=0.2)),
        (6, ProxyConfig(sample_rate=0.2, optimizer="adagrad", dtype="bfloat16", placement="disk")),
    ],
)
def test_checkpoints_reshard(ranks: Ranks, tmp_path: Path, step: int, proxies: ProxyConfig) -> None:
    """Saved by 4 workers (3, 3, 3 and 2 classes), loaded bit-exact by 1, 2, 3 and 5 (the last has none)."""
    ranks.run(save, 4, tmp_path, step, proxies)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(4)]
    rows = [name for name in parts[0] if name.startswith("proxies.")]
    whole = parts[0] | {name: torch.cat([part[name] for part in parts]) for name in rows}
    torch.save(whole, tmp_path / "whole.pt")
    load_and_compare(0, 1, tmp_path, tmp_path / "whole.pt", step, proxies)
    for world_size in (2, 3, 5):
        ranks.run(load_and_compare, world_size, tmp_path, tmp_path / "whole.pt", step, proxies)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("step", "proxies"),
    [
        (2, ProxyConfig()),  # in the warm-up, which ends with step 4
        (4, ProxyConfig(sample_rate=0.2)),
        (7, ProxyConfig(sample_rate=0.2)),
        (7, ProxyConfig(sample_rate=0.2, optimizer="adagrad", dtype="bfloat16", placement="disk")),
    ],
)
def test_going_on_from_a_checkpoint_is_exact(
    ranks: Ranks, tmp_path: Path, world_size: int, proxies: ProxyConfig, step: int
) -> None:
    ranks.run(interrupt_and_compare, world_size, tmp_path, step, proxies)


def test_going_on_with_other_numbers_of_workers(ranks: Ranks, tmp_path: Path) -> None:
    """12 steps of 2 workers, 12 of 3 and 12 of 1 end as 36 of one: model, momentum and proxies."""
    runs = [tmp_path / name / f"checkpoint_{0:09d}" for name in ("one", "two", "three", "changed")]
    ranks.run(go_on, 1, [runs[0], runs[0]], 0, 36)
    ranks.run(go_on, 2, [runs[0], runs[1]], 0, 12)
    ranks.run(go_on, 3, [runs[1], runs[2]], 12, 24)
    ranks.run(go_on, 1, [runs[2], runs[3]], 24, 36)
    difference = greatest_difference(str(runs[0].parent), str(runs[3].parent))
    assert difference <= 1e-3


def test_a_checkpoint_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    write_step(train(0, 1, first_step=0, last_step=1, load=None), tmp_path / "checkpoint_000000001", step=1)
    write_step(train(0, 1, first_step=0, last_step=2, load=None), tmp_path / "checkpoint_000000002", step=2)
    newest = tmp_path / "checkpoint_000000002"
    assert RunFolder(str(tmp_path)).newest_checkpoint() == (str(newest), 2)
    rows = newest / rows_file(0, 1)
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it was cut off"):
        train(0, 1, first_step=2, last_step=2, load=newest)
    optimizer = newest / OPTIMIZER_FILE
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"optimizer.safetensors is damaged"):
        train(0, 1, first_step=2, last_step=2, load=newest)
    rows.write_bytes(b"")  # as a power cut leaves it
    assert RunFolder(str(tmp_path)).newest_checkpoint() == (str(tmp_path / "checkpoint_000000001"), 1)


def test_checkpoints_half_written_do_not_count(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    names = [Path(folder.checkpoint(step)).name for step in (1, 2, 3)]
    training = train(0, 1, first_step=0, last_step=1, load=None)
    for step, name in enumerate(names, start=1):
        write_step(training, tmp_path / name, step=step)
    (tmp_path / names[1] / rows_file(0, 1)).unlink()
    folder.prune_checkpoints(keep=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[2]]
    write_step(training, tmp_path / names[1], step=2)
    (tmp_path / names[2] / "run.json").unlink()
    folder.prune_checkpoints(keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [names[1]]


def test_a_model_alone_embeds_images(tmp_path: Path) -> None:
    training = train(0, 1, first_step=0, last_step=3, load=None)
    write_step(training, tmp_path, step=3)
    pixels = images_of(0)[:3].permute(0, 2, 3, 1).numpy()
    encoded = [encode(each, "PNG") for each in pixels]
    embedder = load_embedder(str(tmp_path))
    ours = embedder(encoded, batch_size=2)
    data = training.config.data
    cropped = torch.stack([eval_transform(decode(each), data) for each in encoded])
    with torch.inference_mode():
        expected = training.model.eval()(Normalise()(cropped)).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    with pytest.raises(ValueError, match="bytes: "):
        embedder([b"no image"])
    with pytest.raises(FileNotFoundError, match=r"embedder.json is missing: give a checkpoint"):
        load_embedder(str(tmp_path / "best"))
    (tmp_path / "embedder.json").write_text('{"version": 1, "model": {"pool": "gem"}')
    with pytest.raises(ValueError, match=r"embedder.json is damaged, or of another release"):
        load_embedder(str(tmp_path))


def test_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    training = train(0, 1, first_step=0, last_step=0, load=None)
    write_step(training, tmp_path, step=0, digest="other")
    with pytest.raises(ValueError, match="is of data other with 11 classes, this run trains on d with 11"):
        train(0, 1, first_step=0, last_step=0, load=tmp_path)


def test_warm_up_moves_the_new_layers_only() -> None:
    start = {
        name: tensor.clone() for name, tensor in state_of(train(0, 1, first_step=0, last_step=0, load=None)).items()
    }
    warm = state_of(train(0, 1, first_step=0, last_step=PLAN.steps_per_epoch, load=None))
    changed = {name for name in start if not torch.equal(start[name], warm[name])}
    assert changed == {"linear.weight", "proxies.weight", "proxies.velocity", "proxies.step"}


def test_without_a_linear_layer_the_warm_up_moves_the_proxies_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dim=1024))  # as wide as the features
    monkeypatch.setitem(globals(), "CONFIG", config)
    training = train(0, 1, first_step=0, last_step=1, load=None)
    assert training.optimizer is None
    assert train(0, 1, first_step=0, last_step=5, load=None).optimizer is not None
