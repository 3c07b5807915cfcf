"""A device on which the operations are wrong keeps PEFT's layers; finding out leaves nothing behind, in any mode."""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing
import os
import threading
import time
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fork_worker
from peft_models import lora_model
from tsugi_kpool import ops, reference, use_backend
from tsugi_kpool.backend import swap
from tsugi_kpool.ops import selftest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    monkeypatch.setattr(selftest, "_faults", {})
    monkeypatch.setattr(swap, "_warned", set())


def patch(monkeypatch, name, wrong, module=ops):
    """Let an operation return ``wrong`` of its right result."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: wrong(right(*args)))


def failing(error):
    def fail(*args):
        raise error

    return fail


# ---- what it finds ---------------------------------------------------------------------------------------------------


def test_this_machine_is_right():
    assert selftest.fault("cpu") is None
    assert selftest._faults == {"cpu": None}
    exact = selftest._Trial(torch.float64, torch.float64, 1e-12)
    assert selftest._error(ops, CPU, exact) < exact.limit


def first_of(change):
    return lambda gradients: ([change(gradients[0][0]), *gradients[0][1:]], *gradients[1:])


WRONG = {
    "y": ("lora_linear", lambda y: y * 1.01, "float32 with float32 adapters differ from torch's result by 1.0e-02"),
    "y of experts": (
        "lora_experts",
        lambda y: y * 1.01,
        "float32 with float32 adapters differ from torch's result by 1.0e-02",
    ),
    "NaN": ("lora_linear", lambda y: y * float("nan"), "differ from torch's result by nan"),
    "dx": ("lora_backward", lambda g: (g[0] * 1.1, *g[1:]), "by 1.0e-01"),
    "dA": ("lora_backward", lambda g: (g[0], [g[1][0] * 1.1, *g[1][1:]], g[2]), "by 1.0e-01"),
    "dB": ("lora_backward", lambda g: (g[0], g[1], [*g[2][:-1], g[2][-1].roll(1, 0)]), "by 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_is_found_and_the_layer_left_to_peft(monkeypatch, what):
    name, wrong, sentence = WRONG[what]
    model = lora_model()
    x = torch.randn(3, 12)
    expected = model(x)
    patch(monkeypatch, name, wrong)
    with pytest.warns(UserWarning, match=f"the operations are wrong on cpu: .*{sentence}"):
        with use_backend(model) as report:
            assert torch.equal(model(x), expected)
    assert report.fast_calls == 0 and not report.accelerated


def test_a_model_that_moves_to_such_a_device_is_left_to_peft_there(monkeypatch):
    model = lora_model()
    x = torch.randn(3, 12)
    with use_backend(model) as report:
        monkeypatch.setattr(selftest, "_faults", {"cpu": "the operations are wrong on cpu"})
        with pytest.warns(UserWarning, match="the operations are wrong on cpu"):
            model(x)
        assert report.fallback_calls == {"the operations are wrong on cpu": 2}


def test_an_operation_that_fails_is_found_and_remembered(monkeypatch):
    monkeypatch.setattr(ops, "lora_linear", failing(RuntimeError("lora_linear: built for sm_80, the device is sm_75")))
    sentence = "the operations fail on cpu (float32 with float32 adapters): lora_linear: built for sm_80, the device is"
    assert selftest.fault("cpu").startswith(sentence)
    monkeypatch.undo()
    assert selftest.fault("cpu") is None  # undo brought the empty memory back, too


def test_a_lasting_fault_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(ops, "lora_linear", failing(RuntimeError("no kernel")))
    first = selftest.fault("cpu")
    monkeypatch.setattr(selftest, "_try", failing(AssertionError("tried again")))
    assert selftest.fault("cpu") == first == selftest.lasting_fault("cpu")


# ---- what is not the device's fault ----------------------------------------------------------------------------------

NOT_THE_DEVICE = {
    "out of memory on a GPU": (ops, "lora_shrink", torch.OutOfMemoryError("tried to allocate 2 MiB"), "2 MiB"),
    "out of memory on the CPU": (
        ops,
        "lora_linear",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        "99 bytes",
    ),
    "no memory in Python": (ops, "lora_linear", MemoryError("none left"), "MemoryError: none left"),
    "a warning that is an error": (ops, "lora_linear", UserWarning("as filtered"), "UserWarning: as filtered"),
}


@pytest.mark.parametrize("what", NOT_THE_DEVICE)
def test_a_failure_that_will_pass_is_named_and_not_remembered(monkeypatch, what):
    module, name, error, cause = NOT_THE_DEVICE[what]
    model = lora_model()
    x = torch.randn(3, 12)
    expected = model(x)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, failing(error))
        report = use_backend(model)
        with pytest.warns(UserWarning, match=f"the operations could not be tried on cpu: .*{cause}"):
            assert torch.equal(model(x), expected)
        assert report.fast_calls == 0 and selftest._faults == {}
    # The same layers, as soon as it has passed.
    torch.testing.assert_close(model(x), expected)
    assert report.fast_calls == 2 and selftest._faults == {"cpu": None}


@pytest.mark.parametrize("broken", [failing(RuntimeError("does not have a deterministic implementation")), "inexact"])
def test_what_troubles_plain_torch_too_is_not_the_operations_fault(monkeypatch, broken):
    for module in (ops, reference):
        if broken == "inexact":  # as with a product of reduced precision; in float64 it is exact
            patch(monkeypatch, "lora_linear", lambda y: y if y.dtype is torch.float64 else y * 1.1, module)
        else:
            right = reference.lora_linear
            only_exact = lambda x, *args: right(x, *args) if x.dtype is torch.float64 else broken()  # noqa: E731
            monkeypatch.setattr(module, "lora_linear", only_exact)
    found = selftest.fault("cpu")
    assert found.startswith("the operations could not be tried on cpu: plain torch ") and "there too" in found
    assert selftest._faults == {} and selftest.lasting_fault("cpu") is None


def test_an_interrupt_is_the_callers(monkeypatch):
    monkeypatch.setattr(ops, "lora_linear", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        selftest.fault("cpu")
    monkeypatch.setattr(threading.Thread, "join", failing(KeyboardInterrupt()))  # Ctrl-C while it is waited for
    with pytest.raises(KeyboardInterrupt):
        selftest.fault("cpu")
    assert selftest._faults == {}


def test_no_thread_to_run_in(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", failing(RuntimeError("can't start new thread")))
    assert selftest.fault("cpu") == "the operations could not be tried on cpu: can't start new thread"
    assert selftest._faults == {}


# ---- modes of the caller ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


class Failing:
    """A mode of the user's in which every call that reaches it is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reached the caller's mode")

    __torch_function__ = __torch_dispatch__


class FailingDispatch(Failing, TorchDispatchMode):
    pass


class FailingFunction(Failing, TorchFunctionMode):
    pass


def unexpected(tensor):
    raise AssertionError("a tensor of the trial was saved")


def default_device(device):
    return setting(lambda: None, torch.set_default_device, device)


MODES = {
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=False),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device context": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "low precision": lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "dispatch mode": FailingDispatch,
    "function mode": FailingFunction,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(unexpected, unexpected),
    "saved tensors off": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "forward-mode level": torch.autograd.forward_ad.dual_level,
    "no torch function": torch._C.DisableTorchFunction,
}


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_of_the_caller_reaches_it(mode):
    generator = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if mode == "anomaly mode" else "error")
        with MODES[mode]():
            found = selftest.fault("cpu")
            grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert (found, selftest._faults) == (None, {"cpu": None})
    assert (grad, inference) == (mode not in ("inference mode", "no grad"), mode == "inference mode")
    assert torch.equal(generator, torch.get_rng_state())


def calling(found):
    """A function to transform or trace that has the self-test run in the middle."""

    def function(x):
        found.append(selftest.fault("cpu"))
        return x.sin().sum(-1)

    return function


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vjp of vmap": lambda f, x: torch.func.vjp(torch.vmap(f), x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx, symbolic": lambda f, x: make_fx(f, tracing_mode="symbolic")(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, x, check_trace=False),
    "export": lambda f, x: torch.export.export(Module(f), (x,), strict=False),
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_transform_and_no_trace_reaches_it(transform):
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        TRANSFORMS[transform](calling(found), torch.randn(3, 4))
    assert found and set(found) == {None} and selftest._faults == {"cpu": None}


def test_a_program_traced_at_the_first_call_holds_nothing_of_it():
    traced = make_fx(calling([]))(torch.randn(3, 4))
    assert [node.name for node in traced.graph.nodes] == ["x_1", "sin", "sum_1", "output"]


def test_a_profile_of_the_first_call_holds_nothing_of_it():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        calling([])(torch.randn(3, 4))
    names = {event.key for event in profile.key_averages()}
    assert "aten::sin" in names and not [name for name in names if "tsugi" in name or "linear" in name]


@pytest.mark.parametrize("mode", ["fake tensors", "device context", "default device", "default dtype"])
def test_the_backend_first_used_in_a_mode_is_on_afterwards(mode):
    x = torch.randn(3, 12)
    model = lora_model()
    expected = model(x)
    with MODES[mode]():
        report = use_backend(model, "tsugi")
    assert torch.equal(model(x), expected) or torch.allclose(model(x), expected, atol=1e-5)
    assert report.fast_calls >= 2 and not report.fallback_calls


def test_the_first_call_of_a_model_under_fake_tensors_is_right():
    x = torch.randn(3, 12)
    model = lora_model()
    with pytest.warns(UserWarning, match="the input is not a plain strided tensor"):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            use_backend(model)
            assert model(mode.from_tensor(x)).shape == (3, 7)
    assert use_backend(model, "tsugi").accelerated and model(x).shape == (3, 7)


def test_two_threads_at_the_first_call_both_know(monkeypatch):
    barrier, found = threading.Barrier(4), []
    right = selftest._try

    def slow(device):
        verdict = right(device)
        barrier.wait(60)  # no thread has an answer before all have asked
        return verdict

    monkeypatch.setattr(selftest, "_try", slow)
    patch(monkeypatch, "lora_linear", lambda y: y * 1.01)
    callers = [threading.Thread(target=lambda: found.append(selftest.fault("cpu"))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4 and len(set(found)) == 1 and "wrong on cpu" in found[0]


# ---- processes forked later ------------------------------------------------------------------------------------------


def ids():
    return set(os.listdir("/proc/self/task"))


def test_it_returns_when_the_threads_that_it_started_have_ended(monkeypatch):
    started = []

    def try_and_leave_a_thread_behind(device):
        _thread.start_new_thread(time.sleep, (0.5,))  # as OpenMP's: nobody joins it
        started.extend(ids() - before)
        return selftest._Verdict(None, lasting=True)

    monkeypatch.setattr(selftest, "_try", try_and_leave_a_thread_behind)
    before = ids()
    assert selftest.fault("cpu") is None
    assert len(started) >= 2 and not ids() & set(started)


def test_it_waits_for_no_thread_that_others_start_meanwhile(monkeypatch):
    """Nor does a thread that stays hold it up for ever."""
    monkeypatch.setattr(selftest, "_WAIT_S", 0.2)
    begun, over, waited_for = threading.Event(), threading.Event(), []
    is_running = selftest._is_running
    monkeypatch.setattr(selftest, "_is_running", lambda name: waited_for.append(is_running(name)) or waited_for[-1])

    def fault_while_started(by_whom):
        def run(device):
            if by_whom == "the trial":
                _thread.start_new_thread(over.wait, (60,))
            begun.set()
            assert other.is_set() or other.wait(60)
            return selftest._Verdict(None, lasting=True)

        monkeypatch.setattr(selftest, "_try", run)
        selftest._faults.clear()
        waited_for.clear()
        assert selftest.fault("cpu") is None
        return waited_for[-1]

    other = threading.Event()

    def another() -> None:
        begun.wait(60)
        _thread.start_new_thread(over.wait, (60,))
        other.set()

    helper = threading.Thread(target=another)
    helper.start()
    try:
        assert not fault_while_started("another")
        assert fault_while_started("the trial")
    finally:
        over.set()
        helper.join()


def test_processes_forked_after_use_backend_do_not_hang():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tsugi_kpool", "fork_worker"])
    ours, theirs = context.Pipe()
    process = context.Process(target=fork_worker.use_then_fork, args=(theirs,))
    process.start()
    try:
        assert ours.poll(240), "no answer"
        result = ours.recv()
    finally:
        process.kill()
        process.join()
    assert (result["accelerated"], result["generator"], result["threads left"]) == (1, True, 0)
    assert result["fork before"] == pytest.approx(result["here"], rel=1e-5), "the test itself started threads"
    assert result["forks"] == pytest.approx([result["here"]] * fork_worker.ROUNDS, rel=1e-5)
    assert result["grandchild"] == pytest.approx(result["here"], rel=1e-5)
    assert result["loader"] == pytest.approx([result["here"]] * 2, rel=1e-5)
