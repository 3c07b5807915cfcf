"""What holding and firing costs where there is nobody to send to.

The demo's model, K = 2 of N = 4 adapters, one process. Every step fires, so that every gradient goes through the elastic
buffer and back: the most that the machinery can cost. Beside it the plain loop: PEFT's ``set_adapter``, no pool. All
contenders run on this package's backend and take the same steps in turns; their losses must be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch

from tsugi_kpool import KPoolLoraConfig, attach, use_backend
from tsugi_kpool.cli.workload import load, share_weights
from tsugi_kpool.pool.members import member_names

FIRING = {"aggregation_mode": "buffer_convergence", "trigger": "relative", "max_hold_steps": 1, "lr_scaling": "none"}
PLAIN = "plain loop"
# name -> (fields of the pool, whether it is given the optimizer); None for no pool
CONTENDERS = {
    PLAIN: (None, False),
    "pool, synchronous": ({}, False),
    "pool, through the buffer": (FIRING, False),
    "pool, through the buffer, stepped for you": (FIRING, True),
}


class Contender:
    def __init__(self, base: torch.nn.Module, fields: dict | None, hands_over: bool, n: int, k: int, r: int):
        torch.manual_seed(0)
        config = KPoolLoraConfig(
            r=r, n_adapters=n, k_active=k, target_modules="all-linear", task_type="CAUSAL_LM", **(fields or {})
        )
        self.model, self.k = peft.get_peft_model(share_weights(base), config), k
        self.names = member_names("default", n)
        use_backend(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.pool = None
        if fields is not None:
            self.pool = attach(self.model, optimizer=self.optimizer if hands_over else None)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: torch.Tensor) -> None:
        start = time.perf_counter()
        if self.pool is None:
            first = len(self.losses) * self.k
            self.model.base_model.set_adapter([self.names[(first + i) % len(self.names)] for i in range(self.k)])
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
        else:
            with self.pool.step():
                loss = self.model(input_ids=batch, labels=batch).loss
                loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches cost", description=__doc__)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens a step")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the times here")
    options = parser.parse_args(arguments)
    base, texts, _ = load("built-in", ["built-in"], "cpu", "float32")
    tokens = next(iter(texts.values()))
    contenders = {name: Contender(base, *what, n=4, k=2, r=options.r) for name, what in CONTENDERS.items()}
    generator = torch.Generator().manual_seed(0)
    order = list(contenders)
    for step in range(options.steps):
        start = int(torch.randint(len(tokens) - options.length, (1,), generator=generator))
        batch = tokens[start : start + options.length][None]
        for name in order[step % len(order) :] + order[: step % len(order)]:
            contenders[name].step(batch)
        losses = {name: contender.losses[-1] for name, contender in contenders.items()}
        if len(set(losses.values())) != 1:
            raise AssertionError(f"losses differ at step {step}: {losses}")
    plain = contenders[PLAIN].seconds
    print(f"{options.steps} steps of {options.length} tokens, losses of all equal to the bit")
    print("| | s a step | ratio to the plain loop | quartiles |")
    print("| --- | --- | --- | --- |")
    rows = {}
    for name, contender in contenders.items():
        # The first turn of all adapters makes the optimizer's state, and caches.
        ratios = [mine / other for mine, other in zip(contender.seconds[2:], plain[2:])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"seconds": statistics.median(contender.seconds[2:]), "ratio": middle, "quartiles": [low, high]}
        print(f"| {name} | {rows[name]['seconds']:.3f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
        if contender.pool is not None:
            contender.pool.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
