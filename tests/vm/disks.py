# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that come and go: plugged in and out, found again by their serial numbers, and a card reader."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence

from tests.harness.machine import Machine, Process
from tests.vm import nvmet

# Prints the kernel's names of the disks with these serial numbers as JSON, udev or not.
NAMES_SCRIPT = """
import glob, json, os, sys
found = {}
for kind in ("serial", "device/vpd_pg80", "device/serial"):
    for path in glob.glob(f"/sys/block/*/{kind}"):
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            continue
        for serial in sys.argv[1:]:
            if content.rstrip(b"\\n\\0 ").endswith(serial.encode()):
                found[serial] = path.split("/")[3]
print(json.dumps(found))
"""


def names_of(machine: Machine, *serials: str) -> dict[str, str]:
    """The names of the disks with these serial numbers that the machine has."""
    found: dict[str, str] = json.loads(machine.run(["python3", "-c", NAMES_SCRIPT, *serials]).stdout)
    return found


def wait_name(machine: Machine, serial: str) -> str:
    return machine.wait_until(lambda: names_of(machine, serial).get(serial))


def expected_uuid(machine: Machine, id_serial: str) -> str:
    """What the contract with systemd-storagetm makes of a machine and a disk."""
    digest = hashlib.sha256(bytes.fromhex(machine.machine_id) + id_serial.encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))


def uuids(machine: Machine) -> dict[str, str]:
    """UUID and node of each disk whose export is complete: on, and linked to two ports."""
    tree = nvmet.tree(machine)
    found = {}
    for path, value in tree.items():
        if not path.endswith("/device_uuid"):
            continue
        subsystem = path.split("/")[1]
        links = [p for p in tree if p.startswith("ports/") and p.endswith(f"/subsystems/{subsystem}")]
        namespace = path.rpartition("/")[0]
        if tree.get(f"{namespace}/enable") == "1\n" and len(links) == 2:
            found[value.strip()] = tree[f"{namespace}/device_path"].split("\n")[0]
    return found


def remove_disks(machine: Machine, disks: Sequence[str]) -> None:
    """Unplugs several disks at the same time and waits until the machine has let go of them."""
    for disk in disks:
        machine.qmp.call("device_del", id=f"{disk}-device")
    for disk in disks:
        machine.qmp.wait_event("DEVICE_DELETED", 120, device=f"{disk}-device")
        machine.qmp.call("blockdev-del", node_name=disk)


def throttle(machine: Machine, disk: str, rate: int) -> None:
    """Lets a virtio disk do no more than so many bytes a second; 0 for all that it can."""
    backend = f"/machine/peripheral/{disk}-device/virtio-backend"
    assert machine.qmp.monitor(f"block_set_io_throttle {backend} 0 {rate} 0 0 0 0") == ""


def hang(target: Machine, client: Machine, disk: str, name: str, node: str) -> Process:
    """Has a client read `node`, which is a virtio disk of the target, until its I/O hangs there.

    It does so until `throttle()` lets it pass. Returns the reading process.
    """
    # At a byte a second. Only the first read passes, maybe one of the client's udev: it is the next one that
    # pays for that, with more seconds than a test takes.
    throttle(target, disk, 1)
    busy = client.start_process(f"dd if={node} of=/dev/null bs=256k iflag=direct status=none")
    look = f"$(awk '$9 > 0 {{ print $1 }}' /sys/block/{name}/stat)"  # reads so far, if one is under way
    target.wait_run(f'before="{look}"; sleep 1; [ -n "$before" ] && [ "$before" = "{look}" ]')
    return busy


READER_DIRECTORY = "/sys/kernel/config/usb_gadget/reader"
MAKE_CARD_READER = f"""
modprobe -a dummy_hcd libcomposite usb_f_mass_storage
mkdir -p {READER_DIRECTORY} && cd {READER_DIRECTORY}
echo 0x1d6b >idVendor; echo 0x0104 >idProduct
mkdir configs/c.1 functions/mass_storage.0
echo 1 >functions/mass_storage.0/lun.0/removable
ln -s functions/mass_storage.0 configs/c.1
ls /sys/class/udc | head -n 1 >UDC
"""
REMOVE_CARD_READER = f"""
cd {READER_DIRECTORY} && echo >UDC; rm configs/c.1/mass_storage.0
rmdir configs/c.1 functions/mass_storage.0 && cd .. && rmdir reader
"""


class CardReader:
    """A card reader with `node`, which is empty at first."""

    def __init__(self, machine: Machine, node: str) -> None:
        self.machine = machine
        self.node = node
        self.lun = f"{READER_DIRECTORY}/functions/mass_storage.0/lun.0"

    def insert(self, path: str) -> None:
        """Puts a card in, the contents of a file in the machine."""
        self.machine.run(f"echo {path} >{self.lun}/file")

    def eject(self) -> None:
        """Pulls it out, whoever uses it."""
        self.machine.run(f"echo 1 >{self.lun}/forced_eject")


@contextlib.contextmanager
def card_reader(machine: Machine) -> Iterator[CardReader]:
    """Plugs a card reader into the machine's USB, whose other end is emulated there, too."""
    machine.run(MAKE_CARD_READER)
    try:
        find = "basename $(dirname $(grep -l 1 $(ls -d /sys/block/sd*/removable)))"
        yield CardReader(machine, f"/dev/{machine.wait_run(find).stdout.strip()}")
    finally:
        machine.run(REMOVE_CARD_READER)
