# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the target itself can do with its disks while they are exported, and what it knows afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.harness.machine import Machine
from tests.vm import nvmet
from tests.vm.conftest import TOOL
from tests.vm.initiator import attached
from tests.vm.nvmet import Service, exporting, left_over

NQN = "quux"
PORT = 16858  # that follows from the NQN
DISKS = ("/dev/vdb", "/dev/vdc")
PARTITION = "printf 'size={}M\\nsize=10M\\n' | sfdisk --quiet --force {} && udevadm settle"


@pytest.fixture
def members(target: Machine) -> Iterator[tuple[str, ...]]:
    """Two disks that an array is on, which is not assembled."""
    target.run(
        "modprobe raid1; mdadm --create --quiet --run --level=1 --raid-devices=2 --assume-clean "
        f"--bitmap=none /dev/md77 {' '.join(DISKS)} && mkfs.ext4 -q /dev/md77 && udevadm settle && "
        "mdadm --stop /dev/md77"
    )
    try:
        yield DISKS
    finally:
        target.run(
            "systemctl stop 'test-*'; systemctl reset-failed 'test-*'; umount /mnt; mdadm --stop --scan; "
            f"for disk in {' '.join(DISKS)}; do blkdiscard -z $disk; done; udevadm settle",
            check=False,
        )


def failed_stop(target: Machine, service: Service) -> str:
    """Stops a service that cannot end cleanly; what it said in the end."""
    target.run(f"systemctl stop {service.unit}")
    assert service.show("ExecMainStatus") == "1"
    target.run(f"systemctl reset-failed {service.unit}")
    return service.output


@pytest.mark.parametrize("access", ["--read-only", "--read-write"])
def test_nobody_else_takes_it(target: Machine, members: tuple[str, ...], access: str) -> None:
    """md and a mount find a disk, or what stands between it and its export, but it is busy."""
    attempts = "mdadm --assemble --scan; for d in {}; do mdadm --assemble --run /dev/md77 $d; "
    attempts += "mount -t ext4 $d /mnt; swapon $d; done; cat /proc/mdstat"
    with exporting(target, f"--nqn={NQN}", access, *members):
        mappings = target.run("ls /dev/dm-* 2>/dev/null || true").stdout.split()
        assert len(mappings) == (0 if access == "--read-write" else 2)
        result = target.run(attempts.format(" ".join((*mappings, *members))), check=False)
        assert "md77" not in result.stdout
        assert result.stderr.count("mdadm: ") >= len(mappings) + 2
    target.run("mdadm --assemble --scan && mount /dev/md77 /mnt")


def test_what_was_taken_while_dead_is_not_exported(target: Machine, members: tuple[str, ...]) -> None:
    """What was made of an export while the program was dead is not exported; a stop says how to end it."""
    service = Service(target, ["--all", f"--nqn={NQN}", "--snapshot=99M"])
    service.start()
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit} && systemctl reset-failed {service.unit}")
    target.run("mdadm --assemble --scan && mount /dev/md77 /mnt && truncate -s 1M /mnt/image && sync")
    service = Service(target, ["--all", f"--nqn={NQN}", "--snapshot=99M"])
    service.start()
    assert {"vdb", "vdc"} <= nvmet.exported(target)
    assert "md77" not in nvmet.exported(target)
    use, end = "'/dev/md77' is mounted on '/mnt'", "umount /mnt && mdadm --stop /dev/md77"
    on_ours = r"it is on '/dev/dm-\d+', through which '/dev/vd[bc]' is exported"
    output = service.wait_output(f"(?s).*^Not exporting '/dev/md77': {on_ours}$").group()
    for member in members:
        said = (
            f"This machine itself uses the export of '{member}', and what it writes there is lost: {use}; "
        )
        assert f"{said}end that ('{end}')\n" in output
    refused = target.run([TOOL, "--nqn=other", "--force", "/mnt/image"], check=False).stderr
    assert re.fullmatch(f"Failed to export '/mnt/image': {on_ours}\n", refused)
    output = failed_stop(target, service)
    for member in members:
        said = (
            f"'{member}' is no longer exported, but still in use: {use}; end that ('{end}'), and it is free"
        )
        assert said in output
    assert left_over(target) == []
    assert nvmet.names(target) == set()
    # Not again before that is over.
    refused = target.run([TOOL, f"--nqn={NQN}", "--snapshot=8M", *members], check=False).stderr
    assert f"its last export is still in use: {use}; end that ('{end}')\n" in refused
    # What it says is all that there is to do.
    target.run(end)
    target.wait_run("! dmsetup ls | grep storagetm && ! losetup --list | grep storagetm")
    target.run("blockdev --rereadpt /dev/vdb && mdadm --assemble --scan")


def test_process_that_has_a_mapping_open_is_named(target: Machine) -> None:
    """A stop names the process that has a mapping open."""
    service = Service(target, [f"--nqn={NQN}", "/dev/vdb"])
    service.start()
    (mapping,) = target.run("ls /dev/dm-*").stdout.split()
    hold = "import sys, time; f = open(sys.argv[1], 'rb'); print('open', flush=True); time.sleep(1000)"
    process = target.start_process(["python3", "-c", hold, mapping])
    process.wait_output("open")
    assert (
        f"'/dev/vdb' is no longer exported, but still in use: process {process.pid} (python3) has "
        f"'{mapping}' open; end that ('kill {process.pid}'), and it is free\n"
    ) in failed_stop(target, service)
    target.run(f"kill {process.pid}")
    target.wait_run("! dmsetup ls | grep storagetm")


def test_partition_table_is_read_again(target: Machine, client: Machine) -> None:
    """Partitions that a client has made are there when the export ends; other disks are left alone."""
    target.run("udevadm settle")
    monitor = target.start_process(["udevadm", "monitor", "--kernel", "--subsystem-match=block"])
    monitor.wait_output("KERNEL - ")
    try:
        with (
            exporting(target, f"--nqn={NQN}", "--read-write", *DISKS) as service,
            attached(client, f"{NQN}.vdb", PORT) as attachment,
        ):
            client.run(PARTITION.format(20, attachment.node))
            assert not target.run("ls /dev/vdb1", check=False).stdout
        assert target.run("cat /sys/block/vdb/vdb[12]/size").stdout == "40960\n20480\n"
        table = json.loads(target.run("udevadm settle; sfdisk --json /dev/vdb").stdout)["partitiontable"]
        assert [p["size"] for p in table["partitions"]] == [40960, 20480]
        assert "block/vdb/vdb1 " in monitor.output
        assert "block/vdc" not in monitor.output
        assert "partition table" not in service.output
        # In use: the kernel keeps the old one, and the program says so.
        target.run("mkfs.ext4 -q /dev/vdb1 && mount /dev/vdb1 /mnt")
        with (
            exporting(target, f"--nqn={NQN}", "--force", "--read-write", "/dev/vdb") as service,
            attached(client, f"{NQN}.vdb", PORT) as attachment,
        ):
            client.run(PARTITION.format(30, attachment.node))
        assert (
            "The kernel may have an old partition table of '/dev/vdb', which was exported read-write: "
            "'/dev/vdb1' is mounted on '/mnt'; end that use, then run 'blockdev --rereadpt /dev/vdb' before "
            "you use a partition\n"
        ) in service.output
        target.run("umount /mnt && blockdev --rereadpt /dev/vdb")
        assert target.run("cat /sys/block/vdb/vdb1/size").stdout == "61440\n"
    finally:
        monitor.kill()
        target.run(
            "umount /mnt; blkdiscard -z /dev/vdb; blockdev --rereadpt /dev/vdb; udevadm settle", check=False
        )
