# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make fuzz`: whatever reads data from outside gets inputs that atheris makes up, guided by coverage.

    python -m tests.programs.fuzz [--seconds=600] [--jobs=N] [PARSER...]

Each parser runs in a process of its own and begins with what real machines have said. No input may make it
raise anything but what its callers expect, take seconds, or break what is asserted here. An input that does
is kept in build/fuzz/PARSER/ and named at the end; it belongs into the unit tests then.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import functools
import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import storagetm
from tests.harness.images import PROJECT

CAPTURES = PROJECT / "tests/unit/captures"
PLACE = PROJECT / "build/fuzz"
INPUT_MAX = 4096  # bytes
SLOW_SEC = 10  # what takes longer counts as a hang

Parser = Callable[[bytes], object]


def assignments(raw: bytes) -> None:
    for key, value in storagetm.parse_assignments(raw).items():
        assert key
        assert key.isprintable()
        assert value.isprintable()


def udev_database(raw: bytes) -> None:
    seq, _, entry = raw.partition(b"\n")
    storagetm.is_of_former_disk(entry, storagetm.printable(seq))
    disk = storagetm.BlockDevice("x", "/dev/x", "x")
    disk.identify_by_udev(storagetm.parse_udev_database(entry))
    assert (disk.model + disk.serial + disk.id_serial).isprintable()


def vpd_page(raw: bytes) -> None:
    storagetm.parse_vpd_serial(raw)
    storagetm.parse_vpd_name(raw)


def mountinfo(raw: bytes) -> None:
    list(storagetm.parse_mountinfo(raw))


def swaps(raw: bytes) -> None:
    list(storagetm.parse_swaps(raw))


def netlink(raw: bytes) -> None:
    for _, _, body in storagetm.parse_messages(raw):
        storagetm.parse_link(body)
        if found := storagetm.parse_address(body):
            assert found[1].text
        storagetm.parse_attributes(body)


def sockets(raw: bytes) -> None:
    every = range(65536)
    found = [storagetm.parse_connection(body, every) for _, _, body in storagetm.parse_messages(raw)]
    found += [storagetm.parse_connection(raw, every), *storagetm.parse_sockets(raw, every)]
    assert all(c is None or (c.address.isprintable() and c.cipher.isprintable()) for c in found)


def uevent(raw: bytes) -> None:
    assert "\0" not in storagetm.parse_uevent(raw)


def block_uevent(raw: bytes) -> None:
    number, diskseq = storagetm.parse_block_uevent(raw)
    assert set(number + diskseq) <= set("0123456789:")


def ledger(raw: bytes) -> None:
    for root, (branch, _) in storagetm.Ledger.parse(raw).items():
        assert branch.root == branch.entries[0].path == root
        assert not any(".." in entry.path.split("/") for entry in branch.entries)


def stays_of_disks(raw: bytes) -> None:
    stays = storagetm.Stays()
    for number, *rest in stays.parse(raw):
        stays.add(int(number), *rest)
    assert len(stays.numbers) == len(stays.known)
    assert all(0 < number <= storagetm.NSID_MAX for number in stays.numbers)


def kernel_command_line(raw: bytes) -> None:
    try:
        found = storagetm.options_from_kernel(storagetm.split_command_line(raw), True)
    except storagetm.UsageError:
        return
    assert found.mode in ("", *storagetm.ACCESS)


def arguments(raw: bytes) -> None:
    try:
        storagetm.parse_arguments([os.fsdecode(argument) for argument in raw.split(b"\0")])
    except storagetm.UsageError:
        pass


def home_record(raw: bytes) -> None:
    storage, path = storagetm.parse_home_record(raw, "42aefbae01d2dfd981f7da7d823d689e")
    assert isinstance(storage, str)
    assert path == "" or path.startswith("/")


def partition_table(raw: bytes) -> None:
    """As a file that a client has written to, with and without checksums that are right."""
    fd = os.memfd_create("home")
    try:
        os.write(fd, bytes(512) + raw)
        header = storagetm.gpt_header.from_buffer_copy(raw.ljust(512, b"\0"))
        size = min(header.count * header.entry_size, 1 << 16)
        table = storagetm.Gpt(header, raw[512 : 512 + size].ljust(size, b"\0"))
        if 92 <= header.size <= 512 and header.array_lba < 1 << 20 and header.own_lba < 1 << 20:
            table.write(fd)
        for lba in (1, header.own_lba % 64):
            storagetm.user_in(storagetm.Gpt.read(fd, lba))
        storagetm.widen_partition(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def device_mapper(raw: bytes) -> None:
    storagetm.dm_target_text(raw.ljust(ctypes.sizeof(storagetm.dm_ioctl), b"\0"))


class Answers:
    """Stands in for a socket whose other end says this and hangs up."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        part, self.raw = self.raw[:size], self.raw[size:]
        return part


def nvme_target(raw: bytes) -> None:
    host = storagetm.NvmeHost.__new__(storagetm.NvmeHost)
    host.begin()
    host.socket = Answers(raw)  # type: ignore[assignment]
    try:
        host.greet("nqn.2014-08.org.example", "0" * 32)
        host.attach(1)
        host.finish()
    except OSError:
        pass


class NbdClient(Answers):
    """Stands in for the connection of a client that says this and hangs up, and takes what comes."""

    def recv_into(self, view: memoryview) -> int:
        part = self.recv(len(view))
        view[: len(part)] = part
        return len(part)

    def sendmsg(self, parts: Iterable[memoryview]) -> int:
        return sum(map(len, parts))

    def fileno(self) -> int:
        return nbd_disks()[2]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None  # what has to do with time


@functools.cache
def nbd_disks() -> tuple[storagetm.NbdServer, list[Path], int]:
    """A server for a disk that can be read and one that can be written to, and where answers go."""
    server, places = storagetm.NbdServer(), []
    for name in ("a", "b"):
        place = PLACE / "nbd" / f"disk-{name}"
        place.write_bytes(NBD_CONTENT)
        disk = storagetm.NamedDisks.resolve(str(place))
        disk.size, disk.block = len(NBD_CONTENT), 512
        server.serve(name, storagetm.NbdDisk(str(place), disk, read_only=name == "a"))
        places.append(place)
    return server, places, os.open("/dev/null", os.O_WRONLY)


NBD_CONTENT = bytes(range(256)) * 64


def nbd(raw: bytes) -> None:
    """From the first byte to the end of a connection; nobody is left, and what is read-only stays."""
    server, places, _ = nbd_disks()
    session = storagetm.NbdSession(server, NbdClient(raw), "192.0.2.1", 1)  # type: ignore[arg-type]
    server.sessions.add(session)
    session.run()
    assert not server.sessions
    assert not any(disk.users or disk.ragged for disk in server.disks.values())
    assert places[0].read_bytes() == NBD_CONTENT
    assert places[1].stat().st_size == len(NBD_CONTENT)


def nbd_option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def nbd_request(kind: int, offset: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, length)


def nbd_seeds() -> Iterable[bytes]:
    """Dialogues that use all of the protocol."""
    for name in (b"a", b"b", b"c"):
        named = struct.pack(">I", 1) + name
        context = named + struct.pack(">II", 1, 15) + b"base:allocation"
        requests = b"".join(
            nbd_request(kind, offset, length, flags) + bytes(length if kind == 1 else 0)
            for kind in (0, 1, 3, 4, 6, 7)
            for offset, length, flags in ((0, 512, 0), (700, 100, 1), (2**63, 1, 0))
        )
        begin = b"\0\0\0\3" + nbd_option(3) + nbd_option(5) + nbd_option(6, named + b"\0\1\0\3")
        yield begin + nbd_option(1, name) + requests
        more = nbd_option(8) + nbd_option(9, context) + nbd_option(10, context)
        yield begin + more + nbd_option(7, named + b"\0\1\0\3") + requests + nbd_request(2, 0, 0)


def texts(raw: bytes) -> None:
    text = storagetm.printable(raw)
    assert text.replace("\n", "").isprintable()
    assert len(storagetm.nvme_string(text, storagetm.MODEL_MAX)) <= storagetm.MODEL_MAX
    assert storagetm.quoted(text)


PARSERS: dict[str, Parser] = {
    f.__name__: f
    for f in (
        assignments,
        udev_database,
        vpd_page,
        mountinfo,
        swaps,
        netlink,
        sockets,
        uevent,
        block_uevent,
        ledger,
        stays_of_disks,
        kernel_command_line,
        arguments,
        home_record,
        partition_table,
        device_mapper,
        nvme_target,
        nbd,
        texts,
    )
}

# Where in what was captured on real machines a parser's inputs are.
SEEDS = {
    "assignments": r"/etc/os-release$|/uevent$",
    "block_uevent": r"/uevent$",
    "udev_database": r"/run/udev/data/",
    "mountinfo": r"/mountinfo$",
    "swaps": r"/swaps$",
    "vpd_page": r"/vpd_pg",
}
MORE_SEEDS = {
    "ledger": [b"+\0nvmet/ports/1\0port\0dnvmet/ports/1\0\n=\0nvmet/ports/1\x0017\0\n-\0nvmet/ports/1\0\n"],
    "stays_of_disks": [b"1 0123456789abcdef a b c\n4294967294 d a b e\n"],
    "kernel_command_line": [
        b'ro rd.storagetm.access="/dev/disk/by-path/*:0:snapshot" storagetm.snapshot=4G'
    ],
    "arguments": [b"--all\0--access=x:read-only\0--snapshot=4G\0-a\0--\0x"],
    "nvme_target": [
        bytes((1, 0, 128, 0, 128, 0, 0, 0)) + bytes(120) + bytes((5, 0, 24, 0, 24, 0, 0, 0)) + bytes(16)
    ],
    "sockets": [
        b"0: 010200C0:41DA 020200C0:D4F2 01 0:0 2:0\n",
        bytes((2, 1, 0, 0, 0x41, 0xDA, 0xD4, 0xF2))
        + bytes(16)
        + bytes((192, 0, 2, 2))
        + bytes(44)
        + bytes((40, 0, 19, 0, 36, 0, 2, 0, 6, 0, 1, 0, 4, 3, 0, 0, 6, 0, 2, 0, 51, 0, 0, 0))
        + bytes((6, 0, 3, 0, 2, 0, 0, 0, 6, 0, 4, 0, 2, 0, 0, 0)),
    ],
    "texts": ["Ünïcode\x1b[2J\n".encode()],
}


def home_seeds(name: str) -> Iterable[bytes]:
    home = json.loads((CAPTURES / "home.json").read_text())
    if name == "home_record":
        yield home["record"].encode()
    if name == "partition_table":
        for state in ("went", "shrunk", "back"):
            yield zlib.decompress(base64.b64decode(home[state]["head"]))[512:][:INPUT_MAX]


def seeds(name: str) -> Iterable[bytes]:
    """What real machines have said to this parser, and a few words of its language."""
    yield from home_seeds(name)
    yield from nbd_seeds() if name == "nbd" else MORE_SEEDS.get(name, ())
    for path in sorted(CAPTURES.glob("*.json")):
        capture = json.loads(path.read_text())
        for kind, messages in capture.get("netlink", {}).items():
            if name == ("uevent" if kind in ("kernel", "udev") else "netlink"):
                for message in [messages] if isinstance(messages, str) else messages:
                    yield bytes.fromhex(message)[:INPUT_MAX]
        for file, content in capture.get("files", {}).items():
            if isinstance(content, str) and name in SEEDS and re.search(SEEDS[name], file):
                yield content.encode(errors="surrogateescape")[:INPUT_MAX]


def fuzz(name: str, seconds: int) -> None:
    """Runs one parser, in this process, which ends with the first input that breaks it."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["storagetm"]):
        importlib.reload(storagetm)
    # What they warn of is not what this is about.
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    storagetm.warning = storagetm.info
    atheris.Setup(
        [
            name,
            str(PLACE / name / "corpus"),
            f"-max_total_time={seconds}",
            f"-max_len={INPUT_MAX}",
            f"-timeout={SLOW_SEC}",
            "-rss_limit_mb=1024",
            f"-artifact_prefix={PLACE / name}/",
            "-print_final_stats=1",
        ],
        PARSERS[name],
    )
    atheris.Fuzz()


def run(name: str, seconds: int) -> bool:
    """Runs one parser in a process of its own; whether nothing broke it."""
    place = PLACE / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "corpus").mkdir(parents=True)
    for number, seed in enumerate(seeds(name)):
        (place / "corpus" / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, "-m", "tests.programs.fuzz", "--one", f"--seconds={seconds}", name]
    begin = time.monotonic()
    output = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    (place / "output").write_bytes(output)
    inputs = re.search(rb"stat::number_of_executed_units:\s*(\d+)", output)
    covered = re.findall(rb"cov: (\d+)", output)
    broken = sorted(p.name for p in place.glob("*-*") if p.name.startswith(("crash", "timeout", "oom")))
    passed = bool(inputs) and not broken
    verdict = f"; BROKEN by {place}/{broken[0]}" if broken else "" if passed else f"; see {place}/output"
    print(
        f"{name}: {int(inputs[1]) if inputs else 0:,} inputs in {time.monotonic() - begin:.0f} s, "
        f"{covered[-1].decode() if covered else 0} branches reached{verdict}",
        flush=True,
    )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Gives parsers inputs that a fuzzer makes up.")
    parser.add_argument("--seconds", type=int, default=600, help="for each parser (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    args = parser.parse_args()
    if unknown := [name for name in args.parsers if name not in PARSERS]:
        parser.error(f"no such parser: {unknown[0]}")
    if args.one:
        fuzz(args.parsers[0], args.seconds)
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda name: run(name, args.seconds), args.parsers or PARSERS))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
