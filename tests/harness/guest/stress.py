# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many disks on one screen, then many changes in a short time, inside an emulated machine, where this runs.

    stress.py DISKS PLUGS_PER_SECOND SECONDS ADDRESSES COMMAND...

Starts the command with `--all` on a terminal of its own. DISKS null_blk disks are there from the start. Then
many of them are pulled and plugged in again, and addresses added and taken away, as fast as that. Prints a
JSON object: what is exported in the end and should be, how many times the screen was drawn in how many
seconds and the shortest time between two, how long one drawing takes, and memory in KiB before and after.
"""

from __future__ import annotations

import fcntl
import glob
import json
import mmap
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

NVMET = "/sys/kernel/config/nvmet"
# Only with names that its rules know does udev tell a disk from the one that had the same number before.
NULL_BLK = "/sys/kernel/config/nullb/vdx"
THREADS = 20
NET = "198.51.100"
FRAME = b"\x1b[H"


class Screen:
    """The command on a terminal; notes when it is drawn, and what was drawn last."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm"})
        self.times: list[float] = []
        self.data = b""
        self.ended = threading.Event()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                break
            if FRAME in data:
                self.times.append(time.monotonic())
                self.data = data[data.rfind(FRAME) :]
            else:
                self.data += data
        self.ended.set()

    def status(self, name: str) -> int:
        with open(f"/proc/{self.pid}/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

    def processor_time(self) -> float:
        with open(f"/proc/{self.pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9


def exported() -> set[str]:
    return {name.rpartition(".")[2] for name in os.listdir(NVMET + "/subsystems")}


def unreadable() -> int:
    """How many of what is exported is a disk that has gone, or none."""
    count = 0
    page = mmap.mmap(-1, 4096)
    for path in glob.glob(NVMET + "/subsystems/*/namespaces/*/device_path"):
        try:
            with open(path) as file:
                fd = os.open(file.read().strip(), os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(fd, [page], 0)
            finally:
                os.close(fd)
        except OSError:
            count += 1
    return count


def present() -> set[str]:
    return {name for name in os.listdir("/sys/block") if name.startswith(("nullb", "vdx"))}


def wait_settled(timeout: float = 600) -> float:
    """Waits until just the disks that are there are exported; for how many seconds it had to."""
    begin = time.monotonic()
    # Without effect where one of null_blk's disks seems to have partitions; see measure.py.
    subprocess.run(["udevadm", "settle", "--timeout=120"], check=False)
    while exported() != present():
        if time.monotonic() - begin > timeout:
            raise SystemExit(f"not exported: {sorted(present() ^ exported())[:10]}")
        time.sleep(0.1)
    return time.monotonic() - begin


def write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def make_disks(count: int) -> None:
    """Makes disks that can be pulled."""
    for disk in range(count):
        directory = f"{NULL_BLK}{disk}"
        os.mkdir(directory)
        write(directory + "/size", "64")
        write(directory + "/submit_queues", "1")
        # Else it holds what was in memory, perhaps a partition table.
        write(directory + "/memory_backed", "1")
        power(disk, on=True)


def power(disk: int, *, on: bool) -> None:
    """Plugs a disk in or out."""
    write(f"{NULL_BLK}{disk}/power", str(int(on)))


def plug(rate: float, disks: int) -> tuple[int, float]:
    """Pulls each disk and plugs it in again, at this rate; how many times, and in how many seconds.

    null_blk lets go of one disk after the other, and takes 12 ms for it, so 150 a second are the most. It
    makes its caller wait, hence the threads.
    """
    begin = time.monotonic()

    def share(first: int) -> None:
        for disk in range(first, disks, THREADS):
            for number, on in enumerate((False, True)):
                time.sleep(max(0, begin + (2 * disk + number) / rate - time.monotonic()))
                power(disk, on=on)

    threads = [threading.Thread(target=share, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 2 * disks, time.monotonic() - begin


def come_first() -> None:
    """This process and the kernel's threads go before all else on the only processor, as real disks do."""
    with open("/proc/2/task/2/children") as file:
        kernel = file.read().split()
    threads = os.listdir("/proc/self/task")
    subprocess.run(["renice", "-n", "-20", "-p", *kernel, *threads], check=False, stdout=subprocess.DEVNULL)


def change_addresses(count: int) -> str:
    """That many changes, and one address more that stays, which is returned."""
    for_all = [f"{NET}.{i % 250 + 1}" for i in range(count // 2)]
    lines = [f"address {verb} {address}/32 dev eth0" for address in for_all for verb in ("add", "delete")]
    lines.append(f"address add {NET}.254/32 dev eth0")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines).encode(), check=True)
    return f"{NET}.254"


def main() -> None:
    disks, rate, seconds, addresses = (int(a) for a in sys.argv[1:5])
    subprocess.run(["modprobe", "-a", "nvmet-tcp"], check=True)
    pulled = int(rate * seconds) // 2
    parameters = [f"nr_devices={disks - pulled}", "gb=1", "submit_queues=1", "hw_queue_depth=4"]
    subprocess.run(["modprobe", "-r", "null_blk"], check=True)
    subprocess.run(["modprobe", "null_blk", *parameters], check=True)
    make_disks(pulled)
    subprocess.run(["udevadm", "settle"], check=True)
    screen = Screen([*sys.argv[5:], "--all"])
    result: dict[str, object] = {}
    while not os.path.isdir(NVMET + "/subsystems") or exported() != present():
        time.sleep(0.1)
    wait_settled()
    time.sleep(5)
    result["memory before"] = screen.status("VmRSS")
    drawn, used = len(screen.times), screen.processor_time()
    for _ in range(5):
        os.kill(screen.pid, signal.SIGWINCH)
        time.sleep(1)
    result["drawing"] = (screen.processor_time() - used) / max(1, len(screen.times) - drawn)

    # null_blk waits for RCU with each disk that goes.
    write("/sys/kernel/rcu_expedited", "1")
    come_first()
    begin, drawn = time.monotonic(), len(screen.times)
    result["plugs"], result["plugged in"] = plug(rate, pulled)
    result["settled after"] = wait_settled()
    result["address"] = change_addresses(addresses)
    time.sleep(3)
    times = screen.times[drawn:]
    result["drawn"], result["during"] = len(times), time.monotonic() - begin
    result["shortest"] = min((b - a for a, b in zip(times, times[1:])), default=0)
    result["exported"], result["present"] = len(exported()), len(present())
    result["same"] = exported() == present()
    result["unreadable"] = unreadable()
    shown = sorted({m.decode() for m in re.findall(rf"-a ({re.escape(NET)}\.\d+) ".encode(), screen.data)})
    result["addresses"] = shown
    subprocess.run(["ip", "address", "flush", "dev", "eth0", "to", f"{NET}.0/24"], check=True)
    time.sleep(3)
    result["memory after"] = screen.status("VmRSS")
    os.kill(screen.pid, signal.SIGTERM)
    result["code"] = os.waitstatus_to_exitcode(os.waitpid(screen.pid, 0)[1])
    select.select([], [], [], 0.2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
