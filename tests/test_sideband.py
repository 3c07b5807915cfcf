"""The sideband on real sockets and between real processes: kill -9, kill -STOP, hostile bytes."""

import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tsugi_kpool._native import sideband_constants
from tsugi_kpool.distributed.sideband import PHI_SUSPECT, STATES, Sideband

CHILD = """
import sys, time
from tsugi_kpool import Sideband
own, others, key = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
with Sideband(own, others, psk_file=key, dead_after_ms=3000) as sideband:
    print("up", flush=True)
    for step in range(100000):
        sideband.report_step(step, 20.0, 0.5, step, 2 * step)
        time.sleep(0.02)
"""
WIRE = sideband_constants()
JOB = hashlib.blake2b(b"", digest_size=8).digest()
ALIVE, SUSPECT, DEAD = (STATES.index(state) for state in ("alive", "suspect", "dead"))


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def spawn():
    children = []

    def run(*arguments, code=CHILD):
        child = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "up\n"
        return child

    yield run
    for child in children:
        child.kill()
        child.wait()


def addresses(count, host="127.0.0.1"):
    """Sorted, so that the first one is node 0; ports were free a moment ago."""
    with_ports = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets = [socket.socket(family) for _ in range(count)]
    for each in sockets:
        each.bind((host, 0))
        port = each.getsockname()[1]
        with_ports.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    for each in sockets:
        each.close()
    return sorted(with_ports)


def until(condition, seconds):
    """Waits for a condition, and returns how many seconds it took.

    The limit is a contract of the sideband where a test names one, else only an end.
    """
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def test_phase_is_told_and_a_stopped_and_a_killed_peer_are_noticed(key, spawn):
    own, second, third = addresses(3)
    with Sideband(own, [second, third], psk_file=key, dead_after_ms=3000) as sideband:
        peers = [spawn(second, f"{own},{third}", key), spawn(third, f"{own},{second}", key)]

        def state(node):
            return sideband.snapshot()["state"][node - 1]

        until(lambda: state(1) == state(2) == ALIVE, 10)
        for step in range(60):
            sideband.report_step(step, 20.0)
            time.sleep(0.02)
        found = sideband.snapshot()
        assert found["node"].tolist() == [1, 2]
        assert (found["step"] > 0).all() and (found["fires"] == found["step"]).all()
        assert (found["holds"] == 2 * found["step"]).all()
        assert np.isfinite(found["drift_ms"]).all() and (found["bound_ms"] < 500).all()
        assert sideband.drift_ms(1) is not None and sideband.max_drift_ms_across_peers() > 0
        assert sideband.drift_ms(7) is None

        def state_goes_with_phi():
            found = sideband.snapshot()
            state, phi = found["state"][0], found["phi"][0]
            assert state == DEAD or (phi > PHI_SUSPECT) == (state == SUSPECT), (state, phi)
            assert state == ALIVE or np.isnan(found["drift_ms"][0])
            return state

        assert state_goes_with_phi() == ALIVE
        peers[0].send_signal(signal.SIGSTOP)
        until(lambda: state_goes_with_phi() == SUSPECT, 2)
        until(lambda: state_goes_with_phi() == DEAD, 4)
        assert sideband.drift_ms(1) is None and state(2) == ALIVE
        peers[0].send_signal(signal.SIGCONT)
        until(lambda: state(1) == ALIVE, 2)

        boot = sideband.snapshot()["boot"][1]
        peers[1].kill()
        until(lambda: state(2) == SUSPECT, 2)
        until(lambda: state(2) == DEAD, 4)
        spawn(third, f"{own},{second}", key)
        until(lambda: state(2) == ALIVE, 2)
        assert sideband.snapshot()["boot"][1] != boot
    assert sideband.snapshot()["node"].size == 0


def resident_kib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_hostile_bytes_are_refused_and_counted_and_memory_stays(key, spawn):
    first, own = addresses(2)
    host, port = own.split(":")
    with Sideband(own, [first], psk_file=key) as sideband:
        spawn(first, own, key)
        until(lambda: sideband.snapshot()["state"][0] == ALIVE, 10)

        def refused(reason):
            return sideband.snapshot()["refused"][reason]

        before = refused("handshake")
        first_bytes = WIRE["first_bytes"].to_bytes(2, "little")
        boot, noise = bytes(8), os.urandom(WIRE["first_bytes"] - WIRE["opening_bytes"])
        # Right in every byte of the opening, so that what refuses it is the key alone; then another job, node, version.
        right = [WIRE["magic"], bytes([WIRE["version"], 0]), JOB, bytes(8), b"\0\0", b"\1\0", boot]
        assert len(b"".join(right)) == WIRE["opening_bytes"]
        wrong = [[*right[:at], bytes([9] * len(right[at])), *right[at + 1 :]] for at in (0, 1, 2, 3, 4, 5)]
        openings = [b"".join(each) + noise for each in [right, *wrong]]
        attacks = [b"\xff\xff" + bytes(9000), b"\0\0", first_bytes + os.urandom(WIRE["first_bytes"]), b"\x53\0"]
        attacks += [first_bytes + opening for opening in openings]
        for attack in attacks:
            with socket.create_connection((host, int(port))) as hostile:
                hostile.settimeout(10)
                hostile.sendall(attack)
                try:
                    assert hostile.recv(1) == b"", "an answer to bytes without the key"
                except ConnectionResetError:
                    pass
        until(lambda: refused("handshake") == before + len(attacks), 5)

        # One byte now and then, never a whole record: closed by the handshake's own time limit.
        with socket.create_connection((host, int(port))) as drip:
            drip.sendall(b"\x52")
            until(lambda: refused("handshake") == before + len(attacks) + 1, 10)

        silent, start, overflow = [], resident_kib(), refused("overflow")
        for _ in range(10_000):
            silent.append(socket.create_connection((host, int(port))))
            if len(silent) == 200:
                silent.pop(0).close()
        until(lambda: refused("overflow") > overflow + 5000, 10)
        assert resident_kib() < start + 20_000
        assert sideband.snapshot()["state"][0] == ALIVE
        assert sideband.snapshot()["silence_ms"][0] < 2000
        for each in silent:
            each.close()

        assert sideband.stop()


def test_a_wrong_key_is_refused(key, spawn, tmp_path):
    first, own = addresses(2)
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    other.chmod(0o600)
    with Sideband(own, [first], psk_file=key) as sideband:
        spawn(first, own, str(other))
        until(lambda: sideband.snapshot()["refused"]["handshake"] > 2, 10)
        assert sideband.snapshot()["state"][0] != ALIVE


def test_ipv6_and_host_names(key, spawn):
    first, own = addresses(2, "::1") if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6") else addresses(2)
    with Sideband(f"tcp://{own}", [first], psk_file=key) as sideband:
        spawn(first, own, key)
        until(lambda: sideband.snapshot()["state"][0] == ALIVE, 10)
    first, own = (address.replace("127.0.0.1", "localhost") for address in addresses(2))
    with Sideband(own, [first], psk_file=key) as sideband:
        spawn(first, own, key)
        until(lambda: sideband.snapshot()["state"][0] == ALIVE, 10)


def test_what_does_not_serve_is_named(key, monkeypatch):
    with pytest.raises(ValueError, match="address has 'nowhere'"):
        Sideband("nowhere")
    with pytest.raises(RuntimeError, match="torch.distributed"):
        Sideband("127.0.0.1:0").start()
    with pytest.raises(ValueError, match="needs the port"):
        Sideband("127.0.0.1:0", ["127.0.0.1:1"], psk_file=key).start()
    with pytest.raises(ValueError, match=r"peers has '127.0.0.1:0'.*needs the port"):
        Sideband(addresses(1)[0], ["127.0.0.1:0"], psk_file=key).start()
    for address in ("a:²", "a:99999", "a:" + "9" * 5000, "udp://a:1", "[::1:1", "a b:1", ":1", None, ("a", 1)):
        with pytest.raises(ValueError, match="address has .*, but an address is host:port"):
            Sideband(address)
    with pytest.raises(ValueError, match=r"peers is 'a:1', but must be a list of addresses: \['a:1'\]"):
        Sideband("127.0.0.1:1", "a:1")
    for value in (-1, 50.5, float("nan"), "50", None, True, 2**64):
        with pytest.raises(ValueError, match="dead_after_ms is .*, but must be a whole number of milliseconds"):
            Sideband("127.0.0.1:1", ["a:1"], dead_after_ms=value)
    with pytest.raises(ValueError, match="heartbeat_ms is 0"):
        Sideband(addresses(1)[0], ["127.0.0.1:1"], psk_file=key, heartbeat_ms=0).start()
    own = addresses(1)[0]
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "twice")
        with pytest.raises(ValueError, match="TORCHELASTIC_RESTART_COUNT is 'twice'"):
            Sideband(own, ["127.0.0.1:1"], psk_file=key).start()
    assert Sideband(own, ["127.0.0.1:1"], psk_file=key).start().stop(), "the port is free again"
    os.chmod(key, 0o644)
    with pytest.raises(ValueError, match="0644.*chmod 600"):
        Sideband(addresses(1)[0], ["127.0.0.1:1"], psk_file=key).start()
