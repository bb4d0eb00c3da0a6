"""Measures reads through the project's program or the peer inside an emulated machine, where it runs.

    reads.py RUNS NAME=COMMAND...

Each command exports one null_blk disk that answers after 50 microseconds, as a fast SSD does. The same
machine attaches it over its loopback interface and reads past the cache: from the beginning in pieces of
128 KiB, and 4 KiB at random places, one at a time. So there is no network, which would hide some of the work
for each read. Prints one JSON object a line: `sequential` in MB/s, `random` in reads a second.
"""

from __future__ import annotations

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

NOTIFY = "/run/reads.notify"
NODE = "/dev/nullb0"
NQN = "quux"
PORT = "16858"  # that follows from the NQN
LATENCY = 50_000  # of the disk, in nanoseconds
PIECE, PIECES = 128 << 10, 2048
SMALL, SMALLS = 4 << 10, 2000


def attached() -> str:
    """The disk's node on the client's side."""
    for _ in range(600):
        for path in glob.glob("/sys/class/nvme-subsystem/*/nvme*n1/size"):
            with open(path) as size, open(f"{path.rsplit('/', 2)[0]}/subsysnqn") as nqn:
                if nqn.read() == f"{NQN}.nullb0\n" and size.read() != "0\n":
                    return "/dev/" + path.split("/")[-2]
        time.sleep(0.1)
    raise TimeoutError("not attached")


def timed(fd: int, length: int, places: list[int]) -> float:
    """Seconds for reads of `length` bytes at these places."""
    buffer = mmap.mmap(-1, length)
    begin = time.monotonic()
    for place in places:
        if os.preadv(fd, [buffer], place) != length:
            raise OSError("short read")
    return time.monotonic() - begin


def measure(command: list[str]) -> dict[str, float]:
    if os.path.exists(NOTIFY):
        os.unlink(NOTIFY)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(NOTIFY)
    notify.settimeout(300)
    with open("/run/reads.log", "wb") as log:
        process = subprocess.Popen(
            [*command, f"--nqn={NQN}", NODE],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ, NOTIFY_SOCKET=NOTIFY),
        )
        while b"READY=1" not in notify.recv(8192).split(b"\n"):
            pass
        connect = f"nvme connect -t tcp -a 127.0.0.1 -s {PORT} -n {NQN}.nullb0"
        subprocess.run(shlex.split(connect), check=True, stdout=subprocess.DEVNULL)
        try:
            fd = os.open(attached(), os.O_RDONLY | os.O_DIRECT)
            size = os.lseek(fd, 0, os.SEEK_END)
            subprocess.run(["udevadm", "settle"], check=True)
            sequential = timed(fd, PIECE, [i * PIECE for i in range(PIECES)])
            places = random.Random(1)
            at_random = timed(fd, SMALL, [places.randrange(size // SMALL) * SMALL for _ in range(SMALLS)])
            os.close(fd)
        finally:
            subprocess.run(["nvme", "disconnect-all"], check=True)
            process.send_signal(signal.SIGTERM)
            process.wait(300)
    notify.close()
    return {"sequential": PIECE * PIECES / 1e6 / sequential, "random": SMALLS / at_random}


def main() -> None:
    subprocess.run(["modprobe", "-a", "nvmet-tcp", "nvme-tcp"], check=True)
    disk = ["nr_devices=1", "gb=1", "irqmode=2", f"completion_nsec={LATENCY}"]
    subprocess.run(["modprobe", "null_blk", *disk], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for run in range(int(sys.argv[1])):
        for argument in sys.argv[2:]:
            name, _, line = argument.partition("=")
            subprocess.run(["udevadm", "settle"], check=True)
            print(json.dumps({"name": name, "run": run, **measure(shlex.split(line))}), flush=True)
    subprocess.run(["modprobe", "-r", "null_blk"], check=True)


if __name__ == "__main__":
    main()
