# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service on a captured machine: what it exports, when it is ready, what it does about failures."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storagetm
from storagetm import READ_ONLY, READ_WRITE, SNAPSHOT
from tests.unit.configfs import Nvmet, is_courtesy
from tests.unit.conftest import CapturedMachine

PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
WRITABLE = ["nvme0n1", "sda", "sdb", "sdc", "vdb", "vdc", "vdd", "vde"]
PASSAGE = "nvmet/ports/46946"


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


@pytest.fixture(params=storagetm.ACCESS)
def access(request: pytest.FixtureRequest) -> str:
    """What clients may do to all disks."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def disks(access: str) -> list[str]:
    """The disks that are exported: write-protected ones only where clients do not write to them."""
    return WRITABLE if access == READ_WRITE else sorted([*WRITABLE, "sr0", "vdf"])


class Run:
    """One start of the service, without its loop."""

    def __init__(self, *paths: str, access: str) -> None:
        made = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", made.id)
        stays.kept = True
        source = storagetm.NamedDisks(paths) if paths else storagetm.BlockDevices()
        inventory = storagetm.Inventory([source], storagetm.Access((), access), stays)
        self.transport = storagetm.NvmeTcp(made)
        exporter = storagetm.Exporter(self.transport.prefix, [self.transport], inventory)
        self.service = storagetm.Service(made, exporter)
        if paths:
            inventory.check_named()
        self.service.exporter.ledger.lock()
        self.service.exporter.tree.adopt()
        self.transport.adopt(self.service.exporter.tree.live)
        if not paths:
            inventory.rescan()

    @property
    def exported(self) -> list[str]:
        return sorted(e.disk.name for e in self.service.inventory.exports.values() if e.live)

    def disk(self, name: str) -> storagetm.Export:
        return self.service.inventory.exports[name]

    def namespace(self, name: str) -> str:
        """Where the disk's namespace is in configfs, or will be."""
        self.service.inventory.begin_stays([self.disk(name)])
        transport = self.transport
        return f"{transport.root(self.disk(name))}/namespaces/{transport.number(self.disk(name))}"

    def kill(self) -> None:
        """What remains of a process that was killed: nothing but what is in the kernel."""
        for export in self.service.inventory.exports.values():
            export.release()
        self.service.exporter.ledger.close()


@pytest.fixture
def start(machine: CapturedMachine, nvmet: Nvmet, access: str) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []
    assert machine.path("/sys/block").is_dir()
    assert nvmet.path("nvmet").is_dir()

    def begin(*paths: str) -> Run:
        runs.append(Run(*paths, access=access))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


Start = Callable[..., Run]


def without_courtesy(calls: list[str]) -> list[str]:
    return [call for call in calls if not is_courtesy(call, PASSAGE)]


def seen(contents: dict[str, str]) -> dict[str, str]:
    """What clients can tell of it: not which device stands between a disk and its namespace."""
    return {
        path: text
        for path, text in contents.items()
        if not path.startswith("dm/") and not (path.endswith("/device_path") and "/mapper/" in text)
    }


def mapped(nvmet: Nvmet) -> list[str]:
    """The disks over which there is a device of ours."""
    found = [re.fullmatch(r"dm/storagetm-(\w+)-\w+", path) for path in nvmet.contents()]
    return sorted(match[1] for match in found if match)


def subsystems(nvmet: Nvmet) -> list[str]:
    return sorted(p.name[len(PREFIX) + 1 :] for p in nvmet.path("nvmet/subsystems").iterdir())


# From start to stop


def test_all_disks_are_exported(
    start: Start, nvmet: Nvmet, manager: Manager, disks: list[str], access: str
) -> None:
    run = start()
    before = nvmet.contents()
    run.service.synchronise(strict=True)
    assert run.exported == subsystems(nvmet) == disks
    assert sorted(p.name for p in nvmet.path("nvmet/ports").iterdir()) == ["36681", "59936"]
    assert mapped(nvmet) == [name for name in disks if access != READ_WRITE]
    protected = [path for path in nvmet.contents() if path.endswith("/write_protected")]
    assert len(protected) == (len(disks) if access == READ_ONLY else 0)
    assert manager.told() == ["READY=1"]
    for disk in run.service.inventory.candidates():
        assert disk.fd >= 0
    run.service.synchronise()
    assert manager.told() == []
    assert run.service.stop()
    assert manager.told() == ["STOPPING=1"]
    assert nvmet.contents() == before
    assert not os.path.exists(run.service.exporter.ledger.path)
    assert all(d.fd < 0 for d in run.service.inventory.exports.values())


def test_only_the_named_disk_is_exported(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdc")
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == ["vdc"]


def test_second_instance_is_refused(start: Start) -> None:
    start()
    with pytest.raises(storagetm.UserError, match=f"process {os.getpid()}; stop it or give another --nqn"):
        start()


def test_disk_that_lost_changes_is_no_longer_exported(
    start: Start, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without what its clients had changed, a disk is another one to them: it is no longer exported."""
    run = start("/dev/vdb", "/dev/vdc")
    run.service.synchronise(strict=True)
    run.disk("vdb").backing = storagetm.Branch("", [storagetm.Mapping("dm/storagetm-vdb-1", "snapshot")])
    memory = run.service.exporter.memory
    memory.filled = {"storagetm-vdb-1": (0, 1, "")}

    def share(*_: object) -> None:
        memory.filled, memory.lost = {}, {"storagetm-vdb-1"}

    monkeypatch.setattr(memory, "share", share)
    monkeypatch.setattr(storagetm, "dm_status", lambda _: None)
    run.service.exporter.share_memory()
    assert run.service.exporter.outdated
    memory.lost = set()
    monkeypatch.setattr(memory, "share", lambda *_: None)
    run.service.synchronise()
    assert subsystems(nvmet) == ["vdc"]
    why = "what clients had changed is lost; start storagetm again to export it without that"
    assert capfd.readouterr().err == f"'/dev/vdb' is no longer exported: {why}\n"
    assert run.disk("vdb").why_not == why


# Waiting


def later(run: Run, seconds: float) -> None:
    """Lets time pass."""
    run.service.exporter.started -= seconds
    for disk in run.service.inventory.exports.values():
        if disk.waiting_since:
            disk.waiting_since -= seconds


def test_start_waits_for_a_lock_for_a_while(
    start: Start,
    nvmet: Nvmet,
    machine: CapturedMachine,
    manager: Manager,
    capfd: pytest.CaptureFixture[str],
    disks: list[str],
) -> None:
    """Whoever connects before a disk is there loses it, so that nothing is made until then."""
    run = start()
    with machine.path("open-254:16").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_SH)
        run.service.synchronise(strict=True)
        assert nvmet.calls == []
        assert [e.disk.name for e in run.service.exporter.pending()] == ["vdb"]
        assert manager.told() == []
        run.service.display.act()
        assert "Exporting nothing yet, waiting for '/dev/vdb' (another process holds its lock)\n" in (
            capfd.readouterr().out
        )
        later(run, storagetm.LOCK_WAIT_SEC + 1)
        capfd.readouterr()
        run.service.synchronise()
        assert subsystems(nvmet) == [n for n in disks if n != "vdb"]
        run.service.synchronise()
        assert manager.told() == [
            "STATUS=Exporting 0 disks at no address (the network is down), 1 waiting.",
            "READY=1",
        ]
        assert capfd.readouterr().err == (
            "'/dev/vdb' is not exported yet: another process holds its lock; it will be as soon as that is "
            "released\n"
        )
    run.service.synchronise()
    assert subsystems(nvmet) == disks
    assert run.service.exporter.pending() == []
    assert manager.told() == []


def test_lock_of_a_later_disk_delays_no_other(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    run = start()
    run.service.synchronise(strict=True)
    uevent = machine.path("/sys/class/block/vdb/uevent")
    uevent.write_text(uevent.read_text().replace("DISKSEQ=2\n", "DISKSEQ=77\n"))
    entry = machine.path("/run/udev/data/b254:16")
    entry.write_text(entry.read_text().replace("by-diskseq/2\n", "by-diskseq/77\n"))
    with machine.path("open-254:16").open("w") as holder:
        run.disk("vdb").release()
        fcntl.flock(holder, fcntl.LOCK_SH)
        run.service.inventory.update(["vdb"])
        run.service.synchronise()
        assert subsystems(nvmet) == [n for n in disks if n != "vdb"]
    run.service.synchronise()
    assert subsystems(nvmet) == disks


def test_udev_is_waited_for(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, manager: Manager, disks: list[str]
) -> None:
    entry = machine.path("/run/udev/data/b254:16")
    content = entry.read_bytes()
    entry.unlink()
    run = start()
    run.service.synchronise(strict=True)
    assert nvmet.calls == []
    assert run.disk("vdb").fd < 0
    assert manager.told() == []
    entry.write_bytes(content)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert subsystems(nvmet) == disks
    assert manager.told() == ["READY=1"]


def test_udev_is_not_waited_for_for_ever(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    machine.path("/run/udev/data/b254:16").unlink()
    run = start()
    run.service.synchronise(strict=True)
    assert nvmet.calls == []
    later(run, storagetm.START_WAIT_SEC + 1)
    run.service.synchronise()
    assert subsystems(nvmet) == [n for n in disks if n != "vdb"]
    later(run, storagetm.UDEV_WAIT_SEC - storagetm.START_WAIT_SEC)
    run.service.synchronise()
    assert subsystems(nvmet) == disks


def unplug(machine: CapturedMachine, name: str) -> Callable[[str], None]:
    """Takes a disk away. What is returned plugs it in again, with another sequence number."""
    links = {
        path: os.readlink(machine.path(path)) for path in (f"/sys/class/block/{name}", f"/sys/block/{name}")
    }
    for path in links:
        machine.path(path).unlink()

    def plug(sequence: str) -> None:
        for path, target in links.items():
            machine.path(path).symlink_to(target)
        uevent = machine.path(f"/sys/class/block/{name}/uevent")
        before = uevent.read_text().partition("DISKSEQ=")[2].partition("\n")[0]
        uevent.write_text(uevent.read_text().replace(f"DISKSEQ={before}\n", f"DISKSEQ={sequence}\n"))
        number = (machine.path(f"/sys/class/block/{name}") / "dev").read_text().strip()
        entry = machine.path(f"/run/udev/data/b{number}")
        entry.write_text(entry.read_text().replace(f"by-diskseq/{before}\n", f"by-diskseq/{sequence}\n"))

    return plug


def test_start_waits_for_disks_of_the_run_before(
    start: Start, nvmet: Nvmet, machine: CapturedMachine
) -> None:
    """One that returns to its slot with its serial number is the same to clients that wait for it."""
    first = start()
    first.service.synchronise(strict=True)
    before, over = nvmet.contents(), mapped(nvmet)
    assert first.service.stop()
    plug = unplug(machine, "sda")
    second = start()
    steps = len(nvmet.calls)
    second.service.synchronise(strict=True)
    assert nvmet.calls[steps:] == []
    assert second.service.exporter.awaited == ["'/dev/sda' (exported until the last stop)"]
    plug("4711")
    second.service.inventory.update(["sda"])
    second.service.synchronise()
    assert seen(nvmet.contents()) == seen(before)
    assert mapped(nvmet) == over
    # It is awaited once.
    assert second.service.stop()
    unplug(machine, "sda")
    third = start()
    third.service.synchronise(strict=True)
    later(third, storagetm.RETURN_WAIT_SEC + 1)
    third.service.synchronise()
    assert "sda" not in subsystems(nvmet)
    third.kill()
    fourth = start()
    fourth.service.synchronise(strict=True)
    assert fourth.service.exporter.awaited == []


def test_disk_that_is_not_named_this_time_is_not_waited_for(start: Start, nvmet: Nvmet) -> None:
    """Those that are named are all here, or there is no start."""
    run = start("/dev/vdb", "/dev/vdc")
    run.service.synchronise(strict=True)
    assert run.service.stop()
    run = start("/dev/vdb")
    run.service.synchronise(strict=True)
    assert run.service.exporter.awaited == []
    assert subsystems(nvmet) == ["vdb"]


def test_another_disk_in_the_slot_is_not_the_awaited_one(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    """It was there before the program, or says who it is: what waits for the old one never reaches it."""
    run = start()
    run.service.synchronise(strict=True)
    before = nvmet.contents()
    assert run.service.stop()
    unplug(machine, "sda")("4711")
    plug = unplug(machine, "sdb")
    run = start()
    run.service.synchronise(strict=True)
    # What has another disk in its slot already cannot return.
    assert run.service.exporter.awaited == ["'/dev/sdb' (exported until the last stop)"]
    plug("4712")
    entry = machine.path("/run/udev/data/b8:16")
    entry.write_text(entry.read_text().replace("E:ID_SERIAL=", "E:ID_SERIAL=X"))
    run.service.inventory.update(["sdb"])
    later(run, storagetm.RETURN_WAIT_SEC + 1)
    run.service.synchronise()
    assert subsystems(nvmet) == disks
    after = nvmet.contents()
    changed = seen(before).keys() - seen(after).keys()
    gone = {path.split("/")[2].rpartition(".")[2] for path in changed}
    assert gone == {"sda", "sdb"}


def test_nothing_listens_before_all_can_be_linked(start: Start, nvmet: Nvmet, disks: list[str]) -> None:
    run = start()
    run.service.synchronise(strict=True)
    kinds = [call.split()[0] for call in without_courtesy(nvmet.calls)]
    assert kinds[-2 * len(disks) :] == ["symlink"] * 2 * len(disks)
    assert "symlink" not in kinds[: -2 * len(disks)]


# Hot-plug


def test_export_goes_with_its_disk(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    run = start()
    run.service.synchronise(strict=True)
    for path in ("/sys/class/block/vdb", "/sys/block/vdb"):
        machine.path(path).unlink()
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert subsystems(nvmet) == [n for n in disks if n != "vdb"]


def test_another_disk_in_its_place_is_exported_as_itself(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    """It is exported as itself, not as what udev's database says of the one before it for a while."""
    run = start()
    run.service.synchronise(strict=True)
    uevent = machine.path("/sys/class/block/vdb/uevent")
    uevent.write_text(uevent.read_text().replace("DISKSEQ=2\n", "DISKSEQ=77\n"))
    before = len(nvmet.calls)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert f"rmdir nvmet/subsystems/{PREFIX}.vdb" in nvmet.calls[before:]
    assert subsystems(nvmet) == [n for n in disks if n != "vdb"]
    assert run.disk("vdb").waiting == "udev is not done with it"

    entry = machine.path("/run/udev/data/b254:16")
    entry.write_text(entry.read_text().replace("by-diskseq/2\n", "by-diskseq/77\nE:ID_MODEL=Other\n"))
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert f"mkdir nvmet/subsystems/{PREFIX}.vdb" in nvmet.calls[before:]
    assert subsystems(nvmet) == disks
    assert run.disk("vdb").fd >= 0
    assert run.disk("vdb").disk.model == "Other"


def test_another_disk_waits_for_its_place(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """The removal of the one before it hangs, and ends just while something else is being taken away."""
    run = start()
    run.service.synchronise(strict=True)
    release, released = threading.Event(), threading.Event()
    namespace = run.namespace("vdb")

    def intercept(number: int) -> None:
        if nvmet.calls[number] == f"rmdir {namespace}":
            assert release.wait(60)
        elif nvmet.calls[number] == f"rmdir nvmet/subsystems/{PREFIX}.vdc" and not release.is_set():
            release.set()
            assert released.wait(60)

    def wake() -> None:
        if release.is_set():
            released.set()

    nvmet.intercept, run.service.exporter.tree.wake = intercept, wake
    uevent, entry = machine.path("/sys/class/block/vdb/uevent"), machine.path("/run/udev/data/b254:16")
    uevent.write_text(uevent.read_text().replace("DISKSEQ=2\n", "DISKSEQ=77\n"))
    entry.write_text(entry.read_text().replace("by-diskseq/2\n", "by-diskseq/77\n"))
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert run.service.exporter.tree.leaving == {run.transport.root(run.disk("vdb"))}
    assert "vdb" not in run.exported
    assert run.disk("vdb").why_not == "the kernel is still taking away what was there before it"
    assert run.service.exporter.pending() == []

    for path in ("/sys/class/block/vdc", "/sys/block/vdc"):
        machine.path(path).unlink()
    run.service.inventory.update(["vdc"])
    run.service.synchronise()
    assert released.is_set()
    assert "vdb" in run.exported
    assert run.disk("vdb").why_not == ""


def owe(machine: CapturedMachine, name: str, inflight: str) -> None:
    """Sets what I/O of a disk is under way, and of what is made of it."""
    for device in (name, *os.listdir(machine.path(f"/sys/class/block/{name}") / "holders")):
        machine.attribute(device, "inflight", inflight)


def pull(run: Run, machine: CapturedMachine, name: str, inflight: str) -> None:
    """What sysfs has of a disk that is being taken away for as long as I/O is under way."""
    owe(machine, name, inflight)
    machine.attribute(name, "size", "0")
    (machine.path(f"/sys/class/block/{name}") / "bdi").unlink()
    run.service.inventory.update([name])
    run.service.synchronise()


def test_nothing_waits_for_a_pulled_disk_that_owes_answers(
    start: Start,
    nvmet: Nvmet,
    machine: CapturedMachine,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    disks: list[str],
    access: str,
) -> None:
    """What the kernel would not come back from is not begun. A stop gives up, and the next one ends it."""
    monkeypatch.setattr(storagetm, "LOCK_WAIT_SEC", 0.5)
    run = start()
    before = nvmet.contents()
    run.service.synchronise(strict=True)
    root = run.transport.root(run.disk("vdb"))
    pull(run, machine, "vdb", "       1        0")
    assert "vdb" not in run.service.inventory.exports
    assert run.service.exporter.tree.leaving == {root}
    assert [c for c in nvmet.calls if "vdb" in c and c.startswith("unlink")] != []
    assert subsystems(nvmet) == disks
    assert not run.service.stop()
    assert subsystems(nvmet) == ["vdb"]
    assert len(list(nvmet.path("nvmet/ports").iterdir())) == 2
    calls = without_courtesy(nvmet.calls)
    assert not [c for c in calls if c.startswith("rmdir") and ("vdb" in c or "/ports/" in c)]
    assert "vdb" in mapped(nvmet) or access == READ_WRITE
    err = capfd.readouterr().err
    assert re.search(
        r"^Failed to remove '\S+vdb': the disk is gone, but .*; when it has, start .*$", err, re.M
    )
    assert err.count("\n") == 1
    assert os.path.exists(run.service.exporter.ledger.path)

    run = start()
    owe(machine, "vdb", "       0        0")
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == run.exported == [name for name in disks if name != "vdb"]
    assert run.service.stop()
    assert nvmet.contents() == before
    assert not os.path.exists(run.service.exporter.ledger.path)


def test_pulled_disk_that_answers_during_the_stop_goes(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    """All others are gone by then; the ports go after it."""
    run = start()
    before = nvmet.contents()
    run.service.synchronise(strict=True)
    others = [f"rmdir nvmet/subsystems/{PREFIX}.{name}" for name in disks if name != "vdb"]
    pull(run, machine, "vdb", "       0        2")

    def intercept(_: int) -> None:
        if set(others) <= set(nvmet.calls):
            owe(machine, "vdb", "       0        0")

    nvmet.intercept = intercept
    assert run.service.stop()
    assert nvmet.contents() == before
    last = [c for c in nvmet.calls if c.startswith("rmdir")]
    assert set(last[-3:]) == {f"rmdir nvmet/ports/{port}" for port in (36681, 59936)} | {
        f"rmdir nvmet/subsystems/{PREFIX}.vdb"
    }
    assert last.index(f"rmdir nvmet/subsystems/{PREFIX}.vdb") > max(map(last.index, others))


def resized(disk: storagetm.Export) -> list[str]:
    """The calls that give the device over a disk its new size."""
    mapping = storagetm.mapping_of(disk.backing)
    names = [mapping.path] if mapping else []
    steps = ["create", "load", "resume", *(["cache"] if disk.access == READ_ONLY else [])]
    written = {"cache": " write through"}
    return [f"{step} {name}{written.get(step, '')}" for name in names for step in steps]


def test_clients_are_told_that_a_disk_grows(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    run = start()
    run.service.synchronise(strict=True)
    machine.attribute("vdb", "size", "999999")
    before = len(nvmet.calls)
    run.service.inventory.update(["vdb"])
    run.service.synchronise()
    assert without_courtesy(nvmet.calls[before:]) == [
        *resized(run.disk("vdb")),
        f"write {run.namespace('vdb')}/revalidate_size 1",
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


def test_disk_that_fails_is_reported_once_and_tried_again(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, capfd: pytest.CaptureFixture[str], disks: list[str]
) -> None:
    """It is reported once, leaves nothing behind, and is tried again when something about it changes."""
    run = start()
    failing(nvmet, f"{run.namespace('vdb')}/enable", errno.EIO)
    capfd.readouterr()
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == [n for n in disks if n != "vdb"]
    reason = f"Input/output error ('{run.namespace('vdb')}/enable')"
    assert capfd.readouterr().err == f"Failed to export '/dev/vdb': {reason}\n"
    assert run.disk("vdb").fd < 0
    assert run.disk("vdb").why_not == reason

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
    assert subsystems(nvmet) == disks
    assert run.disk("vdb").why_not == ""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EACCES, "Permission denied; it may be write-protected"),
        (errno.ENOMEDIUM, "No medium found; insert one and it will be exported"),
        (errno.ENXIO, "No medium found; insert one and it will be exported"),
    ],
)
def test_each_failure_has_its_reason(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str], code: int, reason: str
) -> None:
    run = start()
    failing(nvmet, f"{run.namespace('vdb')}/enable", code)
    capfd.readouterr()
    run.service.synchronise(strict=True)
    assert capfd.readouterr().err == f"Failed to export '/dev/vdb': {reason}\n"


def test_named_disk_that_fails_ends_the_start(start: Start, nvmet: Nvmet) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc")
    failing(nvmet, f"{run.namespace('vdc')}/enable", errno.EACCES)
    with pytest.raises(storagetm.UserError) as caught:
        run.service.synchronise(strict=True)
    assert str(caught.value) == "Failed to export '/dev/vdc': Permission denied; it may be write-protected"
    assert run.service.stop()
    assert nvmet.contents() == before


def test_name_that_is_taken_is_left_alone(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
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


protected = pytest.mark.parametrize("access", [READ_ONLY, SNAPSHOT])


@protected
def test_device_name_that_is_taken_is_left_alone(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str], disks: list[str]
) -> None:
    run = start()
    disk = run.disk("vdb")
    mapping = storagetm.mapping_of(storagetm.backing(disk.disk, disk.access, run.transport.prefix))
    assert mapping
    name = mapping.name
    assert nvmet.mapper
    unchanged = nvmet.mapper.make(name)
    run.service.synchronise(strict=True)
    assert subsystems(nvmet) == [disk for disk in disks if disk != "vdb"]
    assert capfd.readouterr().err == (
        f"Failed to export '/dev/vdb': another program made the device-mapper device '{name}'; remove it "
        "with 'dmsetup remove'\n"
    )
    assert run.service.stop()
    assert unchanged()


@protected
def test_device_that_others_hold_goes_later(
    start: Start, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The export ends all the same, and the device goes as soon as it can."""
    monkeypatch.setattr(storagetm, "BUSY_SEC", 0.1)
    monkeypatch.setattr(storagetm.Mapping, "abandoned", [])
    run = start("/dev/vdb", "/dev/vdc")
    before = nvmet.contents()
    run.service.synchronise(strict=True)
    assert nvmet.mapper
    name = nvmet.mapper.name_of("/dev/dm-0")
    nvmet.mapper.held.add(name)
    capfd.readouterr()
    assert not run.service.stop()
    assert subsystems(nvmet) == []
    assert f"dm/{name}" in nvmet.contents()
    assert re.fullmatch(
        r"'/dev/vd[bc]' is no longer exported, but still in use: something has '/dev/dm-0' open; "
        r"end that, and it is free\n",
        capfd.readouterr().err,
    )
    nvmet.mapper.held.clear()
    assert nvmet.contents() == before


def test_port_taken_by_a_program_is_replaced(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str], disks: list[str]
) -> None:
    run = start()
    failing(nvmet, "symlink nvmet/ports/59936/", errno.EADDRINUSE)
    run.service.synchronise(strict=True)
    numbers = {int(p.name) for p in nvmet.path("nvmet/ports").iterdir()}
    assert len(numbers) == 2
    assert 36681 in numbers
    assert 59936 not in numbers
    assert run.exported == disks
    assert "Port 59936 is taken, using" in capfd.readouterr().err
    for number in numbers:
        assert len(list(nvmet.path(f"nvmet/ports/{number}/subsystems").iterdir())) == len(disks)


def test_port_taken_by_an_entry_is_replaced_and_left_alone(
    start: Start, nvmet: Nvmet, disks: list[str]
) -> None:
    os.mkdir(nvmet.path("nvmet/ports/36681"))
    run = start()
    run.service.synchronise(strict=True)
    assert run.exported == disks
    assert len(list(nvmet.path("nvmet/ports").iterdir())) == 3
    assert run.service.stop()
    assert [p.name for p in nvmet.path("nvmet/ports").iterdir()] == ["36681"]


def test_ipv4_does_where_ipv6_turns_out_to_be_off(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str], disks: list[str]
) -> None:
    run = start()
    failing(nvmet, "symlink nvmet/ports/36681/", errno.EADDRNOTAVAIL)
    run.service.synchronise(strict=True)
    assert run.exported == disks
    assert [p.name for p in nvmet.path("nvmet/ports").iterdir()] == ["59936"]
    assert "IPv6 is off, exporting without it" in capfd.readouterr().out


def test_start_without_any_port_fails(start: Start, nvmet: Nvmet) -> None:
    """All disks would fail in the same way, so that ends the start."""
    run = start()
    failing(nvmet, "symlink nvmet/ports/", errno.EADDRINUSE)
    with pytest.raises(storagetm.UserError, match="Address already in use"):
        run.service.synchronise(strict=True)
    nvmet.succeed()
    assert run.service.stop()
    assert list(nvmet.path("nvmet/subsystems").iterdir()) == []


def test_disk_that_does_not_go_is_named(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
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


# A start that fails


class Failing:
    """A whole start of the service, of which the loop only shows what there is to show."""

    def __init__(self, nqn: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", made.id)  # a stop leaves a file beside it
        inventory = storagetm.Inventory([storagetm.BlockDevices()], stays=stays)
        self.transport = storagetm.NvmeTcp(made, nqn)
        exporter = storagetm.Exporter(self.transport.prefix, [self.transport], inventory)
        self.service = storagetm.Service(made, exporter)
        self.looped = False
        monkeypatch.setattr(storagetm.NvmeTcp, "prepare", lambda _: None)
        monkeypatch.setattr(self.service.signals, "catch", lambda: None)
        monkeypatch.setattr(self.service.views, "begin", lambda: None)
        monkeypatch.setattr(self.service, "loop", self.loop)

    def loop(self) -> None:
        self.looped = True
        self.service.display.act()


def raising(problem: Exception) -> None:
    raise problem


@pytest.fixture
def run(request: pytest.FixtureRequest, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """The parameter is the NQN."""
    assert nvmet.path("nvmet").is_dir()
    return Failing(getattr(request, "param", ""), monkeypatch)


@pytest.fixture(params=["no nvmet", "another instance", "no uevents", "no network", "no port", "no passage"])
def failure(request: pytest.FixtureRequest, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Why the start fails. The disks have been exported already when the network is looked at."""

    def fail(name: str, problem: Exception, owner: object = storagetm) -> None:
        monkeypatch.setattr(owner, name, lambda *_: raising(problem))

    fd = -1
    reason = "The module 'nvmet-tcp' cannot be loaded; install it"
    if request.param == "no nvmet":
        fail("prepare", storagetm.UserError(reason), storagetm.NvmeTcp)
    elif request.param == "another instance":
        os.makedirs(storagetm.RUN, exist_ok=True)
        fd = os.open(f"{storagetm.RUN}{PREFIX}.entries.lock", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"4711")
        fcntl.flock(fd, fcntl.LOCK_EX)
        reason = (
            "Another storagetm exports under this NQN already, process 4711; stop it or give another --nqn"
        )
    elif request.param == "no uevents":
        fail("Uevents", OSError(errno.EPROTONOSUPPORT, "Protocol not supported"))
        reason = "Failed: Protocol not supported"
    elif request.param == "no network":
        fail("Network", OSError(errno.EIO, "Input/output error", "/dev/x"))
        reason = "Failed at '/dev/x': Input/output error"
    else:
        port = PASSAGE if request.param == "no passage" else "nvmet/ports/59936"
        failing(nvmet, f"mkdir {port}", errno.ENOMEM)
        reason = f"Failed to make '{storagetm.CONFIGFS}{port}': Cannot allocate memory"
    yield reason
    if fd >= 0:
        os.close(fd)


def test_start_that_fails_is_shown_before_a_reboot(
    run: Failing, failure: str, nvmet: Nvmet, manager: Manager, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where its end would boot the machine, it is shown instead, and nothing is left of the export."""
    run.service.reboots = True
    assert run.service.run() == 0
    assert run.looped
    assert subsystems(nvmet) == []
    told = manager.told()
    assert told[-3:] == ["READY=1", f"STATUS=Exporting nothing: {failure}.", "STOPPING=1"]
    assert told.count("STOPPING=1") == 1
    assert capfd.readouterr().err.count(failure) == 1


def test_start_that_fails_in_a_shell_ends(run: Failing, failure: str, nvmet: Nvmet) -> None:
    problem: storagetm.UserError | OSError | None = None
    try:
        run.service.run()
    except (storagetm.UserError, OSError) as e:
        problem = e
    assert problem
    assert storagetm.failure_text(problem) == failure
    assert not run.looped
    assert subsystems(nvmet) == []


def test_nothing_is_exported_after_a_start_that_failed(
    run: Failing, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if there was something to be tried again later, behind the screen that says why."""
    problems = [OSError(errno.EIO, "Input/output error")]
    monkeypatch.setattr(run.service.views, "begin", lambda: raising(problems.pop()) if problems else None)
    run.service.reboots = True
    run.service.exporter.outdated = True
    assert run.service.run() == 0
    assert run.looped
    assert run.service.sources == []
    assert subsystems(nvmet) == []


@pytest.mark.parametrize("run", ["n" * 219], indirect=True)
def test_nqn_that_is_too_long_for_a_disk_is_shown(run: Failing, nvmet: Nvmet) -> None:
    run.service.reboots = True
    assert run.service.run() == 0
    assert re.match(r"--nqn= is too long for '/dev/\w+': its NQN", run.service.refused)
    assert subsystems(nvmet) == []


def test_what_an_earlier_start_exported_stays(
    start: Start, run: Failing, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch, disks: list[str]
) -> None:
    """It stays where nothing was tried, and that is said."""
    first = start()
    first.service.synchronise(strict=True)
    first.kill()
    run.service.reboots = True
    problem = storagetm.UserError("Failed to find a free port")
    monkeypatch.setattr(run.transport, "adopt", lambda _: raising(problem))
    assert run.service.run() == 0
    assert run.service.refused == "Failed to find a free port; but what an earlier start exported still is"
    assert subsystems(nvmet) == disks


def test_failure_while_it_runs_is_not_held_on_screen(
    run: Failing, nvmet: Nvmet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It worked, and would again: the machine may boot."""
    run.service.reboots = True
    problem = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(run.service, "loop", lambda: raising(problem))
    with pytest.raises(OSError, match="Input/output error"):
        run.service.run()
    assert "STOPPING=1" in manager.told()
    assert subsystems(nvmet) == []


# Restart


def test_restart_keeps_exports_while_udev_looks_at_disks(
    start: Start, nvmet: Nvmet, machine: CapturedMachine
) -> None:
    """What is exported stays so while the lock that died with the first run is in others' hands."""
    first = start()
    first.service.synchronise(strict=True)
    first.kill()
    before = len(nvmet.calls)
    with machine.path("open-254:16").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_SH)
        second = start()
        second.service.synchronise(strict=True)
        assert [e.disk.name for e in second.service.exporter.pending()] == ["vdb"]
    second.service.synchronise()
    assert second.disk("vdb").fd >= 0
    calls = without_courtesy(nvmet.calls[before:])
    assert {c.split()[0] for c in calls} == {"write"}
    assert all("revalidate_size" in c for c in calls)


def test_restart_keeps_the_ports(start: Start, nvmet: Nvmet) -> None:
    """Those of the first run are kept, or all clients would lose their connections."""
    os.mkdir(nvmet.path("nvmet/ports/59936"))
    first = start()
    first.service.synchronise(strict=True)
    ports = dict(first.transport.ports)
    first.kill()
    os.rmdir(nvmet.path("nvmet/ports/59936"))
    second = start()
    assert second.transport.ports == ports


def test_restart_drops_a_disk_that_is_gone(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, disks: list[str]
) -> None:
    first = start()
    first.service.synchronise(strict=True)
    first.kill()
    for path in ("/sys/class/block/vdb", "/sys/block/vdb"):
        machine.path(path).unlink()
    second = start()
    second.service.synchronise(strict=True)
    assert subsystems(nvmet) == [n for n in disks if n != "vdb"]


# Kernels that let in one client more than they should


# Only those clients are counted.
may_write = pytest.mark.parametrize("access", [SNAPSHOT, READ_WRITE])


@pytest.fixture
def seats(nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> Seats:
    nvmet.room_for_two = True
    made = Seats(nvmet)
    monkeypatch.setattr(storagetm, "NvmeHost", made.attach)
    return made


class Seats:
    """Connections to the target, which refuses one if there is a `problem`."""

    def __init__(self, nvmet: Nvmet) -> None:
        self.nvmet = nvmet
        self.problem: OSError | None = None
        self.taken: list[str] = []

    def attach(self, address: tuple[str, int], nqn: str, _: str) -> Seat:
        self.nvmet.calls.append(f"attach {nqn}")
        if self.problem:
            raise self.problem
        assert os.path.lexists(self.nvmet.path(f"nvmet/ports/{address[1]}/subsystems/{nqn}"))
        self.taken.append(nqn)
        return Seat(self, nqn)


class Seat:
    def __init__(self, seats: Seats, nqn: str) -> None:
        self.seats, self.nqn = seats, nqn

    def attach(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.seats.taken.remove(self.nqn)

    def is_attached(self) -> bool:
        return self.nqn in self.seats.taken


@may_write
def test_seats_are_taken_before_clients_come_in(
    start: Start, nvmet: Nvmet, seats: Seats, machine: CapturedMachine, disks: list[str]
) -> None:
    """One in each subsystem, taken before clients can come in by both ports, and again after a crash."""
    run = start()
    before = nvmet.contents()
    run.service.synchronise(strict=True)
    nqns = [f"{PREFIX}.{name}" for name in disks]
    assert sorted(seats.taken) == nqns
    for nqn in nqns:
        steps = [c.partition(" ")[0] for c in nvmet.calls if c.endswith((f"subsystems/{nqn}", f" {nqn}"))]
        assert steps == ["mkdir", "symlink", "attach", "symlink"]
        first, last = (
            int(nvmet.path(f"nvmet/subsystems/{nqn}/attr_cntlid_{end}").read_text())
            for end in ("min", "max")
        )
        assert last == first + 1
    # What changes of a disk later leaves them alone.
    machine.attribute("vdb", "size", "999999")
    run.service.inventory.update(["vdb"])
    calls = len(nvmet.calls)
    run.service.synchronise()
    expected = [*resized(run.disk("vdb")), f"write {run.namespace('vdb')}/revalidate_size 1"]
    assert nvmet.calls[calls:] == expected
    run.kill()
    seats.taken.clear()
    calls = len(nvmet.calls)
    run = start()
    run.service.synchronise(strict=True)
    assert sorted(seats.taken) == nqns
    assert {c.split()[0] for c in nvmet.calls[calls:]} == {"write", "attach"}
    assert run.service.stop()
    assert seats.taken == []
    assert nvmet.contents() == before


@may_write
def test_disk_whose_seat_a_client_has_taken_is_not_exported(
    start: Start, nvmet: Nvmet, seats: Seats
) -> None:
    """While the program was dead. The disk is for one client, so neither keeps it."""
    run = start()
    run.service.synchronise(strict=True)
    run.kill()
    seats.taken.clear()
    seats.problem = OSError(errno.EIO, "refused")
    run = start()
    run.service.synchronise()
    assert run.exported == subsystems(nvmet) == []
    assert run.disk("vdb").why_not.startswith("several clients have attached it already; detach it from all")


@may_write
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (
            OSError(errno.EIO, "refused"),
            "several clients have attached it already; detach it from all, or .*",
        ),
        (OSError("timed out"), ".*: Connection timed out; let this machine's firewall accept .*"),
        (OSError(errno.ECONNREFUSED, "x"), ".*: Connection refused; let this machine's firewall accept .*"),
    ],
)
def test_disk_whose_seat_is_refused_is_not_exported(
    start: Start, nvmet: Nvmet, seats: Seats, problem: OSError, reason: str, disks: list[str]
) -> None:
    """Then one client too many could come in, so the disk is not exported, and nothing is left of it."""
    seats.problem = problem
    run = start()
    run.service.synchronise()
    assert run.exported == subsystems(nvmet) == []
    assert all(re.fullmatch(reason, run.disk(name).why_not) for name in disks)
    # What takes seconds to fail is not tried for each disk.
    tries = len([c for c in nvmet.calls if c.startswith("attach")])
    assert tries == (len(disks) if problem.errno else 1)


# What it tells


def test_status_is_told_when_it_changes(
    start: Start, manager: Manager, disks: list[str], access: str
) -> None:
    count = f"{len(disks)} disks" + (f" ({len(disks)} read-write)" if access == READ_WRITE else "")
    memory = "; snapshots use 0 B of 3.2 GB of memory (0 %)" if access == SNAPSHOT else ""
    run = start()
    run.service.synchronise(strict=True)
    run.service.display.act()
    run.service.display.act()
    assert manager.told() == [
        "READY=1",
        f"STATUS=Exporting {count} at no address (the network is down){memory}.",
    ]
    run.service.addresses = [storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", False)]
    run.service.display.act()
    assert manager.told() == [f"STATUS=Exporting {count} at 1 address{memory}."]


def test_first_signal_stops_and_the_second_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run.service.signals.on_signal(15, None)
    assert run.service.signals.stop_asked
    assert codes == []
    run.service.signals.stopping = True
    run.service.signals.on_signal(15, None)
    assert codes == [1]
