# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures clients of the project's program or the peer inside an emulated machine, where it runs.

    client.py reads RUNS NAME=COMMAND...
    client.py attach RUNS DISKS NAME=COMMAND...

Each command exports null_blk disks, and the same machine attaches them over its loopback interface. So there
is no network, which would hide some of the work. Prints one JSON object a line.

reads: One disk that answers after 50 microseconds, as a fast SSD does, is read past the cache: from the
beginning in pieces of 128 KiB, and 4 KiB at random places, one at a time; `sequential` in MB/s, `random` in
reads a second.

attach: DISKS disks are attached with `nvme connect-all`; `command` until nvme is done and `disks` until all
disks are there, in seconds, and `sockets`, the connections at the target's end.
"""

from __future__ import annotations

import contextlib
import glob
import json
import mmap
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

NOTIFY = "/run/client.notify"
NQN = "quux"
PORT = "16858"  # that follows from the NQN
TIMEOUT = 600  # seconds, to start, to attach, to stop
LATENCY = 50_000  # of the disk that is read, in nanoseconds
PIECE, PIECES = 128 << 10, 2048
SMALL, SMALLS = 4 << 10, 2000


@contextlib.contextmanager
def exported(command: str, what: str) -> Iterator[None]:
    """What a command exports, once it says that it is ready."""
    subprocess.run(["udevadm", "settle"], check=True)
    if os.path.exists(NOTIFY):
        os.unlink(NOTIFY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open("/run/client.log", "wb") as log:
        notify.bind(NOTIFY)
        notify.settimeout(TIMEOUT)
        process = subprocess.Popen(
            [*shlex.split(command), f"--nqn={NQN}", what],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ, NOTIFY_SOCKET=NOTIFY),
        )
        try:
            while b"READY=1" not in notify.recv(8192).split(b"\n"):
                pass
            subprocess.run(["udevadm", "settle"], check=True)
            yield
        finally:
            subprocess.run(["nvme", "disconnect-all"], check=True)
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)


def nvme(command: str) -> None:
    arguments = f"nvme {command} -t tcp -a 127.0.0.1 -s {PORT}"
    subprocess.run(shlex.split(arguments), check=True, stdout=subprocess.DEVNULL)


def attached(count: int) -> list[str]:
    """Waits for the nodes of this many disks, with their sizes, on the client's side."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        found = []
        for path in glob.glob("/sys/class/nvme-subsystem/*/nvme*n*/size"):
            with open(path) as size, open(f"{path.rsplit('/', 2)[0]}/subsysnqn") as nqn:
                if nqn.read().startswith(NQN) and size.read() != "0\n":
                    found.append("/dev/" + path.split("/")[-2])
        # The kernel makes the nodes a moment later.
        if len(found) >= count and all(map(os.path.exists, found)):
            return found
        time.sleep(0.01)
    raise TimeoutError("not attached")


def timed(fd: int, length: int, places: list[int]) -> float:
    """Seconds for reads of `length` bytes at these places."""
    buffer = mmap.mmap(-1, length)
    begin = time.monotonic()
    for place in places:
        if os.preadv(fd, [buffer], place) != length:
            raise OSError("short read")
    return time.monotonic() - begin


def measure_reads(command: str) -> dict[str, float]:
    with exported(command, "/dev/nullb0"):
        nvme(f"connect -n {NQN}.nullb0")
        fd = os.open(attached(1)[0], os.O_RDONLY | os.O_DIRECT)
        size = os.lseek(fd, 0, os.SEEK_END)
        subprocess.run(["udevadm", "settle"], check=True)
        sequential = timed(fd, PIECE, [i * PIECE for i in range(PIECES)])
        places = random.Random(1)
        at_random = timed(fd, SMALL, [places.randrange(size // SMALL) * SMALL for _ in range(SMALLS)])
        os.close(fd)
    return {"sequential": PIECE * PIECES / 1e6 / sequential, "random": SMALLS / at_random}


def measure_attach(command: str, disks: int) -> dict[str, float]:
    with exported(command, "--all"):
        begin = time.monotonic()
        nvme("connect-all")
        done = time.monotonic() - begin
        attached(disks)
        there = time.monotonic() - begin
        connections = ["ss", "-Htn", "state", "established", f"( sport = :{PORT} )"]
        listed = subprocess.run(connections, check=True, capture_output=True, text=True).stdout
    return {"command": done, "disks": there, "sockets": len(listed.splitlines())}


def main() -> None:
    what, runs, *arguments = sys.argv[1:]
    if what == "reads":
        disks = 1
        parameters = ["irqmode=2", f"completion_nsec={LATENCY}"]
    else:
        disks = int(arguments.pop(0))
        parameters = ["submit_queues=1", "hw_queue_depth=4"]
    subprocess.run(["modprobe", "-a", "nvmet-tcp", "nvme-tcp"], check=True)
    subprocess.run(["modprobe", "null_blk", "gb=1", f"nr_devices={disks}", *parameters], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for run in range(int(runs)):
        for argument in arguments:
            name, _, command = argument.partition("=")
            result = measure_reads(command) if what == "reads" else measure_attach(command, disks)
            print(json.dumps({"name": name, "run": run, **result}), flush=True)
    subprocess.run(["modprobe", "-r", "null_blk"], check=True)


if __name__ == "__main__":
    main()
