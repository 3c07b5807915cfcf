"""The end of an agent: its port is free when stop() returns, whatever goes on, and a forked child has nothing of it."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import sideband_worker
from sideband_worker import open_links
from test_sideband import ALIVE, addresses, key, until  # noqa: F401 - key is a fixture
from tsugi_kpool import Sideband

RESTARTS = 40


def bind_as_a_server(address):
    """Listens there as every server does (SO_REUSEADDR); OSError while something else listens."""
    host, port = address.rsplit(":", 1)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, int(port)))
        server.listen()


def sockets():
    """Sockets of this process; those of the test runner are among them."""
    return sum(link.startswith("socket:") for link in open_links())


def flood(address, ended):
    host, port = address.rsplit(":", 1)
    while not ended.is_set():
        try:
            with socket.create_connection((host, int(port)), timeout=1) as stranger:
                stranger.sendall(os.urandom(50))
        except OSError:
            pass


@pytest.mark.parametrize("around", ["a peer", "nobody", "no such host", "a peer that is mute", "a flood"])
def test_the_port_is_free_when_stop_returns(key, around):  # noqa: F811
    first, own = addresses(2)
    before, ended = sockets(), threading.Event()
    peer = Sideband(first, [own], psk_file=key).start() if around in ("a peer", "a flood") else None
    mute = socket.create_server(("127.0.0.1", int(first.rsplit(":", 1)[1]))) if "mute" in around else None
    others = ["nowhere.invalid:1", "nor.here.invalid:1"] if around == "no such host" else [first]
    stranger = threading.Thread(target=flood, args=(own, ended))
    if around == "a flood":
        stranger.start()
    try:
        for turn in range(RESTARTS):
            sideband = Sideband(own, others, psk_file=key).start()  # fails while the one before listens
            if turn % 4 == 0 and peer is not None:
                until(lambda: sideband.snapshot()["state"][0] == ALIVE, 20)  # noqa: B023
            assert sideband.stop() and sideband.stop()
            bind_as_a_server(own)
    finally:
        ended.set()
        if stranger.ident:
            stranger.join()
        if peer is not None:
            assert peer.stop()
        if mute is not None:
            mute.close()
    until(lambda: sockets() == before, 20)  # a name's look-up, which nobody can break off, has a socket of its own


def test_two_threads_that_stop_both_return_when_the_port_is_free(key):  # noqa: F811
    first, own = addresses(2)
    for _ in range(10):
        sideband = Sideband(own, [first], psk_file=key).start()
        agent, stopped = sideband._agent, []

        def stop(agent=agent, stopped=stopped):
            stopped.append(agent.stop())
            bind_as_a_server(own)

        threads = [threading.Thread(target=stop) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stopped == [True, True]
        bind_as_a_server(own)


def test_a_start_that_fails_keeps_no_port_though_its_error_is_kept(key):  # noqa: F811
    first, own = addresses(2)
    errors = []
    for options in ({"heartbeat_ms": 0}, {"dead_after_ms": 1}, {"psk_file": "/nowhere"}):
        try:
            Sideband(own, [first], **{"psk_file": key, **options}).start()
        except ValueError as error:
            errors.append(error)
        bind_as_a_server(own)
    assert len(errors) == 3


@pytest.fixture
def worker():
    worker = sideband_worker.Worker().up()
    yield worker
    worker.kill()


def test_a_forked_child_keeps_no_port_and_speaks_for_nobody(key, worker, tmp_path):  # noqa: F811
    own, other, loose = addresses(3)
    report = tmp_path / "report"

    def said(what):
        return [line for line in report.read_text().splitlines() if line.startswith(what)]

    with Sideband(other, [own], psk_file=key, dead_after_ms=3000) as sideband:
        node = int(own < other)  # ours
        peer = lambda: {name: sideband.snapshot()[name][0] for name in ("node", "state", "step")}  # noqa: E731
        try:
            assert worker.do("fork_beside", own=own, other=other, key=key, loose=loose, report=str(report)) == 20
            until(lambda: len(said("fine")) == 2 or said("failed"), 60)
            assert not said("failed")
            until(lambda: peer()["step"] == 41, 20)  # the parent's step, and none of its children's
            assert peer() == {"node": 1 - node, "state": ALIVE, "step": 41}, "a child's stop() or its steps reached us"
            # Without a word from the parent, its children being alive: gone, and the port free.
            worker.kill()
            bind_as_a_server(own)
            until(lambda: peer()["state"] != ALIVE, 10)
            alive = [line for line in said("pid") if os.path.exists(f"/proc/{line.split()[1]}")]
            assert len(alive) > 20, "the children were to outlive it"
        finally:
            for line in said("pid") if report.exists() else ():
                os.kill(int(line.split()[1]), signal.SIGKILL)


def test_a_dataloaders_workers_do_not_keep_the_port(key, worker):  # noqa: F811
    own, other = addresses(2)
    assert worker.do("load_data", own=own, other=other, key=key) == 2.0 * sum(range(64))


def test_the_interpreter_ends_beside_a_running_agent(key):  # noqa: F811
    own, other = addresses(2)
    code = f"from tsugi_kpool import Sideband\nsideband = Sideband({own!r}, [{other!r}], psk_file={key!r}).start()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)  # most of it imports torch
    bind_as_a_server(own)


@pytest.mark.parametrize("how", ["returns", "raises", "in a cycle", "killed"])
def test_a_process_that_ends_without_stop_ends(key, worker, how):  # noqa: F811
    own, other = addresses(2)
    worker.call("end", own=own, other=other, key=key, how=how)
    worker.process.join(30)
    assert worker.process.exitcode == {"raises": 1, "killed": -signal.SIGTERM}.get(how, 0)
    bind_as_a_server(own)
