"""``Sideband``: one agent a host measures how far the other nodes are ahead or behind, in a thread without the GIL.

Use ``Sideband.from_config(config)``, then ``start()``. Peers and key come through torch.distributed's store if it is up, else
from ``sideband_peers`` and a key file. What the agent finds is advice: a trigger uses it only through records that all ranks
exchanged. docs/sideband.md has the wire format, and what a host with or without the key can do.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import os
import re
import secrets
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from .._native import SidebandAgent, read_sideband_key, sideband_constants
from .rendezvous import Rendezvous

__all__ = ["PHI_SUSPECT", "STATES", "Sideband"]

#: The meaning of ``snapshot()["state"]``.
STATES = ("unknown", "alive", "suspect", "dead")
#: A living node with a larger ``snapshot()["phi"]`` becomes suspect.
PHI_SUSPECT: float = float(sideband_constants()["phi_suspect"])
_COLUMNS = {
    "node": np.uint16,
    "state": np.uint8,
    "boot": np.uint64,
    "silence_ms": np.float64,
    "phi": np.float64,
    "step": np.int64,
    "lag": np.int64,
    "drift_ms": np.float64,
    "bound_ms": np.float64,
    "offset_ms": np.float64,
    "skew_ppm": np.float64,
    "step_ms": np.float64,
    "fill": np.float32,
    "fires": np.uint32,
    "holds": np.uint32,
}
#: ``host:port`` or ``[ip]:port``, with ``tcp://`` in front or without.
_ADDRESS = re.compile(r"(tcp://)?(\[(?P<ip>[^\[\]/\s]+)\]|(?P<name>[^\[\]/\s]+)):(?P<port>[0-9]{1,5})")
_ADVICE = (
    "Every rank must start its sideband: look whether sideband_enabled is True on each of them (or each calls "
    "Sideband.start()), and whether one failed before it came here."
)


class Sideband:
    """This process's end of the sideband.

    Args:
        address: ``host:port`` of this node (``tcp://`` in front is allowed, ``[::1]:port`` for IPv6), as the others write it.
        peers: The addresses of the other nodes; with ``address`` the same set on every node, spelled the same. Empty: hosts
            and addresses are exchanged through torch.distributed's store; then every rank of ``group`` must call
            :meth:`start`, and on each host the lowest rank runs the agent.
        psk_file: File of 64 hexadecimal digits that its owner alone may read; default is the variable KPOOL_PSK_FILE.
            Without one, and only with the store, rank 0 makes a key and the store hands it over in plain text.
        group: Process group, default is the whole world.
        heartbeat_ms: Time between two heartbeats, 1 to 10000 ms.
        dead_after_ms: Silence after which a node counts as dead.
        expire_after_ms: Silence after which what a dead node said is forgotten.
        job: Name of the job; nodes of another one are refused. The store's ranks share a random one in addition.
        timeout_s: Seconds that :meth:`start` waits for the other ranks.

    A child that is forked off (a DataLoader worker) has none of the agent's sockets. There, a started sideband is as after
    :meth:`stop`: calls do nothing and return what is empty. The child may start one of its own.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:51820",
        peers: Sequence[str] = (),
        *,
        psk_file: str | None = None,
        group: dist.ProcessGroup | None = None,
        heartbeat_ms: int = 50,
        dead_after_ms: int = 5000,
        expire_after_ms: int = 60000,
        job: str = "",
        timeout_s: float = 600.0,
    ) -> None:
        self._address = _split("address", address)
        if isinstance(peers, str):
            raise ValueError(f"peers is {peers!r}, but must be a list of addresses: [{peers!r}]")
        self._peers = [_join(*_split("peers", peer)) for peer in peers]
        self._psk_file = psk_file or os.environ.get("KPOOL_PSK_FILE") or None
        self._group = group
        times = {"heartbeat_ms": heartbeat_ms, "dead_after_ms": dead_after_ms, "expire_after_ms": expire_after_ms}
        self._times = {name: _whole(name, value) for name, value in times.items()}
        self._job = job
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s!r}, but must be above 0 seconds")
        self._timeout_s = float(timeout_s)
        self._agent: SidebandAgent | None = None
        self.node: int | None = None
        """Number of this host's node, None before :meth:`start`."""

    @classmethod
    def from_config(cls, config: Any, group: dist.ProcessGroup | None = None) -> Sideband:
        """A sideband from the ``sideband_*`` fields of a ``KPoolLoraConfig``; not started."""
        heartbeat_ms = config.sideband_heartbeat_ms
        return cls(
            config.sideband_addr,
            config.sideband_peers,
            psk_file=getattr(config, "sideband_psk_file", None),
            group=group,
            heartbeat_ms=heartbeat_ms,
            dead_after_ms=max(5000, 8 * heartbeat_ms),
            expire_after_ms=max(60000, 16 * heartbeat_ms),
            timeout_s=config.sync_timeout_s,
        )

    def start(self) -> Sideband:
        """Listens and starts the agent; with the store it first waits for every rank of the group, ``timeout_s`` at most.

        After an error nothing listens.

        Raises:
            ValueError: an address, time or key file that does not serve, named with its value.
            SyncError: a rank did not come in time; ``missing`` has who.
            RuntimeError: neither peers nor torch.distributed, or already started.
        """
        if self.node is not None:
            raise RuntimeError("the sideband was started before: make a new one")
        if self._peers:
            self._start_from_addresses()
        elif dist.is_available() and dist.is_initialized():
            self._start_from_store()
        else:
            raise RuntimeError("the sideband needs peers=..., or torch.distributed to be initialised")
        return self

    def _start_from_addresses(self) -> None:
        own = _join(*self._address)
        for name, address in [("address", own), *(("peers", peer) for peer in self._peers)]:
            if address.endswith(":0"):
                raise ValueError(f"{name} has {address!r}: with peers given it needs the port that the others know")
        if self._psk_file is None:
            raise ValueError("peers are given but no key: set KPOOL_PSK_FILE or psk_file")
        nodes = sorted({own, *self._peers})
        key = read_sideband_key(self._psk_file)
        self._run(SidebandAgent(own), nodes.index(own), nodes, key, self._job)

    def _start_from_store(self) -> None:
        group: Any = self._group
        if hasattr(group, "get_group"):  # a DeviceMesh of one dimension
            group = group.get_group()
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        rank, first = dist.get_rank(), ranks[0]
        if rank not in ranks:
            raise ValueError(f"group has the ranks {ranks}, and this process is rank {rank}")
        meeting = Rendezvous("the sideband", ranks, rank, self._timeout_s, _ADVICE)
        hello: dict[str, Any] = {"host": _host_identity(), "has_key_file": self._psk_file is not None}
        if rank == first:
            hello["job"] = secrets.token_hex(16)
            hello["key"] = None if self._psk_file else secrets.token_hex(32)
        said = {other: json.loads(text) for other, text in meeting.say("hello", json.dumps(hello)).items()}

        leaders: dict[str, int] = {}  # the lowest rank of each host, in order of rank
        for other in ranks:
            leaders.setdefault(said[other]["host"], other)
        for leader in leaders.values() if said[first]["has_key_file"] else ():
            if not said[leader]["has_key_file"]:
                raise ValueError(
                    f"rank {first} has a key file and rank {leader} none: set KPOOL_PSK_FILE on every host"
                )
        node = self.node = list(leaders).index(hello["host"])
        if leaders[hello["host"]] == rank:
            job = self._job + said[first]["job"]
            self._lead(meeting, node, list(leaders.values()), said[first]["key"], job)

    def _lead(self, meeting: Rendezvous, node: int, leaders: list[int], key: str | None, job: str) -> None:
        """Runs this host's agent: tells the other hosts where it listens, or why it does not, so that nobody waits."""
        agent: SidebandAgent | None = None
        address = ""
        failure: Exception | None = None
        try:
            key = key or read_sideband_key(str(self._psk_file))  # the first rank said that there is one
            agent, address = self._listen(alone=len(leaders) == 1)
        except (ValueError, OSError) as error:
            failure = error
        try:
            answer = json.dumps({"address": address, "failure": str(failure or "")})
            heard = meeting.say("address", answer, leaders)
            if failure is not None:
                raise failure
            answers = [json.loads(heard[leader]) for leader in leaders]
            for leader, answer in zip(leaders, answers, strict=True):
                if answer["failure"]:
                    raise ValueError(f"the sideband of rank {leader} could not start: {answer['failure']}")
        except BaseException:
            if agent is not None:
                agent.stop()  # an error that is kept would keep the port
            raise
        if agent is not None and key is not None:  # else there was a failure, which was raised
            self._run(agent, node, [answer["address"] for answer in answers], key, job)

    def _listen(self, alone: bool) -> tuple[SidebandAgent, str]:
        """Listens where the other hosts can reach it: a taken port gives way to a free one."""
        host, port = self._address
        if host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::") and not alone:
            host = _reachable_host(os.environ.get("MASTER_ADDR", "localhost"))
        try:
            agent = SidebandAgent(_join(host, port))
        except ValueError:
            agent = SidebandAgent(_join(host, 0))
        return agent, _join(host, agent.port)

    def _run(self, agent: SidebandAgent, node: int, nodes: list[str], key: str, job: str) -> None:
        digest = int.from_bytes(hashlib.blake2b(job.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
        try:
            agent.start(node=node, peers=nodes, key=key, job=digest, epoch=_restarts(), **self._times)
        except BaseException:
            agent.stop()
            raise
        self.node, self._agent = node, agent

    @property
    def _running(self) -> SidebandAgent | None:
        """The agent; None before :meth:`start`, after :meth:`stop`, and in a child that was forked off since."""
        return None if self._agent is None or self._agent.forked else self._agent

    def report_step(
        self, step: int, duration_ms: float = 0.0, fill: float = 0.0, fires: int = 0, holds: int = 0
    ) -> None:
        """Tells the others that step ``step`` (from 0) was reached now. Costs a microsecond and waits for nobody.

        Args:
            duration_ms: Duration of the step.
            fill: Filled share of the gradient buffer, 0 to 1.
            fires, holds: Decisions so far.
        """
        agent = self._running
        if agent is not None:
            agent.report_step(step, duration_ms, fill, fires, holds)

    def snapshot(self) -> dict[str, Any]:
        """What was known at the last heartbeat: arrays of ``[peers]`` in order of node, and counts.

        ``node``, ``state`` (index into :data:`STATES`), ``boot``, ``silence_ms``, ``phi``, ``step`` (-1: none), ``lag``
        (our step minus theirs), ``drift_ms`` (positive: the peer reached the step later), ``bound_ms``, ``offset_ms``
        (their clock minus ours), ``skew_ppm``, ``step_ms``, ``fill``, ``fires``, ``holds``; NaN where nothing is known.
        A node that is alive becomes suspect when ``phi`` passes :data:`PHI_SUSPECT`; drift is stated for the living alone.
        ``refused`` and ``closed`` count connections by why they ended, ``bytes_sent`` and ``bytes_received`` are totals.
        Empty arrays on a rank that runs no agent, after :meth:`stop`, and in a forked child.
        """
        agent = self._running
        found = agent.snapshot() if agent else {"refused": {}, "closed": {}, "bytes_sent": 0, "bytes_received": 0}
        arrays = {name: np.asarray(found.get(name, ()), dtype) for name, dtype in _COLUMNS.items()}
        return {**found, **arrays}

    def drift_ms(self, peer: int) -> float | None:
        """Phase drift against node ``peer`` in ms, None while it is not known."""
        found = self.snapshot()
        drift = found["drift_ms"][found["node"] == peer]
        return float(drift[0]) if drift.size and np.isfinite(drift[0]) else None

    def max_drift_ms_across_peers(self) -> float | None:
        """The largest absolute drift against a peer that is alive, in ms; None while none is known."""
        drift = self.snapshot()["drift_ms"]
        drift = np.abs(drift[np.isfinite(drift)])
        return float(drift.max()) if drift.size else None

    def stop(self) -> bool:
        """Says goodbye and ends the agent, within one second; true if its port and connections are closed by then.

        A second call, and a call in a forked child, returns true and does nothing.
        """
        agent, self._agent = self._running, None
        return agent is None or agent.stop()

    def __enter__(self) -> Sideband:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _split(name: str, address: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{name} has {address!r}, but an address is host:port, [::1]:port for IPv6")
    return match["name"] or match["ip"], int(match["port"])


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 < value < 2**63:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of milliseconds above 0")
    return value


def _restarts() -> int:
    """How often torchrun restarted the job."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(
            f"TORCHELASTIC_RESTART_COUNT is {text!r}, but must be the number of restarts that torchrun sets"
        )
    return int(text)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_identity() -> str:
    """Equal on two ranks exactly if they share a machine and its network."""
    parts = [socket.gethostname()]
    if os.path.exists("/proc/sys/kernel/random/boot_id"):
        with open("/proc/sys/kernel/random/boot_id") as file:
            parts.append(file.read().strip())
        parts.append(str(os.stat("/proc/self/ns/net").st_ino))
    return "/".join(parts)


def _reachable_host(master: str) -> str:
    """Address of the interface that leads to ``master``; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]
