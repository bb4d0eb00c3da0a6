# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots where it matters: of disks that are about to die, and in machines with little memory."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tests.harness.machine import MIB, Disk, Machine
from tests.vm.conftest import TOOL, BootMachine
from tests.vm.disks import wait_name
from tests.vm.initiator import attached
from tests.vm.nvmet import Service
from tests.vm.test_access import SHUTDOWN

NQN = "quux"
PORT = 16858  # that follows from the NQN
SIZE = 64 * MIB

# A file system with blocks of 4 KiB, files in a directory, and changes that are only in its journal.
MAKE_DAMAGED = f"""
set -e
mkfs.ext4 -q -b 4096 {{0}} && mount {{0}} /mnt && mkdir /mnt/many
for i in $(seq 200); do echo $i >/mnt/many/$i; done
seq 100000 >/mnt/before && umount /mnt && mount {{0}} /mnt
seq 50000 >/mnt/late && rm /mnt/many/200 && sync -f /mnt
python3 -c "import os; open('/mnt/last', 'w').close(); os.sync(); {SHUTDOWN}"
umount /mnt
dumpe2fs {{0}} 2>/dev/null | grep -m 1 'Inode table at'
"""
# The first half of what makes a snapshot work again.
BREAK_OFF = f"""
import sys
sys.path.insert(0, "{TOOL}")
import glob, os, storagetm
name = open(glob.glob("/sys/block/dm-*/dm/name")[0]).read().rstrip()
fd = os.open("/dev/loop" + storagetm.snapshot_store(name)[2:], os.O_RDWR)
storagetm.set_autoclear(fd, on=False)
storagetm.dm_replace(name, storagetm.dm_table(storagetm.dm_sectors(name), "error", ""))
"""


def killed(target: Machine, service: Service) -> None:
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit} && systemctl reset-failed {service.unit}")


def test_unreadable_sectors_end_no_snapshot(target: Machine, client: Machine, tmp_path: Path) -> None:
    """A file system on a damaged disk is repaired and used; no unreadable sector ends a snapshot."""
    path = tmp_path / "dying.raw"
    path.write_bytes(bytes(SIZE))
    target.add_disk(Disk("dying", path=path, serial="DISK-DYING"))
    node = f"/dev/{wait_name(target, 'DISK-DYING')}"
    found = target.run("udevadm settle; " + MAKE_DAMAGED.format(node)).stdout
    target.remove_disk("dying", timeout=120)
    # In the block with the inodes 49 to 64, and in one that is free.
    bad = int(re.findall(r"Inode table at (\d+)-", found)[0]) * 8 + 3 * 8 + 3
    free = (SIZE - 2 * MIB) // 512 + 3
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    target.add_disk(Disk("dying", path=path, serial="DISK-DYING", bad_sectors=(bad, free)))
    node = f"/dev/{wait_name(target, 'DISK-DYING')}"
    target.run("udevadm settle")
    arguments = [f"--nqn={NQN}", "--snapshot=32M", node]
    service = Service(target, arguments)
    service.start()
    try:
        with attached(client, f"{NQN}.{node[5:]}", PORT) as attachment:
            disk = attachment.node
            repaired = client.run(f"e2fsck -fy {disk}", check=False)
            assert repaired.returncode == 1, repaired.stdout
            client.run(
                f"e2fsck -fn {disk} && mount {disk} /mnt && seq 100000 | cmp - /mnt/before && "
                "seq 50000 | cmp - /mnt/late && seq 1 30 | cmp - <(cd /mnt/many; cat $(seq 1 30)) && "
                "seq 200000 >/mnt/new && umount /mnt"
            )
            assert not re.search("unreadable|cannot be read", service.output)
            # Less than a whole unit: that cannot be written, and nothing else is lost.
            partial = f"dd if=/dev/zero of={disk} bs=512 seek={free + 1} count=1 oflag=direct"
            for _ in range(2):
                assert "Input/output error" in client.run(partial, check=False).stderr
                mounted = (
                    f"mount {disk} /mnt && seq 200000 | cmp - /mnt/new && echo {{}} >/mnt/again; umount /mnt"
                )
                client.wait_run(f"e2fsck -fn {disk}")
                client.run(mounted.format("again"))
            service.wait_output(
                f"^A client's write to '{node}' failed, since a sector beside it cannot be read, "
            )
            assert service.output.count("cannot be read") == 1
            # What overwrites the unreadable sector makes it readable for this client.
            client.run(f"dd if=/dev/zero of={disk} bs=4k seek={free // 8} count=1 oflag=direct")
            client.run(partial)
            client.run(f"dd if={disk} bs=4k skip={free // 8} count=1 iflag=direct of=/dev/null")
            # Killed in the middle of that.
            killed(target, service)
            target.run(["python3", "-c", BREAK_OFF])
            assert client.run(
                f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct", check=False
            ).returncode
            service = Service(target, arguments)
            service.start()
            client.run(f"blockdev --flushbufs {disk}; e2fsck -fn {disk} && " + mounted.format("last"))
            service.stop()
    finally:
        target.run("systemctl stop 'test-*'", check=False)
        target.remove_disk("dying", timeout=120)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


HOG = """
import sys, time
taken = []
for _ in range(int(sys.argv[1])):
    taken.append(bytearray(b"x" * (4 << 20)))
    time.sleep(0.1)
print("taken", flush=True)
time.sleep(1000)
"""


def test_machine_with_little_memory_lives(boot: BootMachine) -> None:
    """However much is asked for and written, and whoever else takes memory, the machine lives."""
    machine = boot("small", memory=288, disks=[Disk("data", size=1 << 30, serial="DISK-DATA")])
    machine.run("ip link set lo up; modprobe nvme-tcp")
    service = Service(machine, ["/dev/vdb", f"--nqn={NQN}", "--snapshot=8G"])
    service.start()
    said = service.wait_output(
        r"^Snapshots get ([\d.]+) MB of memory instead of 8\.6 GB: this machine cannot spare more$"
    )
    available = int(machine.run("awk '/^MemAvailable:/ {print $2}' /proc/meminfo").stdout) * 1024
    assert float(said[1]) * 1e6 < available
    fill = "dd if=/dev/urandom of={} bs=1M oflag=direct seek={}"
    with attached(machine, f"{NQN}.vdb", PORT, "127.0.0.1") as attachment:
        disk = attachment.node
        hog = machine.start_process(["python3", "-c", HOG, "10"])
        hog.wait_output("^taken")
        full = machine.run(fill.format(disk, 0), check=False)
        assert "Input/output error" in full.stderr
        written = int(re.findall(r"(\d+) bytes", full.stderr)[-1])
        assert 20 * MIB < written < float(said[1]) * 1e6
        service.wait_output("^The memory for changes of '/dev/vdb' is full: writes to it fail, reads go on$")
        assert "this machine cannot spare the 8.6 GB asked for), which is full" in service.show("StatusText")
        # Somebody keeps trying, and all can be read.
        for number in range(3):
            assert machine.run(fill.format(disk, 500 + number), check=False).returncode
        digest = f"dd if={disk} bs=1M count={written // MIB} iflag=direct status=none | sha256sum"
        before = machine.run(digest).stdout
        assert hog.poll() is None
        hog.kill()
        machine.wait_run(f"dd if=/dev/zero of={disk} bs=64k seek=9000 count=16 oflag=direct")
        assert machine.run(digest).stdout == before
    assert "oom" not in machine.run("dmesg").stdout.lower()
    service.stop()
