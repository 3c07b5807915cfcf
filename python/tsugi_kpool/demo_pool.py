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

from .config import KPoolLoraConfig
from .export import export
from .pool import whole_pool
from .runtime import attach

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

    from .demo import DemoError, share_weights

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


def draw_pool(run: PoolRun, name: str, options: argparse.Namespace) -> None:
    """Above: each step's loss. Below: which adapters were active. Colours are plays."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    palette = ["#1d6fa5", "#e39b4b", "#4b9e6f", "#a8546b", "#7a6bb0", "#8a8f98"]
    colours = {title: palette[i % len(palette)] for i, title in enumerate(run.before)}
    steps = range(1, len(run.losses) + 1)
    style = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(11.5, 6.0), dpi=160, sharex=True, height_ratios=(1.3, 1), layout="constrained"
        )
        above.plot(steps, run.losses, color="#9aa1ab", lw=1, zorder=1)
        for title, colour in colours.items():
            points = [(step, loss) for step, loss, play in zip(steps, run.losses, run.plays) if play == title]
            if points:
                above.scatter(*zip(*points, strict=True), color=colour, s=30, label=title, zorder=2)
        above.set_ylabel("training loss")
        above.legend(frameon=False, ncols=len(colours))
        above.grid(axis="y", color="#e5e7eb")
        for step, active, play in zip(steps, run.active, run.plays):
            below.bar([step] * len(active), 0.86, 0.9, bottom=[i - 0.43 for i in active], color=colours[play])
        below.set_yticks(range(options.pool_adapters))
        below.set_ylim(options.pool_adapters - 0.4, -0.6)
        below.set_ylabel("adapter")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        before, after = run.ends
        figure.suptitle(
            f"{name}: K={options.pool_active} of N={options.pool_adapters} adapters active a step, {options.routing}\n"
            f"held-out loss of the whole pool: {before:.3f} to {after:.3f}",
            x=0.01, ha="left", fontsize=13, weight="bold",
        )  # fmt: skip
        figure.savefig(options.out / "pool.png")
        plt.close(figure)
