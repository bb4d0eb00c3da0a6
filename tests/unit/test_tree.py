# SPDX-License-Identifier: LGPL-2.1-or-later
"""What brings configfs from what is live to what is wanted, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import storagetm
from tests.unit import nvmet as stand_in
from tests.unit.nvmet import Nvmet

V4, V6 = storagetm.AF_INET, storagetm.AF_INET6
PORTS = {V4: 4420, V6: 4421}


def transport(ports: dict[int, int], *, shared: bool = False) -> storagetm.NvmeTcp:
    """One that is called nqn.test, without asking this machine who it is."""
    machine = storagetm.Machine.__new__(storagetm.Machine)
    machine.id, machine.os, machine.os_version = bytes(range(16)), "debian", "13"
    made = storagetm.NvmeTcp(machine, "nqn.test", shared=shared)
    made.ports = dict(ports)
    return made


def disk(name: str, tag: str = "254:0 1", model: str = "Model", size: int = 512) -> storagetm.Disk:
    made = storagetm.Disk(name, f"/dev/{name}", name)
    made.tag, made.model, made.size, made.serial = tag, model, size, f"serial {name}"
    made.access = storagetm.READ_WRITE
    made.stay = storagetm.Stay(1, "")
    return made


def wanted(
    disks: Iterable[storagetm.Disk], ports: dict[int, int] = PORTS, *, shared: bool = False
) -> list[storagetm.Branch]:
    made = transport(ports, shared=shared)
    disks = list(disks)
    for each in disks if shared else ():
        each.stay = storagetm.Stay(1 + zlib.crc32(f"{each.name} {each.tag}".encode()), "")
    return [*made.common_branches(), *map(made.disk_branch, disks)]


ABC = wanted(disk(name) for name in "abc")
AB = wanted(disk(name) for name in "ab")


class Session:
    """One run of the program, as far as the tree is concerned."""

    def __init__(self, nvmet: Nvmet, ledger: Path) -> None:
        self.ledger = storagetm.Ledger(str(ledger))
        self.ledger.lock()
        self.tree = storagetm.Tree(f"{nvmet.root}/", self.ledger)
        self.tree.adopt()

    def close(self) -> None:
        self.ledger.close()


@pytest.fixture
def nvmet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nvmet:
    return Nvmet(tmp_path / "config", monkeypatch)


@pytest.fixture
def run(nvmet: Nvmet, tmp_path: Path) -> Callable[..., dict[str, OSError]]:
    """One run of the program that has a tree brought to what is wanted, and is gone without a trace."""

    def run_once(branches: Sequence[storagetm.Branch]) -> dict[str, OSError]:
        session = Session(nvmet, tmp_path / "x.entries")
        try:
            return session.tree.reconcile(branches)
        finally:
            session.close()

    return run_once


Run = Callable[[Sequence[storagetm.Branch]], "dict[str, OSError]"]


def changes(nvmet: Nvmet, function: Callable[[], object]) -> list[str]:
    """The system calls that a function makes."""
    before = len(nvmet.calls)
    function()
    return nvmet.calls[before:]


# From nothing to all and back


def test_create(nvmet: Nvmet, run: Run) -> None:
    assert run(wanted([disk("a")])) == {}
    subsystem = "nvmet/subsystems/nqn.test.a"
    assert nvmet.contents() == {
        "nvmet": "directory",
        "nvmet/ports": "directory",
        "nvmet/ports/4420": "directory",
        "nvmet/ports/4420/addr_adrfam": "ipv4",
        "nvmet/ports/4420/addr_traddr": "0.0.0.0",
        "nvmet/ports/4420/addr_trsvcid": "4420",
        "nvmet/ports/4420/addr_trtype": "tcp",
        "nvmet/ports/4420/subsystems": "directory",
        "nvmet/ports/4420/subsystems/nqn.test.a": f"-> {subsystem}",
        "nvmet/ports/4421": "directory",
        "nvmet/ports/4421/addr_adrfam": "ipv6",
        "nvmet/ports/4421/addr_traddr": "::",
        "nvmet/ports/4421/addr_trsvcid": "4421",
        "nvmet/ports/4421/addr_trtype": "tcp",
        "nvmet/ports/4421/subsystems": "directory",
        "nvmet/ports/4421/subsystems/nqn.test.a": f"-> {subsystem}",
        "nvmet/subsystems": "directory",
        subsystem: "directory",
        f"{subsystem}/attr_allow_any_host": "1",
        f"{subsystem}/attr_cntlid_max": "1024",
        f"{subsystem}/attr_cntlid_min": "1024",
        f"{subsystem}/attr_firmware": "13",
        f"{subsystem}/attr_model": "Model (debian)",
        f"{subsystem}/attr_serial": "serial a",
        f"{subsystem}/namespaces": "directory",
        f"{subsystem}/namespaces/1": "directory",
        f"{subsystem}/namespaces/1/buffered_io": "0",
        f"{subsystem}/namespaces/1/device_nguid": "0",
        f"{subsystem}/namespaces/1/device_path": "/dev/a",
        f"{subsystem}/namespaces/1/device_uuid": transport(PORTS).uuid(disk("a")),
        f"{subsystem}/namespaces/1/enable": "1",
        f"{subsystem}/namespaces/1/revalidate_size": "0",
    }


def test_visible_last(nvmet: Nvmet, run: Run) -> None:
    """Clients see a disk once all of it is there, and not any more before any of it goes."""
    made = changes(nvmet, lambda: run(wanted([disk("a")])))
    assert [c.split()[0] for c in made[-2:]] == ["symlink", "symlink"]
    assert made[-3].endswith("/enable 1")
    gone = changes(nvmet, lambda: run([]))
    assert [c.split()[0] for c in gone] == ["unlink", "unlink", "rmdir", "rmdir", "rmdir", "rmdir"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_all_goes_again(nvmet: Nvmet, run: Run, count: int) -> None:
    before = nvmet.contents()
    assert run(wanted(disk(f"d{i}") for i in range(count))) == {}
    assert len([p for p in nvmet.contents() if p.endswith("/enable")]) == count
    assert run([]) == {}
    assert nvmet.contents() == before


def test_nothing_to_do(nvmet: Nvmet, tmp_path: Path) -> None:
    session = Session(nvmet, tmp_path / "x.entries")
    assert session.tree.reconcile(ABC) == {}
    size = os.stat(tmp_path / "x.entries").st_size
    # The same, and also when it is computed anew.
    again = wanted(disk(name) for name in "abc")
    assert changes(nvmet, lambda: session.tree.reconcile(ABC)) == []
    assert changes(nvmet, lambda: session.tree.reconcile(again)) == []
    assert os.stat(tmp_path / "x.entries").st_size == size
    session.close()


def test_attributes_that_the_kernel_lacks(nvmet: Nvmet, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = nvmet.contents()
    kept = ("attr_allow_any_host", "attr_cntlid_max", "attr_cntlid_min", "attr_serial")
    monkeypatch.setattr(stand_in, "SUBSYSTEM", kept)
    monkeypatch.setattr(stand_in, "NAMESPACE", ("device_path", "enable"))
    assert run(ABC) == {}
    assert "nvmet/ports/4421/subsystems/nqn.test.c" in nvmet.contents()
    assert changes(nvmet, lambda: run(ABC)) == []
    assert run([]) == {}
    assert nvmet.contents() == before


def test_kernel_that_cannot_keep_other_clients_away(
    nvmet: Nvmet, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is exported with less protection than asked for, unless that is asked for."""
    before = nvmet.contents()
    monkeypatch.setattr(stand_in, "SUBSYSTEM", ("attr_allow_any_host",))
    failures = run(wanted([disk("a")]))
    (problem,) = failures.values()
    assert "see --clients=any" in transport(PORTS).why_refused(problem)
    assert run([]) == {}
    assert nvmet.contents() == before
    made = transport(PORTS)
    made.clients = 0
    assert run([*made.common_branches(), made.disk_branch(disk("a"))]) == {}


# Changes


def test_one_disk_comes_and_goes(nvmet: Nvmet, run: Run) -> None:
    run(wanted([disk("a")]))
    assert not [c for c in changes(nvmet, lambda: run(wanted([disk("a"), disk("b")]))) if c.endswith(".a")]
    removed = changes(nvmet, lambda: run(wanted([disk("b")])))
    assert {c.split()[1] for c in removed if "nqn.test.a" not in c} == {
        "nvmet/subsystems/nqn.test.b/namespaces/1/revalidate_size"
    }


def test_new_size(nvmet: Nvmet, tmp_path: Path) -> None:
    """Attached clients are told; nothing is made anew under their feet."""
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.reconcile(wanted([disk("a"), disk("b")]))
    bigger = wanted([disk("a", size=1024), disk("b")])
    told = ["write nvmet/subsystems/nqn.test.a/namespaces/1/revalidate_size 1"]
    assert changes(nvmet, lambda: session.tree.reconcile(bigger)) == told
    assert changes(nvmet, lambda: session.tree.reconcile(bigger)) == []
    session.close()


@pytest.mark.parametrize(("tag", "model"), [("254:0 2", "Model"), ("254:0 1", "Other")])
def test_made_anew(nvmet: Nvmet, run: Run, tag: str, model: str) -> None:
    """Another disk under the same name, or attributes that can't change while it is exported."""
    run(wanted([disk("a"), disk("b")]))
    calls = changes(nvmet, lambda: run(wanted([disk("a", tag, model), disk("b")])))
    assert "rmdir nvmet/subsystems/nqn.test.a" in calls
    assert "mkdir nvmet/subsystems/nqn.test.a" in calls
    assert not [c for c in calls if "nqn.test.b" in c and "revalidate_size" not in c]
    assert nvmet.contents()["nvmet/subsystems/nqn.test.a/attr_model"] == f"{model} (debian)"


@pytest.mark.parametrize(
    ("before", "after", "calls"),
    [
        ({V4: 2}, {V4: 2, V6: 3}, ["mkdir nvmet/ports/3", "symlink nvmet/ports/3/subsystems/nqn.test.a"]),
        ({V4: 2, V6: 3}, {V4: 2}, ["unlink nvmet/ports/3/subsystems/nqn.test.a", "rmdir nvmet/ports/3"]),
        (
            {V4: 2},
            {V4: 4},
            [
                "unlink nvmet/ports/2/subsystems/nqn.test.a",
                "rmdir nvmet/ports/2",
                "mkdir nvmet/ports/4",
                "symlink nvmet/ports/4/subsystems/nqn.test.a",
            ],
        ),
    ],
)
def test_ports_change(
    nvmet: Nvmet, tmp_path: Path, before: dict[int, int], after: dict[int, int], calls: list[str]
) -> None:
    """Only links change, the disk stays."""
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.reconcile(wanted([disk("a")], before))
    made = changes(nvmet, lambda: session.tree.reconcile(wanted([disk("a")], after)))
    assert [c for c in made if not c.startswith("write")] == calls
    session.close()
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.reconcile([])
    session.close()
    assert list(nvmet.path("nvmet/ports").iterdir()) == []


def test_link_to_something_else(nvmet: Nvmet, run: Run) -> None:
    run(wanted([disk("a"), disk("b")]))
    link = nvmet.path("nvmet/ports/4420/subsystems/nqn.test.a")
    link.unlink()
    link.symlink_to(nvmet.path("nvmet/subsystems/nqn.test.b"))
    run(wanted([disk("a"), disk("b")]))
    assert nvmet.contents()["nvmet/ports/4420/subsystems/nqn.test.a"] == "-> nvmet/subsystems/nqn.test.a"


# Restart


def test_restart_finds_all_as_it_should_be(nvmet: Nvmet, run: Run) -> None:
    """Clients that are attached notice nothing."""
    run(ABC)
    again = changes(nvmet, lambda: run(wanted(disk(name) for name in "abc")))
    assert again == [f"write nvmet/subsystems/nqn.test.{n}/namespaces/1/revalidate_size 1" for n in "abc"]


def test_attribute_that_somebody_has_changed(nvmet: Nvmet, run: Run) -> None:
    run(ABC)
    (nvmet.path("nvmet/subsystems/nqn.test.b") / "attr_serial").write_text("wrong\n")
    expected = nvmet.contents()
    expected["nvmet/subsystems/nqn.test.b/attr_serial"] = "serial b"
    run(ABC)
    assert nvmet.contents() == expected


def check_recovery(nvmet: Nvmet, run: Run, before: dict[str, str], complete: dict[str, str]) -> None:
    """The next run has all of AB as it should be, and another removes it all."""
    assert run(AB) == {}
    assert nvmet.contents() == complete
    assert run([]) == {}
    assert nvmet.contents() == before


def test_crash_while_creating(nvmet: Nvmet, run: Run) -> None:
    """Killed before each system call in turn."""
    before = nvmet.contents()
    run(AB)
    complete = nvmet.contents()
    run([])
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run(AB)):
        check_recovery(nvmet, run, before, complete)
        number += 1
    assert number == 2 * 5 + 2 * 13  # ports, and disks with two links each


def test_crash_while_removing(nvmet: Nvmet, run: Run) -> None:
    before = nvmet.contents()
    run(AB)
    complete = nvmet.contents()
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run([])):
        check_recovery(nvmet, run, before, complete)
        run(AB)
        number += 1
    assert number == 2 + 2 * 4


def test_crash_and_all_is_to_go(nvmet: Nvmet, run: Run) -> None:
    """What is half-made is removed as well as what is whole."""
    before = nvmet.contents()
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run(AB)):
        assert run([]) == {}
        assert nvmet.contents() == before
        number += 1


def test_crash_while_ports_change(nvmet: Nvmet, run: Run) -> None:
    before = nvmet.contents()
    old, new = wanted([disk("a")], {V4: 2, V6: 3}), wanted([disk("a")], {V4: 4, V6: 3})
    run(new)
    complete = nvmet.contents()
    number = 0
    while True:
        run(old)
        inode = nvmet.path("nvmet/subsystems/nqn.test.a").stat().st_ino
        if not nvmet.run_and_kill_at(number, lambda: run(new)):
            break
        assert run(new) == {}
        assert nvmet.contents() == complete
        assert nvmet.path("nvmet/subsystems/nqn.test.a").stat().st_ino == inode
        number += 1
    run([])
    assert nvmet.contents() == before
    assert number == 2 + 5 + 2


# Failures


def test_failure_while_creating(nvmet: Nvmet, run: Run) -> None:
    """Every system call fails in turn: of that branch nothing is left, the others are there."""
    run(AB)
    complete = nvmet.contents()
    run([])
    for number in range(2 * 5 + 2 * 11):
        nvmet.fail_at(number)
        failures = run(AB)
        nvmet.succeed()
        failed = next(iter(failures))
        assert failures[failed].errno == errno.EIO
        assert not nvmet.path(failed).exists()
        if failed.startswith("nvmet/subsystems"):
            assert len(failures) == 1
            name = failed.rpartition("/")[2]
            assert nvmet.contents() == {p: v for p, v in complete.items() if name not in p.split("/")}
        check_recovery(nvmet, run, {p: v for p, v in complete.items() if p.count("/") < 2}, complete)


def test_failure_names_the_entry(nvmet: Nvmet, run: Run) -> None:
    calls = changes(nvmet, lambda: run(wanted([disk("a")])))
    run([])
    for number, call in enumerate(calls):
        nvmet.fail_at(number)
        (failure,) = [e for e in run(wanted([disk("a")])).values() if e.errno == errno.EIO]
        assert failure.filename == call.split()[1]
        nvmet.succeed()
        run([])


def test_failure_while_removing(nvmet: Nvmet, tmp_path: Path) -> None:
    """What stays is known still, and goes the next time."""
    before = nvmet.contents()
    for number in range(2 + 2 * 4):
        session = Session(nvmet, tmp_path / "x.entries")
        session.tree.reconcile(AB)
        nvmet.fail_at(number)
        failures = session.tree.reconcile([])
        nvmet.succeed()
        assert failures
        assert set(session.tree.live) == set(failures)
        assert session.tree.reconcile([]) == {}
        assert session.tree.live == {}
        assert nvmet.contents() == before
        session.close()


def test_failure_while_patching(nvmet: Nvmet, tmp_path: Path) -> None:
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.reconcile(wanted([disk("a")], {V4: 2}))
    more = wanted([disk("a")], PORTS | {V4: 2})
    nvmet.fail_at(5 + 1)  # the port is made, and clients are told of the size
    failures = session.tree.reconcile(more)
    assert list(failures) == ["nvmet/subsystems/nqn.test.a"]
    assert failures["nvmet/subsystems/nqn.test.a"].filename == "nvmet/ports/4421/subsystems/nqn.test.a"
    nvmet.succeed()
    assert session.tree.reconcile(more) == {}
    assert "nvmet/ports/4421/subsystems/nqn.test.a" in nvmet.contents()
    session.close()


def test_hopeless_failure(nvmet: Nvmet, tmp_path: Path) -> None:
    session = Session(nvmet, tmp_path / "x.entries")
    nvmet.fail_at(2 * 5 + 3 * 11, errno.EADDRINUSE)  # the first link
    failures = session.tree.reconcile(ABC, None, storagetm.NvmeTcp.concerns_port)
    assert list(failures) == ["nvmet/subsystems/nqn.test.a"]
    assert "nvmet/subsystems/nqn.test.a" not in session.tree.live
    # Of the others, nothing was linked, and that is made up for.
    assert not any(nvmet.path("nvmet/ports/4421/subsystems").iterdir())
    nvmet.succeed()
    assert session.tree.reconcile(ABC, None, storagetm.NvmeTcp.concerns_port) == {}
    for number in PORTS.values():
        assert len(list(nvmet.path(f"nvmet/ports/{number}/subsystems").iterdir())) == 3
    session.close()


def test_removal_that_hangs(nvmet: Nvmet, tmp_path: Path) -> None:
    """The others go meanwhile, its name is not used again before it has gone, and then it is."""
    release, woken = threading.Event(), threading.Event()
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.wake = woken.set
    session.tree.reconcile(ABC)

    def intercept(number: int) -> None:
        if nvmet.calls[number] == "rmdir nvmet/subsystems/nqn.test.b/namespaces/1":
            assert release.wait(60)

    nvmet.intercept = intercept
    ports = wanted([])
    # Those that do not hang are done in time on any machine that is not.
    assert session.tree.reconcile(ports, 0.5) == {}
    assert session.tree.leaving == {"nvmet/subsystems/nqn.test.b"}
    assert list(nvmet.path("nvmet/subsystems").iterdir()) == [nvmet.path("nvmet/subsystems/nqn.test.b")]
    assert changes(nvmet, lambda: session.tree.reconcile(wanted([disk("b", tag="new")]), 0.5)) == []
    woken.clear()
    release.set()
    assert woken.wait(60)
    assert session.tree.reconcile(wanted([disk("b", tag="new")]), 0.5) == {}
    assert session.tree.leaving == set()
    assert session.tree.live["nvmet/subsystems/nqn.test.b"].tag == "new"
    session.close()


def test_removal_beside_others_that_hangs(nvmet: Nvmet, tmp_path: Path) -> None:
    """In a shared subsystem, nothing goes where the kernel would have us wait, and it is done in the end."""
    release, woken = threading.Event(), threading.Event()
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.wake = woken.set
    made = transport({V4: 2}, shared=True)

    def wanted_of(*disks: storagetm.Disk) -> list[storagetm.Branch]:
        return [*made.common_branches(), *map(made.disk_branch, disks)]

    stays, goes, comes = disk("stays"), disk("goes"), disk("comes")
    goes.stay, comes.stay = storagetm.Stay(2, ""), storagetm.Stay(3, "")
    session.tree.reconcile(wanted_of(stays, goes))
    gone, new = made.root(goes), made.root(goes).rpartition("/")[0] + "/3"

    def intercept(number: int) -> None:
        if nvmet.calls[number] == f"rmdir {gone}":
            assert release.wait(60)

    nvmet.intercept = intercept
    assert session.tree.reconcile(wanted_of(stays), 0.2) == {}
    assert session.tree.leaving == {gone}
    assert changes(nvmet, lambda: session.tree.reconcile(wanted_of(stays, comes), 0.2)) == []
    # What is there already is none of this.
    stays.size *= 2
    resized = changes(nvmet, lambda: session.tree.reconcile(wanted_of(stays, comes), 0.2))
    assert [call.rpartition("/")[2] for call in resized] == ["revalidate_size 1"]
    woken.clear()
    release.set()
    assert woken.wait(60)
    assert session.tree.reconcile(wanted_of(stays, comes), 0.2) == {}
    assert made.root(comes) == new
    assert new in session.tree.live
    assert session.tree.leaving == set()
    session.close()


# Others


def foreign(nvmet: Nvmet, path: str) -> Callable[[], bool]:
    """Makes an entry as another tool would; returns what tells whether it is as it was."""
    os.mkdir(nvmet.path(path))
    if path.startswith("nvmet/subsystems"):
        os.mkdir(nvmet.path(path) / "namespaces/1")
    identity = nvmet.path(path).stat().st_ino
    contents = {p: v for p, v in nvmet.contents().items() if p.startswith(path)}

    def is_unchanged() -> bool:
        return nvmet.path(path).stat().st_ino == identity and contents == {
            p: v for p, v in nvmet.contents().items() if p.startswith(path)
        }

    return is_unchanged


def test_others(nvmet: Nvmet, run: Run) -> None:
    unchanged = [
        foreign(nvmet, path)
        for path in ("nvmet/subsystems/nqn.other.a", "nvmet/subsystems/nqn.test.z", "nvmet/ports/1")
    ]
    run(ABC)
    run(wanted([disk("b")]))
    run([])
    assert all(check() for check in unchanged)
    assert (
        len(nvmet.contents())
        == 3 + sum(len(stand_in.SUBSYSTEM) + 2 + len(stand_in.NAMESPACE) + 1 for _ in "az") + 6
    )


@pytest.mark.parametrize("path", ["nvmet/subsystems/nqn.test.b", "nvmet/ports/4420"])
def test_others_with_our_names(nvmet: Nvmet, run: Run, path: str) -> None:
    unchanged = foreign(nvmet, path)
    failures = run(ABC)
    assert failures[path].errno == errno.EEXIST
    assert unchanged() or path.startswith("nvmet/ports")
    run(ABC)
    run([])
    assert unchanged()


def test_taken_away_by_others(nvmet: Nvmet, run: Run) -> None:
    """What is missing is made again by the next run, and no failure at the end."""
    run(ABC)
    complete = nvmet.contents()
    for link in nvmet.path("nvmet/ports").glob("*/subsystems/nqn.test.b"):
        os.unlink(link)
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.test.b/namespaces/1"))
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.test.b"))
    assert run(ABC) == {}
    assert nvmet.contents() == complete
    os.unlink(nvmet.path("nvmet/ports/4420/subsystems/nqn.test.b"))
    assert run([]) == {}


# Dry run


def planned(nvmet: Nvmet, ledger: Path, branches: Sequence[storagetm.Branch]) -> list[dict[str, str]]:
    steps: list[dict[str, str]] = []
    tree = storagetm.Tree(f"{nvmet.root}/", storagetm.Ledger(str(ledger)), steps.append)
    if ledger.exists():
        tree.adopt()
    assert tree.reconcile(branches) == {}
    return steps


STARTS: list[Sequence[storagetm.Branch]] = [
    [],
    ABC,
    wanted([disk("a"), disk("x")], {V4: 2}),
    wanted([disk("a", tag="other"), disk("b", model="Other"), disk("c", size=4096)]),
    wanted([disk("a"), disk("b")], shared=True),
    wanted([disk("b"), disk("c")], {V4: 2}, shared=True),
]


@pytest.mark.parametrize("start", range(len(STARTS)))
@pytest.mark.parametrize("end", range(len(STARTS)))
def test_dry_run(
    nvmet: Nvmet, run: Run, tmp_path: Path, start: int, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes nothing, and a shell that runs its commands comes to the same as the real run."""
    run(STARTS[start])
    before = nvmet.contents()
    ledger = tmp_path / "x.entries"
    noted = ledger.read_bytes()
    steps: list[dict[str, str]] = []
    assert changes(nvmet, lambda: steps.extend(planned(nvmet, ledger, STARTS[end]))) == []
    assert nvmet.contents() == before
    assert ledger.read_bytes() == noted

    calls = changes(nvmet, lambda: run(STARTS[end]))
    expected = nvmet.contents()
    assert len(calls) == len(steps)

    with monkeypatch.context() as patch:
        copy = Nvmet(tmp_path / "copy", patch)
        session = Session(copy, tmp_path / "copy.entries")
        session.tree.reconcile(STARTS[start])
        session.close()
        assert copy.contents() == before
        script = stand_in.SHELL + "\n".join(s["command"] for s in steps)
        script = script.replace(f"{nvmet.root}/", f"{copy.root}/")
        subprocess.run(["sh", "-c", script], check=True)
        contents = copy.contents()
        for path in contents:
            if path.endswith("/revalidate_size"):
                contents[path] = "0"
        assert contents == expected


@pytest.mark.parametrize(
    ("before", "after", "diskseq", "iostats", "read"),
    [
        ("8", "16", "7", "1", True),
        ("8", "8", "7", "1", False),
        ("8", "8", "7", "0", True),  # not counted
        (None, "8", "7", "1", True),  # by an earlier run
        ("8", "16", "9", "1", False),  # another disk with its number
        ("8", "16", None, "1", False),  # gone
    ],
)
def test_partition_table_is_read_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    after: str,
    diskseq: str | None,
    iostats: str,
    read: bool,
) -> None:
    """At the end of an export that clients could write to, if anything was written to that very disk."""
    monkeypatch.setattr(storagetm, "SYS", f"{tmp_path}/")
    done: list[str] = []
    monkeypatch.setattr(storagetm, "reread_partitions", done.append)
    disk = tmp_path / "devices/sdz"
    (disk / "queue").mkdir(parents=True)
    for name, target in (
        ("dev/block/65:144", "../../devices/sdz"),
        ("class/block/sdz", "../../devices/sdz"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    (disk / "queue/iostats").write_text(iostats)
    entry = storagetm.Writable(storagetm.Writable.path_for("65:144 7"), "sdz")
    (disk / "stat").write_text(f"1 2 3 4 5 6 {before} 8 9\n")
    entry.guard(adopted=before is None)
    (disk / "stat").write_text(f"1 2 3 4 5 6 {after} 8 9\n")
    if diskseq is None:
        (tmp_path / "dev/block/65:144").unlink()
    (disk / "uevent").write_text(f"MAJOR=65\nMINOR=144\nDEVNAME=sdz\nDISKSEQ={diskseq}\n")
    entry.unmake("/")
    assert done == (["sdz"] if read else [])


def test_every_step_is_described() -> None:
    """What is done by an entry of any kind is in a dry run, too."""

    def kinds(kind: type[storagetm.Entry]) -> list[type[storagetm.Entry]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in kinds(sub))]

    base = storagetm.Entry
    assert len(kinds(base)) > 8
    for kind in kinds(base):
        assert (kind.make is base.make) == (kind.described is base.described), kind
    # A hint to hosts is taken back by the removal of what it hangs on.
    for kind in set(kinds(base)) - {storagetm.WriteProtection}:
        assert (kind.unmake is base.unmake) == (kind.undescribed is base.undescribed), kind


def test_steps_of_a_dry_run(nvmet: Nvmet, tmp_path: Path) -> None:
    root, name = f"{nvmet.root}/nvmet", "nqn.test.it's"
    steps = planned(nvmet, tmp_path / "x.entries", wanted([disk("it's")], {V4: 2}))
    assert steps[0] == {"step": "mkdir", "path": f"{root}/ports/2", "command": f"mkdir {root}/ports/2"}
    assert steps[1] == {
        "step": "write",
        "path": f"{root}/ports/2/addr_adrfam",
        "value": "ipv4",
        "command": f"echo ipv4 > {root}/ports/2/addr_adrfam",
    }
    quoted = "'" + f"{root}/ports/2/subsystems/{name}".replace("'", "'\\''") + "'"
    assert steps[-1] == {
        "step": "symlink",
        "path": f"{root}/ports/2/subsystems/{name}",
        "target": f"{root}/subsystems/{name}",
        "command": "ln -s " + quoted.replace("ports/2/subsystems", "subsystems") + " " + quoted,
    }


def test_dry_run_of_the_program(
    nvmet: Nvmet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As text and as JSON, the same steps."""
    monkeypatch.setattr(storagetm, "CONFIGFS", f"{nvmet.root}/")
    monkeypatch.setattr(storagetm, "RUN", f"{tmp_path}/run/")
    monkeypatch.setattr(storagetm, "PROC", f"{tmp_path}/proc/")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("")
    (tmp_path / "proc/net").mkdir()
    (tmp_path / "proc/net/if_inet6").write_text("")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    os.mkdir(nvmet.path("nvmet/ports/29423"))
    before = nvmet.contents()
    arguments = ["--dry-run", "--nqn=quux", str(image)]
    assert storagetm.main(arguments) == 0
    out, err = capfd.readouterr()
    commands = out.splitlines()
    # Whatever else there is to say is no command.
    assert "Port 29423 is taken" in err
    assert storagetm.main([*arguments, "--json"]) == 0
    steps = json.loads(capfd.readouterr().out)
    assert nvmet.contents() == before
    assert commands[0] == f"mkdir {nvmet.root}/nvmet/ports/16858"
    assert commands[-1].startswith("ln -s ")
    assert len(steps) == len(commands)
    assert steps[0] == {"step": "mkdir", "path": f"{nvmet.root}/nvmet/ports/16858"}
    assert {s["step"] for s in steps} == {"mkdir", "map", "write", "symlink"}


# Anything in any order


class AnyOrder(RuleBasedStateMachine):
    """Runs that end well, are killed, or fail, with anything wanted, beside others' entries."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.base = Path(self.directory.name)
        self.nvmet = Nvmet(self.base / "config", self.patch)
        self.ledger = self.base / "x.entries"
        self.session: Session | None = None
        self.foreign: dict[str, Callable[[], bool]] = {}

    WANTED = st.builds(
        lambda some, ports, shared: wanted(some, ports, shared=shared),
        st.lists(
            st.builds(
                disk,
                st.sampled_from("abcd"),
                tag=st.sampled_from(["1", "2"]),
                model=st.sampled_from(["M", "N"]),
                size=st.sampled_from([512, 1024]),
            ),
            unique_by=lambda d: d.name,
            max_size=4,
        ),
        st.sampled_from([{V4: 2}, {V4: 2, V6: 3}, {V6: 5}]),
        st.booleans(),
    )

    def is_foreign(self, path: str) -> bool:
        return any(path == f or path.startswith(f"{f}/") for f in self.foreign)

    def open(self) -> Session:
        if self.session is None:
            self.session = Session(self.nvmet, self.ledger)
        return self.session

    @rule()
    def restart(self) -> None:
        if self.session:
            self.session.close()
            self.session = None

    @rule(branches=WANTED)
    def reconcile(self, branches: list[storagetm.Branch]) -> None:
        failures = self.open().tree.reconcile(branches)
        assert all(map(self.is_foreign, failures))
        assert set(self.open().tree.live) == {b.root for b in branches} - set(failures)
        self.check(branches)
        assert changes(self.nvmet, lambda: self.open().tree.reconcile(branches)) == []

    def check(self, branches: list[storagetm.Branch]) -> None:
        """All that is wanted is there just so, and nothing else of ours."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
            fresh = Nvmet(Path(directory) / "config", patch)
            session = Session(fresh, Path(directory) / "x.entries")
            session.tree.reconcile([b for b in branches if not self.is_foreign(b.root)])
            session.close()
            expected = fresh.contents()
        found = {p: v for p, v in self.nvmet.contents().items() if not self.is_foreign(p)}
        assert found == expected

    @rule(branches=WANTED, number=st.integers(0, 60))
    def kill(self, branches: list[storagetm.Branch], number: int) -> None:
        self.restart()
        self.nvmet.run_and_kill_at(number, lambda: Session(self.nvmet, self.ledger).tree.reconcile(branches))

    @rule(branches=WANTED, number=st.integers(0, 60))
    def fail(self, branches: list[storagetm.Branch], number: int) -> None:
        tree = self.open().tree
        self.nvmet.fail_at(number)
        tree.reconcile(branches)
        self.nvmet.succeed()

    @precondition(lambda self: len(self.foreign) < 2)
    @rule(name=st.sampled_from(["nqn.test.b", "nqn.test.x", "nqn.test"]))
    def others_make(self, name: str) -> None:
        path = f"nvmet/subsystems/{name}"
        if self.nvmet.path(path).exists():
            return
        # configfs gives no inode number twice; the file system of this directory may.
        noted = storagetm.Ledger.parse(self.ledger.read_bytes()) if self.ledger.exists() else {}
        numbers = {inode for _, inode in noted.values()}
        spare = 0
        while True:
            decoy = self.nvmet.path(f"nvmet/subsystems/decoy{spare}")
            os.mkdir(decoy)
            os.mkdir(decoy / "namespaces/1")
            if not {decoy.stat().st_ino, (decoy / "namespaces/1").stat().st_ino} & numbers:
                break
            spare += 1
        os.rename(decoy, self.nvmet.path(path))
        for i in range(spare):
            os.rmdir(self.nvmet.path(f"nvmet/subsystems/decoy{i}/namespaces/1"))
            os.rmdir(self.nvmet.path(f"nvmet/subsystems/decoy{i}"))
        identity = self.nvmet.path(path).stat().st_ino
        self.foreign[path] = lambda: (
            self.nvmet.path(path).stat().st_ino == identity
            and (self.nvmet.path(path) / "attr_model").read_text() == "\n"
            and (self.nvmet.path(path) / "namespaces/1/enable").read_text() == "0\n"
        )

    @invariant()
    def others_are_left_alone(self) -> None:
        assert all(check() for check in self.foreign.values())

    def teardown(self) -> None:
        try:
            # The entries that others have by our names now are no longer ours to find.
            assert self.open().tree.reconcile([]) == {}
            self.others_are_left_alone()
            left = {p for p in self.nvmet.contents() if not self.is_foreign(p)}
            assert left == {"nvmet", "nvmet/ports", "nvmet/subsystems"}
            self.restart()
        finally:
            self.patch.undo()
            self.directory.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=12)
