"""A pool's state: a run goes on bit for bit, files are whole or old, and no damage is loaded."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import resource
import sys

import pytest
import torch

from pool_models import adapters, loss_of, pool_by_hand, pool_model
from tsugi_kpool import KPoolLoraConfig, attach
from tsugi_kpool.distributed import state as state_
from tsugi_kpool.distributed.nonfinite import NonFiniteError

HELD = dict(aggregation_mode="buffer_convergence", trigger="relative", relative_theta=0.5, buffer_capacity=6)
SETTINGS = {
    "synchronous": dict(),
    "planned": HELD,
    "stepwise": HELD | dict(trigger="variance", buffer_convergence_eps=1e-3, routing_strategy="loss_aware"),
    "yours to step": HELD | dict(overlap=False, lr_scaling="none"),
    "local": HELD | dict(hold_action="local"),
    "discard": HELD | dict(hold_action="discard"),
}


class Run:
    """A model, its optimizer and its pool."""

    def __init__(self, n=4, **settings):
        torch.manual_seed(0)  # for the base
        self.model = pool_model(n=n, k=2, **settings)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.pool = attach(self.model, optimizer=self.optimizer)

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            with self.pool.step():
                loss = loss_of(self.model, self.pool.current_step)
                loss.backward()
                self.pool.record_loss(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def others(self):
        """The model's and the optimizer's states, as of now."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def put_back(self, others) -> Run:
        self.model.load_state_dict(others[0])
        self.optimizer.load_state_dict(others[1])
        return self


def same(one: Run, other: Run) -> bool:
    theirs = adapters(other.model)
    return all(torch.equal(value, theirs[name]) for name, value in adapters(one.model).items())


def content(state: dict) -> str:
    """What a state says, but for how often it was resumed."""
    return state_.checksum({**state, "aggregator": {**state["aggregator"], "epoch": 0}})


def signed(state: dict) -> dict:
    return {**state, "checksum": state_.checksum(state)}


def as_version_1(state: dict) -> dict:
    """As tsugi-kpool made it before states had a checksum."""
    aggregator = {k: v for k, v in state["aggregator"].items() if k not in ("agreement", "capacity")}
    aggregator["version"] = 1
    aggregator["adapters"] = [{k: v for k, v in e.items() if k != "flight"} for e in aggregator["adapters"]]
    if aggregator["pending"] is not None:
        aggregator["pending"] = tuple(aggregator["pending"])
    kept = {key: state[key] for key in ("step", "active", "router")}
    return {**kept, "aggregator": aggregator}


# ---- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_on_bit_for_bit_from_a_file(name, finish, tmp_path):
    """Also where the model and the optimizer were saved first, with reduces in flight."""
    if name == "discard" and not finish:
        pytest.skip("what is thrown away is not worth a place in the state")
    for steps in (1, 7, 8):
        run = Run(**SETTINGS[name]).train(steps)
        before = run.others()
        run.pool.save(tmp_path / "state.pt", finish=finish)
        others = run.others() if finish else before
        resumed = Run(**SETTINGS[name]).put_back(others)
        resumed.pool.load(tmp_path / "state.pt")
        assert resumed.pool.current_step == steps and resumed.pool.counts == run.pool.counts
        for each in (run, resumed):
            each.train(9)
            each.pool.flush()
        assert same(run, resumed), steps
        assert content(resumed.pool.state_dict()) == content(run.pool.state_dict())


@pytest.mark.parametrize("name", ["synchronous", "planned", "stepwise", "yours to step", "local"])
def test_states_of_version_1_load(name, tmp_path):
    run = Run(**SETTINGS[name]).train(7)
    old = as_version_1(run.pool.state_dict())
    others = run.others()
    for state in (old, {**old, "step": old["step"] - 1}):  # Ctrl-C in the exchange left the pool a step behind
        resumed = Run(**SETTINGS[name]).put_back(others)
        resumed.pool.load_state_dict(state)
        assert content(resumed.pool.state_dict()) == content({**run.pool.state_dict(), "counts": resumed.pool.counts})
    file = tmp_path / "kpool_state_rank0.pt"
    torch.save({"step": 7, "parameters": 11, "pool": old}, file)  # as KPoolCallback wrote it
    assert state_.read(file)["extra"] == {"step": 7, "parameters": 11}
    resumed.pool.load(tmp_path)
    assert same(run.train(6), resumed.train(6))


def steps_until_refused(run: Run, most: int) -> int:
    """Train on a loss that is NaN: the steps until that is an error, or all of them."""
    for step in range(most):
        try:
            with run.pool.step():
                (loss_of(run.model, 0) * float("nan")).backward()
        except NonFiniteError:
            return step
        run.optimizer.step()
        run.optimizer.zero_grad()
    return most


@pytest.mark.parametrize("name", ["synchronous", "planned", "stepwise"])
def test_steps_without_a_finite_gradient_are_counted_on(name):
    """A run that is resumed ends where the run that was not would have."""
    settings = {**SETTINGS[name], "routing_strategy": "round_robin", "nonfinite_limit": 7}
    whole = steps_until_refused(Run(**settings), 100)
    assert 7 < whole < 100
    for before in (3, whole - 2):
        run, resumed = Run(**settings), Run(**settings)
        steps_until_refused(run, before)
        resumed.pool.load_state_dict(run.pool.state_dict())
        assert before + steps_until_refused(resumed, 100) == whole


def test_a_state_from_before_these_fields_counts_from_where_it_is():
    settings = {**SETTINGS["synchronous"], "nonfinite_limit": 7}
    run, resumed = Run(**settings), Run(**settings)
    whole = steps_until_refused(run, 100)
    older = run.pool.state_dict()
    for entry in older["aggregator"]["adapters"]:
        for field in state_.LATER:
            del entry[field]
    resumed.pool.load_state_dict(signed(older))
    assert steps_until_refused(resumed, 100) == whole


def test_a_state_survives_where_others_store_it(tmp_path):
    run = Run(**HELD).train(5)
    state = run.pool.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), torch.load(io.BytesIO(buffer.getvalue()))):
        resumed = Run(**HELD)
        resumed.pool.load_state_dict(copied)
        assert content(resumed.pool.state_dict()) == content(state)


def test_the_pool_by_hand_and_a_pool_of_another_name_are_the_same_pool(tmp_path):
    """Names in the state are those of a checkpoint."""
    run = Run(**HELD).train(5)
    run.pool.save(tmp_path)
    attach(pool_model(n=4, k=2, name="other", **HELD)).load(tmp_path)
    attach(pool_by_hand(n=4), config=KPoolLoraConfig(n_adapters=4, k_active=2, **HELD)).load(tmp_path)


def test_counts_go_on(tmp_path):
    runs = [Run(**HELD, diagnostics_dir=str(tmp_path / str(i))) for i in range(2)]
    runs[0].train(9)
    runs[0].pool.save(tmp_path)
    runs[1].pool.load(tmp_path)
    assert runs[1].pool.scalars() == runs[0].pool.scalars() and runs[0].pool.scalars()["kpool/fire"] > 0
    fires, holds = (runs[1].pool.counts[kind] for kind in ("fire", "hold"))
    assert fires + holds == 9 * 2
    runs[1].train(1)
    assert sum(runs[1].pool.counts.values()) == fires + holds + 2


# ---- what is refused ---------------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """The path of everything in a state, inner nodes too."""
    if path:
        yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, child in children:
        yield from leaves(child, (*path, key))


def edited(value, path, edit):
    """A copy with ``edit`` applied at a path."""
    if not path:
        return edit(value)
    inner = edited(value[path[0]], path[1:], edit)
    if isinstance(value, dict):
        return {**value, path[0]: inner}
    return [*value[: path[0]], inner, *value[path[0] + 1 :]]


def of_another_kind(value):
    """Values that are not of this one's kind, or not in its range."""
    if isinstance(value, torch.Tensor):
        yield from ([0.0], value.double() if value.dtype == torch.float32 else value.float(), value.unsqueeze(0))
        yield from (value[:1], torch.cat((value, value)), torch.full_like(value, float("nan")), value.to_sparse())
        yield from (value.to("meta"), torch.full_like(value, float("inf")))
    elif isinstance(value, bool):
        yield from ("yes", 1, 0.5)
    elif isinstance(value, int):
        yield from (str(value), float(value), bool(value), -2, 10**9, [value], torch.tensor(value))
    elif isinstance(value, float):
        yield from (str(value), [value], {}, int(value) if value == value else 0, torch.tensor(value))
    elif isinstance(value, str):
        yield from (5, [value], value + "x", b"x")
    elif value is None:
        yield from ("None", {}, 10**9, object)
    elif isinstance(value, dict):
        yield from ([], None, 5, {**value, "more": 1}, {**value, 3: 1})
    else:
        yield from ({}, "list", 7, [*value, *value, "more"])


# What may be anything of its kind: it is the caller's own, or is None where a fact is not known.
FREE = {"extra", "telemetry", "counts", "capacity"}


@pytest.mark.parametrize("name", ["planned", "stepwise", "local"])
def test_nothing_that_was_changed_is_loaded(name):
    """Every place of a state, dropped or of another kind, with the old checksum and with a new one."""
    state = Run(**SETTINGS[name]).train(7).pool.state_dict(finish=False)
    run = Run(**SETTINGS[name]).train(3)
    before = content(run.pool.state_dict())
    tried = loaded = 0

    def refuse(wrong, what, must=True):
        nonlocal tried, loaded
        tried += 1
        try:
            run.pool.load_state_dict(wrong)
        except ValueError as error:
            assert len(str(error)) > 40 and content(run.pool.state_dict()) == before, what
        else:
            assert not must, what
            # Whoever signs anew gets what he signed.
            assert content(run.pool.state_dict(finish=False)) == content(wrong), what
            loaded += 1
            run.pool.load_state_dict(start)

    start = run.pool.state_dict()
    before = content(run.pool.state_dict())
    chosen = random.Random(0)
    for path in leaves(state):
        for value in of_another_kind(_at(state, path)):
            wrong = edited(state, path, lambda _: value)
            refuse(wrong, (path, value))
            if FREE.isdisjoint(path) and not isinstance(value, type) and chosen.random() < 0.3:
                refuse(_signed_if_possible(wrong), (path, value, "signed"), must=False)
        if isinstance(path[-1], str):
            dropped = edited(state, path[:-1], lambda inner: {k: v for k, v in inner.items() if k != path[-1]})
            refuse(dropped, path)
            if path[-1] in state_.LATER:
                continue
            refuse(
                _signed_if_possible(dropped), (path, "signed"), must=FREE.isdisjoint(path) and path[-1] != "checksum"
            )
    assert tried > 500 and loaded < tried / 10
    for wrong in (None, 5, "state", [], [state, None], {}, {"version": 2}, {"ranks": []}, torch.zeros(3)):
        refuse(wrong, wrong)


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def _signed_if_possible(state):
    try:
        return signed(state)
    except Exception:  # not every damage has a checksum
        return state


@pytest.mark.parametrize("edit", ["finish", "bits"])
def test_a_bit_that_changes_is_seen(edit):
    state = Run(**HELD).train(7).pool.state_dict(finish=edit == "finish")
    pool = Run(**HELD).pool
    held = next(i for i, e in enumerate(state["aggregator"]["adapters"]) if e["held"])
    state["aggregator"]["adapters"][held]["sum"].view(torch.int32)[5] ^= 1
    with pytest.raises(ValueError, match="checksum is '.*', but the content has '.*': the state is damaged"):
        pool.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(version=999), "version is 999, .* by a newer tsugi-kpool; install it"),
        (lambda s: s["aggregator"].update(step="x"), "aggregator.step is 'x', expected a whole number of at least -1"),
        (lambda s: s["aggregator"]["adapters"][0].update(held=10**9), r"adapters\[0\].held is 1000000000, which is more"),
        (lambda s: s["aggregator"]["adapters"][1]["sum"].fill_(float("nan")), r"\[1\].sum has 177 elements that are not fin"),
        (lambda s: s["aggregator"]["adapters"][1].update(sum=torch.ones(1)), r"\[1\].sum is a tensor of shape \[1\].*\[177\]"),
        (lambda s: s["aggregator"]["adapters"][0].update(bound=7), r"\[0\].bound is 7, above the capacity of 6"),
        (lambda s: s["router"].pop("losses"), "router.losses is missing"),
        (lambda s: s["router"].update(losses=[None]), r"router.losses is a list of length 1, expected a list of length 4"),
        (lambda s: s.update(active=[1, 1]), r"active is \[1, 1\], expected different adapters below 4"),
        (lambda s: s.update(later=1), "later is not known to this version"),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_its_value(change, said):
    state = copy.deepcopy(Run(**HELD).train(7).pool.state_dict(finish=False))
    change(state)
    run = Run(**HELD).train(2)
    before = content(run.pool.state_dict())
    with pytest.raises(ValueError, match=said):
        run.pool.load_state_dict(signed(state))
    assert content(run.pool.state_dict()) == before


def test_the_version_of_an_old_state_counts_too():
    old = as_version_1(Run(**HELD).train(3).pool.state_dict())
    old["aggregator"]["version"] = 999
    with pytest.raises(ValueError, match="aggregator.version is 999, .*newer tsugi-kpool; install it"):
        Run(**HELD).pool.load_state_dict(old)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            dict(r=4),
            r"a parameter of adapter 0 is first.lora_A.adapter_0.weight of shape \[3, \d+\] in the state, .*\[4, ",
        ),
        (dict(target_modules=["first"]), "adapter 0 has 4 parameters in the state, 2 here"),
        (dict(target_modules=["second"]), "adapter 0 has 4 parameters in the state, 2 here"),
        (dict(n=5), "router's n is 4 in the state, 5 here"),
        (dict(routing_seed=1), "router's seed is 0 in the state, 1 here"),
        (dict(trigger="variance"), "agreement='planned', but this is 'stepwise'"),
        (dict(aggregation_mode="synchronous"), "agreement='planned', but this is 'none'"),
        (dict(hold_action="local"), "hold_action='defer', but this is 'local'"),
    ],
)
def test_a_state_of_another_pool_is_refused(other, said):
    state = Run(**HELD).train(3).pool.state_dict()
    run = Run(**HELD | other).train(1)
    before = content(run.pool.state_dict())
    with pytest.raises(ValueError, match=f"{said}.*nothing was loaded"):
        run.pool.load_state_dict(state)
    assert content(run.pool.state_dict()) == before


def test_the_same_number_of_elements_is_not_the_same_model():
    """Two layers whose shapes add up alike."""
    one, other = pool_model(n=4, k=2, target_modules=["first"]), pool_model(n=4, k=2, target_modules=["second"])
    sizes = [sum(p.numel() for p in attach(model).adapter_params[0]) for model in (one, other)]
    state = attach(copy.deepcopy(one)).state_dict()
    state["parameters"] = [
        [[name.replace("first", "third"), shape] for name, shape in own] for own in state["parameters"]
    ]
    with pytest.raises(ValueError, match=r"adapter 0 is third.lora_A.adapter_0.weight .* here: nothing was loaded"):
        attach(copy.deepcopy(one)).load_state_dict(signed(state))
    assert sizes[0] != 0


def test_loading_inside_a_step_is_refused():
    run = Run(**HELD).train(3)
    state = run.pool.state_dict()
    with pytest.raises(RuntimeError, match="step 3 is open"):
        with run.pool.step():
            run.pool.load_state_dict(state)
    assert run.pool.current_step == 3


def test_another_capacity_may_go_on():
    run = Run(**HELD).train(7)
    smaller = Run(**HELD | dict(buffer_capacity=2)).put_back(run.others())
    smaller.pool.load_state_dict(run.pool.state_dict())
    smaller.train(12)
    assert max(smaller.pool.held) <= 2


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run = Run(**HELD).train(7)
    return run, run.pool.save(folder / "state.pt").read_bytes()


def test_a_damaged_file_is_refused_whole(saved, tmp_path):
    """Cut at every 100th byte, and bytes flipped anywhere."""
    original, data = saved
    run = Run(**HELD).train(2)
    before, file = content(run.pool.state_dict()), tmp_path / "state.pt"
    rng = random.Random(0)
    flips = [rng.randrange(len(data)) for _ in range(60)]
    damaged = [data[:length] for length in range(0, len(data), 100)]
    damaged += [data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :] for i in flips]
    damaged += [data + b"more", data[100:], b"\0" * len(data), data[: len(data) // 2] * 2]
    refused = 0
    for bad in damaged:
        file.write_bytes(bad)
        try:
            run.pool.load(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and content(run.pool.state_dict()) == before
        else:  # a byte that says nothing, as those between records
            assert content(run.pool.state_dict()) == content(original.pool.state_dict())
            run = Run(**HELD).train(2)
    assert refused > len(data) // 100


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_files_that_are_no_states_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(**HELD).train(2)
    before = content(run.pool.state_dict())
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not torch")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    torch.save(run.model.state_dict(), tmp_path / "model")
    torch.save({"aggregator": Code(), "router": None}, tmp_path / "code")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Code()))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, kind, said in [
        ("empty", ValueError, "is empty"),
        ("text", ValueError, "cannot be read as a file of torch.save"),
        ("tensor", ValueError, r"is a tensor of shape \[3\]"),
        ("model", ValueError, "not the state of a pool"),
        ("code", ValueError, "holds objects that only code can make, which is not run"),
        ("pickle", ValueError, "cannot be read as a file of torch.save"),
        ("folder", FileNotFoundError, "could not be read from .*kpool_state_rank0.pt"),
        ("missing", FileNotFoundError, "could not be read from .*nothing was loaded"),
        ("fifo", OSError, "could not be read"),
    ]:
        with pytest.raises(kind, match=said) as caught:
            run.pool.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert content(run.pool.state_dict()) == before
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="empty list"):
        run.pool.load([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(saved, tmp_path):
    (tmp_path / "state.pt").write_bytes(saved[1])
    (tmp_path / "state.pt").chmod(0)
    with pytest.raises(PermissionError, match="state.pt"):
        Run(**HELD).pool.load(tmp_path / "state.pt")


def test_a_file_is_written_whole_or_the_old_one_stays(saved, tmp_path, monkeypatch):
    run = Run(**HELD).train(3)
    file = run.pool.save(tmp_path / "state.pt")
    old = file.read_bytes()
    run.train(3)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the disk is full
    try:
        with pytest.raises(OSError, match="could not be written to .*state.pt .*what was there before is as it was"):
            run.pool.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == old and os.listdir(tmp_path) == ["state.pt"]

    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, place, _interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.pool.save(file)
        assert file.read_bytes() == old and os.listdir(tmp_path) == ["state.pt"]

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written to .*file/below/state.pt"):
        run.pool.save(tmp_path / "file" / "below" / "state.pt")
    run.pool.save(file)
    assert state_.read(file)["step"] == 6


def _interrupted(*_):
    raise KeyboardInterrupt


def test_where_files_are(tmp_path):
    run = Run(**HELD).train(1)
    assert run.pool.save(tmp_path) == tmp_path / "kpool_state_rank0.pt"
    assert run.pool.save(f"{tmp_path}/new/") == tmp_path / "new" / "kpool_state_rank0.pt"
    assert run.pool.save(str(tmp_path / "a" / "b.pt"), extra={"epoch": 3}) == tmp_path / "a" / "b.pt"
    assert state_.read(tmp_path / "a" / "b.pt")["extra"] == {"epoch": 3}
    for path in (tmp_path, f"{tmp_path}/new/", tmp_path / "a" / "b.pt", [tmp_path / "a" / "b.pt"]):
        run.pool.load(path)
    with pytest.raises(ValueError, match=r"extra\['x'\] is a list of length 0, expected a number, a string"):
        run.pool.save(tmp_path, extra={"x": []})


def test_the_model_card_says_how_a_pool_is_loaded(tmp_path):
    """Stock PEFT knows no KPOOL, and cannot be taught by a file."""
    model = pool_model(n=4, k=2, name="other")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        pool_model(n=4, k=2).save_pretrained(tmp_path)
    for card in (tmp_path / "README.md", tmp_path / "other" / "README.md"):
        text = card.read_text()
        assert text.count("KeyError: 'KPOOL'") == 1 and "\nimport tsugi_kpool" in text
    KPoolLoraConfig().save_pretrained(tmp_path / "configuration")
    assert os.listdir(tmp_path / "configuration") == ["adapter_config.json"]


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------------


class At:
    """Raises KeyboardInterrupt before the n-th line that runs in the pool's own files."""

    FILES = ("training.py", "aggregator.py")
    # Within a step of torch's optimizer some parameters have moved and others have not, which nobody can resume.
    OPTIMIZER = ("_step_optimizer", "_counted_as")

    def __init__(self, n: int):
        self.left = n

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if os.path.basename(code.co_filename) not in self.FILES or code.co_name in self.OPTIMIZER:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("name", ["synchronous", "planned", "stepwise", "local"])
def test_a_state_saved_after_ctrl_c_goes_on(name, tmp_path):
    """Wherever it came in a step: the pool and its aggregator are at one step, and the run ends."""
    settings = SETTINGS[name] | dict(routing_strategy="round_robin")
    start = Run(**settings).train(6)
    state, others = start.pool.state_dict(), start.others()
    interrupted, n = 0, 1
    while True:
        run = Run(**settings).put_back(others)
        run.pool.load_state_dict(state)
        tracer = sys.gettrace()
        sys.settrace(At(n))
        try:
            run.train(2)
            ended = True
        except KeyboardInterrupt:
            ended = False
        finally:
            sys.settrace(tracer)
        if ended:
            break
        interrupted += 1
        handler = run.pool.state_dict()
        assert handler["step"] == handler["aggregator"]["step"] + 1 == run.pool.current_step
        resumed = Run(**settings).put_back(run.others())
        resumed.pool.load_state_dict(handler)
        resumed.train(10 - handler["step"])
        resumed.pool.flush()
        assert resumed.pool.current_step == 10 and resumed.pool.held == [0] * 4
        n += 41
    assert interrupted > 5
