# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server for NBD, with real clients, hostile ones, and one that knows what a file has to be like."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import storagetm
from tests.unit.conftest import MEMORY
from tests.unit.exports import Named, made_disk, made_export

MiB = 1 << 20
READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8
LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_CONTEXT, SET_CONTEXT = 3, 5, 6, 7, 8, 9, 10
ACK, SERVER = 1, 2
UNSUP, POLICY, INVALID, UNKNOWN = 0x80000001, 0x80000002, 0x80000003, 0x80000006


class Serving:
    """A server in this process, and the thread that the program's loop would be."""

    def __init__(self, server: storagetm.NbdServer | None = None) -> None:
        self.server = server or storagetm.NbdServer()
        if server is None:
            self.server.listen("127.0.0.1", 0)
        self.port = min(s.getsockname()[1] for s in self.server.listening.values())
        self.ended = False
        self.thread = threading.Thread(target=self.loop)
        self.thread.start()

    def loop(self) -> None:
        poll = select.poll()
        poll.register(self.server.poll.fileno(), select.POLLIN)
        while not self.ended:
            if poll.poll(1000):
                self.server.accept()

    def add(
        self, path: Path, *, read_only: bool = True, name: str = "disk", **facts: Any
    ) -> storagetm.NbdDisk:
        disk = made_disk(
            str(path), size=path.stat().st_size, block=512, model="Model X", serial="S1", **facts
        )
        self.server.serve(name, storagetm.NbdDisk(str(path), disk, read_only=read_only))
        return self.server.disks[name]

    def uri(self, name: str = "disk") -> str:
        return f"nbd://127.0.0.1:{self.port}/{name}"

    def close(self) -> None:
        for name in list(self.server.disks):
            self.server.withdraw(name)
        self.ended = True
        self.server.tell()
        self.thread.join()
        self.server.stop_listening("127.0.0.1")
        for session in list(self.server.sessions):
            session.end()
        deadline = time.monotonic() + 10
        while self.server.sessions and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.server.sessions
        self.server.poll.close()
        for fd in (self.server.fd, self.server.wakeup):
            os.close(fd)


@pytest.fixture
def serving() -> Iterator[Serving]:
    made = Serving()
    yield made
    made.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file with data, a hole, and data again."""
    path = tmp_path / "image"
    content = random.Random(1).randbytes
    with path.open("wb") as file:
        file.write(content(2 * MiB))
        file.seek(5 * MiB)
        file.write(content(3 * MiB))
    return path


def run(*words: str) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


# Real clients


def test_clients_list_disks(serving: Serving, image: Path) -> None:
    serving.add(image)
    serving.add(image, name="sda10")
    serving.add(image, name="sda9", read_only=False)
    found = json.loads(run("nbdinfo", "--json", "--list", serving.uri("")))
    assert [e["export-name"] for e in found["exports"]] == ["disk", "sda9", "sda10"]
    assert [e["is_read_only"] for e in found["exports"]] == [True, False, True]
    first = found["exports"][0]
    assert first["description"] == "8.4 MB, Model X, S1"
    assert first["export-size"] == 8 * MiB
    assert first["contexts"] == ["base:allocation"]
    assert (first["block_size_minimum"], first["block_size_preferred"], first["block_size_maximum"]) == (
        512,
        4096,
        32 * MiB,
    )
    assert first["can_multi_conn"]
    assert first["can_df"]
    assert not first["can_zero"]


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("read_only", [True, False])
def test_all_is_copied(
    serving: Serving, image: Path, tmp_path: Path, connections: int, read_only: bool
) -> None:
    serving.add(image, read_only=read_only)
    copy = tmp_path / "copy"
    run("nbdcopy", f"--connections={connections}", "--request-size=4194304", serving.uri(), str(copy))
    assert copy.read_bytes() == image.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", serving.uri(), str(image))


def test_holes_are_told(serving: Serving, image: Path) -> None:
    serving.add(image)
    found = json.loads(run("nbdinfo", "--json", "--map", serving.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [
        (0, 2 * MiB, 0),
        (2 * MiB, 3 * MiB, 3),
        (5 * MiB, 3 * MiB, 0),
    ]


def test_holes_of_what_may_change_are_not_told(serving: Serving, image: Path) -> None:
    serving.add(image, read_only=False)
    found = json.loads(run("nbdinfo", "--json", "--map", serving.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [(0, 8 * MiB, 0)]


def test_client_writes(serving: Serving, image: Path) -> None:
    serving.add(image, read_only=False)
    expected = bytearray(image.read_bytes())
    commands = [
        ("write -P 0xaa 0 64k", 0, b"\xaa" * 65536),
        ("write -f -P 0xbb 1M 2M", MiB, b"\xbb" * 2 * MiB),
        ("write -P 0xcc 4095 513", 4095, b"\xcc" * 513),
        ("write -z 6M 1M", 6 * MiB, bytes(MiB)),
        ("write -z -u 7M 4k", 7 * MiB, bytes(4096)),
        ("flush", 0, b""),
    ]
    words = [word for command, _, _ in commands for word in ("-c", command)]
    run("qemu-io", "-f", "raw", *words, serving.uri())
    for _, offset, data in commands:
        expected[offset : offset + len(data)] = data
    assert image.read_bytes() == bytes(expected)
    run("qemu-io", "-f", "raw", "-c", "discard 0 1M", serving.uri())
    assert image.read_bytes()[MiB:] == bytes(expected)[MiB:]


def test_nothing_is_written_to_what_is_read_only(serving: Serving, image: Path) -> None:
    serving.add(image)
    before = image.read_bytes()
    with Client(serving) as client:
        client.go("disk")
        for command in (WRITE, TRIM, WRITE_ZEROES):
            code, _ = client.ask(command, 0, 4096, data=bytes(4096) if command == WRITE else b"")
            assert code == errno.EPERM
        assert client.read(0, 4096) == before[:4096]
    assert image.read_bytes() == before


# One that can do whatever it likes


class Client:
    def __init__(self, serving: Serving, *, structured: bool = False, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", serving.port), 30, (source, 0))
        self.structured = False
        self.cookie = 0
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.socket.sendall(struct.pack(">I", 3))
        if structured:
            assert self.option(STRUCTURED) == [(ACK, b"")]
            self.structured = True

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def take(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self.socket.recv(count - len(found))
            if not more:
                raise EOFError
            found += more
        return found

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All answers to an option."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        found = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, option) == (0x3E889045565A9, number)
            found.append((kind, self.take(length)))
            if kind not in (SERVER, 3, 4):
                return found

    def go(self, name: str = "", *, aware: bool = False) -> tuple[int, int]:
        """Chooses a disk; size and flags."""
        infos = [3] if aware else []
        data = (
            struct.pack(">I", len(name))
            + name.encode()
            + struct.pack(f">{1 + len(infos)}H", len(infos), *infos)
        )
        answers = self.option(GO, data)
        assert answers[-1] == (ACK, b""), answers
        size, flags = next(struct.unpack(">HQH", a)[1:] for _, a in answers if a[:2] == b"\0\0" and a)
        return int(size), int(flags)

    def ask(
        self, command: int, offset: int, length: int, *, flags: int = 0, data: bytes = b""
    ) -> tuple[int, bytes]:
        """Error and data of the answer to a request."""
        self.cookie += 1
        self.socket.sendall(
            struct.pack(">IHHQQI", 0x25609513, flags, command, self.cookie, offset, length) + data
        )
        found = bytearray(length if command == READ else 0)
        while True:
            (magic,) = struct.unpack(">I", self.take(4))
            if magic == 0x67446698:
                code, cookie = struct.unpack(">IQ", self.take(12))
                assert cookie == self.cookie
                return code, self.take(length) if command == READ and not code else b""
            assert magic == 0x668E33EF
            assert self.structured
            done, kind, cookie, count = struct.unpack(">HHQI", self.take(16))
            assert cookie == self.cookie
            payload = self.take(count)
            if kind == 0x8001:
                assert done
                return struct.unpack(">I", payload[:4])[0], b""
            if kind == 5:
                return 0, payload
            assert kind == 1
            place = int.from_bytes(payload[:8], "big") - offset
            found[place : place + count - 8] = payload[8:]
            if done:
                return 0, bytes(found)

    def read(self, offset: int, length: int) -> bytes:
        code, data = self.ask(READ, offset, length)
        assert code == 0
        return data


@pytest.mark.parametrize("structured", [True, False])
def test_requests_that_make_no_sense_are_refused(serving: Serving, image: Path, structured: bool) -> None:
    """The connection goes on after each."""
    serving.add(image, read_only=False)
    size = 8 * MiB
    with Client(serving, structured=structured) as client:
        assert client.go("disk")[0] == size
        for command, offset, length, flags, code in (
            (READ, size, 1, 0, errno.EINVAL),
            (READ, size - 1, 2, 0, errno.EINVAL),
            (READ, 2**63, 4096, 0, errno.EINVAL),
            (READ, 2**64 - 1, 1, 0, errno.EINVAL),
            (READ, 0, 0, 0, errno.EINVAL),
            (READ, 0, 2**32 - 1, 0, errno.EINVAL),
            (READ, 0, 512, 0x40, errno.EINVAL),
            (READ, 0, 2 * MiB, DF, errno.EOVERFLOW),
            (TRIM, size - 1, 2, 0, errno.ENOSPC),
            (WRITE_ZEROES, 2**63, 2**32 - 1, 0, errno.ENOSPC),
            (BLOCK_STATUS, 0, 512, 0, errno.EINVAL),  # nobody has asked for a kind of extents
            (5, 0, 512, 0, errno.EINVAL),
            (4711, 0, 512, 0, errno.EINVAL),
        ):
            if command == READ and not structured and not code:
                continue
            assert client.ask(command, offset, length, flags=flags)[0] == code, (command, offset, length)
        assert client.ask(WRITE, size - 1, 2, data=b"xx")[0] == errno.ENOSPC
        assert client.read(size - 2, 2) == image.read_bytes()[-2:]
        assert client.ask(TRIM, 0, size) == (0, b"")


def test_options_that_make_no_sense_are_refused(serving: Serving, image: Path) -> None:
    serving.add(image)
    with Client(serving) as client:
        for option, data, answer in (
            (LIST, b"x", INVALID),
            (STARTTLS, b"", UNSUP),
            (4711, b"xyz", UNSUP),
            (STRUCTURED, b"x", INVALID),
            (GO, b"", INVALID),
            (GO, struct.pack(">I", 2**32 - 1) + b"disk\0\0", INVALID),
            (GO, struct.pack(">I", 4) + b"disk\0\1", INVALID),
            (GO, struct.pack(">I", 4) + b"nice\0\0", UNKNOWN),
            (INFO, struct.pack(">I", 4) + b"nice\0\0", UNKNOWN),
            (SET_CONTEXT, b"", INVALID),
            # Structured replies come first.
            (SET_CONTEXT, struct.pack(">I", 4) + b"disk\0\0\0\0", INVALID),
        ):
            assert client.option(option, data)[-1][0] == answer, (option, data)
        assert client.option(LIST)[-1] == (ACK, b"")
        assert client.go()[0] == 8 * MiB  # the only one


def test_oldest_way_to_choose_a_disk(serving: Serving, image: Path) -> None:
    serving.add(image)
    with Client(serving) as client:
        client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
        size, flags = struct.unpack(">QH", client.take(10))
        assert size == 8 * MiB
        assert flags & 3 == 3
        assert client.read(100, 1000) == image.read_bytes()[100:1100]
    with Client(serving) as client:
        client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"nice")
        with pytest.raises(EOFError):
            client.take(1)


@pytest.mark.parametrize("early", [True, False])
def test_read_that_fails_is_told(
    serving: Serving, image: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """As of a disk with bad sectors: of what can be read all is read, and nothing is made up.

    What goes through a pipe fails at once, or after what could be read of it is in there.
    """
    serving.add(image)
    preadv, splice, failed = os.preadv, os.splice, []

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= 3 * MiB < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    def failing_splice(source: int, target: int, count: int, offset: int | None = None, **more: int) -> int:
        if offset is not None and offset <= 3 * MiB < offset + count:
            if early or offset == 3 * MiB:
                failed.append(offset)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            count = 3 * MiB - offset
        return splice(source, target, count, offset, **more)

    monkeypatch.setattr(os, "preadv", failing)
    monkeypatch.setattr(os, "splice", failing_splice)
    expected = image.read_bytes()
    with Client(serving, structured=True) as client:
        client.go("disk")
        assert client.ask(READ, 3 * MiB, 512) == (errno.EIO, b"")
        assert client.ask(READ, 0, 8 * MiB) == (errno.EIO, b"")
        assert client.read(5 * MiB, MiB) == expected[5 * MiB : 6 * MiB]
    assert failed
    with Client(serving, structured=True) as client:
        client.go("disk")
        assert client.ask(READ, 2 * MiB + 100, 2 * MiB) == (errno.EIO, b"")
        assert client.read(100, 2 * MiB) == expected[100 : 2 * MiB + 100]
    with Client(serving) as client:
        client.go("disk")
        assert client.ask(READ, 3 * MiB, 512) == (errno.EIO, b"")
        assert client.read(5 * MiB, MiB) == expected[5 * MiB : 6 * MiB]
        # Without structured replies there is no way to take back what was promised.
        with pytest.raises(EOFError):
            client.ask(READ, 0, 8 * MiB)


def test_slow_client_loses_its_connection_and_holds_up_nobody(
    serving: Serving, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storagetm.NbdSession, "PATIENCE_SEC", 1)
    serving.add(image)
    begin = time.monotonic()
    slow = [socket.create_connection(("127.0.0.1", serving.port), timeout=30) for _ in range(20)]
    with Client(serving) as client:
        client.go("disk")
        for s in slow:
            s.sendall(b"\0\0")
        assert client.read(0, 512) == image.read_bytes()[:512]
        while time.monotonic() < begin + 2:
            for s in slow:
                try:
                    s.sendall(b"\0")
                except OSError:
                    pass
            time.sleep(0.2)
        for s in slow:
            s.settimeout(5)
            try:
                while s.recv(100):
                    pass
            except ConnectionError:
                pass
            s.close()
        # Who has chosen a disk may be silent for as long as it likes.
        assert client.read(512, 512) == image.read_bytes()[512:1024]


def test_there_is_a_limit_of_connections(
    serving: Serving, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storagetm.NbdServer, "CONNECTIONS", 8)
    serving.add(image)
    clients = [Client(serving) for _ in range(8)]
    for client in clients:
        client.go("disk")
    assert all(session.disk for session in serving.server.sessions)
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", serving.port), timeout=30) as s:
            try:
                assert s.recv(100) == b""
            except ConnectionError:
                pass
    assert clients[3].read(0, 512) == image.read_bytes()[:512]
    for client in clients:
        client.socket.close()
    deadline = time.monotonic() + 10
    while serving.server.sessions and time.monotonic() < deadline:
        time.sleep(0.01)
    with Client(serving) as client:
        client.go("disk")


def test_who_opens_a_thousand_connections_keeps_nobody_out(serving: Serving, image: Path) -> None:
    """Of those that have not chosen a disk, the oldest go; and with a disk an address has so many."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    serving.add(image)
    with Client(serving) as attached:
        attached.go("disk")
        idle = [socket.create_connection(("127.0.0.1", serving.port), timeout=30) for _ in range(1000)]
        begin = time.monotonic()
        with Client(serving, source="127.0.0.2") as client:
            client.go("disk")
            assert client.read(0, 512) == image.read_bytes()[:512]
        assert attached.read(0, 512) == image.read_bytes()[:512]
        assert time.monotonic() - begin < storagetm.NbdSession.PATIENCE_SEC / 2
        assert len(serving.server.sessions) <= storagetm.NbdServer.CONNECTIONS
        for each in idle:
            each.close()
        several = [Client(serving) for _ in range(storagetm.NbdServer.EACH)]
        for client in several[1:]:
            client.go("disk")
        ((kind, text),) = several[0].option(GO, struct.pack(">I", 4) + b"disk\0\0")
        assert (kind, text) == (POLICY, b"there are 64 connections from this address")
        for client in several:
            client.socket.close()


@pytest.mark.parametrize("reading", [True, False])
def test_disk_that_goes_ends_its_connections(serving: Serving, image: Path, reading: bool) -> None:
    """Also of one who asks for much and does not take it."""
    disk = serving.add(image)
    with Client(serving) as client, Client(serving) as other:
        client.go("disk")
        other.option(LIST)
        if reading:
            for cookie in range(50):
                request = struct.pack(">IHHQQI", 0x25609513, 0, READ, cookie, 0, 8 * MiB)
                client.socket.sendall(request)
        begin = time.monotonic()
        serving.server.withdraw("disk")
        assert time.monotonic() - begin < 2
        assert disk.fd < 0
        with pytest.raises((EOFError, ConnectionError)):
            client.take(1 << 30)
        assert other.option(LIST) == [(ACK, b"")]


def test_closing_tells_who_has_gone(serving: Serving, image: Path) -> None:
    serving.add(image)
    transport = storagetm.Nbd()
    transport.server = serving.server
    assert transport.attached() == []
    with Client(serving) as client, Client(serving):
        client.go("disk")
        (one,) = transport.attached()
        assert one.about().startswith("127.0.0.1: since ")
        assert one.about().endswith(", 1 connection, not encrypted")
        client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 1, 0, 0))
        with pytest.raises(EOFError):
            client.take(1)
    deadline = time.monotonic() + 10
    while transport.attached() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert transport.attached() == []


@pytest.fixture(scope="module")
def lasting() -> Iterator[Serving]:
    """For what is done many times."""
    directory = Path(MEMORY or "/tmp") / f"nbd-{os.getpid()}"
    directory.mkdir()
    (directory / "image").write_bytes(bytes(range(256)) * 64)
    made = Serving()
    made.add(directory / "image")
    yield made
    made.close()
    shutil.rmtree(directory)


@settings(max_examples=150, deadline=None)
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.builds(
                lambda option, length, data: b"IHAVEOPT" + struct.pack(">II", option, length) + data,
                st.integers(0, 12),
                st.integers(0, 40),
                st.binary(max_size=40),
            ),
            max_size=4,
        ).map(b"".join),
    ),
    chosen=st.booleans(),
)
def test_client_may_send_any_bytes(lasting: Serving, raw: bytes, chosen: bool) -> None:
    """Others are served after that as before."""
    with Client(lasting) as client:
        if chosen:
            client.go()
            raw = b"\x25\x60\x95\x13" + raw
        try:
            client.socket.sendall(raw)
            client.socket.shutdown(socket.SHUT_WR)
            while client.socket.recv(65536):
                pass
        except OSError:
            pass  # it was closed
    with Client(lasting) as client:
        client.go()
        assert client.read(1, 255) == bytes(range(1, 256))


SIZE = 64 << 10
PLACES = st.integers(0, SIZE - 1)


class Written(RuleBasedStateMachine):
    """What clients write is what the file has, whatever parts of blocks they write."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(MEMORY or "/tmp") / f"written-{os.getpid()}-{id(self)}"
        self.path.write_bytes(bytes(SIZE))
        self.expected = bytearray(SIZE)
        self.serving = Serving()
        self.serving.add(self.path, read_only=False)
        self.clients = [Client(self.serving, structured=n == 1) for n in range(2)]
        for n, client in enumerate(self.clients):
            client.go("disk", aware=n == 1)

    @rule(
        which=st.booleans(),
        offset=PLACES,
        length=st.integers(1, 9000),
        fua=st.booleans(),
        byte=st.integers(1, 255),
    )
    def write(self, which: bool, offset: int, length: int, fua: bool, byte: int) -> None:
        data = bytes([byte]) * min(length, SIZE - offset)
        answer = self.clients[which].ask(WRITE, offset, len(data), data=data, flags=FUA * fua)
        assert answer == (0, b"")
        self.expected[offset : offset + len(data)] = data

    @rule(
        which=st.booleans(),
        offset=PLACES,
        length=st.integers(1, SIZE),
        flags=st.sampled_from([0, FUA, NO_HOLE]),
    )
    def zero(self, which: bool, offset: int, length: int, flags: int) -> None:
        length = min(length, SIZE - offset)
        assert self.clients[which].ask(WRITE_ZEROES, offset, length, flags=flags) == (0, b"")
        self.expected[offset : offset + length] = bytes(length)

    @rule(which=st.booleans(), offset=PLACES, length=st.integers(1, SIZE))
    def read(self, which: bool, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        assert self.clients[which].read(offset, length) == self.expected[offset : offset + length]

    @rule(which=st.booleans())
    def flush(self, which: bool) -> None:
        assert self.clients[which].ask(FLUSH, 0, 0) == (0, b"")
        assert self.path.read_bytes() == self.expected

    def teardown(self) -> None:
        for client in self.clients:
            client.socket.close()
        self.serving.close()
        assert self.path.read_bytes() == self.expected
        self.path.unlink()


TestWritten = Written.TestCase
TestWritten.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


# Addresses


def ports_of(transport: storagetm.Nbd) -> dict[str, int]:
    return {text: s.getsockname()[1] for text, s in transport.server.listening.items()}


class Nothing(storagetm.Entry):
    """Stands for what is between a disk and its export."""

    def __init__(self) -> None:
        super().__init__("nothing")

    def make(self, root: str) -> None:
        """There is nothing to do."""

    def unmake(self, root: str) -> None:
        """Nor then."""

    def is_live(self, _: str) -> bool:
        return True

    def described(self, _: str) -> dict[str, str]:
        return {"step": "nothing", "path": self.path, "command": "true"}

    def undescribed(self, _: str) -> dict[str, str]:
        return self.described(_)


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Path) -> Iterator[Callable[..., Any]]:
    """Makes what exports an image over NBD, read-write, which needs nothing of a kernel."""
    monkeypatch.setattr(storagetm, "RUN", f"{tmp_path}/run/")
    monkeypatch.setattr(storagetm, "set_urgent", lambda _: None)
    monkeypatch.setattr(storagetm, "backing", lambda disk, *_, **__: storagetm.Branch(disk.tag, [Nothing()]))
    made: list[storagetm.Exporter] = []

    def make(listening: storagetm.Listening | None = None) -> tuple[storagetm.Exporter, storagetm.Nbd]:
        transport = storagetm.Nbd(listening)
        access = storagetm.Access((), storagetm.READ_WRITE)
        inventory = storagetm.Inventory([storagetm.NamedDisks([str(image)])], access)
        exporter = storagetm.Exporter("quux", [transport], inventory)
        inventory.check_named()
        exporter.ledger.lock()
        exporter.begin()
        exporter.want.follow(list)
        made.append(exporter)
        return exporter, transport

    yield make
    for each in made:
        each.stop()


def test_disk_is_there_until_the_stop(exporter: Callable[..., Any], image: Path) -> None:
    made, transport = exporter()
    made.synchronise(strict=True)
    (port,) = set(ports_of(transport).values())
    assert port >= storagetm.Nbd.PORT
    (name,) = transport.server.disks
    serving = Serving(transport.server)
    found = json.loads(run("nbdinfo", "--json", f"nbd://127.0.0.1:{port}/{name}"))["exports"][0]
    assert found["export-size"] == 8 * MiB
    assert not found["is_read_only"]
    with Client(serving) as client:
        client.go()
        made.synchronise()
        assert client.read(0, 512) == image.read_bytes()[:512]
        serving.ended = True
        transport.server.tell()
        serving.thread.join()
        assert made.stop()
        with pytest.raises(EOFError):
            client.take(1)
    assert transport.server.disks == {}
    assert transport.server.listening == {}


def test_new_size_is_seen_by_who_connects_then(exporter: Callable[..., Any], image: Path) -> None:
    made, transport = exporter()
    made.synchronise(strict=True)
    ((name, disk),) = transport.server.disks.items()
    os.truncate(image, 9 * MiB)
    made.inventory.rescan()
    made.synchronise()
    assert transport.server.disks[name] is disk
    assert disk.size == 9 * MiB


@pytest.mark.parametrize("taken", [1, 3])
def test_next_free_port_is_taken(
    exporter: Callable[..., Any],
    taken: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [socket.create_server(("127.0.0.1", 0))]
    first = others[0].getsockname()[1]
    monkeypatch.setattr(storagetm.Nbd, "PORT", first)
    for number in range(1, taken):
        others.append(socket.create_server(("127.0.0.1", first + number)))
    made, transport = exporter()
    made.synchronise(strict=True)
    (port,) = set(ports_of(transport).values())
    assert port >= first + taken
    assert capfd.readouterr().err.count("is taken, using") == port - first
    for other in others:
        other.close()


def test_port_that_was_asked_for_is_taken(
    exporter: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Then no other one is chosen, and the screen says so."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        made, transport = exporter(storagetm.Listening(["127.0.0.1"], port))
        address = storagetm.Address(storagetm.AF_INET, "127.0.0.1", "lo", False)
        made.want.follow(lambda: [address])
        made.synchronise(strict=True)
        assert ports_of(transport) == {}
        why = f"TCP port {port} is taken at 127.0.0.1 by another program: NBD is not offered there"
        assert why in capfd.readouterr().err
        assert transport.way([address]).shut == f"TCP port {port} is taken by another program"


def test_parts_of_blocks_are_written_one_after_the_other(serving: Serving, image: Path) -> None:
    """By many clients at a time, each with its own bytes of the same blocks."""
    serving.add(image, read_only=False)
    count = 8
    clients = [Client(serving) for _ in range(count)]

    def write(number: int) -> None:
        for block in range(64):
            data = bytes([number + 1]) * 64
            assert clients[number].ask(WRITE, block * 512 + number * 64, 64, data=data) == (0, b"")

    for client in clients:
        client.go("disk")
    threads = [threading.Thread(target=write, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    block = b"".join(bytes([number + 1]) * 64 for number in range(count))
    assert image.read_bytes()[: 64 * 512] == block * 64
    assert serving.server.disks["disk"].ragged == count
    for client in clients:
        client.socket.close()
    deadline = time.monotonic() + 10
    while serving.server.disks["disk"].ragged and time.monotonic() < deadline:
        time.sleep(0.01)
    assert serving.server.disks["disk"].ragged == 0


def test_what_the_screen_says(exporter: Callable[..., Any]) -> None:
    """It works as it stands, but for the interface of the other machine."""
    made, transport = exporter()
    made.synchronise(strict=True)
    exports = list(made.inventory.exports.values())
    addresses = [
        storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", False),
        storagetm.Address(storagetm.AF_INET6, "2001:db8::1", "eth0", False),
        storagetm.Address(storagetm.AF_INET6, "fe80::1", "eth0", True),
    ]
    port = "" if transport.port == transport.PORT else f":{transport.port}"
    for address, host, part in (
        (addresses[0], "192.0.2.1", "192.0.2.1"),
        (addresses[1], "2001:db8::1", "[2001:db8::1]"),
        (addresses[2], "fe80::1%INTERFACE", "[fe80::1%25INTERFACE]"),
    ):
        (command,) = transport.instructions(exports, [address])
        assert command.line == (
            f"nbd-client {host} {transport.port} /dev/nbd0 -N image -b {exports[0].disk.block or 512} "
            "-persist -timeout 60"
        )
        assert f"nbd://{part}{port}/NAME" in transport.way([address]).hint
    assert transport.way(addresses).where == "3 addresses (NBD)"
    assert transport.way([]).shut == "the network is down"
    report = storagetm.take_report(Named(), [transport], addresses, exports, storagetm.Memory())
    assert report.exported[0].label == "NBD export image"
    assert report.status() == "Exporting 1 disk (1 read-write) at 3 addresses (NBD)."


def test_disk_that_can_be_written_to_is_for_one_client(serving: Serving, image: Path) -> None:
    """That is an address, from which there may be many connections; until the last of these has ended."""
    serving.add(image, read_only=False).clients = 1
    with Client(serving) as first, Client(serving) as second:
        first.go("disk")
        second.go("disk")
        with Client(serving, source="127.0.0.2") as other:
            name = struct.pack(">I", 4) + b"disk\0\0"
            ((kind, text),) = other.option(GO, name)
            assert (kind, text) == (POLICY, b"it is for 1 at a time, and taken")
            assert other.option(INFO, name)[-1] == (ACK, b"")
            first.socket.close()
            assert other.option(GO, name)[0][0] == POLICY
            second.socket.close()
            deadline = time.monotonic() + 10
            while (answer := other.option(GO, name))[-1][0] == POLICY and time.monotonic() < deadline:
                time.sleep(0.05)
            assert answer[-1] == (ACK, b"")


def test_two_ways_to_write_are_refused() -> None:
    """Unless any number of clients may write: those of one way do not know of the others."""
    export = made_export("vda", access=storagetm.SNAPSHOT)
    for clients, refused in ((1, ["nbd"]), (0, [])):
        transports = [storagetm.NvmeTcp(Named(), clients=clients), storagetm.Nbd(clients=clients)]
        tree = storagetm.Tree("/nonexistent/", storagetm.Ledger("/nonexistent/ledger"))
        wanted = storagetm.Wanted("quux", transports, tree, locks=False)
        assert [name for name, _ in wanted.mixed(export)] == refused
    export.access = storagetm.READ_ONLY
    assert wanted.mixed(export) == []
