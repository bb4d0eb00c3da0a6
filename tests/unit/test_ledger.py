# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file that says what is ours: nothing that happens to it makes anything of others ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import storagetm

Noted = dict[str, tuple[storagetm.Branch, str]]

# Paths as configfs may have them: a name has any bytes but NUL and "/", and is neither "." nor "..".
NAMES = (
    st.binary(min_size=1, max_size=12)
    .map(lambda raw: os.fsdecode(raw.replace(b"\0", b"").replace(b"/", b"")))
    .filter(lambda name: name not in ("", ".", ".."))
)
TAGS = st.sampled_from(["", "port", "254:0 1", "file 5:77", "7:0 "])


@st.composite
def branches(draw: st.DrawFn) -> storagetm.Branch:
    root = f"nvmet/subsystems/{draw(NAMES)}"
    entries: list[storagetm.Entry] = [storagetm.Directory(root)]
    for name in draw(st.lists(NAMES, max_size=3)):
        kinds: list[storagetm.Entry] = [
            storagetm.Directory(f"{root}/namespaces/{name}"),
            storagetm.Attribute(f"{root}/{name}", "value"),
            storagetm.Link(f"nvmet/ports/1/subsystems/{name}", root),
        ]
        entries.append(draw(st.sampled_from(kinds)))
    return storagetm.Branch(draw(TAGS), entries)


def summary(noted: Noted) -> dict[str, tuple[str, list[tuple[str, str]], str]]:
    return {
        root: (branch.tag, [(type(e).__name__, e.path) for e in branch.entries], inode)
        for root, (branch, inode) in noted.items()
    }


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[storagetm.Ledger]:
    made = storagetm.Ledger(str(tmp_path / "run" / "x.entries"))
    made.lock()
    yield made
    made.close()


def branch(name: str = "x", tag: str = "t", links: tuple[str, ...] = ("1",)) -> storagetm.Branch:
    root = f"nvmet/subsystems/{name}"
    entries: list[storagetm.Entry] = [
        storagetm.Directory(root),
        storagetm.Attribute(f"{root}/attr_model", "M"),
        storagetm.Directory(f"{root}/namespaces/1"),
        *(storagetm.Link(f"nvmet/ports/{n}/subsystems/{name}", root) for n in links),
    ]
    return storagetm.Branch(tag, entries)


# The format


def test_each_step_is_one_record(ledger: storagetm.Ledger) -> None:
    ledger.add(branch(), "5")
    ledger.remove(branch())
    assert Path(ledger.path).read_bytes() == (
        b"+\0nvmet/subsystems/x\0t\0dnvmet/subsystems/x\0dnvmet/subsystems/x/namespaces/1"
        b"\0lnvmet/ports/1/subsystems/x\0\n"
        b"=\0nvmet/subsystems/x\x005\0\n"
        b"-\0nvmet/subsystems/x\0\n"
    )


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, storagetm.Branch, int]]:
    some = draw(st.lists(branches(), min_size=1, max_size=4))
    steps = st.tuples(
        st.sampled_from(["add", "add with inode", "remove"]), st.sampled_from(some), st.integers(1, 99)
    )
    return draw(st.lists(steps, max_size=8))


def write(path: Path, history: list[tuple[str, storagetm.Branch, int]]) -> bytes:
    ledger = storagetm.Ledger(str(path))
    ledger.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    try:
        for what, made, inode in history:
            if what == "remove":
                ledger.remove(made)
            else:
                ledger.add(made, str(inode) if what == "add with inode" else "")
    finally:
        ledger.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "x.entries"


@given(histories())
def test_what_is_written_is_read_back(
    scratch: Path, history: list[tuple[str, storagetm.Branch, int]]
) -> None:
    expected: dict[str, tuple[str, list[tuple[str, str]], str]] = {}
    for what, made, inode in history:
        if what == "remove":
            expected.pop(made.root, None)
            continue
        known = expected[made.root][2] if made.root in expected else ""
        kinds = [
            (type(e).__name__, e.path)
            for e in made.entries
            if isinstance(e, (storagetm.Directory, storagetm.Link))
        ]
        expected[made.root] = made.tag, kinds, str(inode) if what == "add with inode" else known
    noted = storagetm.Ledger.parse(write(scratch, history))
    assert summary(noted) == expected
    assert all(b.adopted for b, _ in noted.values())


@given(histories())
def test_only_the_record_that_was_cut_off_is_lost(
    scratch: Path, history: list[tuple[str, storagetm.Branch, int]]
) -> None:
    """All that is lost is the record that was cut off."""
    raw = write(scratch, history)
    ends = [0] + [i + 2 for i in range(len(raw)) if raw.startswith(b"\0\n", i)]
    for length in range(len(raw) + 1):
        whole = max(end for end in ends if end <= length)
        found = storagetm.Ledger.parse(raw[:length])
        assert summary(found) == summary(storagetm.Ledger.parse(raw[:whole]))


def test_needs_are_noted(ledger: storagetm.Ledger) -> None:
    made = branch()
    ledger.add(storagetm.Branch("t", made.entries, needs=["dm/storagetm-x-1", "nvmet/ports/1"]))
    ((found, _),) = storagetm.Ledger.parse(Path(ledger.path).read_bytes()).values()
    assert found.needs == ("dm/storagetm-x-1", "nvmet/ports/1")


PORT = b"+\0nvmet/ports/1\0port\0dnvmet/ports/1\0invmet/ports/1/subsystems\0\n=\0nvmet/ports/1\x007\0\n"
# As version 1 has written them, with a subsystem for each disk and with one for all.
PER_DISK = PORT + (
    b"+\0nvmet/subsystems/x\x00254:0 1\0dnvmet/subsystems/x\0wdisk/254:0-1\0mdm/storagetm-x-1"
    b"\0dnvmet/subsystems/x/namespaces/1\0lnvmet/ports/1/subsystems/x\0\n"
    b"=\0nvmet/subsystems/x\x005\0\n"
)
SHARED = PORT + (
    b"+\0nvmet/subsystems/x\0subsystem\0dnvmet/subsystems/x\0invmet/subsystems/x/namespaces"
    b"\0lnvmet/ports/1/subsystems/x\0\n=\0nvmet/subsystems/x\x004\0\n"
    b"+\0nvmet/subsystems/x/namespaces/1\x00254:0 1\0mdm/storagetm-x-1"
    b"\0dnvmet/subsystems/x/namespaces/1\0\n=\0nvmet/subsystems/x/namespaces/1\x005\0\n"
)


@pytest.mark.parametrize(
    ("raw", "root", "between"),
    [
        (PER_DISK, "nvmet/subsystems/x", ["disk/254:0-1", "dm/storagetm-x-1"]),
        (SHARED, "nvmet/subsystems/x/namespaces/1", ["dm/storagetm-x-1"]),
    ],
)
def test_record_of_an_earlier_version_is_split(raw: bytes, root: str, between: list[str]) -> None:
    """What stands between a disk and its export was in one branch with that, and goes with it."""
    found = storagetm.Ledger.parse(raw)
    others = [name for name in found if name not in (root, between[0])]
    assert [e.path for e in found[between[0]][0].entries] == between
    branch, identity = found[root]
    assert (branch.root, branch.tag, branch.needs, identity) == (root, "254:0 1", (between[0],), "5")
    assert not [e for e in branch.entries if e.path in between]
    # Made anew, and gone.
    assert summary(storagetm.Ledger.parse(2 * raw)) == summary(found)
    assert list(storagetm.Ledger.parse(raw + b"-\0" + root.encode() + b"\0\n")) == others


@given(st.binary(max_size=100))
@example(b"+\0x\0t\0dx\0\n=\0x\0" + b"9" * 5000 + b"\0\n")
@example(b"+\0../x\0t\0d../x\0\n")
@example(b"+\0x/..\0t\0dx/..\0\n")
@example(b"+\0x\0t\0dx\0l..\0\n")
@example(b"+\0/etc\0t\0d/etc\0\n")
@example("=\0x\0²\0\n".encode())
@example(b"+\0\0\0d\0\n")
def test_ledger_may_be_any_bytes(raw: bytes) -> None:
    for part in (raw, b"+\0x\0t\0dx\0" + raw + b"\0\n", b"+\0x\0t\0dx\0\n=\0x\0" + raw + b"\0\n"):
        for root, (made, _) in storagetm.Ledger.parse(part).items():
            assert made.entries[0].path == made.root == root
            for entry in made.entries:
                assert ".." not in entry.path.split("/")
                assert entry.path != ""


# What is still ours


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Stands for configfs."""
    made = tmp_path / "config"
    (made / "nvmet/subsystems").mkdir(parents=True)
    return made


def read(ledger: storagetm.Ledger, root: Path) -> list[str]:
    return list(ledger.read(f"{root}/"))


def test_only_what_is_still_there_is_ours(ledger: storagetm.Ledger, root: Path) -> None:
    ledger.add(branch())
    assert read(ledger, root) == []  # not made yet
    (root / "nvmet/subsystems/x").mkdir()
    assert read(ledger, root) == ["nvmet/subsystems/x"]  # made, but its inode not noted
    ledger.confirm(branch(), f"{root}/")
    (root / "nvmet/subsystems/x/namespaces/1").mkdir(parents=True)
    assert read(ledger, root) == ["nvmet/subsystems/x"]
    ledger.remove(branch())
    assert read(ledger, root) == []


def test_entry_of_others_with_our_name_is_not_ours(ledger: storagetm.Ledger, root: Path) -> None:
    """It was made after ours had gone, which its inode number tells."""
    ours, theirs = root / "nvmet/subsystems/x", root / "nvmet/subsystems/y"
    ours.mkdir()
    ledger.add(branch())
    ledger.confirm(branch(), f"{root}/")
    theirs.mkdir()
    ours.rmdir()
    theirs.rename(ours)
    assert read(ledger, root) == []


def test_entry_in_use_before_ours_was_confirmed_is_not_ours(ledger: storagetm.Ledger, root: Path) -> None:
    """Whoever died between mkdir and the note of the inode cannot have made anything in it."""
    ledger.add(branch())
    (root / "nvmet/subsystems/x/namespaces/1").mkdir(parents=True)
    assert read(ledger, root) == []


def test_entry_with_branches_before_ours_was_confirmed_is_not_ours(
    ledger: storagetm.Ledger, root: Path
) -> None:
    """The same where what is made in it is known by others."""
    path = "nvmet/subsystems/x"
    entries = [storagetm.Directory(path), storagetm.DefaultGroup(f"{path}/namespaces")]
    ledger.add(storagetm.Branch("subsystem", entries))
    (root / path / "namespaces").mkdir(parents=True)
    assert read(ledger, root) == [path]
    (root / path / "namespaces/7").mkdir()
    assert read(ledger, root) == []
    ledger.confirm(storagetm.Branch("subsystem", entries), f"{root}/")
    assert read(ledger, root) == [path]


def test_more_links_do_not_lose_the_inode(ledger: storagetm.Ledger, root: Path) -> None:
    (root / "nvmet/subsystems/x").mkdir()
    ledger.add(branch())
    ledger.confirm(branch(), f"{root}/")
    inode = os.stat(root / "nvmet/subsystems/x").st_ino
    ledger.add(branch(links=("1", "2")))
    ((found, noted),) = storagetm.Ledger.parse(Path(ledger.path).read_bytes()).values()
    assert noted == str(inode)
    assert len(found.entries) == 4


# The file


def test_second_instance_is_refused(ledger: storagetm.Ledger) -> None:
    second = storagetm.Ledger(ledger.path)
    with pytest.raises(storagetm.UserError) as caught:
        second.lock()
    assert str(caught.value) == (
        f"Another storagetm exports under this NQN already, process {os.getpid()}; "
        "stop it or give another --nqn"
    )
    assert second.fd == second.lock_fd == -1
    ledger.close()
    second.lock()
    second.close()


def test_another_name_is_no_hindrance(ledger: storagetm.Ledger) -> None:
    second = storagetm.Ledger(ledger.path.replace("x.entries", "y.entries"))
    second.lock()
    second.close()


def test_missing_place_for_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no directory")
    ledger = storagetm.Ledger(str(tmp_path / "run" / "x.entries"))
    with pytest.raises(storagetm.UserError, match="mount a tmpfs on '/run'"):
        ledger.lock()


def test_a_record_that_was_cut_off_takes_no_other_with_it(ledger: storagetm.Ledger) -> None:
    ledger.add(branch("a"), "1")
    os.write(ledger.fd, b"+\0nvmet/subsystems/half")
    ledger.close()
    ledger.lock()
    ledger.add(branch("b"), "2")
    assert list(storagetm.Ledger.parse(Path(ledger.path).read_bytes())) == [
        "nvmet/subsystems/a",
        "nvmet/subsystems/b",
    ]


def test_record_that_does_not_fit_is_none(ledger: storagetm.Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a record is none, and the ones after it count."""
    ledger.add(branch("a"), "1")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left"):
        ledger.add(branch("b"), "2")
    monkeypatch.undo()
    ledger.add(branch("c"), "3")
    assert list(storagetm.Ledger.parse(Path(ledger.path).read_bytes())) == [
        "nvmet/subsystems/a",
        "nvmet/subsystems/c",
    ]


def test_shortened_ledger_says_the_same(ledger: storagetm.Ledger, root: Path) -> None:
    """It says the same before and after, and no more of what is gone."""
    (root / "nvmet/subsystems/x").mkdir()
    ledger.add(branch())
    ledger.confirm(branch(), f"{root}/")
    for _ in range(50):
        ledger.add(branch("gone"))
        ledger.remove(branch("gone"))
    before = summary(storagetm.Ledger.parse(Path(ledger.path).read_bytes()))
    ledger.shorten([branch()], f"{root}/")
    assert Path(ledger.path).read_bytes().count(b"gone")
    ledger.records = 5000
    ledger.shorten([branch()], f"{root}/")
    assert Path(ledger.path).read_bytes().count(b"\n") == 2
    assert summary(storagetm.Ledger.parse(Path(ledger.path).read_bytes())) == before
    ledger.add(branch("more"), "7")
    assert len(storagetm.Ledger.parse(Path(ledger.path).read_bytes())) == 2
    assert ledger.records == 2


def test_ledger_that_cannot_be_shortened_still_counts(ledger: storagetm.Ledger, root: Path) -> None:
    """What was there still counts, and can be added to."""
    ledger.add(branch(), "5")
    ledger.records = 5000
    with pytest.raises(FileNotFoundError):
        ledger.shorten([branch("missing")], f"{root}/")
    ledger.add(branch("more"), "7")
    assert list(storagetm.Ledger.parse(Path(ledger.path).read_bytes())) == [
        "nvmet/subsystems/x",
        "nvmet/subsystems/more",
    ]


def test_cleared_ledger_leaves_its_lock(ledger: storagetm.Ledger) -> None:
    ledger.add(branch())
    ledger.clear()
    assert not os.path.exists(ledger.path)
    assert os.path.exists(ledger.path + ".lock")
    ledger.clear()
