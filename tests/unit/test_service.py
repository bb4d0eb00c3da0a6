# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service on a captured machine: what it exports, when it is ready, what it does about failures."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storagetm
from tests.unit.conftest import CapturedMachine
from tests.unit.nvmet import Nvmet

PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
ALL = ["nvme0n1", "sda", "sdb", "sdc", "vdb", "vdc", "vdd", "vde"]


class Manager:
    """The service manager's end of $NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def told(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(1000).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    yield made
    made.socket.close()


@pytest.fixture
def machine(unpack: Callable[[str], CapturedMachine]) -> CapturedMachine:
    return unpack("trixie-fresh")


@pytest.fixture
def nvmet(machine: CapturedMachine, monkeypatch: pytest.MonkeyPatch) -> Nvmet:
    return Nvmet(machine.path("/sys/kernel/config"), monkeypatch)


class Run:
    """One start of the service, without its loop."""

    def __init__(self, *paths: str) -> None:
        made = storagetm.Machine()
        inventory = storagetm.Inventory(paths, not paths, False)
        self.service = storagetm.Service(made, storagetm.NvmeTcp(made), inventory)
        self.service.view.beside_plymouth = False  # that of this computer
        if paths:
            inventory.check_named()
        self.service.ledger.lock()
        self.service.tree.adopt()
        self.service.transport.choose_ports(self.service.tree.live)
        if not paths:
            inventory.rescan()

    @property
    def exported(self) -> list[str]:
        return sorted(d.name for d in self.service.inventory.disks.values() if d.branch)

    def disk(self, name: str) -> storagetm.Disk:
        return self.service.inventory.disks[name]

    def kill(self) -> None:
        """What remains of a process that was killed: nothing but what is in the kernel."""
        for disk in self.service.inventory.disks.values():
            disk.close()
        self.service.ledger.close()


@pytest.fixture
def start(machine: CapturedMachine, nvmet: Nvmet) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []
    assert machine.path("/sys/block").is_dir()
    assert nvmet.path("nvmet").is_dir()

    def begin(*paths: str) -> Run:
        runs.append(Run(*paths))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


Start = Callable[..., Run]


def subsystems(nvmet: Nvmet) -> list[str]:
    return sorted(p.name[len(PREFIX) + 1 :] for p in nvmet.path("nvmet/subsystems").iterdir())


# From start to stop


def test_all_disks(start: Start, nvmet: Nvmet, manager: Manager) -> None:
    run = start()
    before = nvmet.contents()
    run.service.synchronise(strict=True)
    assert run.exported == subsystems(nvmet) == ALL
    assert sorted(p.name for p in nvmet.path("nvmet/ports").iterdir()) == ["36681", "59936"]
    assert manager.told() == ["READY=1"]
    for disk in run.service.inventory.candidates():
        assert disk.fd >= 0
    run.service.synchronise()
    assert manager.told() == []
    assert run.service.stop()
    assert manager.told() == ["STOPPING=1"]
    assert nvmet.contents() == before
    assert not os.path.exists(run.service.ledger.path)
    assert all(d.fd < 0 for d in run.service.inventory.disks.values())


def test_named_disk(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdc")
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == ["vdc"]


def test_second_instance(start: Start) -> None:
    start()
    with pytest.raises(storagetm.UserError, match=f"process {os.getpid()}; stop it or give another --nqn"):
        start()


def test_lost_changes(
    start: Start, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without what its clients had changed, a disk is another one to them: it is no longer exported."""
    run = start("/dev/vdb", "/dev/vdc")
    run.service.synchronise(strict=True)
    branch = run.disk("vdb").branch
    assert branch
    branch.entries.append(storagetm.Mapping("dm/storagetm-vdb-1", "snapshot"))
    branch.kinds.add(storagetm.Mapping)
    memory = run.service.memory
    memory.filled = {"storagetm-vdb-1": (0, 1, "")}

    def share(*_: object) -> None:
        memory.filled, memory.lost = {}, {"storagetm-vdb-1"}

    monkeypatch.setattr(memory, "share", share)
    monkeypatch.setattr(storagetm, "dm_status", lambda _: None)
    run.service.share_memory()
    assert run.service.outdated
    memory.lost = set()
    monkeypatch.setattr(memory, "share", lambda *_: None)
    run.service.synchronise()
    assert subsystems(nvmet) == ["vdc"]
    why = "what clients had changed is lost; start storagetm again to export it without that"
    assert capfd.readouterr().err == f"'/dev/vdb' is no longer exported: {why}\n"
    assert run.disk("vdb").status() == why


# Waiting


def test_lock_of_one_disk_delays_no_other(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, manager: Manager, capfd: pytest.CaptureFixture[str]
) -> None:
    run = start()
    with machine.path("open-254:16").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_SH)
        run.service.synchronise(strict=True)
        assert subsystems(nvmet) == [n for n in ALL if n != "vdb"]
        assert [d.name for d in run.service.pending()] == ["vdb"]
        assert manager.told() == []
        # 10 s later
        run.service.started -= storagetm.LOCK_WAIT_SEC + 1
        run.disk("vdb").waiting_since -= storagetm.LOCK_WAIT_SEC + 1
        capfd.readouterr()
        run.service.synchronise()
        run.service.synchronise()
        assert manager.told() == ["READY=1"]
        assert capfd.readouterr().err == (
            "'/dev/vdb' is not exported yet: another process holds its lock; it will be as soon as that is "
            "released\n"
        )
    run.service.synchronise()
    assert subsystems(nvmet) == ALL
    assert run.service.pending() == []
    assert manager.told() == []


def test_udev_is_waited_for(start: Start, nvmet: Nvmet, machine: CapturedMachine, manager: Manager) -> None:
    entry = machine.path("/run/udev/data/b254:16")
    content = entry.read_bytes()
    entry.unlink()
    run = start()
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == [n for n in ALL if n != "vdb"]
    assert run.disk("vdb").fd < 0
    assert manager.told() == []
    entry.write_bytes(content)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert subsystems(nvmet) == ALL
    assert manager.told() == ["READY=1"]


def test_udev_is_not_waited_for_for_ever(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    machine.path("/run/udev/data/b254:16").unlink()
    run = start()
    run.service.synchronise(strict=True)
    run.disk("vdb").waiting_since -= storagetm.UDEV_WAIT_SEC + 1
    run.service.synchronise()
    assert subsystems(nvmet) == ALL


# Hot-plug


def test_disk_goes(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    run = start()
    run.service.synchronise(strict=True)
    for path in ("/sys/class/block/vdb", "/sys/block/vdb"):
        machine.path(path).unlink()
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert subsystems(nvmet) == [n for n in ALL if n != "vdb"]


def test_another_disk_takes_its_place(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """It is exported as itself, not as what udev's database says of the one before it for a while."""
    run = start()
    run.service.synchronise(strict=True)
    uevent = machine.path("/sys/class/block/vdb/uevent")
    uevent.write_text(uevent.read_text().replace("DISKSEQ=2\n", "DISKSEQ=77\n"))
    before = len(nvmet.calls)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert f"rmdir nvmet/subsystems/{PREFIX}.vdb" in nvmet.calls[before:]
    assert subsystems(nvmet) == [n for n in ALL if n != "vdb"]
    assert run.disk("vdb").waiting == "udev is not done with it"

    entry = machine.path("/run/udev/data/b254:16")
    entry.write_text(entry.read_text().replace("by-diskseq/2\n", "by-diskseq/77\nE:ID_MODEL=Other\n"))
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert f"mkdir nvmet/subsystems/{PREFIX}.vdb" in nvmet.calls[before:]
    assert subsystems(nvmet) == ALL
    assert run.disk("vdb").fd >= 0
    assert run.disk("vdb").model == "Other"


def test_another_disk_waits_for_its_place(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """The removal of the one before it hangs, and ends just while something else is being taken away."""
    run = start()
    run.service.synchronise(strict=True)
    release, released = threading.Event(), threading.Event()

    def intercept(number: int) -> None:
        if nvmet.calls[number] == f"rmdir nvmet/subsystems/{PREFIX}.vdb/namespaces/1":
            assert release.wait(60)
        elif nvmet.calls[number] == f"rmdir nvmet/subsystems/{PREFIX}.vdc" and not release.is_set():
            release.set()
            assert released.wait(60)

    def wake() -> None:
        if release.is_set():
            released.set()

    nvmet.intercept, run.service.tree.wake = intercept, wake
    uevent, entry = machine.path("/sys/class/block/vdb/uevent"), machine.path("/run/udev/data/b254:16")
    uevent.write_text(uevent.read_text().replace("DISKSEQ=2\n", "DISKSEQ=77\n"))
    entry.write_text(entry.read_text().replace("by-diskseq/2\n", "by-diskseq/77\n"))
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert run.service.tree.leaving == {run.service.transport.root(run.disk("vdb"))}
    assert "vdb" not in run.exported
    assert run.disk("vdb").status() == "the kernel is still taking away what was there before it"
    assert run.service.pending() == []

    for path in ("/sys/class/block/vdc", "/sys/block/vdc"):
        machine.path(path).unlink()
    run.service.inventory.update(["vdc"])
    run.service.synchronise()
    assert released.is_set()
    assert "vdb" in run.exported
    assert run.disk("vdb").status() == ""


def test_disk_grows(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    run = start()
    run.service.synchronise(strict=True)
    machine.attribute("vdb", "size", "999999")
    before = len(nvmet.calls)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert nvmet.calls[before:] == [
        f"write nvmet/subsystems/{PREFIX}.vdb/namespaces/1/revalidate_size 1",
    ]


def test_exported_disk_keeps_its_identity(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """Also if udev's database goes: its clients would lose the disk."""
    run = start()
    run.service.synchronise(strict=True)
    machine.path("/run/udev/data/b8:0").unlink()
    before = len(nvmet.calls)
    run.service.inventory.update(["sda"])
    run.service.synchronise()
    assert nvmet.calls[before:] == []


# Failures


def failing(nvmet: Nvmet, part: str, code: int) -> None:
    """Has all system calls fail that have this in them."""

    def intercept(number: int) -> None:
        if part in nvmet.calls[number]:
            raise OSError(code, os.strerror(code))

    nvmet.intercept = intercept


def test_disk_that_fails(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is reported once, leaves nothing behind, and is tried again when something about it changes."""
    run = start()
    failing(nvmet, ".vdb/namespaces/1/enable", errno.EIO)
    capfd.readouterr()
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == [n for n in ALL if n != "vdb"]
    reason = f"Input/output error ('nvmet/subsystems/{PREFIX}.vdb/namespaces/1/enable')"
    assert capfd.readouterr().err == f"Failed to export '/dev/vdb': {reason}\n"
    assert run.disk("vdb").fd < 0
    assert run.disk("vdb").status() == reason

    before = len(nvmet.calls)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert nvmet.calls[before:] == []

    machine.attribute("vdb", "size", "4096")
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert capfd.readouterr().err == ""
    assert len(nvmet.calls) > before

    nvmet.succeed()
    machine.attribute("vdb", "size", "8192")
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert subsystems(nvmet) == ALL
    assert run.disk("vdb").status() == ""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EACCES, "Permission denied; it may be write-protected"),
        (errno.ENOMEDIUM, "No medium found; insert one and it will be exported"),
        (errno.ENXIO, "No medium found; insert one and it will be exported"),
    ],
)
def test_reasons(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str], code: int, reason: str
) -> None:
    run = start()
    failing(nvmet, ".vdb/namespaces/1/enable", code)
    capfd.readouterr()
    run.service.synchronise(strict=True)
    assert capfd.readouterr().err == f"Failed to export '/dev/vdb': {reason}\n"


def test_named_disk_that_fails(start: Start, nvmet: Nvmet) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc")
    failing(nvmet, ".vdc/namespaces/1/enable", errno.EACCES)
    with pytest.raises(storagetm.UserError) as caught:
        run.service.synchronise(strict=True)
    assert str(caught.value) == "Failed to export '/dev/vdc': Permission denied; it may be write-protected"
    assert run.service.stop()
    assert nvmet.contents() == before


def test_name_is_taken(start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]) -> None:
    path = nvmet.path(f"nvmet/subsystems/{PREFIX}.vdb")
    os.mkdir(path)
    inode = path.stat().st_ino
    run = start()
    run.service.synchronise(strict=True)
    assert (
        f"Failed to export '/dev/vdb': another program made '{PREFIX}.vdb'; stop it, or give another --nqn\n"
        in capfd.readouterr().err
    )
    assert run.service.stop()
    assert path.stat().st_ino == inode


def test_port_is_taken_by_a_program(start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]) -> None:
    run = start()
    failing(nvmet, "symlink nvmet/ports/59936/", errno.EADDRINUSE)
    run.service.synchronise(strict=True)
    numbers = {int(p.name) for p in nvmet.path("nvmet/ports").iterdir()}
    assert len(numbers) == 2
    assert 36681 in numbers
    assert 59936 not in numbers
    assert run.exported == ALL
    assert "Port 59936 is taken, using" in capfd.readouterr().err
    for number in numbers:
        assert len(list(nvmet.path(f"nvmet/ports/{number}/subsystems").iterdir())) == len(ALL)


def test_port_is_taken_by_an_entry(start: Start, nvmet: Nvmet) -> None:
    os.mkdir(nvmet.path("nvmet/ports/36681"))
    run = start()
    run.service.synchronise(strict=True)
    assert run.exported == ALL
    assert len(list(nvmet.path("nvmet/ports").iterdir())) == 3
    assert run.service.stop()
    assert [p.name for p in nvmet.path("nvmet/ports").iterdir()] == ["36681"]


def test_ipv6_turns_out_to_be_off(start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]) -> None:
    run = start()
    failing(nvmet, "symlink nvmet/ports/36681/", errno.EADDRNOTAVAIL)
    run.service.synchronise(strict=True)
    assert run.exported == ALL
    assert [p.name for p in nvmet.path("nvmet/ports").iterdir()] == ["59936"]
    assert "IPv6 is off, exporting without it" in capfd.readouterr().out


def test_no_port_at_all(start: Start, nvmet: Nvmet) -> None:
    """All disks would fail in the same way, so that ends the start."""
    run = start()
    failing(nvmet, "symlink nvmet/ports/", errno.EADDRINUSE)
    with pytest.raises(storagetm.UserError, match="Address already in use"):
        run.service.synchronise(strict=True)
    nvmet.succeed()
    assert run.service.stop()
    assert list(nvmet.path("nvmet/subsystems").iterdir()) == []


def test_disk_that_does_not_go(start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]) -> None:
    run = start()
    run.service.synchronise(strict=True)
    failing(nvmet, f"rmdir nvmet/subsystems/{PREFIX}.vdb", errno.EBUSY)
    capfd.readouterr()
    assert not run.service.stop()
    assert subsystems(nvmet) == ["vdb"]
    assert capfd.readouterr().err == (
        f"Failed to remove '{storagetm.CONFIGFS}nvmet/subsystems/{PREFIX}.vdb': Device or resource busy; "
        "remove what is below it\n"
    )
    # The next run knows it.
    nvmet.succeed()
    again = start()
    assert again.service.stop()
    assert subsystems(nvmet) == []


# Restart


def test_restart_while_udev_looks_at_the_disks(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """What is exported stays so while the lock that died with the first run is in others' hands."""
    first = start()
    first.service.synchronise(strict=True)
    first.kill()
    before = len(nvmet.calls)
    with machine.path("open-254:16").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_SH)
        second = start()
        second.service.synchronise(strict=True)
        assert [d.name for d in second.service.pending()] == ["vdb"]
    second.service.synchronise()
    assert second.disk("vdb").fd >= 0
    assert {c.split()[0] for c in nvmet.calls[before:]} == {"write"}
    assert all("revalidate_size" in c for c in nvmet.calls[before:])


def test_restart_with_other_ports(start: Start, nvmet: Nvmet) -> None:
    """Those of the first run are kept, or all clients would lose their connections."""
    os.mkdir(nvmet.path("nvmet/ports/59936"))
    first = start()
    first.service.synchronise(strict=True)
    ports = dict(first.service.transport.ports)
    first.kill()
    os.rmdir(nvmet.path("nvmet/ports/59936"))
    second = start()
    assert second.service.transport.ports == ports


def test_restart_without_a_disk_that_is_gone(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    first = start()
    first.service.synchronise(strict=True)
    first.kill()
    for path in ("/sys/class/block/vdb", "/sys/block/vdb"):
        machine.path(path).unlink()
    second = start()
    second.service.synchronise(strict=True)
    assert subsystems(nvmet) == [n for n in ALL if n != "vdb"]


# What it tells


def test_status_is_told_when_it_changes(start: Start, manager: Manager) -> None:
    run = start()
    run.service.synchronise(strict=True)
    run.service.show()
    run.service.show()
    assert manager.told() == [
        "READY=1",
        "STATUS=Exporting 8 disks (8 read-write) at no address (the network is down).",
    ]
    run.service.addresses = [storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", False)]
    run.service.show()
    assert manager.told() == ["STATUS=Exporting 8 disks (8 read-write) at 1 address."]


def test_first_signal_stops_and_the_second_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run.service.on_signal(15, None)
    assert run.service.stop_asked
    assert codes == []
    run.service.stopping = True
    run.service.on_signal(15, None)
    assert codes == [1]
