# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which disks there are, what they are called, and which are left out for what reason.

On machines captured by capture.py: QEMU's, with every kind of disk it has.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storagetm
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import made_export

Unpack = Callable[[str], CapturedMachine]

READ_ONLY = "it is read-only, and was asked for read-write; see --read-only and --snapshot"
NO_MEDIUM = "No medium found; insert one and it will be exported"
ROOT = "it is in use: '/dev/vda' is mounted on '/'"
VOLUME = "it is in use: '/dev/dm-1' (group-volume) is mounted on '/mnt/on the stack'"

# Why --all leaves disks of the captured machines out; no reason is no text. Loop devices all have the same.
FRESH = {
    "nbd0": "it comes over the network (NBD)",
    "nvme0n1": "",
    "ram0": "it is a RAM disk",
    "sda": "",
    "sdb": "",
    "sdc": "",
    "sr0": READ_ONLY,
    "sr1": NO_MEDIUM,
    "vda": ROOT,
    "vdb": "",
    "vdc": "",
    "vdd": "",
    "vde": "",
    "vdf": READ_ONLY,
    "zram0": "it is a compressed RAM disk",
}
USED = {
    **FRESH,
    "dm-0": "it is part of '/dev/dm-1'",
    "dm-1": VOLUME,
    "md0": "it is part of '/dev/dm-0'",
    "nvme0n1": "it is in use: '/dev/nvme0n1' is part of a mounted btrfs",
    "sdc": "it is in use: '/dev/sdc' is in use by the system, which does not tell what for",
    "vdb": "it is in use: '/dev/vdb1' is mounted on '/mnt/alpha1'",
    "vdc": VOLUME,
    "vdd": VOLUME,
    "vde": "it is in use: '/dev/vde' is mounted on '/mnt/btrfs'",
}
# Nothing of it is in use. The disks are exported, and what is made of them is not.
ASSEMBLED = {
    **FRESH,
    "dm-0": "it is part of '/dev/dm-1'",
    "dm-1": "it is made of '/dev/vdc', which is exported; see --stacked",
    "md0": "it is part of '/dev/dm-0'",
    "md1": "it is made of '/dev/sda', which is exported; see --stacked",
}
ATTACHED = {"nvme0n1": "", "nvme1n1": "it comes over the network (NVMe/TCP)", "vda": ROOT, "vdb": ""}
STACKED = {**ATTACHED, "dm-0": "it is made of 'nvme1n1', which comes over the network (NVMe/TCP)"}

REASONS = {
    "trixie-fresh": FRESH,
    "trixie-partitioned": FRESH,
    "trixie-used": USED,
    "trixie-assembled": ASSEMBLED,
    "bookworm-used": USED,
    "attached-multipath": ATTACHED,
    "attached-multipath-stacked": STACKED,
    "attached-single": ATTACHED,
    "attached-single-stacked": STACKED,
}


def to_be_written() -> storagetm.Access:
    """What leaves out most: also those that are write-protected."""
    return storagetm.Access((), storagetm.READ_WRITE)


@pytest.fixture
def inventory() -> Iterator[storagetm.Inventory]:
    """All disks, as --all --read-write sees them."""
    found = storagetm.Inventory([storagetm.BlockDevices()], to_be_written())
    yield found
    for export in found.exports.values():
        export.release()


def reasons(inventory: storagetm.Inventory) -> dict[str, str]:
    return {name: d.left_out for name, d in inventory.exports.items() if not name.startswith("loop")}


def named(*paths: str, force: bool = False) -> storagetm.Inventory:
    """Disks as they are named on the command line, with --read-write."""
    found = storagetm.Inventory([storagetm.NamedDisks(paths)], to_be_written(), force=force)
    found.check_named()
    return found


# What --all takes


def test_what_is_in_between_is_no_disk(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """Loop devices of nothing and what is ours between a disk and its export are not told of."""
    machine = unpack("trixie-assembled")
    loop = machine.path("/sys/class/block/loop0")
    (loop / "loop").mkdir(exist_ok=True)
    (loop / "holders").mkdir(exist_ok=True)

    def seen() -> set[str]:
        inventory.rescan()
        return {n for n in inventory.exports if n in ("loop0", "dm-1")}

    def between() -> set[str]:
        return {name for name in ("loop0", "dm-1", "vda", "gone") if storagetm.is_between(name)}

    (loop / "loop/backing_file").unlink(missing_ok=True)
    assert seen() == {"dm-1"}
    # A loop device that was let go may have been the use of another disk.
    assert between() == set()
    machine.attribute("loop0", "loop/backing_file", "/image")
    assert seen() == {"loop0", "dm-1"}
    (loop / "holders/dm-1").touch()
    assert seen() == {"loop0", "dm-1"}
    assert between() == set()
    machine.attribute("dm-1", "dm/uuid", "storagetm-image-0123456789abcdef")
    assert seen() == set()
    assert between() == {"loop0", "dm-1"}
    (loop / "holders/dm-1").unlink()
    machine.attribute("loop0", "loop/backing_file", "/memfd:storagetm (deleted)")
    assert seen() == set()
    assert between() == {"loop0", "dm-1"}


@pytest.mark.parametrize("above", ["dm-1", "md0"])
def test_what_stands_on_an_export_is_no_disk(
    unpack: Unpack, inventory: storagetm.Inventory, above: str
) -> None:
    """No array or volume that was made of what is between a disk and its export is a disk, named or not."""
    machine = unpack("trixie-assembled")
    mapping = machine.path("/sys/devices/virtual/block/dm-9")
    (mapping / "dm").mkdir(parents=True)
    (mapping / "dm/uuid").write_text("storagetm-vdb-0123456789abcdef\n")
    (mapping / "slaves").mkdir()
    (mapping / "slaves/vdb").touch()
    machine.path("/sys/class/block/dm-9").symlink_to("../../devices/virtual/block/dm-9")
    # dm-1 is made of dm-0, and that of md0.
    (machine.path("/sys/class/block/md0") / "slaves/dm-9").touch()
    inventory.rescan()
    if above == "dm-1":
        assert (
            inventory.exports[above].left_out == "it is on '/dev/dm-9', through which '/dev/vdb' is exported"
        )
    with pytest.raises(storagetm.UserError, match="it is on '/dev/dm-9'"):
        named(f"/dev/{above}", force=True)


@pytest.mark.parametrize("name", REASONS)
def test_each_disk_is_left_out_for_its_reason(
    unpack: Unpack, inventory: storagetm.Inventory, name: str
) -> None:
    unpack(name)
    inventory.rescan()
    assert reasons(inventory) == REASONS[name]
    for sysname in inventory.exports.keys() - REASONS[name].keys():
        assert inventory.exports[sysname].left_out == "it is a loop device"


@pytest.mark.parametrize("access", [storagetm.READ_ONLY, storagetm.SNAPSHOT])
def test_write_protection_matters_only_where_disks_are_written(unpack: Unpack, access: str) -> None:
    """Then disks that are write-protected are exported as well."""
    unpack("trixie-fresh")
    inventory = storagetm.Inventory([storagetm.BlockDevices()], storagetm.Access((), access))
    inventory.rescan()
    assert reasons(inventory) == {**FRESH, "sr0": "", "vdf": ""}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_are_the_same_without_udev(
    unpack: Unpack, inventory: storagetm.Inventory, name: str
) -> None:
    shutil.rmtree(unpack(name).path("/run/udev"))
    inventory.rescan()
    assert reasons(inventory) == REASONS[name]
    assert not [e.disk.name for e in inventory.exports.values() if e.waiting]


@pytest.mark.parametrize("name", ["trixie-used", "attached-multipath-stacked"])
def test_all_twice_exports_even_what_is_in_use(unpack: Unpack, name: str) -> None:
    """Given twice, --all minds no use, but nothing becomes a disk of its own or local by that."""
    unpack(name)
    inventory = storagetm.Inventory([storagetm.BlockDevices()], to_be_written(), force=True)
    inventory.rescan()
    expected = {n: "" if why.startswith("it is in use") else why for n, why in REASONS[name].items()}
    if name == "trixie-used":
        expected["dm-1"] = "it is made of '/dev/vdc', which is exported; see --stacked"
    assert reasons(inventory) == expected


def test_stacked_exports_what_is_made_of_disks(unpack: Unpack) -> None:
    """What is made of disks is exported instead of these, and never both."""
    unpack("trixie-assembled")
    inventory = storagetm.Inventory([storagetm.BlockDevices()], to_be_written(), stacked=True)
    inventory.rescan()
    found = reasons(inventory)
    assert found["dm-1"] == found["md1"] == ""
    changed = {name for name in found if found[name] != ASSEMBLED[name]} - {"dm-1", "md1"}
    assert {found[n] for n in changed} == {
        "'/dev/dm-1' (group-volume), which is made of it, is exported",
        "'/dev/md1', which is made of it, is exported",
    }
    assert changed == {"sda", "vdc", "vdd"}


@pytest.mark.parametrize("first", ["vdc", "dm-1"])
def test_exported_first_stays_exported(unpack: Unpack, first: str) -> None:
    """Whatever comes later, and whatever is preferred otherwise."""
    unpack("trixie-assembled")
    inventory = storagetm.Inventory([storagetm.BlockDevices()], to_be_written(), stacked=first == "vdc")
    inventory.rescan()
    disk, other = inventory.exports[first], inventory.exports["dm-1" if first == "vdc" else "vdc"]
    disk.fd = os.open("/dev/null", os.O_RDONLY)
    inventory.rescan()
    assert disk.left_out == ""
    assert other.left_out
    # Once it is gone, its place is free.
    disk.release()
    inventory.update([])
    assert other.left_out == ""
    assert disk.left_out


def test_disks_with_data_in_common_are_refused(unpack: Unpack) -> None:
    unpack("trixie-assembled")
    for paths in (("/dev/vdc", "/dev/dm-1"), ("/dev/dm-1", "/dev/vdd"), ("/dev/vdb", "/dev/vdb1")):
        upper, lower = sorted(paths, key=lambda p: (not p.endswith("1"), p))
        with pytest.raises(storagetm.UserError, match=f"'{upper}': its data is on '{lower}'"):
            named(*paths, force=True)
    assert named("/dev/vdc", "/dev/md1").exports.keys() == {"vdc", "md1"}


class Multipath:
    """Two paths, the disk that they lead to, and its partition."""

    def __init__(self, machine: CapturedMachine) -> None:
        for name, uuid, label, lower in (
            ("dm-8", "mpath-3600", "mpatha", ("sda", "sdb")),
            ("dm-9", "part1-mpath-3600", "mpatha-part1", ("dm-8",)),
        ):
            number = f"252:{name[3:]}"
            base = f"/sys/devices/virtual/block/{name}"
            for path, text in (
                ("dm/uuid", uuid),
                ("dm/name", label),
                ("size", "131072"),
                ("ro", "0"),
                ("dev", number),
                ("uevent", f"MAJOR=252\nMINOR={name[3:]}\nDEVNAME={name}\nDISKSEQ=9{name[3:]}"),
            ):
                machine.write(f"{base}/{path}", text + "\n")
            for directory in ("slaves", "holders"):
                machine.path(f"{base}/{directory}").mkdir()
            for link in (f"/sys/block/{name}", f"/sys/class/block/{name}"):
                machine.path(link).symlink_to(f"{'../' * (link.count('/') - 2)}devices/virtual/block/{name}")
            for below in lower:
                machine.path(f"{base}/slaves/{below}").symlink_to(f"../../{below}")
                machine.path(f"/sys/class/block/{below}/holders/{name}").symlink_to(f"../../{name}")
            machine.status[f"/dev/{name}"] = [
                0o60660,
                5,
                100 + int(name[3:]),
                os.makedev(252, int(name[3:])),
            ]
            machine.answers[number] = {"exclusive": None, "nonblock": None, "plain": None}
            machine.write(f"/run/udev/data/b{number}", "")


def test_multipath_disk_is_exported_and_no_path(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """The disk is exported, neither its partition nor any path to it is."""
    Multipath(unpack("trixie-fresh"))
    inventory.rescan()
    found = reasons(inventory)
    assert found["dm-8"] == ""
    assert found["dm-9"] == "it is a partition of '/dev/dm-8' (mpatha)"
    assert found["sda"] == found["sdb"] == "it is a path to '/dev/dm-8' (mpatha)"
    assert inventory.exports["dm-8"].disk.lasts()


def test_multipath_disk_in_use_is_left_out(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    Multipath(machine)
    info = machine.path("/proc/self/mountinfo")
    info.write_text(info.read_text() + "99 1 252:9 / /srv rw - ext4 /dev/mapper/mpatha-part1 rw\n")
    machine.answers["252:9"]["exclusive"] = machine.answers["252:8"]["exclusive"] = "EBUSY"
    inventory.rescan()
    found = reasons(inventory)
    assert found["dm-8"] == "it is in use: '/dev/dm-9' (mpatha-part1) is mounted on '/srv'"
    assert found["sda"] == "it is a path to '/dev/dm-8' (mpatha)"


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_candidates_are_sorted(unpack: Unpack, access: str) -> None:
    unpack("trixie-fresh")
    inventory = storagetm.Inventory([storagetm.BlockDevices()], storagetm.Access((), access))
    inventory.rescan()
    protected = [] if access == storagetm.READ_WRITE else ["vdf"]
    drives = [] if access == storagetm.READ_WRITE else ["sr0"]
    assert [e.disk.name for e in inventory.candidates()] == [
        *("sda", "sdb", "sdc", *drives, "vdb", "vdc", "vdd", "vde", *protected, "nvme0n1")
    ]
    assert [e.disk.node for e in inventory.candidates()][:2] == ["/dev/sda", "/dev/sdb"]


def test_path_of_multipath_disk_is_no_disk(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("attached-multipath")
    hidden = [p.name for p in machine.path("/sys/block").iterdir() if (p / "hidden").read_text() == "1\n"]
    assert hidden == ["nvme1c1n1"]
    inventory.rescan()
    assert "nvme1c1n1" not in inventory.exports


def test_drives_are_not_disturbed(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """Opening a CD drive without O_NONBLOCK closes its tray."""
    machine = unpack("trixie-fresh")
    inventory.rescan()
    drives = [flags for path, flags in machine.opened if path.startswith("/dev/sr")]
    assert drives
    assert all(flags & os.O_NONBLOCK for flags in drives)


def test_nothing_is_opened_for_writing(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """udev probes a disk again whenever somebody who could write to it closes it."""
    machine = unpack("trixie-used")
    inventory.rescan()
    assert machine.opened
    assert not [path for path, flags in machine.opened if flags & os.O_ACCMODE != os.O_RDONLY]


def test_inserted_medium_is_found(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    inventory.rescan()
    assert inventory.exports["sr1"].disk.size == 0
    machine.answers["11:1"] = {"drive": storagetm.CDS_DISC_OK, "plain": "", "nonblock": "", "exclusive": ""}
    machine.attribute("sr1", "ro", "0")
    inventory.update(["sr1"])
    assert inventory.exports["sr1"].left_out == ""
    assert inventory.exports["sr1"].disk.size == 2097151 * 512
    # A drive that cannot say is taken at its word about the size.
    machine.answers["11:1"]["drive"] = storagetm.CDS_NO_INFO
    inventory.update(["sr1"])
    assert inventory.exports["sr1"].left_out == ""


def test_empty_card_reader_is_left_out(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    machine.attribute("sdc", "removable", "1")
    machine.answers["8:32"]["plain"] = "ENOMEDIUM"
    inventory.rescan()
    assert inventory.exports["sdc"].left_out == NO_MEDIUM
    machine.answers["8:32"]["plain"] = ""
    inventory.update(["sdc"])
    assert inventory.exports["sdc"].left_out == ""


def test_disk_of_size_0_is_left_out(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    unpack("trixie-fresh").attribute("vdb", "size", "0")
    inventory.rescan()
    assert inventory.exports["vdb"].left_out == "it has size 0"


def test_disk_that_is_going_has_gone(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """The kernel waits for its I/O before it removes its directory; for us it has gone."""
    machine = unpack("trixie-partitioned")
    inventory.rescan()
    going = machine.path("/sys/class/block/vdb/bdi")
    going.unlink()
    inventory.update(["vdb"])
    assert not inventory.exports["vdb"].left_out.startswith("it has size")
    machine.attribute("vdb", "size", "0")
    inventory.update(["vdb"])
    assert "vdb" not in inventory.exports
    inventory.rescan()
    assert "vdb" not in inventory.exports


def test_tag_tells_whether_a_disk_has_gone(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """A disk, a partition by its disk, and never a file."""
    machine = unpack("trixie-partitioned")
    inventory.rescan()
    disk = inventory.exports["vdb"]
    partition = made_export("vdb1")
    inventory.probe(partition)
    tags = disk.disk.tag, partition.disk.tag
    assert not any(map(storagetm.has_gone, tags))
    assert storagetm.has_gone(tags[0] + "1")  # another one has its number
    machine.path("/sys/class/block/vdb/bdi").unlink()
    assert all(map(storagetm.has_gone, tags))
    assert storagetm.has_gone("254:4711 9")
    assert not storagetm.has_gone(f"{storagetm.FILE_TAG}8:1 17")


# Use


def without_line(machine: CapturedMachine, path: str, part: str) -> None:
    lines = machine.path(path).read_text().split("\n")
    rest = [line for line in lines if part not in line]
    assert len(rest) < len(lines)
    machine.write(path, "\n".join(rest))


def test_swap_on_a_partition_is_use(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-used")
    without_line(machine, "/proc/self/mountinfo", "/mnt/alpha1")
    inventory.rescan()
    # Somewhere out of sight it still is mounted.
    why = "it is in use: '/dev/vdb1' is in use by the system, which does not tell what for"
    assert inventory.exports["vdb"].left_out == why
    machine.answers["254:17"]["exclusive"] = ""
    inventory.rescan()
    assert inventory.exports["vdb"].left_out == "it is in use: '/dev/vdb2' is active swap"


def test_file_mounted_through_a_loop_device_is_in_use(unpack: Unpack) -> None:
    """The file behind it is refused, and so would be the disk, were it not mounted itself."""
    machine = unpack("trixie-used")
    without_line(machine, "/proc/self/mountinfo", "/mnt/alpha1 ")
    usage = storagetm.Usage()
    assert usage.of_file("/mnt/alpha1/disk.img") == "'/dev/loop0' is mounted on '/mnt/alpha1/loop'"
    # As a loop device on a whole disk.
    machine.attribute("loop0", "loop/backing_file", "/dev/sda")
    assert storagetm.Usage().of("sda") == "'/dev/loop0' is mounted on '/mnt/alpha1/loop'"


def test_use_is_seen_through_each_layer(unpack: Unpack) -> None:
    unpack("trixie-used")
    usage = storagetm.Usage()
    end = "'/dev/dm-1' (group-volume) is mounted on '/mnt/on the stack'"
    assert [usage.of(n) for n in ("vdc", "vdd", "md0", "dm-0", "dm-1")] == [end] * 5
    assert usage.of("sda") == ""
    assert usage.of("vdb1") == "'/dev/vdb1' is mounted on '/mnt/alpha1'"
    assert usage.of("vdb2") == "'/dev/vdb2' is active swap"


def test_layers_in_a_circle_end(unpack: Unpack) -> None:
    machine = unpack("trixie-assembled")
    machine.path("/sys/class/block/dm-1/holders/md0").symlink_to("/sys/devices/virtual/block/md0")
    assert storagetm.Usage().of("vdc") == ""


def test_mount_is_told_by_its_source(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """btrfs mounts have device numbers of their own."""
    machine = unpack("trixie-used")
    without_line(machine, "/proc/self/mountinfo", "/mnt/btrfs")
    machine.write(
        "/proc/self/mountinfo",
        machine.path("/proc/self/mountinfo").read_text()
        + "99 1 0:77 / /mnt/several rw - bcachefs /dev/sda:/dev/sdb rw\n",
    )
    inventory.rescan()
    assert inventory.exports["sda"].left_out == "it is in use: '/dev/sda' is mounted on '/mnt/several'"
    assert inventory.exports["sdb"].left_out == "it is in use: '/dev/sdb' is mounted on '/mnt/several'"
    # The kernel still tells of the file system's members.
    assert inventory.exports["vde"].left_out == "it is in use: '/dev/vde' is part of a mounted btrfs"


def test_what_might_be_in_use_is_left_out(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """What might be in use is left out."""
    machine = unpack("trixie-fresh")
    machine.answers["254:16"]["exclusive"] = "EBUSY"
    holders = machine.path("/sys/class/block/vdb/holders")
    holders.rmdir()
    inventory.rescan()
    assert inventory.exports["vdb"].left_out == (
        f"it is in use: its use cannot be determined ('{storagetm.SYS}class/block/vdb/holders': "
        "No such file or directory)"
    )


def test_without_mountinfo_all_is_left_out(
    unpack: Unpack, inventory: storagetm.Inventory, capfd: pytest.CaptureFixture[str]
) -> None:
    unpack("trixie-fresh").path("/proc/self/mountinfo").unlink()
    inventory.rescan()
    assert inventory.candidates() == []
    assert inventory.exports["vdb"].left_out == "its use by the running system cannot be determined"
    assert "Failed to find out which disks are in use: No such file" in capfd.readouterr().err


def test_failed_claim_counts_as_use(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    machine.answers["254:16"]["exclusive"] = "EIO"
    inventory.rescan()
    why = "it is in use: its use cannot be determined ('/dev/vdb': Input/output error)"
    assert inventory.exports["vdb"].left_out == why
    # Who is not root cannot know, and only looks.
    machine.answers["254:16"]["exclusive"] = "EACCES"
    inventory.rescan()
    assert ("cannot be determined" in inventory.exports["vdb"].left_out) is (os.geteuid() == 0)


# The network


def move(machine: CapturedMachine, sysname: str, place: str) -> None:
    """Moves a disk to another place below /sys/devices."""
    link = machine.path(f"/sys/class/block/{sysname}")
    new = machine.path(f"/sys/devices/{place}/block/{sysname}")
    new.parent.mkdir(parents=True)
    link.resolve().rename(new)
    for path in (link, machine.path(f"/sys/block/{sysname}")):
        path.unlink()
        path.symlink_to(os.path.relpath(new, path.parent))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("platform/host5/session1/target5:0:0/5:0:0:0", "it comes over the network (iSCSI)"),
        (
            "pci0000:00/0000:00:03.0/host5/rport-5:0-1/target5:0:0/5:0:0:0",
            "it comes over the network (Fibre Channel)",
        ),
        ("pci0000:00/0000:00:03.0/host5/port-5:0/end_device-5:0/target5:0:0/5:0:0:0", ""),
        ("pci0000:00/0000:00:03.0/sessions/host5/target5:0:0/5:0:0:0", ""),
    ],
)
def test_place_in_the_device_tree_tells_network_disks(
    unpack: Unpack, inventory: storagetm.Inventory, place: str, expected: str
) -> None:
    move(unpack("trixie-fresh"), "sda", place)
    inventory.rescan()
    assert inventory.exports["sda"].left_out == expected


@pytest.mark.parametrize(
    ("sysname", "what"),
    [
        ("nbd0", "NBD"),
        ("rbd1", "Ceph"),
        ("rnbd0", "RNBD"),
        ("etherd!e1.1", "ATA over Ethernet"),
    ],
)
def test_names_tell_network_disks(unpack: Unpack, sysname: str, what: str) -> None:
    unpack("trixie-fresh")
    assert storagetm.why_network(sysname) == f"comes over the network ({what})"


def test_bcache_of_a_network_disk_is_one(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    place = machine.path("/sys/devices/virtual/block/bcache0")
    for name in ("holders", "slaves"):
        (place / name).mkdir(parents=True)
    (place / "slaves/sda").symlink_to("../../../../pci0000:00/sda")
    for name, value in (("dev", "252:0"), ("size", "1024"), ("uevent", "MAJOR=252\nMINOR=0"), ("ro", "0")):
        (place / name).write_text(value + "\n")
    for directory, target in (("block", "../devices"), ("class/block", "../../devices")):
        machine.path(f"/sys/{directory}/bcache0").symlink_to(f"{target}/virtual/block/bcache0")
    move(machine, "sda", "platform/host5/session1/target5:0:0/5:0:0:0")
    inventory.rescan()
    why = "it is made of 'sda', which comes over the network (iSCSI)"
    assert inventory.exports["bcache0"].left_out == why


@pytest.mark.parametrize(
    ("transport", "expected"),
    [
        ("pcie", ""),
        ("apple-nvme", ""),
        ("rdma", "it comes over the network (NVMe/RDMA)"),
        ("fc", "it comes over the network (NVMe/FC)"),
        ("loop", "it comes over the network (NVMe/LOOP)"),
        ("", "it may come over the network (its NVMe controller does not say)"),
    ],
)
def test_transport_of_nvme_tells_network_disks(
    unpack: Unpack, inventory: storagetm.Inventory, transport: str, expected: str
) -> None:
    machine = unpack("trixie-fresh")
    (machine.path("/sys/class/block/nvme0n1").resolve().parent / "transport").write_text(transport + "\n")
    inventory.rescan()
    assert inventory.exports["nvme0n1"].left_out == expected


def test_nvme_controller_that_is_gone_may_be_remote(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """The last path of a multipath disk."""
    machine = unpack("attached-multipath")
    subsystem = machine.path("/sys/class/block/nvme1n1").resolve().parent
    (subsystem / "nvme1").unlink()
    inventory.rescan()
    why = "it may come over the network (its NVMe controller does not say)"
    assert inventory.exports["nvme1n1"].left_out == why


# Identity

UDEV = {
    "nvme0n1": ("QEMU NVMe Ctrl", "DISK-NVME", "QEMU_NVMe_Ctrl_DISK-NVME_1"),
    "sda": ("QEMU_HARDDISK", "DISK-SCSI", "0QEMU_QEMU_HARDDISK_DISK-SCSI"),
    "sdb": ("QEMU_HARDDISK", "DISK-ATA", "QEMU_HARDDISK_DISK-ATA"),
    "sdc": ("QEMU_HARDDISK", "DISK-USB", "QEMU_QEMU_HARDDISK_DISK-USB-0:0"),
    "sr0": ("QEMU_CD-ROM", "", ""),
    "sr1": ("QEMU_DVD-ROM", "QM00004", "QEMU_DVD-ROM_QM00004"),
    "vda": ("", "", "root"),
    "vdb": ("", "", "DISK-ALPHA"),
    "vdd": ("", "", ""),
}
# Neither the USB adapter's serial number nor that of a CD drive is in sysfs, and SCSI's needs page 0x83.
SYSFS = {
    **UDEV,
    "sda": ("QEMU_HARDDISK", "DISK-SCSI", "QEMU_QEMU_HARDDISK_DISK-SCSI"),
    "sdc": ("QEMU_HARDDISK", "", ""),
    "sr1": ("QEMU_DVD-ROM", "", ""),
}


def identities(inventory: storagetm.Inventory) -> dict[str, tuple[str, str, str]]:
    disks = {n: e.disk for n, e in inventory.exports.items() if n in UDEV}
    return {n: (d.model, d.serial, d.id_serial) for n, d in disks.items()}


@pytest.mark.parametrize("name", ["trixie-fresh", "bookworm-used"])
def test_identities_come_from_udev(unpack: Unpack, inventory: storagetm.Inventory, name: str) -> None:
    unpack(name)
    inventory.rescan()
    assert identities(inventory) == UDEV


@pytest.mark.parametrize("name", ["trixie-fresh", "bookworm-used"])
def test_identities_come_from_sysfs_without_udev(
    unpack: Unpack, inventory: storagetm.Inventory, name: str
) -> None:
    shutil.rmtree(unpack(name).path("/run/udev"))
    inventory.rescan()
    assert identities(inventory) == SYSFS


def test_sd_card_is_identified_by_its_serial_alone(unpack: Unpack) -> None:
    """As udev has it from the kernel: the serial number alone."""
    machine = unpack("trixie-fresh")
    for name, value in (("name", "SC32G"), ("serial", "0x12345678"), ("type", "SD")):
        machine.write(f"/sys/devices/mmc0/mmc0:aaaa/{name}", value + "\n")
    machine.write("/sys/devices/mmc0/mmc0:aaaa/block/mmcblk0/uevent", "MAJOR=179\nMINOR=0\n")
    machine.path("/sys/devices/mmc0/mmc0:aaaa/block/mmcblk0/device").symlink_to("../..")
    machine.path("/sys/class/block/mmcblk0").symlink_to("../../devices/mmc0/mmc0:aaaa/block/mmcblk0")
    disk = storagetm.BlockDevice("mmcblk0", "/dev/mmcblk0", "mmcblk0")
    disk.identify_by_sysfs()
    assert (disk.model, disk.serial, disk.id_serial) == ("SC32G", "0x12345678", "0x12345678")


def test_size_and_tag_come_from_sysfs(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    unpack("trixie-fresh")
    inventory.rescan()
    assert inventory.exports["vde"].disk.size == 256 << 20
    assert inventory.exports["vdb"].disk.tag == "254:16 2"  # number and DISKSEQ
    assert inventory.exports["vdf"].disk.read_only


def test_disks_without_a_serial_get_different_ones(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    unpack("trixie-used")
    inventory.rescan()
    transport = storagetm.NvmeTcp(storagetm.Machine())
    nameless = [e for e in inventory.exports.values() if not e.disk.serial]
    assert len(nameless) > 10
    assert len({transport.identities.serial(d) for d in nameless}) == len(nameless)


def test_what_a_disk_has_tells_it_before_its_place(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """What belongs to the disk comes before its place, and both before its name."""
    machine = unpack("trixie-used")
    inventory.rescan()
    disks = {key: export.disk for key, export in inventory.exports.items()}
    assert disks["dm-1"].stable().startswith("LVM-")
    assert disks["nvme0n1"].stable().startswith("nvme.1b36-")
    assert disks["sdb"].stable().startswith("t10.ATA")
    assert disks["vdd"].stable().endswith("/devices/pci0000:00/0000:00:0b.0/virtio8")
    assert disks["ram0"].stable() == "/dev/ram0"
    assert machine.path("/sys/class/block/md0").exists()


# Changes


def test_udev_is_waited_for(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    entry = machine.path("/run/udev/data/b254:16")
    content = entry.read_bytes()
    entry.unlink()
    inventory.rescan()
    disk = inventory.exports["vdb"]
    assert disk.waiting == "udev is not done with it"
    assert disk in inventory.candidates()
    entry.write_bytes(content)
    inventory.update(["vdb"])
    assert disk.waiting == ""
    entry.unlink()
    machine.path("/run/udev/control").unlink()
    inventory.update(["vdb"])
    assert disk.waiting == ""


def test_disk_that_is_gone_is_closed(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    inventory.rescan()
    disk = inventory.exports["vdb"]
    disk.claim()
    for path in ("/sys/class/block/vdb", "/sys/block/vdb"):
        machine.path(path).unlink()
    inventory.update(["vdb"])
    assert "vdb" not in inventory.exports
    assert disk.fd < 0
    machine.path("/sys/block/vdc").unlink()
    inventory.rescan()
    assert "vdc" not in inventory.exports


def test_new_disk_is_found(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    machine = unpack("trixie-fresh")
    link = machine.path("/sys/block/vdb")
    target = os.readlink(link)
    link.unlink()
    inventory.rescan()
    assert "vdb" not in inventory.exports
    link.symlink_to(target)
    inventory.update(["vdb", "eth0", ".."])
    assert inventory.exports["vdb"].left_out == ""
    assert "eth0" not in inventory.exports
    assert ".." not in inventory.exports


def test_another_disk_with_the_same_name_starts_afresh(
    unpack: Unpack, inventory: storagetm.Inventory
) -> None:
    """The lock is that of the disk that was there before."""
    machine = unpack("trixie-fresh")
    inventory.rescan()
    disk = inventory.exports["vdb"]
    disk.claim()
    disk.failed[""] = storagetm.Reason("whatever")
    uevent = machine.path("/sys/class/block/vdb/uevent")
    inventory.update(["vdb"])
    assert disk.fd >= 0
    assert disk.failed == {"": "whatever"}
    uevent.write_text(uevent.read_text().replace("DISKSEQ=2\n", "DISKSEQ=77\n"))
    inventory.update(["vdb"])
    assert disk.fd < 0
    assert disk.failed == {}
    assert disk.disk.tag == "254:16 77"


@pytest.mark.parametrize(("attribute", "value"), [("size", "4096"), ("ro", "1")])
def test_failed_disk_is_tried_again_once_it_changes(
    unpack: Unpack, inventory: storagetm.Inventory, attribute: str, value: str
) -> None:
    machine = unpack("trixie-fresh")
    inventory.rescan()
    disk = inventory.exports["vdb"]
    disk.failed[""] = storagetm.Reason("whatever")
    machine.attribute("vdb", attribute, value)
    inventory.update(["vdb"])
    assert disk.failed == {}


def test_exported_disk_that_comes_into_use_stays(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """It stays exported, since clients are writing to it; but one that is empty goes."""
    machine = unpack("trixie-fresh")
    inventory.rescan()
    disk = inventory.exports["vdb"]
    disk.claim()
    mounts = machine.path("/proc/self/mountinfo")
    mounts.write_text(mounts.read_text() + "99 1 254:16 / /mnt rw - ext4 /dev/vdb rw\n")
    inventory.update(["vdb"])
    assert disk.left_out == ""
    assert disk.fd >= 0
    machine.attribute("vdb", "size", "0")
    inventory.update(["vdb"])
    assert disk.left_out == "it has size 0"
    assert disk.fd < 0


def test_end_of_use_is_seen_at_the_next_uevent(unpack: Unpack, inventory: storagetm.Inventory) -> None:
    """No uevent tells of that; the next one about any disk is the occasion."""
    machine = unpack("trixie-used")
    inventory.rescan()
    assert inventory.exports["vdb"].left_out
    without_line(machine, "/proc/self/mountinfo", "/mnt/alpha1")
    machine.write("/proc/swaps", "Filename\n")
    for number in ("254:16", "254:17", "254:18"):
        machine.answers[number]["exclusive"] = ""
    inventory.update(["sda"])
    assert inventory.exports["vdb"].left_out == ""


# Named on the command line


def test_named_disk_has_the_name_that_was_given(unpack: Unpack) -> None:
    unpack("trixie-fresh")
    inventory = named("/dev/vdc", "/dev/disk/by-id/virtio-DISK-ALPHA")
    assert [(e.disk.name, e.disk.node) for e in inventory.candidates()] == [
        ("vdc", "/dev/vdc"),
        ("virtio-DISK-ALPHA", "/dev/vdb"),
    ]


def test_disk_named_twice_is_exported_once(unpack: Unpack, capfd: pytest.CaptureFixture[str]) -> None:
    unpack("trixie-fresh")
    inventory = named("/dev/vdb", "/dev/disk/by-id/virtio-DISK-ALPHA")
    assert [e.disk.node for e in inventory.candidates()] == ["/dev/vdb"]
    assert capfd.readouterr().err == (
        "'/dev/disk/by-id/virtio-DISK-ALPHA' is the same as '/dev/vdb', exporting it once\n"
    )


ANYWAY = "; stop that use first, or give --force"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/vda", "it is in use: '/dev/vda' is mounted on '/'; stop that use first, or give --force"),
        (
            "/dev/vdb1",
            "it is in use: '/dev/vdb1' is mounted on '/mnt/alpha1'" + ANYWAY,
        ),
        ("/dev/vdc", VOLUME + "; stop that use first, or give --force"),
        (
            "/mnt/alpha1/disk.img",
            "it is in use: '/dev/loop0' is mounted on '/mnt/alpha1/loop'" + ANYWAY,
        ),
        ("/dev/vdf", READ_ONLY),
        ("/dev/sr0", READ_ONLY),
        ("/dev/sr1", "No medium found; insert one and start again"),
        ("/dev/nbd0", "it has size 0"),
        ("/dev/missing", "No such file or directory"),
        ("/dev/null", "it is a character device, no block device or regular file"),
        ("/", "it is a directory, no block device or regular file"),
    ],
)
def test_named_disk_that_cannot_be_exported_is_refused(
    unpack: Unpack, path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = unpack("trixie-used")
    # That file is not here; what matters is what the kernel has to say about it.
    monkeypatch.setattr(os, "access", lambda *_: True)
    status = machine.stat

    def stat(path: str, **options: bool) -> os.stat_result:
        found = status(path, **options)
        if path != "/mnt/alpha1/disk.img":
            return found
        return os.stat_result((*found[:6], 8 << 20, *found[7:10]))

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(storagetm.UserError) as caught:
        named("/dev/sda", path)
    assert str(caught.value) == f"Failed to export '{path}': {reason}"
    assert caught.value.code == 1


def test_force_exports_what_is_in_use(unpack: Unpack) -> None:
    unpack("trixie-used")
    inventory = named("/dev/vdc", "/dev/vdb1", force=True)
    assert [e.disk.name for e in inventory.candidates()] == ["vdc", "vdb1"]
    with pytest.raises(storagetm.UserError, match="read-only"):
        named("/dev/vdf", force=True)


def test_named_disk_may_come_over_the_network(unpack: Unpack) -> None:
    """Only --all leaves that out."""
    unpack("attached-multipath")
    assert [e.disk.name for e in named("/dev/nvme1n1").candidates()] == ["nvme1n1"]


def test_node_that_is_left_over_is_refused(unpack: Unpack) -> None:
    machine = unpack("trixie-fresh")
    machine.path("/sys/dev/block/254:16").unlink()
    with pytest.raises(storagetm.UserError, match="No such device; its node is left over"):
        named("/dev/vdb")


def test_node_without_permission_is_refused(unpack: Unpack) -> None:
    unpack("trixie-fresh").answers["254:16"]["nonblock"] = "EACCES"
    with pytest.raises(storagetm.UserError) as caught:
        named("/dev/vdb")
    assert str(caught.value) == "Failed to export '/dev/vdb': Permission denied"


def test_named_disk_may_go_and_come_back(unpack: Unpack) -> None:
    machine = unpack("trixie-fresh")
    inventory = named("/dev/vdb", "/dev/vdc")
    link = machine.path("/sys/class/block/vdb")
    target = os.readlink(link)
    status = machine.status.pop("/dev/vdb")
    link.unlink()
    inventory.update(["vdb"])
    assert [e.disk.name for e in inventory.candidates()] == ["vdc"]
    link.symlink_to(target)
    machine.status["/dev/vdb"] = status
    inventory.update(["vdb"])
    assert [e.disk.name for e in inventory.candidates()] == ["vdb", "vdc"]


# Files


def test_file_is_a_disk(unpack: Unpack, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unpack("trixie-fresh")
    image = tmp_path / "disk image.img"
    image.write_bytes(bytes(1 << 20))
    (tmp_path / "link").symlink_to(image)
    inventory = named(str(image))
    disk = inventory.candidates()[0].disk
    assert (disk.name, disk.node, disk.size, disk.sysname) == ("disk image.img", str(image), 1 << 20, "")
    assert not disk.read_only
    assert len(named(str(image), str(tmp_path / "link")).exports) == 1
    assert "is the same as" in capfd.readouterr().err
    image.write_bytes(bytes(2 << 20))
    inventory.update([])
    assert disk.size == 2 << 20
    image.unlink()
    inventory.update([])
    assert inventory.candidates() == []


def test_files_with_the_same_name_are_refused(unpack: Unpack, tmp_path: Path) -> None:
    unpack("trixie-fresh")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "disk").write_bytes(bytes(512))
    with pytest.raises(storagetm.UserError, match="has the same name; rename one of them"):
        named(str(tmp_path / "a" / "disk"), str(tmp_path / "b" / "disk"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"d\xff", "its name is not UTF-8, as an NQN has to be; rename it"),
        (b"a\nb", "its name has control characters; rename it"),
    ],
)
def test_files_with_bad_names_are_refused(unpack: Unpack, tmp_path: Path, name: bytes, reason: str) -> None:
    unpack("trixie-fresh")
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(bytes(512))
    with pytest.raises(storagetm.UserError) as caught:
        named(str(path))
    assert str(caught.value).endswith(reason)


def test_empty_file_is_refused(unpack: Unpack, tmp_path: Path) -> None:
    unpack("trixie-fresh")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(storagetm.UserError, match="it has size 0"):
        named(str(tmp_path / "empty"))


def test_swap_file_is_refused(unpack: Unpack, tmp_path: Path) -> None:
    machine = unpack("trixie-fresh")
    path = tmp_path / "swap"
    path.write_bytes(bytes(4096))
    machine.write("/proc/swaps", f"Filename\n{path} file 4 0 -2\n")
    with pytest.raises(storagetm.UserError, match=f"it is in use: '{path}' is active swap"):
        named(str(path))


# Sources


def test_two_sources_side_by_side(unpack: Unpack, tmp_path: Path) -> None:
    """A disk belongs to one of them, which says whether it is left out, and each forgets only its own."""
    machine = unpack("trixie-fresh")
    path = image(tmp_path / "image", 1 << 20)
    named_ones = storagetm.NamedDisks([str(path), "/dev/vdc"])
    inventory = storagetm.Inventory([storagetm.BlockDevices(), named_ones], to_be_written())
    inventory.check_named()
    assert inventory.exports.keys() == {str(path), "vdc"}
    inventory.rescan()
    assert {key for key, export in inventory.exports.items() if export.named} == {str(path), "vdc"}
    assert inventory.exports["vdb"].source is inventory.sources[0]
    assert [e.disk.name for e in inventory.candidates() if e.named] == ["vdc", "image"]
    path.unlink()
    machine.path("/sys/block/vdb").unlink()
    inventory.rescan()
    assert not {str(path), "vdb"} & inventory.exports.keys()
    assert {"vdc", "vdd"} <= inventory.exports.keys()


# Locks


@pytest.fixture
def file_disk(tmp_path: Path) -> Iterator[storagetm.Export]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    export = made_export(str(path))
    yield export
    export.release()


def test_lock_keeps_others_out_until_it_is_closed(file_disk: storagetm.Export) -> None:
    file_disk.claim()
    assert file_disk.fd >= 0
    with open(file_disk.disk.node, "rb") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        file_disk.release()
        assert file_disk.fd < 0
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file_disk.claim()
        assert file_disk.fd < 0
        assert file_disk.waiting
        fcntl.flock(other, fcntl.LOCK_SH)  # as udev holds it
        file_disk.claim()
        assert file_disk.fd < 0
    file_disk.claim()
    assert file_disk.fd >= 0
    assert file_disk.waiting == ""


def test_lock_of_what_is_gone_fails(file_disk: storagetm.Export) -> None:
    os.unlink(file_disk.disk.node)
    with pytest.raises(OSError, match="No such file") as caught:
        file_disk.claim()
    assert caught.value.errno == errno.ENOENT


# What the user is shown


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_list_says_what_would_be_exported(
    unpack: Unpack, capfd: pytest.CaptureFixture[str], access: str
) -> None:
    unpack("trixie-used")
    assert storagetm.main(["--list-devices", f"--{access}"]) == 0
    lines = capfd.readouterr().out.split("\n")
    assert lines[0].split() == ["NODE", "SIZE", "MODEL", "SERIAL", "EXPORT"]
    column = lines[0].index("EXPORT")
    shown = {line.split()[0]: line[column:] for line in lines[1:] if line}
    for name, why in USED.items():
        exported = not why or (why == READ_ONLY and access != storagetm.READ_WRITE)
        assert shown[f"/dev/{name}"] == (access if exported else f"no: {why}")


def test_list_is_there_as_json(unpack: Unpack, capfd: pytest.CaptureFixture[str]) -> None:
    unpack("trixie-used")
    assert storagetm.main(["--list-devices", "--json", "--read-write"]) == 0
    listed = {d["node"]: d for d in json.loads(capfd.readouterr().out)}
    assert listed["/dev/sda"] == {
        "node": "/dev/sda",
        "size": 128 << 20,
        "model": "QEMU_HARDDISK",
        "serial": "DISK-SCSI",
        "export": True,
        "access": "read-write",
        "reason": None,
    }
    assert listed["/dev/vdc"]["export"] is False
    assert listed["/dev/vdc"]["reason"] == VOLUME
    assert {n for n, d in listed.items() if d["export"]} == {"/dev/sda", "/dev/sdb"}


def test_list_of_a_forced_run_has_what_is_in_use(unpack: Unpack, capfd: pytest.CaptureFixture[str]) -> None:
    unpack("trixie-used")
    assert storagetm.main(["--list-devices", "--json", "-aa"]) == 0
    listed = {d["node"]: d for d in json.loads(capfd.readouterr().out)}
    assert listed["/dev/vda"]["export"] is True
    assert listed["/dev/sr1"]["export"] is False


# Image files


def image(path: Path, size: int, *headers: int) -> Path:
    """A file with GPT headers at these offsets."""
    content = bytearray(size)
    for offset in headers:
        content[offset : offset + 8] = b"EFI PART"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("headers", "expected"), [((), 512), ((512,), 512), ((4096,), 4096), ((512, 4096), 512), ((8192,), 512)]
)
def test_gpt_decides_about_the_sectors_of_an_image(
    tmp_path: Path, headers: tuple[int, ...], expected: int
) -> None:
    """What its GPT was made for decides, never the file system that it is on."""
    assert storagetm.image_sectors(str(image(tmp_path / "image", 1 << 20, *headers))) == expected
    for size in (0, 511, 513, 519, 4097):
        (tmp_path / "small").write_bytes(b"EFI PART" * 600)
        os.truncate(tmp_path / "small", size)
        assert storagetm.image_sectors(str(tmp_path / "small")) == 512


@pytest.mark.parametrize(
    ("size", "headers", "whole", "rest"),
    [
        (1 << 20, (), 1 << 20, 0),
        ((1 << 20) + 300, (), 1 << 20, 300),
        ((1 << 20) + 512, (4096,), 1 << 20, 512),
    ],
)
def test_bytes_behind_the_last_sector_are_named(
    tmp_path: Path,
    size: int,
    headers: tuple[int, ...],
    whole: int,
    rest: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = str(image(tmp_path / "image", size, *headers))
    (export,) = named(path).exports.values()
    disk = export.disk
    assert (disk.size, disk.rest) == (whole, rest)
    told = (
        f"The last {rest} bytes of '{path}' are not exported, since they are no whole sector ({disk.block} "
    )
    assert (told in capfd.readouterr().err) == (rest > 0)


@pytest.mark.parametrize(
    ("size", "reason"), [(0, "it has size 0"), (300, "it has 300 bytes, less than one sector of 512")]
)
def test_file_without_a_whole_sector_is_refused(tmp_path: Path, size: int, reason: str) -> None:
    path = str(image(tmp_path / "image", size))
    with pytest.raises(storagetm.UserError, match=f"Failed to export '{path}': {reason}"):
        named(path)


def test_attached_image_keeps_its_sectors(tmp_path: Path) -> None:
    """Also if a client writes something that looks like the other size."""
    path = image(tmp_path / "image", 1 << 20)
    (export,) = (inventory := named(str(path))).exports.values()
    disk = export.disk
    export.fd = os.open("/dev/null", os.O_RDONLY)
    image(path, 1 << 20, 4096)
    inventory.rescan()
    assert disk.block == 512
    export.release()
    inventory.rescan()
    assert disk.block == 4096
