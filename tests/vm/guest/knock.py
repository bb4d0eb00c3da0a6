#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stranger who wants to get in where only some hosts are allowed: runs in a machine, beside hostile.py.

    knock.py ADDRESS PORT NQN HOSTNQN ATTEMPTS
    knock.py ADDRESS PORT NQN HOSTNQN queue CONTROLLER NAMESPACE

NQN and HOSTNQN are those of a permitted host, which cross the wire in the clear. The first form tries so
often, in turn with this and with other names, with and without a first message of TLS, which is replayed
and changed. The second, while that host is attached with that controller, adds an I/O queue, and reads.
Prints how many attempts there were and how many got in, as JSON.
"""

from __future__ import annotations

import collections
import json
import os
import random
import socket
import struct
import sys
import uuid

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from hostile import Queue  # type: ignore[import-not-found]

DISCOVERY = "nqn.2014-08.org.nvmexpress.discovery"
IDENTIFY, READ = 0x06, 0x02


def is_in(queue: Queue) -> bool:
    """Whether the target tells about itself, for which a host has to be attached."""
    queue.send([queue.command(0x7F, 4, cdw10=1, cdw11=0x14, cdw12=0x460001)])  # switches it on
    queue.answers(1)
    queue.send([queue.command(IDENTIFY, 0, cdw10=1, data=bytes(4096))])
    return bool(queue.answers(1)[0][0] == 0)


def hello(identity: str, chance: random.Random) -> bytes:
    """The first message of a TLS 1.3 connection by a PSK, with a binder that is none."""
    name = identity.encode()
    psk = struct.pack(">H", len(name)) + name + bytes(4)
    psk = struct.pack(">H", len(psk)) + psk + struct.pack(">HB", 33, 32) + chance.randbytes(32)
    share = struct.pack(">HHH", 36, 0x1D, 32) + chance.randbytes(32)
    extensions = b""
    for kind, body in (
        (43, b"\x02\x03\x04"),
        (10, struct.pack(">HH", 2, 0x1D)),
        (51, share),
        (45, b"\x01\x01"),
        (41, psk),  # the last one
    ):
        extensions += struct.pack(">HH", kind, len(body)) + body
    body = b"\x03\x03" + chance.randbytes(32) + b"\0" + struct.pack(">HH", 2, 0x1301) + b"\x01\0"
    body += struct.pack(">H", len(extensions)) + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack(">H", len(message)) + message


def takes_key(answer: bytes) -> bool:
    """Whether a server's first message says that it has taken the PSK (RFC 8446, 4.1.3 and 4.2.11)."""
    if answer[:1] != b"\x16" or answer[5:6] != b"\x02":
        return False
    rest = answer[43:]
    rest = rest[1 + rest[0] + 3 + 2 :]
    while len(rest) >= 4:
        kind, length = struct.unpack(">HH", rest[:4])
        if kind == 41:
            return True
        rest = rest[4 + length :]
    return False


def knock(address: tuple[str, int], nqn: str, host: str, attempts: int) -> dict[str, object]:
    chance = random.Random(1)
    outcomes: collections.Counter[str] = collections.Counter()
    entered = 0
    replayed = hello(f"NVMe1R01 {host} {nqn} {'A' * 43}=", chance)
    for attempt in range(attempts):
        kind = attempt % 5
        guessed = f"nqn.2014-08.org.nvmexpress:uuid:{uuid.UUID(int=chance.getrandbits(128), version=4)}"
        try:
            if kind < 3:
                queue = Queue(
                    address, DISCOVERY if kind == 2 else nqn, 0, 0xFFFF, host=guessed if kind == 1 else host
                )
                entered += is_in(queue)
                queue.socket.close()
                outcomes[f"{kind} answered"] += 1
                continue
            with socket.create_connection(address, timeout=5) as connection:
                message = bytearray(replayed)
                if kind == 4:
                    message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
                connection.sendall(message)
                answer = connection.recv(4096)
                entered += takes_key(answer)
                outcomes[f"{kind} {answer[:1].hex()}"] += 1
        except (OSError, ConnectionError) as e:
            outcomes[f"{kind} {type(e).__name__}"] += 1
    return {"attempts": attempts, "in": entered, "outcomes": outcomes}


def queue(
    address: tuple[str, int], nqn: str, host: str, controller: int, namespace: int
) -> dict[str, object]:
    for number in range(1, 128):
        try:
            found = Queue(address, nqn, number, controller, namespace, host=host)
            found.send([found.command(READ, data=bytes(512))])  # a block
            status = found.answers(1)[0][0]
            return {"in": int(status == 0), "number": number, "status": status, "result": found.result}
        except ConnectionError as e:
            # The number is taken, or there are no more.
            last = str(e)
            if "connect" not in last:
                break
        except OSError as e:
            return {"in": 0, "last": str(e)}
    return {"in": 0, "last": last}


def main() -> None:
    address = sys.argv[1], int(sys.argv[2])
    nqn, host = sys.argv[3:5]
    if sys.argv[5] == "queue":
        print(json.dumps(queue(address, nqn, host, int(sys.argv[6]), int(sys.argv[7]))))
    else:
        print(json.dumps(knock(address, nqn, host, int(sys.argv[5]))))


if __name__ == "__main__":
    main()
