# SPDX-License-Identifier: LGPL-2.1-or-later
"""One subsystem for all disks: which namespace a disk is, and what is shown of it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import storagetm


def disk(name: str, serial: str = "") -> storagetm.Disk:
    made = storagetm.Disk(name, f"/dev/{name}", name)
    made.id_serial = serial
    made.fd = os.open("/dev/null", os.O_RDONLY)
    return made


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "quux.namespaces")


def numbers(path: str) -> storagetm.Numbers:
    made = storagetm.Numbers(path)
    made.kept = True
    return made


def test_numbers_last(path: str) -> None:
    """The same disk has the same number, in this run and in the next; another disk never gets it."""
    first, second = disk("sda", "ONE"), disk("sdb", "TWO")
    before = numbers(path)
    assert [before.take(first), before.take(second), before.take(first)] == [1, 2, 1]
    first.close()
    returned, other = disk("sdc", "ONE"), disk("sda", "THREE")
    assert before.take(other) == 3
    assert before.take(returned) == 1
    after = numbers(path)
    assert [after.take(other), after.take(second), after.take(returned)] == [3, 2, 1]
    assert after.take(disk("sdd", "FOUR")) == 4
    # While none of those is there.
    assert numbers(path).take(disk("sda", "FIVE")) == 5


def test_twins(path: str) -> None:
    """Two disks that say that they are the same one have two numbers, and keep both."""
    first, second = disk("sda", "SAME"), disk("sdb", "SAME")
    found = numbers(path)
    assert [found.take(first), found.take(second), found.take(first), found.take(second)] == [1, 2, 1, 2]
    first.close()
    assert found.take(disk("sdc", "SAME")) == 1


def test_nothing_is_written_before_the_lock_is_held(path: str) -> None:
    """As in a dry run."""
    found = storagetm.Numbers(path)
    assert found.take(disk("sda", "ONE")) == 1
    assert not os.path.exists(path)


def test_place_for_numbers_is_full(capfd: pytest.CaptureFixture[str]) -> None:
    """The disk is exported all the same, and why its number may not last is said."""
    assert numbers("/proc/none").take(disk("sda", "ONE")) == 1
    assert "Failed to note the number of a namespace in '/proc/none'" in capfd.readouterr().err


def test_number_that_does_not_fit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is written in part would take the next one with it, and two disks be one."""
    found = numbers(path)
    found.take(disk("sda", "ONE"))
    before = Path(path).read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
        assert found.take(disk("sdb", "TWO")) == 2
    assert Path(path).read_bytes() == before


def test_too_many_namespaces() -> None:
    """The kernel's reason is one that it also has for open files."""
    transport = storagetm.NvmeTcp(storagetm.Machine(), "quux", shared=True)
    problem = OSError(errno.EMFILE, "", "nvmet/subsystems/quux/namespaces/1025/enable")
    assert "--subsystem=per-disk" in transport.why_refused(problem)
    transport.shared = False
    assert transport.why_refused(problem) == ""
    problem.filename = "/dev/sda"
    assert "ulimit" in storagetm.reason_of(problem)


@given(st.binary(max_size=200))
@example(b"1 x\n1 y\n0 z\n-1 a\n2\n 3 b\n1e3 c\n")
@example(b"9" * 5000 + b" x\n")
@example("² x\n".encode())
def test_any_bytes_as_numbers(raw: bytes) -> None:
    found = storagetm.Numbers("/nonexistent").parse(raw)
    assert all(0 < number < 10**9 for number in found.values())
    assert len(set(found.values())) == len(found)


def test_nguid() -> None:
    """It lasts, differs from disk to disk, also without serial numbers, and is not the UUID."""
    transport = storagetm.NvmeTcp(storagetm.Machine(), "quux", shared=True)
    disks = [disk("sda", "ONE"), disk("sdb", "TWO"), disk("nullb0"), disk("nullb1")]
    found = [transport.nguid(d) for d in disks]
    assert found == [transport.nguid(d) for d in disks]
    assert len(set(found)) == 4
    assert not set(found) & {transport.uuid(d) for d in disks}


def test_option() -> None:
    assert storagetm.parse_arguments(["--all", "--subsystem=shared"]).subsystem == storagetm.SHARED
    assert storagetm.parse_arguments(["--all", "--subsystem", "per-disk"]).subsystem == storagetm.PER_DISK
    with pytest.raises(storagetm.UsageError, match="--subsystem=one is neither per-disk nor shared"):
        storagetm.parse_arguments(["--all", "--subsystem=one"])
    words = ["rd.storagetm.subsystem=shared"]
    assert storagetm.options_from_kernel(words, True).subsystem == storagetm.SHARED


def test_shown() -> None:
    """One command attaches all; which namespace is which disk is said."""
    transport = storagetm.NvmeTcp(storagetm.Machine(), "quux", shared=True)
    transport.ports = {storagetm.AF_INET: 16858}
    disks = [disk("sda", "ONE"), disk("sdb", "TWO")]
    disks[0].serial = "DISK-ONE"
    for d in disks:
        d.size, d.access = 1 << 30, storagetm.READ_ONLY
        d.branch = transport.disk_branch(d)
    address = storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", link_local=False)
    report = storagetm.Report(storagetm.Machine(), transport, [address], disks, storagetm.Memory())
    text = "\n".join(line for block in report.blocks(80) for _, line in block)
    assert "nvme connect -t tcp -a 192.0.2.1 -s 16858 -n quux" in " ".join(text.split())
    assert "connect-all" not in text
    assert "   1  /dev/sda " in text
    assert "   2  /dev/sdb " in text
    # Clients see no serial numbers of disks, so that one that is made up would tell nobody anything.
    assert re.search("sda .*DISK-ONE", text)
    assert re.search("sdb .*TWO", text)
    assert transport.serial(disks[1]) not in text
    facts = "\n".join(report.facts().values())
    assert "Exporting '/dev/sdb'" in facts
    assert "as quux, namespace 2" in facts
    assert transport.serial(disks[1]) not in facts
