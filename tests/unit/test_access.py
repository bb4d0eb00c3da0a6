# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kinds of access: which disk gets which, the kernel command line, and the memory of snapshots."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import storagetm
from storagetm import READ_ONLY, READ_WRITE, SNAPSHOT


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A /proc and an /etc of the test's own."""
    for name in ("ETC", "PROC"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/")


# Which disk


def disk(node: str, *links: str, serial: str = "", model: str = "") -> storagetm.Disk:
    made = storagetm.Disk(node.rpartition("/")[2], node, node.rpartition("/")[2])
    made.serial, made.model = serial, model
    made.udev_entry = b"".join(b"S:%s\n" % link.removeprefix("/dev/").encode() for link in links)
    return made


@pytest.mark.parametrize(
    ("glob", "matches"),
    [
        ("/dev/sda", True),
        ("/dev/sd*", True),
        ("/dev/sd?", True),
        ("/dev/sd[b-z]", False),
        ("sda", False),
        ("/dev/disk/by-path/pci-0000:00:1f.2-ata-1", True),
        ("*ata-1", True),
        ("WD-123*", True),
        ("wd-123*", False),
        ("WDC_WD40*", True),
        ("WDC WD40*", True),
        ("WDC_WD40EFRX_WD-1234", True),
        ("", False),
    ],
)
def test_what_a_rule_matches(glob: str, matches: bool) -> None:
    found = disk(
        "/dev/sda", "/dev/disk/by-path/pci-0000:00:1f.2-ata-1", serial="WD-1234", model="WDC_WD40EFRX"
    )
    found.id_serial = "WDC_WD40EFRX_WD-1234"
    access = storagetm.Access([(glob, READ_WRITE)], SNAPSHOT)
    assert access.of(found) == (READ_WRITE if matches else SNAPSHOT)


def test_first_rule_counts() -> None:
    access = storagetm.Access([("/dev/sda", SNAPSHOT), ("/dev/sd*", READ_WRITE), ("*", READ_ONLY)])
    assert [access.of(disk(n)) for n in ("/dev/sda", "/dev/sdb", "/dev/vda")] == [
        SNAPSHOT,
        READ_WRITE,
        READ_ONLY,
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("/dev/sda:read-write", ("/dev/sda", READ_WRITE)),
        ("/dev/disk/by-path/pci-0000:00:1f.2*:snapshot", ("/dev/disk/by-path/pci-0000:00:1f.2*", SNAPSHOT)),
    ],
)
def test_rule(text: str, rule: tuple[str, str]) -> None:
    assert storagetm.parse_rule(text) == rule


@pytest.mark.parametrize("text", ["", "/dev/sda", "/dev/sda:", ":read-write", "/dev/sda:rw", "read-only"])
def test_bad_rule(text: str) -> None:
    with pytest.raises(storagetm.UsageError, match="--access="):
        storagetm.parse_rule(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("1024K", 1 << 20), ("1m", 1 << 20), ("3G", 3 << 30), ("2T", 2 << 40)],
)
def test_size(text: str, size: int) -> None:
    assert storagetm.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "lots", "-1G", "1.5G", "1GB", "1023K", "0", "9" * 30, "99999999999T", "½G", "٣G"]
)
def test_bad_size(text: str) -> None:
    with pytest.raises(storagetm.UsageError, match="--snapshot="):
        storagetm.parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--read-only", "--read-write"], "--read-write and --read-only do not go together"),
        (["--snapshot", "--read-only"], "--read-only and --snapshot do not go together"),
        (["--snapshot="], "--snapshot= is empty"),
        (["--access=x"], "is not GLOB:MODE"),
        (["--access"], "needs a value"),
        (["--read-write=yes"], "takes no value"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    with pytest.raises(storagetm.UsageError, match=message):
        storagetm.parse_arguments(["/dev/sda"][: message != "needs a value"] + arguments)


def test_snapshot_takes_no_device_for_its_size() -> None:
    options = storagetm.parse_arguments(["--snapshot", "/dev/sda"])
    assert (options.mode, options.store, options.devices) == (SNAPSHOT, 0, ["/dev/sda"])
    assert storagetm.parse_arguments(["--snapshot=2M", "/dev/sda"]).store == 2 << 20


# The kernel command line


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"quiet  root=/dev/sda1\tro\n", ["quiet", "root=/dev/sda1", "ro"]),
        (b'a="b c" d', ["a=b c", "d"]),
        (b'"a=b c" d', ["a=b c", "d"]),
        (b"a='b \"c' d", ['a=b "c', "d"]),
        (b'a=b"c d"e', ["a=bc de"]),
        (b'a\\ b "" c\\"d', ["a\\", "b", "", "c\\d"]),
        (b'a "b c', ["a", "b c"]),
        (b"", []),
    ],
)
def test_words(raw: bytes, words: list[str]) -> None:
    assert storagetm.split_command_line(raw) == words


@given(st.binary(max_size=200))
@example(b'storagetm.access="')
@example(b"rd.storagetm.=\xff rd.storagetm.snapshot=9M storagetm. rd.=x =")
def test_any_bytes_as_command_line(raw: bytes) -> None:
    for text in (raw, b"rd.storagetm." + raw, b"storagetm.access=" + raw):
        try:
            found = storagetm.options_from_kernel(storagetm.split_command_line(text), True)
        except storagetm.UsageError:
            continue
        assert found.mode in ("", *storagetm.ACCESS)


def options(*words: str, initrd: bool = True) -> storagetm.Options:
    return storagetm.options_from_kernel(words, initrd)


def test_options_from_kernel(capfd: pytest.CaptureFixture[str]) -> None:
    found = options(
        "rd.storagetm.snapshot=2M",
        "storagetm.access=/dev/sda:read-write",
        "rd.storagetm.nqn=quux",
        "rd.storagetm.kernel_command_line",
        "rd.storagetm.colour=red",
        "rd.systemd.unit=x",
    )
    assert (found.mode, found.store, found.nqn) == (SNAPSHOT, 2 << 20, "quux")
    assert found.rules == [("/dev/sda", READ_WRITE)]
    error = capfd.readouterr().err
    assert "Unknown option 'rd.storagetm.colour' on the kernel command line, ignoring it" in error
    assert "rd.storagetm.kernel_command_line" in error
    # Underscores and dashes are the same, as everywhere on the kernel command line.
    assert options("rd.storagetm.read_write").mode == READ_WRITE


def test_initrd_options_count_there_only() -> None:
    assert options("rd.storagetm.read-write", initrd=False).mode == ""
    assert options("storagetm.read-write", initrd=False).mode == READ_WRITE


@pytest.mark.parametrize(
    "word",
    [
        *("snapshot=lots", "snapshot=", "access=/dev/sda", "access", "read-write=1", "nqn=a/b", "nqn="),
        # What prints something and ends, which nobody could read there.
        *("help", "version", "list-devices", "list_devices", "dry-run", "json"),
    ],
)
def test_bad_options_from_kernel(word: str) -> None:
    with pytest.raises(storagetm.UsageError, match=r"^Kernel command line: .*; correct it$"):
        options(f"rd.storagetm.{word}")


def test_own_options_come_first() -> None:
    own = storagetm.parse_arguments(["--all", "--read-only", "--access=a:snapshot"])
    storagetm.add_options(own, options("rd.storagetm.read-write", "rd.storagetm.access=b:read-write"))
    assert (own.mode, own.rules) == (READ_ONLY, [("a", SNAPSHOT)])
    own = storagetm.parse_arguments(["--all", "--access=a:snapshot"])
    storagetm.add_options(own, options("rd.storagetm.read-write", "rd.storagetm.access=b:read-only"))
    assert (own.mode, own.rules) == (READ_WRITE, [("a", SNAPSHOT), ("b", READ_ONLY)])


@pytest.mark.parametrize(
    ("line", "mode", "refused"),
    [
        (b"quiet storagetm.read-write", READ_WRITE, ""),
        (b"quiet storagetm.snapshot=x", "", "Kernel command line: storagetm.snapshot=x is no size"),
        (
            b"storagetm.json",
            "",
            "Kernel command line: 'storagetm.json' prints text and exports nothing, which only helps in a "
            "shell; correct it",
        ),
        (b"storagetm.list-devices", "", "Kernel command line: 'storagetm.list-devices' prints text"),
    ],
)
@pytest.mark.usefixtures("places")
def test_only_where_asked_for(line: bytes, mode: str, refused: str) -> None:
    with open(storagetm.PROC + "cmdline", "wb") as file:
        file.write(line)
    found = storagetm.parse_arguments(["--all", "--kernel-command-line"])
    assert found.mode == mode
    assert found.refused.startswith(refused)
    assert bool(found.refused) == bool(refused)
    assert not found.action
    assert storagetm.parse_arguments(["--all"]).mode == ""


@pytest.mark.parametrize("arguments", [["--colour", "--all"], ["--all", "sda"], [], ["--snapshot=x"]])
@pytest.mark.usefixtures("places")
def test_unit_with_bad_options(arguments: list[str]) -> None:
    """A drop-in of the unit may make no sense, either."""
    for argv in (["--kernel-command-line", *arguments], [*arguments, "--kernel-command-line"]):
        found = storagetm.parse_arguments(argv)
        assert found.refused
        assert found.kernel_command_line
    with pytest.raises(storagetm.UsageError):
        storagetm.parse_arguments(arguments)


@pytest.mark.usefixtures("places")
def test_action_in_a_shell() -> None:
    """Who asks for text there gets it, or the error, and no service."""
    argv = ["--kernel-command-line", "--list-devices"]
    assert storagetm.parse_arguments(argv).list_devices
    with pytest.raises(storagetm.UsageError):
        storagetm.parse_arguments([*argv, "sda"])


# The host that asks for write protection


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


def test_write_protect_on_the_wire(ends: tuple[storagetm.NvmeHost, socket.socket]) -> None:
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
def test_malformed_answer(
    ends: tuple[storagetm.NvmeHost, socket.socket], answer: bytes, number: int
) -> None:
    host, target = ends
    target.sendall(answer)
    target.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        ask(host)
    assert caught.value.errno == number


def test_late_answer(ends: tuple[storagetm.NvmeHost, socket.socket]) -> None:
    host, _ = ends
    host.socket.settimeout(0.05)
    with pytest.raises(OSError, match="timed out"):
        ask(host)


@given(st.binary(max_size=300))
def test_any_bytes_from_a_target(raw: bytes) -> None:
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


# The memory of snapshots


@settings(max_examples=300)
@given(
    st.integers(1 << 22, 1 << 34),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6),
    st.integers(0, 4),
)
def test_limits_never_exceed_the_memory(size: int, stores: list[tuple[float, float]], coming: int) -> None:
    """Not even while they are being moved, as long as they did not before."""
    part = size // max(1, len(stores))
    limits = {f"s{i}": int(part * limit) & ~0xFFF for i, (limit, _) in enumerate(stores)}
    used = {f"s{i}": int(limits[f"s{i}"] * fill) for i, (_, fill) in enumerate(stores)}

    def state(name: str) -> tuple[int, int, str]:
        return used[name], limits[name], ""

    def set_limit(name: str, limit: int, _: int, shrinks: bool) -> int:
        assert shrinks == (limit < limits[name])
        limits[name] = limit & ~0xFFF
        assert limits[name] + 0xFFF >= used[name]
        assert sum(limits.values()) <= size
        return limits[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storagetm, "snapshot_state", state)
        patch.setattr(storagetm, "set_snapshot_limit", set_limit)
        patch.setattr(storagetm, "spare_memory", lambda: size)
        memory = storagetm.Memory(size)
        new = [storagetm.Mapping(f"dm/new{i}", SNAPSHOT) for i in range(coming)]
        memory.share([storagetm.Mapping(f"dm/{name}", SNAPSHOT) for name in limits], new)
    assert memory.used == sum(used.values())
    assert sum(limits.values()) + sum(m.store for m in new) <= size + len(new) * (storagetm.STORE_MIN // 8)


GIB = 1 << 20  # in the units of meminfo


@pytest.mark.parametrize(
    ("asked", "used", "total", "available", "size"),
    [
        # Half of what is available.
        (0, 0, 16 * GIB, 8 * GIB, 4 << 30),
        (5 << 20, 0, 16 * GIB, 8 * GIB, 5 << 20),
        # An eighth of the machine's memory stays free, and never less than 64 MiB.
        (8 << 30, 0, 1 * GIB, GIB * 3 // 4, 5 << 27),
        (8 << 30, 0, GIB // 4, GIB // 8, 64 << 20),
        (8 << 30, 0, GIB // 8, GIB // 32, 0),
        # What is used is not available any longer, and cannot be given back.
        (8 << 30, 1 << 28, 1 * GIB, GIB // 2, 5 << 27),
        (8 << 30, 1 << 28, 1 * GIB, 0, 1 << 28),
        (1 << 28, 1 << 29, 1 * GIB, GIB // 2, 1 << 29),
    ],
)
@pytest.mark.usefixtures("places")
def test_memory_that_can_be_spared(asked: int, used: int, total: int, available: int, size: int) -> None:
    with open(storagetm.PROC + "meminfo", "w") as file:
        file.write(f"MemTotal:       {total} kB\nMemAvailable:    {available} kB\n")
    memory = storagetm.Memory(asked)
    memory.filled = {"s": (used, used, "")}
    memory.measure()
    assert memory.size == size


@pytest.mark.parametrize(("mode", "spare"), [("0", 7 << 30), ("2", 1 << 20)])
@pytest.mark.usefixtures("places")
def test_memory_that_is_not_committed(mode: str, spare: int) -> None:
    with open(storagetm.PROC + "meminfo", "w") as file:
        file.write(f"MemTotal: {8 * GIB} kB\nMemAvailable: {8 * GIB} kB\n")
        file.write(f"CommitLimit: {4 * GIB + 1024} kB\nCommitted_AS: {4 * GIB} kB\n")
    Path(storagetm.PROC + "sys/vm").mkdir(parents=True)
    Path(storagetm.PROC + "sys/vm/overcommit_memory").write_text(mode)
    assert storagetm.spare_memory() == spare


class Stores:
    """Stores in a machine with so much memory to spare, as the kernel has them: used, limit, trouble."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spare: int, **stores: tuple[int, int, str]) -> None:
        self.stores = stores
        self.spare = spare
        self.revived: list[str] = []
        self.stuck = False
        monkeypatch.setattr(storagetm, "snapshot_state", lambda name: self.stores.get(name))
        monkeypatch.setattr(storagetm, "set_snapshot_limit", self.set_limit)
        monkeypatch.setattr(storagetm, "revive_snapshot", self.revive)
        monkeypatch.setattr(storagetm, "spare_memory", lambda: self.spare)

    def set_limit(self, name: str, limit: int, slack: int, shrinks: bool) -> int:
        used, before, trouble = self.stores[name]
        assert shrinks == (limit < before)
        self.stores[name] = used, limit, trouble
        return limit

    def revive(self, name: str) -> None:
        if self.stuck:
            raise OSError(errno.EIO, "")
        self.revived.append(name)
        used, limit, _ = self.stores[name]
        self.stores[name] = used, limit, ""

    def share(self, memory: storagetm.Memory) -> dict[str, tuple[int, int, str]]:
        memory.share([storagetm.Mapping(f"dm/{name}", SNAPSHOT) for name in self.stores])
        return memory.filled


MIB = 1 << 20


def test_memory_shrinks_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits follow what the machine can spare; one that ran full takes writes again once there is room."""
    stores = Stores(monkeypatch, 64 * MIB, a=(8 * MIB, 8 * MIB, ""), b=(0, 0, ""))
    memory = storagetm.Memory(1 << 40)
    assert stores.share(memory) == {"a": (8 * MIB, 40 * MIB, ""), "b": (0, 32 * MIB, "")}
    assert memory.size == 72 * MIB
    stores.spare = 0
    assert stores.share(memory) == {"a": (8 * MIB, 8 * MIB, ""), "b": (0, 0, "")}
    assert memory.size == 8 * MIB
    stores.stores["a"] = 8 * MIB, 8 * MIB, storagetm.OVERFLOW
    stores.spare = 3 * MIB  # not worth it yet
    assert stores.share(memory)["a"] == (8 * MIB, 8 * MIB, storagetm.OVERFLOW)
    assert memory.full
    assert stores.revived == []
    stores.spare = 16 * MIB
    assert stores.share(memory) == {"a": (8 * MIB, 16 * MIB, ""), "b": (0, 8 * MIB, "")}
    assert stores.revived == ["a"]
    assert not memory.full


def test_invalid_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made valid, or its memory is given back: others have it then."""
    stores = Stores(monkeypatch, 1 << 40, a=(4 * MIB, 8 * MIB, storagetm.INVALID), b=(MIB, MIB, ""))
    memory = storagetm.Memory(16 * MIB)
    assert stores.share(memory)["a"][2] == ""
    assert (memory.repaired, memory.lost) == ({"a"}, set())
    stores.share(memory)
    assert (memory.repaired, memory.lost) == (set(), set())
    stores.stores["a"] = 8 * MIB, 8 * MIB, storagetm.INVALID
    stores.stuck = True
    assert stores.share(memory) == {"b": (MIB, 16 * MIB, "")}
    assert (memory.repaired, memory.lost) == (set(), {"a"})
    assert memory.used == MIB


@pytest.mark.parametrize(
    ("starts", "block", "chunk"),
    [
        ([], "512", 8),
        ([2048, 4096], "512", 8),
        ([2048, 34], "512", 2),
        ([63], "512", 1),
        ([63], "4096", 8),
        ([2048], "16384", 32),
    ],
)
def test_unit_of_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: list[int], block: str, chunk: int
) -> None:
    """Whatever a file system overwrites as a whole is whole units."""
    monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/")
    monkeypatch.setattr(storagetm, "device_below", lambda _: "sda")
    monkeypatch.setattr(storagetm, "device_number", lambda _: "8:0")
    base = tmp_path / "class/block/sda"
    (base / "queue").mkdir(parents=True)
    (base / "queue/logical_block_size").write_text(block)
    for number, start in enumerate(starts, 1):
        (base / f"sda{number}").mkdir()
        (base / f"sda{number}/partition").write_text(str(number))
        # Where udev looks for all partitions, too.
        (tmp_path / f"class/block/sda{number}").mkdir()
        (tmp_path / f"class/block/sda{number}/start").write_text(str(start))
    assert storagetm.chunk_sectors("/dev/sda") == chunk


@pytest.mark.parametrize(
    ("size", "stores", "pause"),
    [
        # The only one has all the room from the start.
        (16 << 20, [(0, 16 << 20, "")], 1),
        (16 << 20, [(0, 8 << 20, ""), (8 << 20, 8 << 20, "Overflow")], 1),
        # Half of it is written within moments by a client that sees no reason to wait.
        (16 << 20, [(0, 8 << 20, ""), (0, 8 << 20, "")], 0.05),
        (1 << 30, [(0, 512 << 20, ""), (0, 512 << 20, "")], 0.25),
        (16 << 30, [(0, 8 << 30, ""), (4 << 30, 8 << 30, "")], 1),
        # Nothing is left to divide.
        (16 << 20, [(8 << 20, 8 << 20, ""), (8 << 20, 8 << 20, "")], 1),
        # So many take their time to be looked at.
        (1 << 30, [(0, 2 << 20, "")] * 500, 0.5),
    ],
)
def test_fast_writers_are_watched(size: int, stores: list[tuple[int, int, str]], pause: float) -> None:
    memory = storagetm.Memory(size)
    memory.size = size
    memory.filled = {f"s{i}": store for i, store in enumerate(stores)}
    assert memory.pause == pause
