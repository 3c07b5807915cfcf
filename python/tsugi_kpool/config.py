"""``KPoolLoraConfig``: a LoraConfig with the pool, its routing, its trigger and its sideband."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field

from peft import LoraConfig

from ._peft_type import KPOOL

__all__ = ["KPoolLoraConfig", "parse_tcp_address"]

_CHOICES = {
    "routing_strategy": ("round_robin", "random", "loss_aware"),
    "aggregation_mode": ("synchronous", "buffer_convergence"),
    "trigger": ("variance", "relative"),
    "agreement": (None, "planned", "stepwise"),
    "hold_action": ("defer", "local", "discard"),
    "lr_scaling": ("linear", "sqrt", "none"),
    "wire_dtype": ("float32", "bfloat16"),
}
# The least and the largest value, both allowed.
_INTEGERS = {
    "r": (1, 2**31 - 1),
    "n_adapters": (1, 2**31 - 1),
    "k_active": (1, 2**31 - 1),
    "routing_seed": (0, 2**64 - 1),
    "buffer_capacity": (2, 2**31 - 1),
    "decision_delay": (0, 1),
}
# The least value, and whether it is allowed itself.
_NUMBERS = {
    "sideband_heartbeat_ms": (1, True),
    "max_drift_ms": (0, True),
    "buffer_convergence_eps": (0, False),
    "relative_theta": (0, False),
    "sync_timeout_s": (0, False),
}


@dataclass
class KPoolLoraConfig(LoraConfig):
    """N LoRA adapters on every target layer, of which K are active (summed) in a step.

    Every field of :class:`peft.LoraConfig` is here too and holds for each of the N adapters.

    Args:
        r, lora_alpha, lora_dropout, target_modules, bias: as in LoraConfig, with these defaults.
        n_adapters: N.
        k_active: K, 1 <= K <= N.
        routing_strategy: ``"round_robin"`` (K further each step), ``"random"`` (seeded) or ``"loss_aware"`` (the highest
            moving average of losses, none left out for long).
        routing_seed: of ``"random"``.
        aggregation_mode: ``"synchronous"`` aggregates the active adapters' gradients in every step, as data parallelism
            does; ``"buffer_convergence"`` holds an adapter's gradients back until ``trigger`` says so.
        buffer_capacity: steps after which a hold ends at the latest, 2 or more.
        buffer_convergence_eps: FIRE when the variance of a snapshot, divided by the number of elements, is below it
            (``trigger="variance"``); :func:`recommend_buffer_convergence_eps` finds one.
        trigger: ``"variance"``, or ``"relative"``: FIRE when the variance of the mean gradient over all ranks is at most
            ``relative_theta``^2 times its squared norm (the norm test).
        relative_theta: of ``trigger="relative"``.
        agreement: how ranks agree on a decision: ``"stepwise"`` by a record a step, ``"planned"`` by what the last
            aggregation carried; None: planned for ``trigger="relative"``, stepwise for ``"variance"``.
        decision_delay: steps (0 or 1) after which a stepwise decision is waited for.
        hold_action: ``"defer"`` keeps a held gradient for later, ``"local"`` applies it on its own rank until the next
            FIRE averages the parameters, ``"discard"`` throws it away.
        lr_scaling: how the learning rate grows with the number of snapshots in an aggregated gradient.
        wire_dtype: of the gradients on the network.
        overlap: aggregate while training goes on, until the adapter is active again.
        max_hold_steps: as ``buffer_capacity``, counted in optimizer steps; None: no further limit.
        stagger: spread the adapters' FIREs over steps.
        sync_timeout_s: seconds after which a missing rank is an error.
        sideband_enabled: whether nodes measure each other's drift; needs ``"buffer_convergence"``.
        sideband_addr: ``tcp://host:port`` to listen on; IPv6 in brackets; port 0 takes a free one.
        sideband_peers: such addresses of the other nodes; empty where torch.distributed knows them.
        sideband_heartbeat_ms: milliseconds between heartbeats, 1 or more.
        sideband_psk_file: file with the shared key; None: the environment variable KPOOL_PSK_FILE.
        max_drift_ms: milliseconds of phase drift above which FIRE waits.
        diagnostics_dir: folder for a JSON-lines file a rank; None: none is written.

    Raises:
        ValueError: naming the field and its value.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = ("q_proj", "v_proj")

    n_adapters: int = 8
    k_active: int = 2
    routing_strategy: str = "round_robin"
    routing_seed: int = 0

    sideband_enabled: bool = False
    sideband_addr: str = "tcp://127.0.0.1:51820"
    sideband_peers: tuple[str, ...] = field(default_factory=tuple)
    sideband_heartbeat_ms: int = 50
    sideband_psk_file: str | None = None
    max_drift_ms: int = 250

    aggregation_mode: str = "synchronous"
    buffer_capacity: int = 32
    buffer_convergence_eps: float = 1e-3
    trigger: str = "variance"
    relative_theta: float = 1.5
    agreement: str | None = None
    decision_delay: int = 1
    hold_action: str = "defer"
    lr_scaling: str = "linear"
    wire_dtype: str = "float32"
    overlap: bool = True
    max_hold_steps: int | None = None
    stagger: bool = True
    sync_timeout_s: float = 600.0

    diagnostics_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, tuple):
            self.target_modules = list(self.target_modules)
        self.sideband_peers = tuple(self.sideband_peers)  # a list where it comes from JSON
        self._validate()
        super().__post_init__()
        self.peft_type = KPOOL

    def _validate(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        for name, (least, largest) in _INTEGERS.items():
            _integer(name, getattr(self, name), least, largest)
        for name, (least, included) in _NUMBERS.items():
            _number(name, getattr(self, name), least, included)
        if self.max_hold_steps is not None:
            _integer("max_hold_steps", self.max_hold_steps, 1, 2**31 - 1)
        if self.k_active > self.n_adapters:
            raise ValueError(f"k_active is {self.k_active}, expected at most n_adapters = {self.n_adapters}")
        _number("lora_dropout", self.lora_dropout, 0, True)
        if self.lora_dropout > 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected at most 1")
        for name in ("sideband_enabled", "overlap", "stagger"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.sideband_enabled and self.aggregation_mode == "synchronous":
            raise ValueError(
                "sideband_enabled is True, but aggregation_mode is 'synchronous', which decides nothing that drift could "
                "change; set aggregation_mode to 'buffer_convergence'"
            )
        parse_tcp_address(self.sideband_addr, "sideband_addr")
        for index, peer in enumerate(self.sideband_peers):
            parse_tcp_address(peer, f"sideband_peers[{index}]")


def _integer(name: str, value, least: int, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
        raise ValueError(f"{name} is {value!r}, expected an integer from {least} to {largest}")


def _number(name: str, value, least: float, included: bool) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (value >= least if included else value > least):
        raise ValueError(f"{name} is {value!r}, expected a finite number {'from' if included else 'above'} {least}")


_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


def parse_tcp_address(value: str, name: str = "address") -> tuple[str, int]:
    """``tcp://host:port`` as (host, port): a host name, an IPv4 address, or an IPv6 address in brackets.

    Raises:
        ValueError: naming ``name`` and the value.
    """

    def wrong(why: str) -> ValueError:
        return ValueError(f"{name} is {value!r}, {why}; expected tcp://host:port, IPv6 as tcp://[address]:port")

    if not isinstance(value, str) or not value.startswith("tcp://"):
        raise wrong("which does not start with 'tcp://'")
    host, colon, port = value.removeprefix("tcp://").rpartition(":")
    if not colon or host.startswith("[") != host.endswith("]"):
        raise wrong("which has no port")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise wrong(f"whose port {port!r} is not a number from 0 to 65535")
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise wrong(f"where {host!r} is no IPv6 address") from None
    elif not _HOST_NAME.fullmatch(host):
        raise wrong("which has no host" if not host else f"whose host {host!r} is no host name or IPv4 address")
    return host, int(port)
