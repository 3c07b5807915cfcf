"""How far the other nodes are in phase: one agent a host, in a thread of its own that never holds the GIL.

``Sideband.from_config(config)`` then ``start()``. Peers and key come through torch.distributed's store when it is up, from
``sideband_peers`` and a key file otherwise. What it finds is advice: a trigger uses it only through records that all
ranks exchanged. docs/sideband.md has the wire format and who is trusted with what.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from ._native import SidebandAgent, read_sideband_key

__all__ = ["STATES", "Sideband"]

#: The meaning of ``snapshot()["state"]``.
STATES = ("unknown", "alive", "suspect", "dead")
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
_starts = itertools.count()  # every rank starts its sidebands in the same order, so this names a rendezvous


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
    ) -> None:
        self._address = _split("address", address)
        self._peers = [_join(*_split("peers", peer)) for peer in peers]
        self._psk_file = psk_file or os.environ.get("KPOOL_PSK_FILE") or None
        self._group = group
        self._times = {
            "heartbeat_ms": heartbeat_ms,
            "dead_after_ms": dead_after_ms,
            "expire_after_ms": expire_after_ms,
        }
        self._job = job
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
        )

    def start(self) -> Sideband:
        """Listens and starts the agent; with the store it first waits for every rank of the group.

        Raises:
            ValueError: an address, time or key file that does not serve, named with its value.
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
        if self._address[1] == 0:
            raise ValueError(f"address is {own!r}: with peers given it needs the port that the others know")
        if self._psk_file is None:
            raise ValueError("peers are given but no key: set KPOOL_PSK_FILE or psk_file")
        nodes = sorted({own, *self._peers})
        agent = SidebandAgent(own)
        self._run(agent, nodes.index(own), nodes, read_sideband_key(self._psk_file), self._job)

    def _start_from_store(self) -> None:
        ranks = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        name = f"tsugi/sideband/{next(_starts)}/{ranks[0]}-{len(ranks)}"
        store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        rank = dist.get_rank()
        if rank == ranks[0]:
            store.set("job", secrets.token_hex(16))
            store.set("key", "file" if self._psk_file else secrets.token_hex(32))
        store.set(f"host/{rank}", _host_identity())
        hosts = [store.get(f"host/{other}").decode() for other in ranks]
        leaders = {}
        for other, host in zip(ranks, hosts, strict=True):
            leaders.setdefault(host, other)
        order = list(leaders.values())
        self.node = order.index(leaders[hosts[ranks.index(rank)]])
        if order[self.node] != rank:
            return
        try:
            agent, address = self._listen(alone=len(order) == 1)
        except ValueError as error:
            store.set(f"address/{self.node}", "")  # the others must not wait for what does not come
            raise error
        store.set(f"address/{self.node}", address)
        nodes = [store.get(f"address/{node}").decode() for node in range(len(order))]
        if "" in nodes:
            raise ValueError(f"the sideband of node {nodes.index('')} could not listen; its own error says why")
        key = store.get("key").decode()
        if key == "file":
            if self._psk_file is None:
                raise ValueError(
                    f"rank {ranks[0]} has a key file and rank {rank} none: set KPOOL_PSK_FILE on every host"
                )
            key = read_sideband_key(self._psk_file)
        self._run(agent, self.node, nodes, key, self._job + store.get("job").decode())

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
        digest = int.from_bytes(hashlib.blake2b(job.encode(), digest_size=8).digest(), "little")
        epoch = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        agent.start(node=node, peers=nodes, key=key, job=digest, epoch=epoch, **self._times)
        self.node, self._agent = node, agent

    def report_step(
        self, step: int, duration_ms: float = 0.0, fill: float = 0.0, fires: int = 0, holds: int = 0
    ) -> None:
        """Tells the others that step ``step`` (from 0) was reached now. Costs a microsecond and waits for nobody.

        Args:
            duration_ms: Duration of the step.
            fill: Filled share of the gradient buffer, 0 to 1.
            fires, holds: Decisions so far.
        """
        if self._agent is not None:
            self._agent.report_step(step, duration_ms, fill, fires, holds)

    def snapshot(self) -> dict[str, Any]:
        """What was known at the last heartbeat: arrays of ``[peers]`` in order of node, and counts.

        ``node``, ``state`` (index into :data:`STATES`), ``boot``, ``silence_ms``, ``phi``, ``step`` (-1: none), ``lag``
        (our step minus theirs), ``drift_ms`` (positive: the peer reached the step later), ``bound_ms``, ``offset_ms``
        (their clock minus ours), ``skew_ppm``, ``step_ms``, ``fill``, ``fires``, ``holds``; NaN where nothing is known.
        ``refused`` counts by reason, ``bytes_sent`` and ``bytes_received`` are totals. Empty arrays on a rank that
        runs no agent, and after :meth:`stop`.
        """
        found = self._agent.snapshot() if self._agent else {"refused": {}, "bytes_sent": 0, "bytes_received": 0}
        arrays = {name: np.array(found.get(name, ()), dtype) for name, dtype in _COLUMNS.items()}
        return {**found, **arrays}

    def drift_ms(self, peer: int) -> float | None:
        """Phase drift against node ``peer`` in ms, None while it is not known."""
        found = self.snapshot()
        drift = found["drift_ms"][found["node"] == peer]
        return float(drift[0]) if drift.size and np.isfinite(drift[0]) else None

    def max_drift_ms_across_peers(self) -> float | None:
        """The largest absolute drift against a peer that is not dead, in ms; None while none is known."""
        drift = self.snapshot()["drift_ms"]
        drift = np.abs(drift[np.isfinite(drift)])
        return float(drift.max()) if drift.size else None

    def stop(self) -> bool:
        """Says goodbye and ends the thread, within one second; true if it has ended by then."""
        agent, self._agent = self._agent, None
        return agent is None or agent.stop()

    def __enter__(self) -> Sideband:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _split(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{name} has {address!r}, but an address is host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


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
