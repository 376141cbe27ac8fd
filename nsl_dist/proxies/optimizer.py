"""Updates of the sampled rows only, exact to the dense optimiser.

Dense SGD with momentum and weight decay also moves the rows without a gradient, all by the same 2x2 map of (weight,
velocity), which depends on learning rate, momentum and weight decay alone. A row that is not drawn is left alone, and
the product of the maps that it missed is applied when it is drawn again.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class DeferredSGD:
    """`torch.optim.SGD` with momentum and weight decay for a matrix of which each step reads and writes a few rows.

    Call `catch_up` for the rows of a step before reading them, `step` with their gradients, and `catch_up` for all rows
    before reading the whole matrix.

    Attributes:
        velocity_CD: the momentum buffer.
        step_of_C: for each row, the step up to which `weight_CD` and `velocity_CD` hold it.
        num_steps: steps taken.

    """

    # Products of the maps from each of the last HISTORY steps to now are kept: 32 bytes each, brought forward by one
    # 2x2 multiplication a step. When the table is full every row is brought up to date, once in HISTORY steps.
    HISTORY = 1024
    ROWS_AT_ONCE = 65536

    def __init__(self, weight_CD: Tensor, *, momentum: float, weight_decay: float) -> None:
        self.weight_CD = weight_CD
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.velocity_CD = torch.zeros_like(weight_CD)
        self.step_of_C = torch.zeros(len(weight_CD), dtype=torch.int64, device=weight_CD.device)
        self.num_steps = 0
        self._history_start = 0
        self._products: NDArray[np.float64] = np.eye(2)[None]  # [i]: from step _history_start + i to now

    def catch_up(self, rows: Tensor) -> None:
        """Bring rows (int64, distinct) up to date with the steps in which they were not drawn."""
        for chunk in rows.split(self.ROWS_AT_ONCE):
            behind = chunk[self.step_of_C[chunk] < self.num_steps]
            if len(behind) == 0:
                continue
            table = torch.from_numpy(self._products).to(self.weight_CD)
            maps_S22 = table[self.step_of_C[behind] - self._history_start]
            weight_SD, velocity_SD = self.weight_CD[behind], self.velocity_CD[behind]
            self.weight_CD[behind] = maps_S22[:, 0, :1] * weight_SD + maps_S22[:, 0, 1:] * velocity_SD
            self.velocity_CD[behind] = maps_S22[:, 1, :1] * weight_SD + maps_S22[:, 1, 1:] * velocity_SD
            self.step_of_C[behind] = self.num_steps

    def catch_up_all(self) -> None:
        """Bring every row up to date and forget the history."""
        for chunk in torch.arange(len(self.weight_CD), device=self.weight_CD.device).split(self.ROWS_AT_ONCE):
            self.catch_up(chunk)
        self._history_start = self.num_steps
        self._products = np.eye(2)[None]

    def step(self, rows: Tensor, grad_SD: Tensor, *, lr: float) -> None:
        """Take one step: `grad_SD` for `rows` (distinct, caught up), zero for all others."""
        velocity_SD = self.velocity_CD[rows].mul_(self.momentum).add_(grad_SD)
        velocity_SD.add_(self.weight_CD[rows], alpha=self.weight_decay)
        self.velocity_CD[rows] = velocity_SD
        self.weight_CD.index_add_(0, rows, velocity_SD, alpha=-lr)
        self.num_steps += 1
        self.step_of_C[rows] = self.num_steps

        decay, momentum = self.weight_decay, self.momentum
        without_gradient = np.array([[1 - lr * decay, -lr * momentum], [decay, momentum]])
        self._products = np.concatenate([without_gradient @ self._products, np.eye(2)[None]])
        if len(self._products) > self.HISTORY:
            self.catch_up_all()
