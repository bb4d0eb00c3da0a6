# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks over iSCSI, on a captured machine with a made-up LIO."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import storagetm
from storagetm import AF_INET, AF_INET6, READ_ONLY, READ_WRITE, SNAPSHOT, Address, Admission, Code
from tests.unit.configfs import Nvmet
from tests.unit.conftest import MEMORY, CapturedMachine
from tests.unit.devicemapper import captured_kernel
from tests.unit.exports import Named, made_export
from tests.unit.lio import UNIT_SERIAL, Lio, lio_shell
from tests.unit.test_admission import Computer, reachable
from tests.unit.test_service import unplug

CODE, OTHER = Code.parse("k7fm-2qxd-9wtr-4hcn"), Code.parse("0123-4567-89ab-cdef")
HELD = [
    Address(AF_INET, "192.0.2.7", "eth0", False),
    Address(AF_INET6, "2001:db8::7", "eth0", False),
    Address(AF_INET6, "fe80::7", "eth0", True),
]
FOUR, SIX, LOCAL = HELD


@pytest.fixture
def lio(nvmet: Nvmet, machine: CapturedMachine, monkeypatch: pytest.MonkeyPatch) -> Lio:
    """A kernel with LIO, to which nothing is attached."""
    monkeypatch.setattr(storagetm, "BUSY_SEC", 0.1)
    return Lio(nvmet, machine.path("/sys"), monkeypatch)


class Run:
    """One start of the program, whose loop is gone through by hand."""

    def __init__(
        self,
        *paths: str,
        access: str = READ_ONLY,
        clients: int = -1,
        transports: Sequence[str] = ("iscsi",),
        listen: Sequence[str] = (),
        port: int = 0,
        admission: Admission | None = None,
        held: Sequence[Address] = HELD,
    ) -> None:
        Lio.claims.clear()  # they end with a process
        options = storagetm.Options()
        options.transports, options.clients = list(transports), clients
        options.listen, options.port = list(listen), port
        made = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", made.id)
        stays.kept = True
        rules = storagetm.Access((), access)
        source = storagetm.NamedDisks(paths) if paths else storagetm.BlockDevices()
        self.inventory = storagetm.Inventory([source], rules, stays)
        found = storagetm.chosen_transports(options, made, made.instance(), rules, admission)
        self.iscsi = next(t for t in found if isinstance(t, storagetm.Iscsi))
        self.exporter = storagetm.Exporter(made.instance(), found, self.inventory)
        self.held = list(held)
        if paths:
            self.inventory.check_named()
            source.named = False  # what fails ends no start
        self.exporter.ledger.lock()
        self.exporter.begin()
        self.exporter.want.follow(lambda: self.held)
        if not paths:
            self.inventory.rescan()

    def synchronise(self, *, strict: bool = True) -> None:
        self.exporter.synchronise(strict=strict)

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
def start(lio: Lio) -> Iterator[Start]:
    runs: list[Run] = []
    assert lio.backstores() == []

    def begin(*paths: str, **options: object) -> Run:
        runs.append(Run(*paths, **options))  # type: ignore[arg-type]
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def stem() -> str:
    """What the target's name has before what tells boots from each other."""
    return storagetm.iqn(storagetm.Machine().instance())


def targets(nvmet: Nvmet) -> list[str]:
    """All targets of ours, with the form that their names have to have."""
    found = [path.name for path in nvmet.path("target/iscsi").iterdir() if path.name.startswith(stem())]
    assert all(re.fullmatch(r"\.[0-9a-z]{4}", name[len(stem()) :]) for name in found)
    return [f"target/iscsi/{name}" for name in found]


def target(nvmet: Nvmet) -> str:
    """The target that there is."""
    (found,) = targets(nvmet)
    return found


def groups(nvmet: Nvmet) -> list[Path]:
    """All portal groups of ours."""
    return [path for name in targets(nvmet) for path in nvmet.path(name).glob("tpgt_*")]


def group(nvmet: Nvmet) -> str:
    """The portal group that there is."""
    assert [path.name for path in groups(nvmet)] == ["tpgt_1"]
    return target(nvmet) + "/tpgt_1"


def luns(nvmet: Nvmet) -> dict[int, str]:
    """What is in each LUN, as people know it, by number."""
    found = {}
    for link in nvmet.path(group(nvmet)).glob("lun/lun_*/storagetm-*"):
        mapped = re.fullmatch(r"storagetm-(.+)-[0-9a-f]{16}", link.name)
        assert mapped
        assert os.path.realpath(link) == str(backstore(nvmet, mapped[1]))
        found[int(link.parent.name.partition("_")[2])] = mapped[1]
    return found


def backstore(nvmet: Nvmet, name: str) -> Path:
    (found,) = nvmet.root.glob(f"target/core/iblock_*/storagetm-{name}-????????????????")
    return found


def names(nvmet: Nvmet) -> list[str]:
    return sorted(luns(nvmet).values())


def portals(nvmet: Nvmet) -> list[str]:
    return sorted(os.listdir(nvmet.path(group(nvmet)) / "np"))


def attribute(path: Path) -> str:
    return path.read_text().strip()


def shown(run: Run) -> storagetm.Report:
    return storagetm.take_report(
        storagetm.Machine(),
        run.exporter.transports,
        run.held,
        run.inventory.exports.values(),
        run.exporter.memory,
    )


def notes(run: Run) -> list[str]:
    return [fact.text for fact in shown(run).facts() if fact.kind == "note"]


def calls_since(nvmet: Nvmet, before: int, part: str = "target/") -> list[str]:
    within = re.compile(rf"target/iscsi/{re.escape(stem())}\.[0-9a-z]{{4}}/")
    return [within.sub("", call) for call in nvmet.calls[before:] if part in call]


# From start to stop


@pytest.mark.parametrize(
    ("access", "clients"), [(READ_ONLY, -1), (READ_ONLY, 0), (SNAPSHOT, 0), (READ_WRITE, 0)]
)
def test_disks_are_there_before_anybody_is_let_in(
    start: Start, nvmet: Nvmet, access: str, clients: int
) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc", access=access, clients=clients)
    run.synchronise()
    assert names(nvmet) == ["vdb", "vdc"]
    calls = calls_since(nvmet, 0)
    assert calls[-1] == "write tpgt_1/enable 1"
    assert sum(call.startswith("symlink") for call in calls) == 2
    assert portals(nvmet) == ["[::]:3260"]
    inside = nvmet.path(group(nvmet))
    assert attribute(inside / "enable") == "1"
    assert attribute(inside / "attrib/authentication") == "0"
    assert attribute(inside / "attrib/generate_node_acls") == "1"
    assert attribute(inside / "attrib/demo_mode_write_protect") == str(int(access == READ_ONLY))
    for name in ("vdb", "vdc"):
        info = attribute(backstore(nvmet, name) / "info")
        assert re.search(r"ACTIVATED .* UDEV PATH: /dev/dm-\d  readonly: (\d)", info, re.DOTALL)
        assert f"readonly: {int(access == READ_ONLY)}\n" in info
        assert attribute(backstore(nvmet, name) / "attrib/emulate_3pc") == "0"
        assert attribute(backstore(nvmet, name) / "attrib/emulate_pr") == str(int(access != READ_ONLY))
    run.synchronise()
    assert calls_since(nvmet, 0) == calls
    assert run.stop()
    assert nvmet.contents() == before
    ended = calls_since(nvmet, 0)[len(calls) :]
    assert ended[0] == "write tpgt_1/enable 0"


@pytest.mark.parametrize(
    ("access", "table"),
    [
        (READ_ONLY, r"0 \d+ flakey 254:16 0 0 1 1 error_writes"),
        (SNAPSHOT, r"0 \d+ snapshot 254:16 MEMORY PO \d+"),
        (READ_WRITE, r"0 \d+ linear 254:16 0"),
    ],
)
def test_device_of_ours_is_between(start: Start, nvmet: Nvmet, access: str, table: str) -> None:
    run = start("/dev/vdb", access=access, clients=0)
    run.synchronise()
    ((path, mapping),) = ((p, t) for p, t in nvmet.contents().items() if re.fullmatch(r"dm/[^/]+", p))
    assert re.fullmatch(table, mapping)
    info = nvmet.contents()[str((backstore(nvmet, "vdb") / "info").relative_to(nvmet.root))]
    assert f"UDEV PATH: /dev/mapper/{path[3:]} " in info
    assert run.stop()


def test_device_of_ours_is_claimed_by_the_kernel_alone(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    """It could not if this process had done so before."""
    run = start("/dev/vdb", access=READ_WRITE, clients=0)
    run.synchronise()
    run.exporter.tree.guard()
    assert lio.claims == {}
    (node,) = map(lio.node, lio.backstores())
    assert lio.claim("x", node) == errno.EBUSY
    run.kill()
    run = start("/dev/vdb", access=READ_WRITE, clients=0)
    run.synchronise()
    run.exporter.tree.guard()
    assert lio.claims == {}
    assert names(nvmet) == ["vdb"]
    assert run.stop()


def test_what_the_client_is_told_of_a_disk(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", "/dev/sda")
    run.disk("vdb").disk.model = "Grün & Söhne_Disk"
    run.synchronise()
    wwn = backstore(nvmet, "vdb") / "wwn"
    assert attribute(wwn / "vendor_id") == "Gr"
    assert attribute(wwn / "product_id") == "n & S hne Disk"
    assert attribute(wwn / "revision") == "0001"
    serials = {attribute(backstore(nvmet, name) / "wwn/vpd_unit_serial") for name in ("vdb", "sda")}
    assert len(serials) == 2
    assert all(re.fullmatch(f"{UNIT_SERIAL}(.+-)?[0-9a-f]{{16}}", serial) for serial in serials)
    assert {UNIT_SERIAL + run.iscsi.serial_shown(run.disk(n)) for n in ("vdb", "sda")} == serials


@pytest.mark.parametrize("access", [SNAPSHOT, READ_WRITE])
def test_writable_disk_is_for_any_number_of_clients_or_none(
    start: Start, nvmet: Nvmet, access: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """iSCSI cannot keep a disk for one client at a time."""
    run = start("/dev/vdb", access=access)
    run.synchronise(strict=False)
    why = run.disk("vdb").why_not
    assert why == (
        "it can be written to, and iSCSI cannot keep it for one client at a time; see --clients=any, and "
        "attach it to one machine only"
    )
    assert luns(nvmet) == {}
    assert "Traceback" not in capfd.readouterr().err
    assert run.stop()


@pytest.mark.parametrize("access", [SNAPSHOT, READ_WRITE])
def test_start_with_no_other_way_for_a_disk_is_refused(start: Start, nvmet: Nvmet, access: str) -> None:
    """At once, where it was named; another transport may take it."""
    why = "Failed to export '/dev/vdb': it can be written to, and iSCSI cannot keep it for one client"
    for transports in (["iscsi"], ["nvme-tcp", "iscsi"]):
        run = start("/dev/vdb", access=access, transports=transports)
        run.disk("vdb").source.named = True
        if len(transports) == 1:
            with pytest.raises(storagetm.UserError, match=re.escape(why)):
                run.exporter.check()
            run.disk("vdb").source.named = False
        run.exporter.check()
        assert targets(nvmet) == []
        run.kill()
    run = start("/dev/vdb", access=access, clients=0)
    run.disk("vdb").source.named = True
    run.exporter.check()


def test_report_says_that_one_transport_refuses_a_disk(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", access=READ_WRITE, transports=("nvme-tcp", "iscsi"))
    run.synchronise()
    assert list(run.disk("vdb").live) == ["nvme-tcp"]
    (note,) = (text for text in notes(run) if "iscsi" in text)
    assert note.startswith("'/dev/vdb' is not exported over iscsi: it can be written to, and iSCSI cannot")
    # Nothing would be attached by these.
    assert not [c.line for c in shown(run).commands if c.transport == "iscsi"]
    assert luns(nvmet) == {}
    assert run.stop()


def test_report_has_no_such_note_of_disks_that_go_by_both_ways(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", transports=("nvme-tcp", "iscsi"))
    run.synchronise()
    assert sorted(run.disk("vdb").live) == ["iscsi", "nvme-tcp"]
    assert not [text for text in notes(run) if "is not exported over" in text]
    assert names(nvmet) == ["vdb"]
    assert run.stop()


@pytest.mark.parametrize("access", [READ_ONLY, READ_WRITE])
def test_restart_after_a_kill_changes_nothing(start: Start, nvmet: Nvmet, access: str) -> None:
    first = start("/dev/vdb", "/dev/vdc", access=access, clients=0)
    first.synchronise()
    before, known = nvmet.contents(), luns(nvmet)
    first.kill()
    calls = len(nvmet.calls)
    second = start("/dev/vdb", "/dev/vdc", access=access, clients=0)
    assert second.exporter.opened
    second.synchronise()
    assert nvmet.calls[calls:] == []
    assert nvmet.contents() == before
    assert luns(nvmet) == known
    second.kill()
    third = start("/dev/vdb", access=access, clients=0)
    third.synchronise()
    assert list(luns(nvmet).values()) == ["vdb"]
    assert third.stop()
    assert not [p for p in nvmet.contents() if p.startswith(("target/core/", "target/iscsi/iqn", "dm/"))]


def test_disk_is_added_and_removed_while_others_are_used(
    start: Start, nvmet: Nvmet, machine: CapturedMachine
) -> None:
    plug = unplug(machine, "vdc")
    run = start()
    run.synchronise()
    before, contents = luns(nvmet), nvmet.contents()
    assert "vdc" not in before.values()
    calls = len(nvmet.calls)
    plug("4711")
    run.update("vdc")
    (number,) = (n for n, name in luns(nvmet).items() if name == "vdc")
    assert luns(nvmet) == {**before, number: "vdc"}
    made = calls_since(nvmet, calls)
    assert not [call for call in made if "enable 0" in call or "rmdir" in call or "unlink" in call]
    calls = len(nvmet.calls)
    unplug(machine, "vdc")
    run.update("vdc")
    assert luns(nvmet) == before
    assert nvmet.contents() == contents
    assert [call.split()[0] for call in calls_since(nvmet, calls)] == ["unlink", "rmdir", "rmdir"]
    assert run.stop()


def test_disk_that_returns_has_another_lun(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """A session that goes on would take it for what was there before."""
    run = start()
    run.synchronise()
    (number,) = (n for n, name in luns(nvmet).items() if name == "vdb")
    plug = unplug(machine, "vdb")
    run.update("vdb")
    assert number not in luns(nvmet)
    plug("4711")
    run.update("vdb")
    (later,) = (n for n, name in luns(nvmet).items() if name == "vdb")
    assert later != number
    run.kill()
    run = start()
    run.synchronise()
    assert luns(nvmet)[later] == "vdb"
    assert run.stop()


# Ports and addresses


@pytest.mark.parametrize("taken", ["0.0.0.0:3260", "[::]:3260", "192.0.2.7:3260"])
def test_next_port_is_used_where_one_is_taken(
    start: Start, nvmet: Nvmet, lio: Lio, taken: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel says EINVAL, whatever it was."""
    lio.taken.add(taken)
    run = start("/dev/vdb")
    run.synchronise()
    assert portals(nvmet) == ["[::]:3261"]
    assert capfd.readouterr().err == "TCP port 3260 is taken, using 3261 for iSCSI\n"
    assert run.iscsi.port == 3261
    assert names(nvmet) == ["vdb"]
    assert any(" -p 192.0.2.7:3261 " in f"{c.line} " for c in shown(run).commands)
    run.kill()
    lio.taken.clear()
    calls = len(nvmet.calls)
    run = start("/dev/vdb")
    run.synchronise()
    assert nvmet.calls[calls:] == []  # clients know it by now
    assert run.iscsi.port == 3261
    assert run.stop()


def test_port_that_comes_to_be_taken_ends_the_search(
    start: Start, nvmet: Nvmet, lio: Lio, capfd: pytest.CaptureFixture[str]
) -> None:
    lio.taken.update(f"[::]:{3260 + i}" for i in range(17))
    run = start("/dev/vdb")
    run.synchronise()
    assert portals(nvmet) == []
    assert (
        "TCP port 3276 is taken at :: by another program: iSCSI is not offered there"
        in capfd.readouterr().err
    )
    assert run.stop()


def test_port_that_was_asked_for_is_the_only_one(
    start: Start, nvmet: Nvmet, lio: Lio, capfd: pytest.CaptureFixture[str]
) -> None:
    run = start("/dev/vdb", port=860)
    run.synchronise()
    assert portals(nvmet) == ["[::]:860"]
    assert run.stop()
    lio.taken.add("0.0.0.0:860")
    before = nvmet.contents()
    run = start("/dev/vdb", port=860)
    run.synchronise()
    assert portals(nvmet) == []
    assert capfd.readouterr().err == (
        "TCP port 860 is taken at :: by another program: iSCSI is not offered there; stop that and "
        "start storagetm again, or give another --port\n"
    )
    (way,) = shown(run).ways
    assert way.shut == "TCP port 860 is taken by another program"
    assert way.effect == "no disk can be attached by iSCSI yet"
    assert shown(run).commands == []
    assert run.stop()
    assert nvmet.contents() == before


def test_port_is_for_the_first_transport_where_there_are_two(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", port=4711, transports=("nvme-tcp", "iscsi"))
    run.synchronise()
    assert portals(nvmet) == ["[::]:3260"]
    assert run.stop()


def test_port_of_another_target_is_left_to_it(
    start: Start, nvmet: Nvmet, lio: Lio, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel would have both share it, and for IPv6 listen nowhere. Clients that know ours keep it."""
    lio.foreign("iqn.2003-01.org.example:x", portal="[::]:3260")
    lio.foreign("iqn.2003-01.org.example:y", portal="0.0.0.0:3261")
    before = nvmet.contents()
    run = start("/dev/vdb")
    run.synchronise()
    assert portals(nvmet) == ["[::]:3262"]
    assert capfd.readouterr().err == (
        "TCP port 3260 is taken, using 3261 for iSCSI\nTCP port 3261 is taken, using 3262 for iSCSI\n"
    )
    run.kill()
    lio.foreign("iqn.2003-01.org.example:z", portal="192.0.2.7:3263")
    lio.remove(lio.path("target/iscsi/iqn.2003-01.org.example:x"))
    calls = len(nvmet.calls)
    run = start("/dev/vdb")
    run.synchronise()
    assert nvmet.calls[calls:] == []
    assert run.iscsi.port == 3262
    assert run.stop()
    lio.remove(lio.path("target/iscsi/iqn.2003-01.org.example:z"))
    lio.foreign("iqn.2003-01.org.example:x", portal="[::]:3260")
    run = start("/dev/vdb", port=3261)
    run.synchronise()
    assert portals(nvmet) == []
    assert run.stop()
    assert nvmet.contents() == before


def test_addresses_are_those_that_were_asked_for(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", listen=["192.0.2.7", "fe80::7", "198.51.100.1"])
    run.synchronise()
    assert portals(nvmet) == ["192.0.2.7:3260", "[fe80::7%eth0]:3260"]
    assert "198.51.100.1 is no address of this machine yet" in notes(run)
    calls = len(nvmet.calls)
    run.held = [*HELD, Address(AF_INET, "198.51.100.1", "eth1", False)]
    assert run.exporter.want.follow(lambda: run.held)
    run.synchronise(strict=False)
    assert portals(nvmet) == ["192.0.2.7:3260", "198.51.100.1:3260", "[fe80::7%eth0]:3260"]
    assert calls_since(nvmet, calls) == ["mkdir tpgt_1/np/198.51.100.1:3260"]
    calls = len(nvmet.calls)
    run.held = [FOUR]
    assert run.exporter.want.follow(lambda: run.held)
    run.synchronise(strict=False)
    assert portals(nvmet) == ["192.0.2.7:3260"]
    assert all(call.startswith("rmdir") for call in calls_since(nvmet, calls))
    assert not run.exporter.want.follow(lambda: run.held)
    assert run.stop()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["0.0.0.0"], ["0.0.0.0:3260"]),
        (["eth0"], ["192.0.2.7:3260", "[2001:db8::7]:3260", "[fe80::7%eth0]:3260"]),
        (["::"], ["[2001:db8::7]:3260", "[fe80::7%eth0]:3260"]),
    ],
)
def test_words_stand_for_addresses(
    start: Start, nvmet: Nvmet, words: list[str], expected: list[str]
) -> None:
    run = start("/dev/vdb", listen=words)
    run.synchronise()
    assert portals(nvmet) == expected
    assert run.stop()


def test_address_at_which_the_port_is_taken_is_left_out(
    start: Start, nvmet: Nvmet, lio: Lio, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where clients may know the port already."""
    run = start("/dev/vdb", listen=["192.0.2.7"])
    run.synchronise()
    run.kill()
    lio.taken.add("[2001:db8::7]:3260")
    run = start("/dev/vdb", listen=["192.0.2.7", "2001:db8::7"])
    run.synchronise()
    assert portals(nvmet) == ["192.0.2.7:3260"]
    text = "TCP port 3260 is taken at 2001:db8::7 by another program: iSCSI is not offered there"
    assert text in capfd.readouterr().err
    assert text in notes(run)
    assert run.stop()


def test_address_that_has_gone_is_left_out(
    start: Start, nvmet: Nvmet, lio: Lio, capfd: pytest.CaptureFixture[str]
) -> None:
    lio.absent.add("2001:db8::7")
    run = start("/dev/vdb", listen=["192.0.2.7", "2001:db8::7"])
    run.synchronise()
    assert portals(nvmet) == ["192.0.2.7:3260"]
    assert capfd.readouterr().err == ""
    assert run.stop()


def test_machine_without_ipv6(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    machine.path("/proc/net/if_inet6").unlink()
    run = start("/dev/vdb", held=[FOUR])
    run.synchronise()
    assert portals(nvmet) == ["0.0.0.0:3260"]
    assert [c.address for c in shown(run).commands] == ["192.0.2.7", "192.0.2.7"]
    assert run.stop()


def test_sockets_for_ipv6_alone_need_one_for_ipv4(
    start: Start, nvmet: Nvmet, lio: Lio, machine: CapturedMachine
) -> None:
    """Where the administrator has all of them so (net.ipv6.bindv6only)."""
    lio.ipv6_only = True
    machine.write("/proc/sys/net/ipv6/bindv6only", "1\n")
    run = start("/dev/vdb")
    run.synchronise()
    assert portals(nvmet) == ["0.0.0.0:3260", "[::]:3260"]
    assert {c.address for c in shown(run).commands} == {at.text for at in HELD}
    assert run.stop()


@pytest.mark.parametrize(
    ("listening", "text", "code"),
    [
        ("127.0.0.1", "127.0.0.1", errno.EADDRINUSE),
        ("127.0.0.1", "0.0.0.0", errno.EADDRINUSE),
        ("0.0.0.0", "127.0.0.1", errno.EADDRINUSE),
        ("127.0.0.1", "127.0.0.2", 0),
        ("", "127.0.0.1", 0),
        ("", "192.0.2.7", errno.EADDRNOTAVAIL),
        ("", "fe80::7%nothing", errno.EADDRNOTAVAIL),
    ],
)
def test_what_is_wrong_at_an_address_is_found_out(listening: str, text: str, code: int) -> None:
    """With real sockets, at a port that was free a moment ago."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((listening or "127.0.0.1", 0))
        port = other.getsockname()[1]
        if listening:
            other.listen()
        else:
            other.close()
        assert storagetm.why_no_listener(text, port) == code


def test_portal_for_which_no_reason_is_found_ends_the_start(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb")

    def intercept(number: int) -> None:
        if "/np/" in nvmet.calls[number]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    nvmet.intercept = intercept
    with pytest.raises(storagetm.UserError, match=r"np/\[::\]:3260': Invalid argument$"):
        run.synchronise()
    nvmet.succeed()
    assert run.stop()
    assert nvmet.contents() == before
    assert lio.backstores() == []


# What others have set up


def test_target_of_that_name_is_left_alone(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    run = start("/dev/vdb")
    run.synchronise()
    name = os.path.basename(target(nvmet))
    assert run.stop()
    run.kill()
    lio.foreign(name, portal="192.0.2.7:3260")
    before = nvmet.contents()
    run = start("/dev/vdb")
    why = rf"another program made the iSCSI target '{re.escape(name)}'; remove it, or give another --nqn$"
    with pytest.raises(storagetm.UserError, match=why):
        run.synchronise()
    assert run.stop()
    assert nvmet.contents() == before


def test_adapter_of_that_number_is_left_alone(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    run = start("/dev/vdb")
    taken = run.iscsi.store
    run.kill()
    lio.foreign(adapter=taken)
    lio.make(f"{taken}/disk")
    before = nvmet.contents()
    run = start("/dev/vdb")
    run.synchronise()
    assert names(nvmet) == ["vdb"]
    assert run.iscsi.store != taken
    assert backstore(nvmet, "vdb").parent == nvmet.path(run.iscsi.store)
    other = run.iscsi.store
    run.kill()
    calls = len(nvmet.calls)
    run = start("/dev/vdb")
    run.synchronise()
    assert nvmet.calls[calls:] == []
    assert run.iscsi.store == other
    assert run.stop()
    assert nvmet.contents() == before


def test_backstore_of_others_that_has_the_device(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    """Or whatever else on this machine has claimed it meanwhile."""
    assert nvmet.mapper
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc")
    minors: set[str] = nvmet.mapper.claimed

    def intercept(number: int) -> None:
        if (
            nvmet.calls[number].startswith("write target/core/")
            and "udev_path=/dev/dm-0" in nvmet.calls[number]
        ):
            minors.add("252:0")

    nvmet.intercept = intercept
    run.synchronise(strict=False)
    nvmet.succeed()
    (failed,) = (e for e in run.inventory.exports.values() if e.failed)
    assert str(failed.failed["iscsi"]) == (
        "something on this machine has it for itself; end that, or leave out --transport=iscsi"
    )
    assert failed.why_not == str(failed.failed["iscsi"])
    assert names(nvmet) == sorted({"vdb", "vdc"} - {failed.disk.name})
    assert len(lio.backstores()) == 1
    minors.clear()
    assert run.stop()
    assert nvmet.contents() == before


def test_what_others_have_made_stays(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    lio.foreign("iqn.2003-01.org.example:x", "target/core/iblock_0", "192.0.2.7:4711")
    lio.make("target/core/iblock_0/disk")
    os.mkdir(nvmet.path("target/iscsi/iqn.2003-01.org.example:x/tpgt_1/lun/lun_0"))
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    after = nvmet.contents()
    assert before.items() <= after.items()
    run.kill()
    run = start("/dev/vdb")
    run.synchronise()
    assert run.stop()
    assert nvmet.contents() == before


def test_target_that_others_made_in_its_place_stays(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    """While the program was dead."""
    run = start("/dev/vdb")
    run.synchronise()
    run.kill()
    name = os.path.basename(target(nvmet))
    lio.foreign("iqn.2003-01.org.example:x")  # made beside ours, so that no number is given twice
    place = nvmet.path(target(nvmet))
    lio.remove(place)
    nvmet.path("target/iscsi/iqn.2003-01.org.example:x").rename(place)
    (place / "tpgt_1/enable").write_text("1\n")
    run = start("/dev/vdb")
    with pytest.raises(
        storagetm.UserError, match=f"another program made the iSCSI target '{re.escape(name)}'"
    ):
        run.synchronise()
    assert run.stop()
    assert targets(nvmet) == [f"target/iscsi/{name}"]
    assert attribute(place / "tpgt_1/enable") == "1"


def test_kernel_without_lio(start: Start, nvmet: Nvmet, lio: Lio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storagetm, "prepare_configfs", lambda: None)
    lio.remove(nvmet.path("target"))
    run = start("/dev/vdb")
    why = (
        r"^This kernel \(.+\) has no iSCSI target \(No such file or directory\), or its module "
        r"'iscsi_target_mod' is missing; boot one with CONFIG_ISCSI_TARGET, or leave out --transport=iscsi$"
    )
    with pytest.raises(storagetm.UserError, match=why):
        run.iscsi.prepare()


def test_fabric_is_made_where_it_is_missing(
    start: Start, nvmet: Nvmet, lio: Lio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has the kernel load the module, too."""
    monkeypatch.setattr(storagetm, "prepare_configfs", lambda: None)
    lio.remove(nvmet.path("target/iscsi"))
    run = start("/dev/vdb")
    run.iscsi.prepare()
    assert nvmet.path("target/iscsi").is_dir()
    run.iscsi.prepare()
    run.synchronise()
    assert names(nvmet) == ["vdb"]
    assert run.stop()


@pytest.mark.parametrize("access", [READ_ONLY, READ_WRITE])
def test_old_kernel(start: Start, nvmet: Nvmet, lio: Lio, access: str) -> None:
    """It cannot be told of the vendor, and calls it an error to enable what is enabled."""
    lio.old = True
    before = nvmet.contents()
    run = start("/dev/vdb", access=access, clients=0)
    run.synchronise()
    assert not (backstore(nvmet, "vdb") / "wwn/vendor_id").exists()
    run.kill()
    calls = len(nvmet.calls)
    run = start("/dev/vdb", access=access, clients=0)
    run.synchronise()
    assert nvmet.calls[calls:] == []
    nvmet.path(f"{group(nvmet)}/enable").write_text("0\n")
    assert run.stop()
    assert nvmet.contents() == before


# Kills and failures


def whole(access: str = READ_ONLY, *paths: str, admission: Admission | None = None) -> None:
    """A start of the program, up to the loop."""
    run = Run(*(paths or ("/dev/vdb", "/dev/vdc")), access=access, clients=0, admission=admission)
    run.synchronise()
    run.kill()


def ended(admission: Admission | None = None) -> None:
    run = Run("/dev/vdb", "/dev/vdc", clients=0, admission=admission)
    assert run.stop()


def paired(code: Code = CODE) -> Admission:
    return Admission(code=code)


@pytest.mark.parametrize(
    ("access", "admission"),
    [(READ_ONLY, None), (READ_ONLY, paired()), (SNAPSHOT, None), (READ_WRITE, None)],
    ids=["read-only", "paired", "snapshot", "read-write"],
)
def test_crash_while_all_is_made_is_recovered(
    nvmet: Nvmet, lio: Lio, access: str, admission: Admission | None
) -> None:
    """Killed before each system call in turn; then started again, or only stopped."""
    before = nvmet.contents()
    whole(access, admission=admission)
    complete = nvmet.contents()
    ended(admission)
    assert nvmet.contents() == before
    number = 0
    while nvmet.run_and_kill_at(number, lambda: whole(access, admission=admission)):
        enabled = [attribute(path / "enable") for path in groups(nvmet)]
        if number % 2:
            # What let nobody in waits for disks as the first start would have done.
            run = Run("/dev/vdb", "/dev/vdc", access=access, clients=0, admission=admission)
            assert run.exporter.opened == (enabled == ["1"]), number
            run.synchronise()
            run.kill()
            assert nvmet.contents() == complete
        ended(admission)
        assert nvmet.contents() == before
        number += 1
    # The adapter; target and group, three attributes, enable; portal; for each disk ten and what is between.
    assert number >= 1 + 6 + 1 + 2 * (10 + 3)
    assert lio.backstores()


def test_crash_while_all_is_removed_is_recovered(nvmet: Nvmet, lio: Lio) -> None:
    before = nvmet.contents()
    whole()
    complete = nvmet.contents()
    number = 0
    while nvmet.run_and_kill_at(number, ended):
        if number % 2:
            whole()
            assert nvmet.contents() == complete
        ended()
        assert nvmet.contents() == before
        whole()
        number += 1
    assert number >= 1 + 2 * 4 + 1 + 2 + 1
    assert lio.backstores() == []


@pytest.mark.parametrize(
    "other", [("/dev/vdb", "/dev/vdc", "/dev/vdd"), ("/dev/vdb",), ("/dev/vdb", "/dev/vdd")]
)
def test_crash_while_disks_come_and_go_is_recovered(nvmet: Nvmet, lio: Lio, other: Sequence[str]) -> None:
    before = nvmet.contents()
    number = 0
    while True:
        whole()
        if not nvmet.run_and_kill_at(number, lambda: whole(READ_ONLY, *other)):
            break
        # What stays is there all the time.
        assert "vdb" in names(nvmet)
        assert attribute(nvmet.path(group(nvmet)) / "enable") == "1"
        if number % 2:
            whole(READ_ONLY, *other)
            assert names(nvmet) == [os.path.basename(path) for path in other]
        ended()
        assert nvmet.contents() == before
        number += 1
    assert names(nvmet) == [os.path.basename(path) for path in other]
    assert number > 3
    assert len(lio.backstores()) == len(other)


@pytest.mark.parametrize("access", [READ_ONLY, READ_WRITE])
def test_failure_at_each_step_is_made_up_for(start: Start, nvmet: Nvmet, access: str) -> None:
    """Nothing is left of what failed, all else is there. Another try has it all, a stop leaves nothing."""
    before = nvmet.contents()
    run = start("/dev/vdb", "/dev/vdc", access=access, clients=0)
    run.synchronise()
    complete = nvmet.contents()
    calls = len(nvmet.calls)
    assert run.stop()
    run.kill()
    told = set()
    for number in range(calls):
        run = start("/dev/vdb", "/dev/vdc", access=access, clients=0)
        nvmet.fail_at(number)
        first = len(nvmet.calls)
        try:
            run.synchronise()
        except storagetm.UserError:
            # The target itself: at the start this is the end.
            nvmet.succeed()
            assert run.stop()
            assert nvmet.contents() == before
            run.kill()
            continue
        nvmet.succeed()
        failing = nvmet.calls[first + number]
        if re.fullmatch("write target/iscsi/.*/tpgt_1/enable 1", failing):
            # With all disks in it the target stays, and is enabled at once.
            assert nvmet.contents() == complete
            assert run.stop()
            run.kill()
            continue
        (failed,) = (e for e in run.inventory.exports.values() if e.failed)
        told.add(failed.disk.name)
        assert names(nvmet) == sorted({"vdb", "vdc"} - {failed.disk.name}), failing
        failed.failed.clear()
        run.synchronise(strict=False)
        assert nvmet.contents() == complete, failing
        assert run.stop()
        assert nvmet.contents() == before
        run.kill()
    assert told == {"vdb", "vdc"}


def test_failure_while_all_goes_is_made_up_for(start: Start, nvmet: Nvmet) -> None:
    """A stop tries each step more than once."""
    before = nvmet.contents()
    whole()
    calls = len(nvmet.calls)
    ended()
    steps = len(nvmet.calls) - calls
    assert steps >= 13
    for number in range(steps):
        whole()
        run = start("/dev/vdb", "/dev/vdc")
        nvmet.fail_at(number)
        assert run.stop()
        nvmet.succeed()
        assert nvmet.contents() == before
        run.kill()


# What changes under a restart


@pytest.mark.parametrize(
    ("model", "serial"),
    [("My disk: the 2nd", "A1"), ("Model", "AB: CD"), (" x ", " 1 "), ("T10 VPD Unit Serial Number: x", "")],
)
def test_restart_changes_nothing_whatever_a_disk_is_called(
    start: Start, nvmet: Nvmet, model: str, serial: str
) -> None:
    def begin() -> Run:
        run = start("/dev/vdb")
        run.disk("vdb").disk.model, run.disk("vdb").disk.serial = model, serial
        run.synchronise()
        return run

    begin().kill()
    calls = len(nvmet.calls)
    run = begin()
    assert nvmet.calls[calls:] == []
    assert run.stop()


def test_disk_with_another_name_is_another_one_to_clients(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb")
    run.synchronise()
    run.kill()
    run = start("/dev/vdb")
    run.disk("vdb").disk.model = "Another model"
    run.synchronise()
    assert attribute(backstore(nvmet, "vdb") / "wwn/product_id") == "model"
    assert run.stop()


@pytest.mark.parametrize(
    ("first", "second"), [(READ_ONLY, READ_WRITE), (READ_WRITE, SNAPSHOT), (READ_WRITE, READ_ONLY)]
)
def test_restart_with_another_access_has_another_device(
    start: Start, nvmet: Nvmet, lio: Lio, first: str, second: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb", access=first, clients=0)
    run.synchronise()
    run.kill()
    run = start("/dev/vdb", access=second, clients=0)
    run.synchronise()
    assert f"readonly: {int(second == READ_ONLY)}\n" in attribute(backstore(nvmet, "vdb") / "info")
    protected = attribute(nvmet.path(group(nvmet)) / "attrib/demo_mode_write_protect")
    assert protected == str(int(second == READ_ONLY))
    assert len(lio.backstores()) == 1
    assert sum(bool(re.fullmatch("dm/[^/]+", path)) for path in nvmet.contents()) == 1
    assert capfd.readouterr().err == ""
    assert run.stop()
    assert nvmet.contents() == before


def test_transport_that_is_added_finds_the_disk_free(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    """Its device is one that the run before had claimed, and that this one leaves to the kernel."""
    run = start("/dev/vdb", transports=("iscsi", "nvme-tcp"))
    run.exporter.transports.remove(run.iscsi)  # type: ignore[attr-defined]
    run.synchronise()
    assert [*lio.claims.values()] == ["/dev/dm-0"]
    run.kill()
    run = start("/dev/vdb", transports=("nvme-tcp", "iscsi"))
    run.synchronise()
    run.exporter.tree.guard()
    assert names(nvmet) == ["vdb"]
    assert lio.claims == {}
    run.kill()
    run = start("/dev/vdb", transports=("iscsi", "nvme-tcp"))
    run.exporter.transports.remove(run.iscsi)  # type: ignore[attr-defined]
    run.synchronise()
    run.exporter.tree.guard()
    assert lio.backstores() == []
    assert [*lio.claims.values()] == ["/dev/dm-0"]
    assert run.stop()


@pytest.mark.parametrize("access", [SNAPSHOT, READ_WRITE])
def test_device_that_the_kernel_does_not_claim_is_claimed(
    start: Start, nvmet: Nvmet, lio: Lio, access: str
) -> None:
    """Of disks that iSCSI refuses, since it exports none of them."""
    paths = "/dev/vdb", "/dev/nvme0n1"
    run = start(*paths, access=access, transports=("nvme-tcp", "iscsi"))
    run.synchronise()
    assert all(list(run.disk(os.path.basename(path)).live) == ["nvme-tcp"] for path in paths)
    assert lio.backstores() == []
    used = {text for path, text in nvmet.contents().items() if path.endswith("/device_path")}
    assert len(used) == 2
    claimed = {nvmet.mapper.name_of(node) if "dm-" in node else node for node in lio.claims.values()}  # type: ignore[union-attr]
    assert {node.rpartition("/")[2] for node in used} == {node.rpartition("/")[2] for node in claimed}
    assert run.stop()


# LUNs


def test_luns_stay_over_restarts_and_are_never_given_again(
    start: Start, nvmet: Nvmet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storagetm, "RETURN_WAIT_SEC", 0)
    paths = [str(tmp_path / f"i{number:03}") for number in range(4)]
    for path in paths:
        Path(path).write_bytes(bytes(512))
    run = start(*paths)
    run.synchronise()
    known = luns(nvmet)
    assert sorted(known.values()) == ["i000", "i001", "i002", "i003"]
    assert run.stop()
    run.kill()
    run = start(*paths[2:])
    run.synchronise()
    assert luns(nvmet) == {n: name for n, name in known.items() if name in ("i002", "i003")}
    run.kill()
    Path(paths[0]).unlink()
    Path(paths[0]).write_bytes(bytes(512))
    os.utime(paths[0], (1, 1))
    run = start(*paths)
    run.synchronise()
    (number,) = (n for n, name in luns(nvmet).items() if name == "i000")
    assert number not in known
    assert run.stop()


def test_256th_disk_has_no_lun(start: Start, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storagetm.Stays, "PLACES", 2)
    run = start("/dev/vdb", "/dev/vdc", "/dev/vdd")
    run.synchronise(strict=False)
    run.synchronise(strict=False)
    assert sorted(luns(nvmet)) == [0, 1]
    (left,) = {"vdb", "vdc", "vdd"} - set(luns(nvmet).values())
    assert run.disk(left).why_not == "no LUN is left; boot this machine again"
    assert run.stop()


@given(st.lists(st.integers(1, storagetm.NSID_MAX), unique=True, max_size=300))
@example(list(range(1, 301)))
@example([n * 255 for n in range(1, 257)])
def test_places_are_given_once(numbers: list[int]) -> None:
    stays = storagetm.Stays()
    places = [stays.free_place(number) for number in numbers]
    given_ = [place for place in places if place >= 0]
    assert len(set(given_)) == len(given_) == min(len(numbers), stays.PLACES)
    assert all(0 <= place < stays.PLACES for place in given_)
    assert places[stays.PLACES :] == [-1] * (len(numbers) - len(given_))
    again = storagetm.Stays()
    assert [again.free_place(number) for number in numbers] == places


def test_place_follows_from_the_number() -> None:
    """So that after a reboot most disks have the LUN that they had."""
    stays = storagetm.Stays()
    assert [stays.free_place(number) for number in (7, 255, 262, 8)] == [7, 0, 8, 9]
    assert stays.free_place(254) == 254
    assert stays.free_place(509) == 1


def reboot(machine: CapturedMachine) -> None:
    """All that /run had is forgotten, and all disks have come anew, as the kernel counts them."""
    number = len(list(machine.root.glob("boots/*"))) + 1
    machine.write(f"/boots/{number}", "")
    machine.write("/proc/sys/kernel/random/boot_id", f"{number}\n")
    for path in Path(storagetm.RUN).glob("*"):
        path.unlink()
    for index, name in enumerate(("vdb", "vdc", "vdd", "sda")):
        unplug(machine, name)(str(1000 * number + index))


def name_of(run: Run, nvmet: Nvmet) -> str:
    """The target's name, once it is there."""
    run.synchronise()
    name = os.path.basename(target(nvmet))
    assert name == run.iscsi.iqn
    return name


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_target_has_its_luns_again_after_another_boot_and_another_name(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, access: str
) -> None:
    """With the same disks, whatever their order is: others that come later may have their LUNs."""
    found, names = set(), set()
    for paths in (["/dev/vdb", "/dev/vdc", "/dev/sda"], ["/dev/sda", "/dev/vdc", "/dev/vdb"]):
        reboot(machine)
        run = start(*paths, access=access, clients=0)
        name = name_of(run, nvmet)
        names.add(name)
        found.add(tuple((n, run.disk(x).disk.identity()) for n, x in sorted(luns(nvmet).items())))
        assert run.stop()
        # The kernel may find them in another order, too.
        entries = [machine.path(f"/run/udev/data/b254:{minor}") for minor in (16, 32)]
        one, other = (entry.read_text() for entry in entries)
        entries[0].write_text(one.replace("DISK-ALPHA", "DISK-BETA"))
        entries[1].write_text(other.replace("DISK-BETA", "DISK-ALPHA"))
    assert len(found) == 1
    assert len(names) == 2


def test_name_is_one_for_each_boot_within_which_no_lun_is_given_twice(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an initiator that comes back has the disks that it had, or none."""
    monkeypatch.setattr(storagetm, "RETURN_WAIT_SEC", 0)
    found: set[str] = set()
    for _ in range(3):
        reboot(machine)
        here: set[str] = set()
        known: dict[int, str] = {}
        for disks in (["vdb"], ["vdc"], ["sda"], ["vdb", "vdc"], ["vdd", "sda"], ["vdb", "vdc", "sda"]):
            run = start(*(f"/dev/{name}" for name in disks))
            here.add(name_of(run, nvmet))
            for number, name in luns(nvmet).items():
                assert known.setdefault(number, name) == name
            assert run.stop()
        assert len(here) == 1
        assert not here & found
        found |= here


def test_disk_without_a_lasting_serial_number_has_another_lun_once_it_has_been_away(
    start: Start, nvmet: Nvmet, machine: CapturedMachine
) -> None:
    """While it stays where it is, it is the same one."""
    run = start("/dev/vdb", "/dev/vdd")
    assert [run.disk(name).disk.lasts() for name in ("vdb", "vdd")] == [True, False]
    first, known = name_of(run, nvmet), luns(nvmet)
    assert run.stop()
    run = start("/dev/vdb", "/dev/vdd")
    assert (name_of(run, nvmet), luns(nvmet)) == (first, known)
    assert run.stop()
    unplug(machine, "vdd")("4711")
    run = start("/dev/vdb", "/dev/vdd")
    assert name_of(run, nvmet) == first
    (other,) = (number for number, name in luns(nvmet).items() if name == "vdd")
    assert other not in known
    assert run.stop()


def test_target_keeps_its_name_while_disks_come_and_go(
    start: Start, nvmet: Nvmet, machine: CapturedMachine
) -> None:
    plug = unplug(machine, "vdc")
    run = start()
    first, known = name_of(run, nvmet), luns(nvmet)
    assert "vdc" not in known.values()
    plug("4711")
    run.update("vdc")
    assert "vdc" in names(nvmet)
    assert name_of(run, nvmet) == first
    for name in known.values():
        unplug(machine, name)
        run.update(name)
    assert names(nvmet) == ["vdc"]
    assert name_of(run, nvmet) == first
    assert run.stop()
    run = start()
    assert name_of(run, nvmet) == first
    assert run.stop()


@pytest.mark.parametrize("boots", [False, True])
def test_target_of_the_run_before_stays(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, boots: bool
) -> None:
    """With other disks, too: clients have it, and none of its LUNs is given to another one.

    Even where it could not be told when that was.
    """
    run = start("/dev/vdb", "/dev/vdc")
    first, known = name_of(run, nvmet), luns(nvmet)
    inode = nvmet.path(group(nvmet)).stat().st_ino
    run.kill()
    if boots:
        machine.write("/proc/sys/kernel/random/boot_id", "another\n")
    run = start("/dev/vdb", "/dev/vdd")
    assert run.iscsi.iqn == first
    assert name_of(run, nvmet) == first
    assert nvmet.path(group(nvmet)).stat().st_ino == inode
    found = luns(nvmet)
    assert sorted(found.values()) == ["vdb", "vdd"]
    assert all(known.get(number, name) == name for number, name in found.items())
    assert run.stop()


def test_new_size_needs_no_step(start: Start, nvmet: Nvmet, machine: CapturedMachine) -> None:
    """The kernel asks the device each time."""
    run = start("/dev/vdb")
    run.synchronise()
    calls = len(nvmet.calls)
    machine.attribute("vdb", "size", "999999")
    run.update("vdb")
    assert calls_since(nvmet, calls) == []
    assert names(nvmet) == ["vdb"]
    assert run.stop()


@pytest.mark.parametrize(("discards", "expected"), [("0", "0"), ("4096", "1"), ("", "0")])
def test_clients_may_have_blocks_forgotten_where_the_disk_can(
    start: Start,
    nvmet: Nvmet,
    machine: CapturedMachine,
    monkeypatch: pytest.MonkeyPatch,
    discards: str,
    expected: str,
) -> None:
    assert nvmet.mapper
    create = nvmet.mapper._create

    def created(name: str, uuid: str) -> None:
        create(name, uuid)
        if discards:
            machine.attribute("dm-0", "queue/discard_max_bytes", discards)

    monkeypatch.setattr(nvmet.mapper, "_create", created)
    run = start("/dev/vdb", access=READ_WRITE, clients=0)
    run.synchronise()
    assert attribute(backstore(nvmet, "vdb") / "attrib/emulate_tpu") == expected
    assert run.stop()


# Names


NQNS = st.one_of(
    st.text(max_size=300),
    st.text().map(lambda text: f"nqn.2014-08.org.example:{text}"),
    st.from_regex(r"nqn\.\d{4}-\d\d\.[a-z.]{0,20}:[a-zA-Z0-9_.:-]{0,250}", fullmatch=True),
)


@given(NQNS, NQNS)
@example("foo", "nqn.2023-10.io.systemd:foo")
@example("nqn.2014-08.org.example:A", "nqn.2014-08.org.example:a")
@example("nqn.2014-08.org.example:a_b", "nqn.2014-08.org.example:a-b")
@example("nqn.2014-08.org.example:" + 300 * "x", "nqn.2014-08.org.example:" + 301 * "x")
@example("nqn.x", "nqn.x:")
def test_target_has_a_name_of_its_own(nqn: str, other: str) -> None:
    """It has the form and the characters of RFC 3720 (section 3.2.6.3.1), in lower case, and a length.

    What tells one boot from another has room behind it.
    """
    name = storagetm.iqn(nqn)
    assert re.fullmatch(r"iqn\.\d{4}-\d\d\.[a-z0-9.-]+:[a-z0-9.:-]*", name)
    assert len(name) + len(".k7fm") <= 223
    assert (storagetm.iqn(other) == name) == (nqn == other)


@pytest.mark.parametrize(
    ("nqn", "name"),
    [
        (
            "nqn.2014-08.org.nvmexpress:uuid:0d5e2ac1-0000-4000-8000-000000000001",
            "iqn.2014-08.org.nvmexpress:uuid:0d5e2ac1-0000-4000-8000-000000000001",
        ),
        ("nqn.2023-10.io.systemd:storagetm.1a2b", "iqn.2023-10.io.systemd:storagetm.1a2b"),
        ("nqn.2023-10.org.Example:x", "iqn.2023-10.org.example:x-ea7f3e15"),
        ("disk_1", "iqn.2023-10.io.systemd:disk-1-ecb8936d"),
    ],
)
def test_name_follows_from_the_nqn(nqn: str, name: str) -> None:
    assert storagetm.iqn(nqn) == name


def naa(serial: str) -> str:
    """What the kernel makes of it (spc_gen_naa_6h_vendor_specific()): its first 25 hexadecimal digits."""
    return "".join(c for c in serial if c in "0123456789abcdefABCDEF")[:25].lower()


@given(st.text(max_size=40), st.text(max_size=40), st.binary(min_size=16, max_size=16))
@example("ABCDEF0123456789ABCDEF", "ABCDEF0123456789ABCDEF0", bytes(16))
@example("WD-1", "DW-1", bytes(16))
@example("", " ", bytes(16))
def test_serial_number_is_the_disks_own_and_more(one: str, other: str, machine_id: bytes) -> None:
    iscsi = storagetm.Iscsi(Named(machine_id), "nqn.x")
    exports = [made_export("vda", serial=text, id_serial=text, tag=text) for text in (one, other)]
    serials = [iscsi.serial(export) for export in exports]
    for serial, text in zip(serials, (one, other)):
        assert len(serial) <= 253
        assert serial.isascii()
        assert serial.isprintable()
        assert serial == serial.strip()
        assert serial.startswith(storagetm.nvme_string(text, 20))
        assert len(naa(serial)) >= 16
    if one != other:
        assert serials[0] != serials[1]
        assert naa(serials[0]) != naa(serials[1])
    elsewhere = storagetm.Iscsi(Named(bytes(b ^ 1 for b in machine_id)), "nqn.x")
    assert naa(elsewhere.serial(exports[0])) != naa(serials[0])


def test_disks_with_the_same_serial_number_are_told_apart(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", "/dev/vdc")
    for name in ("vdb", "vdc"):
        run.disk(name).disk.serial = run.disk(name).disk.id_serial = "same"
    run.synchronise()
    serials = {attribute(backstore(nvmet, n) / "wwn/vpd_unit_serial") for n in names(nvmet)}
    assert len(serials) == 2
    assert run.stop()


# Who is let in


def test_secrets_follow_from_the_code() -> None:
    """Vectors for the manual page. Windows takes 12 to 16 letters, and two that differ."""
    secrets = [
        CODE.chap_secret(label).reveal().decode()
        for label in (storagetm.INITIATOR_SECRET, storagetm.TARGET_SECRET)
    ]
    assert secrets == ["2gdk63yrf2b94927", "k8w0k8vr2q5e31p1"]


@given(st.text(alphabet=storagetm.CODE_LETTERS, min_size=16, max_size=64))
def test_secrets_have_80_bits_and_differ(letters: str) -> None:
    code = Code.parse(letters)
    secrets = [
        code.chap_secret(label).reveal().decode()
        for label in (storagetm.INITIATOR_SECRET, storagetm.TARGET_SECRET)
    ]
    assert all(re.fullmatch(f"[{storagetm.CODE_LETTERS}]{{16}}", secret) for secret in secrets)
    assert len({*secrets, letters}) == 3
    assert "chap" not in repr([code.chap_secret(storagetm.INITIATOR_SECRET)])
    assert secrets[0] not in repr([code.chap_secret(storagetm.INITIATOR_SECRET)])


def secrets_of(code: Code) -> list[str]:
    labels = storagetm.INITIATOR_SECRET, storagetm.TARGET_SECRET
    return [code.chap_secret(label).reveal().decode() for label in labels]


def locked(nvmet: Nvmet, code: Code) -> list[str]:
    """What is wrong with a target that is for those who know a code; nothing if nobody else can come in."""
    found = []
    for path in groups(nvmet):
        if attribute(path / "enable") != "1":
            continue
        if attribute(path / "attrib/authentication") != "1":
            found.append("anybody is let in")
        for name, secret in zip(("password", "password_mutual"), secrets_of(code)):
            file = path / "auth" / name
            if file.read_text() != f"{secret}\n":
                found.append(f"{name} is another")
            if stat.S_IMODE(file.stat().st_mode) != 0o600:
                found.append(f"{name} can be read")
    return found


def test_only_who_knows_the_code_is_let_in(start: Start, nvmet: Nvmet) -> None:
    before = nvmet.contents()
    run = start("/dev/vdb", admission=paired())
    run.synchronise()
    auth = nvmet.path(group(nvmet)) / "auth"
    assert locked(nvmet, CODE) == []
    assert (auth / "userid").read_text() == "storagetm\n"
    assert (auth / "userid_mutual").read_text() == "storagetm-target\n"
    calls = calls_since(nvmet, 0)
    required = calls.index("write tpgt_1/attrib/authentication 1")
    assert max(i for i, call in enumerate(calls) if "/auth/" in call) < required
    assert required < calls.index("write tpgt_1/enable 1")
    assert run.exporter.tree.restricts()
    run.kill()
    calls = list(nvmet.calls)
    run = start("/dev/vdb", admission=paired())
    run.synchronise()
    assert nvmet.calls == calls
    assert run.stop()
    assert nvmet.contents() == before


@pytest.mark.parametrize("fault", ["mode", "password", "userid"])
def test_restart_repairs_what_lets_others_in(start: Start, nvmet: Nvmet, fault: str) -> None:
    run = start("/dev/vdb", admission=paired())
    run.synchronise()
    run.kill()
    auth = nvmet.path(group(nvmet)) / "auth"
    if fault == "mode":
        (auth / "password").chmod(0o644)
    else:
        (auth / fault).write_text("x\n")
    run = start("/dev/vdb", admission=paired())
    run.synchronise()
    assert locked(nvmet, CODE) == []
    assert attribute(nvmet.path(group(nvmet)) / "auth/userid") == "storagetm"
    assert run.stop()


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, paired()), (paired(), None), (paired(OTHER), paired())],
    ids=["paired", "unpaired", "another code"],
)
def test_restart_that_lets_in_others_makes_the_target_anew(
    nvmet: Nvmet, lio: Lio, first: Admission | None, second: Admission | None
) -> None:
    """At no moment is anybody let in who was let in by neither, wherever it is killed."""
    before = nvmet.contents()
    number = 0
    while True:
        whole(READ_ONLY, "/dev/vdb", admission=first)
        old = nvmet.path(group(nvmet)).stat().st_ino

        def inspect(old: int = old) -> None:
            there = groups(nvmet)
            if second and there and there[0].stat().st_ino != old:
                assert locked(nvmet, CODE) == []

        nvmet.inspect = inspect
        killed = nvmet.run_and_kill_at(number, lambda: whole(READ_ONLY, "/dev/vdb", admission=second))
        inspect()
        if number % 2 or not killed:
            whole(READ_ONLY, "/dev/vdb", admission=second)
            assert not second or locked(nvmet, CODE) == []
            assert names(nvmet) == ["vdb"]
        nvmet.inspect = bool
        if not killed:
            break
        ended(second)
        assert nvmet.contents() == before
        number += 1
    assert number > 20
    assert lio.backstores()


@pytest.mark.parametrize("done", [False, True])
def test_failed_pairing_ends_what_lets_anybody_in(
    start: Start, nvmet: Nvmet, lio: Lio, done: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """But not what an earlier run lets in only some to."""
    before = nvmet.contents()
    run = start("/dev/vdb", admission=paired() if done else None)
    run.synchronise()
    complete = nvmet.contents()
    run.kill()
    instance = storagetm.Machine().instance()
    storagetm.withdraw(storagetm.Exporter(instance, [], storagetm.Inventory([])))
    err = capfd.readouterr().err
    if done:
        assert nvmet.contents() == complete
        assert err == ""
    else:
        assert nvmet.contents() == before
        assert err == (
            "Ending what an earlier start lets anybody in to, since this one is to let in only some\n"
        )
        assert lio.backstores() == []


def test_code_of_a_killed_run_stays_over_iscsi_alone(
    nvmet: Nvmet, lio: Lio, machine: CapturedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients stay, too. A clean stop forgets it, and so does a start that is for anybody."""
    computer = Computer(machine, nvmet, monkeypatch)
    monkeypatch.setattr(storagetm, "prepare_configfs", lambda: None)
    path = Path(f"{storagetm.RUN}{storagetm.Machine().instance()}.code")
    seen: list[str] = []

    def look(_: storagetm.Service) -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        seen.append(path.read_text())
        assert locked(nvmet, Code.parse(seen[-1])) == []
        assert names(nvmet) == ["vdb"]

    computer.looked = look
    arguments = ["--transport=iscsi", "--pair", "--encrypt=no", "--console", "/dev/vdb"]
    assert storagetm.main(arguments) == 0
    assert not path.exists()
    computer.looked = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    assert nvmet.run_and_kill_at(-1, lambda: storagetm.main(arguments))
    killed = path.read_text()
    assert locked(nvmet, Code.parse(killed)) == []
    assert names(nvmet) == ["vdb"]
    computer.looked = look
    assert storagetm.main(arguments) == 0
    assert not path.exists()
    assert storagetm.main(arguments) == 0
    assert seen[1] == killed
    assert len({*seen}) == 3
    path.write_text(CODE.text())
    Path(f"{path}.new").write_text(CODE.text())
    computer.looked = lambda _: seen.append(str(path.exists()))
    assert storagetm.main(["--transport=iscsi", "/dev/vdb"]) == 0
    assert seen.pop() == "False"
    assert not Path(f"{path}.new").exists()
    assert lio.backstores() == []


HOST = storagetm.AllowedHost("nqn.a")


@pytest.mark.parametrize(
    ("admission", "why"),
    [
        (Admission(), ""),
        (Admission(code=CODE), ""),
        (Admission([HOST]), "no host by its NQN; leave out --transport=iscsi, or all but --pair"),
        (Admission([HOST], code=CODE), "only who has the code can be let in"),
        (
            Admission((), "required", code=CODE),
            "iSCSI is not encrypted; leave out --transport=iscsi, or see",
        ),
        (Admission((), "offered", code=CODE), ""),
    ],
)
def test_admission_that_iscsi_cannot_do_is_refused(admission: Admission, why: str) -> None:
    options = storagetm.Options()
    for names_ in (["iscsi"], ["nvme-tcp", "iscsi"]):
        options.transports = names_
        if why:
            with pytest.raises(storagetm.UsageError, match=why):
                storagetm.chosen_transports(options, Named(), "x", storagetm.Access(), admission)
            continue
        found = storagetm.chosen_transports(options, Named(), "x", storagetm.Access(), admission)
        assert [t.name for t in found] == names_
        assert all(t.restricted == admission.restricted for t in found)
    options.transports = ["nvme-tcp"]
    storagetm.chosen_transports(options, Named(), "x", storagetm.Access(), admission)


# A dry run


def dry_run(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert storagetm.main(["--dry-run", *arguments]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_dry_run_does_what_the_real_run_does(
    nvmet: Nvmet,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    access: str,
) -> None:
    """As text and as JSON, the same steps; a shell that runs them comes to the same as the real run."""
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    calls = len(nvmet.calls)
    before = nvmet.contents()
    arguments = ["--transport=iscsi", f"--{access}", "--clients=any", str(image), "/dev/vdb"]
    commands = dry_run(capfd, *arguments)
    steps = json.loads("\n".join(dry_run(capfd, "--json", *arguments)))
    assert nvmet.contents() == before
    assert nvmet.calls[calls:] == []
    assert len(steps) == len(commands)
    assert {step["step"] for step in steps} == {"mkdir", "map", "write", "symlink"}
    assert steps[-1]["path"].endswith("/enable")
    assert "target/iscsi/" in steps[-1]["path"]
    run = start(str(image), "/dev/vdb", access=access, clients=0)
    run.synchronise()

    def seen() -> dict[str, str]:
        found = {p: t.removeprefix(UNIT_SERIAL) for p, t in nvmet.contents().items()}
        return {p: t for p, t in found.items() if p.startswith("target/") and not p.endswith("/info")}

    expected = seen()
    made = [c for c in calls_since(nvmet, calls) if c.startswith(("mkdir", "symlink"))]
    assert len(made) == len([s for s in steps if s["step"] in ("mkdir", "symlink")])
    assert run.stop()
    copy = tmp_path / "copy"
    for name in ("core", "iscsi/discovery_auth"):
        (copy / "target" / name).mkdir(parents=True)
    # Whether blocks can be forgotten is not known before.
    script = lio_shell() + "\n".join(c for c in commands if not re.search("^dmsetup|/emulate_tpu$", c))
    subprocess.run(["sh", "-c", script.replace(f"{nvmet.root}/", f"{copy}/")], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(nvmet, "root", copy)
        patch.setattr(nvmet, "mapper", None)
        found = seen()
    assert found == expected


def test_dry_run_of_a_stop_and_of_another_disk(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside one that exports: what would go, and what would come in its place."""
    first = start("/dev/vdb")
    first.synchronise()
    name = target(nvmet)
    first.kill()
    calls = len(nvmet.calls)
    steps = json.loads("\n".join(dry_run(capfd, "--json", "--transport=iscsi", "/dev/vdc")))
    assert nvmet.calls[calls:] == []
    assert [s["step"] for s in steps][:4] == ["unlink", "rmdir", "rmdir", "unmap"]
    assert not [s for s in steps if s["path"].endswith("enable") and "iscsi" in s["path"]]
    commands = dry_run(capfd, "--transport=nvme-tcp", "/dev/vdb")
    removed = [c.rpartition(" ")[2].replace(f"{nvmet.root}/", "") for c in commands if "target/" in c]
    assert removed[0] == f"{first.iscsi.group}/enable"
    assert "echo 0 >" in "".join(commands)
    assert removed[-1] in (name, first.iscsi.store)


def test_dry_run_writes_no_line_feed_into_a_name(
    nvmet: Nvmet,
    machine: CapturedMachine,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The kernel takes it for a part of the name that a client has to have."""
    computer = Computer(machine, nvmet, monkeypatch)
    commands = dry_run(
        capfd, "--transport=iscsi", "--encrypt=no", f"--code-file={computer.file(CODE.text())}", "/dev/vdb"
    )
    auth = [c.rpartition("/")[2] + c.partition(" /")[0] for c in commands if "/auth/" in c]
    assert [c for c in commands if re.search("echo .*/auth/", c)] == []
    assert len(auth) == 4
    text = "\n".join(commands)
    assert "printf %s storagetm-target > " in text
    assert not any(secret in text for secret in secrets_of(CODE))


# What people are told


def texts_of(run: Run, width: int) -> list[str]:
    return [line for block in shown(run).way_in(width) for _, line in block]


def test_commands_are_for_linux_and_for_windows(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    name = os.path.basename(target(nvmet))
    node = f"iscsiadm -m node -T {name}"
    linux = [c.line for c in shown(run).commands if c.mark != "`"]
    places = "192.0.2.7:3260", "'[2001:db8::7]:3260'", "'[fe80::7%INTERFACE]:3260'"
    assert linux == [f"{node} -p {at} -o new && {node} -p {at} -l" for at in places]
    (windows,) = (c for c in shown(run).commands if c.mark == "`")
    assert windows.line == (
        "Start-Service msiscsi; New-IscsiTargetPortal -TargetPortalAddress 192.0.2.7 "
        f"-TargetPortalPortNumber 3260; Connect-IscsiTarget -N {name}"
    )
    # A name that is broken by the terminal cannot be pasted.
    assert max(map(len, texts_of(run, 80))) < 80
    assert not shown(run).confidential
    assert run.iscsi.alerts() == []
    assert names(nvmet) == ["vdb", "vdc"]
    assert run.stop()


@pytest.mark.parametrize("admission", [None, paired()], ids=["anybody", "paired"])
def test_link_local_address_is_one_at_an_interface_of_the_client(
    start: Start, nvmet: Nvmet, admission: Admission | None
) -> None:
    """Windows could not come in by it: what its discovery finds has no interface behind it."""
    four = Address(AF_INET, "169.254.1.2", "eth0", True)
    run = start("/dev/vdb", admission=admission, held=[LOCAL])
    run.synchronise()
    (command,) = shown(run).commands
    where = "-p '[fe80::7%INTERFACE]:3260'"
    for parts in [*command.before, [command.command, *command.more]]:
        assert f" {where} " in f"{' '.join(parts)} "
    assert len(command.before) == (2 if admission else 0)
    note = "(INTERFACE: the other machine's interface to this one, see 'ip link')"
    assert [line.strip() for line in texts_of(run, 1000)].count(note) == 1
    run.held = [four, LOCAL]
    first, second, windows = shown(run).commands
    assert (first.note, second.note) == ("", note)
    assert "-p 169.254.1.2:3260" in first.more
    assert "-TargetPortalAddress 169.254.1.2" in windows.line
    assert names(nvmet) == ["vdb"]
    assert run.stop()


@pytest.mark.parametrize("width", [40, 80, 132])
def test_commands_can_be_pasted_whatever_the_width(start: Start, nvmet: Nvmet, width: int) -> None:
    """Each line but the last ends with the sign by which its shell reads on."""
    run = start("/dev/vdb", admission=paired())
    run.synchronise()
    assert names(nvmet) == ["vdb"]
    for command in shown(run).commands:
        lines = [text for style, text in command.shown(width) if style == "command"]
        text = "\n".join(lines).replace(f" {command.mark}\n   ", "")
        assert command.mark not in text
        expected = [*command.before, [command.command, *command.more, *command.secrets]]
        assert text.split("\n") == [f"  {' '.join(parts)}" for parts in expected]
        longest = max(len(part) for parts in expected for part in parts)
        assert all(len(line) <= max(width, longest + 6) for line in lines)
    assert run.stop()


def test_secrets_are_in_commands_on_screens_alone(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", admission=paired())
    run.synchronise()
    first, second = secrets_of(CODE)
    report = shown(run)
    name = os.path.basename(target(nvmet))
    screen = "\n".join(texts_of(run, 1000))
    where = f"iscsiadm -m node -T {name} -p 192.0.2.7:3260"
    assert f"  {where} -o new\n" in screen
    assert (
        f"  {where} -o update -n node.session.auth.authmethod -v CHAP -n node.session.auth.username "
        f"-v storagetm -n node.session.auth.password -v {first} -n node.session.auth.username_in "
        f"-v storagetm-target -n node.session.auth.password_in -v {second}\n  {where} -l\n"
    ) in screen
    assert f"  Set-IscsiChapSecret -ChapSecret {second}\n" in screen
    assert f"-AuthenticationType MUTUALCHAP -ChapUsername storagetm -ChapSecret {first}" in screen
    assert f"Code: {CODE.text()}" in screen
    assert "is not encrypted: who listens on the network can read along" in screen
    assert report.confidential
    hidden = [fact.text for fact in report.facts()] + [c.line for c in report.commands]
    hidden += [repr(c.before) for c in report.commands] + [repr(c.secrets) for c in report.commands]
    hidden += [report.status(), report.for_plymouth(), repr(report.codes), repr(vars(run.iscsi))]
    for text in (first, second, CODE.text(), CODE.text().replace("-", "")):
        assert text not in "\n".join(hidden)
    assert any("-ChapSecret SECRET" in text for text in hidden)
    told = [text for text in notes(run) if "everybody on the network can see this target's name" in text]
    assert len(told) == 1
    assert locked(nvmet, CODE) == []
    assert run.stop()


def test_secrets_are_in_no_file_and_in_no_message(
    lio: Lio,
    nvmet: Nvmet,
    machine: CapturedMachine,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nor in what programs are called with, nor in the dry run."""
    monkeypatch.setattr(storagetm, "prepare_configfs", lambda: None)
    monkeypatch.setenv("SYSTEMD_LOG_LEVEL", "debug")
    monkeypatch.setattr(storagetm, "log", storagetm.Log())
    computer = Computer(machine, nvmet, monkeypatch)
    texts: list[str] = []

    def look(service: storagetm.Service) -> None:
        assert locked(nvmet, CODE) == []
        service.views.open()
        service.display.outdate()
        service.display.act()
        texts.extend((Path(storagetm.RUN) / name).read_text("utf-8", "replace") for name in computer.left())
        texts.append("\n".join(map(repr, reachable(service.report(), {}))))

    computer.looked = look
    file = computer.file(CODE.text())
    arguments = ["--transport=iscsi", "--encrypt=no", f"--code-file={file}", "/dev/vdb"]
    assert storagetm.main(arguments) == 0
    for more in (["--dry-run"], ["--dry-run", "--json"]):
        assert storagetm.main([*arguments, *more]) == 0
    out, err = capfd.readouterr()
    assert "Exporting '/dev/vdb'" in out
    assert "iscsiadm -m node" in out
    assert len(texts) > 1
    texts += [out, err, repr(computer.programs)]
    for text in (*secrets_of(CODE), CODE.text(), CODE.text().replace("-", "")):
        assert not [found for found in texts if text in found]
    assert lio.backstores() == []


def test_report_tells_how_to_come_in(start: Start, nvmet: Nvmet) -> None:
    run = start("/dev/vdb", "/dev/vdc")
    run.synchronise()
    report = shown(run)
    assert report.status() == "Exporting 2 disks at 3 addresses (iSCSI)." or "(iSCSI)" in report.status()
    numbers = {name: number for number, name in luns(nvmet).items()}
    assert {row.key: row.label for row in report.exported} == {
        name: f"iSCSI LUN {numbers[name]} of {os.path.basename(target(nvmet))}" for name in ("vdb", "vdc")
    }
    assert {row.key: row.number for row in report.exported} == {n: str(i) for n, i in numbers.items()}
    assert report.numbered == "LUNs"
    assert run.iscsi.firewall_text() == (
        "This machine has a firewall, which must let in TCP port 3260 for iSCSI"
    )
    run.held = []
    report = shown(run)
    assert report.status() == ("Exporting 2 disks at no address (iSCSI: the network is down).")
    assert report.shut[0].effect == "no disk can be attached by iSCSI yet"
    assert run.stop()


def test_clients_are_those_at_the_port(start: Start, lio: Lio, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def connections(ports: list[int]) -> list[storagetm.Connection]:
        asked.append(ports)
        return [storagetm.Connection("192.0.2.9", 4711), storagetm.Connection("192.0.2.9", 4712)]

    monkeypatch.setattr(storagetm.Clients, "connections", connections)
    run = start("/dev/vdb")
    run.synchronise()
    (client,) = run.iscsi.attached()
    assert client.who == "192.0.2.9"
    assert asked == [[3260]]
    assert run.stop()
    # Those at another program's port are not ours.
    lio.taken.add("[::]:860")
    run = start("/dev/vdb", port=860)
    run.synchronise()
    assert run.iscsi.attached() == []
    assert run.stop()


# Any bytes


@given(st.binary(max_size=100), st.sampled_from(["adapter", "target", "portal", "8:0"]))
@example(b"\0t", "adapter")
@example(b"\0d", "target")
@example(b"\0cx\0ey\0tz\0vdm/x", "portal")
def test_ledger_may_have_any_bytes_of_a_target(raw: bytes, tag: str) -> None:
    record = b"+\0x\0" + tag.encode() + b"\0"
    for letter in (b"t", b"c", b"e", b"v", b"d"):
        found = storagetm.Ledger.parse(record + letter + b"x" + raw + b"\0\n")
        iscsi = storagetm.Iscsi(Named(), "nqn.x")
        before = iscsi.adapter, iscsi.iqn, iscsi.port
        iscsi.adopt({root: branch for root, (branch, _) in found.items()})
        assert (iscsi.adapter, iscsi.iqn, iscsi.port) == before


@given(st.text(), st.sampled_from(["adapter", "target", "portal"]))
@example("target/core/iblock_x", "adapter")
@example("target/core/iblock_\u0663", "adapter")
@example("target/core/iblock_" + 5000 * "1", "adapter")
@example("target/iscsi/iqn.x/tpgt_1/np/[::]:99999", "portal")
@example("target/iscsi/iqn.x/tpgt_1/np/[::]:", "portal")
def test_root_that_is_none_of_ours_is_ignored(root: str, tag: str) -> None:
    iscsi = storagetm.Iscsi(Named(), "nqn.x")
    before = iscsi.adapter, iscsi.group, iscsi.port
    iscsi.adopt({root: storagetm.Branch(tag, [storagetm.Directory(root)], adopted=True)})
    assert (iscsi.adapter, iscsi.group, iscsi.port) == before


def test_roots_of_ours_are_gone_on_with() -> None:
    iscsi = storagetm.Iscsi(Named(), "nqn.x")
    name = f"target/iscsi/{storagetm.iqn('nqn.x')}.k7fm"
    roots = {
        "target/core/iblock_4711": ("adapter", ["target/core/iblock_4711"]),
        name: ("target", [name, f"{name}/tpgt_1", f"{name}/tpgt_1/enable"]),
        f"{name}/tpgt_1/np/[::]:3265": ("portal", [f"{name}/tpgt_1/np/[::]:3265"]),
    }
    iscsi.adopt(
        {
            root: storagetm.Branch(tag, [storagetm.Directory(path) for path in paths], adopted=True)
            for root, (tag, paths) in roots.items()
        }
    )
    assert iscsi.store == "target/core/iblock_4711"
    assert iscsi.target == name
    assert iscsi.port == 3265


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b"\xff\xfe", b"Major: Minor: readonly:", b"Major:", b"x" * 5000]
)
def test_kernel_may_tell_any_bytes(start: Start, nvmet: Nvmet, raw: bytes) -> None:
    """What is not understood is made anew."""
    run = start("/dev/vdb")
    run.synchronise()
    info = backstore(nvmet, "vdb") / "info"
    before = info.read_bytes()
    info.write_bytes(raw)
    entries = run.exporter.want.of(run.disk("vdb"))["iscsi"].entries
    dead = [e.path.rpartition("/")[2] for e in entries if not e.is_live(storagetm.CONFIGFS)]
    assert dead == ["control"]
    info.write_bytes(before)
    assert run.stop()


def test_kernel_that_tells_nothing_of_a_device_is_no_end(
    start: Start, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("/dev/vdb", access=READ_WRITE, clients=0)
    run.synchronise()
    entries = run.exporter.want.of(run.disk("vdb"))["iscsi"].entries
    assert all(e.is_live(storagetm.CONFIGFS) for e in entries)

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    mapping = storagetm.mapping_of(run.disk("vdb").backing)
    assert mapping
    with monkeypatch.context() as patch:
        patch.setattr(storagetm, "dm_status", refuse)
        mapping.device = 0  # as with one that an earlier run has made
        dead = [e.path.rpartition("/")[2] for e in entries if not e.is_live(storagetm.CONFIGFS)]
    assert dead == ["control", "emulate_tpu"]
    assert names(nvmet) == ["vdb"]
    assert run.stop()


def test_two_addresses_have_the_port_in_common(start: Start, nvmet: Nvmet, lio: Lio) -> None:
    """Also where it is taken at the second one."""
    lio.taken.add("[2001:db8::7]:3260")
    run = start("/dev/vdb", listen=["192.0.2.7", "2001:db8::7"])
    run.synchronise()
    assert portals(nvmet) == ["192.0.2.7:3261", "[2001:db8::7]:3261"]
    assert run.stop()


# Disks that come and go while steps fail


@pytest.mark.parametrize("code", [errno.EIO, errno.EBUSY])
def test_failure_while_a_disk_comes_or_goes_is_made_up_for(
    start: Start, nvmet: Nvmet, machine: CapturedMachine, code: int
) -> None:
    """The others stay as they are all the time."""
    before = nvmet.contents()
    plug = unplug(machine, "vdc")
    run = start()
    run.synchronise()
    calm, others = nvmet.contents(), luns(nvmet)
    failed = 0

    def stay() -> None:
        assert others.items() <= luns(nvmet).items()
        assert attribute(nvmet.path(group(nvmet)) / "enable") == "1"

    for number in range(40):
        plug(str(4711 + number))
        nvmet.fail_at(number, code)
        calls = len(nvmet.calls)
        run.update("vdc")
        nvmet.succeed()
        stay()
        came = len(nvmet.calls) - calls
        export = run.disk("vdc")
        failed += bool(export.failed)
        export.failed.clear()
        run.synchronise(strict=False)
        assert "vdc" in names(nvmet)
        unplug(machine, "vdc")
        nvmet.fail_at(number, code)
        calls = len(nvmet.calls)
        run.update("vdc")
        nvmet.succeed()
        stay()
        run.synchronise(strict=False)
        assert "vdc" not in names(nvmet)
        assert nvmet.contents() == calm
        if number >= max(came, len(nvmet.calls) - calls):
            break
    else:
        raise AssertionError("there are more steps than that")
    assert failed > 10
    assert run.stop()
    assert nvmet.contents() == before


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_kernel_without_device_mapper(
    start: Start, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    """iSCSI needs it for each kind of access, and says so."""
    run = start("/dev/vdb", access=access, clients=0)

    def refuse(*_: object, **__: object) -> bytes:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(storagetm, "dm_call", refuse)
    monkeypatch.setattr(storagetm, "DEV", "/nonexistent/")
    run.synchronise(strict=False)
    why = str(run.disk("vdb").why_not)
    lacking = "'dm-mod' and 'loop'" if access == SNAPSHOT else "'dm-mod'"
    assert why == f"{access} access needs {lacking}, which this kernel does not have; install it"
    assert not [path for path in nvmet.contents() if re.search("iblock_.*/storagetm-", path)]


# Anything in any order


class AnyOrder(RuleBasedStateMachine):
    """Starts with any disks that are killed, fail or stop, for anybody or some; ports that come and go."""

    NAMES = ("vdb", "vdc", "vdd", "sda")
    DISKS = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)
    ADMISSIONS = st.sampled_from([None, paired(), paired(OTHER)])

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir=MEMORY)
        self.patch = pytest.MonkeyPatch()
        self.machine = CapturedMachine("trixie-fresh", Path(self.directory.name) / "machine", self.patch)
        self.nvmet = captured_kernel(self.machine, self.patch)
        self.lio = Lio(self.nvmet, self.machine.path("/sys"), self.patch)
        for name, value in (("LOGIND", ()), ("RETURN_WAIT_SEC", 0), ("BUSY_SEC", 0.1)):
            self.patch.setattr(storagetm, name, value)
        self.patch.setattr(storagetm, "run_program", lambda *_: 127)
        self.patch.setattr(storagetm, "reread_partitions", lambda _: None)
        self.lio.foreign("iqn.2003-01.org.example:x", "target/core/iblock_0", "192.0.2.7:4711")
        self.before = self.nvmet.contents()
        self.run: Run | None = None
        self.admission: Admission | None = None
        self.given: dict[int, str] = {}  # which disk was ever in a LUN

    def kill(self) -> None:
        if self.run:
            self.run.kill()
        self.run = None

    @rule(names_=DISKS, access=st.sampled_from(storagetm.ACCESS), admission=ADMISSIONS)
    def start(self, names_: list[str], access: str, admission: Admission | None) -> None:
        """After a kill, or a stop."""
        self.kill()
        self.admission = admission
        paths = [f"/dev/{name}" for name in names_]
        self.run = Run(*paths, access=access, clients=0, admission=admission)
        self.run.synchronise()
        self.check()

    @rule(names_=DISKS, number=st.integers(0, 60), admission=ADMISSIONS)
    def killed_start(self, names_: list[str], number: int, admission: Admission | None) -> None:
        self.kill()
        paths = [f"/dev/{name}" for name in names_]
        self.nvmet.run_and_kill_at(number, lambda: whole(READ_ONLY, *paths, admission=admission))

    @rule(names_=DISKS, number=st.integers(0, 60))
    def failed_start(self, names_: list[str], number: int) -> None:
        self.kill()
        run = Run(*(f"/dev/{name}" for name in names_))
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
        self.kill()
        assert self.nvmet.contents() == self.before

    @precondition(lambda self: self.run)
    @rule(name=st.sampled_from(NAMES), size=st.integers(1000, 2000))
    def size_changes(self, name: str, size: int) -> None:
        assert self.run
        self.machine.attribute(name, "size", str(size))
        self.run.update(name)
        self.check()

    @rule(port=st.integers(3260, 3263), taken=st.booleans())
    def port_comes_or_goes(self, port: int, taken: bool) -> None:
        """Of other programs, where we do not listen."""
        name = f"0.0.0.0:{port}"
        self.lio.taken.discard(name)
        if taken and not self.lio.why_no_listener("0.0.0.0", port):
            self.lio.taken.add(name)

    def check(self) -> None:
        assert self.run
        found, exports = luns(self.nvmet), self.run.inventory.exports
        assert sorted(found.values()) == sorted(exports)
        assert all(export.live for export in exports.values())
        for number, name in found.items():
            assert self.given.setdefault(number, name) == name
        assert portals(self.nvmet) == [f"[::]:{self.run.iscsi.port}"]
        assert attribute(self.nvmet.path(group(self.nvmet)) / "enable") == "1"
        required = attribute(self.nvmet.path(group(self.nvmet)) / "attrib/authentication")
        assert required == str(int(self.admission is not None))
        if self.admission and self.admission.code:
            assert locked(self.nvmet, self.admission.code) == []
        assert self.before.items() <= self.nvmet.contents().items()
        assert self.lio.claims == {}

    def teardown(self) -> None:
        try:
            self.kill()
            self.run = Run("/dev/vdb")
            self.stop()
        finally:
            assert self.nvmet.mapper
            self.nvmet.mapper.close()
            self.patch.undo()
            self.directory.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=20, stateful_step_count=10)
