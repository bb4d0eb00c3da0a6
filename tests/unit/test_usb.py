# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks over USB mass storage, on a captured machine with a made-up controller and a made-up host."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import storagetm
from storagetm import AUTO, READ_ONLY, READ_WRITE
from tests.unit.configfs import Gadgets, Nvmet, gadgets_shell
from tests.unit.conftest import MEMORY, CapturedMachine
from tests.unit.devicemapper import captured_kernel
from tests.unit.exports import Named, made_disk, made_export
from tests.unit.test_service import unplug

UDC = "dummy_udc.0"
TiB = 1 << 40


@pytest.fixture
def gadgets(nvmet: Nvmet, machine: CapturedMachine) -> Gadgets:
    """A kernel with gadgets and one controller, to which no cable leads."""
    made = Gadgets(nvmet, machine.path("/sys"))
    made.appear(UDC)
    return made


class Heard:
    """Stands for uevents: what was heard of controllers, which is told once."""

    def __init__(self, subsystem: str) -> None:
        assert subsystem == "udc"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.names: set[str] | None = set()

    def changed(self) -> set[str] | None:
        names, self.names = self.names, set()
        return names


class Run:
    """One start of the program, whose loop is gone through by hand."""

    def __init__(
        self,
        *paths: str,
        access: str = READ_ONLY,
        transports: Sequence[str] = ("usb",),
    ) -> None:
        storagetm.Lun.opened.clear()  # it ends with a process
        options = storagetm.Options()
        options.transports = list(transports)
        made = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", made.id)
        stays.kept = True
        rules = storagetm.Access((), access)
        source = storagetm.NamedDisks(paths) if paths else storagetm.BlockDevices()
        self.inventory = storagetm.Inventory([source], rules, stays)
        found = storagetm.chosen_transports(options, made, made.instance(), rules)
        self.usb = next(t for t in found if isinstance(t, storagetm.UsbGadget))
        self.exporter = storagetm.Exporter(made.instance(), found, self.inventory)
        if paths:
            self.inventory.check_named()
            source.named = False  # what fails ends no start
        self.exporter.ledger.lock()
        self.exporter.begin()
        if not paths:
            self.inventory.rescan()
        self.news: list[storagetm.News] = []
        self.heard: Heard | None = None

    def listen(self, patch: pytest.MonkeyPatch) -> None:
        """Begins to wait for news."""
        with patch.context() as context:
            context.setattr(storagetm, "Uevents", Heard)
            self.news = self.usb.news(lambda: None)

    def synchronise(self, *, strict: bool = True) -> None:
        self.exporter.synchronise(strict=strict)

    def later(self) -> None:
        """What the loop does after news: what is due first."""
        if self.exporter.due():
            storagetm.Reminder(self.exporter).act()
        self.exporter.synchronise()

    def notice(self) -> None:
        """The controller's state has changed."""
        state = storagetm.UsbState(self.usb, lambda: None)
        state.wants()
        assert state.act()
        if state.fd >= 0:
            os.close(state.fd)
        self.later()

    def hear(self) -> None:
        """Uevents tell of a controller."""
        self.usb.take_state()
        self.later()

    def disk(self, name: str) -> storagetm.Export:
        return self.inventory.exports[name]

    def update(self, name: str) -> None:
        self.inventory.update([name])
        self.synchronise(strict=False)

    def stop(self) -> bool:
        return self.exporter.stop()

    def kill(self) -> None:
        for export in self.inventory.exports.values():
            export.release()
        self.exporter.ledger.close()


Start = Callable[..., Run]


@pytest.fixture
def start(nvmet: Nvmet) -> Iterator[Start]:
    runs: list[Run] = []
    assert nvmet.path("nvmet").is_dir()

    def begin(*paths: str, access: str = READ_ONLY, transports: Sequence[str] = ("usb",)) -> Run:
        runs.append(Run(*paths, access=access, transports=transports))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def images(directory: Path, count: int) -> list[str]:
    found = [str(directory / f"i{number:02}") for number in range(count)]
    for path in found:
        Path(path).write_bytes(bytes(512))
    return found


def top() -> str:
    return f"usb_gadget/{storagetm.Machine().instance()}"


def part(number: int) -> str:
    """Where a drive is in the gadget: each function has as many."""
    each = storagetm.UsbGadget.FUNCTION_LUNS
    return f"functions/mass_storage.{number // each}/lun.{number % each}"


def lun(number: int) -> str:
    return f"{top()}/{part(number)}"


def media(nvmet: Nvmet) -> list[str]:
    """What is in each drive, as people know it; "" for an empty one."""
    found: dict[int, str] = {}
    for path, text in nvmet.contents().items():
        if match := re.fullmatch(rf"{re.escape(top())}/functions/mass_storage.(\d)/lun.(\d)/file", path):
            mapped = re.fullmatch(r"/dev/mapper/storagetm-(.+)-[0-9a-f]{16}", text)
            number = storagetm.UsbGadget.FUNCTION_LUNS * int(match[1]) + int(match[2])
            found[number] = mapped[1] if mapped else os.path.basename(text)
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in sorted(found)]


def attribute(nvmet: Nvmet, path: str) -> str:
    return nvmet.path(path).read_text().strip()


def shown(run: Run) -> storagetm.Report:
    return storagetm.take_report(
        storagetm.Machine(), run.exporter.transports, [], run.inventory.exports.values(), run.exporter.memory
    )


def calls_since(nvmet: Nvmet, before: int, part: str = "usb_gadget/") -> list[str]:
    return [call.replace(top() + "/", "") for call in nvmet.calls[before:] if part in call]


# From start to stop


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_disks_are_in_before_a_host_can_see_the_gadget(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, access: str
) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc", access=access)
    run.synchronise()
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    calls = calls_since(nvmet, 0)
    assert calls[-1] == f"write UDC {UDC}"
    inserted = [i for i, call in enumerate(calls) if re.match(r"write \S+/file /dev/", call)]
    assert len(inserted) == 2
    # A LUN can only be made as long as the function is linked nowhere.
    linked = calls.index("symlink configs/c.1/mass_storage.0")
    assert max(i for i, call in enumerate(calls) if call.startswith("mkdir")) < linked < inserted[0]
    for number in range(2):
        assert attribute(nvmet, f"{lun(number)}/ro") == str(int(access == READ_ONLY))
        node = nvmet.contents()[f"{lun(number)}/file"]
        assert node.startswith("/dev/mapper/storagetm-vd" if access != READ_WRITE else "/dev/vd")
    assert attribute(nvmet, f"{top()}/UDC") == UDC
    assert (gadgets.udc / UDC / "function").read_text() == f"{storagetm.Machine().instance()}\n"
    run.synchronise()
    assert calls_since(nvmet, 0) == calls
    assert run.stop()
    assert nvmet.contents() == before
    assert (gadgets.udc / UDC / "function").read_text() == ""
    ended = calls_since(nvmet, 0)[len(calls) :]
    assert ended[0] == "write UDC \n"


def test_write_protection_is_below_as_well(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    run = start("/dev/vdb")
    run.synchronise()
    (mapping,) = (text for path, text in nvmet.contents().items() if re.fullmatch(r"dm/[^/]+", path))
    assert re.fullmatch(r"0 \d+ flakey 254:16 0 0 1 1 error_writes", mapping)
    assert gadgets.udc.is_dir()
    assert run.stop()


def test_what_the_host_is_told_of_the_gadget(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    run = start("/dev/vdb", "/dev/sda")
    run.disk("vdb").disk.model = "Grün & Söhne_Disk"
    run.synchronise()
    strings = f"{top()}/strings/0x409"
    serial = attribute(nvmet, f"{strings}/serialnumber")
    assert re.fullmatch(r"[0-9A-F]{12,}", serial)
    assert storagetm.Machine().id.hex()[:6].upper() not in serial
    assert attribute(nvmet, f"{strings}/manufacturer")
    assert attribute(nvmet, f"{strings}/product")
    assert attribute(nvmet, f"{top()}/idVendor") == "0x1d6b"
    assert all(attribute(nvmet, f"{lun(n)}/removable") == "1" for n in range(4))
    inquiries = {(nvmet.path(lun(n)) / "inquiry_string").read_text() for n in range(2)}
    assert "Gr      n & S hne Disk  0001\n" in inquiries
    assert all(len(i) == 29 for i in inquiries)
    assert gadgets.udc.is_dir()


def test_named_disk_keeps_its_drive_when_another_comes(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets
) -> None:
    plug = unplug(machine, "vdc")
    run = start()
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    before = media(nvmet)
    assert before[-2:] == ["", ""]
    calls = len(nvmet.calls)
    plug("4711")
    run.update("vdc")
    place = before.index("")
    assert media(nvmet) == [*before[:place], "vdc", ""]
    made = calls_since(nvmet, calls)
    assert [c.rpartition(" ")[0] for c in made[-1:]] == [f"write {part(place)}/file"]
    assert all(part(place) in call for call in made)
    calls = len(nvmet.calls)
    unplug(machine, "vdc")
    run.update("vdc")
    assert media(nvmet) == before
    assert calls_since(nvmet, calls) == [f"write {part(place)}/file \n"]
    assert run.stop()


def test_restart_after_a_kill_leaves_all_as_it_is(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    """The same disks are in the same drives, and no host sees one go, also with another one in between."""
    first = start("/dev/vdc", "/dev/vdd")
    first.synchronise()
    gadgets.plug(UDC)
    first.kill()
    assert media(nvmet) == ["vdc", "vdd", "", ""]
    calls = len(nvmet.calls)
    second = start("/dev/vdb", "/dev/vdc", "/dev/vdd")
    assert second.exporter.opened
    second.synchronise()
    assert media(nvmet) == ["vdc", "vdd", "vdb", ""]
    assert all(f" {part(2)}/" in call for call in calls_since(nvmet, calls))
    second.kill()
    calls = len(nvmet.calls)
    third = start("/dev/vdb", "/dev/vdc", "/dev/vdd")
    third.synchronise()
    assert calls_since(nvmet, calls) == []
    assert third.stop()
    assert nvmet.contents().keys() == {
        "nvmet",
        "nvmet/hosts",
        "nvmet/ports",
        "nvmet/subsystems",
        "usb_gadget",
    }


@pytest.mark.parametrize(("first", "second"), [(READ_ONLY, READ_WRITE), (READ_WRITE, READ_ONLY)])
def test_restart_with_another_access_puts_another_device_in(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, first: str, second: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The one that was in is out by the time it is to be removed."""
    before = nvmet.contents()
    run = start("/dev/vdb", access=first)
    run.synchronise()
    run.kill()
    gadgets.plug(UDC)
    gadgets.lock(f"{lun(0)}/file")
    run = start("/dev/vdb", access=second)
    run.synchronise()
    assert media(nvmet) == ["vdb", "", ""]
    assert attribute(nvmet, f"{lun(0)}/ro") == str(int(second == READ_ONLY))
    assert any(path.startswith("dm/") for path in nvmet.contents()) == (second == READ_ONLY)
    assert capfd.readouterr().err == ""
    assert run.stop()
    assert nvmet.contents() == before


def test_gadget_that_others_made_in_its_place_stays_bound(
    start: Start, nvmet: Nvmet, gadgets: Gadgets
) -> None:
    """While the program was dead."""
    run = start("/dev/vdb")
    run.synchronise()
    run.kill()
    # Made beside ours, so that no number is given twice.
    other = "usb_gadget/other"
    for path in (other, f"{other}/functions/mass_storage.0", f"{other}/configs/c.1"):
        os.mkdir(nvmet.path(path))
    nvmet._symlink("../../functions/mass_storage.0", nvmet.path(f"{other}/configs/c.1/mass_storage.0"))
    gadgets.unbind(top())
    gadgets.remove(nvmet.path(top()))
    nvmet.path(other).rename(nvmet.path(top()))
    storagetm.write_attribute(f"{nvmet.path(top())}/UDC", UDC)
    calls = len(nvmet.calls)
    run = start("/dev/vdb")
    assert run.stop()
    assert calls_since(nvmet, calls) == []
    assert attribute(nvmet, f"{top()}/UDC") == UDC


@pytest.mark.parametrize(("driver", "stall"), [("dwc2", "0"), ("dwc3", "1"), ("", "1")])
def test_controller_that_halts_badly_is_not_asked_to(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets, driver: str, stall: str
) -> None:
    if driver:
        place = machine.path("/sys/bus/platform/drivers") / driver
        place.mkdir(parents=True)
        (gadgets.udc / UDC / "device").mkdir()
        (gadgets.udc / UDC / "device/driver").symlink_to(place)
    run = start("/dev/vdb")
    run.synchronise()
    assert attribute(nvmet, f"{top()}/functions/mass_storage.0/stall") == stall
    assert attribute(nvmet, f"{top()}/UDC") == UDC
    calls = len(nvmet.calls)
    run.kill()
    run = start("/dev/vdb")
    run.synchronise()
    assert calls_since(nvmet, calls) == []


def test_kill_before_the_binding_lets_nobody_in(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    """So the next start waits for disks as the first would have done."""
    assert gadgets.udc.is_dir()
    before = nvmet.contents()
    run = start("/dev/vdb")
    run.synchronise()
    number = next(i for i, call in enumerate(nvmet.calls) if call.endswith(f"/UDC {UDC}"))
    assert run.stop()

    def whole() -> None:
        Run("/dev/vdb").synchronise()

    assert nvmet.run_and_kill_at(number, whole)
    assert media(nvmet) == ["vdb", "", ""]
    second = start("/dev/vdb")
    assert not second.exporter.opened
    assert second.stop()
    assert nvmet.contents() == before


# Drives


def test_gadget_is_made_anew_for_more_disks_once_no_host_uses_it(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets
) -> None:
    names = ("vdb", "vdc", "vdd", "vde")
    plugs = [unplug(machine, name) for name in names]
    run = start()
    run.synchronise()
    few = media(nvmet)
    gadgets.plug(UDC)
    run.notice()
    inode = nvmet.path(top()).stat().st_ino
    for number, (name, plug) in enumerate(zip(names[:3], plugs)):
        plug(f"471{number}")
        run.update(name)
    assert media(nvmet) == [*few[:-2], "vdb", "vdc"]
    assert run.disk("vdd").why_not == "no LUN is left; unplug the cable for a moment"
    assert not run.disk("vdd").live
    assert nvmet.path(top()).stat().st_ino == inode
    gadgets.unplug(UDC)
    calls = len(nvmet.calls)
    run.notice()
    assert media(nvmet) == [*few[:-2], "vdb", "vdc", "vdd", "", ""]
    assert run.disk("vdd").why_not == ""
    made = calls_since(nvmet, calls)
    # Nobody sees it half-made.
    assert made[0] == "write UDC \n"
    assert made[-1] == f"write UDC {UDC}"
    assert run.stop()


@pytest.mark.parametrize("connected", [False, True])
def test_17th_disk_waits_for_a_drive(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, tmp_path: Path, connected: bool
) -> None:
    """One LUN more than 16 the kernel does not make."""
    paths = images(tmp_path, 17)
    run = start(*paths)
    run.synchronise()
    assert media(nvmet) == [f"i{number:02}" for number in range(16)]
    assert run.disk(paths[16]).why_not == "no LUN is left; pull another disk"
    names = [path.name for path in nvmet.path(f"{top()}/configs/c.1").iterdir() if path.is_symlink()]
    assert sorted(names) == ["mass_storage.0", "mass_storage.1"]
    if connected:
        gadgets.plug(UDC)
        run.notice()
    os.unlink(paths[3])
    run.inventory.rescan()
    run.synchronise(strict=False)
    expected = [f"i{number:02}" for number in range(16)]
    expected[3] = "i16"
    assert media(nvmet) == expected
    assert run.disk(paths[16]).why_not == ""
    assert run.stop()


def test_other_disk_gets_an_unused_drive_first(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, tmp_path: Path
) -> None:
    """Rather than that of one that goes in the same moment."""
    paths = images(tmp_path, 3)
    run = start(*paths)
    os.rename(paths[2], tmp_path / "later")
    run.inventory.rescan()
    run.synchronise()
    assert media(nvmet) == ["i00", "i01", "", ""]
    os.unlink(paths[0])
    os.rename(tmp_path / "later", paths[2])
    run.inventory.rescan()
    run.synchronise()
    assert media(nvmet) == ["", "i01", "i02", ""]
    assert gadgets.udc.is_dir()


def test_large_disk_needs_a_newer_kernel(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 TiB is the first size that READ CAPACITY (10) cannot tell. It takes no other disk's drive."""
    machine.attribute("vdb", "size", str(2 * TiB // 512))
    machine.attribute("vdc", "size", str(2 * TiB // 512 - 1))
    monkeypatch.setattr(storagetm, "kernel_version", lambda: (5, 15))
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    assert media(nvmet) == ["vdc", "", ""]
    assert run.disk("vdb").why_not == "it has 2 TiB or more, which USB takes from Linux 5.16 on"
    assert run.stop()
    monkeypatch.setattr(storagetm, "kernel_version", lambda: (5, 16))
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    assert gadgets.udc.is_dir()


@pytest.mark.parametrize(
    ("release", "version"),
    [
        *(("6.12.9+deb13-amd64", (6, 12)), ("5.15", (5, 15)), ("5.10.0-30-arm64", (5, 10))),
        *(("6", (0, 0)), ("", (0, 0)), ("x.y", (0, 0)), ("6.x.1", (0, 0)), ("٦.١", (0, 0))),
    ],
)
def test_kernel_version_is_read(
    release: str, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", release, "", "")))
    assert storagetm.kernel_version() == version


# What changes of a disk


def grow(run: Run, machine: CapturedMachine, name: str, size: str) -> None:
    machine.attribute(name, "size", size)
    run.update(name)


@pytest.mark.parametrize("access", [READ_ONLY, READ_WRITE])
def test_new_size_is_told_as_another_medium(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets, access: str
) -> None:
    run = start("/dev/vdb", "/dev/vdc", access=access)
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    calls = len(nvmet.calls)
    grow(run, machine, "vdb", "999999")
    (call,) = calls_since(nvmet, calls)
    assert re.fullmatch(r"write functions/mass_storage.0/lun.0/file /dev/(dm-\d|vdb)", call)
    # Also after a restart, which knows no size that the kernel has opened it with.
    run.kill()
    run = start("/dev/vdb", "/dev/vdc", access=access)
    run.synchronise()
    calls = len(nvmet.calls)
    grow(run, machine, "vdb", "1999999")
    assert calls_since(nvmet, calls) == [call]
    assert media(nvmet) == ["vdb", "vdc", "", ""]


def test_new_size_waits_while_the_host_has_locked_the_drive(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets
) -> None:
    """To eject what it has mounted would lose data."""
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    gadgets.lock(f"{lun(0)}/file")
    grow(run, machine, "vdb", "999999")
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    assert gadgets.lock_of(f"{lun(0)}/file").exists()
    assert run.disk("vdb").failed == {}
    assert not [c for c in nvmet.calls if "forced_eject" in c]
    gadgets.unplug(UDC)
    calls = len(nvmet.calls)
    run.notice()
    assert [c.rpartition(" ")[0] for c in calls_since(nvmet, calls)] == [
        "write functions/mass_storage.0/lun.0/file"
    ]
    calls = len(nvmet.calls)
    gadgets.plug(UDC)
    run.notice()
    assert calls_since(nvmet, calls) == []


# What the host does


def test_drive_that_the_host_has_locked_goes_with_its_disk(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets
) -> None:
    run = start()
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    place = media(nvmet).index("vdb")
    gadgets.lock(f"{lun(place)}/file")
    unplug(machine, "vdb")
    calls = len(nvmet.calls)
    run.update("vdb")
    assert media(nvmet)[place] == ""
    assert calls_since(nvmet, calls)[-1] == f"write {part(place)}/forced_eject 1"
    assert not any("vdb" in path for path in nvmet.contents())


def test_locked_drive_of_an_old_kernel_waits_for_the_host(
    start: Start,
    nvmet: Nvmet,
    machine: CapturedMachine,
    gadgets: Gadgets,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    gadgets.forces = False
    monkeypatch.setattr(storagetm, "BUSY_SEC", 0.1)
    run = start()
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    place = media(nvmet).index("vdb")
    gadgets.lock(f"{lun(place)}/file")
    unplug(machine, "vdb")
    capfd.readouterr()
    run.update("vdb")
    assert media(nvmet)[place] == "vdb"
    assert (
        f"Failed to remove '{storagetm.CONFIGFS}{lun(place)}/file': the host has locked it; eject it there, "
        "or unplug the cable\n" in capfd.readouterr().err
    )
    gadgets.unplug(UDC)
    run.notice()
    assert media(nvmet)[place] == ""
    assert capfd.readouterr().err == ""
    assert run.stop()


def test_stop_waits_for_no_host(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    """It unbinds the gadget, and that ends what a host has locked."""
    before = nvmet.contents()
    gadgets.forces = False
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    gadgets.plug(UDC)
    gadgets.lock(f"{lun(0)}/file")
    assert run.stop()
    assert nvmet.contents() == before


def test_disk_that_the_host_ejects_is_put_back_for_the_next(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets
) -> None:
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    exported = [run.disk(name) for name in ("vdb", "vdc")]
    assert run.usb.remarks(exported) == ["USB: a host is connected"]
    gadgets.eject(f"{lun(0)}/file")
    told = run.usb.remarks(exported)
    assert told[1:] == [
        "USB: the host has ejected '/dev/vdb'; it comes back when the cable is plugged in again"
    ]
    # Nothing else that happens puts it back.
    grow(run, machine, "vdc", "999999")
    run.hear()
    gadgets.state(UDC, "addressed")
    run.notice()
    assert media(nvmet) == ["", "vdc", "", ""]
    gadgets.unplug(UDC)
    run.notice()
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    # A cable that was out for a moment, and of which only the end is told.
    gadgets.plug(UDC)
    run.notice()
    gadgets.eject(f"{lun(1)}/file")
    run.notice()
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    assert run.stop()


def test_ejected_disk_is_still_known_after_a_kill(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    """It gets its own drive again, and what is noted of it can be written anew."""
    first = start("/dev/vdb", "/dev/vdc", "/dev/vdd")
    first.synchronise()
    gadgets.plug(UDC)
    for number in (0, 1):
        gadgets.eject(f"{lun(number)}/file")
    first.exporter.ledger.rewrite(first.exporter.tree.live.values(), storagetm.CONFIGFS)
    first.kill()
    second = start("/dev/vdd", "/dev/vdc", "/dev/vdb")
    assert sorted(second.usb.places.values()) == [0, 1, 2]
    second.synchronise()
    assert media(nvmet) == ["vdb", "vdc", "vdd", "", ""]
    assert second.stop()


# Controllers


def test_gadget_of_others_is_left_alone(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, capfd: pytest.CaptureFixture[str]
) -> None:
    gadgets.use(UDC, "g_ether")
    run = start("/dev/vdb")
    run.synchronise()
    assert capfd.readouterr().err == ""
    assert media(nvmet) == ["vdb", "", ""]
    assert attribute(nvmet, f"{top()}/UDC") == ""
    way = run.usb.way([])
    assert way.shut == "the USB device controller is used by the gadget 'g_ether'"
    assert way.remedy
    gadgets.use(UDC, "")
    run.hear()
    assert attribute(nvmet, f"{top()}/UDC") == UDC
    assert run.usb.way([]).shut == ""
    assert run.stop()
    gadgets.use(UDC, "g_ether")
    run = start("/dev/vdb")
    run.synchronise()
    assert run.stop()
    assert (gadgets.udc / UDC / "function").read_text() == "g_ether\n"


@pytest.mark.parametrize("old", [False, True])
def test_controller_that_another_gadget_takes_first(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, old: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Between the look and the binding: the disks stay in, and are bound when it is free."""
    gadgets.old = old
    run = start("/dev/vdb", "/dev/vdc")

    def intercept(number: int) -> None:
        if nvmet.calls[number].endswith(f"/UDC {UDC}"):
            gadgets.use(UDC, "g_ether")

    nvmet.intercept = intercept
    run.synchronise()
    nvmet.succeed()
    assert capfd.readouterr().err == (
        f"Failed to use the USB device controller '{UDC}': Device or resource busy; see the kernel's "
        "messages\n"
    )
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    assert run.exporter.due()
    gadgets.use(UDC, "")
    run.hear()
    assert attribute(nvmet, f"{top()}/UDC") == UDC
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    assert run.stop()


@pytest.mark.parametrize("old", [False, True])
def test_controller_that_cannot_do_mass_storage(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, old: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel ejects all disks when it fails to bind the function. Another controller is taken."""
    gadgets.old = old
    gadgets.refusing.add(UDC)
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    why = "Operation not supported" if old else "Device or resource busy"
    assert run.usb.way([]).shut == f"the USB device controller '{UDC}' cannot be used: {why}"
    assert capfd.readouterr().err.count("\n") == 1
    assert media(nvmet) == ["", "", "", ""]
    run.later()
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    gadgets.appear("other.1")
    run.hear()
    run.later()
    assert attribute(nvmet, f"{top()}/UDC") == "other.1"
    assert media(nvmet) == ["vdb", "vdc", "", ""]
    assert run.stop()


def test_controller_appears_goes_and_returns(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    gadgets.vanish(UDC)
    before = nvmet.contents()
    run = start("/dev/vdb")
    run.synchronise()
    assert run.usb.way([]).shut == "this machine has no USB device controller"
    assert media(nvmet) == ["vdb", "", ""]
    gadgets.appear("other.1")
    run.hear()
    assert attribute(nvmet, f"{top()}/UDC") == "other.1"
    gadgets.plug("other.1")
    run.notice()
    assert run.usb.is_used()
    gadgets.vanish("other.1")
    run.hear()
    assert not run.usb.is_used()
    assert media(nvmet) == ["vdb", "", ""]
    gadgets.appear(UDC)
    run.hear()
    assert attribute(nvmet, f"{top()}/UDC") == UDC
    gadgets.vanish(UDC)
    run.hear()
    assert run.stop()
    assert nvmet.contents() == before


@pytest.mark.parametrize("old", [False, True])
def test_controller_that_returns_under_its_name_is_bound_again(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, old: bool
) -> None:
    """Its going and coming may be told at once; the gadget has its name all the time."""
    gadgets.old = old
    run = start("/dev/vdb")
    run.synchronise()
    gadgets.vanish(UDC)
    gadgets.appear(UDC)
    calls = len(nvmet.calls)
    run.hear()
    assert (gadgets.udc / UDC / "function").read_text() == f"{storagetm.Machine().instance()}\n"
    assert calls_since(nvmet, calls) == (["write UDC \n", f"write UDC {UDC}"] if old else [])
    gadgets.vanish(UDC)
    assert run.stop()


def test_restart_finds_another_controller(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    before = nvmet.contents()
    first = start("/dev/vdb")
    first.synchronise()
    first.kill()
    gadgets.vanish(UDC)
    gadgets.appear("other.1")
    second = start("/dev/vdb")
    second.synchronise()
    assert attribute(nvmet, f"{top()}/UDC") == "other.1"
    assert media(nvmet) == ["vdb", "", ""]
    second.kill()
    third = start("/dev/vdb")
    assert third.stop()
    assert nvmet.contents() == before


def test_free_controller_is_taken_and_ours_kept(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    gadgets.use(UDC, "g_ether")
    gadgets.appear("other.1")
    run = start("/dev/vdb")
    run.synchronise()
    assert attribute(nvmet, f"{top()}/UDC") == "other.1"
    gadgets.use(UDC, "")
    run.hear()
    assert attribute(nvmet, f"{top()}/UDC") == "other.1"


def test_controllers_are_looked_at_once_listened_for(
    start: Start, gadgets: Gadgets, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gadgets.vanish(UDC)
    run = start("/dev/vdb")
    run.synchronise()
    gadgets.appear(UDC)
    run.listen(monkeypatch)
    assert run.exporter.due() > 0
    run.later()
    assert attribute(nvmet, f"{top()}/UDC") == UDC
    incoming = run.news[0]
    assert isinstance(incoming, storagetm.Incoming)
    assert not incoming.act()  # there was word of something else
    run.later()
    assert run.exporter.due() == 0


def test_state_is_watched_while_there_is_a_controller(
    start: Start, gadgets: Gadgets, machine: CapturedMachine
) -> None:
    told: list[bool] = []
    run = start("/dev/vdb")
    run.synchronise()
    state = storagetm.UsbState(run.usb, lambda: told.append(True))
    fd = state.wants()[0]
    assert os.readlink(f"/proc/self/fd/{fd}") == str(machine.path(f"/sys/class/udc/{UDC}/state"))
    assert state.wants()[0] == fd
    gadgets.plug(UDC)
    assert state.act()
    assert run.usb.state == "configured"
    assert told == [True]
    run.usb.controller = "other.1"  # which is going just now
    assert state.wants()[0] == -1
    assert state.act()
    run.usb.controller = ""
    assert state.wants()[0] == -1


def test_state_of_a_controller_that_has_gone(
    start: Start, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("/dev/vdb")
    run.synchronise()
    state = storagetm.UsbState(run.usb, lambda: None)
    fd = state.wants()[0]
    gadgets.vanish(UDC)

    def pread(*_: object) -> bytes:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(os, "pread", pread)
    assert state.act()
    assert run.usb.controller == ""
    assert state.wants()[0] == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_what_a_host_ejects_is_looked_for_while_there_is_one(start: Start, gadgets: Gadgets) -> None:
    told: list[bool] = []
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    ejections = storagetm.Ejections(run.usb, lambda: told.append(True))
    shown(run)
    assert ejections.due() is None  # nobody is there who could
    gadgets.plug(UDC)
    run.notice()
    assert ejections.due() == ejections.LOOK_SEC
    assert not ejections.act()
    assert told == []
    assert (ejections.due() or 0) > time.monotonic()
    gadgets.eject(f"{lun(1)}/file")
    assert not ejections.act()
    assert told == [True]
    shown(run)
    ejections.act()
    assert told == [True]
    run.update("vdc")
    gadgets.unplug(UDC)
    run.notice()
    assert ejections.due() is None


def test_what_is_ejected_stays_out_when_its_size_changes(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, machine: CapturedMachine
) -> None:
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    gadgets.plug(UDC)
    run.notice()
    gadgets.eject(f"{lun(1)}/file")
    grow(run, machine, "vdc", "123456")
    assert media(nvmet)[:2] == ["vdb", ""]
    gadgets.unplug(UDC)
    run.notice()
    assert media(nvmet)[:2] == ["vdb", "vdc"]
    assert run.stop()


# Where there need not be a controller


def test_auto_says_that_another_gadget_has_the_controller(start: Start, gadgets: Gadgets) -> None:
    (gadgets.udc / UDC / "function").write_text("other\n")
    run = start("/dev/vdb", transports=(AUTO,))
    run.synchronise()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp"]
    text = (
        "USB: no disk is exported over it: the gadget 'other' uses the device controller; stop the program "
        "that made it"
    )
    assert [fact.text for fact in shown(run).facts() if fact.kind == "note"] == [text]
    assert run.usb.why_not(run.disk("vdb")) == "the USB device controller is used by the gadget 'other'"
    (gadgets.udc / UDC / "function").write_text("")
    run.hear()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp", "usb"]
    assert [fact.text for fact in shown(run).facts() if fact.kind == "note"] == []
    assert run.stop()


def test_auto_says_nothing_of_what_is_not_there(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    gadgets.vanish(UDC)
    run = start("/dev/vdb", transports=(AUTO,))
    assert [t.name for t in run.exporter.transports] == ["nvme-tcp", "usb"]
    run.synchronise()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp"]
    assert run.disk("vdb").failed == {}
    assert not any(path.startswith("usb_gadget/") for path in nvmet.contents())
    report = shown(run)
    assert report.status() == "Exporting 1 disk at no address (the network is down)."
    assert "usb" not in " ".join(fact.text for fact in report.facts()).lower()
    gadgets.appear(UDC)
    run.hear()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp", "usb"]
    assert media(nvmet) == ["vdb", "", ""]
    gadgets.vanish(UDC)
    run.hear()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp"]
    assert not any(path.startswith("usb_gadget/") for path in nvmet.contents())
    assert run.stop()


def test_kernel_without_gadgets(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, it ends the start. With auto, what can be exported is."""
    monkeypatch.setattr(storagetm, "prepare_configfs", lambda: None)
    nvmet._rmdir(nvmet.path("usb_gadget"))
    run = start("/dev/vdb")
    with pytest.raises(storagetm.UserError, match=r"has no USB gadgets, .* or leave out --transport=usb$"):
        run.usb.prepare()
    run.kill()
    run = start("/dev/vdb", transports=(AUTO,))
    run.usb.prepare()
    run.usb.look()
    assert (gadgets.udc / UDC).is_dir()
    run.synchronise()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp"]
    assert run.stop()


def test_kernel_without_the_function(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, capfd: pytest.CaptureFixture[str]
) -> None:
    gadgets.functions.clear()
    run = start("/dev/vdb")
    why = "this kernel has no USB mass storage, or its module 'usb_f_mass_storage' is missing; boot one"
    with pytest.raises(storagetm.UserError, match=why):
        run.synchronise()
    assert run.stop()
    run = start("/dev/vdb", transports=(AUTO,))
    run.synchronise()
    assert sorted(run.disk("vdb").live) == ["nvme-tcp"]
    assert capfd.readouterr().err.count(f"Exporting nothing over USB: {why}") == 1
    run.synchronise()
    assert capfd.readouterr().err == ""
    assert run.stop()
    assert not any(path.startswith("usb_gadget/") for path in nvmet.contents())


def test_gadget_of_that_name_is_left_alone(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    os.mkdir(nvmet.path(top()))
    inode = nvmet.path(top()).stat().st_ino
    run = start("/dev/vdb")
    name = storagetm.Machine().instance()
    with pytest.raises(storagetm.UserError, match=rf"another program made the gadget '{re.escape(name)}'; "):
        run.synchronise()
    assert run.stop()
    assert nvmet.path(top()).stat().st_ino == inode
    assert gadgets.udc.is_dir()


# Two transports


@pytest.mark.parametrize("access", storagetm.ACCESS)
@pytest.mark.parametrize("order", [("nvme-tcp", "usb"), ("usb", "nvme-tcp")])
def test_disk_that_can_be_written_to_goes_by_one_way(
    start: Start,
    nvmet: Nvmet,
    gadgets: Gadgets,
    order: tuple[str, str],
    access: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Only one of the two goes through the page cache. What nobody writes to goes by both."""
    before = nvmet.contents()
    run = start("/dev/vdb", access=access, transports=order)
    assert [t.name for t in run.exporter.transports] == list(order)
    run.synchronise()
    run.synchronise()
    errors = capfd.readouterr().err
    if access == READ_ONLY:
        assert sorted(run.disk("vdb").live) == sorted(order)
        assert errors == ""
        needed = [root for branch in run.disk("vdb").live.values() for root in branch.needs]
        assert run.disk("vdb").backing
        assert needed.count(getattr(run.disk("vdb").backing, "root", "")) == 2
    else:
        assert list(run.disk("vdb").live) == [order[0]]
        assert errors == (
            f"Failed to export '/dev/vdb': not over {order[1]}, since it can be written to and is exported "
            f"over {order[0]}: only one of these goes through the page cache; see --read-only\n"
        )
    assert gadgets.udc.is_dir()
    assert run.stop()
    assert nvmet.contents() == before


def test_rule_about_two_ways_is_for_each_disk(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    run = start("/dev/vdb", "/dev/vdc", transports=("usb", "nvme-tcp"))
    run.inventory.access = storagetm.Access([("/dev/vdb", READ_WRITE)], READ_ONLY)
    for export in run.inventory.exports.values():
        run.inventory.decide(export)
    run.synchronise()
    assert {key: sorted(export.live) for key, export in run.inventory.exports.items()} == {
        "vdb": ["usb"],
        "vdc": ["nvme-tcp", "usb"],
    }
    assert media(nvmet)[:2] == ["vdb", "vdc"]
    assert gadgets.udc.is_dir()


def test_disk_that_usb_does_not_take_goes_by_the_other_way(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-write, too: there is nothing to choose between then."""
    machine.attribute("vdb", "size", str(3 * TiB // 512))
    monkeypatch.setattr(storagetm, "kernel_version", lambda: (5, 10))
    run = start("/dev/vdb", access=READ_WRITE, transports=("usb", "nvme-tcp"))
    run.synchronise()
    assert list(run.disk("vdb").live) == ["nvme-tcp"]
    assert run.disk("vdb").failed == {}
    assert media(nvmet) == [""]
    assert gadgets.udc.is_dir()


# A dry run


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_dry_run_does_what_the_real_run_does(
    nvmet: Nvmet,
    gadgets: Gadgets,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    access: str,
) -> None:
    """As text and as JSON, the same steps; a shell that runs them comes to the same as the real run."""
    (image,) = images(tmp_path, 1)
    before = nvmet.contents()
    calls = len(nvmet.calls)
    arguments = ["--dry-run", "--transport=usb", f"--{access}", image, "/dev/vdb"]
    assert storagetm.main(arguments) == 0
    commands = capfd.readouterr().out.splitlines()
    assert storagetm.main([*arguments, "--json"]) == 0
    steps = json.loads(capfd.readouterr().out)
    assert nvmet.contents() == before
    assert nvmet.calls[calls:] == []
    assert len(steps) == len(commands)
    assert {step["step"] for step in steps} == {"mkdir", "map", "write", "symlink", "insert", "bind"} | (
        {"write"} if access != READ_WRITE else set()
    )
    assert steps[-1]["step"] == "bind"
    run = start(image, "/dev/vdb", access=access)
    run.synchronise()
    expected = {p: text for p, text in nvmet.contents().items() if p.startswith("usb_gadget")}
    made = [c for c in calls_since(nvmet, calls) if c.startswith(("mkdir", "symlink"))]
    assert len(made) == len([s for s in steps if s["step"] in ("mkdir", "symlink")])
    assert run.stop()
    copy = tmp_path / "copy"
    (copy / "usb_gadget").mkdir(parents=True)
    script = gadgets_shell() + "\n".join(c for c in commands if not c.startswith("dmsetup"))
    subprocess.run(["sh", "-c", script.replace(f"{nvmet.root}/", f"{copy}/")], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(nvmet, "root", copy)
        patch.setattr(nvmet, "mapper", None)
        found = {p: text for p, text in nvmet.contents().items() if p.startswith("usb_gadget")}
    assert found == expected
    assert gadgets.udc.is_dir()


def test_dry_run_of_two_transports_has_the_rule(gadgets: Gadgets, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--json", "--transport=nvme-tcp,usb", "/dev/vdb"]
    assert storagetm.main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert {"insert", "bind"} <= {step["step"] for step in json.loads(out)}
    storagetm.main([*arguments, "--read-write"])
    out, err = capfd.readouterr()
    assert "not over usb, since it can be written to" in err
    assert "insert" not in {step["step"] for step in json.loads(out)}
    assert gadgets.udc.is_dir()


def test_dry_run_of_a_stop_and_of_another_disk(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside one that exports: what would go, and what would come in its place."""
    first = start("/dev/vdb")
    first.synchronise()
    first.kill()
    calls = len(nvmet.calls)
    assert storagetm.main(["--dry-run", "--json", "--transport=usb", "/dev/vdc"]) == 0
    steps = json.loads(capfd.readouterr().out)
    assert nvmet.calls[calls:] == []
    file = f"{nvmet.root}/{lun(0)}/file"
    (eject,) = (step for step in steps if step["step"] == "eject")
    assert eject["path"] == file
    (insert,) = (step for step in steps if step["step"] == "insert")
    assert insert["path"] == file.replace("lun.0", "lun.1")
    assert not [step for step in steps if step["step"] in ("bind", "unbind")]
    assert storagetm.main(["--dry-run", "--json", "--transport=nvme-tcp", "/dev/vdb"]) == 0
    steps = json.loads(capfd.readouterr().out)
    kinds = [step["step"] for step in steps if "usb_gadget" in step["path"]]
    assert kinds[:2] == ["unbind", "eject"]
    assert kinds[-1] == "rmdir"
    assert storagetm.main(["--dry-run", "--transport=nvme-tcp", "/dev/vdb"]) == 0
    commands = [line for line in capfd.readouterr().out.splitlines() if "usb_gadget" in line]
    assert commands[:2] == [f"echo > {nvmet.root}/{top()}/UDC", f"echo > {file}"]
    assert gadgets.udc.is_dir()


# Kills and failures


def contents_of(nvmet: Nvmet, gadgets: Gadgets) -> dict[str, str]:
    """All that there is, with whose the controller is."""
    found = nvmet.contents()
    for path in gadgets.udc.glob("*/function"):
        found[str(path)] = path.read_text()
    return found


def whole(access: str = READ_ONLY, *paths: str) -> None:
    """A start of the program, up to the loop."""
    run = Run(*(paths or ("/dev/vdb", "/dev/vdc")), access=access)
    run.synchronise()
    run.kill()


def ended() -> None:
    run = Run("/dev/vdb", "/dev/vdc")
    assert run.stop()


def adopted_and_stopped(
    nvmet: Nvmet, gadgets: Gadgets, before: dict[str, str], complete: dict[str, str], access: str = READ_ONLY
) -> None:
    whole(access)
    assert contents_of(nvmet, gadgets) == complete
    ended()
    assert contents_of(nvmet, gadgets) == before


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_crash_while_the_gadget_is_made_is_recovered(nvmet: Nvmet, gadgets: Gadgets, access: str) -> None:
    """Killed before each system call in turn; then started again, or only stopped."""
    before = contents_of(nvmet, gadgets)
    whole(access)
    complete = contents_of(nvmet, gadgets)
    ended()
    number = 0
    while nvmet.run_and_kill_at(number, lambda: whole(access)):
        if number % 2:
            adopted_and_stopped(nvmet, gadgets, before, complete, access)
        else:
            ended()
            assert contents_of(nvmet, gadgets) == before
        number += 1
    # The gadget with strings and four drives, two disks, the binding; and what is between.
    least = 6 + 2 + 3 + 4 + 2 + 2 * 3 + 1
    assert number >= least + (0 if access == READ_WRITE else 2 * 3)


def test_crash_while_the_gadget_is_removed_is_recovered(nvmet: Nvmet, gadgets: Gadgets) -> None:
    before = contents_of(nvmet, gadgets)
    whole()
    complete = contents_of(nvmet, gadgets)
    number = 0
    while nvmet.run_and_kill_at(number, ended):
        if number % 2:
            adopted_and_stopped(nvmet, gadgets, before, complete)
        else:
            ended()
            assert contents_of(nvmet, gadgets) == before
        whole()
        number += 1
    # The binding, two disks and what is between, the link, and six directories.
    assert number >= 1 + 2 + 2 + 1 + 7


@pytest.mark.parametrize("each", [8, 2])
def test_crash_while_the_gadget_is_made_anew_is_recovered(
    nvmet: Nvmet, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    """For more disks than it has drives, or than one function has."""
    monkeypatch.setattr(storagetm.UsbGadget, "FUNCTION_LUNS", each)
    monkeypatch.setattr(storagetm.UsbGadget, "SPARE", 0)
    before = contents_of(nvmet, gadgets)
    three = "/dev/vdb", "/dev/vdc", "/dev/vdd"
    number = 0
    while True:
        whole()
        if not nvmet.run_and_kill_at(number, lambda: whole(READ_ONLY, *three)):
            break
        if number % 2:
            whole(READ_ONLY, *three)
            assert sorted(media(nvmet)) == ["vdb", "vdc", "vdd"]
            assert contents_of(nvmet, gadgets)[f"{top()}/UDC"] == UDC
        ended()
        assert contents_of(nvmet, gadgets) == before
        number += 1
    assert media(nvmet) == ["vdb", "vdc", "vdd"]
    assert number > 30


def test_crash_while_a_disk_takes_the_place_of_another_is_recovered(
    nvmet: Nvmet, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storagetm.UsbGadget, "SPARE", 0)
    before = contents_of(nvmet, gadgets)
    other = "/dev/vdb", "/dev/vdd"
    number = 0
    while True:
        whole()
        if not nvmet.run_and_kill_at(number, lambda: whole(READ_ONLY, *other)):
            break
        if number % 2:
            whole(READ_ONLY, *other)
            assert media(nvmet) == ["vdb", "vdd"]
        ended()
        assert contents_of(nvmet, gadgets) == before
        number += 1
    assert media(nvmet) == ["vdb", "vdd"]
    assert number > 5


@pytest.mark.parametrize("access", [READ_ONLY, READ_WRITE])
def test_failure_at_each_step_is_made_up_for(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, access: str
) -> None:
    """Nothing is left of what failed, all else is there. Another try has it all, a stop leaves nothing."""
    before = contents_of(nvmet, gadgets)
    run = start("/dev/vdb", "/dev/vdc", access=access)
    run.synchronise()
    complete = contents_of(nvmet, gadgets)
    calls = list(nvmet.calls)
    assert run.stop()
    run.kill()
    for number in range(len(calls)):
        run = start("/dev/vdb", "/dev/vdc", access=access)
        nvmet.fail_at(number)
        first = len(nvmet.calls)
        try:
            run.synchronise()
        except storagetm.UserError:
            # The gadget itself: at the start this is the end.
            nvmet.succeed()
            assert run.stop()
            assert contents_of(nvmet, gadgets) == before
            run.kill()
            continue
        nvmet.succeed()
        failing = nvmet.calls[first + number]
        if failing.endswith(f"/UDC {UDC}"):
            assert run.usb.refused
            run.hear()
        else:
            (failed,) = (e for e in run.inventory.exports.values() if e.failed)
            assert media(nvmet).count(failed.disk.name) == 0
            assert sorted(filter(None, media(nvmet))) == sorted({"vdb", "vdc"} - {failed.disk.name})
            failed.failed.clear()
            run.synchronise(strict=False)
        assert contents_of(nvmet, gadgets) == complete, failing
        assert run.stop()
        assert contents_of(nvmet, gadgets) == before
        run.kill()


def test_failure_while_the_gadget_goes_is_made_up_for(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    """A stop tries each step more than once."""
    before = contents_of(nvmet, gadgets)
    whole()
    calls = len(nvmet.calls)
    ended()
    for number in range(len(nvmet.calls) - calls):
        whole()
        run = start("/dev/vdb", "/dev/vdc")
        nvmet.fail_at(number)
        assert run.stop()
        nvmet.succeed()
        assert contents_of(nvmet, gadgets) == before
        run.kill()


# Anything in any order


class AnyOrder(RuleBasedStateMachine):
    """Starts with any disks that are killed, fail or stop, a host that does what it likes, controllers."""

    NAMES = ("vdb", "vdc", "vdd", "vde", "sda")
    DISKS = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir=MEMORY)
        self.patch = pytest.MonkeyPatch()
        self.machine = CapturedMachine("trixie-fresh", Path(self.directory.name) / "machine", self.patch)
        self.nvmet = captured_kernel(self.machine, self.patch)
        self.gadgets = Gadgets(self.nvmet, self.machine.path("/sys"))
        self.gadgets.appear(UDC)
        self.patch.setattr(storagetm, "claim", lambda *_: 0)
        self.patch.setattr(storagetm, "LOGIND", ())
        self.patch.setattr(storagetm, "RETURN_WAIT_SEC", 0)
        self.patch.setattr(storagetm.UsbGadget, "FUNCTION_LUNS", 2)  # so that there are several functions
        self.patch.setattr(storagetm, "run_program", lambda *_: 127)
        self.before = self.nvmet.contents()
        self.run: Run | None = None
        self.ejected: set[str] = set()

    @property
    def there(self) -> bool:
        return (self.gadgets.udc / UDC).is_dir()

    def foreign(self) -> bool:
        return self.there and (self.gadgets.udc / UDC / "function").read_text() == "g_ether\n"

    @initialize(old=st.booleans())
    def kernel(self, old: bool) -> None:
        self.gadgets.old = old

    @rule(names=DISKS, access=st.sampled_from([READ_ONLY, READ_WRITE]))
    def start(self, names: list[str], access: str) -> None:
        """After a kill, or a stop."""
        if self.run:
            self.run.kill()
        self.run = Run(*(f"/dev/{name}" for name in names), access=access)
        self.run.synchronise()
        self.run.later()
        self.ejected.clear()
        self.check()

    @rule(names=DISKS, number=st.integers(0, 50))
    def killed_start(self, names: list[str], number: int) -> None:
        if self.run:
            self.run.kill()
            self.run = None
        self.nvmet.run_and_kill_at(number, lambda: whole(READ_ONLY, *(f"/dev/{name}" for name in names)))

    @rule(names=DISKS, number=st.integers(0, 50))
    def failed_start(self, names: list[str], number: int) -> None:
        if self.run:
            self.run.kill()
        self.run = None
        run = Run(*(f"/dev/{name}" for name in names))
        self.nvmet.fail_at(number)
        try:
            run.synchronise()
        except storagetm.UserError:
            pass
        self.nvmet.succeed()
        run.kill()

    @precondition(lambda self: self.run)
    @rule()
    def stop(self) -> None:
        assert self.run
        assert self.run.stop()
        self.run.kill()
        self.run = None
        assert self.nvmet.contents() == self.before

    @precondition(lambda self: self.there)
    @rule()
    def unplugged(self) -> None:
        self.gadgets.unplug(UDC)
        if self.run:
            self.run.notice()
            self.ejected.clear()
            self.check()

    @precondition(lambda self: self.there and (self.gadgets.udc / UDC / "function").read_text())
    @rule(number=st.integers(0, 6), locks=st.booleans())
    def plugged(self, number: int, locks: bool) -> None:
        """By a host that ejects a disk or locks it."""
        self.gadgets.plug(UDC)
        if self.run:
            self.run.notice()
            self.ejected.clear()
        file = f"{lun(number)}/file"
        if not self.foreign() and self.nvmet.path(file).exists() and self.gadgets.medium(file):
            if locks:
                self.gadgets.lock(file)
            else:
                self.ejected.add(media(self.nvmet)[number])
                self.gadgets.eject(file)
        self.check()

    @rule(user=st.sampled_from(["", "g_ether"]))
    def controller_comes_or_goes(self, user: str) -> None:
        if self.there:
            self.gadgets.vanish(UDC)
        else:
            self.gadgets.appear(UDC, user)
        if self.run:
            self.run.hear()
            self.check()

    @precondition(lambda self: self.run)
    @rule(name=st.sampled_from(NAMES), size=st.integers(1000, 2000))
    def size_changes(self, name: str, size: int) -> None:
        assert self.run
        self.machine.attribute(name, "size", str(size))
        self.run.update(name)
        self.check()

    def check(self) -> None:
        """Each disk is in one drive, which it is said to be in, and the gadget is bound if it can be."""
        if not self.run:
            return
        found = media(self.nvmet)
        exports = self.run.inventory.exports
        for name, export in exports.items():
            left_out = export.why_not.startswith("no LUN is left; ")
            assert bool(export.live) == (not left_out), export.why_not
            if export.live and name not in self.ejected:
                assert found[self.run.usb.places[export.disk.tag]] == name
        assert sorted(filter(None, found)) == sorted(
            n for n, e in exports.items() if e.live and n not in self.ejected
        )
        bound = self.there and not self.foreign()
        function = self.gadgets.udc / UDC / "function"
        assert not bound or function.read_text() == f"{top().rpartition('/')[2]}\n"
        assert bound or not self.there or function.read_text() == "g_ether\n"

    def teardown(self) -> None:
        try:
            if self.run:
                self.run.kill()
            self.run = Run("/dev/vdb")
            self.stop()
        finally:
            assert self.nvmet.mapper
            self.nvmet.mapper.close()
            self.patch.undo()
            self.directory.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=12)


# A gadget of this machine at its own port


SERIAL = "0123456789ABCDEF"


@pytest.fixture
def looped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A disk on a USB stick with this serial number, beside a gadget with that one; its place in sysfs."""

    def make(serial: str | None, own: str | None, bus: str = "usb5/5-1") -> str:
        monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/sys/")
        monkeypatch.setattr(storagetm, "CONFIGFS", f"{tmp_path}/config/")
        stick = tmp_path / "sys/devices/platform/dummy_hcd.0" / bus
        place = stick / "5-1:1.0/host6/target6:0:0/6:0:0:1/block/sdx"
        place.mkdir(parents=True)
        (place / "device").symlink_to("../..")
        (stick / "idVendor").write_text("1d6b\n")
        if serial is not None:
            (stick / "serial").write_text(f"{serial}\n")
        for name, number in (("other", ""), ("x", own)):
            strings = tmp_path / "config/usb_gadget" / name / "strings/0x409"
            strings.mkdir(parents=True)
            if number is not None:
                (strings / "serialnumber").write_text(f"{number}\n")
        return str(place)

    return make


@pytest.mark.parametrize(
    ("serial", "own", "bus", "why"),
    [
        (SERIAL, SERIAL, "usb5/5-1", "comes from this machine's own USB gadget 'x'"),
        (SERIAL, "FEDCBA9876543210", "usb5/5-1", ""),
        (SERIAL, None, "usb5/5-1", ""),
        ("", SERIAL, "usb5/5-1", ""),
        ("", "", "usb5/5-1", ""),  # a stick without one, and a gadget without
        (None, "", "usb5/5-1", ""),
        (SERIAL, SERIAL, "scsi/5-1", ""),
    ],
)
def test_own_disk_at_the_other_end_is_left_out(
    looped: Callable[..., str], serial: str | None, own: str | None, bus: str, why: str
) -> None:
    assert storagetm.why_looped(looped(serial, own, bus)) == why


def test_machine_without_gadgets_has_none_looped(
    looped: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = looped(SERIAL, SERIAL)
    monkeypatch.setattr(storagetm, "CONFIGFS", f"{tmp_path}/nothing/")
    assert storagetm.why_looped(place) == ""


def test_looped_disk_is_in_no_export(
    start: Start, nvmet: Nvmet, gadgets: Gadgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither it nor a partition of it."""
    asked: list[str] = []

    def why_looped(place: str) -> str:
        asked.append(os.path.basename(place))
        return "comes from here" if place.endswith("/vdb") else ""

    monkeypatch.setattr(storagetm, "why_looped", why_looped)
    run = start()
    run.synchronise()
    assert run.disk("vdb").why_not == "it comes from here"
    assert "vdb" not in media(nvmet)
    assert "vdc" in media(nvmet)
    assert gadgets.udc.is_dir()


# Any bytes


@given(st.binary(max_size=200))
@example(b"add@/devices/x\0SUBSYSTEM=udc\0DEVPATH=/devices/platform/x/udc/x\0")
def test_uevent_may_be_any_bytes(raw: bytes) -> None:
    assert isinstance(storagetm.parse_uevent(raw, "udc"), str)


@pytest.mark.parametrize(
    ("raw", "subsystem", "name"),
    [
        (b"change@/d/udc/y.0\0ACTION=change\0DEVPATH=/d/udc/y.0\0SUBSYSTEM=udc\0", "udc", "y.0"),
        (b"change@/d/udc/y.0\0ACTION=change\0DEVPATH=/d/udc/y.0\0SUBSYSTEM=udc\0", "block", ""),
        (b"add@/d/block/sda\0ACTION=add\0DEVPATH=/d/block/sda\0SUBSYSTEM=block\0", "udc", ""),
        (b"remove@/d/bdi/8:0\0ACTION=remove\0DEVPATH=/d/bdi/8:0\0SUBSYSTEM=bdi\0", "udc", ""),
        (b"add@/d/gadget.0\0ACTION=add\0DEVPATH=/d/gadget.0\0SUBSYSTEM=gadget\0", "udc", ""),
    ],
)
def test_uevents_of_controllers_are_told_from_others(raw: bytes, subsystem: str, name: str) -> None:
    assert storagetm.parse_uevent(raw, subsystem) == name


@given(st.text(), st.text(), st.text())
def test_inquiry_may_have_any_text(vendor: str, model: str, name: str) -> None:
    text = storagetm.inquiry_string(vendor, model, name)
    assert len(text) == 28
    assert text.isascii()
    assert text.endswith("0001")


@pytest.mark.parametrize(
    ("vendor", "model", "name", "inquiry"),
    [
        ("", "Samsung_SSD_980", "nvme0n1", "Samsung SSD 980         "),
        ("", "WDC_WD10EZEX-08WN4A0", "sda", "WDC     WD10EZEX-08WN4A0"),
        ("", "CT500MX500SSD1", "sda", "Linux   CT500MX500SSD1  "),
        ("", "Wonderful Disk", "sda", "Linux   Wonderful Disk  "),
        ("SanDisk", "Ultra_Fit", "sdb", "SanDisk Ultra Fit       "),
        ("SanDisk", "SanDisk_Ultra", "sdb", "SanDisk Ultra           "),
        ("SanDisk", "SanDisk", "sdb", "SanDisk SanDisk         "),
        ("Wonderful", "Disk", "sdb", "WonderfuDisk            "),
        ("", "A very long model's name", "sda", "A       very long model'"),
        ("", "", "sda", "Linux   sda             "),
        ("QEMU", "", "sda", "QEMU    sda             "),
        ("", "", "", "Linux   image           "),
        ("\n", "\u00fc\n\x7f", "vdb", "Linux   vdb             "),
    ],
)
def test_inquiry_has_vendor_and_model(vendor: str, model: str, name: str, inquiry: str) -> None:
    assert storagetm.inquiry_string(vendor, model, name) == inquiry + "0001"


@pytest.mark.parametrize(
    ("udev", "sysfs", "vendor"),
    [
        ("", "", ""),
        ("E:ID_VENDOR=SanDisk\n", "Other", "SanDisk"),
        ("", "SanDisk", "SanDisk"),
        ("E:ID_VENDOR=ATA\n", "ATA", ""),
        ("", "ATA", ""),
        ("E:ID_VENDOR=0x1af4\n", "", ""),
        ("", "0x1af4", ""),
    ],
)
def test_vendor_is_what_the_disk_tells(udev: str, sysfs: str, vendor: str, machine: CapturedMachine) -> None:
    disk = made_disk("vdb")
    disk.udev_entry = udev.encode()
    machine.write("/sys/block/vdb/device/vendor", sysfs + "\n")
    assert disk.vendor() == vendor


def test_controller_may_tell_any_bytes(start: Start, gadgets: Gadgets) -> None:
    run = start("/dev/vdb")
    run.synchronise()
    for raw in (b"", b"\n", b"\xff\0\n", b"configured", b"\x1b[2J\n", b"x" * 5000):
        (gadgets.udc / UDC / "state").write_bytes(raw)
        run.notice()
        assert run.usb.is_used() == (raw == b"configured")
        assert run.usb.state.isprintable()
    gadgets.appear("other.1")
    for raw in (b"\xff\xfe", b"\x1b[2J", b"a\nb"):
        (gadgets.udc / UDC / "function").write_bytes(raw)
        (gadgets.udc / "other.1" / "function").write_bytes(raw)
        run.hear()
        assert run.usb.controller == ""
        assert run.usb.blocked
        assert "\x1b" not in run.usb.way([]).shut


@given(st.binary(max_size=100))
@example(b"\0u")
@example(b"\0butter")
def test_ledger_may_have_any_bytes_of_a_gadget(raw: bytes) -> None:
    for letter in (b"u", b"b", b"f"):
        storagetm.Ledger.parse(b"+\0x\0tag\0" + letter + b"x" + raw + b"\0\n")


@given(st.text())
@example("usb_gadget/x/functions/mass_storage.0/lun.x/file")
@example("usb_gadget/x/functions/mass_storage.0/lun.\u0663/file")
def test_root_that_is_no_drive_has_no_number(root: str) -> None:
    usb = storagetm.UsbGadget(Named(), "x")
    assert usb.number(root) == -1
    assert usb.number("usb_gadget/x/functions/mass_storage.1/lun.7/file") == 15
    assert usb.number("usb_gadget/x/functions/mass_storage.0/lun.15/file") == -1


# What people are told


def test_report_tells_how_to_come_in(start: Start, nvmet: Nvmet, gadgets: Gadgets) -> None:
    run = start("/dev/vdb", "/dev/vdc", transports=("nvme-tcp", "usb"))
    run.synchronise()
    report = shown(run)
    assert report.status() == "Exporting 2 disks at no address (the network is down) and USB."
    assert report.shut == []  # by USB one can
    assert {row.key: row.label.rpartition(" and ")[2] for row in report.exported} == {
        "vdb": "USB LUN 0",
        "vdc": "USB LUN 1",
    }
    hint = "Connect this machine's USB device port to another machine, and the disks appear there"
    assert [way.hint for way in report.ways] == ["", hint]
    gadgets.plug(UDC)
    run.notice()
    gadgets.eject(f"{lun(1)}/file")
    report = shown(run)
    assert report.ways[1].where == "USB (a host is connected)"
    assert report.ways[1].hint == ""
    assert [fact.text for fact in report.facts() if fact.kind == "note"] == [
        "USB: a host is connected",
        "USB: the host has ejected '/dev/vdc'; it comes back when the cable is plugged in again",
    ]
    gadgets.vanish(UDC)
    run.hear()
    report = shown(run)
    assert len(report.shut) == 2
    assert report.shut[1].shut == "this machine has no USB device controller"
    assert nvmet.path(top()).is_dir()


def test_export_that_has_no_drive_yet_has_a_root_all_the_same() -> None:
    usb = storagetm.UsbGadget(Named(), "x")
    export = made_export("vda", tag="t")
    assert usb.number(usb.root(export)) == -1
    assert usb.why_not(export).startswith("no LUN is left; ")
    usb.arrange([export], {})
    assert usb.number(usb.root(export)) == 0
    assert usb.why_not(export) == ""
    assert usb.luns == 1 + usb.SPARE


# Which transports there are


@pytest.mark.parametrize(
    ("names", "kinds", "optional"),
    [
        ([], ["nvme-tcp"], None),
        (["nvme-tcp"], ["nvme-tcp"], None),
        (["usb"], ["usb"], False),
        (["usb", "nvme-tcp"], ["usb", "nvme-tcp"], False),
        (["nvme-tcp", "usb"], ["nvme-tcp", "usb"], False),
        ([AUTO], ["nvme-tcp", "usb"], True),
        ([AUTO, "usb"], ["nvme-tcp", "usb"], False),
        (["usb", AUTO], ["usb", "nvme-tcp"], False),
        ([AUTO, "nvme-tcp"], ["nvme-tcp", "usb"], True),
    ],
)
def test_transports_are_those_that_were_asked_for(
    names: list[str], kinds: list[str], optional: bool | None
) -> None:
    options = storagetm.Options()
    options.transports = names
    found = storagetm.chosen_transports(options, Named(), "x", storagetm.Access())
    assert [t.name for t in found] == kinds
    assert [t.optional for t in found if isinstance(t, storagetm.UsbGadget)] == (
        [] if optional is None else [optional]
    )
    assert all(isinstance(t, (storagetm.NvmeTcp, storagetm.UsbGadget)) for t in found)
    options.subsystem = storagetm.SHARED
    found = storagetm.chosen_transports(options, Named(), "x", storagetm.Access())
    assert "nvme-tcp" not in kinds or any(isinstance(t, storagetm.SharedNvmeTcp) for t in found)
