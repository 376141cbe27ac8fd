"""Running a function on several real gloo ranks."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, function: Callable[..., Any], world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()


def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
    """Call `function(rank, world_size, *arguments)` in `world_size` processes; an exception in one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The ranks are forked from a server that has imported torch and what else takes long, once for all tests.
    multiprocessing.set_forkserver_preload(["nsl_dist.training.step", "nsl_dist.training.checkpoint"])
    mp.start_processes(_enter, (function, world_size, port, arguments), world_size, start_method="forkserver")
