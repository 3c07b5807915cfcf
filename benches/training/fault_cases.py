"""The cases of ``faults.py`` and what one rank of them does: a fault, a way of training, a number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tsugi_kpool.distributed.agree import LOCAL_FIELDS

LIMIT_S = 6.0  # sync_timeout_s of every case
FAULT_STEP = 15

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"aggregation_mode": "synchronous"},
    "relative planned": {"trigger": "relative", "agreement": "planned"},
    "variance stepwise": {"trigger": "variance", "agreement": "stepwise", "buffer_convergence_eps": 1e-2},
    "noise_scale": {"trigger": "noise_scale"},
    "local": {"trigger": "relative", "hold_action": "local"},
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong. ``signal`` comes from outside and at any moment; all else is done by the culprit itself.

    steps: how many steps a run has; those that a signal is to interrupt have more than it waits for.
    equal: the run has to end, with the same bits on all ranks.
    warned: the run may end, with the same bits on all ranks and a warning that names the culprit.
    """

    signal: str = ""  # "kill", "stop 1", "stop 20", "int"
    steps: int = 60
    equal: bool = False
    warned: bool = False
    peer_stops: bool = False  # another rank is stopped when the signal comes


FAULTS: dict[str, Fault] = {
    "none": Fault(equal=True),
    "kill": Fault("kill", steps=2000),
    "stop 1 s": Fault("stop 1", steps=200, equal=True),
    "stop 20 s": Fault("stop 20", steps=2000),
    "raise": Fault(),
    "raise, close in finally": Fault(),
    "exit early": Fault(),
    "close early": Fault(),
    "NaN": Fault(warned=True),
    "disk full": Fault(equal=True),
    "Ctrl-C": Fault("int", steps=2000),
    "Ctrl-C, peer stopped": Fault("int", steps=2000, peer_stops=True),
}
DIFFERENT = "differ in "  # the fault "differ in seed", and so on
#: What is no field of the configuration, and what an error calls it.
OUTSIDE_CONFIG = {
    "seed": "",
    "base weight": "0.base_layer.weight",
    "base dtype": "float64",  # of the adapters, which follow it
    "base activation": "module base_model.model.1",
    "lr": "lr of the optimizer's group 0",
    "betas": "betas of the optimizer's group 0",
    "weight_decay": "weight_decay of the optimizer's group 0",
    "optimizer": "optimizer",
    "order of parameters": "",
    "max_grad_norm": "max_grad_norm",
}


@dataclass(frozen=True)
class Case:
    fault: str
    mode: str
    ranks: int
    store_in_rank_0: bool = True
    plain: bool = False  # processes of their own instead of forked ones: the end of the interpreter is then part of it

    @property
    def culprit(self) -> int:
        """Not the same in every case; never rank 0 alone, whose end takes the store away."""
        return hash_of(self.fault, self.mode, self.ranks) % self.ranks

    @property
    def stopped(self) -> int:
        """The rank that is stopped while the culprit is interrupted."""
        return (self.culprit + 1) % self.ranks

    @property
    def kind(self) -> Fault:
        return FAULTS.get(self.fault, Fault())

    @property
    def is_different(self) -> bool:
        return self.fault.startswith(DIFFERENT)

    @property
    def difference(self) -> str:
        return self.fault.removeprefix(DIFFERENT)

    @property
    def may_differ(self) -> bool:
        """What changes no result, or what is made the same: adapters drawn from another seed."""
        return self.is_different and self.difference in ("seed", "order of parameters", *LOCAL_FIELDS)

    @property
    def name(self) -> str:
        return f"{self.fault} | {self.mode} | {self.ranks}"


def name_in_error(case: Case) -> str:
    """What the error about a setting that differs has to call it."""
    return OUTSIDE_CONFIG.get(case.difference, case.difference)


def hash_of(*what: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "little")


# ---- settings that differ on one rank, derived from the configuration's own fields -----------------------------------


def other_settings(mode: str) -> dict[str, dict[str, Any]]:
    """Field -> what the culprit's configuration has there, for each field of a pool and the first ones of LoRA."""
    from peft import LoraConfig

    from tsugi_kpool import KPoolLoraConfig

    known = {f.name for f in dataclasses.fields(LoraConfig)}
    names = [f.name for f in dataclasses.fields(KPoolLoraConfig) if f.name not in known]
    names += ["r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"]
    plain = {**base_fields(), **MODES[mode]}
    return {name: {name: value} for name in names if (value := _other_value(name, plain)) is not None}


def _other_value(name: str, plain: dict[str, Any]) -> Any:
    """A value of this field that the configuration takes and that is not the one it has; None where there is none."""
    from tsugi_kpool import KPoolLoraConfig

    now = getattr(KPoolLoraConfig(**plain), name)
    tries: list[Any] = []
    if name.endswith(("_dir", "_file")):
        tries = [os.path.join(tempfile.gettempdir(), "tsugi-faults-elsewhere")]
    elif isinstance(now, bool):
        tries = [not now]
    elif isinstance(now, (int, float)):
        tries = [now / 2 or 0.5] if isinstance(now, float) else [now + 1, now * 2, now - 1]
    elif isinstance(now, str) or now is None:
        tries = [*_listed(typing.get_type_hints(KPoolLoraConfig)[name]), 3, "tcp://127.0.0.1:1"]
    for value in tries:
        try:
            if value != now and getattr(KPoolLoraConfig(**{**plain, name: value}), name) == value:
                return value
        except (ValueError, TypeError):
            continue
    return None


def _listed(hint: Any) -> list[str]:
    """The strings of the Literal in a type."""
    return [s for each in typing.get_args(hint) for s in ([each] if isinstance(each, str) else _listed(each))]


def base_fields() -> dict[str, Any]:
    return {
        "r": 4,
        "target_modules": ["0", "2"],
        "n_adapters": 4,
        "k_active": 2,
        "aggregation_mode": "buffer_convergence",
        "buffer_capacity": 6,
        "sync_timeout_s": LIMIT_S,
    }


# ---- one rank --------------------------------------------------------------------------------------------------------


def rank_main(case: Case, rank: int, port: int, folder: str) -> None:
    """Train, with the fault if this is the culprit; what happened goes to ``folder/rank<rank>.json``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    torch.set_num_threads(1)
    sys.stderr = open(f"{folder}/rank{rank}.err", "w")
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if not case.store_in_rank_0:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    store = dist.TCPStore("127.0.0.1", port, is_master=case.store_in_rank_0 and rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks, timeout=timedelta(seconds=30))
    run = _Run(case, rank, Path(folder))
    try:
        run.train()
        run.report("ended", params=run.fingerprint())
    except BaseException as error:
        run.report("error", error=error)
        raise


class _Run:
    def __init__(self, case: Case, rank: int, folder: Path):
        self.case, self.rank, self.folder = case, rank, folder
        self.guilty = rank == case.culprit
        self.pool: Any = None
        self.model: Any = None
        self.fault_at: float | None = None

    def report(self, outcome: str, error: BaseException | None = None, params: str = "") -> None:
        found = {"outcome": outcome, "at": time.monotonic(), "params": params, "fault_at": self.fault_at}
        if error is not None:
            found |= {"type": type(error).__name__, "message": str(error), "first": getattr(error, "first", None)}
            if isinstance(error, KeyboardInterrupt) and self.pool is not None:
                self.pool.state_dict(finish=False)  # must go on working
                found["state"] = "saved"
        self.folder.joinpath(f"rank{self.rank}.part").write_text(json.dumps(found))
        self.folder.joinpath(f"rank{self.rank}.part").rename(self.folder / f"rank{self.rank}.json")

    def train(self) -> None:
        from peft import get_peft_model

        import tsugi_kpool

        case, different = self.case, self._difference()
        fields = {**base_fields(), **MODES[case.mode], **different.get("config", {})}
        if case.fault == "disk full":
            fields["diagnostics_dir"] = str(self.folder)
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 32), different.get("base activation", nn.Tanh)(), nn.Linear(32, 4))
        if "base weight" in different:
            with torch.no_grad():
                base[0].weight[0, 0] += 1.0
        base[0].weight.data = base[0].weight.data.to(different.get("base dtype", torch.float32))
        torch.manual_seed(different.get("seed", 0))
        self.model = get_peft_model(base, tsugi_kpool.KPoolLoraConfig(**fields))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if "order of parameters" in different:
            trained.reverse()
        optimizer = different.get("optimizer", torch.optim.AdamW)(
            trained,
            lr=different.get("lr", 1e-3),
            betas=different.get("betas", (0.9, 0.999)),
            weight_decay=different.get("weight_decay", 0.01),
        )
        if case.is_different:
            self.fault_at = time.monotonic()
        self.pool = tsugi_kpool.attach(self.model, optimizer=optimizer, max_grad_norm=different.get("max_grad_norm"))
        try:
            for step in range(case.kind.steps):
                if self._fault_before(step):
                    return
                with self.pool.step():
                    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + self.rank))
                    loss = (self.model(x) - 1).pow(2).mean()
                    if self.guilty and case.fault == "NaN" and step >= FAULT_STEP:
                        loss = loss * float("nan")
                    loss.backward()
                    self._fault_inside(step)
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(0.004)
        finally:
            if case.fault == "raise, close in finally":
                self.pool.close()
        self.pool.close()

    def _difference(self) -> dict[str, Any]:
        if not (self.guilty and self.case.is_different):
            return {}
        what = self.case.difference
        outside = {
            "seed": 1,
            "base weight": True,
            "base dtype": torch.float64,
            "base activation": nn.ReLU,
            "lr": 1e-2,
            "betas": (0.8, 0.999),
            "weight_decay": 0.1,
            "optimizer": torch.optim.Adam,
            "order of parameters": True,
            "max_grad_norm": 1.0,
        }
        if what in outside:
            return {what: outside[what]}
        return {"config": other_settings(self.case.mode)[what]}

    def _fault_before(self, step: int) -> bool:
        """Whether this rank ends here."""
        if step != FAULT_STEP:
            return False
        if self.rank == self.case.stopped and self.case.kind.peer_stops:
            self._mark()
            os.kill(os.getpid(), signal.SIGSTOP)
        if not self.guilty or self.case.kind.peer_stops:
            return False
        self._mark()
        if self.case.fault == "close early":
            self.pool.close()
        return self.case.fault in ("exit early", "close early")

    def _fault_inside(self, step: int) -> None:
        if not self.guilty or step != FAULT_STEP:
            return
        if self.case.fault in ("raise", "raise, close in finally"):
            raise KeyError(f"rank {self.rank}'s user code")
        if self.case.fault == "disk full":  # of this process alone: the kernel refuses to let any file grow
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            written = (self.folder / f"decisions-rank{self.rank}.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(written, 8192), resource.RLIM_INFINITY))

    def _mark(self) -> None:
        self.fault_at = time.monotonic()
        (self.folder / "marked").touch()

    def fingerprint(self) -> str:
        """Of all adapters' parameters, to the bit."""
        digest = hashlib.blake2b(digest_size=8)
        for name, p in sorted(self.model.named_parameters()):
            if "lora_" in name:
                digest.update(p.detach().numpy().tobytes())
        return digest.hexdigest()
