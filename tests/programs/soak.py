# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make soak`: clients read and write for a long time while everything around them changes.

Two clients have the disks of one target attached, each kind of access among them, and compare each byte that
they read. Meanwhile other disks and addresses come and go on the target, and the tool is killed and started
again every 5 to 15 seconds; half of the time with a subsystem for each disk, half of it with one for all. At
the end nothing may have gone wrong for the clients, disks that nobody may write to are as they were, and
nothing of the tool's is left. Prints the counts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.harness import images
from tests.harness.images import PROJECT
from tests.harness.machine import MIB, Disk, Machine, Nic, Process, Wire, boot_all
from tests.vm import nvmet
from tests.vm.conftest import TOOL
from tests.vm.disks import expected_uuid, wait_name
from tests.vm.initiator import TROUBLE, write_content
from tests.vm.nvmet import Service

SIZE = 32 * MIB
NQN = "quux"
PORT = 16858  # that follows from it
KINDS = ("shared", "per-disk")
CLIENTS = (1, 2)
MOST_EXTRAS = 4  # other disks at a time
BEGIN = time.monotonic()

# The client's node for each UUID, and the controllers that it has.
FIND = 'cd /sys/block; for d in nvme*n*; do [ -e $d/uuid ] && echo "$(cat $d/uuid) /dev/$d"; done; true'
KERNEL_MEMORY = "awk '/SUnreclaim/ {print $2}' /proc/meminfo"  # in KiB, what cannot be given back
CONTROLLERS = "cd /sys/class/nvme && ls"
STATE = (
    "dmsetup ls 2>/dev/null | grep storagetm; losetup -n -O NAME; "
    "ls /sys/kernel/config/nvmet/ports /sys/kernel/config/nvmet/subsystems"
)


class Failed(Exception):
    """Something is not as it has to be."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:5.0f} s] {text}", flush=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Soak:
    def __init__(self, target: Machine, clients: dict[int, Machine], place: Path, seed: int) -> None:
        self.target, self.clients, self.place = target, clients, place
        self.chance = random.Random(seed)
        self.counts = dict.fromkeys(("kills", "disks added", "disks pulled", "addresses"), 0)
        self.extras: list[str] = []
        self.addresses: list[int] = []
        self.service: Service | None = None
        # The disks that clients have: name, who uses it, how; all are known by their serial numbers.
        self.disks = {"RO": CLIENTS} | {f"{mode}-{n}": (n,) for mode in ("SNAP", "RW") for n in CLIENTS}

    def file(self, name: str) -> Path:
        return self.place / f"{name}.raw"

    def seed(self, name: str) -> int:
        return sorted(self.disks).index(name) + 1

    def start(self, kind: str) -> None:
        arguments = ["--all", f"--nqn={NQN}", f"--subsystem={kind}", f"--clients={len(self.clients)}"]
        access = ["--access=SOAK-RW*:read-write", "--access=SOAK-SNAP*:snapshot"]
        self.service = Service(self.target, [*arguments, *access], program=TOOL)
        self.service.start()

    def kill(self, kind: str) -> None:
        assert self.service
        self.service.kill("KILL")
        self.target.wait_run(f"systemctl is-failed --quiet {self.service.unit}")
        self.target.run(f"systemctl reset-failed {self.service.unit}")
        self.counts["kills"] += 1
        self.start(kind)

    def resources(self) -> tuple[list[str], int]:
        """What the tool's descriptors are open on, and its resident memory in KiB."""
        assert self.service
        pid = self.service.pid
        show = f"readlink /proc/{pid}/fd/*; awk '/VmRSS/ {{print $2}}' /proc/{pid}/status"
        *descriptors, memory = self.target.run(show).stdout.splitlines()
        return sorted(re.sub(r"\d+(?=\]|$)", "", name) for name in descriptors), int(memory)

    def change(self) -> None:
        """One disk or address comes or goes."""
        what = self.chance.random()
        if what < 0.35 and len(self.extras) < MOST_EXTRAS:
            name = f"extra{self.counts['disks added']}"
            scsi = self.chance.random() < 0.5
            disk = Disk(name, serial=f"EXTRA-{name}", bus="scsi" if scsi else "virtio", size=8 * MIB)
            self.target.add_disk(disk)
            self.extras.append(name)
            self.counts["disks added"] += 1
        elif what < 0.7 and self.extras:
            name = self.extras.pop(self.chance.randrange(len(self.extras)))
            self.target.remove_disk(name, timeout=120)
            self.counts["disks pulled"] += 1
        elif len(self.addresses) < 5:
            self.addresses.append(self.counts["addresses"] % 200 + 10)
            self.target.run(f"ip address add 198.51.100.{self.addresses[-1]}/32 dev eth0")
            self.counts["addresses"] += 1
        else:
            self.target.run(f"ip address delete 198.51.100.{self.addresses.pop(0)}/32 dev eth0")

    def attach(self) -> dict[tuple[int, str], Process]:
        """Starts the load on each client's disks."""
        loads = {}
        uuids = {name: expected_uuid(self.target, f"SOAK-{name}") for name in self.disks}
        for number, client in self.clients.items():
            address = f"-a 192.0.{number}.1 -s {PORT}"
            # On a busy host the usual 5 s are too few.
            client.run(
                f"modprobe nvme-tcp; nvme connect-all -t tcp {address} --keep-alive-tmo=20", timeout=300
            )
            wanted = [name for name, users in self.disks.items() if number in users]
            client.wait_until(
                lambda c=client, w=wanted: {uuids[n] for n in w} <= set(c.run(FIND).stdout.split()[::2])  # type: ignore[misc]
            )
            words = client.run(FIND).stdout.split()
            nodes = dict(zip(words[::2], words[1::2]))
            for name in wanted:
                mode = "read" if name == "RO" else "write"
                loads[number, name] = client.start_process(
                    ["python3", "/run/load.py", nodes[uuids[name]], str(self.seed(name)), str(SIZE), mode]
                )
        return loads

    def phase(self, kind: str, seconds: float) -> None:
        """Some minutes with one kind of subsystem."""
        # Disks with the serial numbers of others that are gone would have identities of their own.
        self.target.run("rm -f /run/storagetm/*.disks*")
        for name in self.disks:
            write_content(self.file(name), self.seed(name), SIZE)
            self.target.add_disk(Disk(name, path=self.file(name), serial=f"SOAK-{name}"))
        for name in self.disks:
            wait_name(self.target, f"SOAK-{name}")
        self.target.run("udevadm settle --timeout=120")
        before = self.target.run(STATE, check=False).stdout
        memory = self.target.run(KERNEL_MEMORY).stdout.strip()
        self.start(kind)
        # One that takes over what is there has other files open than one that makes it.
        self.kill(kind)
        loads = self.attach()
        first = self.resources()
        kernels = {n: c.run(CONTROLLERS).stdout.split() for n, c in self.clients.items()}
        say(f"{kind}: {len(loads)} loads run")
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + self.chance.uniform(5, 15)
        while time.monotonic() < end:
            if time.monotonic() > next_kill:
                self.kill(kind)
                next_kill = time.monotonic() + self.chance.uniform(5, 15)
            else:
                self.change()
                time.sleep(self.chance.uniform(0.2, 2))
            if ended := [key for key, load in loads.items() if load.poll() is not None]:
                raise Failed(f"a load has ended: {ended}: {loads[ended[0]].output}")
        while self.extras:
            self.target.remove_disk(self.extras.pop(), timeout=120)
            self.counts["disks pulled"] += 1
        while self.addresses:
            self.target.run(f"ip address delete 198.51.100.{self.addresses.pop()}/32 dev eth0")
        self.kill(kind)
        self.finish(kind, loads, kernels)
        last = self.resources()
        assert self.service
        self.service.stop()
        if (after := self.target.run(STATE, check=False).stdout) != before:
            raise Failed(f"not as before: {after!r} instead of {before!r}")
        if first[0] != last[0]:
            raise Failed(f"open are {last[0]} instead of {first[0]}")
        if left := nvmet.left_over(self.target):
            raise Failed(f"left: {left}")
        say(
            f"{kind}: before and after: {len(first[0])} and {len(last[0])} descriptors, "
            f"memory {first[1]} and {last[1]} KiB, "
            f"the kernel's {memory} and {self.target.run(KERNEL_MEMORY).stdout.strip()} KiB"
        )
        for name in self.disks:
            self.target.remove_disk(name, timeout=120)

    def finish(
        self, kind: str, loads: dict[tuple[int, str], Process], kernels: dict[int, list[str]]
    ) -> None:
        """Ends the loads and looks at what they have seen."""
        for (number, name), load in loads.items():
            load.kill()
            if load.wait(300) != 0:
                raise Failed(f"the load on {name} of client {number} failed: {load.output}")
            result = json.loads(load.output.splitlines()[-1])
            if result["wrong"] or result["errors"]:
                raise Failed(f"{name} of client {number}: {result}")
            say(
                f"{kind}: client {number}, {name}: {result['reads']} reads, {result['writes']} writes, "
                f"{result['bytes'] / 1e6:.0f} MB, longest {result['longest']:.2f} s"
            )
            wanted = result["sha256"]
            if not name.startswith("RW"):
                wanted = hashlib.sha256(random.Random(self.seed(name)).randbytes(SIZE)).hexdigest()
            if sha256(self.file(name)) != wanted:
                raise Failed(f"{name} has other content than it should")
        for number, client in self.clients.items():
            names = "|".join(re.escape(name) for name in kernels[number])
            lines = client.run("dmesg --clear --read-clear 2>/dev/null || dmesg -C").stdout.splitlines()
            bad = [x for x in lines if TROUBLE.search(x) and re.search(rf"\b({names})(n\d+|c\d+n\d+)?\b", x)]
            if bad:
                raise Failed(f"client {number} says: {bad[:5]}")
            client.run("nvme disconnect-all")


def main() -> int:
    parser = argparse.ArgumentParser(description="Clients read and write while much changes.")
    parser.add_argument("--minutes", type=float, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what happens when")
    args = parser.parse_args()
    say(f"seed {args.seed}")
    image = images.build("trixie")["trixie"]
    wires = {n: Wire() for n in CLIENTS}
    logs = PROJECT / "build/soak"
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        nics = [Nic(wire, 0) for wire in wires.values()]
        target = stack.enter_context(Machine("target", image, nics=nics, log_directory=logs, memory=1024))
        clients = {
            n: stack.enter_context(Machine(f"client{n}", image, nics=[Nic(wire, 1)], log_directory=logs))
            for n, wire in wires.items()
        }
        boot_all(target, *clients.values())
        target.put(TOOL, PROJECT / "storagetm.pyz", mode=0o755)
        target.run("udevadm control --ping; modprobe -a nvmet-tcp; ip link set lo up")
        for nic, (n, client) in enumerate(clients.items()):
            target.run(f"ip link set eth{nic} up; ip address add 192.0.{n}.1/24 dev eth{nic}")
            client.run(f"ip link set eth0 up; ip address add 192.0.{n}.2/24 dev eth0; dmesg -C")
            client.put("/run/load.py", PROJECT / "tests/harness/guest/load.py")
        soak = Soak(target, clients, place, args.seed)
        try:
            for kind in KINDS:
                soak.phase(kind, args.minutes * 60 / len(KINDS))
        except Failed as e:
            say(f"FAILED: {e}")
            return 1
        say(", ".join(f"{count} {what}" for what, count in soak.counts.items()))
        say("all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
