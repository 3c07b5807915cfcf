"""Where the sideband begins: the ranks' meeting in the store, and the key file. Nobody waits for ever, and everybody is told."""

import os
import secrets
import signal
import socket
import time

import pytest

import sideband_worker
from test_sideband import ALIVE, until

SLACK = 10  # seconds, for a busy machine


@pytest.fixture(scope="module")
def ranks():
    workers = sideband_worker.launch(3, hosts=3)
    yield workers
    for worker in workers:
        worker.kill()


def key_file(folder, text=None, mode=0o600):
    path = folder / "key"
    path.write_text(secrets.token_hex(32) if text is None else text)
    path.chmod(mode)
    return str(path)


def everywhere(workers, name, **options):
    """The answers of these ranks to one call."""
    for rank in workers:
        rank.call(name, **options)
    return [rank.answer() for rank in workers]


@pytest.mark.parametrize("present", [(0,), (1,), (0, 2)])
def test_a_rank_whose_sideband_is_off_is_named_within_the_limit_and_all_can_start_later(ranks, present):
    listening = [rank.do("listening") for rank in ranks]
    for rank in present:
        ranks[rank].call("start", timeout_s=1.5)
    absent = [rank for rank in range(3) if rank not in present]
    for rank in present:
        _, (kind, message, missing), seconds = ranks[rank].answer(SLACK)
        assert kind == "SyncError" and list(missing) == absent and 1.4 < seconds < 1.5 + SLACK
        assert f"{', '.join(map(str, absent))} did not come within 1.5 s" in message and "sideband_enabled" in message
    assert [rank.do("listening") for rank in ranks] == listening
    assert [answer[:2] for answer in everywhere(ranks, "start", timeout_s=60.0)] == [(0, None), (1, None), (2, None)]
    assert all(rank.do("stop") for rank in ranks)


def test_ctrl_c_ends_the_wait(ranks):
    ranks[1].call("start", timeout_s=600.0)
    time.sleep(0.5)
    os.kill(ranks[1].process.pid, signal.SIGINT)
    begun = time.monotonic()
    _, (kind, _, _), _ = ranks[1].answer(SLACK)
    assert kind == "KeyboardInterrupt" and time.monotonic() - begun < 2 + 2  # two of them for a busy machine


def test_what_one_host_cannot_do_every_host_is_told(ranks, tmp_path):
    good, loose = key_file(tmp_path), tmp_path / "loose"
    loose.write_text(secrets.token_hex(32))
    loose.chmod(0o644)
    listening = [rank.do("listening") for rank in ranks]
    for rank, psk_file in zip(ranks, (good, good, str(loose))):
        rank.call("start", timeout_s=30.0, psk_file=psk_file)
    for rank, who in zip(ranks, ("the sideband of rank 2 could not start", "the sideband of rank 2", "sideband: key")):
        _, (kind, message, _), seconds = rank.answer()
        assert kind == "ValueError" and message.startswith(who) and "0644" in message and seconds < SLACK
    for rank, psk_file in zip(ranks, (good, None, good)):
        rank.call("start", timeout_s=30.0, psk_file=psk_file)
    for rank in ranks:
        _, (kind, message, _), _ = rank.answer()
        assert kind == "ValueError" and "rank 0 has a key file and rank 1 none" in message
    assert [rank.do("listening") for rank in ranks] == listening, "a port is kept by what failed"


def test_groups_of_some_ranks_meet_apart(ranks):
    for members in ([0, 2], [0, 1]):
        everywhere(ranks, "make_group", members=members)
    for members in ([0, 2], [0, 1], [0, 2]):
        some = [ranks[rank] for rank in members]
        assert [a[:2] for a in everywhere(some, "start", members=members, timeout_s=30.0)] == [(0, None), (1, None)]
        assert all(rank.do("stop") for rank in some)


def test_a_store_that_does_not_answer_ends_in_a_sentence_and_by_ctrl_c(ranks):
    os.kill(ranks[0].process.pid, signal.SIGSTOP)  # it holds the store
    try:
        ranks[1].call("start", timeout_s=1.5)
        ranks[2].call("start", timeout_s=600.0)
        _, (kind, message, _), seconds = ranks[1].answer(SLACK)
        assert kind == "SyncError" and "store did not answer within 1.5 s" in message and seconds < 1.5 + SLACK
        os.kill(ranks[2].process.pid, signal.SIGINT)
        begun = time.monotonic()
        assert ranks[2].answer(SLACK)[1][0] == "KeyboardInterrupt" and time.monotonic() - begun < 2 + 2
    finally:
        os.kill(ranks[0].process.pid, signal.SIGCONT)


def fifo(path):
    os.mkfifo(path, 0o600)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def of_nobody(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    "make, says",
    [
        (fifo, "it is a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.symlink_to("/dev/tty"), "device"),
        (lambda path: path.mkdir(), "it is a directory"),
        (unix_socket, "socket"),
        (lambda path: None, "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (of_nobody, "it belongs to user 65534"),
        (lambda path: (fifo(path.with_name("pipe")), path.symlink_to(path.with_name("pipe"))), "it is a FIFO"),
    ],
    ids=["fifo", "zero", "tty", "directory", "socket", "missing", "loop", "owner", "link-to-fifo"],
)
def test_what_is_no_key_file_is_a_sentence_at_once(tmp_path, reader, make, says):
    path = tmp_path / "key"
    make(path)
    reader.call("read_key", path=str(path))
    result, error, _ = reader.answer(SLACK)  # a hang ends here
    assert result is None and error[0] == "ValueError", error
    assert str(path) in error[1] and (says in error[1] or says == "device" and "No such device" in error[1])


@pytest.fixture(scope="module")
def reader():
    worker = sideband_worker.Worker().up()
    yield worker
    worker.kill()


def test_one_agent_a_host_finds_the_others_through_the_store(monkeypatch):
    monkeypatch.delenv("KPOOL_PSK_FILE", raising=False)
    workers = sideband_worker.launch(3, hosts=2)
    try:
        started = everywhere(
            workers, "start", timeout_s=60.0, address="127.0.0.1:51820"
        )  # one of two can have the port
        assert [answer[:2] for answer in started] == [(0, None), (1, None), (0, None)]
        until(lambda: [worker.do("states") for worker in workers] == [[ALIVE], [ALIVE], []], 30)
        assert all(worker.do("stop") for worker in workers)
        assert [worker.do("states") for worker in workers] == [[], [], []]
    finally:
        for worker in workers:
            worker.kill()
