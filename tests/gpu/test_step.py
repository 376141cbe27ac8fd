"""The training step on a GPU: against the CPU's, in bfloat16, in channels_last, and under DDP over NCCL."""

import copy
import dataclasses
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nsl_dist.config import DataConfig, ModelConfig, OptimConfig, ProxyConfig, TrainConfig
from nsl_dist.data.sampler import ClassBalancedPlan
from nsl_dist.data.transforms import Normalise
from nsl_dist.schedule import Schedule
from nsl_dist.training import checkpoint
from nsl_dist.training.step import TrainingStep
from tests.support.checkpoints import write_step
from tests.support.networks import remove_kinks

CONFIG = TrainConfig(
    precision="float32",
    data=DataConfig(batch_size=12, images_per_class=2, image_size=32),
    model=ModelConfig(backbone="resnet18", dim=16, batch_norm="frozen"),  # free of batch statistics
    proxies=ProxyConfig(sample_rate=0.8),
    optim=OptimConfig(epochs=4, new_layers_epochs=1, lr=0.002, warmup_steps=3),
)
PLAN = ClassBalancedPlan(np.full(11, 5), batch_size=12, images_per_class=2, seed=0)  # 4 steps an epoch, 11 classes
NUM_STEPS = 8  # the last half of which train all layers


def images_of(step: int) -> Tensor:
    size = CONFIG.data.image_size
    rng = np.random.default_rng((9, step))
    pixels = PLAN.batch(step).labels[:, None, None, None] * 20 + rng.integers(0, 30, (PLAN.batch_size, 3, size, size))
    return torch.from_numpy(pixels.astype(np.uint8))


def training_step(device: torch.device, config: TrainConfig = CONFIG) -> TrainingStep:
    """Return a step whose gradients are continuous: at ReLU's and max-pooling's jumps a rounding error counts much."""
    schedule = Schedule(config.optim, PLAN.steps_per_epoch)
    training = TrainingStep(config, num_classes=PLAN.num_classes, schedule=schedule, device=device)
    remove_kinks(training.model)
    return training


def run(training: TrainingStep, num_steps: int = NUM_STEPS, *, first: int = 0) -> Tensor:
    """Train; return the losses."""
    return torch.stack(
        [
            training.run(images_of(step).to(training.device), PLAN.batch(step).labels, step=step).cpu()
            for step in range(first, num_steps)
        ]
    )


def state_of(training: TrainingStep) -> dict[str, Tensor]:
    rows = {f"proxies.{name}": rows_CD for name, rows_CD in training.proxies.state().items()}
    return {name: each.detach().cpu().double().clone() for name, each in (training.model.state_dict() | rows).items()}


def assert_changed_alike(
    ours: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], *, tolerance: float
) -> None:
    """Each tensor differs from what is expected by no more than a share of what training changed of it."""
    assert ours.keys() == expected.keys()
    assert any(not torch.equal(expected[name], start[name]) for name in expected)
    for name, theirs in expected.items():
        changed = float((theirs - start[name]).norm())
        assert float((ours[name] - theirs).norm()) <= tolerance * changed, name


@pytest.mark.parametrize(
    "proxies", [CONFIG.proxies, ProxyConfig(sample_rate=0.8, optimizer="adagrad", placement="host")]
)
def test_training_moves_the_model_as_on_the_cpu(proxies: ProxyConfig, device: torch.device) -> None:
    config = dataclasses.replace(CONFIG, proxies=proxies)
    on_cpu, on_device = training_step(torch.device("cpu"), config), training_step(device, config)
    start = state_of(on_cpu)
    assert all(torch.equal(each, start[name]) for name, each in state_of(on_device).items())
    expected, losses = run(on_cpu), run(on_device)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    assert_changed_alike(state_of(on_device), state_of(on_cpu), start, tolerance=1e-2)


def test_bfloat16_follows_float32(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    exact, half = (
        training_step(device, dataclasses.replace(CONFIG, precision=precision)) for precision in ("float32", "bfloat16")
    )
    if device.type == "cuda":
        assert training_step(device, dataclasses.replace(CONFIG, precision="auto")).dtype == torch.bfloat16
    assert (exact.dtype, half.dtype) == (None, torch.bfloat16)
    dtypes = set()
    half.model.backbone.get_submodule("layer4.1.conv2").register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    start = state_of(exact)
    expected, losses = run(exact), run(half)
    assert dtypes == {torch.bfloat16}
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0)
    assert all(each.dtype == torch.float32 for each in half.model.parameters())
    assert_changed_alike(state_of(half), state_of(exact), start, tolerance=0.1)


def test_feature_maps_stay_channels_last(device: torch.device) -> None:
    model = training_step(device).model.eval()
    nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    formats = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(
                lambda *call: formats.append(call[2].is_contiguous(memory_format=torch.channels_last))
            )
    images = Normalise().to(device)(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device=device))
    with torch.inference_mode():
        ours = model(images.contiguous(memory_format=torch.channels_last))
        expected = nchw(images)
    assert len(formats) == 20  # all convolutions of a ResNet-18
    assert all(formats)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_training_learns(device: torch.device) -> None:
    """With the batch norm, activations and precision of a real training."""
    config = dataclasses.replace(
        CONFIG, precision="auto", model=dataclasses.replace(CONFIG.model, batch_norm="local"),
        optim=dataclasses.replace(CONFIG.optim, new_layers_epochs=0),
    )  # fmt: skip
    training = TrainingStep(config, num_classes=11, schedule=Schedule(config.optim, 4), device=device)
    images, labels = images_of(0).to(device), PLAN.batch(0).labels
    losses = [float(training.run(images, labels, step=step)) for step in range(16)]
    assert losses[-1] < 0.5 * losses[0], losses


def test_adamw_with_an_average_goes_on_from_a_checkpoint(device: torch.device, tmp_path: Path) -> None:
    """Its state is where the fused optimiser expects it; frozen layers and clipping are taken along."""
    optim = dataclasses.replace(
        CONFIG.optim, new_layers_epochs=0, optimizer="adamw", decay_norms=False, clip_norm=1.0, ema=0.9, frozen="conv1"
    )
    config = dataclasses.replace(CONFIG, optim=optim)
    whole, before, after = (training_step(device, config) for _ in range(3))
    start = state_of(whole)
    expected = run(whole)
    run(before, NUM_STEPS // 2)
    write_step(before, tmp_path, step=NUM_STEPS // 2)
    checkpoint.load(str(tmp_path), after, digest="d")
    losses = run(after, first=NUM_STEPS // 2)
    torch.testing.assert_close(losses, expected[NUM_STEPS // 2 :], rtol=1e-3, atol=0)
    assert_changed_alike(state_of(after), state_of(whole), start, tolerance=1e-2)
    assert whole.average is not None
    assert after.average is not None
    for ours, theirs in zip(after.average.model.parameters(), whole.average.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert torch.equal(state_of(after)["backbone.conv1.weight"], start["backbone.conv1.weight"])


def test_a_compiled_step_trains_as_without(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("on CPUs: distributed/test_compile.py")
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, new_layers_epochs=0))
    alone, compiled = training_step(device, config), training_step(device, config)
    compiled.wrap_model(compiled=True)
    start = state_of(compiled)
    compiled.warm_up()
    assert all(torch.equal(each, start[name]) for name, each in state_of(compiled).items())
    expected, losses = run(alone), run(compiled)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    assert_changed_alike(state_of(compiled), state_of(alone), start, tolerance=1e-2)


def test_one_rank_under_ddp_trains_as_without(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every collective of the step runs, over NCCL on a GPU; a step of one worker leaves them out by itself."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    alone, training = training_step(device), training_step(device)
    start = state_of(alone)
    expected = run(alone)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=timedelta(minutes=1),
    )
    try:
        training.group = training.proxies.group = dist.group.WORLD
        training.begin_phase(0)
        losses = run(training)
        assert isinstance(training._forward, DistributedDataParallel)
        ours = state_of(training)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    assert_changed_alike(ours, state_of(alone), start, tolerance=1e-2)
