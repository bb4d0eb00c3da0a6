# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which disks --all takes: none that the system uses, in whatever way, and none that is not a local disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import Image
from tests.harness.machine import Disk, Machine
from tests.vm.conftest import LOGS, TOOL, prepare
from tests.vm.nvmet import exported, exporting, names

# The serial numbers of the disks, with what is on them once the machine is set up.
DISKS = (
    "PARTITION",  # a mounted file system on a partition, and a swap file in it
    "ELSEWHERE",  # a file system that is mounted in another mount namespace only
    "SWAP",  # swap on a partition
    "LUKS-MOUNTED",  # on a partition: LUKS, with a mounted file system
    "LUKS-IDLE",  # on a partition: LUKS, open
    "LUKS-CLOSED",  # on a partition: LUKS
    "MD-LVM-1",  # a mounted file system on LVM on a RAID array of these two
    "MD-LVM-2",
    "MD-IDLE-1",  # an assembled RAID array of these two
    "MD-IDLE-2",
    "BTRFS-1",  # a mounted btrfs on these two
    "BTRFS-2",
    "JOURNAL",  # the journal of the next
    "JOURNALED",  # a mounted ext4
    "LOOP",  # on a partition: a loop device with a mounted file system
    "MULTIPATH",  # a path, with a mounted file system
    "LINEAR",  # a device-mapper device
    "FREE",  # nothing
)

SETUP = r"""
set -e
cd /dev/disk/by-id
modprobe -a btrfs null_blk zram dm-multipath dm-round-robin
modprobe brd rd_nr=1 rd_size=4096
modprobe loop max_loop=8
modprobe nbd nbds_max=1
swapoff -a
for disk in PARTITION ELSEWHERE SWAP LUKS-MOUNTED LUKS-IDLE LUKS-CLOSED LOOP; do
    echo 'type=linux' | sfdisk --quiet virtio-$disk
done
udevadm settle

mkfs.ext4 -q virtio-PARTITION-part1
mkdir -p '/mnt/a b' /mnt/crypt /mnt/lvm /mnt/btrfs /mnt/journaled /mnt/loop /mnt/multipath
mount virtio-PARTITION-part1 '/mnt/a b'
dd if=/dev/zero of='/mnt/a b/swap' bs=1M count=4 status=none
chmod 600 '/mnt/a b/swap'
mkswap '/mnt/a b/swap'
swapon '/mnt/a b/swap'

mkfs.ext4 -q virtio-ELSEWHERE-part1
mkswap virtio-SWAP-part1
swapon virtio-SWAP-part1

for disk in MOUNTED IDLE CLOSED; do
    echo secret | cryptsetup luksFormat --batch-mode --type luks1 --pbkdf-force-iterations 1000 \
        --key-file=- virtio-LUKS-$disk-part1
done
echo secret | cryptsetup open --key-file=- virtio-LUKS-MOUNTED-part1 crypt-mounted
echo secret | cryptsetup open --key-file=- virtio-LUKS-IDLE-part1 crypt-idle
mkfs.ext4 -q /dev/mapper/crypt-mounted
mount /dev/mapper/crypt-mounted /mnt/crypt

mdadm --create --quiet --run --level=1 --raid-devices=2 --assume-clean --bitmap=none /dev/md100 \
    virtio-MD-LVM-1 virtio-MD-LVM-2
pvcreate --quiet /dev/md100
vgcreate --quiet group /dev/md100
lvcreate --quiet --yes --size 16M --name volume group
mkfs.ext4 -q /dev/group/volume
mount /dev/group/volume /mnt/lvm
mdadm --create --quiet --run --level=0 --raid-devices=2 /dev/md101 virtio-MD-IDLE-1 virtio-MD-IDLE-2

mkfs.btrfs -q virtio-BTRFS-1 virtio-BTRFS-2
mount virtio-BTRFS-1 /mnt/btrfs

mke2fs -q -b 4096 -O journal_dev virtio-JOURNAL
mkfs.ext4 -q -b 4096 -J device=$PWD/virtio-JOURNAL virtio-JOURNALED
mount virtio-JOURNALED /mnt/journaled

losetup /dev/loop7 virtio-LOOP-part1
mkfs.ext4 -q /dev/loop7
mount /dev/loop7 /mnt/loop

number() { lsblk --noheadings --nodeps --output MAJ:MIN virtio-$1 | tr -d ' '; }
dmsetup create path --table "0 65536 multipath 0 0 1 1 round-robin 0 1 1 $(number MULTIPATH) 1"
mkfs.ext4 -q /dev/mapper/path
mount /dev/mapper/path /mnt/multipath
dmsetup create linear --table "0 65536 linear $(number LINEAR) 0"
udevadm settle
"""


@pytest.fixture(scope="module")
def machine(images: dict[str, Image], tool: Path) -> Iterator[Machine]:
    """A machine with all of `DISKS`."""
    disks = [Disk(serial.lower(), serial=serial, size=256 << 20) for serial in DISKS]
    with Machine("in-use", images["trixie"], disks=disks, log_directory=LOGS) as machine:
        machine.start()
        machine.wait_boot()
        prepare(machine, tool)
        machine.run(SETUP)
        mount = "mount /dev/disk/by-id/virtio-ELSEWHERE-part1 /mnt && echo mounted && exec sleep infinity"
        elsewhere = machine.start_process(f"unshare --mount --propagation slave sh -c '{mount}'")
        elsewhere.wait_output("mounted")
        yield machine


@pytest.fixture(scope="module")
def nodes(machine: Machine) -> dict[str, str]:
    """The kernel's name of each disk, array and mapped device."""
    found = {}
    for name in machine.run(
        "cd /sys/block; grep -H . */serial */dm/name 2>/dev/null; ls -d md*"
    ).stdout.splitlines():
        path, _, value = name.partition(":")
        found[value or path] = path.split("/")[0]
    return found


def listed(machine: Machine, *arguments: str) -> dict[str, str]:
    """The reason for each block device's not being exported, or an empty string; by its kernel name.

    Asserts that the table says the same.
    """
    entries = json.loads(machine.run([TOOL, "--list-devices", "--json", *arguments]).stdout)
    table = machine.run([TOOL, "--list-devices", *arguments]).stdout.splitlines()
    found = {}
    assert table.pop(0).split() == ["NODE", "SIZE", "MODEL", "SERIAL", "EXPORT"]
    for entry, line in zip(entries, table):
        assert entry["export"] == (entry["reason"] is None)
        assert line.startswith(entry["node"] + " ")
        assert line.endswith(f"no: {entry['reason']}" if entry["reason"] else " read-only")
        found[entry["node"][5:]] = entry["reason"] or ""
    assert len(entries) == len(table)
    return found


def reasons(nodes: dict[str, str]) -> dict[str, str]:
    """The reason, as a regular expression, for each disk that is left out."""

    def inner(name: str) -> str:
        return f"'/dev/{nodes[name]}' \\({name}\\)"

    unknown = "is in use by the system, which does not tell what for"
    return {
        "vda": "it is in use: '/dev/vda' is mounted on '/'",
        nodes["PARTITION"]: f"it is in use: '/dev/{nodes['PARTITION']}1' is mounted on '/mnt/a b'",
        nodes["ELSEWHERE"]: f"it is in use: '/dev/{nodes['ELSEWHERE']}1' {unknown}",
        nodes["SWAP"]: f"it is in use: '/dev/{nodes['SWAP']}1' is active swap",
        nodes["LUKS-MOUNTED"]: f"it is in use: {inner('crypt-mounted')} is mounted on '/mnt/crypt'",
        nodes["crypt-mounted"]: f"it is in use: {inner('crypt-mounted')} is mounted on '/mnt/crypt'",
        nodes["MD-LVM-1"]: f"it is in use: {inner('group-volume')} is mounted on '/mnt/lvm'",
        nodes["MD-LVM-2"]: f"it is in use: {inner('group-volume')} is mounted on '/mnt/lvm'",
        "md100": f"it is part of '/dev/{nodes['group-volume']}'",
        nodes["group-volume"]: f"it is in use: {inner('group-volume')} is mounted on '/mnt/lvm'",
        nodes["BTRFS-1"]: f"it is in use: '/dev/{nodes['BTRFS-1']}' is mounted on '/mnt/btrfs'",
        nodes["BTRFS-2"]: f"it is in use: '/dev/{nodes['BTRFS-2']}' is part of a mounted btrfs",
        nodes["JOURNAL"]: f"it is in use: '/dev/{nodes['JOURNAL']}' {unknown}",
        nodes["JOURNALED"]: f"it is in use: '/dev/{nodes['JOURNALED']}' is mounted on '/mnt/journaled'",
        nodes["LOOP"]: "it is in use: '/dev/loop7' is mounted on '/mnt/loop'",
        "loop7": "it is a loop device",
        nodes["MULTIPATH"]: f"it is in use: {inner('path')} is mounted on '/mnt/multipath'",
        nodes["path"]: f"it is in use: {inner('path')} is mounted on '/mnt/multipath'",
        "zram0": "it is a compressed RAM disk",
        "ram0": "it is a RAM disk",
        "nbd0": r"it comes over the network \(NBD\)",
        **made_of_disks(nodes),
    }


# What is idle and made of disks, by the name of one of these.
IDLE = {"LUKS-IDLE": "crypt-idle", "MD-IDLE-1": "md101", "LINEAR": "linear"}


def made_of_disks(nodes: dict[str, str]) -> dict[str, str]:
    """Why idle arrays and volumes are left out, as long as their disks are exported."""
    return {
        nodes.get(name, name): f"it is made of '/dev/{nodes[disk]}', which is exported; see --stacked"
        for disk, name in IDLE.items()
    }


def free(nodes: dict[str, str]) -> set[str]:
    """What --all exports: disks that nothing uses, whether they are a part of something idle or not."""
    names = ("LUKS-IDLE", "LUKS-CLOSED", "MD-IDLE-1", "MD-IDLE-2", "LINEAR", "FREE")
    return {nodes[name] for name in names} | {"nullb0"}


def test_list_says_why_disks_are_left_out(machine: Machine, nodes: dict[str, str]) -> None:
    found = listed(machine)
    expected = reasons(nodes)
    assert free(nodes) <= {name for name, reason in found.items() if not reason}
    for name, reason in expected.items():
        assert re.fullmatch(reason, found[name]), name
    others = found.keys() - expected.keys() - free(nodes)
    assert {re.sub(r"\d+$", "", name) for name in others} <= {"loop", "nbd"}
    for name in others:
        assert found[name] in ("it is a loop device", "it comes over the network (NBD)")


def test_all_leaves_out_what_is_in_use(machine: Machine, nodes: dict[str, str]) -> None:
    with exporting(machine, "--all", "--nqn=quux") as service:
        assert exported(machine) == free(nodes)
        output = service.output
        for name, reason in reasons(nodes).items():
            assert re.search(f"^Not exporting '/dev/{name}': {reason}$", output, re.MULTILINE), name


def test_all_twice_exports_what_is_in_use(machine: Machine, nodes: dict[str, str]) -> None:
    """Also what is in use: but still no loop device and the like, and nothing that is made of another."""
    reason = reasons(nodes)
    with_force = free(nodes) | {name for name, why in reason.items() if why.startswith("it is in use")}
    with_force -= {nodes[name] for name in ("crypt-mounted", "group-volume", "path")}
    assert {name for name, why in listed(machine, "-aa").items() if not why} == with_force
    with exporting(machine, "-aa", "--nqn=quux"):
        assert exported(machine) == with_force


def test_stacked_exports_what_is_made_of_disks(machine: Machine, nodes: dict[str, str]) -> None:
    """Idle arrays and volumes instead of their disks, in each way of asking."""
    wanted = free(nodes) - {nodes[d] for d in (*IDLE, "MD-IDLE-2")} | made_of_disks(nodes).keys()
    assert {name for name, why in listed(machine, "--stacked").items() if not why} == wanted
    with exporting(machine, "--all", "--stacked", "--nqn=quux") as service:
        assert exported(machine) == wanted
        for disk, name in IDLE.items():
            why = f"'/dev/{nodes.get(name, name)}'.*, which is made of it, is exported"
            assert re.search(f"^Not exporting '/dev/{nodes[disk]}': {why}$", service.output, re.MULTILINE)
    # What is named is exported, but never together with what it is made of.
    with exporting(machine, "--nqn=quux", "/dev/md101"):
        assert exported(machine) == {"md101"}
    both = machine.run([TOOL, "/dev/md101", f"/dev/{nodes['MD-IDLE-2']}"], check=False)
    assert both.returncode == 1
    assert f"'/dev/md101': its data is on '/dev/{nodes['MD-IDLE-2']}'" in both.stderr


def test_named_disk_in_use_needs_force(machine: Machine, nodes: dict[str, str]) -> None:
    """A device that is named is refused while it is in use, but not with --force."""
    reason = reasons(nodes)
    partition = f"/dev/{nodes['PARTITION']}1"
    refused = {
        f"/dev/{nodes[name]}": reason[nodes[name]]
        for name in ("ELSEWHERE", "LUKS-MOUNTED", "group-volume", "JOURNAL")
    } | {
        partition: f"it is in use: '{partition}' is mounted on '/mnt/a b'",
        "/dev/loop7": "it is in use: '/dev/loop7' is mounted on '/mnt/loop'",
        "/mnt/a b/swap": "it is in use: '/mnt/a b/swap' is active swap",
    }
    before = names(machine)
    for device, why in refused.items():
        # One that could be exported stands first, and is not exported either.
        result = machine.run([TOOL, f"/dev/{nodes['FREE']}", device], check=False)
        assert result.returncode == 1, device
        assert re.fullmatch(
            f"Failed to export '{device}': {why}; stop that use first, or give --force\n", result.stderr
        ), result.stderr
        assert names(machine) == before
    with exporting(machine, "--force", "--nqn=quux", *refused):
        assert exported(machine) == {Path(device).name for device in refused}


def test_named_devices_of_any_kind_are_exported(machine: Machine, nodes: dict[str, str]) -> None:
    """Partitions, arrays, loop devices and RAM disks are exported if they are named; the same one once."""
    machine.run("truncate -s 1M /var/tmp/image && losetup /dev/loop6 /var/tmp/image")
    device = f"/dev/{nodes['FREE']}"
    link = "/dev/disk/by-id/virtio-FREE"
    closed = f"/dev/{nodes['LUKS-CLOSED']}1"
    with exporting(
        machine, "--nqn=quux", device, link, "/dev/md101", "/dev/ram0", "/dev/loop6", closed
    ) as service:
        assert exported(machine) == {nodes["FREE"], "md101", "ram0", "loop6", Path(closed).name}
        assert (4, f"'{link}' is the same as '{device}', exporting it once") in service.journal()
    machine.run("losetup -d /dev/loop6; rm /var/tmp/image")


def test_own_export_is_not_exported_again(machine: Machine) -> None:
    """A disk that is attached over NVMe/TCP is not exported again, and nothing on top of it."""
    with exporting(machine, "--all", "--nqn=quux") as service:
        before = exported(machine)
        machine.run("modprobe nvme-tcp")
        machine.run(["nvme", "connect", "-t", "tcp", "-a", "127.0.0.1", "-s", "16858", "-n", "quux.nullb0"])
        try:
            machine.wait_run("test -b /dev/nvme0n1")
            machine.run("dmsetup create top --table '0 1024 linear /dev/nvme0n1 0'")
            top = machine.run("readlink /dev/mapper/top").stdout.strip()[3:]
            network = r"comes over the network \(NVMe/TCP\)"
            why = {
                "nvme0n1": f"it {network}",
                top: f"it is made of 'nvme0n1', which {network}",
            }
            found = listed(machine)
            for name, reason in why.items():
                assert re.fullmatch(reason, found[name])
                service.wait_output(f"^Not exporting '/dev/{name}': {reason}$")
            assert exported(machine) == before
        finally:
            machine.run("dmsetup remove top; nvme disconnect-all")


def test_disk_is_exported_once_its_use_ends(machine: Machine, nodes: dict[str, str]) -> None:
    """A disk is exported once what was on top of it is gone, and then stays: the system cannot use it again.

    The last test, since this is not undone.
    """
    disk = nodes["MULTIPATH"]
    with exporting(machine, "--all", "--nqn=quux", "--read-write"):
        assert disk not in exported(machine)
        machine.run("umount /mnt/multipath && dmsetup remove path")
        machine.wait_until(lambda: disk in exported(machine))
        assert machine.run(f"mount /dev/{disk} /mnt/multipath", check=False).returncode
        # Another change, so that all disks have been looked at since.
        machine.add_disk(Disk("late", serial="LATE", bus="scsi"))
        machine.wait_until(lambda: "sda" in exported(machine))
        assert disk in exported(machine)
