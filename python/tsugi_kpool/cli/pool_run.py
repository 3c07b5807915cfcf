"""The demo's second part: a pool of N adapters, K active in a step, over several plays; then exported as ordinary LoRA."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..pool.attach import attach
from ..pool.config import KPoolLoraConfig
from ..pool.export import export
from ..pool.whole import whole_pool
from .common import DemoError
from .workload import share_weights

# Steps on one play before the next: longer than a set of adapters stays, so that every set meets every play.
STEPS_A_PLAY = 3


@dataclass
class PoolRun:
    """What the pool's training measured."""

    losses: list[float]
    plays: list[str]  # of each step
    active: list[tuple[int, ...]]  # of each step
    before: dict[str, float]  # held-out loss of each play
    after: dict[str, float]
    concat_difference: float  # of the logits: the whole pool, and its concat export in PEFT's own layers
    svd_energy: float  # that an export of one adapter's rank keeps

    @property
    def ends(self) -> tuple[float, float]:
        return statistics.fmean(self.before.values()), statistics.fmean(self.after.values())


def split_play(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first nine tenths for training, and one held-out window [1, length] from what follows."""
    cut = len(tokens) * 9 // 10
    if cut <= length or len(tokens) - cut < length:
        raise ValueError(f"a text of {len(tokens)} tokens is too short for the pool's windows of {length} tokens")
    return tokens[:cut], tokens[cut : cut + length][None]


def run_pool(base: nn.Module, plays: dict[str, Tensor], options: argparse.Namespace) -> PoolRun:
    """Trains a pool on the plays in turns and exports it to ``options.out / "exported"``. ``base`` is not changed."""
    from peft import PeftModel, get_peft_model
    from tqdm import tqdm

    config = KPoolLoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets if options.targets == "all-linear" else options.targets.split(","),
        n_adapters=options.pool_adapters,
        k_active=options.pool_active,
        routing_strategy=options.routing,
        routing_seed=options.seed,
        task_type="CAUSAL_LM",
    )
    try:
        parts = {title: split_play(tokens, options.length) for title, tokens in plays.items()}
    except ValueError as error:
        raise DemoError(f"{error}; give more text or a smaller --length.") from error
    torch.manual_seed(options.seed)
    model = get_peft_model(share_weights(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        model.eval()
        with whole_pool(model):
            losses = {title: model(input_ids=row, labels=row).loss.item() for title, (_, row) in parts.items()}
        model.train()
        return losses

    generator = torch.Generator().manual_seed(options.seed)
    run = PoolRun([], [], [], held_out(), {}, 0.0, 0.0)
    titles = list(parts)
    steps = tqdm(
        range(options.pool_steps), desc="pool", unit="step", ncols=110, file=sys.stdout,
        mininterval=0.1 if sys.stdout.isatty() else 15.0,
    )  # fmt: skip
    with attach(model, optimizer=optimizer) as pool:
        for step in steps:
            title = titles[step // STEPS_A_PLAY % len(titles)]
            text = parts[title][0]
            starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator).tolist()
            batch = torch.stack([text[start : start + options.length] for start in starts])
            with pool.step() as active:
                loss = model(input_ids=batch, labels=batch).loss
                pool.record_loss(loss)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(loss.item()):
                raise DemoError(f"the pool's loss is {loss.item()} at step {step + 1}: lower --lr.")
            run.losses.append(loss.item())
            run.plays.append(title)
            run.active.append(active)
            steps.set_postfix_str(f"{title} {loss.item():.4f}, active {active}", refresh=False)
    run.after = held_out()

    folder: Path = options.out / "exported"
    export(model, folder, mode="concat")
    run.svd_energy = export(model, mode="svd").energy
    plain = PeftModel.from_pretrained(share_weights(base), folder).eval()
    row = next(iter(parts.values()))[1]
    model.eval()
    with torch.no_grad(), whole_pool(model):
        difference = plain(input_ids=row).logits - model(input_ids=row).logits
    run.concat_difference = difference.abs().max().item()
    return run


def print_pool(run: PoolRun) -> None:
    width = max(map(len, run.before))
    print(f"{'':{width}}  held-out loss of the whole pool, before -> after")
    for title in run.before:
        print(f"{title:{width}}  {run.before[title]:.4f} -> {run.after[title]:.4f}")
