"""The sideband between two network namespaces: clocks a day apart, unequal delays, a cut link, lost packets.

Each node is a process with a TUN device of its own, and a thread here carries the packets between the two. Needs root; skipped,
with the reason, elsewhere. TSUGI_LONG=1 loses packets for ten minutes instead of ten seconds.
"""

import json
import os
import random
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from benches.training.link import MTU, unavailable

from test_sideband import until
from tsugi_kpool.distributed.sideband import STATES

ALIVE, SUSPECT, DEAD = (STATES.index(state) for state in ("alive", "suspect", "dead"))
DAY, DEAD_AFTER, LAG = 86400.0, 3.0, 0.03
LONG = os.environ.get("TSUGI_LONG") == "1"

# A line on stdin: when to start stepping, on the clock that both share, and with which step; "rest"; or "read", which is answered.
NODE = """
import json, select, socket, sys, time
from benches.training.link import open_tun
node, channel, key, lag = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), sys.argv[3], float(sys.argv[4])
tun = open_tun(f"10.78.0.{node + 1}")
socket.send_fds(channel, [b"tun"], [tun])
from tsugi_kpool import Sideband
own, other = ("10.78.0.%d:51820" % (n + 1) for n in (node, 1 - node))
with Sideband(own, [other], psk_file=key, dead_after_ms=3000) as sideband:
    start, step, marks, seen = None, 0, {}, set()
    lines = open(0, "rb", buffering=0)  # select does not see what a buffer holds
    print(time.monotonic(), flush=True)
    while True:
        due = 0.05 if start is None else max(0.0, start + (step - first) * 0.1 + lag - time.time())
        if select.select([lines], [], [], min(due, 0.05))[0]:
            line = lines.readline().decode().strip()
            if not line:
                break
            if line == "read":
                found = {k: float(sideband.snapshot()[k][0]) for k in ("state", "drift_ms", "bound_ms", "step")}
                print(json.dumps({**found, "marks": marks, "seen": sorted(seen)}), flush=True)
                seen.clear()
            else:
                start = None if line == "rest" else float(line.split()[0])
                first = step = 0 if start is None else int(line.split()[1])
                marks.clear()
        if start is not None and time.time() >= start + (step - first) * 0.1 + lag:
            before = time.time()
            sideband.report_step(step, 100.0)
            marks[step] = [before, time.time()]
            marks.pop(step - 20, None)
            step += 1
        seen.add(int(sideband.snapshot()["state"][0]))
"""


class Link(threading.Thread):
    """Carries packets: ``delay[k]`` seconds from node k, a share ``loss`` of them lost, none while ``cut``."""

    def __init__(self, tuns):
        super().__init__(daemon=True)
        self.tuns, self.delay, self.loss, self.cut, self.ended = tuns, [0.0, 0.0], 0.0, False, False
        self.lost, self._random = 0, random.Random(1)

    def run(self):
        waiting = []
        while not self.ended:
            rest = max(0.0, min(waiting)[0] - time.monotonic()) if waiting else 0.05
            for tun in select.select(self.tuns, [], [], min(rest, 0.05))[0]:
                k = self.tuns.index(tun)
                packet = os.read(tun, MTU + 64)
                if self.cut or self._random.random() < self.loss:
                    self.lost += 1
                else:
                    waiting.append((time.monotonic() + self.delay[k], 1 - k, packet))
            for each in sorted(each for each in waiting if each[0] <= time.monotonic()):
                waiting.remove(each)
                os.write(self.tuns[each[1]], each[2])


class Node:
    def __init__(self, node, key, day):
        ours, theirs = socket.socketpair()
        shift = ["unshare", "-T", "--monotonic", str(int(DAY)), "--boottime", str(int(DAY)), "--fork", "--kill-child"]
        command = [sys.executable, "-c", NODE, str(node), str(theirs.fileno()), key, str(LAG * node)]
        root = Path(__file__).parent.parent
        path = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [*shift, *command] if day else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        ours.settimeout(120)
        self.tun = socket.recv_fds(ours, 16, 1)[1][0]

    def say(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def read(self):
        self.say("read")
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    reason = unavailable()
    if reason is None:
        probe = subprocess.run(["unshare", "-T", "--monotonic", "1", "true"], capture_output=True, text=True)
        reason = f"no time namespace can be made: {probe.stderr.strip()}" if probe.returncode else None
    if reason:
        pytest.skip(reason)
    key = tmp_path_factory.mktemp("sideband") / "key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)
    nodes, link = [], None
    try:
        for node in range(2):
            nodes.append(Node(node, str(key), day=node == 1))
        link = Link([node.tun for node in nodes])
        link.start()
        clocks = [float(node.process.stdout.readline()) for node in nodes]
        assert abs(clocks[1] - clocks[0] - DAY) < 120, "the two clocks were to differ by a day"
        yield nodes, link
    finally:
        if link is not None:
            link.ended = True
            link.join()
        for node in nodes:
            node.process.kill()
            node.process.wait()
            os.close(node.tun)


@pytest.fixture
def pair(started):
    """The two nodes at rest, and the link as a wire."""
    nodes, link = started
    link.delay, link.loss, link.cut, link.lost = [0.0, 0.0], 0.0, False, 0
    for node in nodes:
        node.say("rest")
    until(lambda: states(nodes) == [ALIVE, ALIVE], 20)
    return nodes, link


def states(nodes):
    return [node.read()["state"] for node in nodes]


def step(nodes, first):
    start = time.time() + 0.5
    for node in nodes:
        node.say(f"{start} {first}")


def test_a_day_apart_with_unequal_delays_drift_is_true_within_its_bound(pair):
    nodes, link = pair
    for first, link.delay in ((1000, [0.021, 0.001]), (2000, [0.001, 0.021])):
        step(nodes, first)
        time.sleep(2.5)
        stated = 0
        for _ in range(40):
            found = [node.read() for node in nodes]
            for here, there in (found, found[::-1]):
                common = sorted(set(here["marks"]) & set(there["marks"]), key=int)[-4:]
                both = [(here["marks"][s], there["marks"][s]) for s in common]
                # Each moment is known to within the call that reported it.
                low = min(1e3 * (theirs[0] - ours[1]) for ours, theirs in both)
                high = max(1e3 * (theirs[1] - ours[0]) for ours, theirs in both)
                assert low - here["bound_ms"] <= here["drift_ms"] <= high + here["bound_ms"]
                stated += here["bound_ms"] < 1e3 * LAG
            time.sleep(0.05)
        assert stated > 40, "the bounds are wider than the drift, so nothing was tried"


@pytest.mark.parametrize("stepping", [True, False])
def test_a_cut_link_is_noticed_and_is_back_after_its_healing(pair, stepping):
    nodes, link = pair
    if stepping:
        step(nodes, 3000)
    time.sleep(3)  # an idle job's heartbeats are rare by now
    link.cut = True
    # 2 s, the configured time, 2 s; and a second each for a busy machine.
    noticed = until(lambda: all(state in (SUSPECT, DEAD) for state in states(nodes)), 2 + 1)
    gone = noticed + until(lambda: states(nodes) == [DEAD, DEAD], DEAD_AFTER - noticed + 1)
    time.sleep(2)
    link.cut = False
    back = until(lambda: states(nodes) == [ALIVE, ALIVE], 2 + 1)
    print(f"stepping {stepping}: suspect after {noticed:.2f} s, dead after {gone:.2f} s, back after {back:.2f} s")


def test_one_percent_of_packets_lost_raises_no_suspicion(pair):
    nodes, link = pair
    link.delay, link.loss = [0.005, 0.005], 0.01
    step(nodes, 4000)
    for node in nodes:
        node.read()
    time.sleep(600 if LONG else 10)
    found = [node.read() for node in nodes]
    print(f"{link.lost} packets lost")
    assert link.lost > 0, "nothing was lost, so nothing was tried"
    assert [each["seen"] for each in found] == [[ALIVE], [ALIVE]]
