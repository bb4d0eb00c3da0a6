# SPDX-License-Identifier: LGPL-2.1-or-later
"""Home directories of systemd-homed: which there are, what clients may do to them, and how they come back.

captures/home.json has a real one, as it went, as a client left it that had deleted most of what was in it,
and as the program gave it back; of each its size, and its first 34 and last 33 sectors.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storagetm
from storagetm import READ_ONLY, READ_WRITE, SNAPSHOT
from tests.unit.configfs import Nvmet
from tests.unit.conftest import CAPTURES, CapturedMachine

HOME = json.loads((CAPTURES / "home.json").read_text())
MACHINE_ID = "42aefbae01d2dfd981f7da7d823d689e"


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def write_home(path: Path, which: str = "went") -> Path:
    """A file with the partition table of a real home directory, and nothing else."""
    state = HOME[which]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(unpacked(state["head"]))
        tail = unpacked(state["tail"])
        file.seek(state["size"] - len(tail))
        file.write(tail)
    return path


def tables(path: Path) -> list[storagetm.Gpt]:
    """Both copies of the table, which have to be whole."""
    fd = os.open(path, os.O_RDONLY)
    try:
        first = storagetm.Gpt.read(fd)
        assert first
        second = storagetm.Gpt.read(fd, first.header.other_lba)
        assert second
        return [first, second]
    finally:
        os.close(fd)


def ends(path: Path) -> list[int]:
    """The last sector of the home's partition in each copy of the table."""
    return [entry.last for table in tables(path) for _, entry in storagetm.home_partitions(table)]


def content(path: Path) -> tuple[bytes, bytes, int]:
    """What there can be in it, and when it was written to last."""
    with path.open("rb") as file:
        head = file.read(34 * 512)
        file.seek(path.stat().st_size - 33 * 512)
        return head, file.read(), path.stat().st_mtime_ns


# The partition table


def test_a_real_home_is_known_by_its_partition(tmp_path: Path) -> None:
    path = write_home(tmp_path / "x.home")
    for table in tables(path):
        assert storagetm.user_in(table) == "lennart"
    assert storagetm.HomeImage("lennart", str(path)).why_no_home() == ""


def test_what_a_client_shrank_is_as_large_again(tmp_path: Path) -> None:
    path = write_home(tmp_path / "x.home", "shrunk")
    went = ends(write_home(tmp_path / "went.home"))
    assert went[0] == went[1]
    before = ends(path)
    assert before[0] < went[0] // 2
    assert storagetm.widen_partition(str(path))
    assert ends(path) == ends(write_home(tmp_path / "back.home", "back"))
    assert went <= ends(path) <= [table.header.last_usable for table in tables(path)]
    # The rest is as it was, and the file has the size that it had.
    assert path.stat().st_size == HOME["shrunk"]["size"]
    (offset, entry), *others = tables(path)[0].partitions()
    assert (offset, others) == (0, [])
    entry.last = before[0]
    assert bytes(entry) == bytes(tables(write_home(tmp_path / "again", "shrunk"))[0].partitions()[0][1])


@pytest.mark.parametrize("which", ["went", "back"])
def test_what_is_as_large_as_it_can_be_is_not_written(tmp_path: Path, which: str) -> None:
    path = write_home(tmp_path / "x.home", which)
    storagetm.widen_partition(str(path))
    before = content(path)
    assert not storagetm.widen_partition(str(path))
    assert content(path) == before


@pytest.mark.parametrize("number", range(4))  # a second piece of each copy is empty
def test_table_cut_short_while_it_is_written_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """However many of the writes reach the file, each copy is whole, as it was or as it shall be."""
    path = write_home(tmp_path / "x.home", "shrunk")
    pwrite = os.pwrite
    calls: list[int] = []

    def fails(fd: int, data: bytes, offset: int) -> int:
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        calls.append(offset)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(OSError, match="Input/output error"):
        storagetm.widen_partition(str(path))
    monkeypatch.undo()
    fd = os.open(path, os.O_RDONLY)
    try:
        assert storagetm.Gpt.read(fd, HOME["shrunk"]["size"] // 512 - 1)
        assert storagetm.Gpt.read(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("at", [512, 512 + 16, 1024, 1024 + 40, 1024 + 127])
def test_table_with_a_wrong_checksum_is_none(tmp_path: Path, at: int) -> None:
    path = write_home(tmp_path / "x.home", "shrunk")
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert not storagetm.widen_partition(str(path))
    assert "no partition" in storagetm.HomeImage("lennart", str(path)).why_no_home()


@pytest.mark.parametrize("lba", [0, 1 << 50, 1 << 63, (1 << 64) - 1])
def test_second_copy_can_be_said_to_be_anywhere(tmp_path: Path, lba: int) -> None:
    """With checksums that are right: a client may have written it."""
    path = write_home(tmp_path / "x.home", "shrunk")
    table = tables(path)[0]
    table.header.other_lba = lba
    fd = os.open(path, os.O_RDWR)
    try:
        table.write(fd)
    finally:
        os.close(fd)
    before = content(path)
    assert not storagetm.widen_partition(str(path))
    assert content(path) == before


def test_file_with_two_partitions_or_another_type_is_no_home(tmp_path: Path) -> None:
    path = write_home(tmp_path / "x.home", "shrunk")
    table = tables(path)[0]
    two = table.array[:128] + table.array[:128] + table.array[256:]
    other = b"\1" + table.array[1:]
    for array in (two, other):
        changed = storagetm.Gpt(storagetm.gpt_header.from_buffer_copy(bytes(table.header)), array)
        fd = os.open(path, os.O_RDWR)
        try:
            changed.write(fd)
        finally:
            os.close(fd)
        assert len(tables(path)[0].partitions()) in (1, 2)
        assert storagetm.home_partitions(tables(path)[0]) == []
        assert not storagetm.widen_partition(str(path))


@given(
    st.binary(max_size=4096), st.lists(st.tuples(st.integers(0, 2048), st.binary(max_size=16)), max_size=4)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_can_be_a_table(tmp_path: Path, raw: bytes, changes: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "any"
    real = bytearray(unpacked(HOME["shrunk"]["head"]))
    for at, text in changes:
        real[512 + at : 512 + at + len(text)] = text
    for content in (raw, bytes(512) + raw, bytes(real)):
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        try:
            storagetm.user_in(storagetm.Gpt.read(fd))
        finally:
            os.close(fd)
        storagetm.widen_partition(str(path))


# Which there are


def test_record_says_where_a_home_is_on_this_machine_alone() -> None:
    raw = HOME["record"].encode()
    assert storagetm.parse_home_record(raw, MACHINE_ID) == ("luks", "/home/lennart.home")
    assert storagetm.parse_home_record(raw, "0" * 32) == ("", "")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["binding", "0", "storage"]), inner),
    )
)
def test_any_record_can_be_parsed(value: object) -> None:
    for raw in (json.dumps(value).encode(), repr(value).encode(), b"[" * 100_000):
        storage, path = storagetm.parse_home_record(raw, "0")
        assert isinstance(storage, str)
        assert path == "" or path.startswith("/")


class Computer:
    """A root file system with home directories, below a captured machine."""

    def __init__(self, machine: CapturedMachine) -> None:
        self.machine = machine
        self.root = machine.root / "system"
        (self.root / "home").mkdir(parents=True)
        (self.root / "var/lib/systemd/home").mkdir(parents=True)
        self.add("lennart")

    def add(self, user: str, *, storage: str = "luks", path: str = "", binding: bool = True) -> Path:
        """A home directory and its record. `path` is where the record says that it is."""
        record: dict[str, Any] = json.loads(HOME["record"])
        here = {"storage": storage, **({"imagePath": path} if path else {})}
        record["userName"] = user
        record["binding"] = {MACHINE_ID: here} if binding else {}
        (self.root / f"var/lib/systemd/home/{user}.identity").write_text(json.dumps(record))
        if storage != "luks":
            place = self.root / f"home/{user}.homedir"
            place.mkdir()
            return place
        return write_home(self.root / (path or f"home/{user}.home").lstrip("/"))

    def source(self, *users: str, usual: str = "") -> storagetm.Homes:
        return storagetm.Homes(MACHINE_ID, users, usual, str(self.root))

    def inventory(
        self, *users: str, asked: str = "", usual: str = "", more: list[storagetm.Source] | None = None
    ) -> storagetm.Inventory:
        sources = [self.source(*users, usual=usual), *(more or [])]
        found = storagetm.Inventory(sources, storagetm.Access((), asked))
        found.rescan()
        return found


@pytest.fixture
def computer(machine: CapturedMachine) -> Computer:
    return Computer(machine)


def seen(inventory: storagetm.Inventory) -> dict[str, str]:
    """By user: the access, or why it is not exported."""
    return {e.disk.home: e.left_out or e.access for e in inventory.exports.values() if e.disk.home}


def test_each_home_is_a_disk_named_by_its_user(computer: Computer) -> None:
    computer.add("anna", path="/srv/homes/a.image")
    computer.add("fs", storage="directory")
    computer.add("crypt", storage="fscrypt")
    (computer.add("far", storage="cifs")).rmdir()
    computer.add("gone", binding=False)
    (computer.root / "home/gone.home").unlink()
    (computer.root / "home/stranger.home").write_bytes(bytes(4096))
    write_home(computer.root / "home/copy-of-a-stick.home")
    inventory = computer.inventory()
    exports = {e.disk.node.removeprefix(str(computer.root)): e for e in inventory.exports.values()}
    assert {node: e.disk.name for node, e in exports.items()} == {
        "/home/lennart.home": "lennart",
        "/srv/homes/a.image": "anna",
        "/home/fs.homedir": "fs",
        "/home/crypt.homedir": "crypt",
        "/var/lib/systemd/home/far.identity": "far",
        "/home/stranger.home": "stranger",
        # It has no record here, but says itself whose it is.
        "/home/copy-of-a-stick.home": "lennart",
    }
    assert exports["/home/lennart.home"].disk.model == "home of lennart"
    assert exports["/home/lennart.home"].disk.block == 512
    verdicts = {node: str(e.left_out) for node, e in exports.items()}
    assert verdicts["/home/lennart.home"] == verdicts["/srv/homes/a.image"] == ""
    only = "only home directories in LUKS storage are disks"
    assert verdicts["/home/fs.homedir"] == f"it is a directory; {only}"
    assert verdicts["/home/crypt.homedir"] == f"it is a directory with fscrypt; {only}"
    assert verdicts["/var/lib/systemd/home/far.identity"] == f"it is on a file server; {only}"
    assert verdicts["/home/stranger.home"] == "it has no partition of a home directory"


@pytest.mark.parametrize("label", ["../../hosts/x", "a\nb", "/", "@", "\ud800"])
def test_label_that_is_no_name_is_not_believed(computer: Computer, label: str) -> None:
    """It would be part of a path in configfs."""
    path = write_home(computer.root / "home/own.home")
    fd = os.open(path, os.O_RDWR)
    try:
        table = storagetm.Gpt.read(fd)
        assert table
        name = label.encode("utf-16-le", "surrogatepass").ljust(72, b"\0")
        table.array = table.array[:56] + name + table.array[128:]
        table.write(fd)
    finally:
        os.close(fd)
    names = {e.disk.node.rpartition("/")[2]: e.disk.name for e in computer.inventory().exports.values()}
    assert names == {"lennart.home": "lennart", "own.home": "own"}


def test_only_the_users_that_were_named(computer: Computer) -> None:
    computer.add("anna")
    assert list(seen(computer.inventory("anna"))) == ["anna"]
    inventory = computer.inventory("anna", "berta")
    (text,) = inventory.missing()
    assert "'berta'" in text
    computer.add("berta")
    inventory.update(())
    assert sorted(seen(inventory)) == ["anna", "berta"]
    assert inventory.missing() == []


def test_home_that_is_removed_is_forgotten_and_a_new_one_found(computer: Computer) -> None:
    source = computer.source()
    inventory = storagetm.Inventory([source])
    inventory.rescan()
    assert list(seen(inventory)) == ["lennart"]
    (computer.root / "home/lennart.home").unlink()
    computer.add("anna")
    inventory.update(source.keys)
    assert list(seen(inventory)) == ["anna"]


def test_active_home_is_left_out_until_it_is_not(computer: Computer) -> None:
    path = computer.root / "home/lennart.home"
    loop = computer.machine.path("/sys/block/loop0")
    for attribute, text in (("dev", "7:0"), ("loop/backing_file", str(path))):
        (loop / attribute).parent.mkdir(parents=True, exist_ok=True)
        (loop / attribute).write_text(text + "\n")
    (loop / "holders").mkdir(exist_ok=True)
    shown = computer.machine.path("/sys/class/block/loop0")
    if not shown.exists():
        shown.symlink_to(loop)
    mounts = computer.machine.path("/proc/self/mountinfo")
    before = mounts.read_text()
    mounts.write_text(before + "99 1 7:0 / /home/lennart rw - btrfs /dev/loop0 rw\n")
    forced = storagetm.Inventory([computer.source(), storagetm.BlockDevices()], force=True)
    forced.rescan()
    inventory = computer.inventory()
    assert seen(inventory) == seen(forced) == {"lennart": "it is in use: lennart is logged in here"}
    mounts.write_text(before)
    (loop / "loop/backing_file").unlink()
    inventory.update(())
    assert seen(inventory) == {"lennart": READ_ONLY}


def test_what_two_sources_have_is_a_home(computer: Computer) -> None:
    inventory = computer.inventory(more=[storagetm.BlockDevices()])
    assert "vdb" in inventory.exports
    assert seen(inventory) == {"lennart": READ_ONLY}


# Access


@pytest.mark.parametrize(
    ("usual", "asked", "expected"),
    [
        ("", "", READ_ONLY),
        ("", READ_WRITE, READ_WRITE),
        ("", SNAPSHOT, SNAPSHOT),
        (READ_WRITE, "", READ_WRITE),  # as it is with --pair
        (READ_WRITE, READ_ONLY, READ_ONLY),
        (READ_WRITE, SNAPSHOT, SNAPSHOT),
    ],
)
def test_home_can_be_written_to_only_where_that_was_asked_for(
    computer: Computer, usual: str, asked: str, expected: str
) -> None:
    inventory = computer.inventory(asked=asked, usual=usual, more=[storagetm.BlockDevices()])
    assert seen(inventory) == {"lennart": expected}
    # Nothing of that is for other disks.
    assert inventory.exports["vdb"].access == (asked or READ_ONLY)
    assert inventory.may_write() == (expected != READ_ONLY)


def test_rules_come_before_what_is_usual_for_homes(computer: Computer) -> None:
    rules = [(f"{computer.root}/home/*", READ_ONLY)]
    inventory = storagetm.Inventory([computer.source(usual=READ_WRITE)], storagetm.Access(rules))
    inventory.rescan()
    assert seen(inventory) == {"lennart": READ_ONLY}


def test_screen_says_why_it_is_read_only_and_what_to_do_elsewhere(computer: Computer) -> None:
    source = computer.source()
    for access, words in ((READ_ONLY, "--pair"), (READ_WRITE, "homectl activate lennart")):
        inventory = computer.inventory(asked=access)
        (text,) = source.remarks(inventory.exports.values())
        assert words in text
        assert ("one client at a time" in text) == (access == READ_WRITE)


@pytest.mark.parametrize("clients", ["2", "any"])
def test_more_than_one_client_is_refused(clients: str) -> None:
    with pytest.raises(storagetm.UsageError, match="two machines"):
        storagetm.parse_arguments(["--homes", f"--clients={clients}"])
    assert storagetm.parse_arguments(["--homes", "--clients=1"]).homes


@pytest.mark.parametrize("value", ["a,,b", "a/b", ",", "a\nb"])
def test_no_list_of_users(value: str) -> None:
    with pytest.raises(storagetm.UsageError, match="list of users"):
        storagetm.parse_arguments([f"--homes={value}"])


def test_options_of_the_kernel_command_line() -> None:
    found = storagetm.options_from_kernel(["storagetm.homes=anna,berta", "rd.storagetm.homes"], initrd=False)
    assert (found.homes, found.users) == (True, ["anna", "berta"])
    found = storagetm.options_from_kernel(["rd.storagetm.homes"], initrd=True)
    assert (found.homes, found.users) == (True, [])


# From the start to the end


class Run:
    """One start that exports home directories."""

    def __init__(self, computer: Computer, access: str) -> None:
        made = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", made.id)
        stays.kept = True
        self.source = computer.source()
        inventory = storagetm.Inventory([self.source], storagetm.Access((), access), stays)
        transport = storagetm.NvmeTcp(made, writable=inventory.may_write())
        self.exporter = storagetm.Exporter(transport.prefix, [transport], inventory)
        self.exporter.ledger.lock()
        self.exporter.begin()
        inventory.rescan()

    def kill(self) -> None:
        for export in self.exporter.inventory.exports.values():
            export.release()
        self.exporter.ledger.close()


@pytest.fixture
def start(computer: Computer, nvmet: Nvmet) -> Iterator[Callable[[str], Run]]:
    runs: list[Run] = []
    assert nvmet.path("nvmet").is_dir()

    def begin(access: str) -> Run:
        runs.append(Run(computer, access))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def test_home_comes_back_as_large_also_after_a_kill(
    computer: Computer, start: Callable[[str], Run], nvmet: Nvmet
) -> None:
    before = nvmet.contents()
    run = start(READ_WRITE)
    run.exporter.synchronise(strict=True)
    (export,) = run.exporter.inventory.exports.values()
    assert list(export.live) == ["nvme-tcp"]
    path = computer.root / "home/lennart.home"
    with path.open() as file, pytest.raises(BlockingIOError):  # who logs in here meanwhile is turned away
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    write_home(path, "shrunk")
    run.kill()
    again = start(READ_WRITE)
    again.exporter.synchronise(strict=True)
    # A client that is still there goes on, so nothing is changed under it.
    assert ends(path) == ends(write_home(computer.root / "shrunk", "shrunk"))
    assert again.exporter.stop()
    assert nvmet.contents() == before
    assert ends(path) == ends(write_home(computer.root / "back", "back"))


def test_home_that_is_used_again_after_a_kill_is_not_touched(
    computer: Computer, start: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock died with the process, and somebody has logged in here."""
    run = start(READ_WRITE)
    run.exporter.synchronise(strict=True)
    path = write_home(computer.root / "home/lennart.home", "shrunk")
    before = content(path)
    monkeypatch.setattr(storagetm.Usage, "of_file", lambda *_: "it is mounted")
    assert run.exporter.stop()
    assert content(path) == before


@pytest.mark.parametrize("access", [READ_ONLY, SNAPSHOT])
def test_home_that_nobody_may_write_to_is_left_alone(
    computer: Computer, start: Callable[[str], Run], access: str
) -> None:
    path = write_home(computer.root / "home/lennart.home", "shrunk")
    before = content(path)
    run = start(access)
    run.exporter.synchronise(strict=True)
    assert run.exporter.stop()
    assert content(path) == before


def test_home_taken_away_from_a_client_is_marked(
    computer: Computer, start: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(computer.root / "home/lennart.home")
    marked: list[tuple[str, str]] = []
    monkeypatch.setattr(os, "setxattr", lambda path, name, _: marked.append((path, name)))
    for attached in (False, True):
        run = start(READ_WRITE)
        run.exporter.synchronise(strict=True)
        (transport,) = run.exporter.transports
        clients = [storagetm.Client("192.0.2.2", "12:00")] * attached
        monkeypatch.setattr(transport, "attached", lambda found=clients: found)
        assert run.exporter.stop()
        assert marked == [(path, "user.home-dirty")] * attached


def test_two_disks_of_one_name_are_never_exported_at_once(
    computer: Computer, start: Callable[[str], Run]
) -> None:
    write_home(computer.root / "home/copy.home")
    run = start(READ_ONLY)
    run.exporter.synchronise()
    exports = {e.disk.node.rpartition("/")[2]: e for e in run.exporter.inventory.exports.values()}
    assert exports["lennart.home"].live
    assert not exports["copy.home"].live
    assert "its name would be that of" in exports["copy.home"].left_out


# Word of what changes


def test_word_of_files_comes_and_nothing_else_wakes_it(computer: Computer) -> None:
    asked: list[list[str]] = []
    source = computer.source()
    inventory = storagetm.Inventory([source])
    inventory.rescan()
    (news,) = source.news(lambda keys: asked.append(list(keys)))
    fd, _ = news.wants()
    path = computer.root / "home/lennart.home"

    def comes() -> bool:
        _, events = news.wants()
        poll = select.poll()
        poll.register(fd, events)
        came = bool(poll.poll(0))
        if came:
            assert news.act()
        return came

    try:
        assert not comes()
        content(path)  # as a look at it does
        assert not comes()
        with path.open("r+b"):  # as systemd-homed lets go of it
            assert not comes()
        assert comes()
        assert asked == [[str(path)]]
        for change in (
            lambda: computer.add("anna"),
            lambda: path.rename(computer.root / "away"),
            lambda: (computer.root / "away").rename(path),
            lambda: path.unlink(),
        ):
            change()
            assert comes()
            assert not comes()
    finally:
        os.close(fd)
