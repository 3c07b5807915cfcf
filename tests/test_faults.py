"""Failure of one rank, seen from all others: a part of ``benches/training/faults.py``, and what its table has no row for."""

import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from benches.training.fault_cases import FAULTS, MODES, Case, other_settings
from benches.training.faults import all_cases, run_case

from sync_worker import Toy, batch, config, launch, round_robin
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.distributed.lines import Failure, Lines, reason_of
from tsugi_kpool.distributed.ranks import Ranks, SyncError

# Those that tell most, each mode and each fault once at least; the whole table is `python -m benches faults`.
CASES = [
    Case("kill", "relative planned", 4),
    Case("kill", "local", 2, store_in_rank_0=False),
    Case("stop 1 s", "variance stepwise", 2),
    Case("raise", "synchronous", 4),
    Case("raise, close in finally", "variance stepwise", 2),
    Case("exit early", "variance stepwise", 4),
    Case("exit early", "noise_scale", 2, store_in_rank_0=False),
    Case("close early", "relative planned", 2),
    Case("close early", "variance stepwise", 2),
    Case("Ctrl-C", "noise_scale", 4),
    Case("Ctrl-C, peer stopped", "synchronous", 2, plain=True),
    Case("Ctrl-C, peer stopped", "variance stepwise", 4),
]


@pytest.fixture(scope="module")
def outcomes():
    with ThreadPoolExecutor(4) as executor:
        return dict(zip(CASES, executor.map(run_case, CASES)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_end_equal_or_name_who_failed(outcomes, case):
    outcome = outcomes[case]
    assert outcome.passed, outcome.what


def test_the_table_covers_every_fault_mode_and_setting():
    cases = all_cases(quick=False)
    assert {(c.fault, c.mode, c.ranks) for c in cases} >= {(f, m, w) for f in FAULTS for m in MODES for w in (2, 4)}
    for mode in MODES:
        settings = other_settings(mode)
        assert {
            "k_active",
            "routing_seed",
            "trigger",
            "wire_dtype",
            "stagger",
            "lora_alpha",
        } <= set(settings)
        # It is refused with "synchronous", which has no use for it.
        assert ("sideband_enabled" in settings) == (mode != "synchronous")
        assert {f"differ in {name}" for name in settings} <= {c.fault for c in cases if c.mode == mode}
    assert {c.fault for c in all_cases(quick=True)} == {c.fault for c in cases}


# ---- what a rank does in one process of several ----------------------------------------------------------------------


def aggregator_at(step, **fields):
    """An Aggregator after ``step`` steps of a Toy, and its model."""
    model, rank = Toy(), dist.get_rank()
    aggregator = Aggregator(model.adapters(), config(**fields))
    for s in range(step):
        advance(aggregator, model, s, rank)
    return aggregator, model


def advance(aggregator, model, step, rank):
    active = round_robin(step)
    model.active = list(active)
    aggregator.before_step(step, active)
    x, y = batch(0, rank, step)
    (model(x) - y).square().mean().backward()
    aggregator.after_backward(step, active)


def error_of(function, *arguments):
    started = time.monotonic()
    try:
        function(*arguments)
    except BaseException as error:
        found = {name: getattr(error, name, None) for name in ("first", "missing", "left")}
        return {"type": type(error).__name__, "message": str(error), "took": time.monotonic() - started, **found}
    return None


def killed_with_a_child(rank):
    """Rank 1 forks a child, as a DataLoader does, and is killed; the child lives on and holds what it inherited."""
    aggregator, model = aggregator_at(3, aggregation_mode="synchronous", sync_timeout_s=20.0)
    if rank == 1:
        if os.fork() == 0:
            found = error_of(advance, aggregator, model, 3, rank)
            aggregator.close()  # does nothing: the child does not speak for its parent
            dist.distributed_c10d._get_default_store().set("child", found["message"])
            time.sleep(15)
            os._exit(0)
        while not dist.distributed_c10d._get_default_store().check(["child"]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    found = error_of(advance, aggregator, model, 3, rank)
    return found, dist.distributed_c10d._get_default_store().get("child").decode()


def test_a_forked_child_neither_hides_its_parents_death_nor_speaks_for_it():
    found, child = launch(2, killed_with_a_child, expect_dead=(1,))[0]
    assert found["type"] == "SyncError" and found["first"] == 1 and found["missing"] == (1,)
    assert "rank 1 was killed" in found["message"] and found["took"] < 10.0
    assert "forked" in child and "must not train" in child


def late(rank):
    """Rank 1 is busy elsewhere for longer than the limit."""
    aggregator, model = aggregator_at(3, aggregation_mode="synchronous", sync_timeout_s=2.0)
    if rank == 1:
        time.sleep(4.0)
    return error_of(advance, aggregator, model, 3, rank)


def test_a_rank_that_answers_but_does_not_come_is_named_as_such():
    waiting, busy = launch(2, late)
    assert "rank 1 answers, but did not come to an exchange within 2 s" in waiting["message"]
    assert waiting["first"] == 1 and waiting["missing"] == () and waiting["took"] < 2.0 + 3.0
    # When it comes back it learns that the others went on without it, and does not blame rank 0 for being gone.
    assert busy["first"] == 1 and "went on without it" in busy["message"] and busy["missing"] == ()


def called_alone(rank, what, step):
    """Rank 1 calls what is a call of all ranks, while rank 0 goes on with a step."""
    aggregator, model = aggregator_at(step, agreement="stepwise", decision_delay=0, sync_timeout_s=20.0)
    calls = {
        "load": lambda: aggregator.load_state_dict(state),
        "collect": lambda: aggregator.gather_objects("collect all states", "x" * 1000),
    }
    state = aggregator.state_dict(finish=False)
    return error_of(calls[what]) if rank == 1 else error_of(advance, aggregator, model, step, rank)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("what", "said"), [("load", "compare the states to load"), ("collect", "collect all states")])
def test_a_call_of_one_rank_alone_is_named_on_every_rank(what, said, step):
    """Messages of two kinds met, of other lengths, or of the same length and another meaning."""
    for found in launch(2, called_alone, what, step):
        assert found["type"] == "SyncError" and found["took"] < 10.0
        assert f"rank 1 to {said}" in found["message"] and "the ranks do not call the same" in found["message"]


def caught(rank):
    """Rank 1's step raises, is caught, and done again: nobody left."""
    aggregator, model = aggregator_at(2, aggregation_mode="synchronous")
    if rank == 1:
        with pytest.raises(KeyError):
            raise KeyError("bad sample")
    advance(aggregator, model, 2, rank)
    aggregator.close()
    return [p.detach().clone() for p in model.trained()]


def test_an_exception_that_is_caught_is_no_departure():
    first, second = launch(2, caught)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def interrupted(rank, seconds_between):
    """Ctrl-C on rank 0 in a wait, then again while it says goodbye to a rank that is stopped."""
    aggregator, model = aggregator_at(3, trigger="variance", decision_delay=0, sync_timeout_s=60.0)
    held = aggregator.held
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def send():
        for _ in range(2):
            time.sleep(seconds_between)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    first = error_of(advance, aggregator, model, 3, rank)
    state = aggregator.state_dict()
    again = error_of(aggregator.before_step, 9, (0,))
    second = error_of(aggregator.close)
    return first, second, again, held, [entry["held"] for entry in state["adapters"]]


def test_two_ctrl_c_in_a_row_end_the_wait_and_the_goodbye_and_keep_what_was_held():
    first, second, again, before, kept = launch(2, interrupted, 0.5, expect_dead=(1,))[0]
    assert first["type"] == "KeyboardInterrupt" and first["took"] < 0.5 + 2.0
    assert second is None or (second["type"] == "KeyboardInterrupt" and second["took"] < 2.0)
    assert again["type"] == "SyncError" and "rank 0 was interrupted (Ctrl-C)" in again["message"]
    assert kept == [held + (i in round_robin(3)) for i, held in enumerate(before)]


def absent(rank):
    """Rank 1 does not come to attach."""
    if rank == 1:
        time.sleep(6.0)
        return None
    return error_of(Ranks, None, 3.0)


def test_attach_ends_within_the_limit_and_names_who_did_not_come():
    found = launch(2, absent)[0]
    assert found["type"] == "SyncError" and "rank 1 did not come" in found["message"]
    assert found["first"] == 1 and found["missing"] == (1,) and found["took"] < 3.0 + 3.0


def leaves_the_meeting(rank):
    """Three ranks; 2 never comes, and 1 is interrupted while it waits for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank == 2:
        time.sleep(4.0)
        return None
    if rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    return error_of(Ranks, None, 30.0)


def test_ctrl_c_at_attach_ends_the_meeting_for_all_who_wait():
    waiting, gone, _ = launch(3, leaves_the_meeting)
    assert gone["type"] == "KeyboardInterrupt" and gone["took"] < 0.5 + 2.0
    assert waiting["type"] == "SyncError" and "rank 1 was interrupted (Ctrl-C)" in waiting["message"]
    assert waiting["first"] == 1 and waiting["took"] < 10.0


def gathered(rank):
    ranks = Ranks(None, 20.0)
    values = ranks.gather_objects("compare", {"rank": rank, "text": "x" * (10_000 * rank)})
    tensors = [torch.full((3, 2), float(rank)), torch.arange(6.0).add(rank).view(2, 3).T, torch.tensor(rank)]
    ranks.broadcast("hand over", tensors)
    ranks.close(broken=False)
    return values, tensors


def test_objects_of_any_length_are_gathered_and_tensors_come_from_the_lowest_rank():
    for values, tensors in launch(3, gathered):
        assert [(v["rank"], len(v["text"])) for v in values] == [(0, 0), (1, 10_000), (2, 20_000)]
        assert torch.equal(tensors[0], torch.zeros(3, 2)) and tensors[2] == 0
        assert torch.equal(tensors[1], torch.arange(6.0).view(2, 3).T)


# ---- the lines, without processes ------------------------------------------------------------------------------------


def lines_of(size):
    """``size`` ranks' lines in this process."""
    ends = {r: {} for r in range(size)}
    for a in range(size):
        for b in range(a):
            ends[a][b], ends[b][a] = socket.socketpair()
    return [Lines(r, ends[r]) for r in range(size)]


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_first_failure_is_kept_and_told_on():
    a, b, c, d = lines_of(4)
    b.say_left(reason_of(KeyError("user code")))
    wait_until(lambda: a.first and c.first and d.first)
    c.say_left("gave up: it could not reduce a gradient")  # a consequence
    wait_until(lambda: 2 in a.departures and 2 in d.departures)
    for lines in (a, d):
        assert str(lines.first) == "rank 1 left: KeyError: 'user code'"
    for lines in (a, b, c, d):
        lines.close("closed its pool", orderly=True)


def test_a_failure_that_one_rank_found_reaches_those_that_could_not_see_it():
    a, b, c = lines_of(3)
    a.blame(Failure(2, "did not answer for 2 s", silent=True))
    a.say_left("gave up")
    wait_until(lambda: b.first and c.first)
    assert b.first == Failure(2, "did not answer for 2 s", silent=True) == c.first  # c is rank 2 itself
    for lines in (a, b, c):
        lines.close("closed its pool", orderly=True)


def test_an_orderly_end_is_no_failure_and_a_broken_line_is():
    a, b, c = lines_of(3)
    b.close("closed its pool", orderly=True)
    wait_until(lambda: 1 in a.departures and 1 in c.departures)
    assert a.first is None and not a.departures[1].why.silent
    c._sockets[0].shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    wait_until(lambda: 2 in a.departures)
    assert a.first.rank == 2 and a.first.silent and "killed" in str(a.first)
    answers, silent = a.roll_call(5.0)
    assert answers == {} and silent == ()
    a.close("closed its pool")
    c.close("closed its pool")


@pytest.mark.parametrize("noise", [b"\xff\xfe\n", b"[]\n", b"{}x\n", b'{"left": 1}\n', b"9" * 200_000])
def test_a_stranger_on_a_line_harms_nobody(noise):
    mine, theirs = socket.socketpair()
    lines = Lines(0, {1: mine})
    with contextlib.suppress(OSError):  # the other end may hang up before it has read all
        theirs.sendall(noise)
    wait_until(lambda: 1 in lines.departures)
    assert lines.first.rank == 1
    lines.close("closed its pool")
    theirs.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "ended without closing its pool"),
        (KeyboardInterrupt(), "was interrupted (Ctrl-C)"),
        (SystemExit(3), "called sys.exit(3)"),
        (ValueError("x" * 5000), "left: ValueError: xxx"),
        (SyncError("gone"), "left: SyncError: gone"),
    ],
)
def test_reasons_continue_a_sentence(error, reason):
    assert reason_of(error).startswith(reason) and len(reason_of(error)) <= 400
