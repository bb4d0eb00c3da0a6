# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of snapshots: how much there is, how it is shared out, and what becomes of one that is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storagetm
from storagetm import SNAPSHOT


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A /proc and an /etc of the test's own."""
    for name in ("ETC", "PROC"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/")


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
def test_part_of_the_memory_always_stays_free(
    asked: int, used: int, total: int, available: int, size: int
) -> None:
    with open(storagetm.PROC + "meminfo", "w") as file:
        file.write(f"MemTotal:       {total} kB\nMemAvailable:    {available} kB\n")
    memory = storagetm.Memory(asked)
    memory.filled = {"s": (used, used, "")}
    memory.measure()
    assert memory.size == size


@pytest.mark.parametrize(("mode", "spare"), [("0", 7 << 30), ("2", 1 << 20)])
@pytest.mark.usefixtures("places")
def test_only_what_is_not_committed_is_spared(mode: str, spare: int) -> None:
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


def test_invalid_store_is_revived_or_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_unit_of_a_snapshot_fits_partitions_and_blocks(
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
