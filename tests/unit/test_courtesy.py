# SPDX-License-Identifier: LGPL-2.1-or-later
"""What hosts are told of the protection where a firewall is in the way; and what is known of it."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm
from tests.unit.exports import Named, made_service
from tests.unit.test_shown import addresses, disk

PATH = "nvmet/subsystems/quux.{}/namespaces/1/write_protect"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> storagetm.Service:
    """One with two read-only disks, of which nothing is in a kernel."""
    for name in ("CONFIGFS", "RUN", "PROC", "SYS"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/{name.lower()}/")
    transport = storagetm.NvmeTcp(Named(), "quux")
    made = made_service(Named(), transport)
    for name in ("vda", "vdb"):
        subsystem = f"nvmet/subsystems/quux.{name}"
        entries = [
            storagetm.Directory(subsystem),
            storagetm.WriteProtection(PATH.format(name), transport.host),
        ]
        made.exporter.tree.live[subsystem] = storagetm.Branch("1", entries)
    return made


def transport_of(service: storagetm.Service) -> storagetm.NvmeTcp:
    (transport,) = service.exporter.transports
    assert isinstance(transport, storagetm.NvmeTcp)
    return transport


def protect(service: storagetm.Service) -> None:
    """As Tree.create() does it."""
    for branch in list(service.exporter.tree.live.values()):
        for entry in branch.entries:
            if isinstance(entry, storagetm.WriteProtection):
                entry.make(service.exporter.tree.root)


def failing(monkeypatch: pytest.MonkeyPatch, problem: OSError | None) -> list[str]:
    asked: list[str] = []

    def come_in(self: storagetm.WriteProtection, _: str) -> None:
        asked.append(self.path)
        if problem:
            raise problem

    monkeypatch.setattr(storagetm.WriteProtection, "come_in", come_in)
    return asked


BLOCKED = (
    "Failed to tell clients which disks are read-only: Connection timed out; let this machine's firewall "
    "accept all packets on 'lo'. Their writes fail all the same\n"
)


@pytest.mark.parametrize("problem", [OSError("timed out"), OSError(errno.ETIMEDOUT, "x")])
def test_refusal_is_said_once_and_tried_again_later(
    service: storagetm.Service,
    problem: OSError,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is found out once, said once, and tried again at growing intervals until it works."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def synchronise(**_: bool) -> None:
        protect(service)
        transport_of(service).note(service.exporter.tree.live)

    monkeypatch.setattr(service.exporter, "synchronise", synchronise)
    asked = failing(monkeypatch, problem)
    service.synchronise()
    assert asked == [PATH.format("vda")]
    assert tuple(capfd.readouterr()) == ("", BLOCKED)
    # Something else happens.
    now += 1
    service.synchronise()
    assert len(asked) == 1
    pauses = []
    reminder = storagetm.Reminder(service.exporter)
    for _ in range(10):
        due = reminder.due()
        assert due
        pauses.append(due - now)
        now = due
        assert reminder.act()  # exports have to be looked at again
        assert all(b.adopted for b in service.exporter.tree.live.values())
        service.synchronise()
    assert len(asked) == 11
    assert capfd.readouterr().err == ""
    assert pauses == [9, 20, 40, 80, 160, 320, 600, 600, 600, 600]
    failing(monkeypatch, None)
    now = transport_of(service).due
    assert reminder.act()
    service.synchronise()
    assert tuple(capfd.readouterr()) == ("Clients are told again which disks are read-only\n", "")
    assert reminder.due() is None


def test_refusal_about_one_disk_leaves_others_alone(
    service: storagetm.Service, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A refusal that is about one disk leaves the others alone."""
    asked = failing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    protect(service)
    transport_of(service).note(service.exporter.tree.live)
    assert len(asked) == 2
    assert capfd.readouterr().err == "".join(
        f"Failed to tell clients that 'quux.{name}' is read-only: Input/output error; their writes fail\n"
        for name in ("vda", "vdb")
    )
    assert transport_of(service).due
    service.exporter.tree.live.clear()
    transport_of(service).note(service.exporter.tree.live)
    assert not transport_of(service).host.untold
    assert transport_of(service).due == 0


def test_missing_loopback_address_is_named(
    service: storagetm.Service, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, OSError(errno.EADDRNOTAVAIL, "x"))
    protect(service)
    transport_of(service).note(service.exporter.tree.live)
    assert "Cannot assign requested address; give 'lo' the address 127.0.0.1. " in capfd.readouterr().err


def test_connection_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for as long as for an answer of a busy kernel."""
    monkeypatch.setattr(storagetm.NvmeHost, "CONNECT_SEC", 0.1)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        others = [socket.socket() for _ in range(4)]
        for other in others:  # of which the kernel lets one or two in
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        begin = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            storagetm.NvmeHost(full.getsockname(), "quux", "00" * 16)
        assert time.monotonic() - begin < storagetm.NvmeHost.TIMEOUT_SEC / 2
        for other in others:
            other.close()


# The firewall


def attribute(kind: int, raw: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(raw), kind) + raw + bytes(-len(raw) % 4)


def chain(family: int, hook: int | None, policy: int, rules: int) -> bytes:
    """A chain as the kernel describes it."""
    body = struct.pack(">BBH", family, 0, 7) + attribute(1, b"filter\0") + attribute(3, b"input\0")
    if hook is not None:
        nested = attribute(1, struct.pack(">I", hook)) + attribute(2, struct.pack(">I", 0))
        body += attribute(4, nested) + attribute(5, struct.pack(">I", policy))
    return body + attribute(6, struct.pack(">I", rules))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chain(1, 1, 0, 0), True),  # drops all
        (chain(2, 1, 1, 3), True),  # has rules
        (chain(10, 1, 1, 1), True),
        (chain(1, 1, 1, 0), False),  # empty
        (chain(1, 2, 0, 5), False),  # forwards
        (chain(1, 3, 0, 5), False),  # sends
        (chain(1, None, 0, 5), False),  # is jumped to
        (chain(7, 1, 0, 5), False),  # of a bridge
        (b"", False),
    ],
)
def test_only_a_chain_that_may_drop_input_is_a_filter(body: bytes, expected: bool) -> None:
    assert storagetm.is_input_filter(body) is expected


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda raw: chain(1, 1, 0, 0)[: len(raw)] + raw))
def test_input_filter_takes_any_bytes(raw: bytes) -> None:
    storagetm.is_input_filter(raw)


def test_tables_of_older_iptables_are_a_firewall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the older iptables, whose names the kernel lists; a module is never loaded to ask."""
    for name in ("PROC", "SYS"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/")
    monkeypatch.setattr(storagetm.Network, "dump", lambda *_: pytest.fail("it asked"))
    assert not storagetm.filters_input()
    (tmp_path / "net").mkdir()
    (tmp_path / "net/ip_tables_names").write_text("nat\n")
    assert not storagetm.filters_input()
    (tmp_path / "net/ip6_tables_names").write_text("nat\nfilter\n")
    assert storagetm.filters_input()


def test_half_an_answer_may_show_a_firewall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROC", "SYS"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/")
    (tmp_path / "module/nf_tables").mkdir(parents=True)

    def dump(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(storagetm.Network, "dump", dump)
    assert not storagetm.filters_input()
    monkeypatch.setattr(
        storagetm.Network, "dump", lambda *_: ([(storagetm.NFT_MSG_NEWCHAIN, chain(1, 1, 0, 0))], True)
    )
    assert storagetm.filters_input()


def test_ports_to_let_in_are_named() -> None:
    transport = storagetm.NvmeTcp(Named(), "quux")
    transport.ports = {storagetm.AF_INET: 59936, storagetm.AF_INET6: 36681}

    def taken(*, filtered: bool) -> storagetm.Report:
        memory = storagetm.Memory()
        return storagetm.take_report(
            Named(), [transport], addresses(), [disk("vda")], memory, filtered=filtered
        )

    text = "This machine has a firewall, which must let in TCP ports 59936 and 36681"
    for filtered in (True, False):
        shown = taken(filtered=filtered)
        assert [f.text for f in shown.facts() if f.kind == "firewall"] == [text] * filtered
        lines = [line for block in shown.blocks(80) for line in block]
        assert (("", f"{text}.") in lines) is filtered
    del transport.ports[storagetm.AF_INET6]
    assert taken(filtered=True).firewall.endswith(" must let in TCP port 59936")


# Many disks at once


class Guest:
    """Stands for storagetm.NvmeHost: a connection to a target that fails at one of the steps."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.steps: list[str] = []
        self.open = True

    def step(self, name: str) -> None:
        assert self.open
        self.steps.append(name)
        if name == self.fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def attach(self, number: int) -> None:
        self.step(f"ask for {number}")

    def finish(self) -> None:
        self.step("hear")

    def close(self) -> None:
        assert self.open
        self.open = False


@pytest.mark.parametrize("fails_at", ["come in", "ask for 1", "hear"])
def test_many_disks(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few at a time, each with a connection that is closed in the end; one that fails fails alone."""
    transport = storagetm.NvmeTcp(Named(), "quux")
    entries = [storagetm.WriteProtection(PATH.format(f"vd{i}"), transport.host) for i in range(7)]
    guests: list[Guest] = []
    most = 0

    def attach(_: tuple[str, int], nqn: str, __: str) -> Guest:
        nonlocal most
        made = Guest(fails_at if nqn == "quux.vd1" else "")
        made.step("come in")
        guests.append(made)
        most = max(most, sum(g.open for g in guests))
        return made

    monkeypatch.setattr(storagetm, "NvmeHost", attach)
    monkeypatch.setattr(storagetm.OwnHost, "open_passage", lambda *_: ("127.0.0.1", 4420))
    monkeypatch.setattr(storagetm.WriteProtection, "AT_ONCE", 3)
    transport.host.untold[entries[0].path] = OSError(errno.EIO, "of the last time")
    storagetm.WriteProtection.make_all(entries, "/")
    assert list(transport.host.untold) == [entries[1].path]
    assert most == 3
    assert not any(g.open for g in guests)
    whole = [g for g in guests if not g.fails_at]
    assert [g.steps for g in whole] == 6 * [["come in", "ask for 1", "hear"]]


def test_target_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of many disks is waited for."""
    transport = storagetm.NvmeTcp(Named(), "quux")
    entries = [storagetm.WriteProtection(PATH.format(f"vd{i}"), transport.host) for i in range(5)]
    waited = 0

    class Silent(Guest):
        def attach(self, number: int) -> None:
            nonlocal waited
            waited += 1
            raise OSError("timed out")

    guests: list[Guest] = []

    def attach(*_: object) -> Guest:
        guests.append(Silent(""))
        return guests[-1]

    monkeypatch.setattr(storagetm, "NvmeHost", attach)
    monkeypatch.setattr(storagetm.OwnHost, "open_passage", lambda *_: ("127.0.0.1", 4420))
    storagetm.WriteProtection.make_all(entries, "/")
    assert waited == 1
    assert len(guests) == 5
    assert not any(g.open for g in guests)
    assert {path: e.errno for path, e in transport.host.untold.items()} == {
        e.path: errno.ETIMEDOUT for e in entries
    }
