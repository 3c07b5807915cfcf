"""The demo's second half: a pool of adapters over several texts, each a domain of its own.

The texts take turns, so that with round-robin routing each set of K adapters meets the same few of them. What was learnt
is then exported as one ordinary LoRA adapter, loaded by PEFT alone, and compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import KPoolLoraConfig
from .export import ExportReport, export
from .runtime import attach

#: Largest difference of a logit, in units of the largest, between the pool and what was exported: fp32 sums in another order.
TOLERANCE = 1e-4
HELD_OUT_WINDOWS = 2


def add_arguments(parser: argparse.ArgumentParser, positive) -> None:
    pool = parser.add_argument_group("the pool")
    pool.add_argument(
        "--pool-steps", type=int, default=32, help="steps of the pool over several texts; 0 leaves it out"
    )
    pool.add_argument("--pool-adapters", type=positive, default=8, metavar="N", help="adapters in the pool")
    pool.add_argument("--pool-active", type=positive, default=2, metavar="K", help="adapters active in a step")
    pool.add_argument(
        "--pool-routing",
        choices=("round_robin", "random", "loss_aware"),
        default="round_robin",
        help="who is active when",
    )


@dataclass
class PoolRun:
    """What the pool did."""

    domains: list[str]
    active: list[tuple[int, ...]] = field(default_factory=list)
    domain: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    exported: ExportReport | None = None
    difference: float = float("nan")


def train(
    model: nn.Module, domains: dict[str, Tensor], options: argparse.Namespace, evaluate
) -> tuple[PoolRun, nn.Module]:
    """Trains a pool on ``model`` and exports it. ``evaluate(model, K, N, rows)`` is a mean loss with the whole pool."""
    from peft import get_peft_model
    from tqdm import tqdm

    n, k = options.pool_adapters, options.pool_active
    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    config = KPoolLoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        n_adapters=n,
        k_active=k,
        routing_strategy=options.pool_routing,
        routing_seed=options.seed,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    training, held_out = _split(domains, options)
    run = PoolRun(list(domains))
    generator = torch.Generator().manual_seed(options.seed)
    names = list(domains)
    with attach(model) as pool:
        run.before = {name: evaluate(model, k, n, rows) for name, rows in held_out.items()}
        model.train()
        pause = 0.1 if sys.stdout.isatty() else 15.0
        bar = tqdm(range(options.pool_steps), desc="pool", unit="step", ncols=110, file=sys.stdout, mininterval=pause)
        for step in bar:
            which = step % len(names)
            tokens = training[names[which]]
            starts = torch.randint(len(tokens) - options.length, (options.batch,), generator=generator).tolist()
            batch = torch.stack([tokens[start : start + options.length] for start in starts])
            begin = time.perf_counter()
            with pool.step() as active:
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                pool.record_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.seconds.append(time.perf_counter() - begin)
            run.active.append(active)
            run.domain.append(which)
            run.loss.append(loss.item())
            bar.set_postfix_str(
                f"{names[which]}: adapters {', '.join(map(str, active))}, loss {run.loss[-1]:.3f}", refresh=False
            )
        run.after = {name: evaluate(model, k, n, rows) for name, rows in held_out.items()}
    run.exported = export(model, options.out / "exported")
    return run, model


def _split(domains: dict[str, Tensor], options: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first nine tenths of each text for training; windows of the last tenth held out."""
    training, held_out = {}, {}
    for name, tokens in domains.items():
        split = len(tokens) * 9 // 10
        rest = tokens[split:]
        starts = torch.linspace(0, len(rest) - options.length, HELD_OUT_WINDOWS).long().tolist()
        training[name] = tokens[:split]
        held_out[name] = torch.stack([rest[start : start + options.length] for start in starts])
    return training, held_out


def compare(run: PoolRun, pooled_logits: Tensor, base: nn.Module, rows: Tensor) -> None:
    """Loads the export with PEFT's own code into ``base`` and notes how far its logits are from the pool's."""
    from peft import LoraConfig, PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(base, run.exported.folders[0]).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        logits = plain(input_ids=rows).logits
    run.difference = ((logits - pooled_logits).abs().max() / pooled_logits.abs().max()).item()


def print_run(run: PoolRun, options: argparse.Namespace) -> None:
    print(f"\n{'':24}{'steps':>6}  {'held-out loss, before -> after':>32}  adapters that trained on it")
    for index, name in enumerate(run.domains):
        steps = [active for active, which in zip(run.active, run.domain) if which == index]
        used = sorted({adapter for active in steps for adapter in active})
        loss = f"{run.before[name]:.4f} -> {run.after[name]:.4f}"
        print(f"{name:<24}{len(steps):>6}  {loss:>32}  {', '.join(map(str, used))}")
    print(f"{run.exported}; {statistics.median(run.seconds):.3f} s a step")


def verdicts(run: PoolRun, options: argparse.Namespace) -> list[str]:
    failures = []
    before, after = statistics.fmean(run.before.values()), statistics.fmean(run.after.values())
    if after < before:
        print(f"[ok] the pool learnt: held-out loss over all texts {before:.4f} -> {after:.4f}")
    else:
        failures.append(f"the pool's held-out loss did not fall: {before:.4f} to {after:.4f}.")
    limit = TOLERANCE if options.dtype == "float32" else 0.05
    if run.difference <= limit:
        print(
            f"[ok] PEFT alone loads the exported pool: its logits differ by {run.difference:.1e} (allowed: {limit:g})"
        )
    else:
        failures.append(f"the exported pool's logits differ by {run.difference:.1e}, more than {limit:g}.")
    return failures


def summary(run: PoolRun) -> dict:
    """What results.json holds of it."""
    return {
        "domains": run.domains,
        "active": [list(active) for active in run.active],
        "domain": run.domain,
        "loss": run.loss,
        "seconds": run.seconds,
        "held_out_before": run.before,
        "held_out_after": run.after,
        "export_difference": run.difference,
    }


def draw(run: PoolRun, title: str, note: str, options: argparse.Namespace, path: Path) -> None:
    """Above: the loss of each step, coloured by text. Below: which adapters were active in it, in the same colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    ink, soft, grid = "#22262e", "#6b7280", "#e5e7eb"
    colours = plt.get_cmap("tab10").colors
    steps = range(1, len(run.loss) + 1)
    n = options.pool_adapters
    style = {
        "font.size": 10.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": soft,
        "axes.axisbelow": True,
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": grid, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(11.5, 6.4), dpi=160, sharex=True, gridspec_kw={"height_ratios": (1.3, 1), "hspace": 0.14}
        )
        figure.subplots_adjust(left=0.08, right=0.975, top=0.86, bottom=0.12)
        for index, name in enumerate(run.domains):
            at = [step for step, which in zip(steps, run.domain) if which == index]
            colour = colours[index % len(colours)]
            held = f"held out {run.before[name]:.2f} to {run.after[name]:.2f}"
            above.plot(
                at,
                [run.loss[step - 1] for step in at],
                color=colour,
                marker="o",
                ms=5,
                lw=1.2,
                label=f"{name} ({held})",
            )
            for step in at:
                below.bar(
                    [step] * options.pool_active, 0.84, 0.84, [a - 0.42 for a in run.active[step - 1]], color=colour
                )
        above.set_ylabel("training loss")
        above.grid(axis="y")
        above.legend(frameon=False, ncols=2, fontsize=9, loc="upper right")
        bottom, top = above.get_ylim()
        above.set_ylim(bottom, top + 0.25 * (top - bottom))
        below.set_ylabel("adapter")
        below.set_yticks(range(n)) if n <= 16 else None
        below.set_ylim(n - 0.5, -0.5)
        below.set_xlim(0.3, len(run.loss) + 0.7)
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set_title("Active adapters, in the colour of the text they trained on", fontsize=10.5)
        figure.text(0.08, 0.935, title, fontsize=15, weight="bold")
        figure.text(0.08, 0.028, note, fontsize=8.5, color=soft)
        figure.savefig(path)
        plt.close(figure)
