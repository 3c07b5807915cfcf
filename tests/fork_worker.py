"""What a process that has never multiplied a matrix does in tests/test_selftest.py: the self-test, then forks of it."""

from __future__ import annotations

import multiprocessing
import os

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tsugi_kpool import use_backend
from tsugi_kpool.ops import selftest

DEADLINE = 60.0
ROUNDS = 8


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(256, 256)), LoraConfig(r=4, target_modules=["0"]))


def loss_of(model: nn.Module) -> float:
    """In a child, for it is large enough for torch to start its threads, which no fork of this process would have."""
    x = torch.linspace(-1, 1, 512 * 256).reshape(512, 256)
    loss = model(x).square().mean()
    loss.backward()
    return loss.item()


class Losses(Dataset):
    """A dataset that asks a model, as rewards and teachers do."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        return loss_of(self.model)


def _child(pipe, function, model: nn.Module) -> None:
    pipe.send(function(model))


def in_fork(model: nn.Module, function=loss_of) -> float | str:
    """``function(model)`` in a forked child."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, function, model))
    child.start()
    answer = ours.recv() if ours.poll(DEADLINE) else "hangs"
    child.kill()
    child.join()
    return answer


def use_then_fork(pipe) -> None:
    """Sends what happened to this process, and the losses of children forked from it and, in the end, of its own."""
    torch.set_num_threads(2)
    model = make_model()
    result = {"fork before": in_fork(model)}
    count, generator = threads(), torch.get_rng_state()
    report = use_backend(model)
    result["threads left"] = threads() - count
    result["generator"] = torch.equal(generator, torch.get_rng_state())
    result["accelerated"] = len(report.accelerated)
    result["grandchild"] = in_fork(model, in_fork)
    loader = DataLoader(Losses(model), num_workers=1, batch_size=None, timeout=DEADLINE, multiprocessing_context="fork")
    result["loader"] = [float(loss) for loss in loader]
    result["forks"] = []
    while len(result["forks"]) < ROUNDS and "hangs" not in result["forks"]:
        selftest._faults.clear()
        assert selftest.fault("cpu") is None
        result["forks"].append(in_fork(model))
    result["here"] = loss_of(model)
    pipe.send(result)
