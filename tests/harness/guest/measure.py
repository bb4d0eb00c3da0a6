"""Measures the project's program or the peer inside an emulated machine, where this script runs.

    measure.py RUNS DISKS rest|probing NAME=COMMAND...

For each run, and in it for each command in turn, DISKS null_blk disks are made anew; then the command is
started with `--all`, as a service manager would start it. "rest" waits first until udev has left the disks
alone, "probing" does not. "python" for a command is the start and end of the interpreter alone, and with
"replay" in front a command's steps are done by replay.c. Prints one JSON object a line, times in seconds,
memory in KiB.
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

SUBSYSTEMS = "/sys/kernel/config/nvmet/subsystems"
NOTIFY = "/run/measure.notify"
PYTHON = "/usr/bin/python3"
TIMEOUT = 600.0
IDLE = 3.0  # for how long wake-ups are counted


def make_disks(count: int, *, settle: bool) -> None:
    subprocess.run(["modprobe", "-r", "null_blk"], check=True)
    # Without memory of their own, what is read from them is what happens to be in memory, now and then a
    # partition table, with which udev is busy for seconds.
    parameters = [f"nr_devices={count}", "gb=1", "submit_queues=1", "hw_queue_depth=4", "memory_backed=1"]
    subprocess.run(["modprobe", "null_blk", *parameters], check=True)
    if settle:
        # Whoever closes a disk makes udev probe it again, so once is not enough.
        for _ in range(4):
            subprocess.run(["udevadm", "settle"], check=True)
            time.sleep(0.5)
        # systemd has something to do for each disk when udev has not any more.
        for _ in range(300):
            if busy() < 0.03:
                break


def busy() -> float:
    """The share of a second that the processor had something to do."""
    before = processor_times()
    time.sleep(1)
    whole, idle = (b - a for a, b in zip(before, processor_times()))
    return 1 - idle / max(1, whole)


def processor_times() -> tuple[int, int]:
    """In ticks, of all kinds and idle, since the machine was booted; see proc_stat(5)."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:9]]
    return sum(fields), fields[3] + fields[4]


def status(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measure(command: list[str]) -> dict[str, object]:
    """Starts the command, waits for READY=1, lets it idle, stops it."""
    if os.path.exists(NOTIFY):
        os.unlink(NOTIFY)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(NOTIFY)
    notify.settimeout(TIMEOUT)
    environment = dict(os.environ, NOTIFY_SOCKET=NOTIFY)
    with open("/run/measure.log", "wb") as log:
        begin = time.monotonic()
        process = subprocess.Popen(
            [*command, "--all"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        while b"READY=1" not in notify.recv(8192).split(b"\n"):
            pass
        ready = time.monotonic() - begin
        exported = len(os.listdir(SUBSYSTEMS))
        ports = len(os.listdir(SUBSYSTEMS + "/../ports"))
        # Not for ever: what udev still wants to do may have to wait for the disks' locks.
        subprocess.run(["udevadm", "settle", "--timeout=30"], check=False)
        time.sleep(2)  # what is put off, as redrawing is, has been done by then
        before = status(process.pid, "voluntary_ctxt_switches")
        time.sleep(IDLE)
        wakeups = status(process.pid, "voluntary_ctxt_switches") - before
        memory = status(process.pid, "VmRSS")
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(TIMEOUT)
        stop = time.monotonic() - begin
    notify.close()
    return {
        "ready": ready,
        "stop": stop,
        "memory": memory,
        "wakeups": wakeups,
        "exported": exported,
        "ports": ports,
        "code": code,
        "left": len(glob.glob(SUBSYSTEMS + "/*")) + len(glob.glob(SUBSYSTEMS + "/../ports/*")),
    }


def interpreter() -> dict[str, object]:
    """How long Python takes to start, with nothing to do."""
    begin = time.monotonic()
    subprocess.run([PYTHON, "-IS", "-c", "pass"], check=True)
    return {"ready": time.monotonic() - begin, "stop": 0}


def replay(command: list[str]) -> dict[str, object]:
    """Does the steps of a command by the shortest program that can."""
    shown = subprocess.run([*command, "--all", "--dry-run", "--json"], check=True, stdout=subprocess.PIPE)
    fields: list[str] = []
    for step in json.loads(shown.stdout):
        if step["step"] == "map":
            _, sectors, kind, parameters = step["value"].split(" ", 3)
            fields += ["map", os.path.basename(step["path"]), sectors, kind, parameters]
        elif step["step"] in ("mkdir", "write", "symlink"):
            values = [step[key] for key in ("path", "value", "target") if key in step]
            fields += [step["step"], *values]
    data = "".join(field + "\0" for field in fields).encode()
    times = subprocess.run(["/root/replay"], input=data, check=True, stdout=subprocess.PIPE).stdout.split()
    return {"ready": float(times[0]), "stop": float(times[1])}


def main() -> None:
    runs, disks, state = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    subprocess.run(["modprobe", "-a", "nvmet-tcp", "null_blk"], check=True)
    # All have been read from the disk before the clock counts.
    for argument in sys.argv[4:]:
        command = shlex.split(argument.partition("=")[2].removeprefix("replay "))
        command[0] = PYTHON if command == ["python"] else command[0]
        subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
    for run in range(runs):
        for argument in sys.argv[4:]:
            name, _, line = argument.partition("=")
            make_disks(disks, settle=state == "rest")
            command = shlex.split(line)
            if command == ["python"]:
                result = interpreter()
            elif command[0] == "replay":
                result = replay(command[1:])
            else:
                result = measure(command)
            print(
                json.dumps({"name": name, "run": run, "disks": disks, "state": state, **result}), flush=True
            )


if __name__ == "__main__":
    main()
