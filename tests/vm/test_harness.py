# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test machines themselves: that they boot, and that all that other tests rely on works."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.harness.machine import CommandError, Disk, Machine, MachineError
from tests.vm.conftest import BootMachine


def test_command_runs_as_in_a_shell(target: Machine) -> None:
    assert target.run("uname -r").stdout.startswith("6.12.")
    assert target.run(["printf", "%s", "$HOME *"]).stdout == "$HOME *"
    assert target.run("cat; echo oops >&2; exit 3", stdin=b"\0\xff", check=False).stdout_bytes == b"\0\xff"
    assert target.run("echo $COLOUR", environment={"COLOUR": "green"}).stdout == "green\n"
    with pytest.raises(CommandError, match="returned 3"):
        target.run("exit 3")
    with pytest.raises(MachineError, match="has not ended within 1 s"):
        target.run("sleep 100", timeout=1)


def test_commands_run_at_the_same_time(target: Machine) -> None:
    process = target.start_process("echo begun; read -r line < /tmp/fifo-$$ || sleep 1000")
    process.wait_output("begun")
    assert target.run("echo meanwhile").stdout == "meanwhile\n"
    process.kill(group=True)
    assert process.wait() != 0


def test_file_comes_back_as_it_was_put(target: Machine) -> None:
    data = bytes(range(256)) * 4096
    target.put("/run/harness/data", data, mode=0o600)
    assert target.run("stat -c '%a %s' /run/harness/data").stdout == f"600 {len(data)}\n"
    assert target.get("/run/harness/data") == data


def test_wire_connects_unless_it_is_pulled(target: Machine, client: Machine) -> None:
    address = re.search(r"inet6 (fe80::\S+)/64", target.run("ip -6 address show dev eth0").stdout)
    assert address
    client.run(f"ping -c 3 -i 0.2 -W 10 {address[1]}%eth0")
    client.run("ping -c 1 -W 10 192.0.2.1")
    client.set_link(False)
    assert client.wait_run("ip link show eth0 | grep NO-CARRIER")
    client.set_link(True)
    client.wait_run("ping -c 1 -W 10 192.0.2.1")


def test_medium_is_inserted_and_ejected(target: Machine, tmp_path: Path) -> None:
    target.run("test $(blockdev --getsize64 /dev/sr0 2>/dev/null || echo 0) -eq 0")
    disc = tmp_path / "disc.iso"
    disc.write_bytes(b"disc" * (1 << 18))
    target.insert_medium("cdrom", disc)
    target.wait_run("test $(blockdev --getsize64 /dev/sr0) -eq 1048576 && head -c 4 /dev/sr0 | grep disc")
    # udev's rules lock the drive of a disc that they know.
    target.run("udevadm settle --timeout=120")
    target.eject_medium("cdrom")
    target.wait_run("! head -c 4 /dev/sr0")


def test_release_has_modules_and_sees_disks_come_grow_and_go(boot: BootMachine, release: str) -> None:
    """Either release has the kernel modules that the project is about, and sees disks come, grow and go."""
    begin = time.monotonic()
    machine = boot(
        "machine", image=release, disks=[Disk("first", serial="DISK-1")], machine_id="0123456789abcdef" * 2
    )
    print(f"{release} booted in {time.monotonic() - begin:.1f} s.")
    machine.run("modprobe -a nvmet-tcp nvme-tcp null_blk")
    assert machine.run("cat /etc/machine-id").stdout == "0123456789abcdef" * 2 + "\n"

    machine.add_disk(Disk("second", serial="DISK-2", size=8 << 20))
    machine.add_disk(Disk("third", serial="DISK-3", bus="scsi"))
    machine.wait_run(
        "test -b /dev/disk/by-id/virtio-DISK-2 -a -b /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_DISK-3"
    )
    machine.run("printf written >/dev/disk/by-id/virtio-DISK-2 && sync")
    assert machine.disk_path("second").read_bytes().startswith(b"written\0")

    machine.resize_disk("second", 16 << 20)
    machine.wait_run("test $(blockdev --getsize64 /dev/disk/by-id/virtio-DISK-2) -eq 16777216")

    machine.remove_disk("second")
    machine.remove_disk("third")
    machine.wait_run(
        "! test -e /dev/disk/by-id/virtio-DISK-2 -o -e /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_DISK-3"
    )
