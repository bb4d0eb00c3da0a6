# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the captures in tests/unit/captures/ anew, from emulated machines. Takes some minutes.

python -m tests.unit.make_captures [NAME...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.harness import images
from tests.harness.machine import Disk, Machine, Nic, Wire

HERE = Path(__file__).resolve().parent
CAPTURES = HERE / "captures"
MACHINE_ID = "0123456789abcdef0123456789abcdef"


def save(machine: Machine, name: str, disk: str = "") -> None:
    machine.run("udevadm settle --timeout=100")
    machine.put("/run/capture.py", HERE / "capture.py")
    capture = json.loads(machine.run(f"python3 -I /run/capture.py {disk}").stdout)
    # One entry a line, so that a change can be read.
    text = json.dumps(capture, indent=1, sort_keys=True) + "\n"
    (CAPTURES / f"{name}.json").write_text(text)
    print(f"{name}: {len(text)} bytes", flush=True)


def disks(medium: Path) -> list[Disk]:
    return [
        Disk("alpha", serial="DISK-ALPHA"),
        Disk("beta", serial="DISK-BETA"),
        Disk("plain"),
        Disk("gamma", size=256 << 20),
        Disk("small", size=128 << 20, bus="scsi", serial="DISK-SCSI"),
        Disk("flash", size=128 << 20, bus="nvme", serial="DISK-NVME"),
        Disk("stick", bus="usb", serial="DISK-USB"),
        Disk("old", bus="ide", serial="DISK-ATA"),
        Disk("frozen", serial="DISK-READONLY", readonly=True),
        Disk("cdrom", bus="ide", kind="cd"),
        Disk("disc", path=medium, bus="scsi", kind="cd"),
    ]


def all_kinds(release: str) -> None:
    """Every kind of disk: untouched, partitioned, used in every way, assembled but not used.

    Of older releases only the third.
    """
    directory = tempfile.TemporaryDirectory()
    medium = Path(directory.name) / "disc.iso"
    medium.write_bytes(b"disc" * (1 << 18))
    wire = Wire()
    with (
        directory,
        Machine(
            "target",
            images.build(release)[release],
            disks=disks(medium),
            nics=[Nic(wire, 0), Nic()],
            machine_id=MACHINE_ID,
        ) as machine,
    ):
        machine.start()
        machine.wait_boot()
        machine.run("modprobe -a loop zram; modprobe brd rd_nr=1; modprobe nbd nbds_max=1")
        machine.run(
            "ip link set lo up; ip link set eth0 up; ip address add 192.0.2.1/24 dev eth0;"
            "ip address add 2001:db8::1/64 dev eth0; ip address add 2001:db8::2/64 dev eth0 preferred_lft 0"
        )
        machine.wait_run("ip -6 address show dev eth0 scope link -tentative | grep fe80")
        if release == "trixie":
            save(machine, "trixie-fresh", "vdb")
        machine.run("printf 'size=32MiB\\n,\\n' | sfdisk /dev/vdb; udevadm settle")
        machine.run("mkfs.ext4 -q /dev/vdb1; mkswap /dev/vdb2; udevadm settle")
        if release == "trixie":
            save(machine, "trixie-partitioned")
        use_stack(machine)
        save(machine, f"{release}-used")
        if release != "trixie":
            return
        machine.run(
            "umount '/mnt/on the stack' /mnt/btrfs; umount /mnt/alpha1/loop; losetup -d /dev/loop0;"
            "umount /mnt/alpha1; swapoff /dev/vdb2; kill $(cat /run/holder)"
        )
        machine.run(
            "mdadm --create /dev/md1 --run --level=0 --force --raid-devices=1 /dev/sda; udevadm settle"
        )
        save(machine, "trixie-assembled")


def use_stack(machine: Machine) -> None:
    """Mounts and swap on partitions, through md, LUKS and LVM, btrfs, a loop device, and a lone claim."""
    machine.run(
        """
        set -e
        modprobe btrfs
        mkdir -p /mnt/alpha1 /mnt/btrfs '/mnt/on the stack'
        mount /dev/vdb1 /mnt/alpha1
        swapon /dev/vdb2
        mdadm --create /dev/md0 --run --level=1 --metadata=1.2 --raid-devices=2 /dev/vdc /dev/vdd
        printf key >/run/key
        cryptsetup luksFormat --batch-mode --type=luks2 --pbkdf=pbkdf2 --pbkdf-force-iterations=1000 \
            /dev/md0 /run/key
        cryptsetup open --key-file=/run/key /dev/md0 secret
        pvcreate -q /dev/mapper/secret
        vgcreate -q group /dev/mapper/secret
        lvcreate -q -y -n volume -l 50%FREE group
        udevadm settle
        mkfs.ext4 -q /dev/group/volume
        mount /dev/group/volume '/mnt/on the stack'
        mkfs.btrfs -q -f /dev/vde /dev/nvme0n1
        mount /dev/vde /mnt/btrfs
        truncate -s 8M /mnt/alpha1/disk.img
        losetup /dev/loop0 /mnt/alpha1/disk.img
        mkfs.ext4 -q /dev/loop0
        mkdir /mnt/alpha1/loop
        mount /dev/loop0 /mnt/alpha1/loop
        """
    )
    stick = machine.run("readlink -f /dev/disk/by-id/usb-*").stdout.strip()
    # Somebody who claims a disk and does not show up as its holder.
    machine.start_process(
        f"""python3 -c 'import os, time
os.open("{stick}", os.O_RDONLY | os.O_EXCL)
open("/run/holder", "w").write(str(os.getpid()))
time.sleep(10000)'"""
    )
    machine.wait_run("test -s /run/holder")


def attached(multipath: str) -> None:
    """A machine that has attached its own disk over NVMe/TCP, with and without native multipath."""
    with Machine(
        "attached",
        images.build("trixie")["trixie"],
        disks=[Disk("alpha", serial="DISK-ALPHA"), Disk("flash", bus="nvme", serial="DISK-NVME")],
        machine_id=MACHINE_ID,
        kernel_options=[f"nvme_core.multipath={multipath}"],
    ) as machine:
        machine.start()
        machine.wait_boot()
        machine.run("ip link set lo up; modprobe -a nvmet-tcp nvme-tcp; modprobe loop max_loop=1")
        machine.run(
            """
            set -e
            cd /sys/kernel/config/nvmet
            mkdir subsystems/other ports/1 subsystems/other/namespaces/1
            echo 1 >subsystems/other/attr_allow_any_host
            echo /dev/vdb >subsystems/other/namespaces/1/device_path
            echo 1 >subsystems/other/namespaces/1/enable
            echo ipv4 >ports/1/addr_adrfam
            echo tcp >ports/1/addr_trtype
            echo 4420 >ports/1/addr_trsvcid
            echo 127.0.0.1 >ports/1/addr_traddr
            ln -s "$PWD/subsystems/other" ports/1/subsystems/
            nvme connect -t tcp -a 127.0.0.1 -s 4420 -n other
            """
        )
        machine.wait_run("ls /dev/disk/by-id/ | grep nvme.*Linux")
        save(machine, f"attached-{'multipath' if multipath == 'Y' else 'single'}")
        # Something stacked upon what came over the network.
        disk = machine.run("readlink -f $(ls /dev/disk/by-id/nvme-Linux* | head -n 1)").stdout.strip()
        machine.run(f"echo 0 65536 linear {disk} 0 | dmsetup create stacked")
        save(machine, f"attached-{'multipath' if multipath == 'Y' else 'single'}-stacked")


ALL: dict[str, Callable[[], None]] = {
    "trixie": lambda: all_kinds("trixie"),
    "bookworm": lambda: all_kinds("bookworm"),
    "multipath": lambda: attached("Y"),
    "single": lambda: attached("N"),
}


def main() -> None:
    CAPTURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ALL:
        ALL[name]()
    subprocess.run(["git", "status", "--short", str(CAPTURES)], check=True)


if __name__ == "__main__":
    main()
