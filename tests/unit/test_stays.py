# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a disk or medium is to clients, from when it came until it leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import storagetm
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import Named, made_disk

SALT = bytes(range(16))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "quux.disks")


@pytest.fixture(autouse=True)
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Boots the machine again: what is in /run is gone, and the boot has another ID."""
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    monkeypatch.setattr(storagetm, "PROC", f"{tmp_path}/")
    monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/sys/")

    def begin(name: str) -> None:
        (tmp_path / "sys/kernel/random/boot_id").write_text(f"{name}\n")
        (tmp_path / "quux.disks").unlink(missing_ok=True)

    begin("first")
    return begin


def disk(name: str, serial: str = "", tag: str = "", slot: str = "") -> storagetm.Disk:
    """One with a serial number in a slot. The tag changes with the disk or its medium."""
    made = storagetm.BlockDevice(name, f"/dev/{name}", name)
    made.id_serial, made.tag = serial, tag or f"{name} {serial}"
    made.place = f"{storagetm.SYS}devices/{slot or name}/block/{name}"
    os.makedirs(f"{storagetm.SYS}devices/{slot or name}/block/{name}", exist_ok=True)
    device = f"{made.place}/device"
    if not os.path.lexists(device):
        os.symlink("../..", device)
    return made


def run(path: str) -> storagetm.Stays:
    """What a run of the program knows at first."""
    made = storagetm.Stays(path, SALT)
    made.kept = True
    return made


def number(stays: storagetm.Stays, disk: storagetm.Disk, *, alone: bool = True) -> int:
    stay = stays.begin(disk, alone=alone)
    stays.note()
    assert stay
    return stay.number


def identities(stays: storagetm.Stays, disk: storagetm.Disk, *, alone: bool = True) -> set[str]:
    """All by which a client could take one disk for another."""
    export = storagetm.Export(disk, storagetm.BlockDevices())
    export.stay = stays.begin(disk, alone=alone)
    stays.note()
    assert export.stay
    transport = storagetm.NvmeTcp(Named(SALT), "quux")
    return {
        str(export.stay.number),
        transport.identities.uuid(export),
        transport.identities.nguid(export),
        transport.identities.serial(export),
    }


def test_disk_with_a_serial_number_keeps_its_number(path: str, boot: Callable[[str], None]) -> None:
    """Under whatever node it comes back: in this run, in the next, and after a reboot."""
    before = run(path)
    first, second = number(before, disk("sda", "ONE")), number(before, disk("sdb", "TWO"))
    assert number(before, disk("sda", "ONE")) == first != second
    assert number(run(path), disk("sdb", "TWO")) == second
    boot("second")
    after = run(path)
    assert number(after, disk("sdb", "ONE")) == first
    assert number(after, disk("sda", "TWO")) == second


def test_number_is_one_that_nvme_has(path: str) -> None:
    stays = run(path)
    numbers = {number(stays, disk(f"sd{i}", f"DISK-{i}")) for i in range(1000)}
    assert len(numbers) == 1000
    assert all(0 < n < 0x10000 for n in numbers)
    # Those of another machine are others.
    other = storagetm.Stays(path + ".other", bytes(16))
    assert number(other, disk("sd0", "DISK-0")) != number(stays, disk("sd0", "DISK-0"))


@pytest.mark.parametrize("serial", ["", "READER"])
def test_another_medium_has_nothing_of_the_one_before(path: str, serial: str) -> None:
    """Nor has one that was put in again: the drive does not tell which it is."""
    stays = run(path)
    seen: set[str] = set()
    for medium in range(4):
        found = identities(stays, disk("sda", serial, f"8:0 {medium}", "reader"))
        assert len(found) == 4
        assert not found & seen
        seen |= found
    # But the one that is in keeps all when the program is started again.
    assert identities(run(path), disk("sda", serial, "8:0 3", "reader")) == found


def test_disk_in_the_place_of_another_has_nothing_of_it(path: str) -> None:
    """Pulled, and another one gets its node, or its serial number, or both."""
    stays = run(path)
    seen: set[str] = set()
    for n, (name, serial) in enumerate((("sda", ""), ("sda", "ONE"), ("sdb", "ONE"), ("sda", "ONE"))):
        found = identities(stays, disk(name, serial, f"tag {n}", f"slot {n}"))
        assert not found & seen
        seen |= found


def test_what_may_be_another_disk_has_another_number_after_a_reboot(
    path: str, boot: Callable[[str], None]
) -> None:
    reader, dock, nothing, twin = (
        disk("sda", "READER"),
        disk("sdb", "DOCK", slot="pci/usb1/1-1"),
        disk("vda"),
        disk("vdb", "SAME"),
    )
    reader.removable = True
    before = [number(run(path), d, alone=d is not twin) for d in (reader, dock, nothing, twin)]
    assert before == [number(run(path), d, alone=False) for d in (reader, dock, nothing, twin)]
    boot("second")
    after = [number(run(path), d, alone=d is not twin) for d in (reader, dock, nothing, twin)]
    assert not set(before) & set(after)


def test_twins_have_identities_of_their_own(path: str, boot: Callable[[str], None]) -> None:
    """The first keeps the contract's UUID, each other one has its own, as long as it stays in its slot."""
    first, second, third = (disk(f"sd{n}", "SAME", f"tag {n}", f"slot {n}") for n in range(3))
    stays = run(path)
    found = [identities(stays, d, alone=False) for d in (first, second, third)]
    assert len(set.union(*found)) == 12
    alone = identities(storagetm.Stays("", SALT), disk("sdx", "SAME", "other"))
    assert len(found[0] & alone) == 3  # all but the number
    again = run(path)
    assert [identities(again, d, alone=False) for d in (third, first, second)] == [
        found[n] for n in (2, 0, 1)
    ]
    boot("second")
    stays = run(path)
    assert len(identities(stays, first, alone=False) & found[0]) == 3
    assert len(identities(stays, third, alone=False) & found[2]) == 3


def test_boot_partitions_of_an_emmc_are_disks_of_their_own(path: str) -> None:
    """Their device is the disk."""
    stays = run(path)
    disks = [disk(name, slot="mmc0:0001") for name in ("mmcblk0", "mmcblk0boot0", "mmcblk0boot1")]
    assert len({d.location() for d in disks}) == 3
    assert len(set.union(*(identities(stays, d) for d in disks))) == 12


def test_partitions_of_one_disk_have_identities_of_their_own(
    unpack: Callable[[str], CapturedMachine], path: str
) -> None:
    """They all have the disk's serial number in udev's database."""
    captured = unpack("trixie-partitioned")
    inventory = storagetm.Inventory([storagetm.NamedDisks(())], stays=storagetm.Stays(path, SALT))
    names = sorted(p.name for p in captured.path("/sys/class/block").iterdir() if (p / "partition").exists())
    disks = [made_disk(name) for name in names]
    for each in disks:
        inventory.probe(storagetm.Export(each, inventory.sources[0]))
        each.id_serial = "DISK"
    assert len(disks) > 1
    assert len({d.location() for d in disks}) == len(disks)
    assert len(set.union(*(identities(inventory.stays, d) for d in disks))) == 4 * len(disks)


def test_file_that_replaces_another_has_nothing_of_it(tmp_path: Path, path: str) -> None:
    """Under the same path, with the same number in the file system."""
    image = tmp_path / "disk.img"
    seen: set[str] = set()
    stays = run(path)
    for _ in range(3):
        image.unlink(missing_ok=True)
        image.write_bytes(bytes(4096))
        made = made_disk(str(image), id_serial="./disk.img")
        made.probe()
        found = identities(stays, made)
        assert not found & seen
        seen |= found
        assert identities(run(path), made) == found


def test_file_lasts_only_if_it_is_known_when_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_disk(str(tmp_path / "image"))
    (tmp_path / "image").write_bytes(bytes(512))
    made.probe()
    assert made.lasts()
    monkeypatch.setattr(storagetm, "birth_time", lambda _: "")
    made.probe()
    assert not made.lasts()


def test_birth_time_is_when_a_file_was_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    st_ = (tmp_path / "file").stat()
    assert abs(float(storagetm.birth_time(str(tmp_path / "file"))) - st_.st_mtime) < 60
    assert storagetm.birth_time(str(tmp_path / "missing")) == ""


def test_no_number_is_given_twice(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is given is not given again, whatever the digests are."""
    monkeypatch.setattr(storagetm, "NSID_MAX", 5)
    stays = run(path)
    numbers = [number(stays, disk(f"sd{i}", f"DISK-{i}")) for i in range(5)]
    assert sorted(numbers) == [1, 2, 3, 4, 5]
    assert stays.begin(disk("sdx", "DISK-X"), alone=True) is None
    assert [number(run(path), disk(f"sd{i}", f"DISK-{i}")) for i in range(5)] == numbers


def test_disks_whose_numbers_would_clash_have_others_after_each_boot(
    path: str, boot: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the one that is found first would get the other's."""
    monkeypatch.setattr(storagetm, "NSID_MAX", 40)
    inventory = storagetm.Inventory([storagetm.BlockDevices()], stays=run(path))
    disks = [disk(f"sd{i}", f"DISK-{i}") for i in range(10)]
    exports = [storagetm.Export(d, inventory.sources[0]) for d in disks]
    inventory.exports = {e.disk.key: e for e in exports}
    inventory.begin_stays(exports)
    choices = [inventory.stays.choice(d.identity()) for d in disks]
    clashing = [d for d, n in zip(disks, choices) if choices.count(n) > 1]
    assert 0 < len(clashing) < 10
    for each, choice in zip(exports, choices):
        assert each.stay
        assert each.disk in clashing or each.stay.number == choice
    before = {e.disk.key: e.stay.number for e in exports if e.stay}
    monkeypatch.setattr(storagetm, "NSID_MAX", 40)
    boot("second")
    inventory.stays = run(path)
    for each in exports:
        each.stay = None
    inventory.begin_stays(reversed(exports))
    after = {e.disk.key: e.stay.number for e in exports if e.stay}
    assert {n for n in before if before[n] == after[n]} >= {d.sysname for d in disks if d not in clashing}
    assert sorted(set(after.values())) == sorted(after.values())


def test_nothing_is_written_before_the_lock_is_held(path: str) -> None:
    """As in a dry run."""
    stays = storagetm.Stays(path, SALT)
    assert number(stays, disk("sda", "ONE"))
    assert not os.path.exists(path)


def test_disk_is_exported_without_a_place_for_notes(capfd: pytest.CaptureFixture[str]) -> None:
    """The disk is exported all the same, and why its number may not last is said."""
    assert number(run("/proc/none"), disk("sda", "ONE"))
    assert "Failed to note the numbers of namespaces in '/proc/none'" in capfd.readouterr().err


def test_note_that_does_not_fit_spoils_no_other(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is written in part would take the next one with it, and two disks be one."""
    stays = run(path)
    number(stays, disk("sda", "ONE"))
    before = Path(path).read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
        assert number(stays, disk("sdb", "TWO"))
    assert Path(path).read_bytes() == before


@given(st.binary(max_size=200))
@example(b"1 x a b c\n1 y a b c\n0 z a b c\n-1 a a b c\n2\n 3 b a b c\n1e3 c a b c\n1 x\n")
@example(b"9" * 5000 + b" x a b c\n")
@example("² x a b c\n".encode())
def test_notes_may_be_any_bytes(raw: bytes) -> None:
    stays = storagetm.Stays("", SALT)
    for found, *rest in stays.parse(raw):
        stays.add(int(found), *rest)
    assert all(0 < stay.number < 0x10000 for stay in stays.known.values())
    assert len(stays.numbers) <= len(stays.known)
    for tag, (origin, _) in stays.parse_awaited(raw).items():
        assert " " not in tag + origin
