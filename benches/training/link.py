"""Two ranks on a slow link, 50 Mbit/s and 20 ms round trip unless told otherwise.

Each rank is a process in a network namespace of its own with one TUN device; a third process carries the packets between
the two devices and gives them their rate and delay. Root and /dev/net/tun are needed; without them this says so and ends.

The link is the only thing between the ranks, so what is printed is end to end. Bound is T_comm / T_comp of the first row:
bytes over the rate plus the round trip, over the time of forward and backward.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import fcntl
import json
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
# Few, large packets: the program that carries them shares the processors with the ranks.
MTU = 9000

SYNCHRONOUS = {"aggregation_mode": "synchronous"}


def methods() -> dict[str, dict | None]:
    from benches.training.small_gpt import every, noise_scale

    return {
        "synchronous, waited": {**SYNCHRONOUS, "wait": True},
        "synchronous, hidden": SYNCHRONOUS,
        **{f"noise scale {cost:g}": noise_scale(cost) for cost in (0.5, 1, 2, 4)},
        "noise scale 2, bf16 wire": {**noise_scale(2), "wire_dtype": "bfloat16"},
        "noise scale 2, stepwise": {**noise_scale(2), "agreement": "stepwise"},
        "relative 1.5": {"trigger": "relative", "relative_theta": 1.5},
        "every 2": every(2),
        "every 4": every(4),
        "no communication": None,
    }


def unavailable() -> str | None:
    """Why the link cannot be made here, as a sentence; None where it can."""
    if os.geteuid() != 0:
        return "the link needs root, to make network namespaces"
    if not os.path.exists("/dev/net/tun"):
        return "the link needs /dev/net/tun, which is missing"
    probe = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no network namespace can be made: {probe.stderr.strip()}"


def open_tun(address: str) -> int:
    """A new namespace for this process, with a TUN device in it; its file descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"kpool", IFF_TUN | IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip addr add {address}/24 dev kpool",
        f"ip link set kpool mtu {MTU} txqueuelen 10000 up",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    return tun


def carry(tuns: list[int], mbit: float, rtt_ms: float) -> None:
    """Move packets between two devices for ever: each direction has its own rate, and half of the round trip as delay."""
    rate, delay = mbit * 1e6 / 8, rtt_ms / 2e3
    free = [0.0, 0.0]  # when the direction's wire is free
    queues: list[collections.deque] = [collections.deque(), collections.deque()]
    while True:
        due = [queue[0][0] for queue in queues if queue]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        readable, _, _ = select.select(tuns, [], [], wait)
        now = time.monotonic()
        for tun in readable:
            k = tuns.index(tun)
            for _ in range(64):
                try:
                    packet = os.read(tun, MTU + 64)
                except BlockingIOError:
                    break
                free[k] = max(free[k], now) + len(packet) / rate
                queues[k].append((free[k] + delay, packet))
        for k, queue in enumerate(queues):
            while queue and queue[0][0] <= now:
                try:
                    os.write(tuns[1 - k], queue[0][1])
                except OSError:
                    pass  # the other side is gone, or full: a lost packet
                queue.popleft()


def rank_main(
    rank: int, channel: socket.socket, pipe: Connection, size: SimpleNamespace, base: str, options: dict
) -> None:
    try:
        tun = open_tun(f"10.77.0.{rank + 1}")
        socket.send_fds(channel, [b"tun"], [tun])
        os.close(tun)
        channel.recv(1)  # the link is up
        os.environ["GLOO_SOCKET_IFNAME"] = "kpool"
        ping = subprocess.run(
            ["python3", "-c", _PING, str(rank)], capture_output=True, text=True, check=True, timeout=30
        )
        import torch
        import torch.distributed as dist

        from benches.training import small_gpt

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method="tcp://10.77.0.1:29400", rank=rank, world_size=2, timeout=timedelta(seconds=120)
        )
        pipe.send(("link", float(ping.stdout)))
        table = methods()
        for name in options["methods"]:
            for seed in options["seeds"]:
                dist.barrier()
                result = small_gpt.run(rank, 2, size, Path(base), table[name], options["lr"], seed)
                pipe.send(("row", (name, seed, result)))
        pipe.send(("end", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        os._exit(0)


# The round trip of one small packet, in ms: rank 1 answers rank 0, five times.
_PING = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 29500)); s.settimeout(1.0)
best = 1e9
if sys.argv[1] == "0":
    for _ in range(8):
        start = time.perf_counter(); s.sendto(b"x", ("10.77.0.2", 29500))
        try:
            s.recv(10); best = min(best, time.perf_counter() - start)
        except OSError:
            pass
else:
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        try:
            _, peer = s.recvfrom(10); s.sendto(b"x", peer)
        except OSError:
            pass
print(best * 1e3)
"""


def measure(size: SimpleNamespace, base: Path, mbit: float, rtt_ms: float, options: dict) -> tuple[float, list[tuple]]:
    """(measured round trip in ms, [(method, seed, the two ranks' results)])."""
    context = multiprocessing.get_context("spawn")
    processes, tuns, channels, pipes = [], [], [], []
    try:
        for rank in range(2):
            ours, theirs = socket.socketpair()
            mine, yours = context.Pipe()
            process = context.Process(
                target=rank_main, args=(rank, theirs, yours, size, str(base), options), daemon=True
            )
            process.start()
            processes.append(process)
            channels.append(ours)
            pipes.append(mine)
        for channel in channels:
            channel.settimeout(60)
            tuns.append(socket.recv_fds(channel, 16, 1)[1][0])
        # The carrier is forked, without torch in it, so that it shares no interpreter with anything.
        link = multiprocessing.get_context("fork").Process(target=carry, args=(tuns, mbit, rtt_ms), daemon=True)
        link.start()
        processes.append(link)
        for channel in channels:
            channel.send(b"1")
        rtt, rows = 0.0, {}
        for rank, pipe in enumerate(pipes):
            while True:
                kind, value = pipe.recv()
                if kind == "error":
                    raise RuntimeError(f"rank {rank}: {value}")
                if kind == "end":
                    break
                if kind == "link":
                    rtt = value if rank == 0 else rtt
                else:
                    name, seed, result = value
                    rows.setdefault((name, seed), []).append(result)
                    if rank == 0:
                        print(f"  {name}, seed {seed}: {result['tokens_per_second']:.0f} tokens/s", flush=True)
        return rtt, [(name, seed, results) for (name, seed), results in rows.items()]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for tun in tuns:
            os.close(tun)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches link", description=__doc__)
    parser.add_argument("--mbit", type=float, default=50.0)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=8, help="sequences of 128 bytes a rank and step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--methods", nargs="+", help="names of rows; all of them without this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    reason = unavailable()
    if reason:
        print(f"skipped: {reason}.")
        return
    chosen = options.methods or list(methods())
    unknown = set(chosen) - set(methods())
    if unknown:
        parser.error(f"--methods has {sorted(unknown)}; there are {list(methods())}")

    from benches.training import small_gpt

    size = SimpleNamespace(width=128, layers=4, length=128, rows=options.rows, base_steps=150, steps=options.steps)
    base = Path(f"target/small_gpt_link_{options.rows}.pt")
    small_gpt.pretrained(size, base)
    rtt, rows = measure(
        size, base, options.mbit, options.rtt_ms, {"methods": chosen, "seeds": options.seeds, "lr": options.lr}
    )
    print(f"link: {options.mbit:g} Mbit/s, round trip {rtt:.1f} ms measured")
    first = next(results for name, _, results in rows if name == chosen[0])[0]
    comm = first["megabytes"] * 8 / options.mbit / options.steps + options.rtt_ms / 1e3
    comp = first["compute_seconds"] / options.steps
    print(f"bound T_comm / T_comp of {chosen[0]!r}: {comm * 1e3:.0f} ms / {comp * 1e3:.0f} ms = {comm / comp:.2f}")
    print("| method | tokens/s | ratio | loss (gap) | MB sent | control bytes a step | FIRE / HOLD |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    summary = {}
    for name in chosen:
        mine = [results for n, _, results in rows if n == name]
        mean = {key: sum(r[0][key] for r in mine) / len(mine) for key in mine[0][0]}
        mean["loss"] = sum(r[k]["loss"] for r in mine for k in (0, 1)) / (2 * len(mine))
        summary[name] = mean
        start = summary[chosen[0]]
        print(
            f"| {name} | {mean['tokens_per_second']:.0f} | {mean['tokens_per_second'] / start['tokens_per_second']:.2f} | "
            f"{mean['loss']:.3f} ({mean['loss'] - start['loss']:+.3f}) | {mean['megabytes']:.0f} | "
            f"{mean['control_bytes_a_step']:.0f} | {mean['fires']:.0f} / {mean['holds']:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"rtt_ms": rtt, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
