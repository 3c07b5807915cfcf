"""``KPoolLoraConfig``: a ``peft.LoraConfig`` with the pool, routing, trigger and sideband fields."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import LoraConfig, PeftType

__all__ = ["KPOOL", "KPoolLoraConfig", "recommend_buffer_convergence_eps", "suggest_trigger"]

_log = logging.getLogger(__name__)

RoutingStrategy = Literal["round_robin", "random", "loss_aware"]
AggregationMode = Literal["synchronous", "buffer_convergence"]
Trigger = Literal["variance", "relative", "noise_scale"]
Agreement = Literal["planned", "stepwise"]
HoldAction = Literal["defer", "local", "discard"]
LrScaling = Literal["adam", "linear", "sqrt", "none"]
WireDtype = Literal["float32", "bfloat16"]
ROUTING_STRATEGIES, TRIGGERS = get_args(RoutingStrategy), get_args(Trigger)
DEFAULT_EPS = 1e-3


def _peft_type() -> PeftType:
    """``PeftType.KPOOL``. PEFT's registry wants a member of this enumeration, which has no way in of its own."""
    if "KPOOL" not in PeftType.__members__:
        member = str.__new__(PeftType, "KPOOL")
        member._name_, member._value_ = "KPOOL", "KPOOL"
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, "KPOOL", member)
        PeftType._member_names_.append("KPOOL")
        PeftType._member_map_["KPOOL"] = member
        PeftType._value2member_map_["KPOOL"] = member
    return PeftType("KPOOL")


KPOOL = _peft_type()


@dataclass
class KPoolLoraConfig(LoraConfig):
    """A pool of N LoRA adapters of which K are active in a step. ``get_peft_model(base, config)`` builds all of them.

    Every field of ``peft.LoraConfig`` is here too and describes each adapter. ``tsugi_kpool.attach`` takes the routing
    and what follows from it; on a pool that was built by hand from ``LoraConfig`` pass this as ``config``.

    Args:
        r: LoRA rank of each adapter.
        lora_alpha: each adapter is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.
        n_adapters: N, adapters in the pool.
        k_active: K, adapters active in a step.
        routing_strategy: ``"round_robin"``, ``"random"`` or ``"loss_aware"``; src/router.rs defines them.
        routing_seed: of ``"random"``, 0 to 2^64 - 1.
        aggregation_mode: ``"synchronous"`` averages the active adapters' gradients over ranks in every step;
            ``"buffer_convergence"`` holds them back until the trigger fires.
        buffer_capacity: how many steps' gradients are held before they fire in any case; at least 2.
        buffer_convergence_eps: threshold of ``trigger="variance"``, in squared gradient units.
        trigger: what decides when held gradients fire: ``"variance"``, ``"relative"`` or ``"noise_scale"`` (recommended);
            docs/trigger.md has the formulas.
        relative_theta: threshold of ``trigger="relative"``, without unit.
        fire_cost: for ``trigger="noise_scale"``: the time of an exchange divided by the time of a step. Windows grow with its
            square root.
        agreement: how ranks agree on a decision: ``"planned"`` or ``"stepwise"``. None: stepwise with
            ``trigger="variance"``, else planned.
        decision_delay: with ``"stepwise"``, steps between a record and the decision on it: 0 or 1.
        hold_action: what happens to a gradient that is held: ``"defer"``, ``"local"`` or ``"discard"``.
        lr_scaling: how one optimizer step stands for the m that were held: ``"adam"`` (rate, betas and decay as m steps
            of Adam add up), ``"linear"`` (m times the rate), ``"sqrt"``, ``"none"``; None for ``"adam"`` where ``attach``
            is given a ``torch.optim.Adam`` or ``AdamW`` to step, else ``"linear"``. docs/trigger.md has the formulas.
        max_hold_steps: steps after which a held gradient fires in any case; None for no limit but the capacity.
        wire_dtype: of gradients on the network, ``"float32"`` or ``"bfloat16"``.
        overlap: let an exchange run until its adapter is active again; only where ``attach`` is given the optimizer.
        stagger: let adapters fire in different steps.
        sync_timeout_s: seconds after which an exchange that has not finished is an error.
        nonfinite_limit: steps in a row, of one adapter, in which a rank may have no finite gradient before
            ``NonFiniteError`` is raised on all ranks; None for no limit.
        max_drift_ms: adapters hold while nodes are further apart than this, in milliseconds, as far as ranks have agreed.
        sideband_enabled: measure drift between nodes; needs ``aggregation_mode="buffer_convergence"``.
        sideband_addr: where this node listens, ``tcp://host:port``, IPv6 in brackets.
        sideband_peers: the other nodes' addresses.
        sideband_heartbeat_ms: milliseconds between messages to a peer.
        sideband_psk_file: file with the key that peers share; None for the one named by ``KPOOL_PSK_FILE``.
        diagnostics_dir: folder for diagnostics; None for none.

    Raises:
        ValueError: a field has a value it cannot have; the sentence names both.
    """

    r: int = 16
    lora_alpha: int = 32
    target_modules: Sequence[str] | str | None = ("q_proj", "v_proj")

    n_adapters: int = 8
    k_active: int = 2
    routing_strategy: RoutingStrategy = "round_robin"
    routing_seed: int = 0

    sideband_enabled: bool = False
    sideband_addr: str = "tcp://127.0.0.1:51820"
    sideband_peers: tuple[str, ...] = field(default_factory=tuple)
    sideband_heartbeat_ms: int = 50
    sideband_psk_file: str | None = None
    max_drift_ms: float = 250

    aggregation_mode: AggregationMode = "synchronous"
    buffer_capacity: int = 32
    buffer_convergence_eps: float = DEFAULT_EPS
    trigger: Trigger = "variance"
    relative_theta: float = 1.5
    fire_cost: float = 2.0
    agreement: Agreement | None = None
    decision_delay: int = 1
    hold_action: HoldAction = "defer"
    lr_scaling: LrScaling | None = None
    max_hold_steps: int | None = None
    wire_dtype: WireDtype = "float32"
    overlap: bool = True
    stagger: bool = True
    sync_timeout_s: float = 600.0
    nonfinite_limit: int | None = 100

    diagnostics_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, tuple):
            self.target_modules = list(self.target_modules)
        if isinstance(self.sideband_peers, list):
            self.sideband_peers = tuple(self.sideband_peers)
        _whole("r", self.r, 1)
        _number("lora_dropout", self.lora_dropout, lambda v: 0 <= v <= 1, "from 0 to 1")
        super().__post_init__()
        self.peft_type = KPOOL

        _whole("n_adapters", self.n_adapters, 1)
        _whole("k_active", self.k_active, 1)
        if self.k_active > self.n_adapters:
            raise ValueError(f"k_active is {self.k_active}, expected at most n_adapters = {self.n_adapters}")
        _one_of("routing_strategy", self.routing_strategy, RoutingStrategy)
        _whole("routing_seed", self.routing_seed, 0, 2**64 - 1)

        _one_of("aggregation_mode", self.aggregation_mode, AggregationMode)
        _whole("buffer_capacity", self.buffer_capacity, 2)
        _number("buffer_convergence_eps", self.buffer_convergence_eps, lambda v: v > 0, "above 0")
        _one_of("trigger", self.trigger, Trigger)
        _number("relative_theta", self.relative_theta, lambda v: v > 0, "above 0")
        _number("fire_cost", self.fire_cost, lambda v: v > 0, "above 0")
        if self.agreement is not None:
            _one_of("agreement", self.agreement, Agreement)
        _whole("decision_delay", self.decision_delay, 0, 1)
        _one_of("hold_action", self.hold_action, HoldAction)
        if self.lr_scaling is not None:
            _one_of("lr_scaling", self.lr_scaling, LrScaling)
        if self.max_hold_steps is not None:
            _whole("max_hold_steps", self.max_hold_steps, 1)
        _one_of("wire_dtype", self.wire_dtype, WireDtype)
        for name in ("overlap", "stagger", "sideband_enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.nonfinite_limit is not None:
            _whole("nonfinite_limit", self.nonfinite_limit, 1)
        _number("sync_timeout_s", self.sync_timeout_s, lambda v: v > 0, "above 0")

        _number("max_drift_ms", self.max_drift_ms, lambda v: v >= 0, "at least 0")
        _whole("sideband_heartbeat_ms", self.sideband_heartbeat_ms, 1)
        if self.sideband_enabled and self.aggregation_mode == "synchronous":
            raise ValueError(
                "sideband_enabled is True with aggregation_mode='synchronous', which has no use for it: "
                "set aggregation_mode='buffer_convergence'"
            )
        _address("sideband_addr", self.sideband_addr)
        if not isinstance(self.sideband_peers, tuple):
            raise ValueError(f"sideband_peers is {self.sideband_peers!r}, expected a tuple of tcp://host:port")
        for i, peer in enumerate(self.sideband_peers):
            _address(f"sideband_peers[{i}]", peer)
        for name in ("sideband_psk_file", "diagnostics_dir"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a path as a str, or None")
        self._refuse_what_a_pool_cannot_be()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; beside weights, the model card then says how a pool is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        card = folder / "README.md"
        if card.exists() or any(folder.glob("adapter_model.*")):
            _add_to_card(card)

    def _refuse_what_a_pool_cannot_be(self) -> None:
        init = self.init_lora_weights
        if not (isinstance(init, bool) or init in ("gaussian", "orthogonal")):
            raise ValueError(
                f"init_lora_weights is {init!r}, which rewrites the base weight for one adapter; the {self.n_adapters} "
                "adapters of a pool share it: use True, False, 'gaussian' or 'orthogonal'"
            )
        if self.layer_replication:
            raise ValueError(f"layer_replication is {self.layer_replication!r}, which a pool does not take")


# PEFT looks up the method's name among those that it has and calls no one, so a process that has not imported tsugi_kpool
# fails with KeyError: 'KPOOL', and what lies beside the weights is the one place left to say why.
_CARD = """
## Loading this adapter

This is a pool of LoRA adapters (PEFT type `KPOOL`), made with [tsugi-kpool](https://pypi.org/project/tsugi-kpool/). Import
it before PEFT loads the adapter; otherwise PEFT says `KeyError: 'KPOOL'`.

```python
import tsugi_kpool  # registers KPOOL with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```

`tsugi_kpool.export(model, folder)` writes an ordinary LoRA that loads without tsugi-kpool.
"""


def _add_to_card(card: Path) -> None:
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if "KeyError: 'KPOOL'" not in text:
        card.write_text(text.rstrip("\n") + "\n" + _CARD, encoding="utf-8")


def _one_of(name: str, value: Any, kind: Any) -> None:
    """ValueError for what is none of the values of a Literal."""
    if value not in get_args(kind):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, get_args(kind)))}")


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected a whole number {limits}")


def _number(name: str, value: Any, allowed: Any, limits: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not allowed(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number {limits}")


_ADDRESS = re.compile(r"tcp://(?:\[(?P<six>[^\[\]]*)\]|(?P<host>[^\[\]:/@\s]+)):(?P<port>[0-9]{1,5})")


def _address(name: str, value: Any) -> None:
    """``tcp://host:port`` with an IPv6 address in brackets."""
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{name} is {value!r}, expected tcp://host:port, port 0 to 65535, IPv6 as tcp://[::1]:port")
    if match["six"] is not None:
        import ipaddress

        try:
            ipaddress.IPv6Address(match["six"])
        except ValueError:
            raise ValueError(f"{name} is {value!r}, and {match['six']!r} is not an IPv6 address") from None


def recommend_buffer_convergence_eps(samples: Iterable[float], *, quantile: float = 0.5, floor: float = 1e-12) -> float:
    """A ``buffer_convergence_eps`` from variances that were observed: their quantile, but at least ``floor``.

    Args:
        samples: the ``variance`` of logged decisions; those that are not finite are left out.
        quantile: from 0 to 1, interpolated linearly between neighbours.
        floor: the least value that is returned, also if no sample is finite; above 0.

    Raises:
        ValueError: ``quantile`` or ``floor`` is outside its range.
    """
    _number("quantile", quantile, lambda v: 0 <= v <= 1, "from 0 to 1")
    _number("floor", floor, lambda v: v > 0, "above 0")
    finite = sorted(value for value in map(float, samples) if math.isfinite(value))
    if not finite:
        return floor
    place = quantile * (len(finite) - 1)
    below = math.floor(place)
    above = min(below + 1, len(finite) - 1)
    return max(finite[below] + (finite[above] - finite[below]) * (place - below), floor)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def suggest_trigger(config: KPoolLoraConfig) -> None:
    """Log which trigger is recommended, if the configuration has 0.1's default trigger and its default threshold."""
    untouched = config.trigger == "variance" and config.buffer_convergence_eps == DEFAULT_EPS
    if config.aggregation_mode == "buffer_convergence" and untouched:
        _say_once(
            f"trigger is 'variance' with its default threshold, buffer_convergence_eps={DEFAULT_EPS:g}, as in 0.1. That has "
            "the scale of your squared gradients, so it may fire always or never: set trigger='noise_scale', which needs no "
            "scale and is recommended, or a buffer_convergence_eps from recommend_buffer_convergence_eps"
        )
