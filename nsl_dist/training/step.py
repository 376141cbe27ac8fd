"""One training iteration. Does not use Ray."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nsl_dist.config import TrainConfig
from nsl_dist.data.transforms import Normalise
from nsl_dist.device import autocast_dtype
from nsl_dist.model import build_model
from nsl_dist.proxies.matrix import ProxyMatrix
from nsl_dist.proxies.partition import Partition
from nsl_dist.schedule import Schedule
from nsl_dist.training.optimizer import MovingAverage, build_optimizer, freeze


class TrainingStep:
    """Model, proxies and optimisers of one worker, and the iteration that updates them.

    Attributes:
        model: the bare embedding model.
        proxies: this worker's partition of the class-proxy matrix.
        optimizer: optimiser of the model's trainable parameters; None in a phase that only trains the proxies.
        average: moving average of the model's weights; None if the run has none.
        schedule: phases and learning rates.

    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        num_classes: int,
        schedule: Schedule,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        pretrained: bool = True,
        compiled: bool = False,
    ) -> None:
        """Build model, proxies and optimisers for the worker with `rank` among `world_size` workers in `group`.

        `num_classes` counts the classes of all workers. `pretrained=False` ignores `config.model.weights`, for a
        training that is about to load a checkpoint. `compiled`: see `warm_up`.
        """
        self.config = config
        self.device = device
        self._rank = rank
        self.group = group if world_size > 1 else None
        self.schedule = schedule
        self.compiled = compiled
        self.dtype = autocast_dtype(config.precision, device)
        self.model = build_model(config.model, seed=config.seed, pretrained=pretrained).to(device)
        self.model.to(memory_format=torch.channels_last)
        self._normalise = Normalise().to(device)
        self.proxies = ProxyMatrix(
            Partition(num_classes, rank, world_size),
            config.model.dim,
            config.proxies,
            seed=config.seed,
            device=device,
            group=self.group,
        )
        ema = config.optim.ema
        self.average = MovingAverage(self.model, ema) if ema is not None else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.begin_phase(0)

    def begin_phase(self, step: int) -> None:
        """Select the layers to train from `step` on and start new optimisers (paper, section 4.1)."""
        optim = self.config.optim
        everything = step >= self.schedule.num_new_layers_steps
        self.model.backbone.requires_grad_(everything)
        self._frozen_norms = freeze(self.model, optim.frozen) if optim.frozen is not None else []
        self.optimizer = build_optimizer(self.model, optim)
        self.wrap_model(compiled=self.compiled)
        weight_decay = self.config.proxies.weight_decay
        self.proxies.start_optimizer(
            momentum=optim.momentum,
            weight_decay=optim.weight_decay if weight_decay is None else weight_decay,
            step=step,
        )

    def wrap_model(self, *, compiled: bool) -> None:
        """Wrap the model for its forward pass."""
        self.compiled = compiled
        forward: nn.Module = nn.Sequential(self._normalise, self.model)
        if self.group is not None and self.optimizer is not None:
            forward = DistributedDataParallel(forward, process_group=self.group, gradient_as_bucket_view=True)
        # Around DDP, whose buckets torch.compile knows: gradients are reduced while the backward pass goes on.
        self._forward: Callable[[Tensor], Tensor] = torch.compile(forward, dynamic=False) if compiled else forward

    def run(
        self, images_bCHW: Tensor, labels_B: NDArray[np.int64], *, step: int, accuracy: Tensor | None = None
    ) -> Tensor:
        """Run one iteration.

        Args:
            images_bCHW: this worker's part of the batch, uint8, on its device.
            labels_B: classes of the global batch, in rank order.
            step: step of the run, starting at 0.
            accuracy: see `normalized_softmax_loss`.

        Returns:
            The loss of the global batch, a detached scalar on the device.

        """
        if step == self.schedule.num_new_layers_steps and step > 0:
            self.begin_phase(step)
        # Dropout and stochastic depth draw from the global generator.
        torch.manual_seed(int(np.random.default_rng((self.config.seed, step, self._rank, 1)).integers(2**63)))
        embeddings_bD = self.embed(images_bCHW)
        lr_proxies = self.schedule.learning_rate(step) * self.config.proxies.lr_scale
        loss = self.proxies.loss(embeddings_bD, labels_B, step=step, lr=lr_proxies, accuracy=accuracy)

        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss.backward()  # also updates the proxies
        self.update_model(step)
        return loss.detach()

    def update_model(self, step: int) -> None:
        """Update the model by its gradients, which DDP has averaged, and then the average of its weights.

        Only the model's gradients are clipped: those of the proxies, whose backward pass has updated them, are not.
        """
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            if self.config.optim.clip_norm is not None:
                # Without a look at the norm, for which the host would have to wait for the device.
                parameters = [parameter for group in groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm)
            lr = self.schedule.learning_rate(step)
            for group in groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
        if self.average is not None:
            self.average.update(step)

    def warm_up(self) -> None:
        """Compile the model, by a forward and a backward pass over blank images, and leave everything as it was."""
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        data, world_size = self.config.data, self.proxies.partition.world_size
        size = (data.batch_size // world_size, 3, data.image_size, data.image_size)
        try:
            embeddings_bD = self.embed(torch.zeros(size, dtype=torch.uint8, device=self.device))
            if self.optimizer is not None:
                torch.autograd.backward(embeddings_bD.sum())
        finally:
            self.model.zero_grad()
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])

    def embed(self, images_bCHW: Tensor) -> Tensor:
        """Embed uint8 images in training mode."""
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()
        images_bCHW = images_bCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            return self._forward(images_bCHW)
