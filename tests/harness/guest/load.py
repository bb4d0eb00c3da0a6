# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a disk, or reads and writes it, at random and without end, and compares each byte; runs on a client.

    load.py NODE SEED SIZE read|write

The disk holds what Random(SEED) gives, SIZE bytes of it. At SIGTERM it flushes and reads all once more.
Prints a JSON object: counts, the longest operation in seconds, what was wrong, errors, and the SHA-256 of
what the disk has to hold now.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import sys
import time

BLOCK = 4096
LONGEST = 32  # blocks in one operation
PAUSE = 0.01  # seconds: several emulated machines share a processor


def main() -> None:
    node, seed, size, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    content = bytearray(random.Random(seed).randbytes(size))
    chance = random.Random(seed + 1)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    counts = {"reads": 0, "writes": 0, "bytes": 0}
    wrong: list[int] = []
    errors: list[str] = []
    longest = 0.0
    fd = os.open(node, (os.O_RDWR if mode == "write" else os.O_RDONLY) | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK * LONGEST)
    view = memoryview(buffer)

    def compare(offset: int, length: int) -> None:
        if (
            os.preadv(fd, [view[:length]], offset) != length
            or view[:length] != content[offset : offset + length]
        ):
            wrong.append(offset)
        counts["reads"] += 1

    while not stopping and len(errors) < 100:
        blocks = chance.randint(1, LONGEST)
        offset = chance.randrange(size // BLOCK - blocks + 1) * BLOCK
        length = blocks * BLOCK
        begin = time.monotonic()
        try:
            if mode == "write" and chance.random() < 0.3:
                data = chance.randbytes(length)
                view[:length] = data
                if os.pwritev(fd, [view[:length]], offset) != length:
                    wrong.append(offset)
                content[offset : offset + length] = data
                counts["writes"] += 1
            else:
                compare(offset, length)
            if chance.random() < 0.01:
                os.fsync(fd)
        except OSError as e:
            errors.append(f"{time.strftime('%H:%M:%S')} {e.strerror} at {offset}")
        counts["bytes"] += length
        longest = max(longest, time.monotonic() - begin)
        time.sleep(PAUSE)
    os.fsync(fd)
    for offset in range(0, size, BLOCK * LONGEST):
        compare(offset, min(BLOCK * LONGEST, size - offset))
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({**counts, "longest": longest, "wrong": wrong, "errors": errors, "sha256": digest}))


if __name__ == "__main__":
    main()
