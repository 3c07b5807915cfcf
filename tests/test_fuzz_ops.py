"""No call may end the process: every operation with hostile arguments, ten thousand calls a run.

The same calls in each run, so that a change is judged by itself; TSUGI_FUZZ_SEED=random, or a number, tries others.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("fuzz_ops.py")
PROCESSES, CALLS = 2, 5_000


def test_hostile_calls_raise_or_return_what_the_reference_returns(tmp_path):
    first = os.environ.get("TSUGI_FUZZ_SEED", "2")
    first = random.SystemRandom().getrandbits(32) if first == "random" else int(first)
    seeds = [first + process for process in range(PROCESSES)]
    print("seeds", seeds)
    running = []
    for seed in seeds:
        journal, output = tmp_path / f"{seed}.call", tmp_path / f"{seed}.out"
        command = [sys.executable, "-X", "faulthandler", PROGRAM, str(seed), "0", str(CALLS), journal]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        errors = tmp_path / f"{seed}.err"
        with output.open("w") as out, errors.open("w") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        running.append((seed, process, journal, output, errors))
    try:
        for seed, process, journal, output, errors in running:
            status = process.wait(timeout=900)
            ended_by = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            last = journal.read_text().strip() if journal.exists() else "none"
            again = f"python {PROGRAM.name} {seed} {last} 1"
            said = output.read_text()[-8000:] + (errors.read_text()[-4000:] if status != 1 else "")
            assert status == 0, f"{ended_by}; the last call was {last}, again: {again}\n{said}"
            assert f"{CALLS} calls" in output.read_text()
            # A fuzzer whose calls are all refused tests nothing but refusals.
            returned = int(output.read_text().rsplit(" returned", 1)[0].rsplit(" ", 1)[1])
            assert returned > CALLS // 5, output.read_text()
    finally:
        for _, process, *_ in running:
            process.kill()
            process.wait()
