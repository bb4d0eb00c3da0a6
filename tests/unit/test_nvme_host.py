# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host that asks for write protection: what it says on the wire, and what it takes for an answer."""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm


@pytest.fixture
def ends() -> Iterator[tuple[storagetm.NvmeHost, socket.socket]]:
    """A host that is connected to somebody who is not a target."""
    ours, theirs = socket.socketpair()
    host = storagetm.NvmeHost.__new__(storagetm.NvmeHost)
    host.begin()
    host.socket = ours
    ours.settimeout(1)
    with ours, theirs:
        yield host, theirs


GREETING = struct.pack("<BBBBI", 1, 0, 128, 0, 128) + bytes(120)


def ask(host: storagetm.NvmeHost) -> None:
    host.attach(1)
    host.finish()


def response(number: int, status: int = 0, result: int = 0) -> bytes:
    body = struct.pack("<QHHHH", result, 0, 0, number, status << 1)
    return struct.pack("<BBBBI", 5, 0, 24, 0, 24) + body


def test_write_protection_is_one_capsule_on_the_wire(ends: tuple[storagetm.NvmeHost, socket.socket]) -> None:
    host, target = ends
    host.attach(7)
    sent = target.recv(4096)
    assert len(sent) == 2 * 72
    assert struct.unpack("<BBBBI", sent[72:80]) == (4, 0, 72, 0, 72)
    opcode, flags, number, namespace = struct.unpack("<BBHI", sent[80:88])
    assert (opcode, flags, number, namespace) == (0x09, 0x40, 2, 7)
    assert struct.unpack("<II", sent[120:128]) == (0x84, 1)
    target.sendall(response(1) + response(2))
    host.finish()


def test_greeting_on_the_wire(ends: tuple[storagetm.NvmeHost, socket.socket]) -> None:
    """Two PDUs in one go. Whatever is sent before the second one is answered would go astray if it fails."""
    host, target = ends
    host.greet("nqn.test", "0" * 32)
    sent = target.recv(4096)
    assert len(sent) == 128 + 72 + 1024
    assert struct.unpack("<BBBBI", sent[:8]) == (0, 0, 128, 0, 128)
    assert struct.unpack("<BBBBI", sent[128:136]) == (4, 0, 72, 72, 72 + 1024)
    target.sendall(GREETING + response(1, status=0x4182))
    with pytest.raises(OSError, match="Input/output error"):
        host.attach(1)
    target.setblocking(False)
    with pytest.raises(BlockingIOError):
        target.recv(1)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (response(1, status=0x2002), errno.EIO),
        (response(1) + response(2, status=0x2002), errno.EIO),
        (response(3), errno.EPROTO),
        (response(1) + response(1), errno.EPROTO),
        (struct.pack("<BBBBI", 5, 0, 24, 0, 20) + bytes(12), errno.EPROTO),
        (struct.pack("<BBBBI", 5, 0, 24, 0, 1 << 31), errno.EPROTO),
        (struct.pack("<BBBBI", 3, 0, 24, 0, 24) + bytes(16), errno.EPROTO),
        (struct.pack("<BBBBI", 5, 1, 24, 0, 24) + bytes(16), errno.EPROTO),
        (b"", errno.ECONNRESET),
        (response(1)[:10], errno.ECONNRESET),
    ],
)
def test_malformed_answer_is_an_error(
    ends: tuple[storagetm.NvmeHost, socket.socket], answer: bytes, number: int
) -> None:
    host, target = ends
    target.sendall(answer)
    target.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        ask(host)
    assert caught.value.errno == number


def test_late_answer_is_an_error(ends: tuple[storagetm.NvmeHost, socket.socket]) -> None:
    host, _ = ends
    host.socket.settimeout(0.05)
    with pytest.raises(OSError, match="timed out"):
        ask(host)


@given(st.binary(max_size=300))
def test_target_may_send_any_bytes(raw: bytes) -> None:
    """A whole session, from the first PDU on, with somebody who says this."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        # It may have hung up already: no longer connected, or reset.
        with connection, contextlib.suppress(OSError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with pytest.raises(OSError):  # noqa: PT011
            ask(storagetm.NvmeHost(listener.getsockname(), "nqn.test", "0" * 32))
    finally:
        thread.join()
        listener.close()


def data(number: int, content: bytes) -> bytes:
    """What a command asked for, and that this is all."""
    head = struct.pack("<BBBBI", 7, 0x04, 24, 24, 24 + len(content))
    return head + struct.pack("<HHII4x", number, 0, 0, len(content)) + content + response(number)


def test_secret_is_proved_where_the_target_asks(ends: tuple[storagetm.NvmeHost, socket.socket]) -> None:
    """As NVMe base specification 2.0, 8.13.5 has the messages and the response."""
    host, target = ends
    host.greet("nqn.test", "0" * 32)
    host.secret = bytes(range(32))
    value, sequence = bytes(range(100, 132)), struct.pack("<I", 7)
    challenge = bytes([1, 1, 0, 0, 1, 0, 32, 0, 1, 0, 0, 0]) + sequence + value
    target.sendall(GREETING + response(1, result=1 << 17) + response(2) + data(3, challenge) + response(4))
    target.sendall(data(5, bytes([1, 3, 0, 0, 1, 0, 32, 0]) + bytes(8)) + response(6) + response(7))
    host.attach(1)
    host.finish()
    sent = target.recv(8192)[128 + 72 + 1024 :]
    negotiate, sent = sent[: 72 + 72], sent[72 + 72 :]
    assert negotiate[8:10] == b"\x7f\x40"
    assert negotiate[12] == 5
    assert negotiate[48:56] == struct.pack("<II", 0xE9010100, 72)
    assert negotiate[72:84] == bytes([0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 2])
    assert (negotiate[84], negotiate[114], negotiate[115]) == (1, 1, 0)  # SHA-256; ffdhe2048 or no group
    ask, sent = sent[:72], sent[72:]
    assert ask[12] == 6
    assert ask[48:56] == struct.pack("<II", 0xE9010100, 512)
    assert ask[40:44] == struct.pack("<I", 512)
    reply = sent[72 : 72 + 80]
    name = f"nqn.2014-08.org.nvmexpress:uuid:{storagetm.dashed('0' * 32)}".encode()
    message = value + sequence + b"\x01\0\0HostHost" + name + b"\0nqn.test"
    assert reply[:16] == bytes([1, 2, 0, 0, 1, 0, 32, 0, 0, 0, 0, 0]) + sequence
    assert reply[16:48] == hmac.digest(bytes(range(32)), message, "sha256")


@pytest.mark.parametrize(
    "message", [b"", b"\x01\xf1" + bytes(14), b"\0\x01" + bytes(14), b"\x01\x01" + bytes(13)]
)
def test_target_that_makes_no_sense_gets_no_proof(
    ends: tuple[storagetm.NvmeHost, socket.socket], message: bytes
) -> None:
    host, target = ends
    host.greet("nqn.test", "0" * 32)
    target.sendall(GREETING + response(1, result=1 << 17) + response(2) + data(3, message))
    with pytest.raises(OSError, match=os.strerror(errno.EPROTO)):
        host.attach(1)
    assert len(target.recv(8192)) == 128 + 72 + 1024 + 72 + 72 + 72
