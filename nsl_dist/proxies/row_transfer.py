"""Sampled rows on their way between tables outside a GPU's memory and the GPU."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nsl_dist.proxies import kernels
from nsl_dist.proxies.table import Table

Result = TypeVar("Result")


@dataclass
class Staged:
    """Room on the device for rows of each table, in its type."""

    tables: list[Tensor]
    arrived: torch.cuda.Event | None = None
    """On the transfer's stream."""
    free: torch.cuda.Event | None = None
    """On the stream that computes: it is done with them."""


class RowTransfer:
    """Fetches rows and stores them while the GPU computes.

    One stream does everything in order, so that no row is read before its last write has landed. Kernels read and write
    rows in pinned host memory over PCIe, without a copy in between; PCIe does not overlap the two directions of such
    accesses. Rows in a file pass through pinned buffers that are allocated once, by a thread that waits for the disk.
    """

    def __init__(self, tables: list[Table]) -> None:
        self._tables = tables
        self._device = tables[0].device
        self._in_file = tables[0].placement == "disk"
        cuda = self._device.type == "cuda"
        self.stream = torch.cuda.Stream(self._device) if cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proxy rows") if self._in_file else None
        self._spare: list[Staged] = []
        self._stores: deque[Future[None]] = deque()
        self._pinned = [torch.empty(0) for _ in tables]

    def fetch(self, rows_S: Tensor, *, into: Staged | None = None) -> Future[Staged]:
        """Start to fetch rows. Those of a file are named on the CPU, others on the device, by work on `stream`."""
        if into is None:
            self._spare = [each for each in self._spare if len(each.tables[0]) >= len(rows_S)]
            into = self._spare.pop() if self._spare else self._allocate(len(rows_S))
        return self._start(self._fetch, rows_S, into)

    def store(self, rows_S: Tensor, staged: Staged) -> None:
        """Start to write rows back, once the current stream has come to here."""
        staged.free = self._now()
        self._stores.append(self._start(self._store, rows_S, staged))

    def release(self, staged: Staged) -> None:
        """Reuse the memory of rows, once the current stream has come to here and they are stored."""
        staged.free = self._now()
        self._spare.append(staged)

    def wait_for(self, fetched: Future[Staged]) -> Staged:
        """Return fetched rows; what the current stream does from here on comes after their arrival."""
        staged = fetched.result()
        while self._stores and self._stores[0].done():
            self._stores.popleft().result()  # raises what went wrong
        if staged.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(staged.arrived)
        return staged

    def finish(self) -> None:
        """Wait until everything has landed."""
        while self._stores:
            self._stores.popleft().result()
        self._synchronise()

    def _allocate(self, num_rows: int) -> Staged:
        staged = Staged(
            [table.values.new_empty(num_rows, table.values.shape[1], device=self._device) for table in self._tables]
        )
        if self.stream is not None:
            for values_SD in staged.tables:
                values_SD.record_stream(self.stream)
        staged.free = self._now()
        return staged

    def _start(self, work: Callable[[Tensor, Staged], Result], rows_S: Tensor, staged: Staged) -> Future[Result]:
        if self._thread is not None:
            return self._thread.submit(work, rows_S, staged)
        done: Future[Result] = Future()
        done.set_result(work(rows_S, staged))
        return done

    def _now(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self._device).record_event() if self.stream is not None else None

    def on_stream(self, after: torch.cuda.Event | None) -> ExitStack:
        """Return a context whose work on the device happens on the transfer's stream, after an event."""
        stack = ExitStack()
        if self.stream is not None:
            stack.enter_context(torch.cuda.stream(self.stream))
            if after is not None:
                self.stream.wait_event(after)
        return stack

    def _synchronise(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def _fetch(self, rows_S: Tensor, staged: Staged) -> Staged:
        with self.on_stream(staged.free):
            for index, (table, room_SD) in enumerate(zip(self._tables, staged.tables, strict=True)):
                values_SD = room_SD[: len(rows_S)]
                if self._in_file:
                    pinned_SD = self._pinned_for(index, values_SD)
                    values_SD.copy_(table.gather(rows_S, out=pinned_SD), non_blocking=True)
                else:
                    kernels.copy_rows(table.values, rows_S, values_SD, to_table=False)
            if self._in_file:
                self._synchronise()  # the pinned buffers are free again
            staged.arrived = self.stream.record_event() if self.stream is not None else None
        return staged

    def _store(self, rows_S: Tensor, staged: Staged) -> None:
        with self.on_stream(staged.free):
            for index, (table, room_SD) in enumerate(zip(self._tables, staged.tables, strict=True)):
                values_SD = room_SD[: len(rows_S)]
                if self._in_file:
                    pinned_SD = self._pinned_for(index, values_SD)
                    pinned_SD.copy_(values_SD, non_blocking=True)
                    self._synchronise()
                    table.values.index_copy_(0, rows_S, pinned_SD)
                else:
                    kernels.copy_rows(table.values, rows_S, values_SD, to_table=True)

    def _pinned_for(self, index: int, values_SD: Tensor) -> Tensor:
        if self._pinned[index].numel() < values_SD.numel():
            pin = self.stream is not None
            self._pinned[index] = torch.empty(values_SD.numel(), dtype=values_SD.dtype, pin_memory=pin)
        return self._pinned[index][: values_SD.numel()].view_as(values_SD)
