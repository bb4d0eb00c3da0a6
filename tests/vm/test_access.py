# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients can do to the disks: nothing, nothing that stays, or all."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from storagetm import NvmeHost
from tests.harness.machine import MIB, Disk, Machine, Nic, Wire
from tests.vm import nvmet
from tests.vm.conftest import ON_OLDER, TOOL, BootMachine, prepare
from tests.vm.disks import card_reader, wait_name
from tests.vm.initiator import TARGET_ADDRESS, Reader, attached, where, write_content
from tests.vm.nvmet import NVMET, Service, exporting, left_over

HOSTILE = Path(__file__).parent / "guest/hostile.py"
FIREWALL = Path(__file__).parent / "guest/firewall.py"
COMMANDS = 20000
FEW_COMMANDS = 300  # but enough to change a disk that is exported read-write
SIZE = 8 * MIB  # of the disk that is attacked, in bytes
NQN = "quux"  # before the disks' names
PORT = 16858  # that follows from it

# Shuts a file system down at once, its journal written and not played back (EXT4_IOC_SHUTDOWN).
SHUTDOWN = "import fcntl, os; fcntl.ioctl(os.open('/mnt', 0), 0x8004587d, b'\\1\\0\\0\\0')"
# Links to device-mapper's nodes.
LINKS = "udevadm settle; find /dev/disk /dev/mapper -lname '*/dm-*'"
# How a file system is made, and mounted read-only though its journal would have to be played back.
FILE_SYSTEMS = {
    "ext4": (64, "mkfs.ext4 -q", "ro,noload"),
    "xfs": (320, "mkfs.xfs -q", "ro,norecovery"),
    "btrfs": (128, "mkfs.btrfs -q", "ro"),
    "vfat": (32, "mkfs.vfat", "ro"),
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def mapped(target: Machine) -> Iterator[None]:
    """Nothing of the tool's is left in device-mapper, and no loop device that it made."""
    yield
    target.wait_run(
        '! dmsetup ls 2>/dev/null | grep storagetm-; test -z "$(losetup -n -O NAME)"', timeout=20
    )
    assert left_over(target) == []


@pytest.fixture
def prey(target: Machine, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A disk's node in the target, and the file here that holds its content."""
    path = tmp_path / "prey.raw"
    write_content(path, 4, SIZE)
    target.add_disk(Disk("prey", path=path, serial="DISK-PREY"))
    yield f"/dev/{wait_name(target, 'DISK-PREY')}", path
    target.remove_disk("prey", timeout=120)


def hostile(client: Machine, node: str, commands: int, *, block: int = 512) -> list[str]:
    client.put("/run/hostile.py", HOSTILE)
    name = node.rpartition("/")[2]
    arguments = [TARGET_ADDRESS, PORT, f"{NQN}.{name}", SIZE, block, commands]
    return ["python3", "/run/hostile.py", *map(str, arguments)]


def outcomes(output: str) -> dict[str, int]:
    result = json.loads(output.splitlines()[-1])
    print(f"{result['count']} commands over {result['connections']} connections: {result['outcomes']}")
    return {"count": result["count"], "connections": result["connections"], **result["outcomes"]}


# Status codes, with More and Do Not Retry set (NVMe base 2.0, figure 94).
REFUSED_BY_DEVICE_MAPPER = "io 0x6006"  # Internal Error
DONE = "io 0x0"


def test_hostile_client_changes_no_byte(target: Machine, client: Machine, prey: tuple[str, Path]) -> None:
    """Whatever a client sends, not one byte of a disk changes that is exported read-only."""
    node, path = prey
    before = digest(path)
    with exporting(target, f"--nqn={NQN}", node):
        result = outcomes(client.run(hostile(client, node, COMMANDS), timeout=900).stdout)
        assert result["count"] >= COMMANDS
        # It got past the courtesy, to what holds.
        assert result[REFUSED_BY_DEVICE_MAPPER] > 100
    assert digest(path) == before
    # The same does change a disk that may be changed.
    with exporting(target, f"--nqn={NQN}", "--read-write", node):
        assert outcomes(client.run(hostile(client, node, FEW_COMMANDS)).stdout)[DONE]
    assert digest(path) != before


def test_hostile_client_changes_no_byte_at_any_moment(
    target: Machine, client: Machine, prey: tuple[str, Path]
) -> None:
    """The same while the export is made, taken over after SIGKILL and taken away, again and again."""
    node, path = prey
    before = digest(path)
    client.run("rm -f /run/enough")
    attack = client.start_process(hostile(client, node, 0))
    attack.wait_output("begun")

    def commands() -> int:
        return max(map(int, re.findall(r"^commands: (\d+)\n", attack.output, re.MULTILINE)), default=0)

    def wait_for_harm() -> None:
        enough = commands() + FEW_COMMANDS
        client.wait_until(lambda: commands() >= enough)

    for _ in range(4):
        service = Service(target, [f"--nqn={NQN}", node])
        service.start()
        wait_for_harm()
        service.kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {service.unit}")
        target.run(f"systemctl reset-failed {service.unit}")
        service = Service(target, [f"--nqn={NQN}", node])
        service.start()
        wait_for_harm()
        assert service.stop() == set()
    client.put("/run/enough", b"")
    assert attack.wait(60) == 0, attack.output
    result = outcomes(attack.output)
    assert result["connections"] >= 4
    assert result[REFUSED_BY_DEVICE_MAPPER]
    assert digest(path) == before


def test_good_client_meets_no_error(target: Machine, client: Machine) -> None:
    """File systems, also with journals to be played back, mount read-only, and there is no error."""
    devices, digests = {}, {}
    for kind, (size, make, _) in FILE_SYSTEMS.items():
        target.add_disk(Disk(f"fs-{kind}", size=size * MIB, serial=f"FS-{kind}", bus="scsi"))
        devices[kind] = f"/dev/{wait_name(target, f'FS-{kind}')}"
        target.run(
            f"udevadm settle; {make} {devices[kind]} && mount {devices[kind]} /mnt && seq 100000 >/mnt/x"
        )
        if kind in ("ext4", "xfs"):
            target.run(f"umount /mnt; mount {devices[kind]} /mnt")  # what is only in the journal is not seen
            target.run(["python3", "-c", f"import os; open('/mnt/y', 'w').close(); os.sync(); {SHUTDOWN}"])
        target.run("umount /mnt")
    target.add_disk(Disk("fs-lvm", size=64 * MIB, serial="FS-lvm", bus="scsi"))
    devices["lvm"] = f"/dev/{wait_name(target, 'FS-lvm')}"
    target.run(
        f"udevadm settle; pvcreate -q {devices['lvm']} && vgcreate -q stm {devices['lvm']} && "
        "lvcreate -q -y -n lv -L 40M stm && mkfs.ext4 -q /dev/stm/lv && mount /dev/stm/lv /mnt && "
        "seq 100000 >/mnt/x; umount /mnt; vgchange -q -a n stm"
    )
    for device in devices.values():
        # All of what is not so large that it would take an emulated machine minutes.
        digests[device] = target.run(f"head -c {64 * MIB} {device} | sha256sum").stdout
    with exporting(target, f"--nqn={NQN}", *devices.values()):
        # What is between a disk and its export is nothing that udev would find a second time.
        assert target.run(LINKS).stdout == ""
        for kind, device in devices.items():
            with attached(client, f"{NQN}.{device[5:]}", PORT) as attachment:
                disk = attachment.node
                assert client.run(f"udevadm settle; blockdev --getro {disk}").stdout == "1\n"
                mounted, options = disk, FILE_SYSTEMS[kind][2] if kind != "lvm" else "ro"
                if kind == "lvm":
                    client.run(f"vgchange -q -a y --devices {disk} stm", check=False)
                    mounted = "/dev/stm/lv"
                client.run(f"mount -o {options} {mounted} /mnt")
                assert client.run("sha256sum </mnt/x").stdout == client.run("seq 100000 | sha256sum").stdout
                client.run("umount /mnt")
                if kind == "lvm":
                    client.run("vgchange -q -a n stm")
                client.run(["python3", "-c", f"import os; os.fsync(os.open('{disk}', os.O_RDONLY))"])
                client.run(f"nvme flush {disk}")
                read = f"dd if={disk} bs=1M count=64 iflag=direct status=none | sha256sum"
                assert client.run(read, timeout=900).stdout == digests[device]
                refused = client.run(f"dd if=/dev/zero of={disk} bs=4k count=1 oflag=direct", check=False)
                assert "Operation not permitted" in refused.stderr
                attachment.check()
    for kind in devices:
        target.remove_disk(f"fs-{kind}", timeout=120)


@pytest.mark.parametrize("access", ["--read-only", "--snapshot=16M"])
def test_client_sees_a_disk_grow_and_shrink_in_each_access(
    target: Machine, client: Machine, tmp_path: Path, access: str
) -> None:
    """A disk that grows and shrinks does so for its clients, and what they changed in memory stays."""
    path = tmp_path / "elastic.raw"
    write_content(path, 2, 4 * MIB)
    target.add_disk(Disk("elastic", path=path, serial="DISK-ELASTIC"))
    try:
        node = f"/dev/{wait_name(target, 'DISK-ELASTIC')}"
        target.run("udevadm settle --timeout=120")
        with exporting(target, f"--nqn={NQN}", access, "--all") as service:
            nqn, port = where(nvmet.tree(target), node)
            with attached(client, nqn, port) as attachment:
                if "snapshot" in access:
                    client.run(f"echo changed | dd of={attachment.node} bs=4k conv=sync,fsync seek=512")
                else:
                    reader = Reader(client, attachment.node, 2, 4 * MIB)
                for size in (12 * MIB, 8 * MIB):
                    target.resize_disk("elastic", size)
                    client.wait_run(f"[ $(blockdev --getsize64 {attachment.node}) = {size} ]")
                    # Its udev looks at the end of the disk now, which had better stay there.
                    client.run("udevadm settle --timeout=120")
                if "snapshot" in access:
                    read = f"dd if={attachment.node} bs=4k skip=512 count=1 iflag=direct | head -n 1"
                    assert client.run(read).stdout == "changed\n"
                    client.run(f"dd if=/dev/urandom of={attachment.node} bs=1M seek=7 count=1 oflag=direct")
                else:
                    reader.wait_progress()
                    reader.stop()
                attachment.check()
            assert [line for priority, line in service.journal() if priority < 5] == []
        assert path.read_bytes()[: 4 * MIB] == random.Random(2).randbytes(4 * MIB)
    finally:
        target.remove_disk("elastic", timeout=120)


def test_snapshot_outlasts_a_crash_and_ends_with_the_tool(
    target: Machine, client: Machine, prey: tuple[str, Path]
) -> None:
    """A client mounts, repairs and writes; SIGKILL of the tool loses none of it, its end all."""
    node, path = prey
    target.run(
        f"mkfs.ext4 -q {node} && mount {node} /mnt && seq 1000 >/mnt/x && "
        f'sync && seq 2000 >/mnt/y && python3 -c "{SHUTDOWN}"; umount /mnt'
    )
    before = digest(path)
    service = Service(target, [f"--nqn={NQN}", "--snapshot=16M", node])
    service.start()
    with attached(client, f"{NQN}.{node[5:]}", PORT) as attachment:
        disk = attachment.node
        client.run(f"e2fsck -fy {disk}", check=False)
        client.run(f"e2fsck -fn {disk} && mount {disk} /mnt && seq 50000 >/mnt/z; umount /mnt")
        service.kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {service.unit}")
        target.run(f"systemctl reset-failed {service.unit}")
        service = Service(target, [f"--nqn={NQN}", "--snapshot=16M", node])
        service.start()
        client.run(f"e2fsck -fn {disk} && mount {disk} /mnt && seq 50000 | cmp - /mnt/z; umount /mnt")
        target.wait_until(
            lambda: re.search(r"snapshots use [\d.]+ [kM]B of 16.8 MB", service.show("StatusText"))
        )
        attachment.check()
    service.stop()
    assert digest(path) == before
    with (
        exporting(target, f"--nqn={NQN}", "--snapshot", node),
        attached(client, f"{NQN}.{node[5:]}", PORT) as attachment,
    ):
        read = f"dd if={attachment.node} bs=1M iflag=direct status=none | sha256sum"
        assert client.run(read).stdout.split()[0] == before


def test_full_snapshot_harms_no_other(target: Machine, client: Machine, prey: tuple[str, Path]) -> None:
    """One of two disks fills the memory: writes to it fail, reads do not, and what the other has stays."""
    node, path = prey
    before = digest(path)
    target.run("truncate -s 64M /run/big; echo 3 >/proc/sys/vm/drop_caches")
    used = "awk '/^Shmem:/ {print $2}' /proc/meminfo"
    empty = int(target.run(used).stdout)
    with (
        exporting(target, f"--nqn={NQN}", "--snapshot=16M", node, "/run/big") as service,
        attached(client, f"{NQN}.{node[5:]}", PORT) as small,
        attached(client, f"{NQN}.big", PORT) as big,
    ):
        client.run(f"echo changed | dd of={small.node} bs=4k conv=sync,fsync")
        full = client.run(f"dd if=/dev/urandom of={big.node} bs=64k oflag=direct", check=False)
        assert "Input/output error" in full.stderr
        taken = int(target.run(used).stdout) - empty
        written = int(re.findall(r"(\d+) bytes", full.stderr)[-1])
        print(f"{written} bytes written before it was full, of {16 << 20}; {taken} KiB of memory taken.")
        assert taken <= 1.1 * 16 * 1024
        assert written > 0.7 * (16 << 20)
        service.wait_output("^The memory for changes of '/run/big' is full: writes to it fail, reads go on$")
        assert "which is full" in service.show("StatusText")
        # All of it can be read, old and new, on both.
        client.run(f"dd if={big.node} of=/dev/null bs=1M iflag=direct")
        read = f"dd if={small.node} bs=4k count=1 iflag=direct status=none | head -n 1"
        assert client.run(read).stdout == "changed\n"
        refused = client.run(f"dd if=/dev/zero of={big.node} bs=64k count=1 oflag=direct", check=False)
        assert "Input/output error" in refused.stderr
    assert digest(path) == before
    assert target.run("tr -d '\\0' </run/big | wc -c").stdout == "0\n"
    target.run("rm /run/big")


def test_what_a_client_flushed_is_on_the_disk(boot: BootMachine, tmp_path: Path) -> None:
    """What a client has written and flushed is on the disk, whatever ends then: the tool, or the machine."""
    path = tmp_path / "written.raw"
    path.write_bytes(bytes(SIZE))
    wire = Wire()
    disks = [Disk("written", path=path, serial="DISK-WRITTEN")]
    target = boot("doomed", disks=disks, nics=[Nic(wire, 0)])
    client = boot("writer", nics=[Nic(wire, 1)])
    target.run("ip address add 192.0.2.1/24 dev eth0")
    client.run("ip address add 192.0.2.2/24 dev eth0")
    node = f"/dev/{wait_name(target, 'DISK-WRITTEN')}"
    service = Service(target, [f"--nqn={NQN}", "--read-write", node])
    service.start()
    with attached(client, f"{NQN}.{node[5:]}", PORT) as attachment:
        write = (
            f"dd if=/dev/urandom bs=1M count=1 | tee /run/{{0}} | dd of={attachment.node} bs=1M seek={{0}} "
        )
        write += "iflag=fullblock conv=fsync"
        client.run(write.format(1))
        service.kill("KILL")
        client.run(write.format(2))
        contents = [client.get(f"/run/{number}") for number in (1, 2)]
        target.kill()
    assert path.read_bytes()[MIB : 3 * MIB] == b"".join(contents)


def test_first_rule_that_matches_counts(target: Machine) -> None:
    """The first rule that matches counts, for nodes, links, serial numbers and models."""
    rules = [
        "--access=/dev/disk/by-id/virtio-DISK-A*:read-write",
        "--access=DISK-SCSI:snapshot",
        "--access=QEMU NVMe*:read-write",
        "--access=/dev/*:read-only",
        "--access=*:read-write",
    ]
    listed = json.loads(target.run([TOOL, "--list-devices", "--json", *rules]).stdout)
    found = {d["node"]: d["access"] for d in listed if d["export"]}
    wanted = {"/dev/vdb": "read-write", "/dev/vdc": "read-only", "/dev/sda": "snapshot"}
    assert {n: found[n] for n in wanted} == wanted
    assert found["/dev/nvme0n1"] == "read-write"
    with exporting(target, "--all", f"--nqn={NQN}", *rules) as service:
        assert "2 read-write" in service.show("StatusText")
        targets = set(target.run("dmsetup table | grep ^storagetm- | cut -d' ' -f4").stdout.split())
        assert targets == {"flakey", "snapshot"}


def writable(target: Machine) -> set[str]:
    """The names of the disks that are exported without anything in between."""
    script = f"cd {NVMET}/subsystems && grep -H . */namespaces/*/device_path"
    lines = [line.partition("/")[::2] for line in target.run(script).stdout.splitlines()]
    return {nqn.rpartition(".")[2] for nqn, rest in lines if "/dev/dm-" not in rest}


def test_rule_for_a_partition_that_comes_later_protects_all(target: Machine) -> None:
    """A label on a disk that comes later: until then all are protected; what has clients stays as it is."""
    target.add_disk(Disk("labelled", size=SIZE, serial="DISK-LABEL"))
    name = wait_name(target, "DISK-LABEL")
    target.run(
        f"udevadm settle; echo type=linux | sfdisk --quiet /dev/{name} && udevadm settle && "
        f"mkfs.ext4 -q -L DATA /dev/{name}1 && udevadm settle && test -e /dev/disk/by-label/DATA"
    )
    path = target.disk_path("labelled")
    target.remove_disk("labelled", timeout=120)
    rule = "--access=/dev/disk/by-label/DATA:read-only"
    arguments = ["--all", f"--nqn={NQN}", "--read-write", "--access=/dev/vdb:read-write", rule]
    service = Service(target, arguments)
    service.start()
    plugged = []
    try:
        warning = f"{rule} matches no disk; until one does, all that no rule before it matches are read-only"
        assert (4, warning) in service.journal()
        assert writable(target) == {"vdb"}
        before = nvmet.exported(target)
        plugged.append("labelled")
        target.add_disk(Disk("labelled", path=path, serial="DISK-LABEL"))
        name = target.wait_until(lambda: nvmet.exported(target) - before).pop()
        plugged.append("other")
        target.add_disk(Disk("other", size=SIZE, serial="DISK-OTHER"))
        other = target.wait_until(lambda: nvmet.exported(target) - before - {name}).pop()
        assert writable(target) == {"vdb", other}
        # The rule matches from the start now, but no access changes behind a client's back.
        service.kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {service.unit}")
        target.run(f"systemctl reset-failed {service.unit}")
        service = Service(target, arguments)
        service.start()
        assert nvmet.exported(target) == before | {name, other}
        assert writable(target) == {"vdb", other}
        service.stop()
        with exporting(target, *arguments):
            assert writable(target) == nvmet.exported(target) - {name}
    finally:
        target.run("systemctl stop 'test-*'", check=False)
        for disk in plugged:
            target.remove_disk(disk, timeout=120)


def test_read_only_devices_are_not_exported_to_be_written(
    target: Machine, client: Machine, tmp_path: Path
) -> None:
    """What is read-only itself, CDs among it, is exported the same way, and not at all to be written to."""
    disc = tmp_path / "disc.iso"
    write_content(disc, 5, 2 * MIB)
    target.run("blockdev --setro /dev/vdc")
    target.insert_medium("cdrom", disc)
    target.wait_run(f"{TOOL} --list-devices | grep sr0.*read-only")
    target.run("truncate -s 4M /run/locked.card")
    try:
        with card_reader(target) as reader:
            target.run(f"echo 1 >{reader.lun}/ro")
            reader.insert("/run/locked.card")
            target.wait_run(f"[ $(cat /sys/block/{reader.node[5:]}/size) != 0 ]")
            devices = ["/dev/vdc", "/dev/sr0", reader.node]
            with exporting(target, f"--nqn={NQN}", *devices):
                for device in devices:
                    with attached(client, f"{NQN}.{device[5:]}", PORT) as attachment:
                        assert client.run(f"blockdev --getro {attachment.node}").stdout == "1\n"
                        read = "dd if={} bs=64k iflag=direct status=none | sha256sum"
                        theirs = client.run(read.format(attachment.node)).stdout
                        assert theirs == target.run(f"sha256sum <{device}").stdout
                        attachment.check()
            refused = target.run([TOOL, "--read-write", "/dev/vdc"], check=False)
            assert refused.returncode == 1
            assert "it is read-only, and was asked for read-write" in refused.stderr
    finally:
        target.run("blockdev --setrw /dev/vdc")
        target.eject_medium("cdrom")


@pytest.mark.parametrize("access", ["--read-only", "--snapshot=8M", "--read-write"])
def test_odd_devices_are_exported_whole(target: Machine, client: Machine, access: str) -> None:
    """Blocks of 4096 bytes, a disk that ends within one, and regular files."""
    target.add_disk(Disk("large-blocks", size=SIZE, serial="DISK-4K", bus="scsi", block_size=4096))
    target.add_disk(Disk("odd", size=MIB - 512, serial="DISK-ODD", bus="scsi"))
    large, odd = (f"/dev/{wait_name(target, serial)}" for serial in ("DISK-4K", "DISK-ODD"))
    target.run("head -c 3000000 /dev/urandom >/run/plain.img; udevadm settle")
    try:
        before = target.run(f"cat {large} {odd} /run/plain.img | sha256sum").stdout
        with exporting(target, f"--nqn={NQN}", access, large, odd, "/run/plain.img"):
            for name, size, block in (
                (large[5:], SIZE, 4096),
                (odd[5:], MIB - 512, 512),
                ("plain.img", 3000000 // 512 * 512, 512),
            ):
                with attached(client, f"{NQN}.{name}", PORT) as attachment:
                    node = attachment.node
                    sizes = client.run(f"blockdev --getsize64 --getss {node}").stdout.split()
                    assert sizes == [str(size), str(block)]
                    source = "/run/plain.img" if name == "plain.img" else f"/dev/{name}"
                    ours = target.run(f"head -c {size} {source} | sha256sum").stdout
                    assert client.run(f"sha256sum <{node}").stdout == ours
                    written = client.run(
                        f"dd if=/dev/zero of={node} bs={block} count=1 oflag=direct", check=False
                    )
                    assert (written.returncode != 0) == (access == "--read-only")
        after = target.run(f"cat {large} {odd} /run/plain.img | sha256sum").stdout
        assert (after == before) == (access != "--read-write")
    finally:
        target.remove_disk("large-blocks", timeout=120)
        target.remove_disk("odd", timeout=120)
        target.run("rm /run/plain.img")


def test_zoned_device_is_left_out(target: Machine) -> None:
    """A zoned device is left out: a zone can be reset through what refuses all other changes."""
    target.run("modprobe null_blk nr_devices=1 gb=1 zoned=1 zone_size=64; udevadm settle")
    try:
        refused = target.run([TOOL, "/dev/nullb0"], check=False)
        assert refused.returncode == 1
        assert refused.stderr == (
            "Failed to export '/dev/nullb0': it is a zoned device, which cannot be protected from clients; "
            "see --read-write\n"
        )
    finally:
        target.run("modprobe -r null_blk")


def test_missing_modules_make_nothing_less_safe(boot: BootMachine) -> None:
    """Nothing less safe instead: the disk is not exported, and the message says what would work."""
    machine = boot("bare", disks=[Disk("first", serial="DISK-1")])
    modules = machine.run("echo /lib/modules/$(uname -r)/kernel/drivers").stdout.strip()
    hide = f"mkdir -p /run/away; mv $(find {modules} -name '{{}}.ko*') /run/away; depmod"

    def refused(access: str) -> str:
        result = machine.run([TOOL, access, "/dev/vdb"], check=False)
        assert result.returncode == 1
        assert nvmet.names(machine) == set()
        return result.stderr

    machine.run("modprobe nvmet-tcp; ! lsmod | grep dm_flakey")
    machine.run(hide.format("dm-flakey"))
    assert refused("--read-only") == (
        "Failed to export '/dev/vdb': read-only access needs 'dm-flakey', which this kernel does not have; "
        "install it, or give --access=/dev/vdb:snapshot, which would work\n"
    )
    machine.run("rmmod dm_snapshot; " + hide.format("dm-snapshot"))
    assert "snapshot access needs 'dm-snapshot', which this kernel does not have; " in refused(
        "--snapshot=4M"
    )
    assert "--access=/dev/vdb:read-write, which would work" in refused("--read-only")
    with exporting(machine, "--read-write", "/dev/vdb"):
        assert nvmet.exported(machine) == {"vdb"}
    # With --all the others are exported.
    with exporting(machine, "--all", "--access=/dev/vdb:read-only", "--read-write") as service:
        assert "vdb" not in nvmet.exported(machine)
        assert re.search(
            "^Failed to export '/dev/vdb': read-only access needs", service.output, re.MULTILINE
        )


def test_loopback_interface_may_be_down(target: Machine) -> None:
    """A rescue system may not even have switched on the loopback interface."""
    target.run("ip link set lo down && ip address flush dev lo")
    try:
        with exporting(target, f"--nqn={NQN}", "/dev/vdb"):
            assert nvmet.exported(target) == {"vdb"}
    finally:
        target.run("ip link set lo up; ip address replace 127.0.0.1/8 dev lo")


def test_device_of_another_program_is_left_alone(target: Machine) -> None:
    """Another program's device-mapper device is left alone, whatever it is called, and so is its disk."""
    steps = json.loads(target.run([TOOL, "--dry-run", "--json", "/dev/vdb"]).stdout)
    (path,) = (s["path"] for s in steps if s["step"] == "map")
    name = path.rpartition("/")[2]
    target.run(f"dmsetup create {name} --table '0 8 zero'")
    try:
        table = target.run(
            f"dmsetup info -c --noheadings -o name,uuid,major,minor; dmsetup table {name}"
        ).stdout
        refused = target.run([TOOL, "/dev/vdb"], check=False)
        assert refused.returncode == 1
        assert f"another program made the device-mapper device '{name}'" in refused.stderr
        again = target.run(
            f"dmsetup info -c --noheadings -o name,uuid,major,minor; dmsetup table {name}"
        ).stdout
        assert again == table
    finally:
        target.run(f"dmsetup remove {name}")


def test_disk_gone_while_dead_leaves_nothing(target: Machine, tmp_path: Path) -> None:
    """The disk under a read-only export goes while nobody looks: the next start takes away what is left."""
    path = tmp_path / "gone.raw"
    write_content(path, 6, SIZE)
    target.add_disk(Disk("gone", path=path, serial="DISK-GONE", bus="scsi"))
    node = f"/dev/{wait_name(target, 'DISK-GONE')}"
    target.run("udevadm settle")
    service = Service(target, ["--all", f"--nqn={NQN}"])
    service.start()
    assert node[5:] in nvmet.exported(target)
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit}")
    target.run(f"systemctl reset-failed {service.unit}")
    target.remove_disk("gone", timeout=120)
    assert f"storagetm-{node[5:]}-" in target.run("dmsetup ls").stdout
    # And one whose part of configfs was taken away by hand, so that only device-mapper has it.
    target.run(
        f"cd {NVMET} && rm ports/*/subsystems/{NQN}.vdb && rmdir subsystems/{NQN}.vdb/namespaces/* "
        f"subsystems/{NQN}.vdb"
    )
    service = Service(target, ["--all", f"--nqn={NQN}"])
    service.start()
    names = target.run("dmsetup ls").stdout
    assert f"storagetm-{node[5:]}-" not in names
    assert names.count("storagetm-vdb-") == 1
    assert "vdb" in nvmet.exported(target)
    # Ours are no disks of their own.
    assert "dm-" not in " ".join(nvmet.exported(target))
    listed = json.loads(target.run([TOOL, "--list-devices", "--json"]).stdout)
    assert not [d for d in listed if d["node"].startswith("/dev/dm-")]
    service.stop()


def test_disk_is_protected_behind_a_firewall(
    target: Machine, client: Machine, prey: tuple[str, Path]
) -> None:
    """One that drops packets to the machine itself, too: disks are exported all the same, and protected.

    Hosts cannot be told then that it is read-only. That is made up for once the firewall lets it.
    """
    node, path = prey
    before = digest(path)
    target.put("/run/firewall.py", FIREWALL)
    loopback = "tc qdisc add dev lo clsact && tc filter add dev lo ingress matchall action drop"
    target.run(f"python3 /run/firewall.py up && {loopback}")
    ports = "This machine has a firewall, which must let in TCP ports 16858 and 29423"
    try:
        begin = time.monotonic()
        with exporting(target, f"--nqn={NQN}", "--all") as service:
            assert time.monotonic() - begin < NvmeHost.TIMEOUT_SEC
            service.wait_output(f"^{ports}$")
            target.run("python3 /run/firewall.py down")
            with attached(client, f"{NQN}.{node[5:]}", PORT) as attachment:
                disk = attachment.node
                assert client.run(f"blockdev --getro {disk}").stdout == "0\n"
                client.run(f"! dd if=/dev/zero of={disk} bs=64k count=1 oflag=direct")
                target.run("tc qdisc del dev lo clsact")
                service.wait_output("^Clients are told again which disks are read-only$")
                client.wait_run(f"test $(blockdev --getro {disk}) = 1")
                assert attachment.identity().split()[0] == attachment.controller
            # One word of it and no more; nothing said that had to be taken back.
            journal = service.journal()
            assert [line for priority, line in journal if priority < 6] == [
                "Failed to tell clients which disks are read-only: Connection timed out; let this machine's "
                "firewall accept all packets on 'lo'. Their writes fail all the same"
            ]
            assert not [line for _, line in journal if line.startswith("No longer: Exporting")]
    finally:
        target.run("python3 /run/firewall.py down; tc qdisc del dev lo clsact", check=False)
    assert digest(path) == before


@pytest.mark.parametrize("release", ON_OLDER)
def test_each_access_works_on_each_release(
    boot: BootMachine, tool: Path, release: str, tmp_path: Path
) -> None:
    """All three kinds of access on the kernels of both releases, each seen by a client of the same one."""
    wire = Wire()
    path = tmp_path / "data.raw"
    write_content(path, 7, SIZE)
    disks = [Disk("data", path=path, serial="DISK-DATA")]
    target = boot("target2", release, wait=False, disks=disks, nics=[Nic(wire, 0)])
    client = boot("client2", release, wait=False, nics=[Nic(wire, 1)])
    for number, machine in enumerate((target, client), 1):
        machine.wait_boot()
        prepare(machine, tool, number)
    node = f"/dev/{wait_name(target, 'DISK-DATA')}"
    before = digest(path)
    for access in ("--read-only", "--snapshot=8M", "--read-write"):
        with (
            exporting(target, f"--nqn={NQN}", access, node),
            attached(client, f"{NQN}.{node[5:]}", PORT) as attachment,
        ):
            disk = attachment.node
            read_only = client.run(f"blockdev --getro {disk}").stdout == "1\n"
            assert read_only == (access == "--read-only")
            client.run(["python3", "-c", f"import os; os.fsync(os.open('{disk}', os.O_RDONLY))"])
            written = client.run(f"dd if=/dev/zero of={disk} bs=64k count=1 conv=fsync", check=False)
            assert (written.returncode == 0) == (access != "--read-only")
            # Another client is turned away from what can be written to, by Linux 6.1 as well.
            other = str(uuid.uuid4())
            options = f"hostid={other},hostnqn=nqn.2014-08.org.nvmexpress:uuid:{other},duplicate_connect"
            address = f"transport=tcp,traddr={TARGET_ADDRESS},trsvcid={PORT},nqn={NQN}.{node[5:]}"
            second = client.run(f"echo {address},{options} >/dev/nvme-fabrics", check=False)
            assert (second.returncode == 0) == (access == "--read-only")
            attachment.check()
            if access == "--read-only":
                outcomes(client.run(hostile(client, node, 500)).stdout)
        assert (digest(path) == before) == (access != "--read-write")
