"""Gradients with a NaN or an infinity: left out, counted, named, and an error where they do not end."""

from __future__ import annotations

import pathlib
import warnings

import pytest
import torch

from sync_worker import Toy, batch, config, launch, make_optimizer, round_robin
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.distributed.diagnostics import Diagnostics
from tsugi_kpool.distributed.nonfinite import NonFiniteError
from tsugi_kpool.distributed.ranks import SyncError

# name -> (fields, whether the optimizer is handed over)
MODES = {
    "synchronous": ({"aggregation_mode": "synchronous"}, True),
    "synchronous, yours to step": ({"aggregation_mode": "synchronous"}, False),
    "planned": ({"trigger": "relative", "buffer_capacity": 3}, True),
    "planned, yours to step": ({"trigger": "relative", "buffer_capacity": 3, "lr_scaling": "none"}, False),
    "stepwise": ({"buffer_capacity": 3}, True),
    "local": ({"trigger": "relative", "hold_action": "local", "buffer_capacity": 3}, True),
    "discard": ({"trigger": "relative", "hold_action": "discard", "buffer_capacity": 3}, False),
    "amp": ({"trigger": "relative"}, True),
}
BAD = {"nan": float("nan"), "inf": float("inf"), "overflow": 3e38}


class Log:
    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)

    def close(self):
        pass


def run(rank: int, mode: str, steps: int, bad_at, *, bad="nan", adapters=None, limit=None, no_data=False) -> dict:
    """Train a Toy; ``bad_at(rank, step)`` says where gradients are not finite. What is looked at, per rank."""
    fields, handed_over = MODES[mode]
    model = Toy()
    opt = make_optimizer(model.trained(), "sgd" if fields.get("hold_action") == "discard" else "adamw")
    log = Log()
    aggregator = Aggregator(
        model.adapters(),
        config(**{"nonfinite_limit": limit, **fields}),
        optimizer=opt if handed_over else None,
        diagnostics=log,
    )
    result = {"decisions": [], "error": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for step in range(steps):
                active = round_robin(step)
                model.active = list(active)
                aggregator.before_step(step, active)
                weight = 0.0 if no_data and rank == 1 and step % 2 == 0 else 1.0
                if weight:
                    x, y = batch(0, rank, step)
                    (model(x) - y).square().mean().backward()
                found_inf = False
                if bad_at(rank, step) and weight:
                    for i in active if adapters is None else set(active) & set(adapters):
                        model.adapters()[i][0].grad.fill_(BAD[bad])
                if mode == "amp" and weight:
                    found_inf = torch.tensor([float(bad_at(rank, step))])
                out = aggregator.after_backward(step, active, weight=weight, found_inf=found_inf)
                result["decisions"].append([(d.adapter_idx, d.reason) for d in out])
                if mode == "amp" and weight:
                    result.setdefault("found_inf", []).append(found_inf.item())
                opt.step()
                opt.zero_grad()
            aggregator.flush()
            opt.step()
        except (NonFiniteError, SyncError) as error:
            if isinstance(error, NonFiniteError):
                aggregator.state_dict()  # a checkpoint can still be saved
            result |= {"error": f"{type(error).__name__}: {error}", "step": step}
    result["finite"] = all(bool(torch.isfinite(p).all()) for p in model.trained())
    result["params"] = torch.cat([p.detach().flatten() for p in model.trained()])
    result["warned"] = [str(w.message) for w in caught if "infinity" in str(w.message)]
    result["rows"] = log.rows
    result["held"] = aggregator.held
    aggregator.close()
    return result


def everywhere(rank, step):
    return step >= 4


def on_rank_1(rank, step):
    return rank == 1 and step >= 4


def nowhere(rank, step):
    return False


pytestmark = pytest.mark.filterwarnings("ignore:lr_scaling is")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_one_process_says_that_nothing_came_and_stays_finite(mode, bad):
    result = run(0, mode, 24, everywhere, bad=bad)
    check_nothing_came(mode, [result], (0,))


def check_nothing_came(mode, results, ranks):
    for result in results:
        assert result["finite"] and result["error"] is None
        late = {reason for step in result["decisions"][18:] for _, reason in step}
        # A hidden FIRE is on its way when its decision is returned; after one that came to nothing it is waited for.
        assert late <= {"hold_nonfinite", "hold_variance"} and "hold_nonfinite" in late, late
        assert result["decisions"] == results[0]["decisions"]
        rows = [row for row in result["rows"] if row["step"] >= 4]
        applied = [row for row in rows if row["decision"] == "FIRE" and row["step"] - row["m"] * 2 >= 4]
        assert mode == "amp" or not applied, applied
        assert sum(row["nonfinite"] for row in rows) >= 10
        if mode == "amp":  # a scaler that looks for its scale is no news
            assert result["warned"] == []
        else:
            (warned,) = result["warned"]
            for rank in ranks:
                assert str(rank) in warned.split(":", 1)[1]
            assert "adapter" in warned and "step" in warned


@pytest.mark.parametrize("mode", MODES)
def test_one_process_stops_at_the_limit(mode):
    result = run(0, mode, 60, everywhere, limit=4)
    assert result["error"].startswith("NonFiniteError: adapter") and "nonfinite_limit is 4" in result["error"]
    assert result["step"] < 30 and result["finite"]


@pytest.mark.parametrize("mode", MODES)
def test_now_and_then_is_no_failure(mode):
    result = run(0, mode, 40, lambda rank, step: step % 4 < 2, limit=3)
    assert result["error"] is None and result["finite"]
    clean = run(0, mode, 8, nowhere, limit=1)
    assert clean["error"] is None and clean["warned"] == []
    assert all(row["nonfinite"] == 0 for row in clean["rows"])


def test_only_some_adapters():
    result = run(0, "planned, yours to step", 30, everywhere, adapters=(0,))
    late = {pair for step in result["decisions"][18:] for pair in step}
    assert (0, "hold_nonfinite") in late and (0, "fire") not in late and (1, "fire") in late
    assert "adapter 0" in result["warned"][0]


def test_a_scaler_that_unscales_later_still_finds_the_overflow():
    """In one process that is synchronous, gradients are the caller's, scaled or not."""
    model, scaler = Toy(), torch.amp.GradScaler("cpu", init_scale=4.0)
    opt = make_optimizer(model.trained())
    aggregator = Aggregator(model.adapters(), config(aggregation_mode="synchronous"), optimizer=opt)
    for step in range(4):
        active = round_robin(step)
        model.active = list(active)
        aggregator.before_step(step, active)
        x, y = batch(0, 0, step)
        scaler.scale((model(x) - y).square().mean()).backward()
        if step == 1:
            model.adapters()[active[0]][0].grad[0, 0] = float("inf")
        aggregator.after_backward(step, active)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert scaler.get_scale() == 2.0 and all(bool(torch.isfinite(p).all()) for p in model.trained())
    # Without a scaler, the optimizer does not see the gradient either.
    start = [p.detach().clone() for p in model.adapters()[0]]
    aggregator.before_step(4, (0,))
    for p in model.adapters()[0]:
        p.grad = torch.full_like(p, float("nan"))
    aggregator.after_backward(4, (0,))
    opt.step()
    assert all(torch.equal(p, s) for p, s in zip(model.adapters()[0], start))


# ---- two ranks -------------------------------------------------------------------------------------------------------

RUNS = [(mode, where) for mode in MODES for where in (everywhere, on_rank_1)]


def several(rank: int) -> dict:
    results = {(mode, where.__name__): run(rank, mode, 24, where) for mode, where in RUNS}
    for mode in MODES:
        results[mode, "limit"] = run(rank, mode, 60, on_rank_1, limit=4)
    results["overflow"] = run(rank, "synchronous", 12, everywhere, bad="overflow")
    results["no data"] = run(rank, "amp", 12, lambda rank, step: rank == 0 and step == 5, no_data=True)
    results["one scaler"] = {"error": one_scaler(rank, first=0)}
    results["one scaler later"] = {"error": one_scaler(rank, first=3)}
    return results


def one_scaler(rank: int, first: int) -> str:
    """Rank 0 gives found_inf from step ``first`` on, rank 1 never."""
    model = Toy()
    aggregator = Aggregator(model.adapters(), config(trigger="relative", lr_scaling="none", sync_timeout_s=60.0))
    try:
        for step in range(12):
            active = round_robin(step)
            aggregator.before_step(step, active)
            for p in model.trained():
                p.grad = torch.ones_like(p)
            aggregator.after_backward(step, active, found_inf=torch.zeros(1) if rank == 0 and step >= first else False)
    except SyncError as error:
        return str(error)
    finally:
        aggregator.close()
    return "no error"


@pytest.fixture(scope="module")
def two_ranks():
    return launch(2, several, timeout=280)


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_say_that_nothing_came(two_ranks, mode):
    results = [rank[mode, "everywhere"] for rank in two_ranks]
    check_nothing_came(mode, results, (0, 1))
    assert torch.equal(results[0]["params"], results[1]["params"])


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_that_is_never_finite_is_named_and_ends_at_the_limit(two_ranks, mode):
    results = [rank[mode, "on_rank_1"] for rank in two_ranks]
    assert torch.equal(results[0]["params"], results[1]["params"])
    for result in results:
        assert result["finite"] and result["error"] is None
        if mode != "amp":
            (warned,) = result["warned"]
            assert "rank 1 had" in warned
    limits = [rank[mode, "limit"] for rank in two_ranks]
    assert limits[0]["error"] == limits[1]["error"] and limits[0]["step"] == limits[1]["step"] < 30
    assert limits[0]["error"].startswith("NonFiniteError: adapter") and "rank 1 had no finite" in limits[0]["error"]


def test_shares_that_overflow_when_added_are_not_applied(two_ranks):
    for result in (rank["overflow"] for rank in two_ranks):
        assert result["finite"] and "hold_nonfinite" in {row["reason"] for row in result["rows"]}


def test_a_rank_without_data_takes_part_in_what_scalers_agree_on(two_ranks):
    first, second = (rank["no data"] for rank in two_ranks)
    assert first["error"] is None and torch.equal(first["params"], second["params"])
    assert first["found_inf"] == [float(step == 5) for step in range(12)]
    assert second["found_inf"] == [float(step == 5) for step in range(1, 12, 2)]


def test_a_scaler_on_one_rank_alone_is_an_error_on_all(two_ranks):
    for key in ("one scaler", "one scaler later"):
        first, second = (rank[key]["error"] for rank in two_ranks)
        assert first == second and "found_inf" in first and "on every rank that has data" in first
    assert "rank 1 gave no found_inf tensor" in two_ranks[0]["one scaler"]["error"]


# ---- telemetry -------------------------------------------------------------------------------------------------------


def row(step=0, decision="FIRE"):
    return {"step": step, "decision": decision, "m": 2, "bytes": 10, "waited_ms": 1.0, "nonfinite": 1}


@pytest.mark.parametrize("how", ["full", "closed", "denied", "a file is in the way", "a disk that takes half"])
def test_a_disk_that_fails_is_said_once_and_tried_again(tmp_path, monkeypatch, how):
    log = Diagnostics(tmp_path / "logs")
    log.write(row(0))
    real = Diagnostics._opened

    class Half:
        def __init__(self, file):
            self.file = file

        def fileno(self):
            return self.file.fileno()

        def write(self, line):
            return self.file.write(line[: len(line) // 2])

        def truncate(self, size):
            return self.file.truncate(size)

    def failing(self):
        if how == "a disk that takes half":
            return Half(real(self))
        raise {
            "full": OSError(28, "No space left on device"),
            "closed": ValueError("I/O operation on closed file"),
            "denied": PermissionError(13, "Permission denied"),
            "a file is in the way": NotADirectoryError(20, "Not a directory"),
        }[how]

    monkeypatch.setattr(Diagnostics, "_opened", failing)
    with pytest.warns(RuntimeWarning, match="decisions-rank0.jsonl cannot be written"):
        log.write(row(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log._again_at = 0.0
        log.write(row(2))
        monkeypatch.setattr(Diagnostics, "_opened", real)
        log.write(row(3))  # not yet
        log._again_at = 0.0
        log.write(row(4))
        log.close()
        log.write(row(5))
    assert [line.split(b'"step": ')[1][:1] for line in log.path.read_bytes().splitlines()] == [b"0", b"4"]
    scalars = log.scalars()
    assert (scalars["kpool/fire"], scalars["kpool/nonfinite"], scalars["kpool/dropped_lines"]) == (6.0, 6.0, 4.0)


def test_a_folder_that_is_deleted_is_made_again_and_one_that_cannot_be_made_is_said_at_once(tmp_path):
    log = Diagnostics(tmp_path / "logs")
    log.write(row(0))
    log.path.unlink()
    log.path.parent.rmdir()
    log.write(row(1))
    assert log.path.read_bytes().count(b"\n") == 1 and log.dropped == 0
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        blocked = Diagnostics(tmp_path / "file" / "logs")
    blocked.write(row(0))
    assert blocked.dropped == 1


def test_a_full_disk_does_not_change_training(tmp_path):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "decisions-rank0.jsonl").symlink_to("/dev/full")

    def trained(log):
        model = Toy()
        opt = make_optimizer(model.trained())
        aggregator = Aggregator(model.adapters(), config(trigger="relative"), optimizer=opt, diagnostics=log)
        for step in range(6):
            model.active = list(round_robin(step))
            aggregator.before_step(step, round_robin(step))
            x, y = batch(0, 0, step)
            (model(x) - y).square().mean().backward()
            aggregator.after_backward(step, round_robin(step))
        aggregator.flush()
        return torch.cat([p.detach().flatten() for p in model.trained()])

    with pytest.warns(RuntimeWarning, match="No space left"):
        log = Diagnostics(tmp_path)
        ours = trained(log)
    assert torch.equal(ours, trained(None)) and log.dropped > 0 and log.scalars()["kpool/fire"] > 0
