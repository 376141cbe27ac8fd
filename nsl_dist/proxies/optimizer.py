"""Optimisers that update only the sampled rows.

`DeferredSGD` is equivalent to the dense optimiser. Dense SGD with momentum and weight decay also moves rows without a
gradient, all by the same 2x2 map of (weight, velocity), which depends only on learning rate, momentum and weight decay.
`DeferredSGD` leaves such rows untouched and applies the product of the missed maps when a row is sampled again.

`RowwiseAdagrad` needs one number of state per proxy instead of a second matrix.

Both work on one chunk of rows at a time: `read`, `update` with the gradients, and `finish_step` after the last chunk.
On GPUs kernels do the same to the same tensors, and `count_step` takes the place of `finish_step`.
"""

import torch
from torch import Tensor

from nsl_dist.proxies.table import Rows, Table


class DeferredSGD:
    """`torch.optim.SGD` with momentum and weight decay for a matrix of which each step touches only a few rows.

    Attributes:
        weight: the rows.
        velocity: their momentum buffer.
        num_finished: number of finished steps.

    """

    def __init__(self, weight: Table, *, momentum: float, weight_decay: float) -> None:
        self.weight = weight
        self.velocity = weight.zeros_beside(weight.values.shape[1], dtype=weight.values.dtype)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.num_finished = 0
        self._declare_current()

    @property
    def state(self) -> dict[str, Tensor]:
        """State that a checkpoint saves for each row in addition to its weight."""
        return {"velocity": self.velocity.values, "step": self.step_of_C}

    @property
    def tables(self) -> list[Table]:
        """Matrices of which a step reads and writes rows."""
        return [self.weight, self.velocity]

    @property
    def history(self) -> dict[str, Tensor]:
        """State that a checkpoint saves once for all rows and workers: the maps that untouched rows have missed."""
        return self.missed.state

    def resume(self, history: dict[str, Tensor]) -> None:
        """Resume from the contents of the tensors of `state` and a `history`."""
        self.missed.state = history
        self.all_current = bool((self.step_of_C == self.missed.num_steps).all())

    @property
    def bytes_per_row(self) -> int:
        """Size of what `read` returns for one row."""
        return 8 * self.weight.values.shape[1]

    def _declare_current(self) -> None:
        device = self.weight.device
        self.step_of_C = torch.zeros(len(self.weight.rows), dtype=torch.int32, device=device)
        self.all_current = True
        self.missed: MapProducts = MapProducts(device)

    def read(self, rows: Rows, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and velocities, float32 `[S, D]` where they are stored, up to date with all steps so far.

        `out` is memory that may be reused, such as an earlier result for the same number of rows.
        """
        weight_out, velocity_out = out or (None, None)
        if self.all_current:
            return self.weight.read(rows, out=weight_out), self.velocity.read(rows, out=velocity_out)
        weight_SD, velocity_SD = self.weight.read(rows), self.velocity.read(rows)
        maps_22S1 = self.missed.since(self.step_of_C[rows]).float().to(weight_SD.device)[..., None]
        return (
            torch.mul(weight_SD, maps_22S1[0, 0], out=weight_out).addcmul_(velocity_SD, maps_22S1[0, 1]),
            torch.mul(weight_SD, maps_22S1[1, 0], out=velocity_out).addcmul_(velocity_SD, maps_22S1[1, 1]),
        )

    def update(self, rows: Rows, read: tuple[Tensor, Tensor], grad_SD: Tensor, *, lr: float, step: int) -> None:
        """Update rows returned by `read` and write them; the gradient includes weight decay."""
        weight_SD, velocity_SD = read
        torch.add(grad_SD, velocity_SD, alpha=self.momentum, out=velocity_SD)
        weight_SD.add_(velocity_SD, alpha=-lr)
        self.weight.write(rows, weight_SD, stream=4 * step + 1)
        self.velocity.write(rows, velocity_SD, stream=4 * step + 2)
        if isinstance(rows, slice):
            self.step_of_C[rows].fill_(self.missed.num_steps + 1)
        else:
            self.step_of_C.index_fill_(0, rows, self.missed.num_steps + 1)

    def finish_step(self, num_updated: int, *, lr: float) -> None:
        """End a step that updated `num_updated` rows and record its map for the others."""
        self.missed.append([[1 - lr * self.weight_decay, -lr * self.momentum], [self.weight_decay, self.momentum]])
        self.count_step(num_updated)

    def count_step(self, num_updated: int) -> None:
        """End a step whose map is recorded already."""
        self.num_finished += 1
        self.all_current = self.all_current and num_updated == len(self.weight.rows)
        self.missed.count_step()

    def catch_up(self, *, step: int) -> None:
        """Bring every row up to date with all steps before `step`."""
        if not self.all_current:
            for rows in self.weight.parts():
                weight_SD, velocity_SD = self.read(rows)
                self.weight.write(rows, weight_SD, stream=4 * step + 3)
                self.velocity.write(rows, velocity_SD, stream=4 * step + 4)
        self._declare_current()


class RowwiseAdagrad:
    """Adagrad with one accumulator per row: the mean square of its gradients (Gupta et al. 2014, section 3.1).

    Weight decay applies only to the rows of a step.

    Attributes:
        weight: the rows.
        accumulator: `[C, 1]`, float32, on the device.
        num_finished: number of finished steps.

    """

    EPSILON = 1e-10

    def __init__(self, weight: Table, *, weight_decay: float) -> None:
        self.weight = weight
        self.accumulator = torch.zeros(len(weight.rows), 1, device=weight.device)
        self.weight_decay = weight_decay
        self.num_finished = 0

    @property
    def state(self) -> dict[str, Tensor]:
        """State that a checkpoint saves for each row in addition to its weight."""
        return {"accumulator": self.accumulator}

    @property
    def tables(self) -> list[Table]:
        """Matrices of which a step reads and writes rows."""
        return [self.weight]

    @property
    def history(self) -> dict[str, Tensor]:
        """Nothing: rows without a gradient do not move."""
        return {}

    def resume(self, history: dict[str, Tensor]) -> None:
        """Resume from the contents of the tensors of `state`."""
        assert not history

    @property
    def bytes_per_row(self) -> int:
        """Size of what `read` returns for one row."""
        return 4 * self.weight.values.shape[1] + 4

    def read(self, rows: Rows, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return weights `[S, D]` and accumulators `[S, 1]`, float32; `out` may be reused."""
        weight_out, accumulator_out = out or (None, None)
        weight_SD = self.weight.read(rows, out=weight_out)
        if isinstance(rows, slice):
            return weight_SD, self.accumulator[rows]
        return weight_SD, torch.index_select(self.accumulator, 0, rows, out=accumulator_out)

    def update(self, rows: Rows, read: tuple[Tensor, Tensor], grad_SD: Tensor, *, lr: float, step: int) -> None:
        """Update rows returned by `read` and write them; the gradient includes weight decay."""
        weight_SD, accumulator_S1 = read
        accumulator_S1 += grad_SD.square().mean(dim=1, keepdim=True)
        weight_SD.addcdiv_(grad_SD, accumulator_S1.sqrt() + self.EPSILON, value=-lr)
        self.weight.write(rows, weight_SD, stream=4 * step + 1)
        if not isinstance(rows, slice):  # whose accumulators are a view
            self.accumulator.index_copy_(0, rows, accumulator_S1)

    def finish_step(self, num_updated: int, *, lr: float) -> None:  # noqa: ARG002
        """End a step."""
        self.count_step(num_updated)

    def count_step(self, num_updated: int) -> None:  # noqa: ARG002
        """End a step."""
        self.num_finished += 1

    def catch_up(self, *, step: int) -> None:
        """Do nothing: rows without a gradient do not move."""


class MapProducts:
    """Products of the 2x2 maps from each past step to now, in float64 and two levels.

    Steps are grouped in blocks. There is one product per step, up to the end of its block, and one per block, from its
    end to now, so that a new step updates the products of one block and one product of each earlier block. Dividing
    prefix products instead would fail because their determinant, momentum^steps, vanishes. Takes 32 bytes per step.

    Attributes:
        within: products up to the end of the step's block, `[2, 2, steps]` with room for more.
        after: products from the end of each block, `[2, 2, blocks]` with room for more.
        num_steps: number of past steps.

    """

    STEPS_PER_BLOCK = 1024

    def __init__(self, device: torch.device) -> None:
        self._identity = torch.eye(2, dtype=torch.float64, device=device)[:, :, None]
        self.within = self._identity.repeat(1, 1, self.STEPS_PER_BLOCK)
        self.after = self._identity.clone()
        self.num_steps = 0

    @property
    def state(self) -> dict[str, Tensor]:
        """All products: `[2, 2, steps]` up to the ends of blocks, and `[2, 2, blocks]`."""
        num_blocks = self.num_steps // self.STEPS_PER_BLOCK + 1
        return {"within": self.within[:, :, : self.num_steps], "after": self.after[:, :, :num_blocks]}

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        self.num_steps = state["within"].shape[2]
        self.after = state["after"].to(self._identity.device).clone(memory_format=torch.contiguous_format)
        self.within = self._identity.repeat(1, 1, self.after.shape[2] * self.STEPS_PER_BLOCK)
        self.within[:, :, : self.num_steps] = state["within"]

    def append(self, new_map: list[list[float]]) -> None:
        """Extend all products by one step, to be followed by `count_step`."""
        new = torch.tensor(new_map, dtype=torch.float64).to(self.within.device, non_blocking=True)
        block = self.num_steps // self.STEPS_PER_BLOCK
        for products in (
            self.within[:, :, block * self.STEPS_PER_BLOCK : self.num_steps + 1],
            self.after[:, :, :block],
        ):
            products.copy_((new @ products.flatten(1)).view_as(products))

    def count_step(self) -> None:
        """Make room for the next step after `append`."""
        self.num_steps += 1
        if self.num_steps == self.within.shape[2]:
            self.within = torch.cat([self.within, self._identity.repeat(1, 1, self.within.shape[2])], dim=2)
            self.after = torch.cat([self.after, self._identity.repeat(1, 1, self.after.shape[2])], dim=2)

    def since(self, steps_S: Tensor) -> Tensor:
        """Return the products `[2, 2, S]` from steps `[S]` to now."""
        steps_S = steps_S.long()
        after_22S = self.after[:, :, steps_S // self.STEPS_PER_BLOCK]
        within_22S = self.within[:, :, steps_S]
        return (after_22S[:, :, None] * within_22S).sum(dim=1)
