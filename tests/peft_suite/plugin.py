"""pytest plugin: runs PEFT's own tests with every LoRA layer on the tsugi backend, and counts who computed what."""

import importlib.machinery
import importlib.util
import sys
import types

import tsugi_kpool
from tsugi_kpool import ops

# Fewer than these means that fallback to PEFT hides something. Somewhat less than what PEFT 0.21 gives, since its list of
# tests moves from version to version.
MIN_PASSED = 5_000
MIN_FAST_CALLS = 500
MIN_FAST_PARAMETER_CALLS = 500
MIN_FAST_DROPOUT_CALLS = 10

_dropout_calls = 0
_seen = 0


def _stub(name: str, attribute: str) -> None:
    """Let PEFT's test files import a package of which the tests selected here use nothing."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        setattr(module, attribute, type(attribute, (), {}))  # asked for with isinstance
        sys.modules[name] = module


def _count_draws() -> None:
    draw_rng = ops.draw_rng

    def counting(device="cpu"):
        global _dropout_calls
        _dropout_calls += 1
        return draw_rng(device)

    ops.draw_rng = counting


def pytest_configure(config):
    _stub("datasets", "load_dataset")
    _stub("diffusers", "StableDiffusionPipeline")
    _count_draws()
    config.tsugi_report = tsugi_kpool.use_backend()


class _Accessed(dict):
    """What PEFT's tests know to be in the cache already: everything. They go online for what is not."""

    def __contains__(self, model_id):
        return True

    def __missing__(self, model_id):
        return 0


def pytest_collection_finish(session):
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _Accessed()


def pytest_report_teststatus(report, config):
    # A line of dots for 5,000 tests says nothing; a count now and then does.
    global _seen
    if report.when == "teardown":
        _seen += 1
        if _seen % 1000 == 0:
            print(f"{_seen:,} tests", file=sys.stderr, flush=True)
    if report.passed:
        return ("passed" if report.when == "call" else "", "", "")
    if report.skipped:
        return "skipped", "", ""
    return None


def _shortfalls(config) -> list[str]:
    passed = len(config.pluginmanager.get_plugin("terminalreporter").stats.get("passed", ()))
    found = [
        ("passed tests", passed, MIN_PASSED),
        ("layer calls by tsugi", config.tsugi_report.fast_calls, MIN_FAST_CALLS),
        ("calls of adapted parameters by tsugi", config.tsugi_report._calls.experts, MIN_FAST_PARAMETER_CALLS),
        ("layer calls by tsugi with dropout", _dropout_calls, MIN_FAST_DROPOUT_CALLS),
    ]
    return [f"{count:,} {what}, expected at least {least:,}" for what, count, least in found if count < least]


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and _shortfalls(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    terminalreporter.write_line(str(config.tsugi_report))
    terminalreporter.write_line(f"of these on parameters: {terminalreporter.config.tsugi_report._calls.experts:,}")
    terminalreporter.write_line(f"of these with dropout: {_dropout_calls:,}")
    for line in _shortfalls(config):
        terminalreporter.write_line(f"too few: {line}", red=True)
