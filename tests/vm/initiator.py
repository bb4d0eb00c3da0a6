# SPDX-License-Identifier: LGPL-2.1-or-later
"""The other machine's side: an export attached there, and read again and again with each byte compared."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tests.harness.machine import Machine, Process

TARGET_ADDRESS = "192.0.2.1"

# What a host's kernel says of a connection or a disk that is not all right.
TROUBLE = re.compile(r"nvme.*(reconnect|reset|timeout|error|fail|lost|abort)|I/O error|blk_update", re.I)

_markers = itertools.count(1)

# Waits for the namespace, since it is scanned for after the connection was made. Prints the controller's
# name and number, and the disk's name.
FIND_SCRIPT = """
for _ in $(seq 600); do
    for controller in /sys/class/nvme/nvme*; do
        [ "$(cat "$controller/subsysnqn" 2>/dev/null)" = "$NQN" ] || continue
        for disk in /sys/class/nvme-subsystem/*/nvme*n1; do
            [ -e "$disk" ] && [ "$(cat "${disk%/*}/subsysnqn")" = "$NQN" ] &&
                [ "$(cat "$disk/size")" != 0 ] || continue
            echo "${controller##*/} $(cat "$controller/cntlid") ${disk##*/}"
            exit
        done
    done
    sleep 0.1
done
exit 1
"""

# Prints number, UUID, NGUID, size in bytes, 1 for read-only, and node of each namespace.
NAMESPACES_SCRIPT = """
for disk in /sys/block/nvme*; do
    case "${disk##*/}" in *c*) continue;; esac  # one path to it
    [ -e "$disk" ] && [ "$(cat "$disk/device/subsysnqn")" = "$NQN" ] || continue
    echo "$(cat "$disk/nsid") $(cat "$disk/uuid") $(cat "$disk/nguid") $(($(cat "$disk/size") * 512))" \\
        "$(cat "$disk/ro") /dev/${disk##*/}"
done
true
"""

READER_SCRIPT = """
import json, mmap, os, random, signal, sys, time
path, seed, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
content = random.Random(seed).randbytes(size)
stopping = False
def stop(number, frame):
    global stopping
    stopping = True
signal.signal(signal.SIGTERM, stop)
chunk = 256 << 10
done, wrong, longest = 0, [], 0.0
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, chunk)
while not stopping:
    for offset in range(0, size, chunk):
        begin = time.monotonic()
        length = os.preadv(fd, [buffer], offset)
        longest = max(longest, time.monotonic() - begin)
        if buffer[:length] != content[offset : offset + chunk]:
            wrong.append(offset)
        done += length
        if stopping:
            break
        time.sleep(0.02)  # two emulated machines would otherwise do nothing else
    print(f"{done} bytes", flush=True)
print(json.dumps({"size": done, "wrong": wrong, "longest": longest}), flush=True)
"""


def write_content(path: Path, seed: int, size: int) -> None:
    """Makes a file of `size` bytes that a `Reader` with this seed knows."""
    path.write_bytes(random.Random(seed).randbytes(size))


@dataclasses.dataclass(frozen=True)
class Attachment:
    """An export that a machine has attached."""

    machine: Machine
    nqn: str
    controller: str
    controller_number: int
    node: str
    marker: str

    def identity(self) -> str:
        script = f"NQN={self.nqn}; {FIND_SCRIPT}"
        return self.machine.run(script).stdout.strip()

    def kernel_messages(self) -> list[str]:
        """What the machine's kernel has said since the export was attached."""
        lines = self.machine.run("dmesg --notime").stdout.splitlines()
        return lines[lines.index(self.marker) + 1 :]

    def trouble(self) -> list[str]:
        """What of that is about this export and no good news."""
        instance = self.controller.removeprefix("nvme")
        mine = re.compile(rf"{self.controller}:|{Path(self.node).name}\b|nvme[0-9]+c{instance}n")
        return [line for line in self.kernel_messages() if TROUBLE.search(line) and mine.search(line)]

    def check(self) -> None:
        """It is still the same connection, and nothing has gone wrong with it."""
        assert self.identity() == f"{self.controller} {self.controller_number} {Path(self.node).name}"
        assert self.machine.run(f"cat /sys/class/nvme/{self.controller}/state").stdout == "live\n"
        assert not (trouble := self.trouble()), trouble


def namespaces(machine: Machine, nqn: str) -> dict[int, list[str]]:
    """UUID, NGUID, size, read-only and node of a subsystem's namespaces that a machine has, by number."""
    lines = machine.run(f"NQN={nqn}; {NAMESPACES_SCRIPT}").stdout.splitlines()
    return {int(number): fields for number, *fields in map(str.split, lines)}


@contextlib.contextmanager
def attached(machine: Machine, nqn: str, port: int, address: str = TARGET_ADDRESS) -> Iterator[Attachment]:
    """An export that is attached until the end of the block."""
    marker = f"test: attachment {next(_markers)}"
    script = f"modprobe nvme-tcp; echo '{marker}' >/dev/kmsg; NQN={nqn}; "
    # On a busy host, either machine may be late for the usual 5 s.
    script += f"nvme connect --keep-alive-tmo=20 -t tcp -a {address} -s {port} -n $NQN >&2; {FIND_SCRIPT}"
    try:
        controller, number, disk = machine.run(script).stdout.split()
        yield Attachment(machine, nqn, controller, int(number), f"/dev/{disk}", marker)
    finally:
        machine.run(f"nvme disconnect -n {nqn}", check=False)


class Reader:
    """Reads a disk with known content around and around, past the cache, and compares each byte."""

    def __init__(self, machine: Machine, node: str, seed: int, size: int) -> None:
        self.process: Process = machine.start_process(
            ["python3", "-c", READER_SCRIPT, node, str(seed), str(size)]
        )

    def wait_progress(self, timeout: float = 120) -> None:
        """Waits until it has read all of the disk once more."""
        seen = self.process.output.count(" bytes\n")
        assert self.process.machine.wait_until(
            lambda: self.process.output.count(" bytes\n") > seen + 1 or self.process.poll() is not None,
            timeout,
        )
        assert self.process.poll() is None, self.process.output

    def stop(self) -> dict[str, float]:
        """Ends it. Returns how many bytes it has read, and how many seconds the longest read took."""
        self.process.kill()
        assert self.process.wait() == 0, self.process.output
        result = json.loads(self.process.output.splitlines()[-1])
        assert result.pop("wrong") == []
        found: dict[str, float] = result
        return found


def where(tree: dict[str, str], node: str) -> tuple[str, int]:
    """NQN and IPv4 port of a disk's export, looked up in configfs (`nvmet.tree()`)."""
    (path,) = (p for p, v in tree.items() if p.endswith("/device_path") and v.startswith(f"{node}\n"))
    (port,) = (p for p, v in tree.items() if p.endswith("/addr_adrfam") and v == "ipv4\n")
    return path.split("/")[1], int(port.split("/")[1])
