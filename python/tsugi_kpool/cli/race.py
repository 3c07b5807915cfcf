"""One model on two backends, from the same seed: they take turns step by step, so that noise falls on both alike."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.swap import use_backend
from ..pool.config import KPoolLoraConfig
from ..pool.members import member_names
from ..pool.whole import whole_pool as average_of_pool
from .common import DemoError, first_line
from .workload import Data, share_weights

PEFT, TSUGI = "PEFT", "tsugi-kpool"
# How far two fp32 runs may be apart whose sums run in different orders. An error in the mathematics shows at 1e-2 and above.
TOLERANCE = 1e-3
UNTIMED_STEPS = 2


@dataclass
class Curve:
    """What one run measured."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)  # by steps done

    @property
    def step_time(self) -> float:
        return statistics.median(self.seconds[UNTIMED_STEPS:] or self.seconds)

    @property
    def ends(self) -> tuple[float, float]:
        return self.held_out[min(self.held_out)], self.held_out[max(self.held_out)]


@dataclass
class Contender:
    """One backend's model and the adapters that it starts every run from."""

    name: str
    model: Any  # PEFT's
    initial: list[Tensor]
    first_reading: float | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if "lora_" in name]

    def restart(self, options: argparse.Namespace) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.initial, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.lr)
        torch.manual_seed(options.seed)

    def step(self, batch: Tensor, active: list[str]) -> tuple[float, float]:
        """One training step; its loss and how long it took."""
        self.model.train()
        self.model.base_model.set_adapter(active)
        synchronize(batch)
        start = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(batch)
        return loss.item(), time.perf_counter() - start

    @torch.no_grad()
    def held_out_loss(self, data: Data, k: int, n: int) -> float:
        with whole_pool(self.model, k, n):
            losses = [self.model(input_ids=row[None], labels=row[None]).loss.item() for row in data.held_out]
        return statistics.fmean(losses)


def adapter_names(options: argparse.Namespace) -> list[str]:
    return list(member_names("default", options.adapters))


def build(base: nn.Module, options: argparse.Namespace) -> list[Contender]:
    contenders = []
    for name in (PEFT, TSUGI):
        torch.manual_seed(options.seed)
        model = with_adapters(share_weights(base), options)
        contender = Contender(name, model, [])
        contender.initial = [p.detach().clone() for p in contender.parameters]
        contenders.append(contender)
    return contenders


def with_adapters(model: Any, options: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    first, *others = adapter_names(options)
    try:
        model = get_peft_model(model, config, adapter_name=first)
        for name in others:
            model.add_adapter(name, config)
        model.base_model.set_adapter(adapter_names(options)[: options.active])
    except ValueError as error:
        raise DemoError(f"--targets {options.targets}: {first_line(error)}") from error
    return model


@contextlib.contextmanager
def whole_pool(model: nn.Module, k: int, n: int) -> Iterator[None]:
    """The library's own, of a pool that was built by hand, in evaluation mode."""
    model.eval()
    with average_of_pool(model, KPoolLoraConfig(n_adapters=n, k_active=k)):
        yield


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def take_turns(
    contenders: list[Contender], data: Data, options: argparse.Namespace, k: int, steps: int
) -> dict[str, Curve]:
    """Both contenders over the same batches, taking turns; who goes first alternates."""
    from tqdm import tqdm

    names = adapter_names(options)
    curves = {contender.name: Curve() for contender in contenders}
    readings = {0, steps} | ({steps // 4, steps // 2, 3 * steps // 4} if steps >= 24 else set())
    for contender in contenders:
        contender.restart(options)
        # Adapters that start at zero change nothing, whatever K is.
        if contender.first_reading is None:
            contender.first_reading = contender.held_out_loss(data, k, options.adapters)
        curves[contender.name].held_out[0] = contender.first_reading
    pause = 0.1 if sys.stdout.isatty() else 15.0
    bar = tqdm(
        data.batches(steps), total=steps, desc=f"K={k}", unit="step", ncols=110, file=sys.stdout, mininterval=pause
    )
    for step, batch in enumerate(bar):
        active = [names[(step * k + i) % len(names)] for i in range(k)]
        for contender in contenders if step % 2 == 0 else reversed(contenders):
            curve = curves[contender.name]
            loss, seconds = contender.step(batch, active)
            if not math.isfinite(loss):
                bar.close()
                raise DemoError(f"the loss on {contender.name}'s backend is {loss} at step {step + 1}: lower --lr.")
            curve.loss.append(loss)
            curve.seconds.append(seconds)
            if step + 1 in readings:
                curve.held_out[step + 1] = contender.held_out_loss(data, k, options.adapters)
        now = (f"{name} {curve.loss[-1]:.4f} {curve.step_time:.2f} s" for name, curve in curves.items())
        bar.set_postfix_str(", ".join(now), refresh=False)
    return curves


def save_and_reload(base: nn.Module, model: Any, data: Data, options: argparse.Namespace) -> bool:
    """Saves the adapters as PEFT does, loads them into a fresh model, and compares the logits bit for bit."""
    from peft import PeftModel

    folder = options.out / "adapters"
    model.save_pretrained(folder)
    first, *others = adapter_names(options)
    fresh = PeftModel.from_pretrained(share_weights(base), folder / first, adapter_name=first)
    for name in others:
        fresh.load_adapter(folder / name, adapter_name=name)
    use_backend(fresh)
    logits = []
    for each in (model, fresh):
        with whole_pool(each, options.active, options.adapters), torch.no_grad():
            logits.append(each(input_ids=data.held_out[:1]).logits)
    return torch.equal(*logits)


# ---- what came out ---------------------------------------------------------------------------------------------------


def distance(race: dict[str, Curve]) -> float:
    """The largest difference between the two runs, over every training loss and every held-out loss."""
    a, b = race[PEFT], race[TSUGI]
    pairs = [*zip(a.loss, b.loss, strict=True), *zip(a.held_out.values(), b.held_out.values(), strict=True)]
    return max(abs(x - y) for x, y in pairs)


def ratio(race: dict[str, Curve]) -> float:
    """The median ratio over pairs of steps. The two steps of a pair ran one after the other, so the machine's noise falls on both."""
    pairs = list(zip(race[PEFT].seconds, race[TSUGI].seconds, strict=True))
    return statistics.median(peft / tsugi for peft, tsugi in pairs[UNTIMED_STEPS:] or pairs)


def comparable(options: argparse.Namespace) -> bool:
    """Whether the two runs compute the same thing to fp32 rounding."""
    return options.dtype == "float32" and options.dropout == 0.0
