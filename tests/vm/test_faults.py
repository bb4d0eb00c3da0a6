"""Killed, or refused by the kernel, at any step: strace does both, without hooks in the program."""

from __future__ import annotations

import json

import pytest

from tests import bench
from tests.harness.images import PROJECT
from tests.harness.machine import Machine

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
