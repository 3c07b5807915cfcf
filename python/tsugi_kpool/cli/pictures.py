"""The demo's pictures, drawn with matplotlib."""

from __future__ import annotations

import argparse
from typing import Any

from .._version import __version__
from .pool_run import PoolRun
from .race import PEFT, TOLERANCE, TSUGI, UNTIMED_STEPS, Curve, comparable, distance, ratio

__all__ = ["draw", "draw_pool"]


def draw(races: dict[int, dict[str, Curve]], results: dict, options: argparse.Namespace) -> None:
    """Left: both loss curves, and how far apart they are. Right: every step's time, its median and the ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    ink, soft, grid = "#22262e", "#6b7280", "#e5e7eb"
    colours = {PEFT: "#e39b4b", TSUGI: "#1d6fa5"}
    style = {
        "font.size": 10.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": soft,
        "xtick.color": soft,
        "ytick.color": soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": grid,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11.5,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11.5, 6.0), dpi=160)
        spec = figure.add_gridspec(
            2, 2, width_ratios=(1.45, 1), height_ratios=(3.2, 1), left=0.07, right=0.975, top=0.80, bottom=0.13,
            wspace=0.2, hspace=0.12,
        )  # fmt: skip
        curve_axes = figure.add_subplot(spec[0, 0])
        gap_axes = figure.add_subplot(spec[1, 0], sharex=curve_axes)
        time_axes = figure.add_subplot(spec[:, 1])

        main = races[options.active]
        steps = range(1, options.steps + 1)
        for name, width, alpha in ((PEFT, 4.5, 0.55), (TSUGI, 1.2, 1.0)):
            curve = main[name]
            curve_axes.plot(steps, curve.loss, color=colours[name], lw=width, alpha=alpha, label=f"{name}, training")
        for name, size in ((PEFT, 11), (TSUGI, 5.5)):
            curve = main[name]
            curve_axes.plot(
                *zip(*curve.held_out.items(), strict=True),
                color=colours[name], ls=(0, (4, 2)), lw=1, marker="o", ms=size, mec="white", label=f"{name}, held out",
            )  # fmt: skip
        curve_axes.set_ylabel("loss")
        curve_axes.set_title(f"Loss, K={options.active} of N={options.adapters} active: two runs, one curve")
        if distance(main) > TOLERANCE:
            curve_axes.set_title(f"Loss, K={options.active} of N={options.adapters} active")
        curve_axes.legend(
            frameon=False, ncols=4, loc="upper left", fontsize=8.5, columnspacing=1.0, handlelength=1.7, handletextpad=0.5
        )  # fmt: skip
        bottom, top = curve_axes.get_ylim()
        curve_axes.set_ylim(bottom, top + 0.12 * (top - bottom))
        curve_axes.tick_params(labelbottom=False)

        gaps = [abs(a - b) for a, b in zip(main[PEFT].loss, main[TSUGI].loss, strict=True)]
        floor = 1e-8
        gap_axes.bar(steps, [max(gap, floor) for gap in gaps], bottom=0, width=0.75, color=colours[TSUGI], alpha=0.75)
        gap_axes.set_yscale("log")
        gap_axes.set_ylim(floor, max(3 * max(gaps), 5 * TOLERANCE))
        if comparable(options):
            gap_axes.axhline(TOLERANCE, color=ink, lw=0.9, ls=(0, (2, 2)))
            gap_axes.annotate(
                f"allowed: {TOLERANCE:g}", (1, TOLERANCE), (0, -3), textcoords="offset points", fontsize=8.5,
                ha="right", va="top", xycoords=("axes fraction", "data"),
            )  # fmt: skip
        gap_axes.set_ylabel("difference")
        gap_axes.set_xlabel("step")
        gap_axes.xaxis.set_major_locator(MaxNLocator(integer=True))

        above = draw_times(time_axes, races, colours, ink)

        model, text, lora = results["model"], results["text"], f"r={options.r}, {options.targets}"
        gains = ", ".join(f"{ratio(race):.2f}x" for race in races.values())
        title = f"{model} on {text}: {gains} PEFT's speed at K = {', '.join(map(str, races))}"
        figure.text(0.07, 0.945, title, fontsize=15, weight="bold")
        figure.text(
            0.07, 0.90,
            f"LoRA {lora}, {options.batch} x {options.length} tokens a step, {options.dtype}, dropout {options.dropout:g}; "
            f"PEFT's backend against tsugi-kpool {__version__}, steps taken in turns",
            fontsize=10, color=soft,
        )  # fmt: skip
        figure.text(0.07, 0.028, results["machine"], fontsize=8.5, color=soft)
        if above:
            note = f"{above} step{'s' if above > 1 else ''} above the axis not shown"
            figure.text(0.975, 0.028, note, fontsize=8.5, color=soft, ha="right")
        figure.savefig(options.out / "demo.png")
        plt.close(figure)


def draw_times(axes: Any, races: dict[int, dict[str, Curve]], colours: dict[str, str], ink: str) -> int:
    """Returns how many steps took longer than the axis shows."""
    width = 0.36
    top = 1.5 * max(curve.step_time for race in races.values() for curve in race.values())
    above = 0
    for group, race in enumerate(races.values()):
        for side, (name, curve) in zip((-1, 1), race.items(), strict=True):
            x = group + side * (width / 2 + 0.015)
            axes.bar(x, curve.step_time, width, color=colours[name], alpha=0.8, label=name if group == 0 else None)
            timed = curve.seconds[UNTIMED_STEPS:] or curve.seconds
            spread = [x + width * 0.6 * ((i * 0.618) % 1 - 0.5) for i in range(len(timed))]
            axes.scatter(spread, timed, s=7, color=ink, alpha=0.35, lw=0, zorder=3)
            axes.text(x, 0.02 * top, f"{curve.step_time:.2f}", ha="center", color="white", weight="bold", fontsize=9.5)
            above += sum(seconds > top for seconds in timed)
        axes.text(group, 0.93 * top, f"{ratio(race):.2f}x", ha="center", weight="bold", fontsize=13)
    axes.set_ylim(0, top)
    axes.set_xticks(range(len(races)), [f"K={k}\n{len(race[PEFT].loss)} steps" for k, race in races.items()])
    axes.tick_params(axis="x", length=0, labelcolor=ink)
    axes.grid(axis="x", visible=False)
    axes.set_title("Seconds a step: median (bar), each step (dots)")
    axes.legend(
        frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.085), fontsize=9, handlelength=1.2, columnspacing=1.2
    )  # fmt: skip
    return above


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
