#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that wants to change a disk that is exported read-only: runs in a machine.

    hostile.py ADDRESS PORT NQN SIZE LBA_SIZE COMMANDS

It speaks NVMe/TCP itself, so that no kernel of its own keeps it from anything. On an admin and an I/O
queue it takes Namespace Write Protect back, and sends every opcode that there is, with data, all over the
disk, and every feature and every admin command with several values. It connects anew whenever the target has
had enough. It ends after so many commands, or with 0 as COMMANDS when /run/enough is there. Prints again and
again how many commands there were so far, as "commands: N", and in the end how often each answer came, as
JSON: {"count": N, "connections": N, "outcomes": {"io 0x2020": N, ...}}.
"""

from __future__ import annotations

import collections
import json
import os
import random
import socket
import struct
import sys
import time

FABRICS = 0x7F
SET_FEATURES = 0x09
WRITE_PROTECT = 0x84
# Write, Write Uncorrectable, Compare, Write Zeroes, Dataset Management, reservations, Copy, zones.
WRITES = (0x01, 0x01, 0x04, 0x05, 0x08, 0x08, 0x09, 0x0D, 0x11, 0x15, 0x19, 0x79, 0x7D)
BATCH = 16  # commands that are under way together
HOST = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000bad0"
# Bytes that nobody has on a disk.
DATA = b"CHANGED!" * 1024


class Queue:
    """A queue, that is, a connection. `number` 0 is the admin queue."""

    def __init__(
        self,
        address: tuple[str, int],
        nqn: str,
        number: int,
        controller: int,
        namespace: int = 0,
        host: str = HOST,
    ) -> None:
        self.namespace = namespace
        self.socket = socket.create_connection(address, timeout=5)
        self.socket.sendall(struct.pack("<BBBBI", 0, 0, 128, 0, 128).ljust(128, b"\0"))
        self.read_pdu()
        data = bytes.fromhex(host[-36:].replace("-", "")) + struct.pack("<H", controller)
        data = data.ljust(256, b"\0") + nqn.encode().ljust(256, b"\0") + host.encode().ljust(256, b"\0")
        connect = self.command(FABRICS, 1, cdw10=number << 16, cdw11=31, data=data.ljust(1024, b"\0"))
        self.send([connect])
        status, self.result = self.answers(1)[0]
        if status:
            raise ConnectionError(f"connect: {status:#x}")

    def command(
        self,
        opcode: int,
        nsid: int | None = None,
        *,
        cdw10: int = 0,
        cdw11: int = 0,
        cdw12: int = 0,
        cdw13: int = 0,
        cdw14: int = 0,
        cdw15: int = 0,
        data: bytes = b"",
    ) -> bytes:
        nsid = self.namespace if nsid is None else nsid
        inside = data if opcode & 1 else b""
        # Data inside the capsule; or a buffer of the host's for what comes back.
        sgl = struct.pack("<QI3xB", 0, len(data), 0x01 if inside else 0x5A)
        entry = struct.pack("<BBHI16x", opcode, 0x40, 0, nsid) + sgl
        entry += struct.pack("<6I", cdw10, cdw11, cdw12, cdw13, cdw14, cdw15)
        return struct.pack("<BBBBI", 4, 0, 72, 72 if inside else 0, 72 + len(inside)) + entry + inside

    def send(self, commands: list[bytes]) -> None:
        numbered = [c[:10] + struct.pack("<H", i) + c[12:] for i, c in enumerate(commands)]
        self.socket.sendall(b"".join(numbered))

    def read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise ConnectionError("closed")
            data += part
        return data

    def read_pdu(self) -> tuple[int, int, bytes]:
        kind, flags, _, _, length = struct.unpack("<BBBBI", self.read(8))
        return kind, flags, self.read(length - 8)

    def answers(self, count: int) -> list[tuple[int, int]]:
        """Status and result of as many commands, in the order in which they end."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            kind, flags, body = self.read_pdu()
            if kind == 5:
                result, _, _, _, status = struct.unpack("<QHHHH", body[:16])
                found.append((status >> 1, result))
            elif kind == 7 and flags & 0x08:  # data, and with that the end
                found.append((0, 0))
            elif kind == 9:  # the target is ready for more data
                number, tag, offset, length = struct.unpack("<HHII", body[:12])
                head = struct.pack("<BBBBI", 6, 0x04, 24, 24, 24 + length)
                head += struct.pack("<HHII4x", number, tag, offset, length)
                self.socket.sendall(head + (DATA * (1 + length // len(DATA)))[:length])
            elif kind == 3:
                raise ConnectionError("terminated")
        return found

    def namespaces(self) -> list[int]:
        """The numbers of the active namespaces: Identify, CNS 2."""
        self.send([self.command(0x06, 0, cdw10=2, data=bytes(4096))])
        while True:
            kind, flags, body = self.read_pdu()
            if kind == 7:
                numbers = struct.unpack("<1024I", body[16 : 16 + 4096])
                if not flags & 0x08:
                    self.answers(1)
                return [n for n in numbers if n]
            if kind == 5:
                return []


class Hostile:
    def __init__(self, address: tuple[str, int], nqn: str, size: int, block: int) -> None:
        self.address = address
        self.nqn = nqn
        self.blocks = size // block
        self.block = block
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.count = 0
        self.connections = 0
        self.rounds = 0
        self.random = random.Random(1)

    def places(self) -> list[int]:
        """Logical blocks at both ends and anywhere between."""
        last = self.blocks - 1
        return [0, 1, last, *(self.random.randrange(self.blocks) for _ in range(5))]

    def io(self, queue: Queue) -> list[bytes]:
        self.rounds += 1
        opcode = self.random.choice(WRITES) if self.rounds & 1 else self.rounds // 2 % 256
        commands = []
        for place in self.places():
            blocks = self.random.choice((1, 1, 8, 8192 // self.block))
            ranges = struct.pack("<IIQ", 0, blocks, place)  # as Dataset Management and Copy have them
            for data in (DATA[: blocks * self.block], ranges.ljust(4096, b"\0")):
                # Dataset Management's and Zone Management Send's operands are where others have the length.
                more = self.random.choice(((blocks - 1, 0), (0, 4), (0, self.random.randrange(1 << 16))))
                if opcode == 0x09:
                    commands.append(queue.command(opcode, cdw10=0, cdw11=4, data=data[:16].ljust(16)))
                commands.append(
                    queue.command(
                        opcode,
                        cdw10=place & 0xFFFFFFFF,
                        cdw11=place >> 32,
                        cdw12=more[0] | self.random.choice((0, 1 << 30, 1 << 25)),
                        cdw13=more[1],
                        data=data,
                    )
                )
        return [c for c in commands if opcode != FABRICS]

    def admin(self, queue: Queue) -> list[bytes]:
        value = self.random.choice((0, 1, 2, 3, 0xFFFFFFFF))
        # Delete I/O queue and so on make no sense over Fabrics, Keep Alive and Abort change nothing.
        opcode = self.random.choice(
            (0x80, 0x84, 0x0D, 0x15, 0x10, 0x11, 0x81, 0x86, 0x7D, 0x1D, SET_FEATURES)
        )
        opcode = self.random.choice((opcode, self.random.randrange(256)))
        nsid = self.random.choice((queue.namespace, 0xFFFFFFFF, 0))
        feature = self.random.randrange(256)
        commands = [
            queue.command(SET_FEATURES, cdw10=feature, cdw11=value, data=DATA[:4096] if value & 1 else b""),
            queue.command(opcode, nsid, cdw10=value, cdw11=value, data=DATA[:4096]),
            # Always last, so that what comes next on the other queue finds it cleared.
            queue.command(SET_FEATURES, cdw10=WRITE_PROTECT, cdw11=0),
        ]
        # An asynchronous event is answered when it happens.
        return [c for c in commands if c[8] not in (FABRICS, 0x0C)]

    def round(self, deadline: float, wanted: int) -> None:
        """Attacks until the target closes the connection."""
        admin = Queue(self.address, self.nqn, 0, 0xFFFF)
        self.connections += 1
        controller = admin.result & 0xFFFF
        enable = [
            # Property Set: Controller Configuration.
            admin.command(FABRICS, 0, cdw11=0x14, cdw12=0x460001),
            admin.command(SET_FEATURES, 0, cdw10=7, cdw11=0x00010001),
        ]
        for command in enable:
            admin.send([command])
            admin.answers(1)
        admin.namespace = next(iter(admin.namespaces()), 1)
        io = Queue(self.address, self.nqn, 1, controller, admin.namespace)
        while (self.count < wanted or not wanted) and time.monotonic() < deadline:
            for name, queue, commands in (
                ("admin", admin, self.admin(admin)),
                ("io", io, self.io(io)),
            ):
                for start in range(0, len(commands), BATCH):
                    batch = commands[start : start + BATCH]
                    queue.send(batch)
                    self.count += len(batch)
                    for status, _ in queue.answers(len(batch)):
                        self.outcomes[f"{name} {status:#x}"] += 1
            print(f"commands: {self.count}", flush=True)


def main() -> None:
    address, port, nqn, size, block, wanted = sys.argv[1:]
    hostile = Hostile((address, int(port)), nqn, int(size), int(block))
    print("begun", flush=True)
    while (hostile.count < int(wanted)) if int(wanted) else not os.path.exists("/run/enough"):
        try:
            hostile.round(time.monotonic() + (1e9 if int(wanted) else 3), int(wanted))
        except (OSError, struct.error) as e:
            hostile.outcomes[f"{type(e).__name__}"] += 1
            time.sleep(0.01)
    print(
        json.dumps(
            {
                "count": hostile.count,
                "connections": hostile.connections,
                "outcomes": hostile.outcomes,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
