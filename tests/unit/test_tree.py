# SPDX-License-Identifier: LGPL-2.1-or-later
"""What brings configfs from what is live to what is wanted, whatever happens on the way."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import re
import subprocess
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import storagetm
from storagetm import READ_ONLY, READ_WRITE, SNAPSHOT
from tests.unit import configfs as stand_in
from tests.unit.configfs import Nvmet
from tests.unit.conftest import MEMORY
from tests.unit.devicemapper import DeviceMapper
from tests.unit.exports import Named, made_export, wanted_of
from tests.unit.keyring import Keyring

V4, V6 = storagetm.AF_INET, storagetm.AF_INET6
PORTS = {V4: 4420, V6: 4421}
# The disks of this kernel; they are no more than nodes.
NODES = {
    f"/dev/{name}": os.makedev(254, number)
    for number, name in enumerate([*"abcdx", "it's", *(f"d{i}" for i in range(40))])
}

in_each_access = pytest.mark.parametrize("access", storagetm.ACCESS)


CODES = [storagetm.Code.parse(text) for text in ("k7fm-2qxd-9wtr-4hcn", "0123-4567-89ab-cdef")]


def transport(
    ports: dict[int, int], *, shared: bool = False, admission: storagetm.Admission | None = None
) -> storagetm.NvmeTcp:
    """One that is called nqn.test, without asking this machine who it is."""
    kind = storagetm.SharedNvmeTcp if shared else storagetm.NvmeTcp
    made = kind(Named(), "nqn.test", admission=admission)
    made.ports.update(ports)
    return made


def disk(
    name: str,
    tag: str = "254:0 1",
    model: str = "Model",
    size: int = 512,
    access: str = storagetm.DEFAULT_ACCESS,
) -> storagetm.Export:
    facts = {"tag": tag, "model": model, "size": size, "serial": f"serial {name}"}
    return made_export(name, **facts, access=access, stay=storagetm.Stay(1, ""))


def wanted(
    disks: Iterable[storagetm.Export],
    ports: dict[int, int] = PORTS,
    *,
    shared: bool = False,
    admission: storagetm.Admission | None = None,
) -> list[storagetm.Branch]:
    made = transport(ports, shared=shared, admission=admission)
    disks = list(disks)
    made.arrange(disks, {})
    for each in disks if shared else ():
        each.stay = storagetm.Stay(1 + zlib.crc32(f"{each.disk.name} {each.disk.tag}".encode()), "")
    made.scaffolds({})
    return [*made.common(), *(b for d in disks for b in wanted_of(made, d, "nqn.test"))]


def want(names: str, access: str = storagetm.DEFAULT_ACCESS) -> list[storagetm.Branch]:
    """Disks with a letter each, all with the same access. Each run of the program computes that anew."""
    return wanted(disk(name, access=access) for name in names)


def mapping_of(made: storagetm.Export) -> str:
    """The name of the device-mapper device over a disk; empty if it has none."""
    mapping = storagetm.mapping_of(storagetm.backing(made.disk, made.access, "nqn.test"))
    return mapping.name if mapping else ""


class Session:
    """One run of the program, as far as the tree is concerned."""

    def __init__(self, nvmet: Nvmet, ledger: Path) -> None:
        keyring_of(nvmet).begin()
        self.ledger = storagetm.Ledger(str(ledger))
        self.ledger.lock()
        self.tree = storagetm.Tree(f"{nvmet.root}/", self.ledger)
        self.tree.adopt()

    def reconcile(
        self, branches: Sequence[storagetm.Branch], patience: float | None = None
    ) -> dict[str, storagetm.Failure]:
        return reconcile(self.tree, branches, patience)

    def close(self) -> None:
        self.ledger.close()


def reconcile(
    tree: storagetm.Tree, branches: Sequence[storagetm.Branch], patience: float | None = None
) -> dict[str, storagetm.Failure]:
    """As the exporter does it; what failed, by root. What only failed branches need goes again."""
    failures: dict[str, storagetm.Failure] = {}
    for _ in range(3):
        failed = once(tree, without_failed(branches, failures), patience)
        failures.update(failed)
        if not failed:
            break
    return failures


def once(
    tree: storagetm.Tree, branches: Sequence[storagetm.Branch], patience: float | None = None
) -> dict[str, storagetm.Failure]:
    """One plan, done."""
    entries = [e for b in branches for e in b.entries]
    courtesy = [e.host for e in entries if isinstance(e, storagetm.WriteProtection)]
    tree.collect()
    scaffolds = [courtesy[0].passage_branch(tree.live)] if courtesy else []
    return {f.branch.root: f for f in tree.apply(tree.plan(branches, scaffolds), patience)}


def without_failed(branches: Sequence[storagetm.Branch], failures: Container[str]) -> list[storagetm.Branch]:
    left = [b for b in branches if b.root not in failures]
    needed = {root for b in left for root in b.needs}
    return [b for b in left if b.root in needed or not b.root.startswith(("dm/", "disk/"))]


def kernel(base: Path, monkeypatch: pytest.MonkeyPatch) -> Nvmet:
    """One with the disks, but nothing exported."""
    made = Nvmet(base / "config", monkeypatch)
    DeviceMapper(made, base, monkeypatch).nodes.update(NODES)
    Keyring(made, base, monkeypatch)
    monkeypatch.setattr(storagetm, "CONFIGFS", f"{made.root}/")
    return made


@pytest.fixture
def nvmet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvmet]:
    made = kernel(tmp_path, monkeypatch)
    yield made
    mapper(made).close()


def mapper(nvmet: Nvmet) -> DeviceMapper:
    assert nvmet.mapper
    return nvmet.mapper


def keyring_of(nvmet: Nvmet) -> Keyring:
    assert nvmet.keyring
    return nvmet.keyring


@pytest.fixture
def run(nvmet: Nvmet, tmp_path: Path) -> Callable[..., dict[str, storagetm.Failure]]:
    """One run of the program that has a tree brought to what is wanted, and is gone without a trace."""

    def run_once(branches: Sequence[storagetm.Branch]) -> dict[str, storagetm.Failure]:
        session = Session(nvmet, tmp_path / "x.entries")
        try:
            return session.reconcile(branches)
        finally:
            session.close()

    return run_once


Run = Callable[[Sequence[storagetm.Branch]], "dict[str, storagetm.Failure]"]


def changes(nvmet: Nvmet, function: Callable[[], object]) -> list[str]:
    """The system calls that a function makes."""
    before = len(nvmet.calls)
    function()
    return nvmet.calls[before:]


PASSAGE = f"nvmet/ports/{transport({}).port_number(0)}"


def is_courtesy(call: str) -> bool:
    """Whether a call belongs to the way on which hosts are told of write protection."""
    return stand_in.is_courtesy(call, PASSAGE)


# From nothing to all and back


@in_each_access
def test_disk_becomes_these_entries(nvmet: Nvmet, run: Run, access: str) -> None:
    a = disk("a", access=access)
    assert run(wanted([a])) == {}
    subsystem = "nvmet/subsystems/nqn.test.a"
    # Reads are for as many clients as like to, and no protection is needed where they may write.
    limit = "" if access == READ_ONLY else "1024"
    between = {
        READ_ONLY: {"": "0 1 flakey /dev/a 0 0 1 1 error_writes", "/write_cache": "write through"},
        SNAPSHOT: {"": "0 1 snapshot /dev/a MEMORY PO 8", "/write_cache": "write back"},
        READ_WRITE: {},
    }[access]
    assert nvmet.contents() == {
        **({f"dm/{mapping_of(a)}/uuid": mapping_of(a)} if between else {}),
        **{f"dm/{mapping_of(a)}{attribute}": text for attribute, text in between.items()},
        **({f"{subsystem}/namespaces/1/write_protected": "1"} if access == READ_ONLY else {}),
        "nvmet": "directory",
        "nvmet/hosts": "directory",
        "nvmet/ports": "directory",
        "nvmet/ports/4420": "directory",
        "nvmet/ports/4420/addr_adrfam": "ipv4",
        "nvmet/ports/4420/addr_traddr": "0.0.0.0",
        "nvmet/ports/4420/addr_treq": "not specified",
        "nvmet/ports/4420/addr_trsvcid": "4420",
        "nvmet/ports/4420/addr_trtype": "tcp",
        "nvmet/ports/4420/addr_tsas": "none",
        "nvmet/ports/4420/subsystems": "directory",
        "nvmet/ports/4420/subsystems/nqn.test.a": f"-> {subsystem}",
        "nvmet/ports/4421": "directory",
        "nvmet/ports/4421/addr_adrfam": "ipv6",
        "nvmet/ports/4421/addr_traddr": "::",
        "nvmet/ports/4421/addr_treq": "not specified",
        "nvmet/ports/4421/addr_trsvcid": "4421",
        "nvmet/ports/4421/addr_trtype": "tcp",
        "nvmet/ports/4421/addr_tsas": "none",
        "nvmet/ports/4421/subsystems": "directory",
        "nvmet/ports/4421/subsystems/nqn.test.a": f"-> {subsystem}",
        "nvmet/subsystems": "directory",
        subsystem: "directory",
        f"{subsystem}/allowed_hosts": "directory",
        f"{subsystem}/attr_allow_any_host": "1",
        f"{subsystem}/attr_cntlid_max": limit,
        f"{subsystem}/attr_cntlid_min": limit,
        f"{subsystem}/attr_firmware": "13",
        f"{subsystem}/attr_model": "Model (debian)",
        f"{subsystem}/attr_serial": "serial a",
        f"{subsystem}/namespaces": "directory",
        f"{subsystem}/namespaces/1": "directory",
        f"{subsystem}/namespaces/1/buffered_io": "0",
        f"{subsystem}/namespaces/1/device_nguid": "0",
        f"{subsystem}/namespaces/1/device_path": f"/dev/mapper/{mapping_of(a)}" if between else "/dev/a",
        f"{subsystem}/namespaces/1/device_uuid": transport(PORTS).identities.uuid(a),
        f"{subsystem}/namespaces/1/enable": "1",
        f"{subsystem}/namespaces/1/revalidate_size": "0",
    }


@in_each_access
def test_disk_is_visible_last(nvmet: Nvmet, run: Run, access: str) -> None:
    """Clients see a disk once all of it is there, and not any more before any of it goes."""
    made = changes(nvmet, lambda: run(want("a", access)))
    if access == READ_ONLY:
        assert made[-2:] == [f"unlink {PASSAGE}/subsystems/nqn.test.a", f"rmdir {PASSAGE}"]
        assert made[-5] == "protect nvmet/subsystems/nqn.test.a/namespaces/1"
        made = [call for call in made if not is_courtesy(call)]
    assert [c.split()[0] for c in made[-2:]] == ["symlink", "symlink"]
    assert made[-3].endswith("/enable 1")
    gone = [c.split()[0] for c in changes(nvmet, lambda: run([]))]
    between = [] if access == READ_WRITE else ["remove"]
    # Both links, the namespace before the subsystem, and then what they need.
    assert gone == ["unlink", "unlink", "rmdir", "rmdir", "rmdir", "rmdir", *between]


@in_each_access
@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_all_goes_again(nvmet: Nvmet, run: Run, count: int, access: str) -> None:
    before = nvmet.contents()
    assert run(wanted(disk(f"d{i}", access=access) for i in range(count))) == {}
    assert len([p for p in nvmet.contents() if p.endswith("/enable")]) == count
    mapped = [p for p in nvmet.contents() if p.startswith("dm/") and p.endswith("/uuid")]
    assert len(mapped) == (0 if access == READ_WRITE else count)
    assert run([]) == {}
    assert nvmet.contents() == before


@in_each_access
def test_same_again_does_nothing(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    session = Session(nvmet, tmp_path / "x.entries")
    branches = want("abc", access)
    assert session.reconcile(branches) == {}
    size = os.stat(tmp_path / "x.entries").st_size
    # The same, and also when it is computed anew.
    assert changes(nvmet, lambda: session.reconcile(branches)) == []
    assert changes(nvmet, lambda: session.reconcile(want("abc", access))) == []
    assert os.stat(tmp_path / "x.entries").st_size == size
    session.close()


def test_attributes_that_the_kernel_lacks_are_left_out(
    nvmet: Nvmet, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = nvmet.contents()
    kept = ("attr_allow_any_host", "attr_cntlid_max", "attr_cntlid_min", "attr_serial")
    monkeypatch.setattr(stand_in, "SUBSYSTEM", kept)
    monkeypatch.setattr(stand_in, "NAMESPACE", ("device_path", "enable"))
    assert run(want("abc")) == {}
    assert "nvmet/ports/4421/subsystems/nqn.test.c" in nvmet.contents()
    # Hosts are told anew.
    assert [c for c in changes(nvmet, lambda: run(want("abc"))) if not is_courtesy(c)] == []
    assert run([]) == {}
    assert nvmet.contents() == before


@pytest.mark.parametrize("access", [SNAPSHOT, READ_WRITE])
def test_kernel_that_cannot_keep_others_away_exports_nothing(
    nvmet: Nvmet, run: Run, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    """Nothing is exported with less protection than asked for, unless that is asked for."""
    before = nvmet.contents()
    monkeypatch.setattr(stand_in, "SUBSYSTEM", ("attr_allow_any_host",))
    failures = run(want("a", access))
    (problem,) = failures.values()
    assert "see --clients=any" in transport(PORTS).explain(problem)
    assert run([]) == {}
    assert nvmet.contents() == before
    made = transport(PORTS)
    made.clients = 0
    assert run([*made.common(), *wanted_of(made, disk("a", access=access), "nqn.test")]) == {}


class Dooming(storagetm.Directory):
    """A directory for which all others could not be made either."""

    def dooms(self, error: OSError) -> bool:
        return True


def test_what_was_not_tried_after_all_is_not_noted(nvmet: Nvmet, tmp_path: Path) -> None:
    """Whoever makes something of that name later is another program."""
    session = Session(nvmet, tmp_path / "x.entries")
    branches = [storagetm.Branch("1", [Dooming(f"nvmet/ports/{number}")]) for number in (2, 4, 6)]
    nvmet.fail_at(0)
    assert once(session.tree, branches, None).keys() == {"nvmet/ports/2"}
    noted = storagetm.Ledger.parse((tmp_path / "x.entries").read_bytes())
    assert noted == {}
    session.close()


# Changes


def name_of(path: str) -> str:
    """Which disk's, by its letter, a path of configfs or device-mapper is."""
    found = re.search(r"nqn\.test\.(\w)\b|storagetm-(\w)-", path)
    return found[1] or found[2] if found else ""


@in_each_access
def test_other_disks_stay_while_one_comes_and_goes(nvmet: Nvmet, run: Run, access: str) -> None:
    run(want("a", access))
    added = [c for c in changes(nvmet, lambda: run(want("ab", access))) if not is_courtesy(c)]
    resized = "write nvmet/subsystems/nqn.test.{}/namespaces/1/revalidate_size 1"
    assert [c for c in added if name_of(c) == "a"] == [resized.format("a")]
    removed = [c for c in changes(nvmet, lambda: run(want("b", access))) if not is_courtesy(c)]
    assert [c for c in removed if name_of(c) != "a"] == [resized.format("b")]


@in_each_access
def test_new_size_makes_nothing_anew(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    """Attached clients are told; nothing is made anew under their feet."""
    session = Session(nvmet, tmp_path / "x.entries")
    session.reconcile(want("ab", access))
    before = nvmet.contents()
    bigger = wanted([disk("a", size=1024, access=access), disk("b", access=access)])
    told = [c for c in changes(nvmet, lambda: session.reconcile(bigger)) if not is_courtesy(c)]
    assert told[-1] == "write nvmet/subsystems/nqn.test.a/namespaces/1/revalidate_size 1"
    assert {name_of(call) for call in told} == {"a"}
    # There is another table, and what a snapshot has kept is kept.
    table = {READ_ONLY: ["load", "resume", "cache"], SNAPSHOT: ["load", "resume"], READ_WRITE: []}[access]
    assert [c.split()[0] for c in told[:-1]] == ["create"] * bool(table) + table
    expected = dict(before)
    if name := mapping_of(disk("a", access=access)):
        expected[f"dm/{name}"] = "0 2 " + before[f"dm/{name}"].removeprefix("0 1 ")
    assert nvmet.contents() == expected
    assert changes(nvmet, lambda: session.reconcile(bigger)) == []
    session.close()


@in_each_access
@pytest.mark.parametrize("other", storagetm.ACCESS)
def test_another_access_leaves_other_disks_alone(nvmet: Nvmet, run: Run, access: str, other: str) -> None:
    """What stood in between with the old one goes, and nothing of the other disk is touched."""
    before = nvmet.contents()
    run(wanted([disk("a", access=other), disk("b", access=access)]))
    expected = nvmet.contents()
    run([])
    assert nvmet.contents() == before
    run(want("ab", access))
    changed = wanted([disk("a", access=other), disk("b", access=access)])
    calls = changes(nvmet, lambda: run(changed))
    assert nvmet.contents() == expected
    kept = [c for c in calls if name_of(c) == "b" and not is_courtesy(c)]
    assert kept == ["write nvmet/subsystems/nqn.test.b/namespaces/1/revalidate_size 1"]
    assert ("rmdir nvmet/subsystems/nqn.test.a" in calls) == (access != other)


@in_each_access
@pytest.mark.parametrize(("tag", "model"), [("254:0 2", "Model"), ("254:0 1", "Other")])
def test_another_disk_or_model_is_made_anew(
    nvmet: Nvmet, run: Run, tag: str, model: str, access: str
) -> None:
    """Another disk under the same name, or attributes that can't change while it is exported."""
    run(want("ab", access))
    old, new = disk("a", access=access), disk("a", tag, model, access=access)
    calls = changes(nvmet, lambda: run(wanted([new, disk("b", access=access)])))
    assert "rmdir nvmet/subsystems/nqn.test.a" in calls
    assert "mkdir nvmet/subsystems/nqn.test.a" in calls
    if access != READ_WRITE:
        # Only with another disk is there another device in between.
        assert (f"remove dm/{mapping_of(old)}" in calls) == (tag != old.disk.tag)
        assert (f"create dm/{mapping_of(new)}" in calls) == (tag != old.disk.tag)
    assert not [c for c in calls if name_of(c) == "b" and "revalidate_size" not in c and not is_courtesy(c)]
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
@in_each_access
def test_change_of_ports_changes_links_alone(
    nvmet: Nvmet,
    tmp_path: Path,
    before: dict[int, int],
    after: dict[int, int],
    calls: list[str],
    access: str,
) -> None:
    """Only links change, the disk stays."""
    session = Session(nvmet, tmp_path / "x.entries")
    a = disk("a", access=access)
    session.reconcile(wanted([a], before))
    made = changes(nvmet, lambda: session.reconcile(wanted([a], after)))
    assert [c for c in made if not c.startswith("write") and not is_courtesy(c)] == calls
    session.close()
    session = Session(nvmet, tmp_path / "x.entries")
    session.reconcile([])
    session.close()
    assert list(nvmet.path("nvmet/ports").iterdir()) == []


def test_link_to_something_else_is_mended(nvmet: Nvmet, run: Run) -> None:
    run(wanted([disk("a"), disk("b")]))
    complete = nvmet.contents()
    links = nvmet.path("nvmet/ports/4420/subsystems")
    for name in "ab":  # a port has one link to each at most
        os.unlink(links / f"nqn.test.{name}")
    os.symlink(nvmet.path("nvmet/subsystems/nqn.test.b"), links / "nqn.test.a")
    run(wanted([disk("a"), disk("b")]))
    assert nvmet.contents() == complete


# Restart


@in_each_access
def test_restart_finds_all_as_it_should_be(nvmet: Nvmet, run: Run, access: str) -> None:
    """Clients that are attached notice nothing."""
    run(want("abc", access))
    complete = nvmet.contents()
    again = [c for c in changes(nvmet, lambda: run(want("abc", access))) if not is_courtesy(c)]
    assert sorted(again) == [
        f"write nvmet/subsystems/nqn.test.{n}/namespaces/1/revalidate_size 1" for n in "abc"
    ]
    assert nvmet.contents() == complete


def test_attribute_that_somebody_changed_is_mended(nvmet: Nvmet, run: Run) -> None:
    run(want("abc"))
    (nvmet.path("nvmet/subsystems/nqn.test.b") / "attr_serial").write_text("wrong\n")
    expected = nvmet.contents()
    expected["nvmet/subsystems/nqn.test.b/attr_serial"] = "serial b"
    run(want("abc"))
    assert nvmet.contents() == expected


STEPS = {
    # Two ports, and disks with two links each.
    READ_WRITE: 2 * 5 + 2 * 13,
    # The device, its store, its table.
    SNAPSHOT: 2 * 5 + 2 * (4 + 13),
    # The device with its table and without its cache, no limit of clients, write protection; the passage.
    READ_ONLY: 2 * 5 + 2 * (4 + 11 + 3) + 5 + 3,
}


def check_steps(number: int, access: str) -> None:
    """Whether there were so many; of two that ask for a free loop device at once, one asks once more."""
    assert number == STEPS[access] or (access == SNAPSHOT and STEPS[access] < number <= STEPS[access] + 2)


def check_recovery(
    nvmet: Nvmet, run: Run, before: dict[str, str], complete: dict[str, str], access: str
) -> None:
    """The next run has all as it should be, and another removes it all."""
    assert run(want("ab", access)) == {}
    assert nvmet.contents() == complete
    assert run([]) == {}
    assert nvmet.contents() == before


def test_port_for_ourselves_lets_no_client_in(nvmet: Nvmet, run: Run, tmp_path: Path) -> None:
    """A port that was only there for ourselves when a run was killed does not."""
    calls = changes(nvmet, lambda: run(want("a", READ_ONLY)))
    for kept, opened in (("", False), ("protect", False), ("symlink nvmet/ports/4420", True)):
        run([])
        number = next(i for i, c in enumerate(calls) if c.startswith(kept)) + 1 if kept else 0
        assert nvmet.run_and_kill_at(number, lambda: run(want("a", READ_ONLY)))
        session = Session(nvmet, tmp_path / "x.entries")
        assert session.tree.admits() == opened
        session.close()
    run([])


@in_each_access
def test_port_that_others_changed_is_made_anew(nvmet: Nvmet, run: Run, access: str) -> None:
    """It is made anew; disks are linked there again, and stay what they are."""
    run(want("ab", access))
    complete = nvmet.contents()
    inode = nvmet.path("nvmet/subsystems/nqn.test.a").stat().st_ino
    nvmet.path("nvmet/ports/4421/addr_traddr").write_text("::1\n")
    made = changes(nvmet, lambda: run(want("ab", access)))
    assert nvmet.contents() == complete
    assert nvmet.path("nvmet/subsystems/nqn.test.a").stat().st_ino == inode
    assert not [c for c in made if c.startswith(("mkdir", "rmdir", "remove")) and name_of(c)]


@in_each_access
def test_crash_while_creating_is_recovered(nvmet: Nvmet, run: Run, access: str) -> None:
    """Killed before each system call in turn."""
    before = nvmet.contents()
    run(want("ab", access))
    complete = nvmet.contents()
    run([])
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run(want("ab", access))):
        check_recovery(nvmet, run, before, complete, access)
        number += 1
    check_steps(number, access)


@in_each_access
def test_crash_while_removing_is_recovered(nvmet: Nvmet, run: Run, access: str) -> None:
    before = nvmet.contents()
    run(want("ab", access))
    complete = nvmet.contents()
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run([])):
        check_recovery(nvmet, run, before, complete, access)
        run(want("ab", access))
        number += 1
    assert number == 2 + 2 * (4 if access == READ_WRITE else 5)


@in_each_access
def test_crash_leaves_nothing_where_all_is_to_go(nvmet: Nvmet, run: Run, access: str) -> None:
    """What is half-made is removed as well as what is whole."""
    before = nvmet.contents()
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run(want("ab", access))):
        assert run([]) == {}
        assert nvmet.contents() == before
        number += 1
    check_steps(number, access)


@in_each_access
def test_crash_while_access_changes_is_recovered(nvmet: Nvmet, run: Run, access: str) -> None:
    """To the next one; the disk is exported with the old one, with the new one, or not at all."""
    before = nvmet.contents()
    other = {READ_ONLY: SNAPSHOT, SNAPSHOT: READ_WRITE, READ_WRITE: READ_ONLY}[access]
    run(want("a", other))
    complete = nvmet.contents()
    number = 0
    while True:
        run(want("a", access))
        if not nvmet.run_and_kill_at(number, lambda: run(want("a", other))):
            break
        assert run(want("a", other)) == {}
        assert nvmet.contents() == complete
        number += 1
    assert number > 12
    run([])
    assert nvmet.contents() == before


@in_each_access
def test_crash_with_a_shared_subsystem_is_recovered(nvmet: Nvmet, run: Run, access: str) -> None:
    """There, what is in between comes before the root of the disk's branch."""
    before = nvmet.contents()

    def one() -> list[storagetm.Branch]:
        return wanted([disk("a", access=access)], shared=True)

    run(one())
    complete = nvmet.contents()
    run([])
    number = 0
    while nvmet.run_and_kill_at(number, lambda: run(one())):
        if number % 2:
            assert run(one()) == {}
            assert nvmet.contents() == complete
        assert run([]) == {}
        assert nvmet.contents() == before
        number += 1
    assert number > 20


@pytest.mark.parametrize("access", [READ_ONLY, SNAPSHOT])
def test_crash_while_io_is_held_back_is_recovered(nvmet: Nvmet, run: Run, access: str) -> None:
    """As it is while a snapshot's memory is made smaller, and while a drive is looked into."""
    run(want("a", access))
    complete = nvmet.contents()
    name = mapping_of(disk("a", access=access))
    storagetm.dm_call(storagetm.DM_DEV_SUSPEND, name, flags=storagetm.DM_SUSPEND_FLAG)
    assert nvmet.contents() != complete
    assert run(want("a", access)) == {}
    assert nvmet.contents() == complete


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("trouble", [storagetm.INVALID, storagetm.OVERFLOW])
def test_crash_while_a_snapshot_is_revived_is_recovered(
    nvmet: Nvmet, run: Run, trouble: str, stays: bool
) -> None:
    """What clients have changed is kept, or else its memory is free in the end."""
    before = nvmet.contents()
    name = mapping_of(disk("a", access=SNAPSHOT))
    number = 0
    while True:
        run(want("a", SNAPSHOT))
        complete = nvmet.contents()
        store = storagetm.snapshot_store(name)
        mapper(nvmet).fill(name, trouble)
        if not nvmet.run_and_kill_at(number, lambda: storagetm.revive_snapshot(name)):
            break
        if stays:
            assert run(want("a", SNAPSHOT)) == {}
            assert storagetm.snapshot_store(name) == store
            if state := storagetm.snapshot_state(name):
                assert state[2] in ("", trouble)
        assert run([]) == {}
        assert nvmet.contents() == before
        number += 1
    assert number == 6  # autoclear, two tables, autoclear
    assert nvmet.contents() == complete


@in_each_access
def test_crash_while_ports_change_is_recovered(nvmet: Nvmet, run: Run, access: str) -> None:
    before = nvmet.contents()

    def old() -> list[storagetm.Branch]:
        return wanted([disk("a", access=access)], {V4: 2, V6: 3})

    def new() -> list[storagetm.Branch]:
        return wanted([disk("a", access=access)], {V4: 4, V6: 3})

    run(new())
    complete = nvmet.contents()
    number = 0
    while True:
        run(old())
        inode = nvmet.path("nvmet/subsystems/nqn.test.a").stat().st_ino
        if not nvmet.run_and_kill_at(number, lambda: run(new())):
            break
        assert run(new()) == {}
        assert nvmet.contents() == complete
        assert nvmet.path("nvmet/subsystems/nqn.test.a").stat().st_ino == inode
        number += 1
    run([])
    assert nvmet.contents() == before
    # Ports, the link and the size; the passage, write protection, and the passage again.
    assert number == 2 + 5 + 2 + (5 + 3 + 2 if access == READ_ONLY else 0)


# Failures


@in_each_access
def test_failure_while_creating_leaves_nothing_of_the_branch(nvmet: Nvmet, run: Run, access: str) -> None:
    """Every system call fails in turn: of that branch nothing is left, the others are there.

    Where only hosts could not be told, the disk is there all the same.
    """
    run(want("ab", access))
    complete = nvmet.contents()
    run([])
    before = nvmet.contents()
    for number in range(STEPS[access]):
        nvmet.fail_at(number)
        first = len(nvmet.calls)
        failures = run(want("ab", access))
        nvmet.succeed()
        failing = nvmet.calls[first + number]
        if is_courtesy(failing):
            assert set(failures) <= {PASSAGE}
            missing = complete.keys() - nvmet.contents().keys()
            assert all(path.endswith("/write_protected") for path in missing)
            assert nvmet.contents().items() <= complete.items()
        else:
            failed = next(iter(failures))
            assert failures[failed].error.errno == errno.EIO
            assert not nvmet.path(failed).exists()
            if failed.startswith("nvmet/subsystems"):
                assert len(failures) == 1
                name = failed.rpartition(".")[2]
                assert nvmet.contents() == {p: v for p, v in complete.items() if name_of(p) != name}
        check_recovery(nvmet, run, before, complete, access)


@in_each_access
def test_failure_names_the_entry(nvmet: Nvmet, run: Run, access: str) -> None:
    calls = changes(nvmet, lambda: run(want("a", access)))
    run([])
    for number, call in enumerate(calls):
        nvmet.fail_at(number)
        failures = run(want("a", access))
        if is_courtesy(call):
            assert {f.entry.path for f in failures.values()} <= {
                call.split()[1],
                f"nvmet/ports/{transport({}).port_number(0)}/subsystems",
            }
            nvmet.succeed()
            run([])
            continue
        (failure,) = [f for f in failures.values() if f.error.errno == errno.EIO and not f.cause]
        where = call.split()[1]
        assert failure.entry.path == (
            where if "loop/" not in where else f"dm/{mapping_of(disk('a', access=access))}"
        )
        nvmet.succeed()
        run([])


@in_each_access
def test_what_failed_to_go_goes_the_next_time(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    """What stays is known still, and goes the next time."""
    before = nvmet.contents()
    for number in range(2 + 2 * (4 if access == READ_WRITE else 5)):
        session = Session(nvmet, tmp_path / "x.entries")
        session.reconcile(want("ab", access))
        nvmet.fail_at(number)
        failures = once(session.tree, [])
        nvmet.succeed()
        assert failures
        needed = {root for failure in failures.values() for root in failure.branch.needs}
        assert set(failures) <= set(session.tree.live) <= needed | set(failures)
        assert session.reconcile([]) == {}
        assert session.tree.live == {}
        assert nvmet.contents() == before
        session.close()


@in_each_access
def test_failure_while_patching_is_made_up_for(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    session = Session(nvmet, tmp_path / "x.entries")
    session.reconcile(wanted([disk("a", access=access)], {V4: 2}))
    more = wanted([disk("a", access=access)], PORTS | {V4: 2})
    # The port is made, and clients are told of the size, and of the protection over the passage.
    nvmet.fail_at(5 + 1 + (5 + 3 if access == READ_ONLY else 0))
    failures = session.reconcile(more)
    assert list(failures) == ["nvmet/subsystems/nqn.test.a"]
    assert failures["nvmet/subsystems/nqn.test.a"].entry.path == "nvmet/ports/4421/subsystems/nqn.test.a"
    nvmet.succeed()
    assert session.reconcile(more) == {}
    assert "nvmet/ports/4421/subsystems/nqn.test.a" in nvmet.contents()
    session.close()


@in_each_access
def test_hopeless_failure_is_tried_with_no_other_disk(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    def intercept(number: int) -> None:
        if nvmet.calls[number].startswith("symlink") and not is_courtesy(nvmet.calls[number]):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    session = Session(nvmet, tmp_path / "x.entries")
    nvmet.intercept = intercept
    failures = once(session.tree, want("abc", access))
    assert list(failures) == ["nvmet/subsystems/nqn.test.a"]
    assert "nvmet/subsystems/nqn.test.a" not in session.tree.live
    # Of the others, nothing was linked, and that is made up for.
    assert not any(nvmet.path("nvmet/ports/4421/subsystems").iterdir())
    nvmet.succeed()
    assert session.reconcile(want("abc", access)) == {}
    for number in PORTS.values():
        assert len(list(nvmet.path(f"nvmet/ports/{number}/subsystems").iterdir())) == 3
    session.close()


@in_each_access
def test_removal_that_hangs_holds_up_no_other(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    """The others go meanwhile, its name is not used again before it has gone, and then it is."""
    begun, release, woken = threading.Event(), threading.Event(), threading.Event()
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.wake = woken.set
    session.reconcile(want("abc", access))

    def intercept(number: int) -> None:
        if nvmet.calls[number] == "rmdir nvmet/subsystems/nqn.test.b/namespaces/1":
            begun.set()
            assert release.wait(60)

    nvmet.intercept = intercept
    ports = wanted([])
    # Those that do not hang are done in time on any machine that is not.
    assert session.reconcile(ports, 0.5) == {}
    assert begun.wait(60)
    assert session.tree.leaving == {"nvmet/subsystems/nqn.test.b"}
    assert list(nvmet.path("nvmet/subsystems").iterdir()) == [nvmet.path("nvmet/subsystems/nqn.test.b")]
    new = wanted([disk("b", tag="new", access=access)])
    assert [c for c in changes(nvmet, lambda: session.reconcile(new, 0.5)) if not is_courtesy(c)] == []
    woken.clear()
    release.set()
    assert woken.wait(60)
    assert session.reconcile(new, 0.5) == {}
    assert session.tree.leaving == set()
    assert session.tree.live["nvmet/subsystems/nqn.test.b"].tag == "new"
    session.close()


@in_each_access
def test_nobody_is_let_in_where_a_removal_hangs(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    """Nobody is let in to what is half gone, and nothing waits for what has to stay meanwhile."""
    release, woken = threading.Event(), threading.Event()
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.wake = woken.set
    session.reconcile(want("ab", access))

    def intercept(number: int) -> None:
        if nvmet.calls[number] == "rmdir nvmet/subsystems/nqn.test.b/namespaces/1":
            assert release.wait(60)

    nvmet.intercept = intercept
    new = wanted([disk("a", access=access), disk("b", tag="new", access=access)])
    calls = changes(nvmet, lambda: session.reconcile(new, 0.5))
    assert session.tree.leaving == {"nvmet/subsystems/nqn.test.b"}
    assert not [c for c in calls if c.startswith("symlink") and not is_courtesy(c)]
    began = time.monotonic()
    session.reconcile(new, 20)
    assert time.monotonic() - began < 10
    woken.clear()
    release.set()
    assert woken.wait(60)
    assert session.reconcile(new, 0.5) == {}
    assert nvmet.path("nvmet/ports/4421/subsystems/nqn.test.b").exists()
    assert session.tree.live["nvmet/subsystems/nqn.test.b"].tag == "new"
    session.close()


@in_each_access
def test_removal_that_hangs_beside_others_ends(nvmet: Nvmet, tmp_path: Path, access: str) -> None:
    """In a shared subsystem, nothing goes where the kernel would have us wait, and it is done in the end."""
    begun, release, woken = threading.Event(), threading.Event(), threading.Event()
    session = Session(nvmet, tmp_path / "x.entries")
    session.tree.wake = woken.set
    made = transport({V4: 2}, shared=True)

    def wanted_with(*disks: storagetm.Export) -> list[storagetm.Branch]:
        return [*made.common(), *(b for d in disks for b in wanted_of(made, d, "nqn.test"))]

    stays, goes, comes = (disk(name, access=access) for name in "abc")
    goes.stay, comes.stay = storagetm.Stay(2, ""), storagetm.Stay(3, "")
    session.reconcile(wanted_with(stays, goes))
    gone, new = made.root(goes), made.root(goes).rpartition("/")[0] + "/3"

    def intercept(number: int) -> None:
        if nvmet.calls[number] == f"rmdir {gone}":
            begun.set()
            assert release.wait(60)

    nvmet.intercept = intercept
    assert session.reconcile(wanted_with(stays), 0.2) == {}
    assert begun.wait(60)
    assert session.tree.leaving == {gone}
    calls = changes(nvmet, lambda: session.reconcile(wanted_with(stays, comes), 0.2))
    assert [c for c in calls if not is_courtesy(c)] == []
    # What is there already is none of this.
    stays.disk.size *= 2
    calls = changes(nvmet, lambda: session.reconcile(wanted_with(stays, comes), 0.2))
    resized = [call for call in calls if not is_courtesy(call)]
    assert resized[-1] == f"write {made.root(stays)}/revalidate_size 1"
    assert all(call.endswith(f"dm/{mapping_of(stays)}") or "cache" in call for call in resized[:-1])
    woken.clear()
    release.set()
    assert woken.wait(60)
    assert session.reconcile(wanted_with(stays, comes), 0.2) == {}
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


@in_each_access
def test_others_are_left_alone(nvmet: Nvmet, run: Run, access: str) -> None:
    unchanged = [
        foreign(nvmet, path)
        for path in ("nvmet/subsystems/nqn.other.a", "nvmet/subsystems/nqn.test.z", "nvmet/ports/1")
    ]
    unchanged.append(mapper(nvmet).make("storagetm-z-0123456789abcdef", "storagetm-z-0123456789abcdef"))
    run(want("abc", access))
    run(want("b", access))
    run([])
    assert all(check() for check in unchanged)
    # The port and the directory in it, and subsystems with two directories and a namespace.
    theirs = 2 + len(stand_in.PORT) + 2 * (len(stand_in.SUBSYSTEM) + 3 + len(stand_in.NAMESPACE) + 1)
    assert len(nvmet.contents()) == 4 + theirs + 3


@in_each_access
@pytest.mark.parametrize("path", ["nvmet/subsystems/nqn.test.b", "nvmet/ports/4420"])
def test_others_with_our_names_are_left_alone(nvmet: Nvmet, run: Run, path: str, access: str) -> None:
    unchanged = foreign(nvmet, path)
    failures = run(want("abc", access))
    assert failures[path].error.errno == errno.EEXIST
    assert unchanged() or path.startswith("nvmet/ports")
    run(want("abc", access))
    run([])
    assert unchanged()


@pytest.mark.parametrize("ours", ["name", "UUID"])
@pytest.mark.parametrize("access", [READ_ONLY, SNAPSHOT])
def test_others_with_our_names_in_device_mapper_are_left_alone(
    nvmet: Nvmet, run: Run, access: str, ours: str
) -> None:
    """That disk is not exported, and the others are."""
    before = nvmet.contents()
    run(want("ac", access))
    expected = nvmet.contents()
    run([])
    name = mapping_of(disk("b", access=access))
    unchanged = mapper(nvmet).make(*((name, "x") if ours == "name" else ("x", name)))
    theirs = nvmet.contents().items() - before.items()
    failures = run(want("abc", access))
    assert [(root, f.error.errno, bool(f.cause)) for root, f in failures.items()] == [
        (f"dm/{name}", errno.EBUSY, False),
        ("nvmet/subsystems/nqn.test.b", errno.EBUSY, True),
    ]
    assert nvmet.contents() == expected | dict(theirs)
    assert failures[f"dm/{name}"].entry.path == f"dm/{name}"
    run([])
    assert unchanged()
    assert nvmet.contents() == before | dict(theirs)


@in_each_access
def test_what_others_took_away_is_made_again(nvmet: Nvmet, run: Run, access: str) -> None:
    """What is missing is made again by the next run, and no failure at the end."""
    before = nvmet.contents()
    run(want("abc", access))
    complete = nvmet.contents()
    for link in nvmet.path("nvmet/ports").glob("*/subsystems/nqn.test.b"):
        os.unlink(link)
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.test.b/namespaces/1"))
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.test.b"))
    assert run(want("abc", access)) == {}
    assert nvmet.contents() == complete
    os.unlink(nvmet.path("nvmet/ports/4420/subsystems/nqn.test.b"))
    assert run([]) == {}
    assert nvmet.contents() == before
    # All of it, but what only device-mapper has.
    run(want("b", access))
    for link in nvmet.path("nvmet/ports").glob("*/subsystems/nqn.test.b"):
        os.unlink(link)
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.test.b/namespaces/1"))
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.test.b"))
    assert run([]) == {}
    assert nvmet.contents() == before


# Dry run


def planned(nvmet: Nvmet, ledger: Path, branches: Sequence[storagetm.Branch]) -> list[dict[str, str]]:
    steps: list[dict[str, str]] = []
    tree = storagetm.Rehearsal(f"{nvmet.root}/", storagetm.Ledger(str(ledger)), steps.append)
    if ledger.exists():
        tree.adopt()
    assert reconcile(tree, branches) == {}
    return steps


# Each run computes them anew.
STARTS: list[Callable[[str], Sequence[storagetm.Branch]]] = [
    lambda _: [],
    lambda access: want("abc", access),
    lambda access: wanted([disk("a", access=access), disk("x", access=access)], {V4: 2}),
    lambda access: wanted(
        [
            disk("a", tag="other", access=access),
            disk("b", model="Other", access=access),
            disk("c", size=4096, access=access),
        ]
    ),
    lambda access: wanted([disk("a", access=access), disk("b", access=access)], shared=True),
    lambda access: wanted([disk("b", access=access), disk("c", access=access)], {V4: 2}, shared=True),
]
# The call for each kind of step that is more than one call, or another one.
CALLS = {"map": "create", "unmap": "remove", "write-protect": "protect"}


@pytest.mark.parametrize(
    ("start", "end", "access"),
    [
        (start, end, access)
        for access in storagetm.ACCESS
        for start in range(len(STARTS))
        for end in range(len(STARTS))
        # With a snapshot it is the same as read-only, but for the table.
        if access != SNAPSHOT or 1 in (start, end)
    ],
)
def test_dry_run_does_what_the_real_run_does(
    nvmet: Nvmet,
    run: Run,
    tmp_path: Path,
    start: int,
    end: int,
    access: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It changes nothing, and a shell that runs its commands comes to the same as the real run."""
    run(STARTS[start](access))
    before = nvmet.contents()
    ledger = tmp_path / "x.entries"
    noted = ledger.read_bytes()
    steps: list[dict[str, str]] = []
    assert changes(nvmet, lambda: steps.extend(planned(nvmet, ledger, STARTS[end](access)))) == []
    assert nvmet.contents() == before
    assert ledger.read_bytes() == noted

    calls = changes(nvmet, lambda: run(STARTS[end](access)))
    expected = nvmet.contents()
    # The links in the passage are not shown, nor what a device and its table consist of.
    passage = f"{PASSAGE}/subsystems/"
    kinds = Counter(CALLS.get(s["step"], s["step"]) for s in steps if passage not in s["path"])
    made = Counter(call.split()[0] for call in calls if f" {passage}" not in call)
    for part in ("bind", "load", "resume", "cache", "connect"):
        del made[part]
    assert made == kinds

    with monkeypatch.context() as patch:
        copy = kernel(tmp_path / "copy", patch)
        session = Session(copy, tmp_path / "copy.entries")
        session.reconcile(STARTS[start](access))
        session.close()
        assert copy.contents() == before
        script = stand_in.SHELL + mapper(copy).shell + "\n".join(s["command"] for s in steps)
        script = script.replace(f"{nvmet.root}/", f"{copy.root}/")
        subprocess.run(["sh", "-c", script], check=True)
        contents = copy.contents()
        mapper(copy).close()
    for path in contents:
        if path.endswith("/revalidate_size"):
            contents[path] = "0"
    # What no shell can do, or does not need to.
    for found in (contents, expected):
        for path in [p for p in found if p.endswith(("/write_protected", "/write_cache"))]:
            del found[path]
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


def test_each_kind_of_entry_has_a_letter_of_its_own() -> None:
    """An earlier run's are known by it, and would be taken for something else."""

    def kinds(kind: type[storagetm.Entry]) -> list[type[storagetm.Entry]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in kinds(sub))]

    own = [kind for kind in kinds(storagetm.Entry) if vars(kind).get("LETTER")]
    letters = [kind.LETTER for kind in own if kind.__module__ == storagetm.__name__]
    assert len(letters) > 10
    assert sorted(letters) == sorted({*letters} - {storagetm.Ledger.NEED})


def test_every_step_is_described() -> None:
    """What is done by an entry of any kind is in a dry run, too."""

    def kinds(kind: type[storagetm.Entry]) -> list[type[storagetm.Entry]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in kinds(sub))]

    base = storagetm.Entry
    assert len(kinds(base)) > 8
    for kind in kinds(base):
        assert (kind.make is base.make) == (kind.described is base.described), kind
    # A hint to hosts is taken back by the removal of what it hangs on.
    for kind in kinds(base):
        if issubclass(kind, storagetm.WriteProtection):
            continue
        assert (kind.unmake is base.unmake) == (kind.undescribed is base.undescribed), kind


def test_steps_of_a_dry_run_are_shell_commands(nvmet: Nvmet, tmp_path: Path) -> None:
    root, name = f"{nvmet.root}/nvmet", "nqn.test.it's"
    steps = planned(nvmet, tmp_path / "x.entries", wanted([disk("it's", access=READ_WRITE)], {V4: 2}))
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


@in_each_access
def test_dry_run_is_the_same_as_text_and_json(
    nvmet: Nvmet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    access: str,
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
    arguments = ["--dry-run", "--nqn=quux", f"--{access}", str(image)]
    assert storagetm.main(arguments) == 0
    out, err = capfd.readouterr()
    commands = out.splitlines()
    # Whatever else there is to say is no command.
    assert "Port 29423 is taken" in err
    assert storagetm.main([*arguments, "--json"]) == 0
    steps = json.loads(capfd.readouterr().out)
    assert nvmet.contents() == before
    ports = [f"{nvmet.root}/nvmet/ports/{number}" for number in (16858, 23804)]
    # The passage comes first, and goes last.
    assert commands[0] == f"mkdir {ports[access == READ_ONLY]}"
    assert commands[-1].startswith("ln -s " if access != READ_ONLY else f"rmdir {ports[1]}")
    assert f"mkdir {ports[0]}" in commands
    assert len(steps) == len(commands)
    assert steps[0] == {"step": "mkdir", "path": commands[0].partition(" ")[2]}
    passage = {"write-protect", "unlink", "rmdir"} if access == READ_ONLY else set()
    assert {s["step"] for s in steps} == {"mkdir", "map", "write", "symlink"} | passage


@pytest.mark.parametrize("access", [READ_ONLY, SNAPSHOT])
def test_dry_run_with_a_new_size_changes_the_table(
    nvmet: Nvmet, run: Run, tmp_path: Path, access: str
) -> None:
    """The device is there already, and gets another table."""
    a, bigger = disk("a", access=access), disk("a", size=1024, access=access)
    name = mapping_of(a)
    (map_new,) = [s for s in planned(nvmet, tmp_path / "x.entries", wanted([a])) if s["step"] == "map"]
    assert map_new["command"].startswith(f"dmsetup create {name} --uuid {name} --table '0 1 ")
    run(wanted([a]))
    (map_again,) = [
        s for s in planned(nvmet, tmp_path / "x.entries", wanted([bigger])) if s["step"] == "map"
    ]
    assert map_again["command"].startswith(f"dmsetup reload {name} --table '0 2 ")
    assert map_again["command"].endswith(f"' && dmsetup resume {name}")


# Anything in any order


class AnyOrder(RuleBasedStateMachine):
    """Runs that end well, are killed, or fail, with anything wanted, beside others' entries and devices."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir=MEMORY)
        self.patch = pytest.MonkeyPatch()
        self.base = Path(self.directory.name)
        self.nvmet = kernel(self.base, self.patch)
        self.ledger = self.base / "x.entries"
        self.session: Session | None = None
        self.foreign: dict[str, Callable[[], bool]] = {}

    WANTED = st.builds(
        lambda some, ports, shared, admission: wanted(some, ports, shared=shared, admission=admission()),
        st.lists(
            st.builds(
                disk,
                st.sampled_from("abcd"),
                tag=st.sampled_from(["1", "2"]),
                model=st.sampled_from(["M", "N"]),
                size=st.sampled_from([512, 1024]),
                access=st.sampled_from(storagetm.ACCESS),
            ),
            unique_by=lambda d: d.disk.name,
            max_size=4,
        ),
        st.sampled_from([{V4: 2}, {V4: 2, V6: 3}, {V6: 5}]),
        st.booleans(),
        st.sampled_from(
            [
                storagetm.Admission,
                *(functools.partial(storagetm.Admission, (), "required", code=code) for code in CODES),
                functools.partial(storagetm.Admission, (), "no", code=CODES[0]),
            ]
        ),
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
        failures = self.open().reconcile(branches)
        refused = [b for b in branches if self.is_foreign(b.root) or not failures.keys().isdisjoint(b.needs)]
        assert failures.keys() == {b.root for b in refused}
        left = without_failed(branches, failures)
        assert set(self.open().tree.live) == {b.root for b in left}
        self.check(left)
        if not refused:
            assert changes(self.nvmet, lambda: self.open().reconcile(branches)) == []

    def check(self, branches: list[storagetm.Branch]) -> None:
        """All that is wanted is there just so, and nothing else of ours."""
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=MEMORY) as directory:
            fresh = kernel(Path(directory), patch)
            session = Session(fresh, Path(directory) / "x.entries")
            # Entries know what they have made, and where.
            assert session.reconcile(copy.deepcopy(branches)) == {}
            session.close()
            expected = fresh.contents()
            mapper(fresh).close()
        found = {p: v for p, v in self.nvmet.contents().items() if not self.is_foreign(p)}
        for contents in (found, expected):
            # How a host would prove a secret, which counts where it has one.
            for path in [p for p, text in contents.items() if p.endswith("/dhchap_key") and not text]:
                del contents[path.replace("dhchap_key", "dhchap_dhgroup")]
        assert found == expected

    @rule(branches=WANTED, number=st.integers(0, 60))
    def kill(self, branches: list[storagetm.Branch], number: int) -> None:
        self.restart()
        self.nvmet.run_and_kill_at(number, lambda: Session(self.nvmet, self.ledger).reconcile(branches))

    @rule(branches=WANTED, number=st.integers(0, 60))
    def fail(self, branches: list[storagetm.Branch], number: int) -> None:
        session = self.open()
        self.nvmet.fail_at(number)
        session.reconcile(branches)
        self.nvmet.succeed()

    @precondition(lambda self: len(self.foreign) < 2)
    @rule(
        path=st.sampled_from(
            [
                *(f"nvmet/subsystems/{nqn}" for nqn in ("nqn.test.b", "nqn.test.x", "nqn.test")),
                *(code.host().root() for code in CODES),
            ]
        )
    )
    def others_make(self, path: str) -> None:
        if self.nvmet.path(path).exists():
            return
        kind = os.path.dirname(path)
        inside = ["namespaces/1"] if kind == "nvmet/subsystems" else []
        # configfs gives no inode number twice; the file system of this directory may.
        noted = storagetm.Ledger.parse(self.ledger.read_bytes()) if self.ledger.exists() else {}
        numbers = {int(inode) for _, inode in noted.values() if inode.isdecimal()}
        spare = 0
        while True:
            decoy = self.nvmet.path(f"{kind}/decoy{spare}")
            os.mkdir(decoy)
            for name in inside:
                os.mkdir(decoy / name)
            if not {(decoy / name).stat().st_ino for name in ("", *inside)} & numbers:
                break
            spare += 1
        os.rename(decoy, self.nvmet.path(path))
        for i in range(spare):
            for name in (*inside, ""):
                os.rmdir(os.path.normpath(self.nvmet.path(f"{kind}/decoy{i}") / name))
        identity = self.nvmet.path(path).stat().st_ino

        def contents() -> dict[str, str]:
            found = self.nvmet.contents().items()
            return {p: text for p, text in found if p == path or p.startswith(f"{path}/")}

        theirs = contents()
        self.foreign[path] = lambda: self.nvmet.path(path).stat().st_ino == identity and contents() == theirs

    @precondition(lambda self: len(self.foreign) < 3)
    @rule(
        code=st.sampled_from(CODES),
        nqn=st.sampled_from(["nqn.test", "nqn.test.a", storagetm.DISCOVERY_NQN]),
        exact=st.booleans(),
    )
    def others_make_key(self, code: storagetm.Code, nqn: str, exact: bool) -> None:
        name, _ = storagetm.tls_key(code.host(), nqn, exact=exact)
        keyring = keyring_of(self.nvmet)
        if name not in keyring.usable():
            self.foreign[keyring.path(name)] = keyring.make(name)

    @precondition(lambda self: len(self.foreign) < 3)
    @rule(
        name=st.sampled_from("abx"),
        access=st.sampled_from([READ_ONLY, SNAPSHOT]),
        tag=st.sampled_from(["1", "2"]),
        uuid=st.sampled_from(["", "CRYPT-{}", "storagetm-other-{}"]),
    )
    def others_make_device(self, name: str, access: str, tag: str, uuid: str) -> None:
        name = mapping_of(disk(name, tag, access=access))
        if f"dm/{name}" not in self.nvmet.contents():
            self.foreign[f"dm/{name}"] = mapper(self.nvmet).make(name, uuid.format(name))

    @invariant()
    def others_are_left_alone(self) -> None:
        assert all(check() for check in self.foreign.values())

    def teardown(self) -> None:
        try:
            # The entries that others have by our names now are no longer ours to find.
            assert self.open().reconcile([]) == {}
            self.others_are_left_alone()
            left = {p for p in self.nvmet.contents() if not self.is_foreign(p)}
            assert left == {"nvmet", "nvmet/hosts", "nvmet/ports", "nvmet/subsystems"}
            self.restart()
        finally:
            mapper(self.nvmet).close()
            self.patch.undo()
            self.directory.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=12)
