# SPDX-License-Identifier: LGPL-2.1-or-later
"""One subsystem for all disks: which namespace a disk is, and what is shown of it."""

from __future__ import annotations

import errno
import re

import pytest

import storagetm
from tests.unit.exports import Named, made_export, wanted_of


def test_too_many_namespaces_are_not_too_many_files() -> None:
    """The kernel's reason is one that it also has for open files."""
    transport = storagetm.SharedNvmeTcp(Named(), "quux")
    problem = OSError(errno.EMFILE, "", "/dev/sda")
    entry = storagetm.Attribute("nvmet/subsystems/quux/namespaces/1025/enable", "1")
    failure = storagetm.Failure(storagetm.Branch("", [entry]), entry, problem)
    assert "--subsystem=per-disk" in transport.explain(failure)
    assert storagetm.NvmeTcp(Named(), "quux").explain(failure) == ""
    assert "ulimit" in storagetm.reason_of(problem)


def test_nguid_lasts_and_is_of_one_disk() -> None:
    """It lasts, differs from disk to disk, also without serial numbers, and is not the UUID."""
    transport = storagetm.SharedNvmeTcp(Named(), "quux")
    disks = [
        made_export("sda", id_serial="ONE"),
        made_export("sdb", id_serial="TWO"),
        made_export("nullb0"),
        made_export("nullb1"),
    ]
    found = [transport.identities.nguid(d) for d in disks]
    assert found == [transport.identities.nguid(d) for d in disks]
    assert len(set(found)) == 4
    assert not set(found) & {transport.identities.uuid(d) for d in disks}


def test_option_says_which_kind() -> None:
    assert storagetm.parse_arguments(["--all", "--subsystem=shared"]).subsystem == storagetm.SHARED
    assert storagetm.parse_arguments(["--all", "--subsystem", "per-disk"]).subsystem == storagetm.PER_DISK
    with pytest.raises(storagetm.UsageError, match="--subsystem=one is neither per-disk nor shared"):
        storagetm.parse_arguments(["--all", "--subsystem=one"])
    words = ["rd.storagetm.subsystem=shared"]
    assert storagetm.options_from_kernel(words, True).subsystem == storagetm.SHARED


def test_one_command_attaches_all() -> None:
    """One command attaches all; which namespace is which disk is said."""
    transport = storagetm.SharedNvmeTcp(Named(), "quux")
    transport.ports = {storagetm.AF_INET: 16858}
    disks = [made_export("sda", id_serial="ONE"), made_export("sdb", id_serial="TWO")]
    disks[0].disk.serial = "DISK-ONE"
    for number, d in enumerate(disks, 1):
        d.stay = storagetm.Stay(number, "")
        d.disk.size, d.access = 1 << 30, storagetm.READ_ONLY
        d.live = {transport.name: wanted_of(transport, d, "quux")[-1]}
    address = storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", link_local=False)
    report = storagetm.take_report(Named(), [transport], [address], disks, storagetm.Memory())
    text = "\n".join(line for block in report.blocks(80) for _, line in block)
    assert "nvme connect -t tcp -a 192.0.2.1 -s 16858 -n quux" in " ".join(text.split())
    assert "connect-all" not in text
    assert "   0x1 /dev/sda " in text
    assert "   0x2 /dev/sdb " in text
    # Clients see no serial numbers of disks, so that one that is made up would tell nobody anything.
    assert re.search("sda .*DISK-ONE", text)
    assert re.search("sdb .*TWO", text)
    assert transport.identities.serial(disks[1]) not in text
    facts = "\n".join(fact.text for fact in report.facts())
    assert "Exporting '/dev/sdb'" in facts
    assert "as quux, namespace 0x2" in facts
    assert transport.identities.serial(disks[1]) not in facts
