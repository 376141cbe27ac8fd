"""The model tried out before a run, in a task: torchvision takes long to import, the module of the run does so too."""

from nsl_dist.config import TrainConfig


def check_model(config: TrainConfig) -> None:
    """Build and run the model once, before anything is trained.

    Raises:
        ValueError: there is no such model, its weights cannot be had, or it does not take images of this size.

    """
    import torch

    from nsl_dist.model import build_model

    model = build_model(config.model, seed=config.seed).eval()
    try:
        # As whoever loads the checkpoint does: some weights of torchvision come with another size of images.
        build_model(config.model, seed=config.seed, pretrained=False).load_state_dict(model.state_dict())
        model(torch.zeros(1, 3, config.data.image_size, config.data.image_size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--model.backbone {config.model.backbone} does not take images of --data.image-size "
            f"{config.data.image_size}: {error}; give the size that it was made for"
        ) from error
