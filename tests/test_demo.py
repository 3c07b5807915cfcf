"""The demo and the doctor, on a small model built from a configuration."""

from __future__ import annotations

import argparse
import contextlib
import json

import pytest
import torch

from tsugi_kpool import ops, use_backend
from tsugi_kpool.__main__ import main
from tsugi_kpool.cli import demo, doctor, race, workload
from tsugi_kpool.ops import selftest


def small_load(model_name, texts, device, dtype):
    """A random Llama, and a text with something to learn: each token follows from the one before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).to(workload.DTYPES[dtype])
    tokens = (torch.arange(1200) * 7) % 64
    return model, {"sevens": tokens, "elevens": (torch.arange(1200) * 11) % 64}, ("small", "sevens")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", small_load)

    def run(*arguments):
        sizes = ["--steps", "6", "--short-steps", "3", "--length", "16", "--lr", "1e-2", "--out", str(tmp_path / "out")]
        sizes += ["--pool-steps", "12"]
        status = main(["demo", *sizes, *arguments])
        return status, capsys.readouterr(), tmp_path / "out"

    return run


def test_both_backends_train_alike_and_everything_is_written(run):
    status, printed, out = run()
    assert status == 0, printed.err
    assert printed.out.count("[ok]") == 5
    assert "tsugi_kpool.use_backend(model)" in printed.out
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"K=1", "K=2", "K=4"}
    assert results["layers_accelerated"] == results["layers"] == 14
    assert results["calls_by_peft"] == {} and results["calls_by_tsugi"] > 14 * 12
    for runs in results["runs"].values():
        assert runs["largest_difference"] <= demo.TOLERANCE
        for name in (demo.PEFT, demo.TSUGI):
            assert len(runs[name]["loss"]) == len(runs[name]["seconds"])
    assert len({tuple(runs[demo.PEFT]["loss"]) for runs in results["runs"].values()}) == 3, "K changed nothing"
    for picture in ("demo.png", "pool.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    pool = results["pool"]
    assert pool["active"][:5] == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]] and len(pool["losses"]) == 12
    assert set(pool["plays"]) == {"sevens", "elevens"} and 0 < pool["svd_energy"] <= 1
    assert json.loads((out / "exported" / "adapter_config.json").read_text())["r"] == 64
    assert sorted(path.name for path in (out / "adapters").glob("adapter_*")) == [f"adapter_{i}" for i in range(4)]


@pytest.mark.parametrize("arguments", [["--dtype", "bfloat16"], ["--dropout", "0.1"]], ids=["bfloat16", "dropout"])
def test_runs_that_may_differ_are_not_held_against_each_other(run, arguments):
    status, printed, _ = run(*arguments)
    assert status == 0, printed.err
    assert "not checked, since" in printed.out


def test_a_held_out_loss_that_does_not_fall_is_a_failure(run):
    status, printed, _ = run("--lr", "0")
    assert status == 1
    assert "held-out loss did not fall on PEFT's backend at K=2" in printed.err


def test_runs_that_differ_are_a_failure(run, monkeypatch):
    original = race.Contender.step

    def disturbed(self, batch, active):
        if self.name == demo.TSUGI:
            batch = batch.flip(-1)
        return original(self, batch, active)

    monkeypatch.setattr(race.Contender, "step", disturbed)
    status, printed, _ = run()
    assert status == 1
    assert "the two runs differ by" in printed.err


def test_adapters_that_come_back_changed_are_a_failure(run, monkeypatch):
    from peft import PeftModel

    original = PeftModel.load_adapter

    def forgetful(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if "lora_B.adapter_3" in name:
                parameter.data.mul_(1.01)
        return result

    monkeypatch.setattr(PeftModel, "load_adapter", forgetful)
    status, printed, _ = run()
    assert status == 1
    assert "give other logits" in printed.err


def test_an_export_that_is_not_the_pool_is_a_failure(run, monkeypatch):
    from tsugi_kpool.cli import pool_run

    original = pool_run.export

    def wrong(model, folder=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.adapter_3" in name and folder is not None:
                    parameter.add_(0.1)
        result = original(model, folder, **kwargs)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.adapter_3" in name and folder is not None:
                    parameter.sub_(0.1)
        return result

    monkeypatch.setattr(pool_run, "export", wrong)
    status, printed, _ = run()
    assert status == 1
    assert "PEFT's logits of the exported pool differ by" in printed.err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--active", "5"], "K=5 adapters cannot be active in a model with N=4"),
        (["--pool-active", "9"], "K=9 adapters cannot be active in a pool of N=8"),
        (["--length", "500"], "too few for --length 500"),
        (["--targets", "nothing"], "--targets nothing"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "meta"], "--device meta with --dtype float32 is not accelerated"),
        (["--out", "/dev/null/out"], "--out /dev/null/out cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_sentence(run, arguments, sentence):
    status, printed, _ = run(*arguments)
    assert status == 1
    assert sentence in printed.err
    assert printed.err.strip().startswith("demo: ") and len(printed.err.strip().splitlines()) == 1


def test_a_model_or_text_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path / "none.gguf"), "--out", str(tmp_path)]) == 1
    assert "none.gguf could not be loaded" in capsys.readouterr().err
    with pytest.raises(demo.DemoError, match="none.txt could not be read"):
        workload.read(tmp_path / "none.txt")


def test_the_whole_pool_is_the_mean_over_the_groups_of_its_adapters():
    """Linear in the adapters: K of N at a time, over all groups, average to all N scaled by K / N."""
    options = argparse.Namespace(
        dtype="float32", targets="all-linear", r=3, alpha=6.0, dropout=0.0, adapters=4, active=2
    )
    model = race.with_adapters(small_load("built-in", [], "cpu", "float32")[0], options)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    x = torch.randn(5, 32)
    names = race.adapter_names(options)
    groups = []
    for active in (names[:2], names[2:]):
        model.base_model.set_adapter(active)
        groups.append(layer(x))
    with race.whole_pool(model, 2, 4):
        pooled = layer(x)
    torch.testing.assert_close(pooled, (groups[0] + groups[1]) / 2)
    model.base_model.set_adapter(names[:2])
    torch.testing.assert_close(layer(x), groups[0])


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_is_on(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("native", "torch", "peft", "processor", "threads", "GPU"):
        assert f"\n{word} " in printed
    assert printed.count("accelerated; differs") >= len(doctor.TRIED)


def test_the_doctor_says_why_the_native_library_is_off(monkeypatch, capsys):
    monkeypatch.setattr(ops, "unavailable_reason", "the native library could not be loaded: no such file")
    assert main(["doctor"]) == 1
    assert "NOT LOADED, so every layer is left to PEFT: the native library" in capsys.readouterr().out


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("self_test", ["ran before", "finds it"])
def test_the_doctor_sees_a_wrong_result(monkeypatch, capsys, everywhere, self_test):
    monkeypatch.setattr(selftest, "_faults", {"cpu": None} if self_test == "ran before" else {})
    original = ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *args: original(*args) * 1.5)
    # As where sitecustomize says use_backend(): then PEFT's own result has to be asked for.
    with use_backend() if everywhere else contextlib.nullcontext():
        assert main(["doctor"]) == 1
    says = (
        "WRONG: differs from PEFT's result"
        if self_test == "ran before"
        else "left to PEFT: the operations are wrong on"
    )
    assert says in capsys.readouterr().out


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "command" in capsys.readouterr().err
