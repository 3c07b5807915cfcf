"""Ranks that do what a test tells them, one command at a time: real processes with gloo, from a fork server with torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from tsugi_kpool._native import read_sideband_key
from tsugi_kpool.distributed import sideband as module

_running: module.Sideband | None = None
_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def start(**options: Any) -> int | None:
    """Starts a sideband with these options; its node."""
    global _running
    members = options.pop("members", None)
    address = options.pop("address", "127.0.0.1:0")
    _running = module.Sideband(address, group=members and _groups[tuple(members)], **options)
    return _running.start().node


def make_group(members: list[int]) -> None:
    """A process group of some ranks; all ranks call this, as torch wants it."""
    _groups[tuple(members)] = dist.new_group(members)


def stop() -> bool:
    return _running.stop()


def states() -> list[int]:
    return _running.snapshot()["state"].tolist()


def read_key(path: str) -> str:
    return read_sideband_key(path)


def open_links():
    """What the descriptors of this process lead to."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # that of the listing itself
    return links


def listening() -> int:
    """How many listening TCP sockets this process has."""
    inodes = set()
    with open("/proc/self/net/tcp") as table:
        for line in list(table)[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    return sum(link in inodes for link in open_links())


def _sockets() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # that of the listing itself
    return sorted(link for link in links if link.startswith("socket:"))


class Forks:
    """Children that are forked beside a running sideband, outlive it, and write into a file what they find."""

    def __init__(self, report: str) -> None:
        self._report = report

    def say(self, text: str) -> None:
        with open(self._report, "a") as file:
            file.write(text + "\n")

    def fork(self, work: Any) -> None:
        pid = os.fork()
        if pid:
            self.say(f"pid {pid}")
            return
        try:
            work()
        except BaseException as error:
            self.say(f"failed {error!r}")
        finally:
            time.sleep(600)
            os._exit(0)


def _calls_in_a_child(forks: Forks, before: list[str], own: str, key: str, loose: str) -> None:
    """What a child may call of the parent's sideband: everything, and nothing comes of it; and it starts one of its own."""
    sideband = _running
    assert _sockets() == before, "the child has sockets of the agent"
    begun = time.monotonic()
    for step in range(2000):
        sideband.report_step(10**6 + step)
    assert sideband.snapshot()["node"].size == 0 and sideband.snapshot()["refused"] == {}
    assert sideband.drift_ms(0) is None and sideband.max_drift_ms_across_peers() is None
    agent = sideband._agent
    for call in (agent.snapshot, lambda: agent.report_step(0, 0.0, 0.0, 0, 0)):
        try:
            call()
        except RuntimeError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError("a call of the parent's agent went through")
    assert agent.stop() and sideband.stop() and sideband.stop()
    assert time.monotonic() - begun < 5, "a call waited"
    with module.Sideband(loose, [own], psk_file=key) as mine:
        mine.report_step(0)
        assert mine.snapshot()["node"].size == 1
    assert _sockets() == before
    forks.say("fine")


def _begin(own: str, other: str, key: str) -> None:
    global _running
    _running = module.Sideband(own, [other], psk_file=key, dead_after_ms=3000).start()


def _until_alive() -> None:
    end = time.monotonic() + 60
    while _running.snapshot()["state"][0] != module.STATES.index("alive"):
        assert time.monotonic() < end, "the peer is not alive"
        time.sleep(0.02)


def fork_beside(own: str, other: str, key: str, loose: str, report: str) -> int:
    """Forks beside a connected agent, restarts it on its port 20 times with a child forked each time, and forks twice deep."""
    before, forks = _sockets(), Forks(report)
    _begin(own, other, key)
    _until_alive()
    calls = (forks, before, own, key, loose)
    forks.fork(lambda: _calls_in_a_child(*calls))
    for _ in range(20):
        assert _running.stop()
        _begin(own, other, key)
        forks.fork(lambda: None)
    _until_alive()
    _running.report_step(41)
    forks.fork(lambda: forks.fork(lambda: _calls_in_a_child(*calls)))
    return 20


def load_data(own: str, other: str, key: str) -> float:
    """Two epochs of a DataLoader whose workers, forked beside the agent, live on while it restarts on its port."""
    _begin(own, other, key)
    data = torch.utils.data.TensorDataset(torch.arange(64.0))
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    seen = sum(float(batch.sum()) for (batch,) in loader)
    for _ in range(10):
        assert _running.stop()
        _begin(own, other, key)
    seen += sum(float(batch.sum()) for (batch,) in loader)
    assert _running.stop()
    return seen


def end(own: str, other: str, key: str, how: str) -> None:
    """Ends the process beside a running agent, in one of the ways that processes end."""
    _begin(own, other, key)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "in a cycle":
        _running.me = _running
    raise _End(how)


class _End(BaseException):
    """Leaves the loop of commands, so that the interpreter ends as it does at a script's end."""


def _main(rank: int, world: int, hosts: int, port: int, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module._host_identity = lambda: f"host {rank % hosts}"
    if world:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    pipe.send("up")
    while True:
        try:
            name, options = pipe.recv()
        except EOFError:
            os._exit(0)  # the test is over
        begun = time.monotonic()
        try:
            answer, error = globals()[name](**options), None
        except _End as raised:
            if str(raised) == "raises":
                raise
            return
        except BaseException as raised:
            answer, error = None, (type(raised).__name__, str(raised), getattr(raised, "missing", None))
        pipe.send((answer, error, time.monotonic() - begun))


class Worker:
    """A rank; ``call`` and ``answer`` apart, so that several do something at the same time."""

    def __init__(self, rank: int = 0, world: int = 0, hosts: int = 1, port: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "tsugi_kpool.distributed.sideband", "sideband_worker"])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_main, args=(rank, world, hosts, port, theirs), daemon=False
        )  # it has children
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


def launch(world: int, hosts: int) -> list[Worker]:
    """``world`` ranks on so many hosts, in turn; the job's store is in rank 0, as without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [Worker(rank, world, hosts, port) for rank in range(world)]
    return [worker.up() for worker in workers]
