"""Ranks that do what a test tells them, one command at a time: real processes with gloo, from a fork server with torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from typing import Any

import torch.distributed as dist

from tsugi_kpool import sideband as module
from tsugi_kpool._native import read_sideband_key

_running: module.Sideband | None = None


def start(**options: Any) -> int | None:
    """Starts a sideband with these options; its node."""
    global _running
    ranks = options.pop("ranks", None)
    group = None if ranks is None else dist.new_group(ranks, use_local_synchronization=True)
    _running = module.Sideband("127.0.0.1:0", group=group, **options)
    return _running.start().node


def stop() -> bool:
    return _running.stop()


def states() -> list[int]:
    return _running.snapshot()["state"].tolist()


def read_key(path: str) -> str:
    return read_sideband_key(path)


def listening() -> int:
    """How many listening TCP sockets this process has."""
    inodes = set()
    with open("/proc/self/net/tcp") as table:
        for line in list(table)[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # that of the listing itself
    return sum(link in inodes for link in links)


def _main(rank: int, world: int, port: int, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module._host_identity = lambda: f"host {rank}"
    if world:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    pipe.send("up")
    while True:
        name, options = pipe.recv()
        begun = time.monotonic()
        try:
            answer, error = globals()[name](**options), None
        except BaseException as raised:
            answer, error = None, (type(raised).__name__, str(raised), getattr(raised, "missing", None))
        pipe.send((answer, error, time.monotonic() - begun))


class Worker:
    """A rank; ``call`` and ``answer`` apart, so that several do something at the same time."""

    def __init__(self, rank: int = 0, world: int = 0, port: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "tsugi_kpool.sideband", "sideband_worker"])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(rank, world, port, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def up(self, seconds: float = 120) -> Worker:
        assert self._pipe.poll(seconds), "the process did not come up"
        assert self._pipe.recv() == "up"
        return self

    def call(self, name: str, **options: Any) -> None:
        self._pipe.send((name, options))

    def answer(self, seconds: float = 60) -> tuple[Any, tuple[str, str, Any] | None, float]:
        """(result, error, seconds); fails if it takes longer."""
        assert self._pipe.poll(seconds), f"no answer in {seconds} s"
        return self._pipe.recv()

    def do(self, name: str, **options: Any) -> Any:
        """The result of a call that must not fail."""
        self.call(name, **options)
        result, error, _ = self.answer()
        assert error is None, error
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def launch(world: int) -> list[Worker]:
    """``world`` ranks; the job's store is in rank 0, as without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [Worker(rank, world, port) for rank in range(world)]
    return [worker.up() for worker in workers]
