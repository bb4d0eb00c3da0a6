# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people and journals get to see."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm
from tests.unit.exports import Named, made_export

V4, V6 = storagetm.AF_INET, storagetm.AF_INET6
PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
EXPORTED = storagetm.Branch("", [storagetm.Directory("x")])


class Console(pyte.Screen):
    """A terminal that clears as Linux's console and xterm do: after a full row, its last character too."""

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        if self.cursor.x == self.columns:
            self.cursor.x -= 1
        super().erase_in_line(how, private)


def disk(name: str, number: int = 1) -> storagetm.Export:
    return made_export(
        name,
        size=number * 1_000_000_000,
        model="QEMU_HARDDISK",
        serial=f"SERIAL-{number}",
        tag="1:1 1",
        access=storagetm.READ_WRITE,  # of which there is most to say
        live={"nvme-tcp": EXPORTED},
    )


def addresses(count: int = 1) -> list[storagetm.Address]:
    return [
        storagetm.Address(V4, "192.0.2.1", "eth0", False),
        storagetm.Address(V6, "2001:db8::1", "eth0", False),
        storagetm.Address(V6, "fe80::5054:ff:fe12:3456", "eth0", True),
    ][:count]


def report(
    disks: list[storagetm.Export], where: list[storagetm.Address] | None = None, prefix: str = PREFIX
) -> storagetm.Report:
    machine = Named()
    transport = storagetm.NvmeTcp(machine, prefix)
    transport.ports = {V4: 59936, V6: 36681}
    where = addresses() if where is None else where
    return storagetm.take_report(machine, [transport], where, disks, storagetm.Memory())


@pytest.fixture
def screen(capfd: pytest.CaptureFixture[str]) -> storagetm.Screen:
    made = storagetm.Screen()
    capfd.readouterr()
    return made


def rows(drawn: str, width: int = 80, height: int = 25) -> list[str]:
    """What a terminal shows that was full of something else before."""
    terminal = Console(width, height)
    stream = pyte.Stream(terminal)
    stream.feed("\r\n".join(["X" * width] * height))
    stream.feed(drawn)
    return [line.rstrip() for line in terminal.display]


def pages(
    screen: storagetm.Screen, shown: storagetm.Report, width: int = 80, height: int = 25
) -> list[list[str]]:
    """What all pages show."""
    found = []
    screen.page = 0
    while screen.page < screen.pages:
        found.append(rows(screen.drawn(shown, width, height), width, height))
        screen.page += 1
    return found


# The screen


def test_one_disk_is_shown_with_its_commands(screen: storagetm.Screen) -> None:
    assert rows(screen.drawn(report([disk("vda")]), 80, 25)) == [
        " Storage target mode: target (Debian GNU/Linux 13 (trixie))",
        "",
        "To attach its disk, type as root on the other machine:",
        "",
        "  nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
        "",
        "To attach one disk:",
        "",
        "/dev/vda       1.0 GB  READ-WRITE    QEMU HARDDISK         SERIAL-1",
        "  nvme connect -t tcp -a 192.0.2.1 -s 59936 \\",
        f"    -n {PREFIX}.vda",
        "",
        "No client is attached: it is safe to switch this machine off.",
        *[""] * 11,
        "Ctrl-C stops exporting.",
    ]


def test_last_row_says_what_ctrl_c_does(screen: storagetm.Screen) -> None:
    """It is not the same in the unit, whose end boots the machine."""
    shown = report([disk("vda")])
    shown.reboots = True
    assert rows(screen.drawn(shown, 80, 25))[-1] == "Ctrl-C stops exporting and reboots this machine."
    shown.refused = "A reason; a way out"
    assert rows(screen.drawn(shown, 80, 25)) == [
        " Storage target mode: target (Debian GNU/Linux 13 (trixie))",
        "",
        "No disk is exported:",
        "",
        "A reason; a way out",
        "",
        "Change that, then boot this machine again.",
        *[""] * 17,
        "Ctrl-C reboots this machine.",
    ]
    assert shown.for_plymouth() == "No disk is exported: A reason; a way out"
    shown.reboots = False
    assert rows(screen.drawn(shown, 80, 25))[-1] == "Ctrl-C ends this."


@pytest.mark.parametrize(
    ("width", "height"), [(80, 25), (80, 24), (100, 37), (132, 50), (240, 67), (60, 20)]
)
@pytest.mark.parametrize("count", [1, 5, 30, 70])
def test_all_is_on_some_page(screen: storagetm.Screen, width: int, height: int, count: int) -> None:
    """On some page, whole, with the title at the top and no row scrolled away."""
    names = [f"nvme{i}n1" for i in range(count)]
    shown = report([disk(name, i) for i, name in enumerate(names)], addresses(3))
    everything = ""
    for page in pages(screen, shown, width, height):
        assert page[0].startswith(" Storage target mode: target")
        assert page[-1].startswith("Ctrl-C stops exporting.")
        assert not [line for line in page if "X" * 3 in line]
        # As it would be pasted: a shell joins lines with a backslash, a terminal those that it has wrapped.
        everything += re.sub(rf"(?<=.{{{width}}})\n(?=\S)", "", "\n".join(page)) + "\n"
    for i, name in enumerate(names):
        command = (
            rf"  nvme connect -t tcp -a 192.0.2.1 -s 59936 (\\\n   )?\s?-n {re.escape(PREFIX)}.{name}\n"
        )
        assert len(re.findall(command, everything)) == 1, name
        serial = f"SERIAL-{i}$" if width >= 80 else ""
        assert len(re.findall(rf"^/dev/{name} .*{serial}", everything, re.MULTILINE)) == 1
    for address in addresses(3):
        assert f"  nvme connect-all -t tcp -a {address.text} -s" in everything


def test_full_row_loses_nothing(screen: storagetm.Screen) -> None:
    """Its last character belongs to the command."""
    line = f"    -n {PREFIX}.nvme0n1"
    assert len(line) == 80
    assert line in rows(screen.drawn(report([disk("nvme0n1")]), 80, 25))


def test_long_nqn_is_whole(screen: storagetm.Screen) -> None:
    prefix = "nqn." + "x" * 200
    page = rows(screen.drawn(report([disk("vda")], prefix=prefix), 80, 25))
    assert page[0].startswith(" Storage target mode")
    assert f"    -n {prefix}.vda" in "".join(page)
    assert page[-1] == "Ctrl-C stops exporting."


def test_link_local_address_is_explained(screen: storagetm.Screen) -> None:
    page = rows(screen.drawn(report([disk("vda")], addresses(3)[2:]), 80, 25))
    assert "  nvme connect-all -t tcp -a fe80::5054:ff:fe12:3456 -s 36681 -f INTERFACE" in page
    assert [line for line in page if "the other machine's interface to this one" in line]


def test_missing_address_is_explained(screen: storagetm.Screen) -> None:
    text = "\n".join(rows(screen.drawn(report([disk("vda")], []), 80, 25)))
    assert "The network is down: plug in a cable, or wait for an address." in text
    assert "/dev/vda " in text
    assert "nvme connect" not in text


def test_missing_disk_is_explained(screen: storagetm.Screen) -> None:
    text = "\n".join(rows(screen.drawn(report([]), 80, 25)))
    assert "No disk is exported; plug one in, and it will be." in text
    assert "nvme connect -t" not in text


def test_disks_that_are_not_exported_have_reasons(screen: storagetm.Screen) -> None:
    left_out, failed, waiting = disk("sr0"), disk("vda"), disk("vdb")
    for made in (left_out, failed, waiting):
        made.live = {}
    left_out.left_out = storagetm.Reason("it has size 0")
    failed.failed[""] = storagetm.Reason("No space left on device")
    waiting.waiting = storagetm.Reason("udev is busy")
    page = rows(screen.drawn(report([failed, waiting, left_out]), 80, 25))
    start = page.index("Not exported:")
    assert page[start + 1 : start + 4] == [
        "/dev/sr0      it has size 0",
        "/dev/vda      No space left on device",
        "/dev/vdb      udev is busy",
    ]


def test_last_three_messages_are_shown(screen: storagetm.Screen) -> None:
    """The last three, above the last line, with the time."""
    asked: list[int] = []
    views = storagetm.Views(lambda: asked.append(1))
    for i in range(4):
        views.add_message(f"message {i}")
    views.add_message("long " * 20)
    shown = report([disk("vda")])
    shown.messages = views.messages
    page = rows(screen.drawn(shown, 80, 25))
    assert page[-1] == "Ctrl-C stops exporting."
    assert re.fullmatch(r"\d\d:\d\d:\d\d message 2", page[-6])
    assert re.fullmatch(r"\d\d:\d\d:\d\d message 3", page[-5])
    assert re.fullmatch(r"\d\d:\d\d:\d\d (long ?)+", page[-4])
    assert page[-2] == ""
    assert len(asked) == 5


def test_keys_turn_pages(screen: storagetm.Screen) -> None:
    shown = report([disk(f"vd{i}") for i in range(30)])
    screen.drawn(shown, 80, 25)
    assert screen.pages > 3
    incoming, outgoing = os.pipe()
    screen.keys = incoming
    try:
        for keys, page in (
            (b" ", 1),
            (b"n", 2),
            (b"\x1b[6~", 3),
            (b"b", 2),
            (b"x", 2),
            (b"\x1b[5~", 1),
            (b"p", 0),
            (b"b", screen.pages - 1),
            (b" ", 0),
        ):
            os.write(outgoing, keys)
            screen.act()
            assert screen.page == page, keys
        os.write(outgoing, b"b")
        screen.act()
        # With fewer disks, that page is gone.
        text = screen.drawn(report([disk("vda")]), 80, 25)
        assert (screen.page, screen.pages) == (0, 1)
        assert "Page" not in text
    finally:
        os.close(outgoing)
    screen.act()
    assert screen.keys == -1
    os.close(incoming)


def test_without_colour_only_the_title_stands_out(screen: storagetm.Screen) -> None:
    assert "\x1b[1m  nvme" in screen.drawn(report([disk("vda")]), 80, 25)
    screen.colour = False
    assert set(re.findall(r"\x1b\[[0-9;]*m", screen.drawn(report([disk("vda")]), 80, 25))) == {
        "\x1b[7m",
        "\x1b[0m",
    }


def test_terminal_that_is_gone_ends_nothing(
    screen: storagetm.Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", write)
    screen.show(report([disk("vda")]))
    assert screen.gone
    monkeypatch.undo()
    screen.show(report([disk("vda")]))


def test_real_terminal_is_left_as_it_was() -> None:
    """Keys come without echo and turn pages, and in the end the terminal is as it was."""
    pid, master = pty.fork()
    if pid == 0:
        try:
            screen = storagetm.Screen()
            assert screen.keys >= 0
            assert screen.level is None
            shown = report([disk(f"vd{i}") for i in range(30)])
            screen.show(shown)
            while screen.page < 2:
                select.select([screen.keys], [], [])
                screen.act()
                screen.show(shown)
            screen.close()
            os.write(1, b"the end")
            os.read(0, 100)  # not sys.stdin, whose place pytest takes: the line would not be waited for
        finally:
            os._exit(0)
    terminal = pyte.Screen(80, 24)
    stream = pyte.ByteStream(terminal)

    def wait_for(text: str) -> str:
        deadline = time.monotonic() + 60
        while text not in "\n".join(terminal.display):
            assert select.select([master], [], [], deadline - time.monotonic())[0]
            stream.feed(os.read(master, 4096))
        return "\n".join(terminal.display)

    try:
        wait_for("Page 1 of")
        os.write(master, b" ")
        assert " Storage target mode" in wait_for("Page 2 of").split("\n")[0]
        os.write(master, b" ")
        wait_for("the end")
        os.write(master, b"echo")
        wait_for("the endecho")
    finally:
        os.close(master)
        os.waitpid(pid, 0)


# Pages

BLOCKS = st.lists(
    st.lists(st.text("ab", max_size=45).map(lambda text: ("", text)), min_size=1, max_size=7), max_size=20
)


@given(BLOCKS, st.integers(10, 40), st.integers(4, 20))
def test_pages_have_everything_once(blocks: list[list[tuple[str, str]]], width: int, room: int) -> None:
    found = storagetm.paginated(blocks, width, room)
    # Everything once and in order, but for blank lines.
    lines = [line for block in blocks for line in block if line[1]]
    assert [line for page in found for line in page if line[1]] == lines
    assert len([1 for page in found for line in page]) <= sum(map(len, blocks))
    for page in found:
        assert sum(storagetm.rows_of(text, width) for _, text in page) <= max(
            room, *(storagetm.rows_of(text, width) for _, text in page), 0
        )
        assert page or len(found) == 1
    # Blocks that fit are in one piece.
    numbered = [[(str(i), text) for _, text in block] for i, block in enumerate(blocks)]
    where: dict[str, set[int]] = {}
    for number, page in enumerate(storagetm.paginated(numbered, width, room)):
        for name, text in page:
            if text:
                where.setdefault(name, set()).add(number)
    for i, block in enumerate(blocks):
        if sum(storagetm.rows_of(text, width) for _, text in block) <= room:
            assert len(where.get(str(i), ())) <= 1


@pytest.mark.parametrize(("length", "expected"), [(0, 1), (1, 1), (80, 1), (81, 2), (160, 2), (161, 3)])
def test_long_text_takes_more_rows(length: int, expected: int) -> None:
    assert storagetm.rows_of("x" * length, 80) == expected


# The report


def values(thing: object) -> Iterator[object]:
    """What there is in a report, down to what has no parts."""
    if isinstance(thing, list):
        for part in thing:
            yield from values(part)
    elif isinstance(thing, storagetm.Report):
        yield from values([*vars(thing).values()])
    elif isinstance(thing, (storagetm.ExportRow, storagetm.OtherRow, storagetm.Instruction, storagetm.Way)):
        assert not hasattr(thing, "__dict__")
        yield from values([getattr(thing, name) for name in thing.__slots__])
    else:
        yield thing


def everything(shown: storagetm.Report) -> object:
    facts = [(fact.kind, fact.key, fact.text) for fact in shown.facts()]
    return shown.blocks(80), facts, shown.status(), shown.for_plymouth(), shown.title


@pytest.mark.parametrize("kind", [storagetm.NvmeTcp, storagetm.SharedNvmeTcp])
def test_report_is_taken_once(kind: type[storagetm.NvmeTcp]) -> None:
    """Whatever happens to disks, addresses, memory and ports meanwhile; there is nothing to ask them by."""
    transport, where, memory = kind(Named(), PREFIX), addresses(3), storagetm.Memory()
    transport.ports = {V4: 59936, V6: 36681}
    memory.filled, memory.size, memory.asked = {"storagetm-vdb-1": (10, 100, "")}, 100, 200
    exported, snapshot, waiting = disk("vda"), disk("vdb", 2), disk("vdc", 3)
    snapshot.access = storagetm.SNAPSHOT
    snapshot.backing = storagetm.Branch("", [storagetm.Mapping("dm/storagetm-vdb-1", "snapshot")])
    waiting.live, waiting.waiting = {}, storagetm.Reason("another process holds its lock")
    disks = [exported, snapshot, waiting]
    for number, made in enumerate(disks, 1):
        made.stay = storagetm.Stay(number, "")
    clients = [storagetm.Client("192.0.2.7", "10:42", 4, encrypted=False)]
    transport.attached = lambda: clients  # type: ignore[method-assign]
    shown = storagetm.take_report(Named(), [transport], where, disks, memory, filtered=True)
    assert {type(value) for value in values(shown)} == {str, int, bool}
    before = everything(shown)
    assert "snapshot 10 %" in str(before)
    assert "Attached from 192.0.2.7; what can be written to is for 1 client at a time" in str(before)
    assert "  192.0.2.7: since 10:42, 4 connections, not encrypted" in str(before)
    assert " at 3 addresses to 1 client, 1 waiting; snapshots use 10 B of 100 B of memory" in shown.status()
    for made in disks:
        for fact in ("node", "model", "serial", "tag"):
            setattr(made.disk, fact, "other")
        made.access, made.failed, made.stay = storagetm.READ_ONLY, {"": storagetm.Reason("gone")}, None
        made.disk.size, made.waiting = 1, storagetm.Reason()
        made.live = {} if made.live else {"nvme-tcp": EXPORTED}
    where[0].text, where[0].interface, where[0].kind = "198.51.100.1", "other", 2
    clients[0].who, clients[0].connections = "198.51.100.1", 9
    where.clear()
    disks.clear()
    clients.clear()
    memory.filled, memory.size, transport.ports, transport.prefix = {}, 0, {}, "other"
    assert everything(shown) == before


class Cable(storagetm.NvmeTcp):
    """Another way to attach disks, for which one address is enough, and which has a name for each disk."""

    name = "cable"

    def way(self, addresses: object) -> storagetm.Way:
        return storagetm.Way("a cable")

    def instructions(
        self, exports: Iterable[storagetm.Export], addresses: Sequence[storagetm.Address]
    ) -> list[storagetm.Instruction]:
        at, disks = addresses[0], [e.disk for e in exports]
        single = [storagetm.Instruction(at, f"plug --only={d.name}", disk=d.key) for d in disks]
        return [storagetm.Instruction(at, "plug", note="(in the front)"), *single]

    def label(self, export: storagetm.Export) -> str:
        return f"LUN of {export.disk.name}"

    def firewall_text(self) -> str:
        return "No cable can be filtered"


def test_two_transports(screen: storagetm.Screen, lines: Any) -> None:
    """What the first one says comes first, and nothing of the other is missing."""
    network, cable = storagetm.NvmeTcp(Named(), PREFIX), Cable(Named(), PREFIX)
    network.ports = {V4: 59936}
    exported = disk("vda")
    exported.live["cable"] = EXPORTED
    shown = storagetm.take_report(
        Named(), [network, cable], addresses(), [exported], storagetm.Memory(), filtered=True
    )
    page = rows(screen.drawn(shown, 80, 25))
    commands = [
        "  nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
        "  plug",
        "  nvme connect -t tcp -a 192.0.2.1 -s 59936 \\",
        "  plug --only=vda",
    ]
    assert [line for line in page if line in commands] == commands
    assert page[page.index("  plug") + 1] == "    (in the front)"
    assert shown.status() == "Exporting 1 disk (1 read-write) at 1 address and a cable."
    assert shown.for_plymouth() == "plug"
    storagetm.Journal().show(shown)
    told = lines()
    assert any(line.endswith(f" as {PREFIX}.vda and LUN of vda") for line in told)
    assert any(line.endswith("TCP port 59936; No cable can be filtered") for line in told)
    assert [line for line in told if line.startswith("Attach")] == [
        "Attach all disks with: nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
        "Attach all disks with: plug",
    ]


# Without a screen


def test_plain_terminal_gets_ascii(capfd: pytest.CaptureFixture[str]) -> None:
    view = storagetm.Plain()
    shown = report([disk("vda"), disk("vdb")], addresses(3))
    shown.title = "Storage target mode: café (Débian)"
    for _ in range(2):
        view.show(shown)
    out, err = capfd.readouterr()
    assert err == ""
    assert all(c.isascii() and (c.isprintable() or c == "\n") for c in out)
    assert out.count("Storage target mode: caf? (D?bian)") == 2
    assert out.count(f"-n {PREFIX}.vdb\n") == 2


FACTS = [
    "Attach all disks with: nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
    f"Exporting '/dev/vda' (1.0 GB, QEMU_HARDDISK, SERIAL-1, read-write) as {PREFIX}.vda",
    "Not exporting '/dev/vdb': it has size 0",
]


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Any:
    return lambda: capfd.readouterr().out.splitlines()


def test_journal_has_each_fact_once(lines: Any) -> None:
    view = storagetm.Journal()
    other = disk("vdb")
    other.live, other.left_out = {}, storagetm.Reason("it has size 0")
    disks = [disk("vda"), other]
    view.show(report(disks))
    assert lines() == FACTS
    view.show(report(disks))
    view.show(report(disks[::-1]))
    assert lines() == []


def test_journal_has_what_changes(lines: Any) -> None:
    view = storagetm.Journal()
    first, second = disk("vda"), disk("vdb", 2)
    view.show(report([first]))
    lines()
    view.show(report([first], addresses(2)))
    assert lines() == ["Attach all disks with: nvme connect-all -t tcp -a 2001:db8::1 -s 36681"]
    view.show(report([first, second], addresses(1)))
    assert lines() == [
        f"Exporting '/dev/vdb' (2.0 GB, QEMU_HARDDISK, SERIAL-2, read-write) as {PREFIX}.vdb",
        "No longer: Attach all disks with: nvme connect-all -t tcp -a 2001:db8::1 -s 36681",
    ]
    view.show(report([second], []))
    assert lines() == [
        "The network is down: no address yet at which disks could be attached",
        "No longer: Attach all disks with: nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
        f"No longer: {FACTS[1]}",
    ]
    view.show(report([second], addresses(1)))
    assert lines() == [FACTS[0]]


def test_journal_has_new_sizes(lines: Any) -> None:
    view = storagetm.Journal()
    grown = disk("vda")
    view.show(report([grown]))
    lines()
    grown.disk.size = 2_000_000_000
    view.show(report([grown]))
    assert "'/dev/vda' has 2000000000 bytes" in lines()
    view.show(report([grown]))
    assert lines() == []


def test_journal_has_reasons_that_change(lines: Any) -> None:
    view = storagetm.Journal()
    other = disk("vda")
    other.live, other.waiting = {}, storagetm.Reason("another process holds its lock")
    view.show(report([other]))
    assert "Not exporting '/dev/vda': another process holds its lock" in lines()
    other.waiting, other.failed[""] = storagetm.Reason(), storagetm.Reason("No space left on device")
    view.show(report([other]))
    assert lines() == ["Not exporting '/dev/vda': No space left on device"]
    other.failed, other.live = {}, {"nvme-tcp": EXPORTED}
    view.show(report([other]))
    assert lines() == [FACTS[1]]


# Short texts


def test_status_counts_disks_and_addresses() -> None:
    waiting, failed, left_out = disk("vdb"), disk("vdc"), disk("vdd")
    for made in (waiting, failed, left_out):
        made.live = {}
    waiting.waiting, left_out.left_out = storagetm.Reason("a"), storagetm.Reason("c")
    failed.failed[""] = storagetm.Reason("b")
    assert report([disk("vda")]).status() == "Exporting 1 disk (1 read-write) at 1 address."
    assert (
        report([disk("vda"), disk("vde")], addresses(2)).status()
        == "Exporting 2 disks (2 read-write) at 2 addresses."
    )
    assert report([], []).status() == "Exporting 0 disks at no address (the network is down)."
    assert (
        report([disk("vda"), waiting, failed, left_out]).status()
        == "Exporting 1 disk (1 read-write) at 1 address, 1 waiting, 1 failed."
    )


def test_plymouth_gets_the_shortest_line() -> None:
    assert report([], addresses(3)).for_plymouth() == "nvme connect-all -t tcp -a 192.0.2.1 -s 59936"
    assert report([], []).for_plymouth() == "Storage target mode: the network is down"


def test_only_addresses_of_families_that_are_exported() -> None:
    machine = Named()
    transport = storagetm.NvmeTcp(machine, PREFIX)
    transport.ports = {V4: 59936}
    assert (
        storagetm.take_report(machine, [transport], addresses(3)[1:], [], storagetm.Memory())
        .for_plymouth()
        .endswith("network is down")
    )


def test_ipv4_comes_first_and_link_local_last() -> None:
    """IPv4, then global IPv6, then link-local."""
    mixed = [
        storagetm.Address(V6, "fe80::1", "eth0", True),
        storagetm.Address(V6, "2001:db8::2", "eth1", False),
        storagetm.Address(V4, "192.0.2.1", "eth1", False),
        storagetm.Address(V6, "2001:db8::1", "eth0", False),
    ]
    ordered = sorted(mixed, key=storagetm.Address.rank)
    assert [a.text for a in ordered] == ["192.0.2.1", "2001:db8::1", "2001:db8::2", "fe80::1"]


# Messages


@pytest.fixture
def log() -> storagetm.Log:
    return storagetm.Log()


def test_people_get_messages_without_priorities(
    log: storagetm.Log, capfd: pytest.CaptureFixture[str]
) -> None:
    for priority in (3, 4, 6, 7):
        log(priority, f"text {priority}")
    assert tuple(capfd.readouterr()) == ("text 6\n", "text 3\ntext 4\n")


def test_early_warnings_are_kept(log: storagetm.Log) -> None:
    """For the screen, which covers what has been printed before it is there: the last few of them."""
    for number in range(5):
        log(4, f"warning {number}")
        log(3, "an error, which has its own place there")
        log(6, "a fact")
    assert log.early == ["warning 2", "warning 3", "warning 4"]
    shown: list[str] = []
    log.screen = shown.append
    log(4, "shown at once")
    assert shown == ["shown at once"]
    assert "shown at once" not in log.early


def test_journal_gets_priorities(log: storagetm.Log, capfd: pytest.CaptureFixture[str]) -> None:
    log.journal, log.debug = {1, 2}, True
    for priority in (3, 4, 6, 7):
        log(priority, f"text {priority}")
    assert tuple(capfd.readouterr()) == ("<6>text 6\n", "<3>text 3\n<4>text 4\n<7>text 7\n")


def test_journal_is_known_by_its_variable(
    log: storagetm.Log, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not log.journal
    st = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{st.st_dev}:{st.st_ino}")
    assert 2 in storagetm.Log().journal
    monkeypatch.setenv("JOURNAL_STREAM", f"{st.st_dev}:{st.st_ino + 1}")
    assert 2 not in storagetm.Log().journal
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize(("level", "expected"), [("debug", True), ("7", True), ("info", False), ("", False)])
def test_level_decides_about_debug_messages(
    monkeypatch: pytest.MonkeyPatch, level: str, expected: bool
) -> None:
    monkeypatch.setenv("SYSTEMD_LOG_LEVEL", level)
    assert storagetm.Log().debug is expected


# The console's log level


@pytest.fixture
def printk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storagetm, "PROC", f"{tmp_path}/proc/")
    monkeypatch.setattr(storagetm, "RUN", f"{tmp_path}/run/")
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    file = tmp_path / "proc/sys/kernel/printk"
    file.write_text("4\t4\t1\t7\n")
    return file


def test_console_level_is_put_back(printk: Path) -> None:
    level = storagetm.ConsoleLevel()
    level.lower()
    assert printk.read_text()[0] == "1"
    level.restore()
    assert printk.read_text()[0] == "4"
    # There is nothing left to put back.
    printk.write_text("7\n")
    level.restore()
    assert printk.read_text() == "7\n"


def test_console_level_is_put_back_after_a_crash(printk: Path) -> None:
    """What was found first is what is put back."""
    storagetm.ConsoleLevel().lower()
    level = storagetm.ConsoleLevel()
    level.lower()
    level.restore()
    assert printk.read_text()[0] == "4"


def test_console_level_may_be_missing(printk: Path) -> None:
    printk.unlink()
    level = storagetm.ConsoleLevel()
    level.lower()
    level.restore()
    assert not printk.exists()
