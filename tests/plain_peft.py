"""A process with stock PEFT that cannot import this package: it loads what tests export, and answers with outputs.

It is started once for many tests. A request is a line with the name of a file that ``torch.save`` wrote: ``base``, the base
model; ``folder``, the adapter's; ``inputs``; and ``answer``, where the output goes. The reply is a line, empty or an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent


class PlainPeft:
    """The process, from the side of the tests."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def output(self, base: torch.nn.Module, adapter: Path, inputs: torch.Tensor) -> torch.Tensor:
        """What ``PeftModel.from_pretrained(base, adapter)(inputs)`` gives there."""
        self.count += 1
        request, answer = (self.folder / f"{self.count}.{end}" for end in ("request", "answer"))
        torch.save({"base": base, "folder": str(adapter), "inputs": inputs, "answer": str(answer)}, request)
        print(request, file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        assert reply == "\n", f"stock PEFT failed: {reply or 'the process ended'}"
        return torch.load(answer)

    def close(self) -> None:
        self.process.kill()  # it has nothing to finish
        self.process.communicate()


def main() -> None:
    sys.modules["tsugi_kpool"] = None  # importing it is an error from here on, wherever it may be installed
    sys.path.insert(0, str(HERE))  # plain_models
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from peft import PeftModel

    for line in sys.stdin:
        try:
            request = torch.load(line.strip(), weights_only=False)
            model = PeftModel.from_pretrained(request["base"], request["folder"]).eval()
            with torch.no_grad():
                output = model(request["inputs"])
            torch.save(getattr(output, "logits", getattr(output, "last_hidden_state", output)), request["answer"])
            print(flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
