# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is attached: what is asked of the kernel, what is shown of it, and when it is looked at."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import storagetm
from tests.unit.exports import Named
from tests.unit.test_shown import PREFIX, addresses, disk

SAFE = "No client is attached: it is safe to switch this machine off."


def connection(
    address: str = "192.0.2.2", port: int = 1000, *, encrypted: bool | None = False, cipher: str = ""
) -> storagetm.Connection:
    return storagetm.Connection(address, port, encrypted=encrypted, cipher=cipher)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the clock on the wall shows; the first that is left."""
    shown = ["10:42"]
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda f, *a: shown[0] if f == "%H:%M" else strftime(f, *a))
    return shown


# What is asked of the kernel


@pytest.fixture(params=[True, False])
def knows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With sock_diag(7), and without."""
    known: bool = request.param
    monkeypatch.setattr(storagetm.Clients, "knows", known)
    return known


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """The kernel's target listens so: at [::], where IPv4 comes in, too."""
    with socket.socket(socket.AF_INET6) as made:
        try:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            made.bind(("::", 0))
        except OSError as e:
            pytest.skip(f"no IPv6 here: {e}")
        made.listen()
        yield made


def test_real_connections_are_found(server: socket.socket, knows: bool) -> None:
    port = server.getsockname()[1]
    assert storagetm.Clients.connections({port}) == []
    with (
        socket.create_connection(("127.0.0.1", port)) as first,
        socket.create_connection(("::1", port)) as second,
        server.accept()[0],
        server.accept()[0],
    ):
        found = storagetm.Clients.connections({port})
        assert sorted((c.address, c.port) for c in found) == [
            ("127.0.0.1", first.getsockname()[1]),
            ("::1", second.getsockname()[1]),
        ]
        # Only who has CAP_NET_ADMIN is told.
        assert {c.encrypted for c in found} in ([{False}, {None}] if knows else [{None}])
        # They are ours, seen from the other end.
        assert storagetm.Clients.connections({first.getsockname()[1]})[0].port == port
    assert storagetm.Clients.knows is knows


def test_kernel_without_sock_diag_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would look for the module each time."""
    asked = []

    def dump(*_: object) -> None:
        asked.append(1)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(storagetm.Clients, "dump", dump)
    monkeypatch.setattr(storagetm.Clients, "knows", True)
    monkeypatch.setattr(storagetm, "PROC", f"{tmp_path}/")
    with pytest.raises(FileNotFoundError):
        storagetm.Clients.connections({1})
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text("0: 010200C0:0001 020200C0:D4F2 01\n")
    assert [c.port for c in storagetm.Clients.connections({1})] == [0xD4F2]
    assert len(asked) == 1


# Who they are


def test_connections_of_one_address_are_one_client(times: list[str]) -> None:
    arrivals = storagetm.Arrivals()
    both = [connection(port=1), connection(port=2), connection("fe80::1")]
    assert [c.about() for c in arrivals.clients(both)] == [
        "192.0.2.2: since 10:42, 2 connections, not encrypted",
        "fe80::1: since 10:42, 1 connection, not encrypted",
    ]
    times[0] = "11:00"
    found = arrivals.clients([*both, connection("192.0.2.3")])
    assert [(c.who, c.since) for c in found] == [
        ("192.0.2.2", "10:42"),
        ("192.0.2.3", "11:00"),
        ("fe80::1", "10:42"),
    ]
    # Who has been away is new.
    arrivals.clients([])
    assert [c.since for c in arrivals.clients(both)] == ["11:00", "11:00"]


def test_client_is_encrypted_if_all_of_its_connections_are(times: list[str]) -> None:
    tls = connection(encrypted=True, cipher="TLS 1.3, AES-128-GCM")
    assert times

    def about(*connections: storagetm.Connection) -> str:
        (client,) = storagetm.Arrivals().clients(connections)
        return client.about().partition(" since 10:42, ")[2]

    assert about(tls, tls) == "2 connections, encrypted (TLS 1.3, AES-128-GCM)"
    assert about(tls, connection()) == about(connection(), tls) == "2 connections, not encrypted"
    assert about(connection(encrypted=True)) == "1 connection, encrypted"
    assert about(connection(encrypted=None)) == "1 connection"


def test_own_seats_are_no_clients(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only these: another one from this machine is one."""
    monkeypatch.setattr(storagetm.Clients, "knows", True)
    port = server.getsockname()[1]
    transport = storagetm.NvmeTcp(Named(), PREFIX)
    transport.ports = {storagetm.AF_INET: port}
    with socket.create_connection(("127.0.0.1", port)) as own:
        seat = storagetm.NvmeHost.__new__(storagetm.NvmeHost)
        seat.socket = own
        transport.host.seats["x/seat"] = seat
        assert transport.attached() == []
        with socket.create_connection(("127.0.0.1", port)):
            assert [(c.who, c.connections) for c in transport.attached()] == [("127.0.0.1", 1)]


def test_host_at_the_cable_is_a_client(times: list[str]) -> None:
    usb = storagetm.UsbGadget(Named(), "x")
    assert usb.attached() == []
    usb.state = "configured"
    assert [c.about() for c in usb.attached()] == ["the USB host: since 10:42"]
    times[0] = "10:50"
    usb.state = "suspended"
    assert [c.about() for c in usb.attached()] == ["the USB host: since 10:42"]
    usb.state = "not attached"
    assert usb.attached() == []


# What is shown


class Crowd(storagetm.NvmeTcp):
    """A transport with these clients; None if it cannot tell."""

    def __init__(self, *clients: storagetm.Client | None) -> None:
        super().__init__(Named(), PREFIX)
        self.ports = {storagetm.AF_INET: 59936}
        self.crowd = clients

    def attached(self) -> list[storagetm.Client]:
        if None in self.crowd:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return [client for client in self.crowd if client]


def report(*clients: storagetm.Client | None, access: str = storagetm.READ_ONLY) -> storagetm.Report:
    exported = disk("vda")
    exported.access = access
    return storagetm.take_report(Named(), [Crowd(*clients)], addresses(), [exported], storagetm.Memory())


def lines(shown: storagetm.Report, width: int = 80) -> list[tuple[str, str]]:
    return [line for block in shown.blocks(width) for line in block]


FIRST = storagetm.Client("192.0.2.2", "10:42", 4, encrypted=True, cipher="TLS 1.3, AES-128-GCM")
SECOND = storagetm.Client("2001:db8:1234:5678:9abc:def0:1234:5678", "10:50", 12, encrypted=False)


def test_nobody_attached_is_safe() -> None:
    shown = report()
    assert ("safe", SAFE) in lines(shown)
    assert "attached" not in str([fact.text for fact in shown.facts()])
    assert shown.status() == "Exporting 1 disk at 1 address."


def test_who_is_attached_comes_first() -> None:
    shown = report(FIRST)
    assert lines(shown)[:4] == [
        ("alert", "1 client is attached: detach the disks there before you switch this machine off."),
        ("", "  192.0.2.2: since 10:42, 4 connections, encrypted (TLS 1.3, AES-128-GCM)"),
        ("", ""),
        ("", "To attach its disk, type as root on the other machine:"),
    ]
    assert SAFE not in str(lines(shown))
    assert shown.status() == "Exporting 1 disk at 1 address to 1 client."
    assert [f.text for f in shown.facts() if f.kind == "clients"] == ["Attached from 192.0.2.2"]


def test_several_are_counted() -> None:
    shown = report(FIRST, SECOND, access=storagetm.READ_WRITE)
    text = " ".join(text for _, text in lines(shown))
    assert text.startswith(
        "2 clients are attached: detach the disks there before you switch this machine off."
    )
    assert "What can be written to is for 1 client at a time." in text
    assert all(len(text) <= 80 for style, text in lines(shown) if style != "command")
    assert shown.status() == "Exporting 1 disk (1 read-write) at 1 address to 2 clients."
    (fact,) = (f.text for f in shown.facts() if f.kind == "clients")
    assert fact == (
        f"Attached from 192.0.2.2, {SECOND.who} (2 clients); "
        "what can be written to is for 1 client at a time"
    )


def test_nothing_is_called_safe_that_nobody_knows() -> None:
    shown = report(None)
    assert SAFE not in str(lines(shown))
    assert shown.status() == "Exporting 1 disk at 1 address."


def test_nothing_is_said_of_safety_while_there_is_no_disk() -> None:
    shown = storagetm.take_report(Named(), [Crowd()], addresses(), [], storagetm.Memory())
    assert SAFE not in str(lines(shown))


# When it is looked at


class Views(storagetm.Views):
    """With terminals that are just there."""

    def __init__(self, *terminals: storagetm.Terminal) -> None:
        super().__init__(lambda: None)
        self.terminals = list(terminals)


def attendance(
    transports: Sequence[storagetm.Transport], views: storagetm.Views, outdate: Callable[[], None]
) -> storagetm.Attendance:
    return storagetm.Attendance(transports, views, outdate)


def test_without_a_terminal_nobody_looks() -> None:
    """The journal's lines and the status are as of the last change of something else."""
    views = Views()
    assert attendance([Crowd()], views, lambda: None).due() is None
    terminal = storagetm.Terminal()
    views.terminals = [terminal]
    assert attendance([Crowd()], views, lambda: None).due() == storagetm.Attendance.LOOK_SEC
    terminal.gone = True
    assert attendance([Crowd()], views, lambda: None).due() is None


def test_only_a_change_is_shown() -> None:
    crowd, outdated = Crowd(), []
    looking = attendance([crowd], Views(storagetm.Terminal()), lambda: outdated.append(1))
    assert not looking.act()
    assert outdated == []
    crowd.crowd = (FIRST,)
    for _ in range(3):
        looking.act()
    assert len(outdated) == 1
    crowd.crowd = (None,)
    looking.act()
    assert len(outdated) == 1
    crowd.crowd = ()
    looking.act()
    assert len(outdated) == 2
