"""Test of the model before a run."""

from nsl_dist.config import TrainConfig


def check_model(config: TrainConfig) -> None:
    """Build the model and run it once, before anything is trained.

    Raises:
        ValueError: the model does not exist, its weights are not available, it does not accept this image size, or the
            options of the optimiser do not fit it.

    """
    import torch

    from nsl_dist.model import build_model
    from nsl_dist.training.optimizer import build_optimizer, freeze

    model = build_model(config.model, seed=config.seed, pretrained=config.init_from is None).eval()
    try:
        # Like loading a checkpoint: some torchvision weights come with another image size.
        build_model(config.model, seed=config.seed, pretrained=False).load_state_dict(model.state_dict())
        model(torch.zeros(1, 3, config.data.image_size, config.data.image_size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--model.backbone {config.model.backbone} does not take images of --data.image-size "
            f"{config.data.image_size}: {error}; set the size that it was built for"
        ) from error
    if config.optim.frozen is not None:
        freeze(model, config.optim.frozen)
    build_optimizer(model, config.optim)
