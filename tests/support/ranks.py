"""Running functions on several real gloo ranks, in processes that stay."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
import torch.distributed as dist


class Ranks:
    """Processes that are started once; each call makes a process group of as many as it asks for."""

    def __init__(self) -> None:
        # Forked from a server that has imported torch and what else takes long, once for all of them.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["nsl_dist.training.step", "nsl_dist.training.checkpoint"])
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
        """Call `function(rank, world_size, *arguments)` on each rank; an exception in one fails."""
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        running = {}
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send((function, rank, world_size, port, arguments))
            running[connection] = rank
        while running:
            for ready in wait(list(running)):
                connection = cast("Connection[Any, Any]", ready)
                rank = running.pop(connection)
                try:
                    failure = connection.recv()
                except EOFError:
                    failure = "its process has ended"
                if failure is not None:
                    self.close()  # the others may wait for it
                    raise AssertionError(f"rank {rank} of {world_size}: {failure}")

    def close(self) -> None:
        """End all processes; the next call starts new ones."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []


def _serve(connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            function, rank, world_size, port, arguments = connection.recv()
        except EOFError:  # the tests have ended
            return
        torch.set_num_threads(1)
        try:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
            try:
                function(rank, world_size, *arguments)
            finally:
                dist.destroy_process_group()
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())
