# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks, media and sizes that come, go and change while the tool runs."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from tests.harness.machine import Disk, Machine
from tests.vm import nvmet
from tests.vm.conftest import TOOL
from tests.vm.disks import (
    card_reader,
    expected_uuid,
    hang,
    names_of,
    remove_disks,
    throttle,
    uuids,
    wait_name,
)
from tests.vm.initiator import Reader, attached, where, write_content
from tests.vm.nvmet import Service, exporting, left_over

SIZE = 4 << 20  # of a disk that is read, in bytes
PATIENCE = 400  # seconds, for udev to have looked at a batch of disks on a busy host
ROUNDS = 5
BUSES: tuple[Literal["virtio", "scsi"], ...] = ("virtio", "scsi") * 5  # of each round

# Writes uevents until one is dropped at the socket of a process that does not read.
FLOOD_SCRIPT = """
import os, sys
def dropped():
    with open("/proc/net/netlink") as file:
        rows = [line.split() for line in file][1:]
    # Of the family for uevents (15), with groups, and of this process.
    return any(int(r[8]) for r in rows if r[1] == "15" and r[2] == sys.argv[2])
fd = os.open(sys.argv[1], os.O_WRONLY)
for number in range(200000):
    os.write(fd, b"change")
    if number % 500 == 0 and dropped():
        print(number)
        sys.exit()
sys.exit("The socket took them all")
"""


def resources(service: Service) -> tuple[int, int]:
    """Open descriptors and threads of the tool."""
    pid = service.pid
    result = service.machine.run(f"ls /proc/{pid}/fd | wc -l; ls /proc/{pid}/task | wc -l")
    descriptors, threads = result.stdout.split()
    return int(descriptors), int(threads)


def wait_line(service: Service, pattern: str, timeout: float = 120) -> None:
    """Waits for a line in the journal."""
    service.machine.wait_until(lambda: re.search(pattern, service.output, re.MULTILINE), timeout, 0.5)


def all_exported(machine: Machine, wanted: Collection[str]) -> bool:
    return set(wanted) <= uuids(machine).keys()


def none_exported(machine: Machine, unwanted: Collection[str]) -> bool:
    return not set(unwanted) & uuids(machine).keys()


@pytest.fixture
def held(target: Machine, tmp_path: Path) -> Iterator[str]:
    """The node of a disk in the target whose content a `Reader` with seed 1 knows, and that stays."""
    path = tmp_path / "held.raw"
    write_content(path, 1, SIZE)
    target.add_disk(Disk("held", path=path, serial="DISK-HELD"))
    yield f"/dev/{wait_name(target, 'DISK-HELD')}"
    target.remove_disk("held", timeout=120)


@pytest.fixture
def plugged(target: Machine) -> Iterator[list[str]]:
    """Disks that are unplugged if a test does not come to it, so that no other one fails for that."""
    disks: list[str] = []
    yield disks
    remove_disks(target, disks)


def test_fifty_disks_come_and_go_beside_a_reader(
    target: Machine, client: Machine, held: str, plugged: list[str]
) -> None:
    """Fifty disks come and go, in batches, while a client reads one that stays."""
    id_serial = {"virtio": "{}", "scsi": "0QEMU_QEMU_HARDDISK_{}"}
    began = time.monotonic()
    with exporting(target, "--all") as service:
        nqn, port = where(nvmet.tree(target), held)
        settled = uuids(target)
        with attached(client, nqn, port) as attachment:
            reader = Reader(client, attachment.node, 1, SIZE)
            reader.wait_progress()
            before = resources(service)
            for number in range(ROUNDS):
                disks = [
                    Disk(f"plug{number}-{i}", size=(1 + i) << 20, serial=f"PLUG-{number}-{i}", bus=bus)
                    for i, bus in enumerate(BUSES)
                ]
                wanted = {expected_uuid(target, id_serial[d.bus].format(d.serial)): d.serial for d in disks}
                for disk in disks:
                    target.add_disk(disk)
                    plugged.append(disk.id)
                target.wait_until(partial(all_exported, target, wanted), PATIENCE)
                # Each is exported under the name that it has now, not under one that a disk before it had.
                names = names_of(target, *[str(d.serial) for d in disks])
                live = uuids(target)
                assert {s: live[u] for u, s in wanted.items()} == {s: f"/dev/{names[s]}" for s in names}
                remove_disks(target, plugged)
                plugged.clear()
                if number % 2:
                    target.wait_until(partial(none_exported, target, wanted), PATIENCE)
            target.wait_until(lambda: uuids(target) == settled, PATIENCE)
            target.wait_until(lambda: resources(service) == before, PATIENCE)
            reader.wait_progress()
            result = reader.stop()
            attachment.check()
        journal = service.journal()
        # On a busy host udev may need 10 s for a disk, of which the tool tells.
        assert [line for priority, line in journal if priority < 6 and "not exported yet" not in line] == []
        assert service.show("NRestarts") == "0"
        exports = [line for _, line in journal if "PLUG-" in line and line.startswith("Exporting")]
        assert len(exports) == ROUNDS * BUSES.count("scsi")
    assert left_over(target) == []
    print(
        f"{ROUNDS * len(BUSES)} plug cycles in {time.monotonic() - began:.0f} s; the client read "
        f"{result['size'] / 1e6:.0f} MB, longest read {result['longest']:.2f} s; "
        f"descriptors, threads: {before}."
    )


def test_cd_is_exported_while_it_is_in_the_drive(target: Machine, tmp_path: Path) -> None:
    """A CD is exported for as long as it is in the drive, whose button works all the time."""
    disc = tmp_path / "disc.iso"
    disc.write_bytes(b"disc" * (1 << 18))
    with exporting(target, "--all") as service:
        before, descriptors = nvmet.names(target), (0, 0)
        wait_line(service, "Not exporting '/dev/sr0': No medium found")
        for times in (1, 2):
            target.insert_medium("cdrom", disc)
            exported = "Exporting '/dev/sr0' \\(1.0 MB, .*, read-only\\)"
            wait_line(service, f"(?s)(^{exported}.*){{{times}}}")
            assert "sr0" in nvmet.exported(target)
            target.eject_medium("cdrom")
            wait_line(service, f"(?s)({exported}.*Not exporting '/dev/sr0': No medium found.*){{{times}}}")
            assert "no: No medium found" in target.run(f"{TOOL} --list-devices | grep sr0").stdout
            assert nvmet.names(target) == before
            if times == 1:
                target.wait_until(lambda: resources(service)[1] == 1)
                # By now what controls drivers is open, and stays so.
                descriptors = resources(service)
        target.wait_until(lambda: resources(service) == descriptors)
        assert [line for priority, line in service.journal() if priority < 6] == []
    assert left_over(target) == []


def test_cards_are_exported_once_they_are_inserted(target: Machine) -> None:
    """Cards that can be written are exported as soon as they are inserted, each under its own size.

    Also where the kernel was not told to look for media, as without udev.
    """
    poll = "/sys/module/block/parameters/events_dfl_poll_msecs"
    assert target.run(f"cat {poll}; echo 0 >{poll}").stdout == "2000\n"
    target.run("truncate -s 4M /run/first.card; truncate -s 6M /run/second.card")
    with exporting(target, "--all") as service:
        before = nvmet.exported(target)
        with card_reader(target) as reader:
            name = reader.node.removeprefix("/dev/")
            wait_line(service, f"Not exporting '{reader.node}': No medium found")
            for card, size in (("first", 4 << 20), ("second", 6 << 20)):
                reader.insert(f"/run/{card}.card")
                target.wait_until(lambda: nvmet.exported(target) == before | {name})
                assert target.run(f"blockdev --getsize64 {reader.node}").stdout == f"{size}\n"
                reader.eject()
                target.wait_until(lambda: nvmet.exported(target) == before)
            wait_line(
                service, f"(?s)4.2 MB.*No medium.*6.3 MB.*Not exporting '{reader.node}': No medium found"
            )
            assert [line for priority, line in service.journal() if priority < 6] == []
    assert left_over(target) == []
    target.run(f"echo 2000 >{poll}")


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_client_sees_a_disk_grow_and_shrink(
    target: Machine, client: Machine, tmp_path: Path, bus: Literal["virtio", "scsi"]
) -> None:
    """An attached client sees a disk grow and shrink, over the connection that it has."""
    path = tmp_path / "disk.raw"
    write_content(path, 2, SIZE)
    target.add_disk(Disk("elastic", path=path, serial="DISK-ELASTIC", bus=bus))
    try:
        name = wait_name(target, "DISK-ELASTIC")
        # Nothing of this may depend on udev, which puts off what happens to a disk that is locked.
        target.run("udevadm settle --timeout=120; pgrep -x systemd-udevd")
        with exporting(target, "--all") as service:
            nqn, port = where(nvmet.tree(target), f"/dev/{name}")
            with attached(client, nqn, port) as attachment:
                reader = Reader(client, attachment.node, 2, SIZE)
                reader.wait_progress()
                for size in (3 * SIZE, 2 * SIZE):
                    target.resize_disk("elastic", size)
                    if bus == "scsi":  # Its driver looks only when it is told to.
                        target.run(f"echo 1 >/sys/block/{name}/device/rescan")
                    client.wait_run(f"[ $(blockdev --getsize64 {attachment.node}) = {size} ]")
                    # Its udev looks at the end of the disk now, which had better stay there.
                    client.run("udevadm settle --timeout=120")
                reader.wait_progress()
                reader.stop()
                attachment.check()
            assert f"'/dev/{name}' has {2 * SIZE} bytes" in service.output
    finally:
        target.remove_disk("elastic", timeout=120)


def test_nobody_waits_for_a_disk_that_is_removed_in_use(target: Machine, client: Machine, held: str) -> None:
    """A disk is unplugged while a client reads it and its I/O hangs: nobody else waits for that."""
    target.add_disk(Disk("doomed", serial="DISK-DOOMED"))
    doomed = f"/dev/{wait_name(target, 'DISK-DOOMED')}"
    target.run("udevadm settle --timeout=120")
    with exporting(target, "--all") as service:
        tree = nvmet.tree(target)
        (nqn, port), (doomed_nqn, _) = where(tree, held), where(tree, doomed)
        settled, descriptors = uuids(target), resources(service)
        with attached(client, nqn, port) as attachment:
            reader = Reader(client, attachment.node, 1, SIZE)
            with attached(client, doomed_nqn, port) as victim:
                busy = hang(target, client, "doomed", Path(doomed).name, victim.node)
                target.qmp.call("device_del", id="doomed-device")
                # Linux 6.16 and later keep it in sysfs for as long as they wait for it.
                wait_line(service, f"^No longer: Exporting '{doomed}'")
            assert busy.wait() == 1  # the disk that it read is gone
            # While the kernel still waits for the disk (and locks what is in its part of configfs, so that
            # nothing here may look there), another one comes and goes.
            target.add_disk(Disk("other", serial="DISK-OTHER", bus="scsi"))
            other = wait_name(target, "DISK-OTHER")
            target.wait_until(lambda: other in nvmet.exported(target))
            target.remove_disk("other", timeout=120)
            target.wait_until(lambda: other not in nvmet.exported(target))
            reader.wait_progress()
            assert f"subsystems/{doomed_nqn}" in nvmet.names(target)
            throttle(target, "doomed", 0)
            target.qmp.wait_event("DEVICE_DELETED", 120, device="doomed-device")
            target.qmp.call("blockdev-del", node_name="doomed")
            target.wait_run(f"! [ -e {nvmet.NVMET}/subsystems/{doomed_nqn} ]")
            target.wait_until(lambda: resources(service)[1] == descriptors[1])
            reader.wait_progress()
            reader.stop()
            attachment.check()
        assert settled.keys() - uuids(target).keys() == {expected_uuid(target, "DISK-DOOMED")}
        # Its lock, and the claim on our device over it.
        assert resources(service) == (descriptors[0] - 2, descriptors[1])
        # On a computer that is busy, udev may keep a new disk for longer than it is waited for in silence.
        kept = re.compile(r"is not exported yet: process \d+ \(\(udev-worker\)\) holds its lock")
        assert [line for p, line in service.journal() if p < 6 and not kept.search(line)] == []
    assert left_over(target) == []


@pytest.mark.parametrize("mode", ["read-only", pytest.param("snapshot", marks=pytest.mark.reach)])
def test_stop_does_not_wait_while_io_hangs(target: Machine, client: Machine, mode: str) -> None:
    """The stop does not wait for a disk that is gone, and the next start sees to what is left of it."""
    target.add_disk(Disk("doomed", serial="DISK-DOOMED"))
    doomed = f"/dev/{wait_name(target, 'DISK-DOOMED')}"
    target.run("udevadm settle --timeout=120")
    service = Service(target, [f"--{mode}", doomed, "/dev/vdb"])
    before = service.start()
    nqn, port = where(nvmet.tree(target), doomed)
    with attached(client, nqn, port) as victim:
        busy = hang(target, client, "doomed", Path(doomed).name, victim.node)
        target.qmp.call("device_del", id="doomed-device")
        wait_line(service, f"^No longer: Exporting '{doomed}'")
    assert busy.wait() == 1  # the disk that it read is gone
    began = time.monotonic()
    stop = f"systemctl stop {service.unit}; systemctl is-failed {service.unit}"
    assert target.run(stop, timeout=60).stdout == "failed\n"
    took = time.monotonic() - began
    target.run(f"systemctl reset-failed {service.unit}")
    assert {n for n in nvmet.names(target) - before if n.startswith("subsystems/")} == {f"subsystems/{nqn}"}
    (error,) = [line for priority, line in service.journal() if priority < 6]
    assert f"{nqn}': the disk is gone, but its driver has not ended all I/O" in error
    # What is left does not keep the next one from its start.
    again = Service(target, ["/dev/vdb"])
    again.start()
    assert nvmet.exported(target) == {"vdb"}
    assert f"subsystems/{nqn}" in nvmet.names(target)
    throttle(target, "doomed", 0)
    target.qmp.wait_event("DEVICE_DELETED", 120, device="doomed-device")
    target.qmp.call("blockdev-del", node_name="doomed")
    target.wait_run(f"! [ -e {nvmet.NVMET}/subsystems/{nqn} ]")
    assert again.stop() == before
    assert left_over(target) == []
    print(f"The stop took {took:.1f} s.")


def test_locked_disk_is_waited_for_a_while(target: Machine, held: str) -> None:
    """All wait for a disk whose lock is held when the program starts, but only for a while."""
    name = held.removeprefix("/dev/")
    target.run("udevadm settle --timeout=120")
    lock = target.start_process(["flock", "--exclusive", held, "sleep", "1000"])
    target.wait_run(f"! flock --nonblock {held} true")
    service = Service(target, ["--all"])
    before = nvmet.names(target)
    starting = target.start_process(service.command)
    try:
        # A client that reconnects now finds the port closed, and tries again.
        wait_line(
            service, f"^Exporting nothing yet, waiting for '{held}' \\(another process holds its lock\\)"
        )
        early = nvmet.exported(target), starting.poll()
        assert starting.wait(120) == 0, service.output
        assert {"vdb", "sda", "nvme0n1"} <= nvmet.exported(target)
        assert name not in nvmet.exported(target)
        wait_line(service, f"^'{held}' is not exported yet: process [0-9]+ \\(.+\\) holds its lock")
        status = service.show("StatusText")
        times = [int(service.show(f"{t}TimestampMonotonic")) for t in ("ExecMainStart", "ActiveEnter")]
        lock.kill(group=True)
        target.wait_until(lambda: name in nvmet.exported(target))
        wait_line(service, f"^Exporting '{held}'")
        warnings = [line for priority, line in service.journal() if priority < 6]
    finally:
        lock.kill(group=True)
        after = service.stop()
    assert early == (set(), None)
    assert ", 1 waiting" in status
    assert len(warnings) == 1
    assert after == before
    assert left_over(target) == []
    print(f"READY=1 came {(times[1] - times[0]) / 1e6:.1f} s after the start.")


@pytest.fixture
def without_udev(target: Machine) -> Iterator[None]:
    """Nothing in the target but the kernel tells of disks."""
    units = "systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-udevd.service"
    target.run(f"udevadm settle --timeout=120; systemctl stop {units}; rm -rf /run/udev/control")
    target.run("mv /run/udev/data /run/udev/data.away")
    try:
        yield
    finally:
        target.run(f"mv /run/udev/data.away /run/udev/data; systemctl start {units}; udevadm control --ping")
        target.run("udevadm trigger --settle --subsystem-match=block --action=change")


@pytest.mark.usefixtures("without_udev")
def test_disks_are_followed_without_udev(target: Machine, client: Machine) -> None:
    """The kernel's own uevents and sysfs do, and what is lost when there are too many is looked up."""
    with exporting(target, "--all", environment={"SYSTEMD_LOG_LEVEL": "debug"}) as service:
        tree = nvmet.tree(target)
        assert {"vdb", "sda", "nvme0n1"} <= nvmet.exported(target)
        for node, serial in (("/dev/sda", "DISK-SCSI"), ("/dev/nvme0n1", "DISK-NVME")):
            nqn, _ = where(tree, node)
            assert tree[f"subsystems/{nqn}/attr_serial"].rstrip() == serial
        assert expected_uuid(target, "DISK-ALPHA") in uuids(target)
        settled, descriptors = uuids(target), resources(service)

        disks = [Disk(f"bare-{bus}", serial=f"BARE-{bus}", bus=bus) for bus in ("virtio", "scsi")]
        for disk in disks:
            target.add_disk(disk)
        target.wait_until(lambda: len(uuids(target)) == len(settled) + 2)
        assert expected_uuid(target, "BARE-virtio") in uuids(target)
        node = f"/dev/{names_of(target, 'BARE-virtio')['BARE-virtio']}"
        nqn, port = where(nvmet.tree(target), node)
        with attached(client, nqn, port) as attachment:
            target.resize_disk("bare-virtio", 96 << 20)
            client.wait_run(f"[ $(blockdev --getsize64 {attachment.node}) = {96 << 20} ]")
            attachment.check()

        # While the tool stands still, more comes in than the socket takes, then a disk comes and one goes.
        service.kill("STOP")
        target.run(["python3", "-c", FLOOD_SCRIPT, "/sys/block/vdb/uevent", str(service.pid)], timeout=300)
        target.add_disk(Disk("late", serial="BARE-late"))
        remove_disks(target, ["bare-virtio"])
        wait_name(target, "BARE-late")
        service.kill("CONT")
        target.wait_until(lambda: expected_uuid(target, "BARE-late") in uuids(target))
        target.wait_until(lambda: expected_uuid(target, "BARE-virtio") not in uuids(target))
        assert len(uuids(target)) == len(settled) + 2
        wait_line(service, "^Uevents were lost, reading all disks again")

        remove_disks(target, ["bare-scsi", "late"])
        target.wait_until(lambda: uuids(target) == settled)
        target.wait_until(lambda: resources(service) == descriptors)
    assert left_over(target) == []
