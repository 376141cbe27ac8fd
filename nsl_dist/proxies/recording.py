"""CUDA graphs of the proxies' step; letters as in `softmax`."""

import functools
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsl_dist.proxies import kernels

if TYPE_CHECKING:
    from nsl_dist.proxies.triton_step import Chunk, TritonStep


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Return the stream that all recordings are made on: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream()


class Recording:
    """A step recorded as CUDA graphs, which are replayed with other classes, embeddings and learning rates.

    Launching kernels one by one takes longer than they do, unless there are tens of thousands of classes. There is a
    graph for what happens between two collectives. What the methods return is overwritten by the next step, but for the
    loss and the gradient of the embeddings.
    """

    def __init__(self, step: "TritonStep", embeddings_bD: Tensor) -> None:
        """Record a step with its tensors as those of all that follow; its kernels must have run before."""
        self.turn = 0
        """Of the step that uses the tensors."""
        self.free = torch.cuda.Event()
        """The tensors may be overwritten."""
        self.tensors: tuple[Tensor, Tensor, list[Chunk]] = (step.sampling, step.rows_R, step.chunks)
        self._history = step.history()  # held, so that no other tensor gets the address
        for chunk in step.chunks:
            step.read(chunk)
        device, batch = embeddings_bD.device, step.batch
        self._has_transfer = step.has_transfer
        alone = len(embeddings_bD) == batch  # no other worker
        torch.cuda.empty_cache()  # graphs cannot use what the step before has left
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._update = torch.zeros(kernels.UPDATE_WORDS.value, dtype=torch.int64, device=device)
        self._grad_loss = torch.ones((), device=device)
        self._embeddings_bD = torch.empty(embeddings_bD.shape, device=device)

        self._queries_BD = torch.empty(batch, step.dim, dtype=step.dtype, device=device)
        self._grad_queries_bD = torch.empty_like(self._embeddings_bD)

        def normalise() -> None:
            self._queries_bD, self._lengths_b = step.compute_queries(self._embeddings_bD)
            if alone:
                self._queries_BD = self._queries_bD

        def forward() -> None:
            self._sums_5B = step.sample_and_sum(self._queries_BD)

        def results() -> None:
            self._means_2, self._finite_2B = step.compute_results(self._queries_BD, self._sums_5B)

        def backward() -> None:
            self._grad_queries_BD = step.update_proxies(self._queries_BD, self._sums_5B, self._grad_loss, self._update)
            if alone:
                self._grad_queries_bD = self._grad_queries_BD

        def normalise_backward() -> None:
            self._grad_bD = step.compute_grad(self._grad_queries_bD, self._embeddings_bD, self._lengths_b)

        if alone:
            self._record(normalise, forward, results)
            self._record(backward, normalise_backward)
        else:
            for part in (normalise, forward, results, backward, normalise_backward):
                self._record(part)

    def begin(self) -> int:
        """Hand the tensors to another step; return its turn."""
        self.turn += 1
        return self.turn

    def normalise(self, embeddings_bD: Tensor) -> tuple[Tensor, Tensor]:
        """See `softmax.ProxyStep`."""
        self._embeddings_bD.copy_(embeddings_bD)
        self._replay("normalise")
        return self._queries_bD, self._lengths_b

    def forward(self, queries_BD: Tensor) -> Tensor:
        """See `softmax.ProxyStep`."""
        if queries_BD is not self._queries_BD:
            self._queries_BD.copy_(queries_BD)
        self._replay("forward")
        self._mark_free()
        return self._sums_5B

    def results(self) -> tuple[Tensor, Tensor]:
        """See `softmax.ProxyStep`."""
        self._replay("results")
        return self._means_2.clone(), self._finite_2B

    def backward(self, update: Tensor, grad_loss: Tensor) -> Tensor:
        """See `softmax.ProxyStep`."""
        self._update.copy_(update, non_blocking=True)
        self._grad_loss.copy_(grad_loss)
        self._replay("backward")
        self._mark_free()
        return self._grad_queries_BD

    def normalise_backward(self, grad_queries_bD: Tensor) -> Tensor:
        """See `softmax.ProxyStep`."""
        if grad_queries_bD is not self._grad_queries_bD:
            self._grad_queries_bD.copy_(grad_queries_bD)
        self._replay("normalise_backward")
        return self._grad_bD.clone()

    def _mark_free(self) -> None:
        if self._has_transfer:  # whose stream overwrites them
            self.free.record()

    def _record(self, *parts: Callable[[], None]) -> None:
        """Record parts as one graph, to be replayed by the name of the first."""
        # torch.cuda.graph would collect garbage first, which takes long in the middle of a training; but none may be
        # collected meanwhile, since it could be another graph.
        graph, current, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), _stream()
        stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                # Other threads, such as those that load data, may use CUDA meanwhile.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    for part in parts:
                        part()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        current.wait_stream(stream)
        self._graphs[parts[0].__name__] = graph

    def _replay(self, part: str) -> None:
        if part in self._graphs:  # otherwise it came with the one before
            self._graphs[part].replay()


class Recorder:
    """Records the second step of a shape that repeats; keeps one recording."""

    def __init__(self) -> None:
        self._last_shape: tuple[object, ...] | None = None
        self._recorded_shape: tuple[object, ...] | None = None
        self._recording: Recording | None = None

    def recording_of(self, step: "TritonStep") -> Recording | None:
        """Return the recording of a step's shape, if there is one."""
        return self._recording if step.shape == self._recorded_shape else None

    def has_run(self, step: "TritonStep") -> None:
        """Remember that all kernels of a step are compiled."""
        self._last_shape = step.shape

    def record(self, step: "TritonStep", embeddings_bD: Tensor) -> Recording | None:
        """Record a step; None if the one before had another shape."""
        if step.shape != self._last_shape:
            return None
        self._recording = None  # free its memory first
        self._recording, self._recorded_shape = Recording(step, embeddings_bD), step.shape
        return self._recording
