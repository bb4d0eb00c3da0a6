# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules for access: what they match, and what becomes of those that match nothing.

Most are on captured machines; see conftest.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import storagetm
from storagetm import READ_ONLY, READ_WRITE, SNAPSHOT
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import Named, wanted_of

Unpack = Callable[[str], CapturedMachine]
Rules = Sequence[tuple[str, str]]

UUID = "/dev/disk/by-uuid/4c1cc108-88db-455c-9488-153b39c2c834"  # of vdb1
NOTHING = "/dev/disk/by-label/DATA"


def every(rules: Rules, mode: str = READ_WRITE) -> storagetm.Inventory:
    """All disks of a captured machine."""
    inventory = storagetm.Inventory([storagetm.BlockDevices()], storagetm.Access(rules, mode))
    inventory.rescan()
    return inventory


def accesses(inventory: storagetm.Inventory) -> dict[str, str]:
    return {e.disk.name: e.access for e in inventory.candidates()}


# One rule and one disk


def disk(node: str, *links: str, serial: str = "", model: str = "") -> storagetm.Disk:
    made = storagetm.Disk(node.rpartition("/")[2], node, node.rpartition("/")[2])
    made.serial, made.model = serial, model
    made.udev_entry = b"".join(b"S:%s\n" % link.removeprefix("/dev/").encode() for link in links)
    return made


@pytest.mark.parametrize(
    ("glob", "matches"),
    [
        ("/dev/sda", True),
        ("/dev/sd*", True),
        ("/dev/sd?", True),
        ("/dev/sd[b-z]", False),
        ("sda", False),
        ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", True),
        ("*ata-1", True),
        ("WD-123*", True),
        ("wd-123*", False),
        ("WDC_WD40*", True),
        ("WDC WD40*", True),
        ("WDC_WD40EFRX_WD-1234", True),
        ("", False),
    ],
)
def test_rule_matches_node_link_serial_or_model(glob: str, matches: bool) -> None:
    found = disk(
        "/dev/sda", "/dev/disk/by-path/pci-0000:00:1f.2-ata-1", serial="WD-1234", model="WDC_WD40EFRX"
    )
    found.id_serial = "WDC_WD40EFRX_WD-1234"
    access = storagetm.Access([(glob, READ_WRITE)], SNAPSHOT)
    assert access.of(found) == (READ_WRITE if matches else SNAPSHOT)


def test_first_rule_counts() -> None:
    access = storagetm.Access([("/dev/sda", SNAPSHOT), ("/dev/sd*", READ_WRITE), ("*", READ_ONLY)])
    assert [access.of(disk(n)) for n in ("/dev/sda", "/dev/sdb", "/dev/vda")] == [
        SNAPSHOT,
        READ_WRITE,
        READ_ONLY,
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("/dev/sda:read-write", ("/dev/sda", READ_WRITE)),
        ("/dev/disk/by-path/pci-0000:00:1f.2*:snapshot", ("/dev/disk/by-path/pci-0000:00:1f.2*", SNAPSHOT)),
    ],
)
def test_rule_is_glob_and_mode(text: str, rule: tuple[str, str]) -> None:
    assert storagetm.parse_rule(text) == rule


@pytest.mark.parametrize("text", ["", "/dev/sda", "/dev/sda:", ":read-write", "/dev/sda:rw", "read-only"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(storagetm.UsageError, match="--access="):
        storagetm.parse_rule(text)


# What they match


@pytest.mark.parametrize(
    "glob",
    [
        "/dev/vdb",
        "/dev/vdb1",
        "/dev/vdb2",
        UUID,
        "/dev/disk/by-id/virtio-DISK-ALPHA-part1",
        "/dev/disk/by-partuuid/f22bc3f2-02",
        "/dev/disk/by-path/pci-0000:00:09.0-part*",
        "DISK-ALPHA",
    ],
)
@pytest.mark.parametrize(("mode", "default"), [(READ_ONLY, READ_WRITE), (READ_WRITE, READ_ONLY)])
def test_partition_stands_for_its_disk(unpack: Unpack, glob: str, mode: str, default: str) -> None:
    unpack("trixie-partitioned")
    inventory = every([(glob, mode)], default)
    found = accesses(inventory)
    assert found.pop("vdb") == mode
    assert set(found.values()) == {default}
    assert inventory.idle_rules() == []


@pytest.mark.parametrize(
    ("rules", "access"),
    [
        # The first one counts, whatever of the disk it is for.
        ([(UUID, READ_WRITE), ("*", READ_ONLY)], READ_WRITE),
        ([(UUID, READ_WRITE), ("/dev/vd*", READ_ONLY)], READ_WRITE),
        ([("/dev/vdb", SNAPSHOT), (UUID, READ_WRITE)], SNAPSHOT),
        ([(UUID, READ_ONLY), ("*", READ_WRITE)], READ_ONLY),
        # But a partition with a rule of its own is never less protected than that says.
        ([("/dev/vdb1", READ_WRITE), ("/dev/vdb2", READ_ONLY)], READ_ONLY),
        ([("/dev/vdb", READ_WRITE), ("/dev/vdb2", SNAPSHOT)], SNAPSHOT),
        ([("/dev/vdb", READ_WRITE), (UUID, SNAPSHOT), ("/dev/vdb2", READ_ONLY)], READ_ONLY),
        ([("/dev/vdb2", SNAPSHOT), ("/dev/vdb1", READ_WRITE)], SNAPSHOT),
    ],
)
def test_first_rule_counts_unless_a_partition_needs_more(unpack: Unpack, rules: Rules, access: str) -> None:
    unpack("trixie-partitioned")
    assert accesses(every(rules))["vdb"] == access


def test_protection_holds_for_what_is_stacked(unpack: Unpack) -> None:
    """To write to an array changes its disks, and to write to a disk changes what is on it."""
    machine = unpack("trixie-assembled")
    below = min(os.listdir(machine.path("/sys/class/block/md1/slaves")))
    link = "/dev/disk/by-id/md-name-machine:1"
    assert accesses(every([(link, READ_ONLY)]))[below] == READ_ONLY
    assert every([(f"/dev/{below}", READ_ONLY)]).exports["md1"].access == READ_ONLY
    # Not the other way round.
    assert accesses(every([(link, READ_WRITE)], READ_ONLY))[below] == READ_ONLY
    assert every([(f"/dev/{below}", READ_WRITE)], READ_ONLY).exports["md1"].access == READ_ONLY


def test_rule_matches_the_path_on_the_command_line(
    unpack: Unpack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it leads over, as it was typed and in full; also that of a file."""
    machine = unpack("trixie-partitioned")
    shutil.rmtree(machine.path("/run/udev"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(bytes(512))
    machine.status["/dev/my-disk"] = machine.status["/dev/vdc"]
    paths = ("/dev/my-disk", "./image")
    for glob in ("/dev/my-disk", "/dev/my-*", "/dev/vdc", "./image", f"{tmp_path}/image"):
        inventory = storagetm.Inventory(
            [storagetm.NamedDisks(paths)], storagetm.Access([(glob, SNAPSHOT)], READ_WRITE)
        )
        inventory.check_named()
        found = {e.disk.name: e.access for e in inventory.exports.values()}
        named = "image" if "image" in glob else "my-disk"
        assert found.pop(named) == SNAPSHOT, glob
        assert set(found.values()) == {READ_WRITE}


def test_rule_for_either_of_two_paths_counts(unpack: Unpack) -> None:
    machine = unpack("trixie-partitioned")
    machine.status["/dev/my-disk"] = machine.status["/dev/vdc"]
    access = storagetm.Access([("/dev/my-disk", READ_ONLY)], READ_WRITE)
    inventory = storagetm.Inventory([storagetm.NamedDisks(("/dev/vdc", "/dev/my-disk"))], access)
    inventory.check_named()
    assert [disk.access for disk in inventory.exports.values()] == [READ_ONLY]


# Those that match nothing


@pytest.mark.parametrize(
    ("rules", "mode", "vdb", "others"),
    [
        # What it was to protect is not known, so all are protected.
        ([(NOTHING, READ_ONLY)], READ_WRITE, READ_ONLY, READ_ONLY),
        ([(NOTHING, READ_ONLY)], SNAPSHOT, READ_ONLY, READ_ONLY),
        ([(NOTHING, SNAPSHOT)], READ_WRITE, READ_ONLY, READ_ONLY),
        ([(NOTHING, READ_ONLY), ("*", READ_WRITE)], READ_ONLY, READ_ONLY, READ_ONLY),
        ([(NOTHING, READ_ONLY), ("/dev/vdb", READ_WRITE)], READ_ONLY, READ_ONLY, READ_ONLY),
        # Only the first rule counts that is for a disk.
        ([("/dev/vdb", READ_WRITE), (NOTHING, READ_ONLY)], READ_WRITE, READ_WRITE, READ_ONLY),
        ([("/dev/vdb1", READ_WRITE), (NOTHING, READ_ONLY)], READ_WRITE, READ_WRITE, READ_ONLY),
        # One that protects nothing takes nothing away.
        ([(NOTHING, READ_WRITE)], READ_ONLY, READ_ONLY, READ_ONLY),
        ([(NOTHING, READ_WRITE)], SNAPSHOT, SNAPSHOT, SNAPSHOT),
        ([(NOTHING, SNAPSHOT)], SNAPSHOT, SNAPSHOT, SNAPSHOT),
        ([(NOTHING, SNAPSHOT)], READ_ONLY, READ_ONLY, READ_ONLY),
        # One that comes too late has matched nevertheless.
        ([("/dev/vd*", READ_WRITE), ("/dev/vdb", READ_ONLY)], READ_WRITE, READ_WRITE, READ_WRITE),
    ],
)
def test_rule_that_matches_nothing_protects_all(
    unpack: Unpack, rules: Rules, mode: str, vdb: str, others: str
) -> None:
    unpack("trixie-partitioned")
    found = accesses(every(rules, mode))
    assert found.pop("vdb") == vdb
    assert set(found.values()) == {others}


def test_rule_may_match_a_disk_that_is_not_exported(unpack: Unpack) -> None:
    """A rule for a disk that is in use, or that was not named, is no mistake."""
    unpack("trixie-partitioned")
    assert set(accesses(every([("/dev/disk/by-label/root", READ_ONLY)])).values()) == {READ_WRITE}
    for glob, expected in (("/dev/vdb1", READ_WRITE), ("/dev/vdx", READ_ONLY)):
        access = storagetm.Access([(glob, READ_ONLY)], READ_WRITE)
        inventory = storagetm.Inventory([storagetm.NamedDisks(("/dev/vdc",))], access)
        inventory.check_named()
        assert [disk.access for disk in inventory.exports.values()] == [expected]


@pytest.mark.parametrize(
    ("rule", "default", "text"),
    [
        (
            (NOTHING, READ_ONLY),
            READ_WRITE,
            f"--access={NOTHING}:read-only matches no disk; until one does, all that no rule before it "
            "matches are read-only",
        ),
        ((NOTHING, READ_WRITE), READ_ONLY, f"--access={NOTHING}:read-write matches no disk"),
        (
            ("disk-alpha", READ_WRITE),
            READ_ONLY,
            "--access=disk-alpha:read-write matches no disk (there is 'DISK-ALPHA', and case matters)",
        ),
        (
            ("/dev/disk/BY-UUID/4C1cc108*", READ_WRITE),
            READ_ONLY,
            "--access=/dev/disk/BY-UUID/4C1cc108*:read-write matches no disk (there is "
            f"'{UUID}', and case matters)",
        ),
        (
            ("/dev/my-disk", READ_WRITE),
            READ_ONLY,
            "--access=/dev/my-disk:read-write matches no disk (it leads to '/dev/vdc', but udev does not "
            "know it; give that)",
        ),
    ],
)
def test_idle_rule_is_named(unpack: Unpack, rule: tuple[str, str], default: str, text: str) -> None:
    machine = unpack("trixie-partitioned")
    machine.status["/dev/my-disk"] = machine.status["/dev/vdc"]
    inventory = every([rule], default)
    assert inventory.idle_rules() == [text]


def test_late_match_changes_only_what_has_no_clients(unpack: Unpack) -> None:
    """The disk that a rule is for comes later; what has clients by then stays as it is, others change."""
    machine = unpack("trixie-partitioned")
    entry = machine.path("/run/udev/data/b254:32")
    content = entry.read_bytes()
    inventory = every([("/dev/disk/by-label/DATA", READ_ONLY)])
    held = inventory.exports["vdd"]
    held.fd = os.open("/dev/null", os.O_RDONLY)
    entry.write_bytes(content + b"S:disk/by-label/DATA\n")
    inventory.update(["vdc"])
    assert {name for name, access in accesses(inventory).items() if access == READ_ONLY} == {"vdc", "vdd"}
    # It has matched, whether the disk is there or not.
    entry.write_bytes(content)
    inventory.update(["vdc"])
    assert inventory.exports["vdb"].access == READ_WRITE
    held.release()


# udev


def test_rule_that_needs_udev_is_refused_without_it(unpack: Unpack) -> None:
    """What only udev knows is an error where it does not run; all else works."""
    machine = unpack("trixie-partitioned")
    shutil.rmtree(machine.path("/run/udev"))
    inventory = every([("/dev/vdb1", READ_ONLY), ("DISK-SCSI", READ_ONLY), ("/dev/vd*", SNAPSHOT)])
    inventory.check_rules()
    found = accesses(inventory)
    assert (found["vdb"], found["sda"], found["vdc"], found["sdb"]) == (
        *(READ_ONLY, READ_ONLY, SNAPSHOT),
        READ_WRITE,
    )
    inventory = every([(UUID, READ_ONLY)])
    with pytest.raises(storagetm.UserError, match=f"^--access={UUID}:read-only cannot match, since udev"):
        inventory.check_rules()
    machine.status[UUID] = machine.status["/dev/vdb1"]
    with pytest.raises(storagetm.UserError, match=r"model: --access=/dev/vdb1:read-only$"):
        inventory.check_rules()


def test_partitions_are_waited_for(unpack: Unpack) -> None:
    """A disk is not known before its partitions are, if their links might make a difference."""
    machine = unpack("trixie-partitioned")
    machine.write("/run/udev/control", "")
    entry = machine.path("/run/udev/data/b254:17")
    content = entry.read_bytes()
    entry.unlink()
    assert every([]).exports["vdb"].waiting == ""
    inventory = every([(UUID, READ_ONLY)])
    assert inventory.exports["vdb"].waiting == "udev is not done with '/dev/vdb1'"
    # Nor are those to which the rule may apply instead.
    assert inventory.undecided(inventory.exports["vdc"], 0) == "/dev/vdb"
    entry.write_bytes(content)
    inventory.update(["vdb1"])
    assert inventory.exports["vdb"].waiting == ""
    assert inventory.undecided(inventory.exports["vdc"], 0) == ""
    assert (inventory.exports["vdb"].access, inventory.exports["vdc"].access) == (READ_ONLY, READ_WRITE)


def test_access_that_clients_have_is_told(unpack: Unpack) -> None:
    """What an earlier run exported is told from what is in between."""
    unpack("trixie-partitioned")
    transport = storagetm.NvmeTcp(Named(), "nqn.test")
    tree = storagetm.Tree("/nonexistent/", storagetm.Ledger("/nonexistent/ledger"))
    wanted = storagetm.Wanted("nqn.test", [transport], tree, locks=True)
    disk = every([]).exports["vdb"]
    for access in storagetm.ACCESS:
        disk.access = access
        branch = wanted_of(transport, disk, "nqn.test")[-1]
        tree.live = {branch.root: branch}
        assert wanted.live_access(disk) == access
        branch.tag = "other"
        assert wanted.live_access(disk) == ""
    tree.live = {}
    assert wanted.live_access(disk) == ""
