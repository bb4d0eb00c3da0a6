# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures how long a client takes to attach many disks, inside an emulated machine, where it runs.

    attach.py RUNS DISKS NAME=COMMAND...

Each command exports DISKS null_blk disks with `--all`, and the same machine attaches them over its
loopback interface with `nvme connect-all`. Prints one JSON object a line: `command` until nvme is done and
`disks` until all disks are there, in seconds, and `sockets`, the connections at the target's end.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

NOTIFY = "/run/attach.notify"
NQN = "quux"
PORT = "16858"  # that follows from the NQN


def attached() -> int:
    """How many disks of the export are there, with their sizes."""
    count = 0
    for path in glob.glob("/sys/class/nvme-subsystem/*/nvme*n*/size"):
        with open(path) as size, open(f"{path.rsplit('/', 2)[0]}/subsysnqn") as nqn:
            count += nqn.read().startswith(NQN) and size.read() != "0\n"
    return count


def measure(command: list[str], disks: int) -> dict[str, float]:
    if os.path.exists(NOTIFY):
        os.unlink(NOTIFY)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(NOTIFY)
    notify.settimeout(600)
    with open("/run/attach.log", "wb") as log:
        process = subprocess.Popen(
            [*command, f"--nqn={NQN}", "--all"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ, NOTIFY_SOCKET=NOTIFY),
        )
        while b"READY=1" not in notify.recv(8192).split(b"\n"):
            pass
        subprocess.run(["udevadm", "settle"], check=True)
        begin = time.monotonic()
        connect = f"nvme connect-all -t tcp -a 127.0.0.1 -s {PORT}"
        subprocess.run(shlex.split(connect), check=True, stdout=subprocess.DEVNULL)
        done = time.monotonic() - begin
        while attached() < disks:
            time.sleep(0.01)
        there = time.monotonic() - begin
        listed = subprocess.run(
            ["ss", "-Htn", "state", "established", f"( sport = :{PORT} )"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        subprocess.run(["nvme", "disconnect-all"], check=True)
        process.send_signal(signal.SIGTERM)
        process.wait(600)
    notify.close()
    return {"command": done, "disks": there, "sockets": len(listed.splitlines())}


def main() -> None:
    count = int(sys.argv[2])
    subprocess.run(["modprobe", "-a", "nvmet-tcp", "nvme-tcp"], check=True)
    parameters = [f"nr_devices={count}", "gb=1", "submit_queues=1", "hw_queue_depth=4"]
    subprocess.run(["modprobe", "null_blk", *parameters], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for run in range(int(sys.argv[1])):
        for argument in sys.argv[3:]:
            name, _, line = argument.partition("=")
            subprocess.run(["udevadm", "settle"], check=True)
            print(json.dumps({"name": name, "run": run, **measure(shlex.split(line), count)}), flush=True)
    subprocess.run(["modprobe", "-r", "null_blk"], check=True)


if __name__ == "__main__":
    main()
