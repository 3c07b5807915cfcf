"""The end of an agent: its port is free when stop() returns, whatever goes on, and a forked child has nothing of it."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from test_sideband import ALIVE, addresses, key, until  # noqa: F401 - key is a fixture
from tsugi_kpool.sideband import Sideband

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
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # that of the listing itself
    return sum(link.startswith("socket:") for link in links)


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
    assert sockets() == before


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


# Prints a line for each thing that is to be so; the children outlive what they were forked beside.
FORK = """
import os, sys, time
from tsugi_kpool.sideband import Sideband
own, others, key, loose = sys.argv[1], sys.argv[2].split(","), sys.argv[3], sys.argv[4]

def sockets():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    return [link for link in links if link.startswith("socket:")]

def say(text):
    os.write(1, (text + "\\n").encode())

before = sockets()
sideband = Sideband(own, others, psk_file=key, dead_after_ms=3000).start()
while sideband.snapshot()["state"][0] != 1:
    time.sleep(0.02)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            say(f"child failed: {error!r}")
        finally:
            time.sleep(600)
            os._exit(0)
    return pid

def calls():
    assert sockets() == before, sockets()
    begun = time.monotonic()
    for step in range(2000):
        sideband.report_step(10 ** 6 + step)
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
    with Sideband(loose, [own], psk_file=key) as mine:
        mine.report_step(0)
        assert mine.snapshot()["node"].size == 1
    del mine, agent
    assert sockets() == before
    say("child is fine")

children = [child(calls)]
say(sys.stdin.readline().strip())
# Others beside it while connections come and go.
for turn in range(20):
    children.append(child(lambda: None))
    assert sideband.stop()
    sideband = Sideband(own, others, psk_file=key, dead_after_ms=3000).start()
say("restarted on the port, 20 times")
while sideband.snapshot()["state"][0] != 1:
    time.sleep(0.02)
sideband.report_step(41)
grandchild = child(lambda: child(calls))
say(",".join(map(str, children + [grandchild])))
time.sleep(600)
"""


def test_a_forked_child_keeps_no_port_and_speaks_for_nobody(key):  # noqa: F811
    own, other, loose = addresses(3)
    with Sideband(other, [own], psk_file=key, dead_after_ms=3000) as sideband:
        parent = subprocess.Popen(
            [sys.executable, "-c", FORK, own, other, key, loose],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert parent.stdout.readline() == "child is fine\n"
            state = lambda: sideband.snapshot()["state"][0]  # noqa: E731
            assert state() == ALIVE, "the child's stop() or its steps reached us"
            assert sideband.snapshot()["step"][0] == -1
            parent.stdin.write("go on\n")
            parent.stdin.flush()
            assert parent.stdout.readline() == "go on\n"
            assert parent.stdout.readline() == "restarted on the port, 20 times\n"
            said = {parent.stdout.readline().strip() for _ in range(2)}
            assert "child is fine" in said, said  # a child of a child
            until(lambda: sideband.snapshot()["step"][0] == 41, 20)
            # Without a word from the parent, its children being alive: gone, and the port free.
            parent.kill()
            parent.wait()
            bind_as_a_server(own)
            until(lambda: state() != ALIVE, 10)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()


LOADER = """
import sys
import torch
from tsugi_kpool.sideband import Sideband
own, other, key = sys.argv[1:]
sideband = Sideband(own, [other], psk_file=key).start()
data = torch.utils.data.TensorDataset(torch.arange(64.0))
loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
seen = sum(float(batch.sum()) for (batch,) in loader)
for _ in range(10):
    assert sideband.stop()
    sideband = Sideband(own, [other], psk_file=key).start()
seen += sum(float(batch.sum()) for (batch,) in loader)
print(seen, sideband.stop(), flush=True)
"""


def test_a_dataloaders_workers_do_not_keep_the_port(key):  # noqa: F811
    own, other = addresses(2)
    done = subprocess.run([sys.executable, "-c", LOADER, own, other, key], capture_output=True, text=True, timeout=150)
    assert done.stdout == f"{2.0 * sum(range(64))} True\n", done.stderr


EXITS = {
    "falls off the end": "",
    "raises": "raise KeyError('x')",
    "exits": "sys.exit(3)",
    "in a cycle": "sideband.me = sideband; del sideband",
    "is killed": "os.kill(os.getpid(), 15)",
}


@pytest.mark.parametrize("ending", EXITS.values(), ids=EXITS.keys())
def test_a_process_that_ends_without_stop_ends(key, ending):  # noqa: F811
    own, other = addresses(2)
    code = f"import os, sys\nfrom tsugi_kpool.sideband import Sideband\nsideband = Sideband({own!r}, [{other!r}], psk_file={key!r}).start()\n{ending}"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100)
    bind_as_a_server(own)
