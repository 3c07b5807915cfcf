"""What the commands take: argparse and nothing else, so that ``--help`` and a mistyped option do not wait for torch."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["read_options"]

# The names alone; what they stand for is in workload.py and config.py, which import torch.
DTYPES = ("float32", "bfloat16", "float16")
ROUTING_STRATEGIES = ("round_robin", "random", "loss_aware")


def read_options(arguments: list[str] | None, version: str) -> argparse.Namespace:
    """The options of one command, with its name in ``command``. Exits where they are wrong, or after ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m tsugi_kpool",
        description="LoRA fine-tuning with PyTorch and PEFT, K adapters in one pass.",
    )
    parser.add_argument("--version", action="version", version=f"tsugi-kpool {version}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    add_demo(commands)
    add_doctor(commands)
    add_bench(commands)
    return parser.parse_args(arguments)


def add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="fine-tune a model on PEFT's backend and on this one, and compare",
        description="Fine-tunes a causal language model with LoRA, K of N adapters active in a step, twice from the same "
        "seed: on PEFT's backend and on tsugi-kpool's. Prints held-out loss, seconds a step and their ratio, draws both, "
        "and checks that held-out loss fell, that the two runs agree and that the saved adapters give the same logits "
        "when they are loaded again. Then trains a pool of N adapters on several texts, exports it as ordinary LoRA and checks "
        "that PEFT computes the same from it. Exits with 1 where a check fails.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("what is trained")
    data.add_argument(
        "--model", default="built-in", help="a transformers model: name, folder or .gguf file; built-in: SmolLM2-135M"
    )
    data.add_argument(
        "--text",
        nargs="+",
        default=["built-in"],
        metavar="FILE",
        help="UTF-8 texts; built-in: Hamlet, and three more plays for the pool",
    )
    data.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    data.add_argument("--dtype", choices=DTYPES, default="float32", help="of the frozen weights and the activations")
    data.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the picture, results and adapters")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--r", type=positive, default=8, help="the LoRA rank of each adapter")
    lora.add_argument("--alpha", type=float, default=16.0, help="lora_alpha; an adapter is scaled by alpha / r")
    lora.add_argument("--dropout", type=fraction, default=0.0, help="lora_dropout; the runs differ where it is not 0")
    lora.add_argument("--targets", default="all-linear", help="all-linear, or module names with commas")
    lora.add_argument("--adapters", type=positive, default=4, metavar="N", help="adapters in the model")
    lora.add_argument("--active", type=positive, default=2, metavar="K", help="adapters active in a step, in turns")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=24, help="steps with K active")
    training.add_argument("--also", type=int, nargs="*", default=[1, 4], metavar="K", help="more K, in short runs")
    training.add_argument("--short-steps", type=positive, default=6, help="steps of each short run")
    training.add_argument("--batch", type=positive, default=1, help="sequences a step")
    training.add_argument("--length", type=positive, default=128, help="tokens a sequence")
    training.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    training.add_argument("--seed", type=int, default=0)
    pool = parser.add_argument_group("the pool")
    pool.add_argument("--pool-adapters", type=positive, default=8, metavar="N", help="adapters in the pool")
    pool.add_argument("--pool-active", type=positive, default=2, metavar="K", help="of them active in a step")
    pool.add_argument("--pool-steps", type=positive, default=24, help="steps over the texts in turns")
    pool.add_argument("--routing", choices=ROUTING_STRATEGIES, default="round_robin", help="which K of N")


def add_doctor(commands: argparse._SubParsersAction) -> None:
    commands.add_parser(
        "doctor",
        help="what is on, and why",
        description="Says which versions, processor features and devices were found, and runs a LoRA layer on each device "
        "and dtype to see whether it is accelerated and agrees with PEFT. Exits with 1 where the native library does not "
        "load or a result is wrong.",
    )


def add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="the benchmarks of a checkout",
        description="Runs one of the benchmarks that lie beside the package in a checkout of the repository; without a name, "
        "lists them. What follows the name is the benchmark's own: --help says what it takes.",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="NAME ...", help="which, and its options")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value
