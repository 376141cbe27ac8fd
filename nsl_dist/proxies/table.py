"""A worker's rows of a matrix with one or more for each class, in device memory, host memory or a file."""

import contextlib
import mmap
import weakref
from typing import Literal

import torch
from torch import Tensor

from nsl_dist.memory_map import map_file
from nsl_dist.proxies.counter_random import round_to_bfloat16, uniform_rows

# A slice of consecutive rows is read without a copy.
Rows = slice | Tensor
Placement = Literal["device", "host", "disk"]

# What passes over all rows work on at a time, by the type of device.
NUMBERS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


class Table:
    """A matrix of which each step reads and writes a few rows.

    Attributes:
        rows: their indices in the whole matrix.
        values: `[len(rows), dim]`, float32 or bfloat16, stored according to `placement`.
        device: where the rows are used.

    """

    def __init__(
        self,
        rows: range,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        placement: Placement = "device",
        device: torch.device | str = "cpu",
        directory: str | None = None,
        seed: int = 0,
        initial_bound: float = 0.0,
    ) -> None:
        """Allocate the rows, drawn from U(-initial_bound, initial_bound), independent of the number of workers.

        With placement `disk`, rows are initialised when they are first read.

        Args:
            rows: their indices in the whole matrix.
            dim: number of columns.
            dtype: type of the values; bfloat16 is rounded stochastically.
            placement: `device`; `host`, the same as `device` on a CPU, and memory that kernels can address on a GPU; or
                `disk`, an unnamed file that disappears with the process.
            device: where the rows are used.
            directory: folder for the file; None for the system's temporary folder.
            seed: seed of the initial rows and of the rounding.
            initial_bound: 0 initialises with zeros.

        Raises:
            ValueError: the directory does not exist, its disk is full, or host memory cannot be pinned.

        """
        self.rows = rows
        self.placement = placement
        self.device = torch.empty(0, device=device).device  # with its index, like the device of a tensor
        self.directory = directory
        self.seed = seed
        self.initial_bound = initial_bound
        shape = (len(rows), dim)
        if placement == "disk":
            self.values = _map_file(shape, dtype, directory)
        elif placement == "host" or self.device.type == "cpu":
            self.values = _map_memory(shape, dtype)
            if self.device.type != "cpu":
                _pin(self.values)
        else:
            self.values = torch.zeros(shape, dtype=dtype, device=self.device)
        self._made_C: Tensor | None = None
        if initial_bound > 0:
            self._made_C = torch.zeros(len(rows), dtype=torch.bool, device=self.values.device)
            if placement != "disk":
                self.make_all()

    def zeros_beside(self, dim: int, *, dtype: torch.dtype) -> "Table":
        """Return a table of zeros with the same rows and placement."""
        return Table(
            self.rows,
            dim,
            dtype=dtype,
            placement=self.placement,
            device=self.device,
            directory=self.directory,
            seed=self.seed,
        )

    def parts(self) -> list[slice]:
        """Return slices that cover all rows."""
        rows_at_once = max(1, NUMBERS_AT_ONCE[self.values.device.type] // self.values.shape[1])
        num_rows = len(self.rows)
        return [slice(start, min(start + rows_at_once, num_rows)) for start in range(0, num_rows, rows_at_once)]

    def make_all(self) -> None:
        """Initialise all rows that were never read."""
        for rows in self.parts():
            self._make(rows)
        self._made_C = None
        if self.values.device.type == "cuda":
            torch.cuda.empty_cache()  # of the passes' large buffers, before smaller tensors settle in them

    def declare_made(self) -> None:
        """Treat all rows as initialised, because they are loaded from elsewhere."""
        self._made_C = None

    def read(self, rows: Rows, *, out: Tensor | None = None) -> Tensor:
        """Return rows as float32 `[S, D]` where they are stored; a view if nothing has to be copied or converted.

        `out` is memory that may be reused.
        """
        if isinstance(rows, slice):
            self._make(rows)
            return self.values[rows].float()
        return self.gather(rows, out=out if out is not None and out.dtype == self.values.dtype else None).float()

    def gather(self, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return a copy of rows, into `out` if it is given, in the type and memory of the table."""
        self._make(rows)
        return torch.index_select(self.values, 0, rows, out=out)

    def write(self, rows: Rows, values_SD: Tensor, *, stream: int) -> None:
        """Write rows, possibly the view that `read` returned. `stream` must differ between calls, for the rounding."""
        if self.values.dtype == torch.bfloat16:
            values_SD = round_to_bfloat16(values_SD, self._places(rows), seed=self.seed, stream=stream)
        if not isinstance(rows, slice):
            self.values.index_copy_(0, rows, values_SD)
        elif (target_SD := self.values[rows]).data_ptr() != values_SD.data_ptr():
            target_SD.copy_(values_SD)

    def _places(self, rows: Rows) -> Tensor:
        """Return the indices of rows in the whole matrix."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.values.device)
        return rows + self.rows.start

    def _make(self, rows: Rows) -> None:
        if self._made_C is None:
            return
        places_S = self._places(rows)[~self._made_C[rows]]
        if len(places_S) > 0:
            made_SD = uniform_rows(places_S, self.values.shape[1], bound=self.initial_bound, seed=self.seed)
            new = places_S - self.rows.start
            self.values.index_copy_(0, new, made_SD.to(self.values.dtype))
            self._made_C[new] = True


def _map_memory(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if shape[0] == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, shape[0] * shape[1] * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not supported by the kernel
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer TLB misses for random rows
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _pin(values: Tensor) -> None:
    """Lock host memory and let kernels address it.

    PyTorch's own pinned memory would be rounded up to a power of two.
    """
    if values.numel() == 0:
        return
    error = torch.cuda.cudart().cudaHostRegister(values.data_ptr(), values.nbytes, 0)
    if int(error) != 0:
        raise ValueError(
            f"CUDA cannot pin {values.nbytes / 2**30:.1f} GiB of host memory for class proxies (error {int(error)}); "
            "use more workers, --proxies.dtype bfloat16 or --proxies.placement disk"
        )
    weakref.finalize(values.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, values.data_ptr())


def _map_file(shape: tuple[int, int], dtype: torch.dtype, directory: str | None) -> Tensor:
    if shape[0] == 0:
        return torch.empty(shape, dtype=dtype)
    memory = map_file(
        shape[0] * shape[1] * dtype.itemsize,
        directory=directory,
        what="class proxies",
        remedy="set --proxies.directory to a folder on a local disk with enough space",
    )
    memory.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
