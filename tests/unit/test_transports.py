# SPDX-License-Identifier: LGPL-2.1-or-later
"""One disk over several transports: NVMe/TCP, and one that is made up and served by the process itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence

import pytest

import storagetm
from storagetm import READ_ONLY, READ_WRITE
from tests.unit.configfs import Nvmet, is_courtesy

Start = Callable[..., storagetm.Exporter]


class Served(storagetm.Entry):
    """An entry that goes with the process."""

    LIVE = ADMITS = True

    def __init__(self, path: str, served: Served.By) -> None:
        super().__init__(path)
        self.served = served

    def make(self, root: str) -> None:
        if self.path in self.served.refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.served.paths.append(self.path)
        self.served.order.append(f"+{self.path}")

    def unmake(self, root: str) -> None:
        if self.path in self.served.paths:
            self.served.paths.remove(self.path)
            self.served.order.append(f"-{self.path}")

    def is_live(self, root: str) -> bool:
        return self.path in self.served.paths

    def described(self, root: str) -> dict[str, str]:
        return {"step": "serve", "path": self.path, "command": f"serve {self.path}"}

    def undescribed(self, root: str) -> dict[str, str]:
        return {"step": "end", "path": self.path, "command": f"end {self.path}"}

    class By(storagetm.Transport):
        """A transport with a branch of its own and one for each disk."""

        name = "served"
        NAME_MAX = 100

        def __init__(self) -> None:
            self.paths: list[str] = []  # what is live
            self.order: list[str] = []  # what has happened
            self.refused: set[str] = set()
            self.left_out: set[str] = set()

        def basis(self) -> object:
            return tuple(sorted(self.left_out))

        def why_not(self, export: storagetm.Export) -> str:
            return "it is not to be served" if export.disk.name in self.left_out else ""

        def root(self, export: storagetm.Export) -> str:
            return f"served/{export.disk.name}"

        def common(self) -> list[storagetm.Branch]:
            return [storagetm.Branch("server", [Served("server", self)])]

        def branch(self, export: storagetm.Export, between: storagetm.Branch) -> storagetm.Branch:
            entries: list[storagetm.Entry] = [Served(self.root(export), self)]
            return storagetm.Branch(export.disk.tag, entries, needs=[between.root, "server"])

        def explain(self, failure: storagetm.Failure) -> str:
            return "the server is full" if isinstance(failure.entry, Served) else ""

        def label(self, export: storagetm.Export) -> str:
            return f"served:{export.disk.name}"

        def way(self, addresses: object) -> storagetm.Way:
            return storagetm.Way("the counter")

        def instructions(
            self, exports: object, addresses: Sequence[storagetm.Address]
        ) -> list[storagetm.Instruction]:
            return [storagetm.Instruction(a, f"fetch {a.text}") for a in addresses]


@pytest.fixture
def served() -> Served.By:
    return Served.By()


@pytest.fixture(params=[READ_ONLY, READ_WRITE])
def access(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def start(nvmet: Nvmet, access: str) -> Iterator[Start]:
    runs: list[storagetm.Exporter] = []
    assert nvmet.path("nvmet").is_dir()

    def begin(served: Served.By, *paths: str) -> storagetm.Exporter:
        machine = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", machine.id)
        stays.kept = True
        rules = storagetm.Access((), access)
        inventory = storagetm.Inventory([storagetm.NamedDisks(paths)], rules, stays)
        transport = storagetm.NvmeTcp(machine)
        exporter = storagetm.Exporter(transport.prefix, [transport, served], inventory)
        inventory.check_named()
        exporter.ledger.lock()
        exporter.begin()
        runs.append(exporter)
        return exporter

    yield begin
    for exporter in runs:
        kill(exporter)


def kill(exporter: storagetm.Exporter) -> None:
    for export in exporter.inventory.exports.values():
        export.release()
    exporter.ledger.close()


def live(exporter: storagetm.Exporter) -> dict[str, list[str]]:
    return {key: sorted(export.live) for key, export in exporter.inventory.exports.items()}


BOTH = ["nvme-tcp", "served"]


def test_two_transports_share_what_is_between(start: Start, nvmet: Nvmet, served: Served.By) -> None:
    before = nvmet.contents()
    exporter = start(served, "/dev/vdb", "/dev/vdc")
    exporter.synchronise(strict=True)
    assert live(exporter) == {"vdb": BOTH, "vdc": BOTH}
    assert served.paths == ["server", "served/vdb", "served/vdc"]
    needed = [root for b in exporter.tree.live.values() for root in b.needs]
    for export in exporter.inventory.exports.values():
        assert export.backing
        assert needed.count(export.backing.root) == 2
        assert export.held
    calls = len(nvmet.calls)
    exporter.synchronise()
    assert served.order == ["+server", "+served/vdb", "+served/vdc"]
    assert not [c for c in nvmet.calls[calls:] if c.startswith(("mkdir", "create", "symlink"))]
    assert exporter.stop()
    assert served.paths == []
    assert nvmet.contents() == before


def test_transport_that_fails_leaves_the_other_alone(
    start: Start,
    served: Served.By,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is said once, and tried again when the disk has changed."""
    served.refused = {"served/vdb"}
    exporter = start(served, "/dev/vdb", "/dev/vdc")
    monkeypatch.setattr(storagetm.NamedDisks, "named", False)
    exporter.synchronise()
    exporter.synchronise()
    vdb = exporter.inventory.exports["vdb"]
    assert live(exporter) == {"vdb": ["nvme-tcp"], "vdc": BOTH}
    assert vdb.failed == {"served": "the server is full"}
    assert vdb.held
    assert capfd.readouterr().err == "Failed to export '/dev/vdb': the server is full\n"
    served.refused = set()
    exporter.synchronise()
    assert live(exporter)["vdb"] == ["nvme-tcp"]
    vdb.failed.clear()  # as a change of the disk does it
    exporter.synchronise()
    assert live(exporter) == {"vdb": BOTH, "vdc": BOTH}


@pytest.mark.parametrize("access", [READ_ONLY])
def test_backing_that_fails_is_told_once(
    start: Start,
    nvmet: Nvmet,
    served: Served.By,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    exporter = start(served, "/dev/vdb", "/dev/vdc")
    monkeypatch.setattr(storagetm.NamedDisks, "named", False)

    def intercept(number: int) -> None:
        if nvmet.calls[number].startswith("create dm/storagetm-vdb-"):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    nvmet.intercept = intercept
    exporter.synchronise()
    assert live(exporter) == {"vdb": [], "vdc": BOTH}
    assert not exporter.inventory.exports["vdb"].held
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert served.paths == ["server", "served/vdc"]


def test_disk_that_one_transport_cannot_export_goes_by_the_other(start: Start, served: Served.By) -> None:
    served.left_out = {"vdb"}
    exporter = start(served, "/dev/vdb", "/dev/vdc")
    exporter.synchronise(strict=True)
    assert live(exporter) == {"vdb": ["nvme-tcp"], "vdc": BOTH}
    served.left_out = set()
    exporter.synchronise()
    assert live(exporter) == {"vdb": BOTH, "vdc": BOTH}
    served.left_out = {"vdc"}
    exporter.synchronise()
    assert live(exporter) == {"vdb": BOTH, "vdc": ["nvme-tcp"]}
    assert served.paths == ["server", "served/vdb"]


def test_disk_that_no_transport_can_export_is_left_out(
    start: Start, served: Served.By, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.left_out = {"vdb"}
    monkeypatch.setattr(storagetm.NvmeTcp, "why_not", lambda _, export: "no" * (export.disk.name == "vdb"))
    exporter = start(served, "/dev/vdb", "/dev/vdc")
    exporter.synchronise()
    assert live(exporter) == {"vdb": [], "vdc": BOTH}
    assert exporter.inventory.exports["vdb"].left_out == "no"


def test_what_goes_with_the_process_is_made_again_beside_what_stays(
    start: Start, nvmet: Nvmet, served: Served.By
) -> None:
    """After a kill, clients of the kernel's target see nothing of it, and the rest is served anew."""
    first = start(served, "/dev/vdb", "/dev/vdc")
    first.synchronise(strict=True)
    contents = nvmet.contents()
    kill(first)
    again = Served.By()
    second = start(again, "/dev/vdb", "/dev/vdc")
    calls = len(nvmet.calls)
    second.synchronise()
    assert live(second) == {"vdb": BOTH, "vdc": BOTH}
    assert again.order == ["+server", "+served/vdb", "+served/vdc"]
    passage = second.want.scaffolds()[0].root
    later = [c for c in nvmet.calls[calls:] if not is_courtesy(c, passage)]
    assert not [c for c in later if c.startswith(("rmdir", "unlink", "remove", "mkdir"))]
    assert nvmet.contents().keys() >= contents.keys()
    second.ledger.rewrite(second.tree.live.values(), storagetm.CONFIGFS)
    assert second.stop()
    assert again.paths == []


@pytest.mark.parametrize("access", [READ_WRITE])
def test_what_clients_have_attached_counts_before_the_order(
    start: Start, served: Served.By, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two transports that must not have a writable disk both, the one that has it keeps it."""
    served.cached = True
    with monkeypatch.context() as patch:
        patch.setattr(storagetm.NvmeTcp, "why_not", lambda *_: "not yet")
        exporter = start(served, "/dev/vdb")
        exporter.synchronise(strict=True)
    assert live(exporter) == {"vdb": ["served"]}
    exporter.inventory.rescan()
    exporter.synchronise()
    assert live(exporter) == {"vdb": ["served"]}
    assert served.order == ["+server", "+served/vdb"]
    assert "'/dev/vdb': not over nvme-tcp, since it can be written to" in capfd.readouterr().err


@pytest.mark.parametrize("access", [READ_WRITE])
def test_refusal_of_one_transport_is_not_told_while_nothing_is_exported_yet(
    start: Start, served: Served.By, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would stand beside a disk that the other one is about to export."""
    served.cached = True
    exporter = start(served, "/dev/vdb")
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "still_awaited", lambda _: ["'/dev/vdc' (exported until the last stop)"])
        exporter.synchronise(strict=True)
    vdb = exporter.inventory.exports["vdb"]
    assert (live(exporter), vdb.why_not) == ({"vdb": []}, "")
    assert capfd.readouterr().err == ""
    exporter.synchronise(strict=True)
    assert live(exporter) == {"vdb": ["nvme-tcp"]}
    assert "'/dev/vdb': not over served" in capfd.readouterr().err


def test_report_names_all_ways_to_a_disk(start: Start, served: Served.By) -> None:
    served.left_out = {"vdc"}
    exporter = start(served, "/dev/vdb", "/dev/vdc")
    exporter.synchronise(strict=True)
    where = [storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", False)]
    report = storagetm.take_report(
        storagetm.Machine(), exporter.transports, where, exporter.inventory.exports.values(), exporter.memory
    )
    labels = {row.key: row.label for row in report.exported}
    assert labels["vdb"].endswith(".vdb and served:vdb")
    assert labels["vdc"].endswith(".vdc")
    assert [c.line.split()[0] for c in report.commands] == ["nvme", "fetch"]
