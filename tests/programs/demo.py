# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make demo`: one machine's disks on another, with nothing but a cable between them.

A machine with two disks and nothing else boots from an initrd into storage target mode. The command that its
screen shows is typed on a second machine, and what that one then reads from the disks is compared with what
was on them. With INTERACTIVE=1 in the environment both machines stay on the terminal afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import select
import shutil
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Sequence
from pathlib import Path

from tests.harness import images
from tests.harness.machine import Disk, Machine, MachineError, Nic, Wire

MIB = 1 << 20
OPTIONS = ("rd.systemd.unit=storage-target-mode.target", "ip=link-local", "quiet")
CLIENT_ADDRESS = "169.254.10.10"
BEGIN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:4.0f} s] {text}", flush=True)


def framed(lines: Sequence[str], columns: int = 80) -> str:
    """A screen with a frame around it, without the blank rows at its end."""
    edge = "+" + "-" * (columns + 2) + "+"
    return "\n".join([edge, *(f"| {line.ljust(columns)} |" for line in lines), edge])


def command_on(screen: Sequence[str]) -> str:
    """The command that attaches all disks over IPv4, as it stands on the screen."""
    for line in screen:
        if match := re.fullmatch(r"\s*(nvme connect-all -t tcp -a [0-9.]+ -s \d+)\s*", line):
            return match[1]
    raise MachineError("There is no command for IPv4 on the screen.")


def make_disk(path: Path, size: int) -> str:
    """Fills a file with random bytes; returns their SHA-256."""
    content = os.urandom(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def attach(client: Machine, command: str) -> dict[str, str]:
    """Runs the command on the client; returns the disks' nodes by their names on the target."""
    say("attaching them to a second machine, with the command read off that screen:")
    for line in (
        "ip link set eth0 up",
        f"ip address add {CLIENT_ADDRESS}/16 dev eth0",
        "modprobe nvme-tcp",
        command,
    ):
        print(f"           # {line}", flush=True)
        client.run(line)
    # The controllers are there when the command ends, their disks a moment later.
    client.wait_run("test $(ls -d /sys/class/nvme/nvme*/nvme*n1 | wc -l) -ge 2")
    client.run("udevadm settle")
    listing = client.run(
        "for n in /sys/class/nvme/nvme*; do echo $(basename $n/nvme*n1) $(cat $n/subsysnqn); done"
    ).stdout
    nodes = {}
    for line in listing.splitlines():
        node, _, nqn = line.partition(" ")
        # With multipath a controller's own path has a "c" in its name, and no node.
        nodes[nqn.rpartition(".")[2]] = "/dev/" + re.sub(r"c\d+", "", node)
    return nodes


def compare(client: Machine, nodes: dict[str, str], expected: dict[str, str]) -> bool:
    """Reads all disks whole over the network and compares their checksums."""
    same = True
    for name, checksum in expected.items():
        node = nodes[name]
        say(f"reading the target's {name}, here {node}, from its first byte to its last")
        read = client.run(f"sha256sum {node}", timeout=600).stdout.split()[0]
        print(f"           on the target   {checksum}\n           over the network {read}", flush=True)
        same = same and read == checksum
    return same


def converse(machines: dict[str, Machine]) -> None:
    """Puts the terminal on one machine's serial console after the other, until the user has seen enough."""
    size = shutil.get_terminal_size()
    if not sys.stdin.isatty():
        raise SystemExit("INTERACTIVE=1 needs a terminal.")
    saved = termios.tcgetattr(0)
    current = "client"
    machines["client"].run(f"stty -F /dev/ttyS0 columns {size.columns} rows {size.lines}")
    machines["client"].run("systemctl start --no-block harness-shell.service")
    tty.setraw(0)
    try:
        while True:
            machine = machines[current]
            seen = len(machine.console_bytes())
            other = next(name for name in machines if name != current)
            banner = f"--- the {current}'s console; Ctrl-] then o: the {other}'s, q: quit ---"
            shown = [banner, *machine.screen()]
            os.write(1, ("\x1b[2J\x1b[H" + "\r\n".join(shown).rstrip() + "\r\n").encode())
            if current == "client":
                machine.send_keys("\r")
            command = talk(machine, seen)
            if command == "q" or not machine.running:
                return
            if command == "o":
                current = other
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
        os.write(1, b"\x1b[0m\x1b[?25h\r\n")


def talk(machine: Machine, seen: int) -> str:
    """Passes keys and output on until Ctrl-]; returns the key after it."""
    escaped = False
    while machine.running:
        output = machine.console_bytes()
        os.write(1, output[seen:])
        seen = len(output)
        if not select.select([0], [], [], 0.05)[0]:
            continue
        keys = os.read(0, 256).decode(errors="replace")
        if escaped or "\x1d" in keys:
            rest = keys.partition("\x1d")[2] if not escaped else keys
            if rest:
                return rest[0]
            escaped = True
            continue
        machine.send_keys(keys)
    return "q"


def demonstrate(directory: Path, *, interactive: bool) -> bool:
    """The whole demonstration; False if a checksum differs."""
    image = images.build("trixie")["trixie"]
    initrd = images.initrd(image)
    say("making two disks full of random bytes")
    first, second = directory / "first", directory / "second"
    expected = {"vda": make_disk(first, 48 * MIB), "nvme0n1": make_disk(second, 32 * MIB)}
    wire = Wire()
    disks = [
        Disk("first", path=first, serial="DEMO-1"),
        Disk("second", path=second, serial="DEMO-2", bus="nvme"),
    ]
    # The initrd with drivers for everything is kept in memory twice while it is unpacked.
    target = Machine(
        "demo-target",
        image,
        initrd=initrd,
        disks=disks,
        nics=[Nic(wire, 0)],
        kernel_options=OPTIONS,
        memory=2048,
    )
    client = Machine("demo-client", image, nics=[Nic(wire, 1)])
    with target, client:
        say("booting a machine with these disks, and nothing else, from an initrd into storage target mode")
        target.start()
        client.start()
        target.wait_screen(
            r"attach all 2 disks[^$]*connect-all -t tcp -a 169\.254\.[^$]*stops exporting", 600
        )
        time.sleep(3)  # until it has been drawn to its end
        screen = target.screen()
        say("this is what it shows:")
        print(framed(screen), flush=True)
        client.wait_boot(600)
        same = compare(client, attach(client, command_on(screen)), expected)
        if same:
            say("All bytes of both disks came over the network as they are on the target.")
        else:
            say("The disks DIFFER.")
        if interactive:
            converse({"target": target, "client": client})
    return same


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="storagetm-demo-") as directory:
        try:
            same = demonstrate(
                Path(directory), interactive=os.environ.get("INTERACTIVE", "") not in ("", "0")
            )
        except MachineError as e:
            print(f"The demonstration failed: {e}", file=sys.stderr)
            return 1
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
