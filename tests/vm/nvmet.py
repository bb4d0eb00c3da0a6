# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests of the kernel's NVMe target share: the tool as a service, and what is in configfs.

The tool runs as a unit of type "notify", so that starting it waits for READY=1 and stopping it for its end,
by the service manager's own account, and so that it says what it says in the journal.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence

from tests.harness.machine import CommandError, Machine
from tests.vm.conftest import TOOL

NVMET = "/sys/kernel/config/nvmet"
NAMES_SCRIPT = f"(cd {NVMET} 2>/dev/null && ls -d subsystems/* ports/* 2>/dev/null; true)"


class Service:
    """A program that runs as a unit. `properties` are systemd's, in the form NAME=VALUE."""

    def __init__(
        self,
        machine: Machine,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        properties: Sequence[str] = (),
        program: str = TOOL,
    ) -> None:
        self.machine = machine
        self.unit = f"test-{secrets.token_hex(4)}.service"
        self.command = [
            *("systemd-run", "--quiet", f"--unit={self.unit}", "--property=Type=notify"),
            *(f"--property={p}" for p in properties),
            *(f"--setenv={name}={value}" for name, value in (environment or {}).items()),
            *("--", program, *arguments),
        ]

    def start(self, timeout: float = 180) -> set[str]:
        """Starts it and waits until it is ready. Returns what was in configfs before, see `names()`.

        Raises CommandError if it ends before.
        """
        # Few commands, since each takes its time in an emulated machine.
        script = f"{NAMES_SCRIPT}; {shlex.join(self.command)}"
        result = self.machine.run(script, check=False, timeout=timeout)
        if result.returncode:
            raise CommandError(f"{shlex.join(self.command)} failed:\n{result.stderr}{self.output}")
        return set(result.stdout.splitlines())

    def stop(self, timeout: float = 180) -> set[str]:
        """Stops it and waits for its end, which has to be a clean one. Returns what is in configfs then."""
        script = f"systemctl stop {self.unit} && ! systemctl --quiet is-failed {self.unit} && {NAMES_SCRIPT}"
        return set(self.machine.run(script, timeout=timeout).stdout.splitlines())

    def kill(self, signal: str) -> None:
        self.machine.run(["systemctl", "kill", f"--signal={signal}", "--kill-whom=main", self.unit])

    def show(self, name: str) -> str:
        """A property of the unit, such as StatusText."""
        return self.machine.run(
            ["systemctl", "show", "--value", f"--property={name}", self.unit]
        ).stdout.rstrip("\n")

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    def journal(self) -> list[tuple[int, str]]:
        """What it has said: syslog priority and line of each message."""
        self.machine.run("journalctl --sync")
        raw = self.machine.run(
            ["journalctl", "--output=json", "--all", f"_SYSTEMD_UNIT={self.unit}"]
        ).stdout_bytes
        entries = [json.loads(line) for line in raw.splitlines()]
        return [(int(e["PRIORITY"]), e["MESSAGE"]) for e in entries]

    @property
    def output(self) -> str:
        return "".join(f"{line}\n" for _, line in self.journal())

    def state(self) -> str:
        """What tells best why something did not happen: where it stands, and what others are busy with."""
        script = f"""
            systemctl show --property=ActiveState,StatusText,CPUUsageNSec {self.unit}
            cat /proc/uptime /proc/loadavg; head /proc/pressure/*
            lsblk --nodeps --noheadings --output NAME,SERIAL,SIZE,RO
            ls /run/udev/queue; for b in /sys/block/[sv]d*; do
            echo $b $(cat $b/diskseq $b/inflight) $(grep diskseq /run/udev/data/b$(cat $b/dev)); done
            ps -eo pid,stat,etimes,wchan:30,args | grep -E '^ *[0-9]+ D|udev|storagetm'
            cat /proc/locks; dmesg | tail -n 15"""
        said = "\n".join(self.output.splitlines()[-25:])
        return f"{said}\n{self.machine.run(script, check=False).stdout}"

    def wait_output(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        """Waits until a regular expression is found in what it has said."""

        def search() -> re.Match[str] | None:
            return re.search(pattern, self.output, re.MULTILINE)

        return self.machine.wait_until(search, timeout)


@contextlib.contextmanager
def exporting(
    machine: Machine,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    properties: Sequence[str] = (),
    program: str = TOOL,
) -> Iterator[Service]:
    """Runs the tool and, in the end, stops it; then nothing of it may be left in configfs."""
    service = Service(machine, arguments, environment=environment, properties=properties, program=program)
    before = service.start()
    try:
        yield service
    except BaseException:
        print(f"What it said last, and the machine's state:\n{service.state()}")
        machine.run(f"systemctl stop {service.unit}; systemctl reset-failed {service.unit}", check=False)
        raise
    after = service.stop()
    if program == TOOL:
        assert after == before


def names(machine: Machine) -> set[str]:
    """The subsystems and ports that there are, as subsystems/NQN and ports/NUMBER."""
    return set(machine.run(NAMES_SCRIPT).stdout.splitlines())


def exported(machine: Machine) -> set[str]:
    """The names of the disks that are exported: in a subsystem with a namespace that is on, at some port."""
    script = f"cd {NVMET} 2>/dev/null && cd ports && for link in */subsystems/*; do "
    script += '[ "$(cat "$link"/namespaces/*/enable 2>/dev/null)" = 1 ] && echo "${link##*.}"; done'
    return set(machine.run(script, check=False).stdout.split())


# Prints all of configfs below nvmet as JSON: the text of an attribute, the target of a link with "-> " in
# front, nothing for a directory, and for what cannot be read, the error's number. What a device_path leads
# to is in a line of its own behind it; if that is a device-mapper device of the tool, what it is made of is
# what counts, and the kind of access comes behind it.
TREE_SCRIPT = """
import json, os
found = {}
for top in ("subsystems", "ports", "hosts"):
    for directory, directories, files in os.walk(top):
        found[directory + "/"] = ""
        for name in directories + files:
            path = os.path.join(directory, name)
            if os.path.islink(path):
                found[path] = "-> " + os.readlink(path)
            elif os.path.isfile(path):
                try:
                    with open(path) as file:
                        found[path] = file.read()
                except OSError as e:
                    found[path] = f"errno {e.errno}"
                if name == "device_path":
                    node = os.path.realpath(found[path].rstrip("\\n"))
                    base = "/sys/block/" + os.path.basename(node)
                    if os.path.basename(node).startswith("dm-"):
                        with open(base + "/dm/uuid") as file:
                            uuid = file.read()
                        if uuid.startswith("storagetm-"):
                            below = sorted(os.listdir(base + "/slaves"), key=lambda n: n.startswith("loop"))
                            node = "/dev/" + below[0]
                            found[path] = node + "\\n"
                    found[path] += "-> " + node
print(json.dumps(found))
"""


def tree(machine: Machine) -> dict[str, str]:
    """All that is in configfs below nvmet, by path: see TREE_SCRIPT."""
    result = machine.run(f"cd {NVMET} && python3 -", stdin=TREE_SCRIPT)
    found: dict[str, str] = json.loads(result.stdout)
    return found


def remove(machine: Machine, *roots: str) -> None:
    """Removes subsystems and ports, as subsystems/NQN and ports/NUMBER, that another program has left."""
    for root in sorted(roots):  # ports first
        machine.run(
            f"cd {NVMET}/{shlex.quote(root)} && "
            "find . -type l -delete; rmdir namespaces/* 2>/dev/null; cd ..; rmdir $OLDPWD",
        )


def left_over(machine: Machine) -> list[str]:
    """What is in the tool's directory but locks, which stay for whoever waits for them, and who is who."""
    names = machine.run("ls -A /run/storagetm 2>/dev/null", check=False).stdout.splitlines()
    return [name for name in names if not name.endswith((".lock", ".disks", ".awaited"))]


def number_of(machine: Machine, nqn: str) -> str:
    """The number of the only namespace of a subsystem."""
    return machine.run(f"ls {NVMET}/subsystems/{shlex.quote(nqn)}/namespaces").stdout.strip()
