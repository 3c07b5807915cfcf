"""Ranks that differ: refused when the pool is attached, made the same where they may be, found out at the next FIRE."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

from peft_models import TwoLinears
from pool_models import pool_model
from sync_worker import Toy, batch, config, fingerprint, launch, make_optimizer, round_robin
from tsugi_kpool import KPoolLoraConfig, attach, use_backend
from tsugi_kpool.distributed import agree
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.distributed.agree import LOCAL_FIELDS, plain
from tsugi_kpool.distributed.fingerprint import adapter_fingerprint, as_record_field
from tsugi_kpool.distributed.fingerprint import fingerprint as bits_of
from tsugi_kpool.distributed.ranks import SyncError

# ---- fingerprints ----------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_changes_with_each_bit_and_with_its_place_and_with_nothing_else(dtype):
    # Longer than a chunk, and not a whole number of rows or words.
    x = (
        torch.randn(3, 60_001, generator=torch.Generator().manual_seed(0))
        .mul(3)
        .to(torch.uint8 if dtype == torch.bool else dtype)
        .to(dtype)
    )
    want = bits_of(x)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)  # not aligned to a word
    assert bits_of(shifted) == want and bits_of(x.t().contiguous().t()) == want
    raw = x.clone()
    for place in (0, raw.nbytes // 2, raw.nbytes - 1):
        for bit in (1, 128):
            raw.flatten().view(torch.uint8)[place] ^= bit
            assert bits_of(raw) != want and as_record_field(bits_of(raw)) != as_record_field(want)
            raw.flatten().view(torch.uint8)[place] ^= bit
    raw = x.view(torch.uint8) if dtype == torch.float8_e4m3fn else x
    assert bits_of(raw.roll(1, 1)) != want


def test_a_fingerprint_sees_signs_that_flip_in_pairs_and_tensors_that_swap():
    x = torch.randn(1000)
    for changed in (-x, torch.cat((-x[:2], x[2:])), torch.cat((x[:1], -x[1:2], x[2:3], -x[3:4], x[4:]))):
        assert as_record_field(bits_of(changed)) != as_record_field(bits_of(x))
    a, b, half = torch.randn(4, 5), torch.randn(5, 4), torch.randn(7).bfloat16()
    assert adapter_fingerprint([a, b, half]) != adapter_fingerprint([b, a, half])
    assert bits_of(torch.zeros(0)) == 0 != bits_of(torch.tensor(1.0))


# ---- attach ----------------------------------------------------------------------------------------------------------


def other_value(value):
    """Something else of about the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value} or so"


def fields_apart(rank: int) -> dict[str, str]:
    """What each field says that is another on rank 1."""
    said = {}
    for field in dataclasses.fields(KPoolLoraConfig):
        ours = config()
        if rank == 1:
            setattr(ours, field.name, other_value(getattr(ours, field.name)))
        try:
            Aggregator(Toy().adapters(), ours).close()
            said[field.name] = "accepted"
        except ValueError as error:
            said[field.name] = str(error)
    return said


def model_with(**settings) -> nn.Module:
    torch.manual_seed(0)
    return pool_model(base=settings.pop("base", None), **settings)


def adamw(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **settings})


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": params[:5]}, {"params": params[5:]}], lr=1e-3)


def with_state(model: nn.Module) -> torch.optim.Optimizer:
    opt = adamw(model, lr=0.0)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.zero_grad()
    opt.param_groups[0]["lr"] = 1e-3
    return opt


def done(_) -> None:
    """For a change that is no optimizer."""


def normed() -> nn.Module:
    base = TwoLinears()
    base.norm = nn.BatchNorm1d(7)
    base.register_buffer("table", torch.arange(5.0))
    base.register_buffer("cache", torch.arange(5.0), persistent=False)
    return base


def lora_layer(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "scaling"))


def frozen(model: nn.Module) -> nn.Parameter:
    return next(p for p in model.parameters() if not p.requires_grad)


# name -> (what rank 1 does otherwise, part of what all ranks say; None: nothing)
APART = {
    "lr": (lambda m: adamw(m, lr=1e-2), "lr of the optimizer's group 0: rank 0 has 0.001, rank 1 has 0.01"),
    "lr as a tensor": (lambda m: adamw(m, lr=torch.tensor(0.5)), "lr of the optimizer's group 0"),
    "betas": (lambda m: adamw(m, betas=(0.8, 0.99)), "betas of the optimizer's group 0"),
    "decay": (lambda m: adamw(m, weight_decay=0.3), "weight_decay of the optimizer's group 0"),
    "eps": (lambda m: adamw(m, eps=1e-6), "eps of the optimizer's group 0"),
    "amsgrad": (lambda m: adamw(m, amsgrad=True), "amsgrad of the optimizer's group 0"),
    "foreach": (lambda m: adamw(m, foreach=True), None),
    "fused": (lambda m: adamw(m, fused=True), "fused of the optimizer's group 0"),
    "class": (lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3), "optimizer: rank 0"),
    "groups": (two_groups, "parameter groups: rank 0 has 1, rank 1 has 2"),
    "no optimizer": (lambda m: "none", "optimizer: rank 0 has AdamW, rank 1 has none"),
    "state": (with_state, "the optimizer's exp_avg of"),
    "base": (lambda m: done(frozen(m).data.view(-1)[-1].add_(1e-3)), "weight: rank 0 has float32"),
    "base dtype": (lambda m: setattr(frozen(m), "data", frozen(m).data.bfloat16()), "has bfloat16"),
    "unfrozen": (lambda m: done(frozen(m).requires_grad_(True)), "requires grad"),
    "scaling": (lambda m: lora_layer(m).scaling.update({"adapter_1": 9.0}), "scaling['adapter_1'] of base_model.model.first: rank 0 has 1.66"),
    "dropout": (lambda m: setattr(m.base_model.model.first.lora_dropout, "default_1", nn.Dropout(0.5)), "module "),
    "buffer": (lambda m: done(m.base_model.model.table.add_(1.0)), "buffer base_model.model.table"),
    "statistics": (lambda m: done(m.base_model.model.norm.running_mean.add_(1.0)), None),
    "cache": (lambda m: done(m.base_model.model.cache.add_(1.0)), "warned: the ranks differ in buffer"),
    "backend": (lambda m: done(use_backend(m)), None),
    "one adapter": (lambda m: done(next(p for p in m.parameters() if p.requires_grad).data.add_(1.0)), "warned: 1 of 4"),
    "all adapters": (lambda m: done([p.data.mul_(2.0) for p in m.parameters() if p.requires_grad]), "warned: 4 of 4"),
}  # fmt: skip

# Arguments of attach and fields of the config that are others on rank 1.
SETTINGS = {
    "k_active": ({"k_active": 3}, {}, "k_active: rank 0 has 2, rank 1 has 3"),
    "routing_seed": ({"routing_seed": 3}, {}, "routing_seed: rank 0 has 0, rank 1 has 3"),
    "lora_alpha": ({"lora_alpha": 7}, {}, "lora_alpha: rank 0 has 5, rank 1 has 7"),
    "r": ({"r": 5}, {}, "r: rank 0 has 3, rank 1 has 5"),
    "sideband": (
        {"aggregation_mode": "buffer_convergence", "sideband_enabled": True},
        {},
        "sideband_enabled: rank 0 has",
    ),
    "max_grad_norm": ({}, {"max_grad_norm": 1.0}, "max_grad_norm: rank 0 has None, rank 1 has 1.0"),
    "its own error": (
        {"aggregation_mode": "buffer_convergence", "hold_action": "local"},
        {"optimizer": None},
        "hold_action is 'local'",
    ),
}


def attached(rank: int, model: nn.Module, **arguments) -> tuple[str, str]:
    """What was said, and the adapters afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attach(model, **arguments).close(flush=False)
            said = "; ".join(f"warned: {w.message}" for w in caught if "ranks" in str(w.message))
        except (ValueError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
    return said, fingerprint([p for name, p in model.named_parameters() if ".lora_" in name])


def sharded() -> nn.Module:
    """Another part of the frozen base on each rank, as FSDP2 leaves it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_with(n=4, base=normed())
    whole = {p for name, p in model.named_parameters() if ".lora_" in name}
    fully_shard(model.base_model.model, mesh=init_device_mesh("cpu", (2,)), ignored_params=whole)
    assert type(frozen(model).data).__name__ == "DTensor"
    return model


def models_apart(rank: int) -> dict[str, tuple[str, str]]:
    results = {}
    for name, (change, _) in APART.items():
        model = model_with(n=4, base=normed())
        opt = change(model) if rank == 1 else None
        opt = None if opt == "none" else opt if isinstance(opt, torch.optim.Optimizer) else adamw(model)
        results[name] = attached(rank, model, optimizer=opt)
    results["sharded"] = attached(rank, model := sharded(), optimizer=adamw(model))
    for name, (fields, arguments, _) in SETTINGS.items():
        model = model_with(n=4, base=normed(), **(fields if rank == 1 else {}))
        arguments = {"optimizer": adamw(model)} | (arguments if rank == 1 else {})
        results[name] = attached(rank, model, **arguments)
    return results


@pytest.fixture(scope="module")
def apart():
    return launch(2, models_apart, timeout=240)


@pytest.mark.parametrize("name", [*APART, "sharded", *SETTINGS])
def test_what_differs_is_named_with_the_ranks_and_their_values(apart, name):
    (first, ours), (second, theirs) = (rank[name] for rank in apart)
    expected = None if name == "sharded" else (APART.get(name) or SETTINGS[name])[-1]
    if expected is None:
        assert (first, second) == ("", "") and ours == theirs
    elif expected.startswith("warned: "):
        assert expected in first and second == "" and ours == theirs  # said by the lowest rank, whose adapters all have
    else:
        assert expected in first and expected in second
        assert len(first) < 3000


def test_every_field_of_the_config_is_compared_but_for_those_that_are_each_ranks_own():
    for said in launch(2, fields_apart, timeout=240):
        assert set(said) == {field.name for field in dataclasses.fields(KPoolLoraConfig)}
        for name, sentence in said.items():
            if name in LOCAL_FIELDS:
                assert sentence == "accepted", name
            else:
                assert sentence.startswith("the ranks differ in") and f"{name}: rank 0 has" in sentence, (
                    name,
                    sentence,
                )


def quantised(scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.arange(6.0) * scale, scale, 0, torch.qint8)


class Packed:
    """What bitsandbytes hangs on a packed weight."""

    def __init__(self, absmax: float):
        self.absmax, self.code, self.offset, self.state2 = torch.full((2,), absmax), torch.arange(3.0), None, None


def packed(absmax: float) -> torch.Tensor:
    weight = torch.arange(6, dtype=torch.uint8)
    weight.quant_state = Packed(absmax)
    return weight


def test_bits_of_tensors_that_are_not_plain():
    plain_ = torch.arange(6.0)
    assert agree._bits(plain_) == agree._bits(nn.Parameter(plain_)) != agree._bits(plain_ + 1)
    assert agree._bits(plain_.to("meta")) == agree._bits(torch.zeros(3, device="meta")) == "without memory"
    assert "not initialised" in agree._bits(nn.LazyLinear(3).weight)
    assert "not looked into" in agree._bits(plain_.to_sparse())
    assert agree._bits(torch.complex(plain_, -plain_)) == agree._bits(torch.complex(plain_, plain_).conj())
    assert agree._bits(torch._neg_view(plain_)) == agree._bits(-plain_)
    assert agree._bits(plain_.expand(4, 6)) == agree._bits(plain_.repeat(4, 1))
    assert agree._bits(packed(1.0)) == agree._bits(packed(1.0)) != agree._bits(packed(2.0))
    assert torch.equal(quantised(0.5).int_repr(), quantised(0.25).int_repr())
    assert agree._bits(quantised(0.5)) == agree._bits(quantised(0.5)) != agree._bits(quantised(0.25))


def test_values_are_compared_by_what_they_mean():
    assert plain({"b", "a"}) == plain({"a", "b"}) and plain({1: 2, "a": None}) == plain({"a": None, 1: 2})
    assert plain(torch.tensor(0.5)) == plain(0.5) and plain((1, 2)) == plain([1, 2])
    assert plain(copy.deepcopy) != plain(copy.copy) and plain(1) != plain(True)


# ---- afterwards ------------------------------------------------------------------------------------------------------


class Driven:
    """A Toy that trains, one step a call."""

    def __init__(self, fields: dict, attached: bool = True, lr: float = 1e-2):
        self.model = Toy()
        self.opt = make_optimizer(self.model.trained(), lr=lr)
        self.attached = attached
        self.aggregator = Aggregator(
            self.model.adapters(),
            config(**fields),
            optimizer=make_optimizer(self.model.trained()) if attached else None,
        )

    def step(self, rank: int, step: int, active=None, **keywords) -> list:
        active = round_robin(step) if active is None else active
        self.model.active = list(active)
        self.aggregator.before_step(step, active)
        x, y = batch(0, rank, step)
        (self.model(x) - y).square().mean().backward()
        decisions = self.aggregator.after_backward(step, active, **keywords)
        if not self.attached:
            self.opt.step()
            self.opt.zero_grad()
        return decisions


PLANNED = {"trigger": "relative", "lr_scaling": "none", "buffer_capacity": 3}
STEPWISE = {"lr_scaling": "none", "buffer_capacity": 3}


def edited(run: Driven, rank: int, step: int) -> None:
    if rank == 1 and step == 4:
        run.model.adapters()[2][1].data[0, 0] += 1e-6


def more_active(run: Driven, rank: int, step: int):
    return (0, 1, 2) if rank == 1 and step == 4 else None


# name -> (fields, handed over, what rank 1 does otherwise, part of what all say)
DRIFT = {
    "synchronous": ({"aggregation_mode": "synchronous"}, True, edited, "adapter 2 is not the same on all ranks"),
    "planned": (PLANNED, True, edited, "adapter 2 is not the same on all ranks"),
    "stepwise": (STEPWISE, True, edited, "adapter 2 is not the same on all ranks"),
    "yours to step": (PLANNED, False, edited, "adapter 2 is not the same on all ranks"),
    "your own rate": (PLANNED, False, "rate", "is not the same on all ranks"),
    "more active, stepwise": (STEPWISE, True, more_active, "the ranks "),
    "more active, planned": (PLANNED, True, more_active, "the ranks "),
    "more active": ({"aggregation_mode": "synchronous"}, True, more_active, "the ranks "),
}


def drifting(rank: int) -> dict[str, tuple[int, str, bool]]:
    results = {}
    for name, (fields, attached_, change, _) in DRIFT.items():
        run = Driven({**fields, "sync_timeout_s": 60.0}, attached_, lr=1e-3 if change == "rate" and rank == 1 else 1e-2)
        results[name] = (-1, "no error", False)
        for step in range(24):
            try:
                active = None if change == "rate" else change(run, rank, step)
                run.step(rank, step, active)
            except SyncError as error:
                held = [a.stats[0].item() for a in run.aggregator._adapters]
                results[name] = (step, str(error), held == run.aggregator.held)
                break
        run.aggregator.close()
    return results


@pytest.fixture(scope="module")
def drift():
    return launch(3, drifting, timeout=240)


@pytest.mark.parametrize("name", DRIFT)
def test_ranks_that_drift_apart_stop_at_the_next_fire(drift, name):
    ranks = [rank[name] for rank in drift]
    for step, said, _ in ranks:
        assert DRIFT[name][3] in said and 4 - 3 * (name == "your own rate") <= step < 12
    if "is not the same" in ranks[0][1]:
        assert len({(step, said) for step, said, _ in ranks}) == 1
        assert "rank 1 has other parameters than the other 2" in ranks[0][1]
    assert all(whole for _, _, whole in ranks)  # what was to be sent is held still
