"""A small mixture of experts with LoRA on all that is linear: PEFT, ours, and the same model with its experts frozen.

The model is transformers' Qwen3-MoE. Ours must agree with PEFT in the output and in every gradient before it is timed.
``frozen`` has adapters on its attention alone, so what it takes is what any LoRA on the experts is added to. Memory is the
peak of what torch allocates in a step; one token is a forward pass without gradients, as decoding takes it.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benches.measure import in_turns, median_ms, print_machine, ratio, write
from tsugi_kpool import use_backend

#: Largest relative difference to PEFT, of the output and of each gradient.
LIMIT = 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def build(targets: list[str] | str, adapters: int, r: int, implementation: str, o: argparse.Namespace) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=o.hidden, num_attention_heads=8, num_key_value_heads=4, head_dim=o.hidden // 8)
    experts = dict(num_experts=o.experts, num_experts_per_tok=o.top_k, moe_intermediate_size=o.inner)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=o.layers, vocab_size=1000))
    model.set_experts_implementation(implementation)
    for k in range(adapters):
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=False)
        if k == 0:
            model = get_peft_model(model, config, adapter_name="a0")
        else:
            model.add_adapter(f"a{k}", config)
    model.base_model.set_adapter([f"a{k}" for k in range(adapters)])
    return model


class Model:
    """One contender."""

    def __init__(self, model: nn.Module, tokens: int):
        self.model = model
        self.ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    @torch.no_grad()
    def one_token(self) -> None:
        self.model(input_ids=self.ids[:, :1], use_cache=False)

    def answer(self) -> dict[str, torch.Tensor]:
        self.step()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            return found | {"output": self.model(input_ids=self.ids, use_cache=False).logits}

    def peak(self) -> int:
        """Bytes that torch has allocated at most in a step, beside what was there before."""
        self.step()
        self.model.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most


def check(ours: Model, peft: Model) -> None:
    answer, wanted = ours.answer(), peft.answer()
    assert answer.keys() == wanted.keys()
    for name, value in answer.items():
        error = float((value - wanted[name]).norm() / wanted[name].norm())
        if not error <= LIMIT:
            raise AssertionError(f"{name} is off by {error:.1e}, more than {LIMIT:.0e}")


def cell(implementation: str, adapters: int, o: argparse.Namespace) -> dict:
    models = {
        "frozen": Model(build(ATTENTION, adapters, o.r, implementation, o), o.tokens),
        "peft": Model(build("all-linear", adapters, o.r, implementation, o), o.tokens),
        "ours": Model(build("all-linear", adapters, o.r, implementation, o), o.tokens),
    }
    use_backend(models["frozen"].model, "tsugi")
    report = use_backend(models["ours"].model, "tsugi")
    check(models["ours"], models["peft"])
    assert report.fast_calls and not report.fallback_calls
    steps = in_turns({name: m.step for name, m in models.items()}, o.seconds)
    tokens = in_turns({name: m.one_token for name, m in models.items()}, o.seconds)
    peaks = {name: m.peak() for name, m in models.items()}
    return {
        "implementation": implementation,
        "K": adapters,
        "turns": len(steps["ours"]),
        **{f"{name}_step_ms": median_ms(times) for name, times in steps.items()},
        **{f"{name}_token_ms": median_ms(times) for name, times in tokens.items()},
        **{f"{name}_peak_mb": bytes_ / 1e6 for name, bytes_ in peaks.items()},
        "step_peft_over_ours": ratio(steps["peft"], steps["ours"]),
        "token_peft_over_ours": ratio(tokens["peft"], tokens["ours"]),
        "step_ours_over_frozen": ratio(steps["ours"], steps["frozen"]),
        "peak_ours_over_frozen": peaks["ours"] / peaks["frozen"],
    }


def show(row: dict) -> None:
    print(f"{row['implementation']}, K = {row['K']}:")
    for what, unit in (("step", "ms"), ("token", "ms"), ("peak", "mb")):
        values = "  ".join(f"{name} {row[f'{name}_{what}_{unit}']:.1f}" for name in ("frozen", "peft", "ours"))
        print(f"  {what:>5} {unit}: {values}")
    print(
        f"  peft / ours: step {row['step_peft_over_ours']:.2f}, one token {row['token_peft_over_ours']:.1f}; ours / frozen: "
        f"step {row['step_ours_over_frozen']:.2f}, peak {row['peak_ours_over_frozen']:.2f}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches moe", description=__doc__)
    parser.add_argument(
        "--cells", nargs="+", default=["grouped_mm:1", "grouped_mm:2", "eager:1"], help="experts:K each"
    )
    sizes = dict(layers=2, hidden=512, experts=16, inner=512, top_k=4, tokens=256, r=8)
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"(default: {value})")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the turns of one number")
    parser.add_argument("--json", type=Path, help="write the rows here")
    o = parser.parse_args(arguments)
    print_machine()
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about patterns of ranks that name parameters
        for one in o.cells:
            implementation, _, adapters = one.partition(":")
            rows.append(cell(implementation, int(adapters), o))
            show(rows[-1])
    write(o.json, {"sizes": {name: getattr(o, name) for name in sizes}, "moe": rows})
