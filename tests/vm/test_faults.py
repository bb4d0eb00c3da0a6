"""Killed, or refused by the kernel, at any step: strace does both, without hooks in the program."""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests import bench
from tests.harness.images import PROJECT
from tests.harness.machine import Machine, Process

DEVICE = "/dev/disk/by-id/virtio-DISK-ALPHA"
# What there is at least for one disk: two ports, a subsystem and a namespace, and so on.
LEAST = {"mkdir": 4, "symlink": 2, "write": 15, "rmdir": 4, "unlink": 2}


@pytest.fixture(scope="module")
def installed(target: Machine) -> str:
    """The program with its bytecode: it is started a few hundred times."""
    bench.install(target)
    target.put("/root/inject.py", PROJECT / "tests/harness/guest/inject.py")
    target.run("modprobe nvmet-tcp")
    return "/usr/local/bin/storagetm"


@pytest.mark.parametrize("call", LEAST)
@pytest.mark.parametrize("mode", ["kill", "fail"])
def test_every_step(target: Machine, installed: str, mode: str, call: str) -> None:
    """Whichever call is the last one, the next start recovers; whichever fails, nothing is left behind."""
    output = target.run(["python3", "/root/inject.py", mode, call, installed, DEVICE], timeout=1500).stdout
    result = json.loads(output)
    print(f"{mode} at each {call}: {result['calls']} times, exit codes {result['codes']}")
    assert not result["problems"], "\n".join(result["problems"])
    assert result["calls"] >= LEAST[call]


def wait_for_lines(machine: Machine, process: Process, count: int) -> None:
    machine.wait_until(lambda: len(process.output.splitlines()) >= count or None, timeout=300)


def test_killed_while_read(target: Machine, client: Machine, installed: str) -> None:
    """A client that reads all the while notices nothing of the program's death and return."""
    target.run(f"dd if=/dev/urandom of={DEVICE} bs=1M count=64 conv=fsync")
    checksum = target.run(f"sha256sum <{DEVICE}").stdout
    process = target.start_process([installed, DEVICE])
    command = process.wait_output(r"nvme connect-all -t tcp -a 192\.0\.2\.1 -s \d+")[0]
    process.wait_output("Exporting")
    client.run("dmesg --clear; modprobe nvme-tcp; rm -f /run/enough")
    client.run(command)
    client.wait_run("test -b /dev/nvme1n1 && udevadm settle")
    loop = (
        "until test -e /run/enough; do dd if=/dev/nvme1n1 bs=1M iflag=direct status=none | sha256sum; done"
    )
    reader = client.start_process(loop)
    reader.wait_output("-")
    for _ in range(5):
        process.kill(signal.SIGKILL)
        process.wait()
        seen = len(reader.output.splitlines())
        process = target.start_process([installed, DEVICE])
        process.wait_output("Exporting")
        wait_for_lines(client, reader, seen + 2)
    client.put("/run/enough", b"")
    assert reader.wait() == 0
    sums = reader.output.splitlines(keepends=True)
    print(f"{len(sums)} times the whole disk was read, while the program was killed 5 times.")
    assert set(sums) == {checksum}
    log = client.run("dmesg").stdout
    assert not re.search(r"I/O error|reconnect|reset|timeout|queue error", log, re.IGNORECASE), log
    client.run("nvme disconnect-all")
    process.kill()
    assert process.wait() == 0
    assert not target.run(
        "ls /sys/kernel/config/nvmet/ports /sys/kernel/config/nvmet/subsystems | grep -v :$", check=False
    ).stdout.strip()
