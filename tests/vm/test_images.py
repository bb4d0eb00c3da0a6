# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sectors: clients find partitions by their numbers, so an image or a disk has its own size of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.harness.machine import MIB, Disk, Machine
from tests.vm import nvmet
from tests.vm.disks import wait_name
from tests.vm.initiator import attached
from tests.vm.nvmet import exporting

# Files on ext4, whose blocks are of 4096 bytes: with an MBR, with a GPT for either size of sector, and with
# XFS alone. One ends in the middle of a sector. Each partition begins at 1 MiB, with a FAT file system.
MAKE_IMAGES = """
set -e
mkdir -p /var/tmp/images; cd /var/tmp/images
truncate -s 20M fat fat4k
mkfs.vfat -F 16 fat; mkfs.vfat -S 4096 fat4k
for image in mbr gpt gpt4k; do truncate -s 32M $image; done
echo 'start=1MiB, size=20MiB, type=c' | sfdisk --quiet --label dos mbr
echo 'start=1MiB, size=20MiB' | sfdisk --quiet --label gpt gpt
loop=$(losetup --find --show --sector-size 4096 gpt4k)
echo 'start=1MiB, size=20MiB' | sfdisk --quiet --label gpt $loop
losetup --detach $loop
for image in mbr gpt; do dd if=fat of=$image bs=1M seek=1 conv=notrunc status=none; done
dd if=fat4k of=gpt4k bs=1M seek=1 conv=notrunc status=none
truncate -s +300 mbr
truncate -s 320M xfs; mkfs.xfs -q xfs
"""
NAMES = {"mbr": 512, "gpt": 512, "gpt4k": 4096, "xfs": 512}


@pytest.fixture(scope="module")
def files(target: Machine) -> Iterator[list[str]]:
    target.run(MAKE_IMAGES)
    yield [f"/var/tmp/images/{name}" for name in NAMES]
    target.run("rm -r /var/tmp/images")


@contextlib.contextmanager
def attached_images(client: Machine) -> Iterator[dict[str, str]]:
    """The nodes of all images on the client, by their names."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(attached(client, f"quux.{name}", 16858)).node for name in NAMES}


@pytest.mark.parametrize("access", ["read-only", "snapshot", "read-write"])
def test_image_has_its_own_sectors(target: Machine, client: Machine, files: list[str], access: str) -> None:
    """In each mode: partitions are found, file systems mount, only bytes that are named are missing."""
    before = target.run("cd /var/tmp/images; sha256sum *").stdout
    with exporting(target, "--nqn=quux", f"--{access}", *files) as service:
        assert "The last 300 bytes of '/var/tmp/images/mbr' are not exported" in service.output
        with attached_images(client) as nodes:
            for name, sector in NAMES.items():
                node = nodes[name]
                size = target.run(
                    f"echo $(($(stat -c %s /var/tmp/images/{name}) / {sector} * {sector}))"
                ).stdout
                assert client.run(f"blockdev --getss --getsize64 {node}").stdout == f"{sector}\n{size}"
                digest = f"| head -c {size.strip()} | sha256sum"
                command = f"dd if={node} bs=1M iflag=direct status=none {digest}"
                theirs = client.run(command, timeout=400).stdout
                assert theirs == target.run(f"cat /var/tmp/images/{name} {digest}").stdout
                part = node if name == "xfs" else f"{node}p1"
                client.wait_run(f"test -b {part}")
                options = "-o ro,norecovery" if name == "xfs" else "-o ro"
                client.run(f"mount {options if access == 'read-only' else ''} {part} /mnt")
                if access != "read-only":
                    client.run("echo from the client >/mnt/file; sync -f /mnt/file")
                client.run("umount /mnt")
    after = target.run("cd /var/tmp/images; sha256sum *").stdout
    if access != "read-write":
        assert after == before
        return
    # What the client wrote is in the files, at the right place.
    for name, sector in NAMES.items():
        offset = 0 if name == "xfs" else MIB
        target.run(
            f"loop=$(losetup --find --show --sector-size {sector} --offset {offset} "
            f"/var/tmp/images/{name}); mount -o ro $loop /mnt && "
            "grep -q 'from the client' /mnt/file; s=$?; umount /mnt; losetup --detach $loop; exit $s"
        )
    assert target.run("tail -c 300 /var/tmp/images/mbr | tr -d '\\0' | wc -c").stdout == "0\n"
    assert nvmet.left_over(target) == []


def test_loop_device_is_taken_over_after_a_crash(target: Machine, client: Machine, files: list[str]) -> None:
    """The next start takes over the loop device in between, and the stop leaves none."""
    arguments = ["--nqn=quux", "--read-write", *files]
    service = nvmet.Service(target, arguments)
    before = service.start()
    with attached_images(client) as nodes:
        loops = target.run("losetup --noheadings --output NAME,BACK-FILE | sort").stdout
        assert loops.count("/var/tmp/images/") == len(files)
        service.kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {service.unit}")
        target.run(f"systemctl reset-failed {service.unit}")
        client.run(f"echo after the kill | dd of={nodes['gpt']} seek=60 conv=fsync")
        service = nvmet.Service(target, arguments)
        service.start()
        assert target.run("losetup --noheadings --output NAME,BACK-FILE | sort").stdout == loops
        client.run(f"dd if={nodes['gpt']} of=/dev/null bs=1M iflag=direct")
    assert service.stop() == before
    target.wait_run('test -z "$(losetup --noheadings --output NAME)"')
    assert "after the kill" in target.run("dd if=/var/tmp/images/gpt skip=60 count=1").stdout


@pytest.mark.parametrize("access", ["read-only", "snapshot"])
def test_disk_of_4096_bytes_in_use_keeps_its_sectors(target: Machine, client: Machine, access: str) -> None:
    """It cannot be claimed, so there is a loop device over it, with the disk's sectors."""
    target.add_disk(Disk("native", size=32 * MIB, serial="DISK-4096", block_size=4096))
    try:
        node = f"/dev/{wait_name(target, 'DISK-4096')}"
        target.run(f"printf 'size=12MiB\\nsize=12MiB\\n' | sfdisk --quiet --label gpt {node}")
        target.wait_run(f"test -b {node}2 && udevadm settle --timeout=120")
        target.run(f"mkfs.ext4 -q {node}1; mount {node}1 /mnt; mkfs.ext4 -q -L SECOND {node}2")
        with (
            exporting(target, "--nqn=quux", "--force", f"--{access}", node),
            attached(client, f"quux.{node[5:]}", 16858) as attachment,
        ):
            assert client.run(f"blockdev --getss {attachment.node}").stdout == "4096\n"
            client.wait_run(f"test -b {attachment.node}p2")
            assert client.run(f"blkid -p -s LABEL -o value {attachment.node}p2").stdout == "SECOND\n"
        target.run("umount /mnt")
    finally:
        target.run("umount /mnt", check=False)
        target.remove_disk("native", timeout=120)
