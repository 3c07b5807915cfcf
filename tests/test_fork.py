"""The operations in the child of a fork, which has none of the threads that torch started in the parent."""

from __future__ import annotations

import os
import subprocess
import sys

PROBE = """
import multiprocessing as mp, os, sys
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tsugi_kpool import ops, use_backend

torch.set_num_threads(4)
torch.manual_seed(0)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Made here: filling so much memory takes threads of torch's own, which are torch's matter in a child.
ends = torch.tensor([100, 300])
S, stats = [torch.zeros(300, 400)], torch.zeros(8, dtype=torch.float64)
inputs = {d: [torch.randn(*s).to(d) for s in ((300, 512), (400, 512), (8, 512), (400, 8), (300, 400), (300, 400), (400, 300))] for d in DTYPES}

def outcome():
    # Every operation on tensors large enough for several threads. Torch's own operations are kept below that size.
    results = []
    for dtype, (x, weight, A, B, grad, y, transposed) in inputs.items():
        h = ops.lora_shrink(x, [A])
        results += [h, ops.lora_linear(x, weight, None, [A], [B], [2.0]), ops.lora_delta(grad, x, [A], [B], [2.0])]
        of_experts = [[t.expand(2, *t.shape)] for t in (A, B)]
        results += [ops.lora_experts(grad, x, ends, *of_experts, [2.0])]
        ops.sideband_drain_(S, stats, [y], 1.0)
        ops.lora_expand_(y, h, [B], [0.5])
        results.append(y[:20].clone())
        dx, dA, dB = ops.lora_backward(grad, x, h, weight, [A], [B], [2.0])
        results += [dx, *dA, *dB, ops.buffer_variance(weight, 400)]
        ops.sideband_accumulate_(S, stats, [grad], 2.0)
        results += [S[0][:20].clone(), ops.sideband_stats(S, stats)]
        # Layouts that are copied on the way, and back.
        ops.sideband_drain_(S, stats, [transposed.t()], 0.5)
        results += [transposed[:20].clone()]
        ops.sideband_accumulate_(S, stats, [transposed.t()], 1.0, True)
        results += [S[0][:20].clone(), transposed[:20].clone()]
        ops.sideband_drain_(S, stats, [y], 0.5)
    return [r[:20].tolist() if r.dim() else r.item() for r in results]

def train():
    out = model(inputs[torch.float32][0])
    out.backward(torch.ones_like(out[:1]).expand_as(out))
    return [p.grad[:2].tolist() for p in model.parameters() if p.grad is not None]

model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(512, 512)), LoraConfig(r=8, target_modules=["0"]))
torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
use_backend(model, "tsugi")
wanted, trained = outcome(), train()
for p in model.parameters():
    p.grad = None

def close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        # The variance of one snapshot is infinite.
        g, w = (torch.tensor(v, dtype=torch.float64).nan_to_num(posinf=0.0) for v in (g, w))
        assert (g - w).norm() <= 1e-2 * w.norm(), (g, w)

def check():
    close(outcome(), wanted)
    close(train(), trained)

pid = os.fork()
if pid == 0:
    try:
        check()
    except BaseException as error:
        print(repr(error)[:2000], flush=True)
        os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print("os.fork", flush=True)

child = mp.get_context("fork").Process(target=check)
child.start()
child.join()
assert child.exitcode == 0
print("multiprocessing", flush=True)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        check()
        return 1

assert [batch.item() for batch in DataLoader(Data(), num_workers=1, multiprocessing_context="fork")] == [1]
print("DataLoader", flush=True)
close(outcome(), wanted)
print("parent", flush=True)
"""


def test_children_of_a_fork_compute_the_same_and_end():
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["os.fork", "multiprocessing", "DataLoader", "parent"]
