# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pairing that cannot be had ends the start, with one sentence and nothing made; no secret gets about."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest

import storagetm
from storagetm import Code, Secret
from tests.unit.configfs import Nvmet
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import Named
from tests.unit.keyring import Keyring
from tests.unit.test_pairing import Run, known

PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
CODE = "k7fm-2qxd-9wtr-4hcn"
HOST = Code.parse(CODE).host().nqn
SECRET = storagetm.dhchap_text(bytes(range(32))).decode()
PSK = storagetm.psk_text(Secret(bytes(range(32))))
CLEAR = (
    "without it names of hosts cross the wire in the clear, who listens can read along, and clients cannot "
    "tell a false target"
)


class Computer:
    """A captured machine that has all that pairing needs, and starts of the program there."""

    def __init__(self, machine: CapturedMachine, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine, self.nvmet = machine, nvmet
        self.keyring = Keyring(nvmet, machine.root, monkeypatch)
        self.directory = machine.root / "etc"
        self.services: list[storagetm.Service] = []
        self.looked: Callable[[storagetm.Service], object] = bool
        self.programs: list[tuple[str, ...]] = []
        machine.write("/proc/4711/comm", "tlshd\n")
        machine.write("/proc/cmdline", "quiet\n")
        self.owner = 0  # of all files of whoever runs the tests, who is root to the program
        self._fstat = os.fstat
        monkeypatch.setattr(os, "fstat", self.fstat)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(storagetm, "run_program", self.run_program)
        monkeypatch.setattr(storagetm.Signals, "catch", lambda _: None)
        monkeypatch.setattr(storagetm.Views, "begin", lambda _: None)
        monkeypatch.setattr(storagetm.Service, "loop", lambda service: self.loop(service))
        monkeypatch.setattr(storagetm.Clients, "connections", lambda _: [])
        address = storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", False)
        monkeypatch.setattr(storagetm.Network, "addresses", lambda _: [address])

    def fstat(self, fd: int) -> os.stat_result:
        found = self._fstat(fd)
        return (
            os.stat_result((*found[:4], self.owner, *found[5:10])) if found.st_uid == os.getuid() else found
        )

    def run_program(self, *arguments: str) -> int:
        self.programs.append(arguments)
        return 127 if arguments[0] == "modprobe" else 5

    def loop(self, service: storagetm.Service) -> None:
        self.services.append(service)
        self.looked(service)

    def file(self, text: str, mode: int = 0o600) -> str:
        path = self.directory / "secrets file"
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    def left(self) -> list[str]:
        """What there is in /run, but what is there of disks, and what is empty."""
        names = os.listdir(storagetm.RUN) if os.path.isdir(storagetm.RUN) else []
        kept = [n for n in names if not n.endswith((".lock", ".disks", ".disks.awaited"))]
        return sorted(n for n in kept if os.stat(storagetm.RUN + n).st_size)


@pytest.fixture
def computer(machine: CapturedMachine, nvmet: Nvmet, monkeypatch: pytest.MonkeyPatch) -> Computer:
    return Computer(machine, nvmet, monkeypatch)


# Nothing is exported with less than was asked for


def too_open(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(CODE, 0o644)
    why = f"The code file '{path}' can be read or changed by others (mode 0644); take that away with "
    return [f"--code-file={path}"], f"{why}'chmod go= '{path}''"


def no_code(computer: Computer) -> tuple[list[str], str]:
    path = computer.file("k7fm-2qxd")
    return [f"--code-file={path}"], f"'{path}' has no code in it: it has 8 letters and digits, not 16 to 64"


def no_file(computer: Computer) -> tuple[list[str], str]:
    path = f"{computer.directory}/none"
    return [f"--code-file={path}"], f"Failed to read the code file '{path}': No such file or directory"


def of_another_user(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(CODE)
    computer.owner = 4711
    return [f"--code-file={path}"], f"The code file '{path}' belongs to another user; make it root's"


def open_secrets(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(f"nqn.a {SECRET}\n", 0o640)
    why = f"The secret file '{path}' can be read or changed by others (mode 0640); take that away with "
    return [f"--secret-file={path}"], f"{why}'chmod go= '{path}''"


def no_secret(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(f"nqn.a {SECRET[:-1]}\n")
    return [f"--secret-file={path}"], (
        f"'{path}', line 1: word 2 is no secret: it is not of the form DHHC-1:00:...:"
    )


def no_hosts(computer: Computer) -> tuple[list[str], str]:
    path = computer.file("# nobody\n")
    why = f"'{path}' has no host in it; add a line with its NQN and its secret"
    return [f"--secret-file={path}"], why


def host_twice(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(f"nqn.a {SECRET}\nnqn.a\n")
    why = f"'{path}', line 2: the host is there twice; leave one of its lines out"
    return [f"--secret-file={path}"], why


def no_psk(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(f"nqn.a {SECRET} {PSK}\nnqn.b {SECRET}\n")
    return ["--encrypt=required", f"--secret-file={path}"], (
        "The host 'nqn.b' has no key for TLS; add one to its line of the secret file, as "
        "'nvme gen-tls-key --hmac=1' prints it, or see --encrypt="
    )


def no_keyring(computer: Computer) -> tuple[list[str], str]:
    computer.keyring.disappear()
    return [f"--code-file={computer.file(CODE)}"], (
        "This kernel cannot encrypt NVMe/TCP: no keyring '.nvme' (Required key not available); boot one "
        f"with CONFIG_NVME_TARGET_TCP_TLS (Linux 6.7 and later), or see --encrypt=no: {CLEAR}"
    )


def no_tlshd(computer: Computer) -> tuple[list[str], str]:
    computer.machine.path("/proc/4711/comm").write_text("tlshd-lookalike\n")
    return [f"--code-file={computer.file(CODE)}"], (
        "Nothing on this machine opens TLS connections for the kernel; install ktls-utils and start tlshd, "
        f"or see --encrypt=no: {CLEAR}"
    )


def no_tls(computer: Computer) -> tuple[list[str], str]:
    computer.nvmet.encryption = False
    return [f"--code-file={computer.file(CODE)}"], (
        f"Failed to make '{storagetm.CONFIGFS}nvmet/ports/59936': this kernel cannot encrypt NVMe/TCP; "
        f"boot one with CONFIG_NVME_TARGET_TCP_TLS (Linux 6.7 and later), or see --encrypt=no: {CLEAR}"
    )


def no_tls_attributes(computer: Computer) -> tuple[list[str], str]:
    computer.nvmet.old = True
    return no_tls(computer)


def no_authentication(computer: Computer) -> tuple[list[str], str]:
    computer.nvmet.authentication = False
    return ["--encrypt=no", f"--code-file={computer.file(CODE)}"], (
        f"Failed to make '{storagetm.CONFIGFS}nvmet/hosts/{HOST}': this kernel cannot ask hosts for their "
        "secrets; boot one with CONFIG_NVME_TARGET_AUTH (Linux 6.0 and later)"
    )


def no_group(computer: Computer) -> tuple[list[str], str]:
    computer.nvmet.groups = {"null"}
    return ["--encrypt=no", f"--code-file={computer.file(CODE)}"], (
        f"Failed to make '{storagetm.CONFIGFS}nvmet/hosts/{HOST}': this kernel has no 'ffdhe3072'; give "
        "another --hash= or --dhgroup="
    )


def no_hash(computer: Computer) -> tuple[list[str], str]:
    computer.nvmet.hashes.remove("hmac(sha512)")
    return ["--encrypt=no", "--hash=sha512", f"--code-file={computer.file(CODE)}"], (
        f"Failed to make '{storagetm.CONFIGFS}nvmet/hosts/{HOST}': this kernel has no 'hmac(sha512)'; give "
        "another --hash= or --dhgroup="
    )


def no_hash_of_secret(computer: Computer) -> tuple[list[str], str]:
    computer.nvmet.hashes.remove("hmac(sha384)")
    secret = storagetm.dhchap_text(bytes(range(48)), 2).decode()
    return [f"--secret-file={computer.file(f'nqn.a {secret}')}"], (
        f"Failed to make '{storagetm.CONFIGFS}nvmet/hosts/nqn.a': this kernel lacks the hash by which the "
        "host's secret is changed; make one with 'nvme gen-dhchap-key --hmac=0'"
    )


def no_limit(computer: Computer) -> tuple[list[str], str]:
    """Our own seat would have to be let in by what only clients know."""
    computer.nvmet.room_for_two = True
    return ["--read-write", "--encrypt=no", f"--code-file={computer.file(CODE)}"], (
        f"Failed to make '{storagetm.CONFIGFS}nvmet/subsystems/{PREFIX}': this kernel cannot keep other "
        "clients away (Linux 6.12 can); see --clients=any"
    )


def no_hosts_for_keys(_: Computer) -> tuple[list[str], str]:
    why = "--encrypt=required goes with --pair or --allow-host=: keys are those of hosts"
    return ["--encrypt=required"], why


def only_usb(_: Computer) -> tuple[list[str], str]:
    return ["--pair", "--console", "--transport=usb"], (
        "Over USB nobody can be kept out but by who has the cable; leave out --transport=usb, or --pair and "
        "--allow-host="
    )


def usb_as_well(_: Computer) -> tuple[list[str], str]:
    return ["--allow-host=nqn.a", "--transport=nvme-tcp,usb"], only_usb(_)[1]


def no_screen(_: Computer) -> tuple[list[str], str]:
    return ["--pair"], (
        "--pair shows a code on a screen, and there is none: the output is no terminal; start it on one, "
        "add --console, or give --code-file="
    )


def no_room(_: Computer) -> tuple[list[str], str]:
    """A directory is where the code is to be kept."""
    os.makedirs(f"{storagetm.RUN}{PREFIX}.code/x")
    return ["--pair", "--console"], (
        f"Failed to keep the code at '{storagetm.RUN}{PREFIX}.code': Is a directory; mount a tmpfs on '/run'"
    )


def not_in_file(computer: Computer) -> tuple[list[str], str]:
    """What was meant for it may have been for another spelling of its name."""
    path = computer.file(f"nqn.a {SECRET}\n")
    why = f"The host 'nqn.b' is not in '{path}'; add a line for it, or leave it out of --allow-host="
    return [f"--secret-file={path}", "--allow-host=nqn.a", "--allow-host=nqn.b"], why


def too_large(computer: Computer) -> tuple[list[str], str]:
    """What is cut off could be the secret of the last host."""
    start = "nqn.a "
    path = computer.file("#".ljust((1 << 20) - len(start) - 1, "x") + f"\n{start}{SECRET}\n")
    why = f"The secret file '{path}' has over 1048576 bytes; give the right one"
    return [f"--secret-file={path}"], why


def host_of_the_code(computer: Computer) -> tuple[list[str], str]:
    path = computer.file(CODE)
    return [f"--code-file={path}", "--encrypt=no", f"--allow-host={HOST}"], (
        f"The host '{HOST}' is that of the code; leave it out of the other hosts"
    )


REFUSED = [
    of_another_user,
    *(
        too_open,
        no_code,
        no_file,
        open_secrets,
        no_secret,
        no_hosts,
        host_twice,
        no_psk,
        no_keyring,
        no_tlshd,
    ),
    *(no_tls, no_tls_attributes, no_authentication, no_group, no_hash, no_hash_of_secret, no_hosts_for_keys),
    *(only_usb, usb_as_well, no_screen, no_room, no_limit),
    *(not_in_file, too_large, host_of_the_code),
]
WRONG = [no_hosts_for_keys, only_usb, usb_as_well, no_screen]  # usage


def check_nothing_made(computer: Computer, before: dict[str, str], left: list[str]) -> None:
    """And nobody was let in at any moment."""
    assert computer.nvmet.contents() == before
    assert computer.keyring.all() == {}
    assert computer.left() == left
    assert not [call for call in computer.nvmet.calls if call.startswith("symlink nvmet/ports/")]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_start_ends_with_one_sentence(
    computer: Computer, case: Callable[[Computer], tuple[list[str], str]], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, why = case(computer)
    before, left = computer.nvmet.contents(), computer.left()
    assert storagetm.main([*arguments, "/dev/vdb"]) == (2 if case in WRONG else 1)
    out, err = capfd.readouterr()
    assert err == why + "\n"
    assert out == ""
    assert computer.services == []
    check_nothing_made(computer, before, left)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_refused_start_leaves_nothing_open(
    computer: Computer, case: Callable[[Computer], tuple[list[str], str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """What a run that was killed lets anybody in to ends, as somebody wants to be more careful now."""
    arguments, why = case(computer)
    Run(storagetm.Admission(), shared=False).start().kill()
    linked = [path for path in computer.nvmet.contents() if re.search(r"/ports/\d+/subsystems/.", path)]
    assert linked
    for number in ("1", "2"):
        assert storagetm.main([*arguments, "/dev/vdb"]) != 0
        err = capfd.readouterr().err
        assert why in err
        assert ("Ending what an earlier start lets anybody in to" in err) <= (number == "1")
        contents = computer.nvmet.contents()
        assert not [path for path in contents if re.search(r"/(ports/\d+|hosts|subsystems)/.", path)]


def test_refused_start_leaves_what_is_for_known_hosts(computer: Computer) -> None:
    """Nor is anything ended that a program exports which is alive."""
    arguments, _ = too_open(computer)
    run = Run(known("nqn.a"), shared=False).start()
    contents = computer.nvmet.contents()
    assert storagetm.main([*arguments, "/dev/vdb"]) == 1
    run.kill()
    assert storagetm.main([*arguments, "/dev/vdb"]) == 1
    assert computer.nvmet.contents() == contents
    run = Run(storagetm.Admission(), shared=False).start()
    contents = computer.nvmet.contents()
    assert storagetm.main([*arguments, "/dev/vdb"]) == 1
    assert computer.nvmet.contents() == contents
    run.exporter.stop()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_unit_shows_the_sentence_instead(
    computer: Computer, case: Callable[[Computer], tuple[list[str], str]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its end would boot the machine."""
    arguments, why = case(computer)
    before, left = computer.nvmet.contents(), computer.left()
    assert storagetm.main([*arguments, "--all", "--kernel-command-line"]) == 0
    (service,) = computer.services
    assert service.refused == service.report().refused == why
    assert capfd.readouterr().err == why + "\n"
    check_nothing_made(computer, before, left)


@pytest.mark.parametrize("name", ["code", "hosts", "key", "psk", "secret"])
def test_secret_on_the_kernel_command_line_is_refused(
    computer: Computer, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which everybody can read. It is not repeated."""
    computer.machine.write("/proc/cmdline", f"quiet rd.storagetm.{name}={CODE} storagetm.{name}={CODE}\n")
    before = computer.nvmet.contents()
    assert storagetm.main(["--all", "--kernel-command-line"]) == 0
    (service,) = computer.services
    err = capfd.readouterr().err
    assert service.refused + "\n" == err
    assert err.startswith("Kernel command line: everybody can read it, so '")
    assert err.endswith(
        f"storagetm.{name}' is no place for a secret; hand it over as the credential storagetm.code or "
        "storagetm.hosts\n"
    )
    assert CODE not in err
    check_nothing_made(computer, before, [])


def test_tls_needs_no_secrets(computer: Computer, capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel that cannot ask for them exports all the same, and hosts are told of write protection."""
    computer.nvmet.authentication = False
    computer.looked = lambda _: protected.extend(
        p for p in computer.nvmet.contents() if "write_protected" in p
    )
    protected: list[str] = []
    assert storagetm.main([f"--code-file={computer.file(CODE)}", "/dev/vdb"]) == 0
    assert capfd.readouterr().err == ""
    assert len(protected) == 1


def test_initrd_has_tlshd_started(computer: Computer) -> None:
    """By our own unit, where none runs yet."""
    computer.machine.path("/proc/4711/comm").unlink()

    def run_program(*arguments: str) -> int:
        if arguments == ("systemctl", "start", "storagetm-tlshd.service"):
            computer.machine.write("/proc/4712/comm", "tlshd\n")
            return 0
        return computer.run_program(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storagetm, "run_program", run_program)
        assert storagetm.main([f"--code-file={computer.file(CODE)}", "/dev/vdb"]) == 0
    assert len(computer.services) == 1
    modules = [arguments[-1] for arguments in computer.programs if arguments[0] == "modprobe"]
    assert {"nvme-keyring", "tls"} <= set(modules)


def test_code_of_a_killed_run_stays(computer: Computer, capfd: pytest.CaptureFixture[str]) -> None:
    """Clients stay, too. A dry run tells nobody the code, and takes it from nobody."""
    path = Path(f"{storagetm.RUN}{PREFIX}.code")
    seen: list[str] = []

    def look(service: storagetm.Service) -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        seen.append(path.read_text())
        assert service.report().codes == seen[-1:]
        for arguments in (["--pair"], [], [f"--code-file={computer.file(CODE)}"]):
            assert storagetm.main([*arguments, "--dry-run", "/dev/vdb"]) == 0
            assert path.read_text() == seen[-1]
        assert seen[-1] not in "".join(capfd.readouterr())

    computer.looked = look
    arguments = ["--pair", "--console", "/dev/vdb"]
    assert storagetm.main(arguments) == 0
    assert not path.exists()
    path.write_text(CODE)  # as a run that was killed leaves it
    assert storagetm.main(arguments) == 0
    assert storagetm.main(arguments) == 0
    assert seen[1] == CODE
    assert len(set(seen)) == 3
    # A start that is for others forgets it.
    computer.looked = lambda _: seen.append(str(path.exists()))
    for others in ([], [f"--code-file={computer.file(CODE)}"]):
        path.write_text(CODE)
        Path(f"{path}.new").write_text(CODE)
        assert storagetm.main([*others, "/dev/vdb"]) == 0
        assert seen.pop() == "False"
        assert not Path(f"{path}.new").exists()


def test_credentials_pair_by_themselves(computer: Computer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the unit gets them."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(computer.directory))
    hosts: list[list[str]] = []

    def look(service: storagetm.Service) -> None:
        transport = service.exporter.transports[0]
        assert isinstance(transport, storagetm.NvmeTcp)
        hosts.append([host.nqn for host in transport.admission.hosts])
        assert sorted(os.listdir(computer.nvmet.path("nvmet/hosts"))) == sorted(hosts[-1])

    computer.looked = look
    for name, text in (("code", CODE), ("hosts", f"nqn.a {SECRET} {PSK}\nnqn.b {SECRET} {PSK}")):
        path = computer.directory / f"storagetm.{name}"
        path.write_text(text)
        path.chmod(0o400)
        assert storagetm.main(["/dev/vdb"]) == 0
    assert storagetm.main(["--allow-host=nqn.b", "/dev/vdb"]) == 0
    assert hosts == [[HOST], [HOST, "nqn.a", "nqn.b"], [HOST, "nqn.b"]]


# Secrets are on screens, and nowhere else


HOSTS = [storagetm.AllowedHost("nqn.a"), storagetm.AllowedHost("nqn.b")]
for host_, seed in zip(HOSTS, (1, 2)):
    host_.secret = Secret(storagetm.dhchap_text(bytes([seed]) * 32))
    host_.controller_secret = Secret(storagetm.dhchap_text(bytes([seed + 2]) * 48))
    host_.psk = Secret(bytes([seed + 4]) * 32)


def forbidden() -> re.Pattern[str]:
    """Whatever would tell the code, a secret, or a key, as people and programs write them."""
    hosts = [Code.parse(CODE).host(), *HOSTS]
    keys = [
        storagetm.tls_key(host, nqn, exact=exact)[1]
        for host in hosts
        for nqn in (PREFIX, f"{PREFIX}.vdb", storagetm.DISCOVERY_NQN)
        for exact in (True, False)
    ]
    raw = [secret.reveal() for secret in (*keys, *(h.psk for h in hosts)) if secret]
    raw += [
        storagetm.without_crc(s.reveal().decode()[10:-1])
        for h in hosts
        for s in (h.secret, h.controller_secret)
        if s
    ]
    words = [CODE, CODE.replace("-", ""), *(r.hex() for r in raw)]
    # Without the end, which what follows would change.
    words += [base64.b64encode(r).decode()[:40] for r in raw]
    return re.compile("|".join(["DHHC-1:0.:.", "NVMeTLSkey-1:0.:.", *map(re.escape, words)]), re.IGNORECASE)


def check(texts: dict[str, str]) -> None:
    pattern = forbidden()
    assert texts
    for where, text in texts.items():
        assert text.strip(), where
        assert not pattern.search(text), (where, text)


def reachable(thing: object, found: dict[int, object]) -> list[object]:
    """An object and all that it leads to."""
    if id(thing) in found or isinstance(thing, type):
        return []
    found[id(thing)] = thing
    inside: list[object] = []
    if isinstance(thing, dict):
        inside += [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set)):
        inside += thing
    inside += getattr(thing, "__dict__", {}).values()
    for kind in type(thing).__mro__:
        slots = getattr(kind, "__slots__", ())
        inside += [
            getattr(thing, name) for name in slots if hasattr(thing, name) and isinstance(slots, tuple)
        ]
    return [thing, *(other for each in inside for other in reachable(each, found))]


@pytest.fixture
def secrets_file(computer: Computer) -> str:
    lines = [
        " ".join([h.nqn, *(s.reveal().decode() for s in (h.secret, h.controller_secret) if s)])
        + (f" {storagetm.psk_text(h.psk)}" if h.psk else "")
        for h in HOSTS
    ]
    return computer.file("\n".join(lines))


@pytest.fixture
def code_file(computer: Computer) -> str:
    path = computer.directory / "code"
    path.write_text(CODE)
    path.chmod(0o600)
    return str(path)


KINDS = pytest.mark.parametrize(
    "options",
    [
        (),
        ("--encrypt=offered",),
        ("--encrypt=no",),
        ("--subsystem=per-disk",),
        ("--subsystem=per-disk", "--encrypt=no"),
    ],
    ids=" ".join,
)


@KINDS
def test_secrets_are_nowhere_but_on_screens(
    computer: Computer,
    options: tuple[str, ...],
    code_file: str,
    secrets_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--code-file={code_file}", f"--secret-file={secrets_file}", *options]
    told: list[str] = []
    texts: dict[str, str] = {}
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    manager.bind(f"{tmp_path}/notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    monkeypatch.setenv("SYSTEMD_LOG_LEVEL", "debug")
    monkeypatch.setattr(storagetm, "log", storagetm.Log())
    monkeypatch.setattr(storagetm, "plymouth", told.append)

    def look(service: storagetm.Service) -> None:
        service.views.open()
        service.display.outdate()
        service.display.act()
        for name in os.listdir(storagetm.RUN):
            texts[f"file {name}"] = name + (Path(storagetm.RUN) / name).read_text("utf-8", "replace")
        report = service.report()
        texts["report"] = "\n".join(map(repr, reachable(report, {})))
        texts["facts"] = "\n".join(fact.text for fact in report.facts())
        texts["status"] = report.status()
        texts["for Plymouth"] = report.for_plymouth()
        assert report.for_plymouth() == "Storage target mode: press Esc to see how to attach the disks"
        # Which the screen has.
        assert CODE in "\n".join(line for block in report.blocks(80) for _, line in block)

    computer.looked = look
    assert storagetm.main([*arguments, "/dev/vdb"]) == 0
    out, err = capfd.readouterr()
    assert "Exporting '/dev/vdb'" in out
    texts.update({"output": out, "messages": err or "none", "Plymouth": " ".join(told)})
    texts["manager"] = manager.recv(1000).decode()
    while True:
        try:
            texts["manager"] += manager.recv(1000).decode()
        except BlockingIOError:
            break
    manager.close()
    assert "STATUS=Exporting 1 disk" in texts["manager"]
    assert any(name.endswith(".entries") for name in texts)
    for more in (["--dry-run"], ["--dry-run", "--json"]):
        assert storagetm.main([*arguments, *more, "/dev/vdb"]) == 0
        texts[" ".join(more)] = "".join(capfd.readouterr())
    for more in ([], ["--json"]):
        assert storagetm.main([*arguments, "--list-devices", *more]) == 0
        texts[f"--list-devices {more}"] = "".join(capfd.readouterr())
    check(texts)


@pytest.mark.parametrize("call", ["write nvmet/hosts/", "add-key", "symlink nvmet/subsystems/"])
def test_traceback_has_no_secret(
    computer: Computer, code_file: str, secrets_file: str, call: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of an exception that nobody has thought of, wherever something is made of secrets."""
    arguments = [f"--code-file={code_file}", f"--secret-file={secrets_file}", "/dev/vdb"]
    texts: dict[str, str] = {}

    def intercept(number: int) -> None:
        if computer.nvmet.calls[number].startswith(call):
            raise RuntimeError("forced")

    computer.nvmet.intercept = intercept
    try:
        storagetm.main(arguments)
    except RuntimeError:
        texts["traceback"] = traceback.format_exc()
    texts["output"] = "".join(capfd.readouterr())
    check({where: text or "none" for where, text in texts.items()})
    assert "forced" in texts["traceback"]


READ_ALONG = "What clients read and write is not encrypted: who listens on the network can read along"
AS_CLIENT = ", and with this kernel read and write the disks as a client does, without its secret"


def by_name(nqn: str) -> str:
    why = "which crosses the network in the clear and proves nothing"
    return f"The host {nqn} is let in by its name alone, {why}"


@pytest.mark.parametrize(
    ("release", "admission", "alerts"),
    [
        ((7, 2), storagetm.Admission(), []),
        ((7, 2), storagetm.Admission((), "required", code=Code.parse(CODE)), []),
        ((7, 2), storagetm.Admission(HOSTS, "required"), []),
        ((6, 12), storagetm.Admission((), "no", code=Code.parse(CODE)), [READ_ALONG]),
        ((6, 13), storagetm.Admission((), "no", code=Code.parse(CODE)), [READ_ALONG + AS_CLIENT]),
        ((7, 2), storagetm.Admission((), "offered", code=Code.parse(CODE)), [READ_ALONG + AS_CLIENT]),
        (
            (6, 12),
            storagetm.Admission([*HOSTS, storagetm.AllowedHost("nqn.c")], "no"),
            [by_name("nqn.c"), READ_ALONG],
        ),
        (
            (6, 12),
            storagetm.Admission([storagetm.AllowedHost("nqn.c", psk=Secret(bytes(32)))], "offered"),
            [by_name("nqn.c"), READ_ALONG],
        ),
    ],
)
def test_screen_says_what_may_do_harm(
    release: tuple[int, int],
    admission: storagetm.Admission,
    alerts: list[str],
    computer: Computer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In red, and the journal has it."""
    assert not computer.services
    monkeypatch.setattr(storagetm, "kernel_version", lambda: release)
    transport = storagetm.NvmeTcp(Named(), "nqn.test", admission=admission)
    report = storagetm.take_report(Named(), [transport], [], [], storagetm.Memory())
    assert report.alerts == alerts
    assert [fact.text for fact in report.facts() if fact.kind == "note"] == alerts
    lines = [line for block in report.blocks(500) for style, line in block if style == "alert"]
    assert [line for line in lines if "network is down" not in line and "No disk" not in line] == [
        f"{text}." for text in alerts
    ]


@pytest.mark.parametrize("encrypt", ["required", "offered", "no"])
def test_what_becomes_of_encryption_later_is_told(computer: Computer, encrypt: str) -> None:
    """That nobody opens connections any more, and that there are keys of others; until that ends."""
    code = Code.parse(CODE)
    transport = storagetm.NvmeTcp(Named(), "nqn.test", admission=storagetm.Admission((), encrypt, code=code))
    before = transport.alerts()
    keys = [entry for branch in transport.keys("nqn.test.vdb") for entry in branch.entries]
    for entry in keys:
        entry.make("")
    assert bool(keys) == (encrypt != "no")
    assert transport.alerts() == before

    computer.keyring.put("NVMe1R01 nqn.a nqn.b \x1b[2J", b"x" * 32)
    comm = computer.machine.path("/proc/4711/comm")
    comm.unlink()
    told = transport.alerts()
    if encrypt == "no":
        assert told == before
        return
    assert told == [
        *before,
        "tlshd has ended, so no client can connect with TLS; start it again, as with 'systemctl restart "
        "tlshd'",
        "Another program has put keys into the keyring .nvme; who has one of them can pass for a host that "
        "is let in: 'NVMe1R01 nqn.a nqn.b ?[2J'",
    ]

    computer.machine.write("/proc/4712/comm", "tlshd\n")
    computer.keyring.invalidate(computer.keyring.usable()["NVMe1R01 nqn.a nqn.b \x1b[2J"])
    assert transport.alerts() == before
    computer.machine.path("/proc/4712/comm").unlink()
    computer.keyring.disappear()
    assert len(transport.alerts()) == len(before) + 1


# What a screen has is right


SHELL = """\
set -eu
for name in modprobe systemctl nvme; do
    eval "$name() { printf '%s\\n' $name \\"\\$@\\" ''; }"
done
"""


def pasted(lines: list[str]) -> list[list[str]]:
    """The words of each command, as a shell that these lines are pasted into has them."""
    script = SHELL + "\n".join(lines) + "\n"
    output = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout
    return [part.split("\n") for part in output.removesuffix("\n\n").split("\n\n")]


def commands(report: storagetm.Report) -> list[str]:
    lines = [line for block in report.blocks(80) for style, line in block if style == "command"]
    assert all(len(line) < 80 for line in lines), lines
    return [line for line in lines if not line.startswith("Code: ")]


def expected(options: tuple[str, ...], nqn: str, where: list[str], *, once: bool) -> list[list[str]]:
    host = Code.parse(CODE).host()
    assert host.psk
    assert host.secret
    assert host.controller_secret
    found = []
    last = ["nvme", "connect", "-t", "tcp", *where, "-n", nqn, "-q", HOST, "-I", HOST[-36:]]
    if "--encrypt=no" not in options:
        last.append("--tls")
        key = ["-n", HOST, "-c", nqn, "-d", storagetm.psk_text(host.psk)]
        found += [
            ["modprobe", "-a", "nvme-tcp", "nvme-keyring"],
            ["systemctl", "restart", "tlshd"],
            ["nvme", "check-tls-key", "-I", "1", "--insert", *key],
        ]
    else:
        found.append(["modprobe", "nvme-tcp"])
    if {"--encrypt=no", "--encrypt=offered"} & set(options):
        last += ["-S", host.secret.reveal().decode(), "-C", host.controller_secret.reveal().decode()]
    return [*(found if once else []), last]


@KINDS
def test_commands_on_the_screen_can_be_pasted(
    computer: Computer,
    options: tuple[str, ...],
    code_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And each of their lines fits into 80 columns."""
    addresses = [
        storagetm.Address(storagetm.AF_INET, "192.0.2.1", "eth0", False),
        storagetm.Address(storagetm.AF_INET6, "fe80::5054:ff:fe12:3456", "eth0", True),
    ]
    monkeypatch.setattr(storagetm.Network, "addresses", lambda _: addresses)
    at = [
        ["-a", "192.0.2.1", "-s", "59936"],
        ["-a", "fe80::5054:ff:fe12:3456", "-s", "36681", "-f", "INTERFACE"],
    ]
    shown: list[str] = []

    def look(service: storagetm.Service) -> None:
        report = service.report()
        lines = commands(report)
        if "--subsystem=per-disk" not in options:
            wanted = expected(options, PREFIX, at[0], once=True) + expected(
                options, PREFIX, at[1], once=False
            )
        elif "--encrypt=no" in options:
            host = Code.parse(CODE).host()
            assert host.secret
            assert host.controller_secret
            secrets = ["-S", host.secret.reveal().decode(), "-C", host.controller_secret.reveal().decode()]
            wanted = []
            for where in at:
                more = ["-q", HOST, "-I", HOST[-36:], *secrets]
                wanted += [["modprobe", "nvme-tcp"], ["nvme", "connect-all", "-t", "tcp", *where, *more]]
            wanted += expected(options, f"{PREFIX}.vdb", at[0], once=True)
        else:
            wanted = expected(options, f"{PREFIX}.vdb", at[0], once=True)
        assert pasted(lines) == wanted
        # The screen and the terminal that cannot move its cursor have just these.
        drawn = storagetm.Screen().drawn(report, 80, 60)
        terminal = pyte.Screen(80, 60)
        pyte.Stream(terminal).feed(drawn)
        rows = [row.rstrip() for row in terminal.display]
        capfd.readouterr()
        storagetm.Plain().show(report)
        plain = capfd.readouterr().out.split("\n")
        for found in (rows, plain):
            assert f"Code: {CODE}" in found
            start = found.index(lines[0])
            block = [line for line in found[start:] if line in lines]
            assert block == lines
            assert any("Other users of the other machine can see the secrets" in line for line in found)
        shown.append("yes")

    computer.looked = look
    assert storagetm.main([f"--code-file={code_file}", *options, "/dev/vdb"]) == 0
    assert shown
