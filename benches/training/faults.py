"""What happens on every rank when one of them fails, each case with real processes.

A case is a fault, a way of training and a number of ranks. Each rank trains a tiny PEFT model through ``attach`` and
``pool.step()``; one of them, the culprit, is killed, stopped, interrupted, raises, and so on. A case passes if all ranks end
with the same bits, or if every rank that lives ends with an error that names the culprit, within the time limit and three
seconds; and if no process dies of a signal that nobody sent. Ranks that differ in a setting must be refused at attach, by
an error that names the setting and the rank, on every rank; ended well is not enough there, save for what ranks may have
each for themselves. The table and the JSON file grow as cases end; started again,
the command does what is left. The exit status is 0 if all cases passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benches.measure import machine
from benches.training.fault_cases import (
    DIFFERENT,
    FAULTS,
    LIMIT_S,
    MODES,
    OUTSIDE_CONFIG,
    Case,
    hash_of,
    name_in_error,
    other_settings,
    rank_main,
)

SLACK_S = 3.0  # how much longer than the limit a rank may take to say what happened
CTRL_C_S = 2.0
_START_S = 300.0  # plain processes import torch first, on a busy machine for minutes
_END_S = 150.0  # the end of an interpreter with torch in it takes long there, too


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    passed: bool
    what: str
    seconds: float


class _Plain:
    """A process of its own, with the same few methods as multiprocessing's."""

    def __init__(self, case: Case, rank: int, port: int, folder: str):
        task = json.dumps([dataclasses.asdict(case), rank, port, folder])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benches.training.faults", "--rank", task],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def join(self) -> None:
        self._process.wait()


def _start(case: Case, rank: int, port: int, folder: str) -> Any:
    if case.plain:
        return _Plain(case, rank, port, folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "peft", "tsugi_kpool", "tsugi_kpool.distributed.aggregator", "benches.training.fault_cases"]
    )
    process = context.Process(target=rank_main, args=(case, rank, port, folder), daemon=True)
    process.start()
    return process


def run_case(case: Case) -> Outcome:
    """Start the ranks, do what comes from outside, and judge what they report."""
    with tempfile.TemporaryDirectory(prefix="tsugi-faults-") as folder:
        store = None if case.store_in_rank_0 else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = _free_port() if store is None else store.port
        processes = [_start(case, rank, port, folder) for rank in range(case.ranks)]
        try:
            fault_at = _from_outside(case, processes, Path(folder))
            _wait_for_ends(case, processes, _END_S if case.kind.signal else _START_S + _END_S)
            return _judge(case, processes, Path(folder), fault_at)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _from_outside(case: Case, processes: list, folder: Path) -> float | None:
    """Send what the fault sends; the time of it."""
    if not case.kind.signal:
        return None
    deadline = time.monotonic() + _START_S
    while not (folder / "marked").exists():
        if time.monotonic() > deadline or processes[case.culprit].exitcode is not None:
            return None  # _judge sees what happened instead
        time.sleep(0.005)
    if case.kind.peer_stops:
        time.sleep(1.0)  # the others wait for it by now
    else:
        time.sleep(hash_of(case.name, "moment") % 100 / 1e3)
    pid, what = processes[case.culprit].pid, case.kind.signal
    fault_at = time.monotonic()
    if what == "kill":
        os.kill(pid, signal.SIGKILL)
    elif what == "int":
        os.kill(pid, signal.SIGINT)
    else:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(float(what.removeprefix("stop ")))
        os.kill(pid, signal.SIGCONT)
    return fault_at


def _wait_for_ends(case: Case, processes: list, seconds: float) -> None:
    """Until all have ended that can; a rank that stays stopped cannot."""
    expected = [p for r, p in enumerate(processes) if not (case.kind.peer_stops and r == case.stopped)]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.exitcode is None for p in expected):
        time.sleep(0.02)


def _judge(case: Case, processes: list, folder: Path, fault_at: float | None) -> Outcome:
    exits = [p.exitcode for p in processes]
    paths = [folder / f"rank{r}.json" for r in range(case.ranks)]
    found = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    if fault_at is None:
        fault_at = next((f["fault_at"] for f in found if f and f["fault_at"]), None)
    took = 0.0
    if fault_at is not None:
        took = max((f["at"] - fault_at for r, f in enumerate(found) if f and _is_timed(case, r)), default=0.0)
    faults = [fault for r in range(case.ranks) if (fault := _wrong_with(case, r, exits[r], found[r], fault_at))]
    stderr = [_stderr(folder, rank) for rank in range(case.ranks)]
    if case.kind.warned and not any(f"rank {case.culprit} " in text for text in stderr):
        faults.append(f"no warning names rank {case.culprit}")
    living = [f for f in found if f is not None]
    ended = [f for f in living if f["outcome"] == "ended"]
    if len(ended) == case.ranks:
        if len({f["params"] for f in ended}) > 1:
            faults.append("all ended, and their parameters differ")
        what = "ended, equal"
    else:
        if case.kind.equal:
            faults.append("it had to end well: " + next((f["message"] for f in living if f["outcome"] != "ended"), ""))
        kinds = {f["type"] for r, f in enumerate(found) if f and f["outcome"] == "error" and r != case.culprit}
        what = f"{', '.join(sorted(kinds)) or 'no error'} naming rank {case.culprit}"
    if faults:
        logs = [_tail(text) for text in stderr]
        what = "; ".join(faults) + "".join(f"\n    rank {r}: {log}" for r, log in enumerate(logs) if log)
    return Outcome(not faults, what, took)


def _stderr(folder: Path, rank: int) -> str:
    path = folder / f"rank{rank}.err"
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _tail(text: str) -> str:
    return " / ".join(text.splitlines()[-2:])[-400:]


def _is_timed(case: Case, rank: int) -> bool:
    """A rank that was stopped itself counts from when it goes on."""
    return not (rank == case.culprit and case.kind.signal.startswith("stop"))


def _wrong_with(case: Case, rank: int, exitcode: int | None, found: dict | None, fault_at: float | None) -> str | None:
    """What this rank did that it must not do; None if nothing."""
    guilty, kind = rank == case.culprit, case.kind
    if kind.peer_stops and rank == case.stopped:
        return None
    if exitcode is None:
        return f"rank {rank} has not ended" + (f" after {found['type']}" if found and "type" in found else "")
    if guilty and kind.signal == "kill":
        return None if exitcode == -signal.SIGKILL else f"rank {rank} was to be killed, and ended with {exitcode}"
    interrupted = guilty and kind.signal == "int" and exitcode == -signal.SIGINT  # as Python ends after a Ctrl-C
    if exitcode < 0 and not interrupted:
        return f"rank {rank} died of {signal.Signals(-exitcode).name}"
    if found is None:
        return f"rank {rank} ended with {exitcode} and reported nothing"
    if case.is_different and not case.may_differ:
        return _wrong_with_refusal(case, rank, found)
    if found["outcome"] == "ended":
        return (
            None
            if guilty or kind.equal or kind.warned or case.may_differ
            else f"rank {rank} ended as if nothing had been"
        )
    limit = CTRL_C_S if guilty and kind.signal == "int" else LIMIT_S + SLACK_S
    if fault_at is not None and _is_timed(case, rank) and found["at"] - fault_at > limit:
        return f"rank {rank} took {found['at'] - fault_at:.1f} s, more than {limit:g} s ({found['message'][:200]})"
    if guilty:
        expected = {"int": ("KeyboardInterrupt",)}.get(
            kind.signal, ("SyncError", "ValueError", "KeyError", "FloatingPointError")
        )
        return None if found["type"] in expected else f"rank {rank} raised {found['type']}: {found['message'][:200]}"
    named = [case.culprit, case.stopped] if kind.peer_stops else [case.culprit]
    if found["type"] == "SyncError" and found["first"] in named:
        return None
    if found["first"] is None and any(f"rank {r} " in found["message"] for r in named):
        return None
    return f"rank {rank} does not name rank {case.culprit}: {found['type']}: {found['message'][:300]}"


def _wrong_with_refusal(case: Case, rank: int, found: dict) -> str | None:
    """What is wrong with how this rank was told that the culprit has another setting; None if nothing."""
    if found["outcome"] == "ended":
        return f"rank {rank} ended as if nothing had been different"
    said = f"{found['type']}: {found['message']}"
    if found["type"] != "ValueError" or name_in_error(case) not in said or f"rank {case.culprit} has" not in said:
        return f"rank {rank} does not name {name_in_error(case)!r} and rank {case.culprit}: {said[:300]}"
    return None


# ---- the table -------------------------------------------------------------------------------------------------------


def all_cases(quick: bool) -> list[Case]:
    """Every fault in every mode on 2 and 4 ranks; ``quick``: each once, in turns over the modes and numbers of ranks."""
    cases = []
    for mode in MODES:
        different = [DIFFERENT + name for name in (*OUTSIDE_CONFIG, *other_settings(mode))]
        for fault in (*FAULTS, *different):
            for ranks in (2, 4):
                place = hash_of(fault, mode, ranks)
                plain = fault.startswith("Ctrl-C") and mode in ("synchronous", "variance stepwise")
                cases.append(Case(fault, mode, ranks, store_in_rank_0=place % 2 == 0, plain=plain))
    if quick:
        chosen: dict[str, Case] = {}
        for case in sorted(cases, key=lambda c: hash_of(c.name)):
            chosen.setdefault(case.fault, case)
        cases = [case for case in cases if chosen[case.fault] == case]
    return cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="cases at a time")
    parser.add_argument("--only", default="", help="cases whose name has this in it, as 'kill | local'")
    parser.add_argument("--again", action="store_true", help="also what the file has as passed already")
    parser.add_argument("--json", type=Path, help="default: benches/results/faults-PROCESSOR.json")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        case, rank, port, folder = json.loads(options.rank)
        rank_main(Case(**case), rank, port, folder)
        return 0

    info = machine()
    name = "-".join(info["processor"].lower().replace("(", " ").replace(")", " ").replace("@", " ").split())
    path = options.json or Path(__file__).parents[1] / "results" / f"faults-{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"machine": info, "limit_s": LIMIT_S, "cases": {}}
    done = {} if options.again else {n: row for n, row in results["cases"].items() if row["passed"]}
    cases = [c for c in all_cases(options.quick) if options.only in c.name and c.name not in done]
    print(f"{info['processor']}: {len(cases)} cases to run, {len(done)} have passed before")
    print(f"{'fault':28} {'mode':18} ranks  store   {'seconds':>7}  outcome")
    failed = 0
    with ThreadPoolExecutor(options.jobs) as executor:
        for case, outcome in zip(cases, executor.map(run_case, cases)):
            where = "rank 0" if case.store_in_rank_0 else "apart"
            verdict = outcome.what if outcome.passed else f"FAILED: {outcome.what}"
            print(
                f"{case.fault:28} {case.mode:18} {case.ranks:5}  {where:6}  {outcome.seconds:7.1f}  {verdict}",
                flush=True,
            )
            failed += not outcome.passed
            row = {
                "passed": outcome.passed,
                "outcome": outcome.what,
                "seconds": round(outcome.seconds, 2),
                "store": where,
            }
            results["cases"][case.name] = row
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(cases) - failed} passed, {failed} failed; written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
