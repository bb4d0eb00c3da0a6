# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is let in: never anybody who should not be, whatever happens on the way, and nothing is left."""

from __future__ import annotations

import errno
import functools
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storagetm
from storagetm import READ_ONLY, READ_WRITE, Admission, AllowedHost, Code, Secret
from tests.unit.configfs import Nvmet
from tests.unit.conftest import CapturedMachine
from tests.unit.keyring import Keyring

PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
PASSAGE = "nvmet/ports/46946"
CODE, OTHER = Code.parse("k7fm-2qxd-9wtr-4hcn"), Code.parse("0123-4567-89ab-cdef")
SECRETS = [Secret(storagetm.dhchap_text(bytes([n]) * 32)) for n in range(3)]

in_both_layouts = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-disk"])


def kept() -> str:
    """The file with the code."""
    return f"{storagetm.RUN}code"


def paired(code: Code = CODE, encrypt: str = "required") -> Admission:
    return Admission((), encrypt, code=code, own=True, kept=kept())


def unpaired() -> Admission:
    return Admission(kept=kept())


def known(*names: str) -> Admission:
    """Hosts with secrets, without TLS."""
    return Admission([AllowedHost(n, secret=SECRETS[0], controller_secret=SECRETS[1]) for n in names])


class Run:
    """One start on the captured machine, as far as exports are concerned."""

    def __init__(self, admission: Admission, *, shared: bool, access: str = READ_ONLY) -> None:
        machine = storagetm.Machine()
        keyring = storagetm.TlsKey.keyring
        assert isinstance(keyring, Keyring)
        keyring.begin()
        stays = storagetm.Stays(storagetm.RUN + "disks", machine.id)
        kind = storagetm.SharedNvmeTcp if shared else storagetm.NvmeTcp
        self.transport = kind(machine, admission=admission, writable=access == READ_WRITE)
        self.inventory = storagetm.Inventory([storagetm.BlockDevices()], storagetm.Access((), access), stays)
        self.exporter = storagetm.Exporter(self.transport.prefix, [self.transport], self.inventory)

    def start(self) -> Run:
        self.exporter.ledger.lock()
        self.exporter.begin()
        self.inventory.stays.kept = True
        self.inventory.rescan()
        self.exporter.synchronise(strict=True)
        return self

    def go(self) -> None:
        """All of it, with nothing left but what is in the kernel."""
        self.start().kill()

    def kill(self) -> None:
        """What remains of it is what is in the kernel, and its files."""
        for export in self.inventory.exports.values():
            export.release()
        self.exporter.ledger.close()

    @property
    def exported(self) -> list[str]:
        return sorted(e.disk.name for e in self.inventory.exports.values() if e.live)


class Watch:
    """Looks after each step whether anybody could come in who should not. What it finds is in a file."""

    def __init__(self, nvmet: Nvmet, keyring: Keyring, found: Path) -> None:
        self.nvmet, self.keyring, self.found = nvmet, keyring, found
        self.before: set[tuple[str, int]] = set()
        self.admissions: list[Admission] = []
        nvmet.inspect = self.inspect

    def expect(self, *admissions: Admission) -> None:
        """Who may be let in from now on. What is open to anybody now may be so until it goes."""
        self.admissions = list(admissions)
        self.before = {
            (p.name, p.stat().st_ino)
            for p in self.nvmet.path("nvmet/subsystems").iterdir()
            if (p / "attr_allow_any_host").read_text() == "1\n"
        }

    def inspect(self) -> None:
        if self.admissions and all(a.restricted for a in self.admissions) and (faults := self.faults()):
            last = self.nvmet.calls[-1] if self.nvmet.calls else ""
            with self.found.open("a") as file:
                file.writelines(f"{fault} after '{last}'\n" for fault in faults)

    def faults(self) -> list[str]:
        found: list[str] = []
        passage = self.nvmet.path(PASSAGE).exists()
        names = {host.nqn for admission in self.admissions for host in admission.hosts}
        ports = self.nvmet.path("nvmet/ports")
        linked: dict[str, list[str]] = {}
        for port in os.listdir(ports):
            for nqn in os.listdir(ports / port / "subsystems"):
                linked.setdefault(nqn, []).append(port)
        for nqn in os.listdir(self.nvmet.path("nvmet/subsystems")):
            path = self.nvmet.path("nvmet/subsystems") / nqn
            hosts = set(os.listdir(path / "allowed_hosts"))
            at = linked.get(nqn, [])
            if (nqn, path.stat().st_ino) in self.before or not nqn.startswith(PREFIX):
                continue
            if at and (path / "attr_allow_any_host").read_text() != "0\n":
                found.append(f"'{nqn}' is open to anybody")
            if (strangers := hosts - names) and (not passage or len(strangers) > 1):
                found.append(f"'{nqn}' lets in {', '.join(strangers)}")
            # Everybody on this machine can read its name.
            keys = [self.nvmet.path(f"nvmet/hosts/{host}/dhchap_key") for host in strangers]
            if any(len(k.read_text()) < 60 or stat.S_IMODE(k.stat().st_mode) != 0o600 for k in keys):
                found.append(f"'{nqn}' lets in {', '.join(strangers)} without a secret")
            chosen = [a for a in self.admissions if hosts & names <= {host.nqn for host in a.hosts}]
            if not chosen:
                found.append(f"'{nqn}' lets in hosts of two runs: {', '.join(hosts)}")
            if PASSAGE.rpartition("/")[2] in at and not self.nvmet.networks.of(PASSAGE):
                found.append(f"'{nqn}' lets in everybody on this machine who knows a name")
            if clients := [port for port in at if f"nvmet/ports/{port}" != PASSAGE]:
                found += self.ways_in(nqn, chosen, clients, hosts & names)
        return found

    def ways_in(self, nqn: str, chosen: list[Admission], ports: list[str], hosts: set[str]) -> list[str]:
        """What is wrong with a subsystem that clients can come in to, by all that one run has asked for."""
        complete = [a for a in chosen if hosts == {host.nqn for host in a.hosts}]
        found = [self.amiss(nqn, admission, ports) for admission in complete]
        return min(found, key=len) if found else [f"'{nqn}' does not let in all"]

    def amiss(self, nqn: str, admission: Admission, ports: list[str]) -> list[str]:
        found = []
        tls = {
            "required": ["tls1.3", "required"],
            "offered": ["tls1.3", "not required"],
            "no": ["none", "not specified"],
        }[admission.encrypt]
        for port in ports:
            path = self.nvmet.path("nvmet/ports") / port
            if (how := [(path / f"addr_{name}").read_text().strip() for name in ("tsas", "treq")]) != tls:
                found.append(f"'{nqn}' is at port {port} with {how}")
        if not identities(admission, nqn) <= self.keyring.usable().keys():
            found.append(f"'{nqn}' is there without keys")
        for host in admission.hosts:
            for name, secret in (("dhchap_key", host.secret), ("dhchap_ctrl_key", host.controller_secret)):
                file = self.nvmet.path(host.root()) / name
                text = secret.reveal().decode() if secret else ""
                if file.read_text().strip() != text or (text and stat.S_IMODE(file.stat().st_mode) != 0o600):
                    found.append(f"'{nqn}' lets in a host without its '{name}'")
        return found

    def check(self) -> None:
        assert not self.found.exists(), self.found.read_text()


@functools.cache
def identities(admission: Admission, nqn: str) -> set[str]:
    """Of the keys without which nobody who is allowed could connect."""
    return {
        storagetm.tls_key(host, name, exact=exact)[0]
        for host in admission.hosts
        if host.psk and admission.encrypted
        for name in (nqn, storagetm.DISCOVERY_NQN)
        for exact in (True, False)
    }


@pytest.fixture
def keyring(machine: CapturedMachine, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> Keyring:
    for kind in ("class/block", "block"):
        for link in machine.path(f"/sys/{kind}").iterdir():
            if link.name not in ("vdb", "vdc"):
                link.unlink()
    return Keyring(nvmet, machine.root, monkeypatch)


@pytest.fixture
def watch(nvmet: Nvmet, keyring: Keyring, tmp_path: Path) -> Iterator[Watch]:
    made = Watch(nvmet, keyring, tmp_path / "faults")
    yield made
    made.check()


class Cable:
    """That of the disk vdc."""

    def __init__(self, machine: CapturedMachine) -> None:
        links = [machine.path(f"/sys/{kind}/vdc") for kind in ("class/block", "block")]
        self.links = {link: os.readlink(link) for link in links}

    def unplug(self, run: Run | None = None) -> None:
        for link in self.links:
            link.unlink(missing_ok=True)
        self.tell(run)

    def plug(self, run: Run | None = None) -> None:
        for link, target in self.links.items():
            if not link.is_symlink():
                link.symlink_to(target)
        self.tell(run)

    def tell(self, run: Run | None) -> None:
        if run:
            run.inventory.update(["vdc"])
            run.exporter.synchronise()


@pytest.fixture
def cable(machine: CapturedMachine, keyring: Keyring) -> Cable:
    assert keyring.keys
    return Cable(machine)


@pytest.fixture
def small(machine: CapturedMachine, watch: Watch, cable: Cable) -> Watch:
    """One disk, at one port: the fewest steps."""
    cable.unplug()
    machine.path("/proc/net/if_inet6").unlink()
    return watch


def contents(nvmet: Nvmet) -> dict[str, str]:
    """All there is that counts: without how hosts prove a secret that they do not have."""
    found = nvmet.contents()
    idle = [p.rpartition("/")[0] for p, text in found.items() if p.endswith("/dhchap_key") and not text]
    for path in idle:
        del found[f"{path}/dhchap_dhgroup"]
    return found


def left_in_files() -> list[str]:
    """The files that may have the code in them."""
    return [name for name in os.listdir(storagetm.RUN) if "code" in name]


LOOSER: dict[str, tuple[Callable[[], Admission], Callable[[], Admission]]] = {
    "open": (unpaired, lambda: known("nqn.a")),
    "more hosts": (lambda: known("nqn.a", "nqn.b"), lambda: known("nqn.a")),
    "no code": (unpaired, paired),
    "no encryption": (lambda: paired(encrypt="no"), paired),
}


@in_both_layouts
@pytest.mark.parametrize("change", LOOSER)
def test_disk_that_is_waited_for_is_not_open_meanwhile(
    watch: Watch, shared: bool, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that somebody holds is no reason to let in whom an earlier run has let in."""
    earlier, now = LOOSER[change]
    Run(earlier(), shared=shared).start().kill()
    claim, held = storagetm.Export.claim, ["vdb"]

    def claim_others(export: storagetm.Export) -> bool:
        if export.disk.name in held:
            export.waiting = storagetm.Reason("another process holds its lock")
            return False
        return claim(export)

    monkeypatch.setattr(storagetm.Export, "claim", claim_others)
    run = Run(now(), shared=shared).start()
    assert run.exported == ["vdc"]
    watch.expect(now())
    assert not watch.before
    assert watch.faults() == []
    held.clear()
    run.exporter.synchronise()
    assert run.exported == ["vdb", "vdc"]
    assert run.exporter.stop()


@in_both_layouts
def test_disk_that_is_waited_for_stays_as_it_was(
    nvmet: Nvmet, watch: Watch, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the same hosts are let in, clients keep what they have."""
    Run(paired(), shared=shared).start().kill()
    before = nvmet.contents()
    watch.expect(paired())
    claim = storagetm.Export.claim
    monkeypatch.setattr(storagetm.Export, "claim", lambda e: e.disk.name != "vdb" and claim(e))
    run = Run(paired(), shared=shared).start()
    assert run.exported == ["vdb", "vdc"]
    assert nvmet.contents() == before
    run.kill()
    monkeypatch.setattr(storagetm.Export, "claim", claim)
    assert Run(paired(), shared=shared).start().exporter.stop()


# From nothing to all and back


@in_both_layouts
@pytest.mark.parametrize(
    "make",
    [
        paired,
        lambda: paired(encrypt="offered"),
        lambda: paired(encrypt="no"),
        lambda: known("nqn.a", "nqn.b"),
    ],
    ids=["required", "offered", "no", "known"],
)
def test_all_is_there_before_anybody_is_let_in(
    nvmet: Nvmet, watch: Watch, shared: bool, make: Callable[[], Admission]
) -> None:
    """Which the watch finds out at each step."""
    before = nvmet.contents()
    admission = make()
    watch.expect(admission)
    run = Run(admission, shared=shared).start()
    assert run.exported == ["vdb", "vdc"]
    assert left_in_files() == ["code"] * admission.own
    hosts = [host.nqn for host in admission.hosts]
    found = nvmet.contents()
    names = [PREFIX] if shared else [f"{PREFIX}.vdb", f"{PREFIX}.vdc"]
    for nqn in names:
        assert found[f"nvmet/subsystems/{nqn}/attr_allow_any_host"] == "0"
        assert sorted(os.listdir(nvmet.path(f"nvmet/subsystems/{nqn}/allowed_hosts"))) == hosts
    assert sorted(os.listdir(nvmet.path("nvmet/hosts"))) == hosts
    wanted = {i for nqn in names for i in identities(admission, nqn)}
    assert set(watch.keyring.usable()) == wanted
    assert len(wanted) == ((2 + 2 * len(names)) if admission.encrypted else 0)
    # Hosts are told of write protection, by one that is gone again.
    assert len([path for path in found if path.endswith("/write_protected")]) == 2
    assert not nvmet.path(PASSAGE).exists()
    run.exporter.synchronise()
    assert nvmet.contents() == found
    assert run.exporter.stop()
    assert nvmet.contents() == before
    assert watch.keyring.all() == {}
    assert not left_in_files()


@in_both_layouts
def test_disks_come_and_go(nvmet: Nvmet, cable: Cable, watch: Watch, shared: bool) -> None:
    admission = paired()
    watch.expect(admission)
    run = Run(admission, shared=shared).start()
    complete, keys = nvmet.contents(), watch.keyring.usable()
    cable.unplug(run)
    assert run.exported == ["vdb"]
    expected = keys if shared else {i: keys[i] for i in identities(admission, f"{PREFIX}.vdb")}
    assert watch.keyring.usable() == expected
    cable.plug(run)
    assert run.exported == ["vdb", "vdc"]
    assert len(nvmet.contents()) == len(complete)
    assert watch.keyring.usable().keys() == keys.keys()
    run.exporter.stop()


# Restarts, kills and failures


def stop(admission: Admission, *, shared: bool) -> None:
    """The next start, and its clean stop."""
    assert Run(admission, shared=shared).start().exporter.stop()


CHANGES: dict[str, tuple[Callable[[], Admission], Callable[[], Admission]]] = {
    "same": (paired, paired),
    "another code": (paired, lambda: paired(OTHER)),
    "no pairing": (paired, unpaired),
    "no encryption": (paired, lambda: paired(encrypt="no")),
    "other hosts": (lambda: known("nqn.a", "nqn.b"), lambda: known("nqn.a")),
}


@pytest.mark.parametrize(
    ("change", "shared"),
    [*((change, True) for change in CHANGES), ("another code", False), ("no pairing", False)],
)
def test_restart_is_recovered_wherever_it_was_killed(
    nvmet: Nvmet, small: Watch, shared: bool, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Back and forth, killed before each step: the next start has all as if nothing else had been."""
    before = nvmet.contents()
    expected = []
    for make in CHANGES[change]:
        run = Run(make(), shared=shared).start()
        expected.append(contents(nvmet))
        assert run.exporter.stop()
        assert nvmet.contents() == before
    makes = CHANGES[change]
    Run(makes[0](), shared=shared).start().kill()
    number, killed = 0, True
    while killed:
        killed = False
        # There at steps with an even number, back at the others.
        for old, new in ((0, 1), (1, 0)):
            admissions = [make() for make in makes]
            small.expect(admissions[old], admissions[new])
            killed |= nvmet.run_and_kill_at(2 * number + old, Run(admissions[new], shared=shared).go)
            # The next one wants the same, or what there was before.
            for wants in [new] if (number + new) % 2 else [old, new]:
                run = Run(admissions[wants], shared=shared).start()
                assert capfd.readouterr().err == "", (number, new)
                assert contents(nvmet) == expected[wants], (number, new)
                run.kill()
        number += 1
    assert number > 5
    stop(makes[0](), shared=shared)
    assert nvmet.contents() == before


@in_both_layouts
def test_start_and_stop_are_recovered_wherever_they_were_killed(
    nvmet: Nvmet, small: Watch, shared: bool
) -> None:
    before = nvmet.contents()
    run = Run(paired(), shared=shared).start()
    complete = nvmet.contents()
    assert run.exporter.stop()
    number, killed = 0, True
    while killed:
        small.expect(paired())
        killed = nvmet.run_and_kill_at(number, Run(paired(), shared=shared).go)
        if number % 2:
            run = Run(paired(), shared=shared).start()
            assert nvmet.contents() == complete
            killed |= nvmet.run_and_kill_at(number // 2, lambda: run.exporter.stop())  # noqa: B023
            run.kill()
        stop(paired(), shared=shared)
        assert nvmet.contents() == before
        assert not left_in_files()
        number += 1
    assert number > 40


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@in_both_layouts
def test_failure_lets_nobody_in_and_leaves_nothing(
    nvmet: Nvmet, small: Watch, shared: bool, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each step of a start fails in turn, then each of a stop."""
    before = nvmet.contents()
    small.expect(paired())
    run = Run(paired(), shared=shared)
    run.start()
    complete, steps = nvmet.contents(), len(nvmet.calls)
    run.exporter.stop()
    for number in range(steps):
        nvmet.fail_at(number, code)
        run = Run(paired(), shared=shared)
        message = ""
        try:
            run.start()
        except storagetm.UserError as e:
            message = str(e)
        # What could not be taken away is tried once more.
        assert os.strerror(code) in message + capfd.readouterr().err or nvmet.contents() == complete
        nvmet.succeed()
        run.exporter.stop()
        if nvmet.contents() != before:
            stop(paired(), shared=shared)
        assert nvmet.contents() == before, number
        assert small.keyring.all() == {}
        assert not left_in_files()
    run = Run(paired(), shared=shared).start()
    steps = -len(nvmet.calls)
    run.exporter.stop()
    steps += len(nvmet.calls)
    for number in range(steps):
        run = Run(paired(), shared=shared).start()
        nvmet.fail_at(number, code)
        run.exporter.stop()
        nvmet.succeed()
        stop(paired(), shared=shared)
        assert nvmet.contents() == before, number
        assert not left_in_files()


@in_both_layouts
@pytest.mark.parametrize("change", ["another code", "no pairing"])
def test_failure_of_a_restart_is_made_up_for_by_the_next(
    nvmet: Nvmet, small: Watch, shared: bool, change: str
) -> None:
    """There and back; each step fails in turn."""
    before = nvmet.contents()
    makes = CHANGES[change]
    expected = []
    for make in makes:
        run = Run(make(), shared=shared).start()
        expected.append(contents(nvmet))
        run.kill()
    now, number, calls = 1, 0, 1
    while number < calls:
        new, now = 1 - now, 1 - now
        small.expect(*(make() for make in makes))
        run = Run(makes[new](), shared=shared)
        nvmet.fail_at(number, (errno.EIO, errno.ENOSPC)[number // 2 % 2])
        calls = -len(nvmet.calls)
        try:
            run.start()
        except storagetm.UserError:
            run.exporter.stop()
        calls += len(nvmet.calls)
        nvmet.succeed()
        run.kill()
        run = Run(makes[new](), shared=shared).start()
        assert contents(nvmet) == expected[new], number
        run.kill()
        number += 1
    assert number > 30
    stop(makes[now](), shared=shared)
    assert nvmet.contents() == before


@in_both_layouts
@pytest.mark.parametrize("what", ["killed", "failed"])
def test_plugging_is_recovered_wherever_it_ended(
    nvmet: Nvmet, small: Watch, cable: Cable, shared: bool, what: str
) -> None:
    """By the next start, or in the same run by the next news of the disk."""
    before = nvmet.contents()
    small.expect(paired())
    number, goes_on = 0, True
    while goes_on:
        goes_on = False
        for plugs in (True, False):
            (cable.unplug if plugs else cable.plug)()
            run = Run(paired(), shared=shared).start()
            act = functools.partial(cable.plug if plugs else cable.unplug, run)
            if what == "killed":
                goes_on |= nvmet.run_and_kill_at(number, act)
                run.kill()
                run = Run(paired(), shared=shared).start()
            else:
                calls = len(nvmet.calls)
                nvmet.fail_at(number)
                act()
                goes_on |= len(nvmet.calls) - calls > number
                nvmet.succeed()
                run.exporter.synchronise()
            if what == "killed":
                assert run.exported == ["vdb"] + ["vdc"] * plugs
            assert "vdb" in run.exported
            assert run.exporter.stop()
            assert nvmet.contents() == before
            assert not left_in_files()
        number += 1
    assert number > 15


def test_failure_at_the_last_step_takes_all_of_the_disk_away_at_once(nvmet: Nvmet, small: Watch) -> None:
    """Although the host of our own is still let in to it."""
    small.expect(paired())
    before = nvmet.contents()
    subsystem = f"nvmet/subsystems/{PREFIX}.vdb"

    def intercept(number: int) -> None:
        if nvmet.calls[number] == f"symlink nvmet/ports/59936/subsystems/{PREFIX}.vdb":
            assert len(os.listdir(nvmet.path(f"{subsystem}/allowed_hosts"))) == 2
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    nvmet.intercept = intercept
    run = Run(paired(), shared=False).start()
    assert run.exported == []
    assert nvmet.calls.count(f"rmdir {subsystem}") == 1
    assert run.exporter.stop()
    assert nvmet.contents() == before


# What others have


def others_host(nvmet: Nvmet, nqn: str, subsystem: str = "nqn.other") -> Callable[[], bool]:
    """Makes a host, unless it is there, and lets it in to another program's subsystem."""
    host, link = nvmet.path(f"nvmet/hosts/{nqn}"), f"nvmet/subsystems/{subsystem}/allowed_hosts/{nqn}"
    if not host.exists():
        os.mkdir(host)
    if not nvmet.path(f"nvmet/subsystems/{subsystem}").exists():
        os.mkdir(nvmet.path(f"nvmet/subsystems/{subsystem}"))
    os.symlink(host, nvmet.path(link))
    inode, found = host.stat().st_ino, nvmet.contents()
    theirs = {
        p: v
        for p, v in found.items()
        if p.startswith((f"nvmet/subsystems/{subsystem}", f"nvmet/hosts/{nqn}"))
    }

    def is_unchanged() -> bool:
        return host.stat().st_ino == inode and theirs.items() <= nvmet.contents().items()

    return is_unchanged


@in_both_layouts
def test_host_of_another_program_is_left_alone(nvmet: Nvmet, watch: Watch, shared: bool) -> None:
    admission = paired()
    watch.expect(admission, known("nqn.theirs"))
    unchanged = others_host(nvmet, admission.hosts[0].nqn), others_host(nvmet, "nqn.theirs")
    before = nvmet.contents()
    run = Run(admission, shared=shared)
    with pytest.raises(storagetm.UserError) as caught:
        run.start()
    host = admission.hosts[0].nqn
    assert str(caught.value) == (
        f"Failed to make '{nvmet.root}/nvmet/hosts/{host}': another program has that host in nvmet; stop "
        "that, or let in another host"
    )
    assert run.exporter.stop()
    assert nvmet.contents() == before
    assert all(check() for check in unchanged)
    # With another host there is nothing in the way.
    watch.expect(paired(OTHER), known("nqn.theirs"))
    assert Run(paired(OTHER), shared=shared).start().exporter.stop()
    assert nvmet.contents() == before
    assert all(check() for check in unchanged)


def test_host_that_another_program_lets_in_stays(
    nvmet: Nvmet, watch: Watch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the reason; it goes with the next stop after that has ended."""
    admission = paired()
    watch.expect(admission)
    before = nvmet.contents()
    run = Run(admission, shared=True).start()
    host = admission.hosts[0].nqn
    unchanged = others_host(nvmet, host)
    assert not run.exporter.stop()
    assert unchanged()
    assert (
        f"Failed to remove '{nvmet.root}/nvmet/hosts/{host}': Device or resource busy: another program lets "
        "that host in to a subsystem of its own; remove its link from 'allowed_hosts' there"
    ) in capfd.readouterr().err
    os.unlink(nvmet.path(f"nvmet/subsystems/nqn.other/allowed_hosts/{host}"))
    os.rmdir(nvmet.path("nvmet/subsystems/nqn.other"))
    stop(paired(), shared=True)
    assert nvmet.contents() == before


def identity(shared: bool) -> str:
    return min(identities(paired(), PREFIX if shared else f"{PREFIX}.vdb"))


@in_both_layouts
def test_key_of_another_program_is_left_alone(nvmet: Nvmet, watch: Watch, shared: bool) -> None:
    watch.expect(paired())
    serial = watch.keyring.put(identity(shared), b"x" * 32)
    before = nvmet.contents()
    run = Run(paired(), shared=shared)
    with pytest.raises(storagetm.UserError) as caught:
        run.start()
    assert str(caught.value) == (
        f"Failed to make '{identity(shared)} in the keyring .nvme': another program put a key there; "
        "remove it"
    )
    assert run.exporter.stop()
    assert nvmet.contents() == before
    assert watch.keyring.usable() == {identity(shared): serial}


def test_key_of_another_program_never_becomes_ours(nvmet: Nvmet, small: Watch) -> None:
    """Whenever a start was killed."""
    small.expect(paired())
    serial = small.keyring.put(identity(True), b"x" * 32)
    before = nvmet.contents()
    number = 0

    def start() -> None:
        with pytest.raises(storagetm.UserError):
            Run(paired(), shared=True).start()

    while nvmet.run_and_kill_at(number, start):
        # Nothing is wanted any more.
        run = Run(unpaired(), shared=True)
        run.exporter.ledger.lock()
        run.exporter.begin()
        assert run.exporter.stop()
        assert small.keyring.usable() == {identity(True): serial}, number
        assert nvmet.contents() == before
        number += 1
    assert number > 5


def test_key_that_another_program_has_put_in_place_of_ours_stays(watch: Watch) -> None:
    """As a client on this very machine does."""
    for restarts in (False, True):
        run = Run(paired(), shared=True).start()
        if restarts:
            run.kill()
            run = Run(paired(), shared=True).start()
        serial = watch.keyring.put(identity(True), b"x" * 32)
        assert run.exporter.stop()
        assert watch.keyring.usable() == {identity(True): serial}
        watch.keyring.invalidate(serial)


# The host of our own


def strangers(nvmet: Nvmet, admission: Admission) -> list[str]:
    """The hosts that were ever made but those that are allowed."""
    made = [call.rpartition("/")[2] for call in nvmet.calls if call.startswith("mkdir nvmet/hosts/")]
    return [nqn for nqn in made if nqn not in {host.nqn for host in admission.hosts}]


@in_both_layouts
def test_host_of_our_own_is_another_at_each_start(nvmet: Nvmet, watch: Watch, shared: bool) -> None:
    """Nobody can guess its name, not even who knows this machine, and it is there for moments only."""
    admission = paired()
    watch.expect(admission)
    machine = storagetm.Machine()
    known_names = {machine.id.hex(), *storagetm.firmware_uuids()}
    for number in range(1, 4):
        run = Run(admission, shared=shared).start()
        assert os.listdir(nvmet.path("nvmet/hosts")) == [admission.hosts[0].nqn]
        found = strangers(nvmet, admission)
        assert len(set(found)) == number
        assert found[-1] == run.transport.host.allowed().nqn
        assert found[-1].removeprefix(storagetm.HOST_STEM).replace("-", "") not in known_names
        # Killed or stopped, it is another one.
        if number == 1:
            run.kill()
        else:
            run.exporter.stop()


def test_host_of_our_own_says_the_name_that_it_is_allowed_by() -> None:
    """To a target of the real kernel's, which here is a socket."""
    host = storagetm.OwnHost(paired(), {}, 1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        guest = storagetm.NvmeHost(server.getsockname(), "nqn.test", host.host_id)
        client, _ = server.accept()
        with client:
            sent = b""
            while len(sent) < 128 + 72 + 1024:
                sent += client.recv(4096)
        guest.close()
    data = sent[-1024:]
    assert data[256:512].rstrip(b"\0") == b"nqn.test"
    assert data[512:768].rstrip(b"\0").decode() == host.allowed().nqn
    assert data[:16].hex() == host.allowed().host_id.replace("-", "")


@in_both_layouts
@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_host_of_our_own_is_gone_after_the_next_start(
    nvmet: Nvmet, small: Watch, shared: bool, access: str
) -> None:
    """Also where that has nobody to tell of write protection, and so does not let itself in."""
    admission = paired()
    small.expect(admission)
    calls = len(nvmet.calls)
    Run(admission, shared=shared).start().exporter.stop()
    made = nvmet.calls[calls:]
    own = strangers(nvmet, admission)[-1]
    first, last = (f(i for i, call in enumerate(made) if own in call) for f in (min, max))
    for number in range(first, last + 2):
        assert nvmet.run_and_kill_at(number, Run(admission, shared=shared).go)
        run = Run(admission, shared=shared, access=access).start()
        assert os.listdir(nvmet.path("nvmet/hosts")) == [admission.hosts[0].nqn]
        nqn = PREFIX if shared else f"{PREFIX}.vdb"
        assert os.listdir(nvmet.path(f"nvmet/subsystems/{nqn}/allowed_hosts")) == [admission.hosts[0].nqn]
        assert not nvmet.path(PASSAGE).exists()
        assert run.exporter.stop()


def test_disks_that_are_protected_at_once_let_us_in_once(
    nvmet: Nvmet, watch: Watch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As threads do it, of which one is always the second."""
    admission = paired()
    watch.expect(admission)
    second: list[str] = []

    def intercept(number: int) -> None:
        kind, path = nvmet.calls[number].split()[:2]
        host = path.rpartition("/")[2]
        if kind == "symlink" and "/allowed_hosts/" in path and host != admission.hosts[0].nqn:
            second.append(path)
            if not nvmet.path(path).is_symlink():
                nvmet._symlink(
                    os.path.relpath(nvmet.path(f"nvmet/hosts/{host}"), nvmet.path(path).parent),
                    nvmet.path(path),
                )

    nvmet.intercept = intercept
    run = Run(admission, shared=True).start()
    assert second
    assert capfd.readouterr().err == ""
    assert len([path for path in nvmet.contents() if path.endswith("/write_protected")]) == 2
    assert run.exporter.stop()
