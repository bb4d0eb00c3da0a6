# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes or removes a firewall that drops all that comes in, on `lo` too: python3 firewall.py up|down

As `nft add chain inet test input { type filter hook input priority 0; policy drop; }` does it, without nft.
"""

from __future__ import annotations

import socket
import struct
import sys

NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 0x1, 0x4, 0x400
BATCH_BEGIN, BATCH_END = 0x10, 0x11
SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
NEWTABLE, DELTABLE, NEWCHAIN = SUBSYSTEM | 0, SUBSYSTEM | 2, SUBSYSTEM | 3
INET = 1
NESTED = 0x8000
DROP = 0
LOCAL_IN = 1


def attribute(kind: int, raw: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(raw), kind) + raw + bytes(-len(raw) % 4)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, flags: int, family: int, resource: int, body: bytes, sequence: int) -> bytes:
    payload = struct.pack(">BBH", family, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(payload), kind, NLM_F_REQUEST | flags, sequence, 0) + payload


def batch(*messages: tuple[int, int, bytes]) -> None:
    """Sends these as one transaction. Raises OSError for the first that is refused."""
    raw = message(BATCH_BEGIN, 0, 0, 10, b"", 0)
    for sequence, (kind, flags, body) in enumerate(messages, 1):
        raw += message(kind, flags | NLM_F_ACK, INET, 0, body, sequence)
    raw += message(BATCH_END, 0, 0, 10, b"", len(messages) + 1)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as s:
        s.settimeout(60)
        s.connect((0, 0))
        s.send(raw)
        for _ in messages:
            answer = s.recv(65536)
            (error,) = struct.unpack_from("=i", answer, 16)
            if error:
                raise OSError(-error, "refused")


def main() -> None:
    if sys.argv[1] == "down":
        batch((DELTABLE, 0, text(1, "test")))
        return
    hook = number(1, LOCAL_IN) + number(2, 0)
    chain = text(1, "test") + text(3, "input") + attribute(4 | NESTED, hook) + number(5, DROP)
    batch(
        (NEWTABLE, NLM_F_CREATE, text(1, "test")),
        (NEWCHAIN, NLM_F_CREATE, chain + text(7, "filter")),
    )


if __name__ == "__main__":
    main()
