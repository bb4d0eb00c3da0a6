# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: what it means, what it refuses, and what the program says then."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm
from storagetm import SNAPSHOT
from tests.unit.exports import made_service

SCRIPT = Path(storagetm.__file__)
MAN_PAGE = SCRIPT.parent / "docs" / "storagetm.8"


def run(*arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    """The program as it is started, isolated."""
    return subprocess.run(
        [sys.executable, "-IS", SCRIPT, *arguments],
        capture_output=True,
        check=False,
        timeout=60,
    )


def parsed(*arguments: str) -> dict[str, object]:
    """The options that are not as they are by default."""
    default = vars(storagetm.Options())
    return {k: v for k, v in vars(storagetm.parse_arguments(arguments)).items() if v != default[k]}


# What it means


def test_what_is_no_option_is_a_device() -> None:
    assert parsed("/dev/vda", "disk.img") == {"devices": ["/dev/vda", "disk.img"]}
    assert parsed("-") == {"devices": ["-"]}


def test_options_and_devices_in_any_order() -> None:
    expected = {"devices": ["a", "b"], "force": True, "dry_run": True, "nqn": "x"}
    assert parsed("a", "--force", "b", "--nqn", "x", "--dry-run") == expected
    assert parsed("--dry-run", "--nqn=x", "a", "b", "--force") == expected
    assert parsed("--nqn=x", "--force", "--dry-run", "--", "a", "b") == expected


@given(st.data())
def test_order_counts_among_devices_only(data: st.DataObject) -> None:
    parts = [("/dev/vda",), ("x.img",), ("--nqn", "n"), ("--force",), ("--dry-run",), ("--json",)]
    order = data.draw(st.permutations(parts))
    devices = [p[0] for p in order if not p[0].startswith("-")]
    assert parsed(*(word for part in order for word in part)) == {
        "devices": devices,
        "nqn": "n",
        "force": True,
        "dry_run": True,
        "json": True,
    }


def test_all_may_be_given_twice() -> None:
    assert parsed("--all") == parsed("-a") == {"all": 1}
    assert (
        parsed("-aa")
        == parsed("-a", "-a")
        == parsed("--all", "-a")
        == parsed("--all", "--all")
        == {"all": 2}
    )


def test_what_comes_after_two_dashes_is_a_device() -> None:
    assert parsed("--force", "--", "--all", "-x", "--") == {"devices": ["--all", "-x", "--"], "force": True}


def test_options_may_be_abbreviated() -> None:
    assert parsed("--al") == {"all": 1}
    assert parsed("--n=x", "--al", "--dry") == {"nqn": "x", "all": 1, "dry_run": True}
    assert parsed("--l", "--j") == {"list_devices": True, "json": True}
    # A value may look like an option, as with getopt_long(3).
    assert parsed("--nqn", "--all", "d") == {"nqn": "--all", "devices": ["d"]}


def test_value_may_have_an_equals_sign() -> None:
    assert parsed("--nqn=a=b", "d")["nqn"] == "a=b"


def test_last_nqn_counts() -> None:
    assert parsed("--nqn=a", "--nqn=b", "d")["nqn"] == "b"


@pytest.mark.parametrize(
    ("arguments", "transports"),
    [
        (["--transport=usb"], ["usb"]),
        (["--transport", "nvme-tcp,usb"], ["nvme-tcp", "usb"]),
        (["--transport=usb,nvme-tcp"], ["usb", "nvme-tcp"]),
        (["--transport=usb", "--transport=nvme-tcp"], ["usb", "nvme-tcp"]),
        (["--transport=usb,usb", "--tr=usb"], ["usb"]),
        (["--transport=auto"], ["auto"]),
    ],
)
def test_transports_are_a_list(arguments: list[str], transports: list[str]) -> None:
    assert parsed("d", *arguments) == {"devices": ["d"], "transports": transports}
    assert parsed("d") == {"devices": ["d"]}


def test_options_for_pairing() -> None:
    words = ["--allow-host=nqn.b", "--allow-host", "nqn.a", "--allow-host=nqn.b", "--secret-file=s"]
    assert parsed("d", "--pair", "--code-file=c", "--encrypt=no", *words) == {
        "devices": ["d"],
        "pair": True,
        "code_file": "c",
        "encrypt": "no",
        "allow_hosts": ["nqn.b", "nqn.a"],
        "secret_file": "s",
    }
    assert parsed("d", "--dhgroup=ffdhe8192", "--hash=sha512", "--hash=sha384") == {
        "devices": ["d"],
        "dhgroup": "ffdhe8192",
        "hash": "sha384",
    }


def test_help_and_version_ask_for_nothing_else() -> None:
    assert parsed("-h") == parsed("--help") == {"help": True}
    assert parsed("--version") == {"version": True}
    assert parsed("-ah") == {"all": 1, "help": True}


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0")) | st.sampled_from(["--all", "-a", "--nqn", "--"])
    )
)
def test_any_arguments_are_understood_or_refused(arguments: list[str]) -> None:
    try:
        storagetm.parse_arguments(arguments)
    except storagetm.UsageError as e:
        assert str(e)  # noqa: PT017


# What it refuses

LONGEST = "n" * (223 - len(".x"))

REFUSED: list[tuple[list[str | bytes], str]] = [
    ([], "Name a device, or give --all or --homes; see --help"),
    (["--force"], "Name a device, or give --all or --homes; see --help"),
    (["--all", "/dev/vda"], "--all takes no device ('/dev/vda')"),
    (["/dev/vda", "-aa"], "--all takes no device ('/dev/vda')"),
    (["--list-devices", "/dev/vda"], "--list-devices takes no device ('/dev/vda')"),
    (["--nonsense"], "Unknown option '--nonsense'; see --help"),
    (["--alll"], "Unknown option '--alll'; see --help"),
    (["-x"], "Unknown option '-x'; see --help"),
    (["-ax"], "Unknown option '-x'; see --help"),
    (["--=x"], "Ambiguous option '--'; see --help"),
    (["--all=yes"], "Option '--all' takes no value"),
    (["--all", "--nqn"], "Option '--nqn' needs a value"),
    (["--all", "--nqn="], "--nqn= is empty"),
    (["--all", "--nqn", ""], "--nqn= is empty"),
    (["--all", "--nqn=a/b"], "--nqn=a/b has a '/' in it"),
    (["--all", b"--nqn=\xff"], "--nqn= is not UTF-8"),
    (["--all", "--nqn=a\nb"], "--nqn= has control characters in it"),
    (
        ["--all", f"--nqn={LONGEST}n"],
        "--nqn= is too long: 222 bytes, and with '.' and a disk's name 223 are allowed",
    ),
    # Bytes count.
    (
        ["--all", "--nqn=" + "é" * 111],
        "--nqn= is too long: 222 bytes, and with '.' and a disk's name 223 are allowed",
    ),
    (["--all", "--transport"], "Option '--transport' needs a value"),
    (["--all", "--transport="], "--transport= is no list of nvme-tcp, usb, nbd, iscsi, auto"),
    (["--all", "--transport=nbf"], "--transport=nbf is no list of nvme-tcp, usb, nbd, iscsi, auto"),
    (["--all", "--transport=usb,"], "--transport=usb, is no list of nvme-tcp, usb, nbd, iscsi, auto"),
    (["--all", "--transport=USB"], "--transport=USB is no list of nvme-tcp, usb, nbd, iscsi, auto"),
    (
        ["--all", "--transport=usb, auto"],
        "--transport=usb, auto is no list of nvme-tcp, usb, nbd, iscsi, auto",
    ),
    (["--all", "--json"], "--json goes with --list-devices or --dry-run"),
    ([""], "A device's name is empty"),
    (["--all", "--pair=yes"], "Option '--pair' takes no value"),
    (["--all", "--encrypt=maybe"], "--encrypt=maybe is not one of no, offered, required"),
    (["--all", "--hash=md5"], "--hash=md5 is not one of sha256, sha384, sha512"),
    (
        ["--all", "--dhgroup=null"],
        "--dhgroup=null is not one of ffdhe2048, ffdhe3072, ffdhe4096, ffdhe6144, ffdhe8192",
    ),
    (["--all", "--code-file="], "--code-file= names no file"),
    (["--all", "--secret-file="], "--secret-file= names no file"),
    (
        ["--all", "--allow-host=myhost"],
        "--allow-host=myhost is no host NQN: it does not begin with 'nqn.', or is no printable ASCII",
    ),
    (
        ["--all", "--allow-host=nqn.a,b"],
        "--allow-host=nqn.a,b is no host NQN: it has a '/', a comma or a blank in it",
    ),
    (
        ["--all", "--allow-host=nqn.2014-08.org.nvmexpress.discovery"],
        "--allow-host=nqn.2014-08.org.nvmexpress.discovery is no host NQN: it is that of discovery",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusal_says_why(arguments: list[str | bytes], message: str) -> None:
    with pytest.raises(storagetm.UsageError) as caught:
        storagetm.parse_arguments([os.fsdecode(a) for a in arguments])
    assert str(caught.value) == message
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    [[], ["--all", "/dev/vda"], ["--nonsense"], ["--all", b"--nqn=\xff"], ["--all", "--nqn=a/b"]],
)
def test_real_program_refuses_in_the_same_words(arguments: list[str | bytes]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == b""
    message = [m for a, m in REFUSED if a == arguments]
    assert result.stderr.decode() == message[0] + "\n"


def test_longest_nqn_is_taken() -> None:
    assert parsed("--all", f"--nqn={LONGEST}")["nqn"] == LONGEST


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no disks, no nvmet and nothing in use."""
    for name in ("ETC", "SYS", "PROC", "RUN", "CONFIGFS"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/{name.lower()}/")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef")
    (tmp_path / "sys/block").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("")
    return tmp_path


def test_nqn_too_long_for_a_disk_is_refused(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Together with the longest name, before anything is done."""
    (places / "d").write_bytes(bytes(512))
    (places / "longer.img").write_bytes(bytes(512))
    nqn = "n" * (223 - len(".longer.im"))
    assert storagetm.main(["--dry-run", f"--nqn={nqn}", f"{places}/d", f"{places}/longer.img"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    node = f"{places}/longer.img"
    assert err == (
        f"--nqn= is too long for '{node}': its NQN '{nqn}.longer.img' has 224 bytes, 223 are allowed\n"
    )
    assert storagetm.main(["--dry-run", f"--nqn={nqn[1:]}", f"{places}/d", f"{places}/longer.img"]) == 0


def test_service_checks_names_too(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (places / "longer.img").write_bytes(bytes(512))
    monkeypatch.setattr(storagetm.NvmeTcp, "prepare", lambda _: pytest.fail("it went on"))
    machine = storagetm.Machine()
    transport = storagetm.NvmeTcp(machine, "n" * 213)
    inventory = storagetm.Inventory([storagetm.NamedDisks([f"{places}/longer.img"])])
    with pytest.raises(storagetm.UsageError, match="has 224 bytes"):
        made_service(machine, transport, inventory).run()


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ([], ["NvmeTcp"]),
        (["--transport=usb"], ["UsbGadget"]),
        (["--transport=usb,nvme-tcp"], ["UsbGadget", "NvmeTcp"]),
        (["--transport=auto", "--subsystem=shared"], ["SharedNvmeTcp", "UsbGadget"]),
    ],
)
def test_service_has_the_transports_that_were_asked_for(
    words: list[str], kinds: list[str], places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "d").write_bytes(bytes(512))
    started: list[storagetm.Service] = []

    def run(service: storagetm.Service) -> int:
        started.append(service)
        return 0

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(storagetm.Service, "run", run)
    assert storagetm.main([*words, "--nqn=quux", f"{places}/d"]) == 0
    transports = started[0].exporter.transports
    assert [type(t).__name__ for t in transports] == kinds
    assert {t.gadget for t in transports if isinstance(t, storagetm.UsbGadget)} <= {"usb_gadget/quux"}


@pytest.mark.usefixtures("places")
def test_only_root_can_export(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert storagetm.main(["--all"]) == 1
    assert capfd.readouterr().err == (
        "Only root can export disks; run it as root, or see what it would do with --dry-run\n"
    )
    assert storagetm.main(["--all", "--dry-run"]) == 0
    assert storagetm.main(["--list-devices"]) == 0


def test_missing_sysfs_is_named(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (places / "sys/block").rmdir()
    assert storagetm.main(["--list-devices"]) == 1
    assert f"'{places}/sys/' is not mounted" in capfd.readouterr().err


# Kinds of access


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("1024K", 1 << 20), ("1m", 1 << 20), ("3G", 3 << 30), ("2T", 2 << 40)],
)
def test_size_may_have_a_unit(text: str, size: int) -> None:
    assert storagetm.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "lots", "-1G", "1.5G", "1GB", "1023K", "0", "9" * 30, "99999999999T", "½G", "٣G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(storagetm.UsageError, match="--snapshot="):
        storagetm.parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--read-only", "--read-write"], "--read-write and --read-only do not go together"),
        (["--snapshot", "--read-only"], "--read-only and --snapshot do not go together"),
        (["--snapshot="], "--snapshot= is empty"),
        (["--access=x"], "is not GLOB:MODE"),
        (["--access"], "needs a value"),
        (["--read-write=yes"], "takes no value"),
    ],
)
def test_options_for_access_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(storagetm.UsageError, match=message):
        storagetm.parse_arguments(["/dev/sda"][: message != "needs a value"] + arguments)


def test_snapshot_takes_no_device_for_its_size() -> None:
    options = storagetm.parse_arguments(["--snapshot", "/dev/sda"])
    assert (options.mode, options.store, options.devices) == (SNAPSHOT, 0, ["/dev/sda"])
    assert storagetm.parse_arguments(["--snapshot=2M", "/dev/sda"]).store == 2 << 20


# What it tells


def test_help_has_each_option() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert result.stderr == b""
    text = result.stdout.decode()
    for option in storagetm.OPTIONS:
        left = (f"-{option.short} " if option.short else "") + f"--{option.name}{option.value}"
        first = option.text.partition("\n")[0]
        assert re.search(rf"^ +{re.escape(left)} +{re.escape(first)}$", text, re.MULTILINE), left
    assert max(map(len, text.split("\n"))) < 80
    assert run("-h").stdout == result.stdout


def test_version_is_printed() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        f"storagetm {storagetm.__version__}\n".encode(),
        b"",
    )


@pytest.mark.parametrize("name", [o.name for o in storagetm.OPTIONS])
def test_man_page_has_each_option(name: str) -> None:
    page = MAN_PAGE.read_text().replace("\\-", "-")
    assert re.search(rf"--{name}\b", page)


def test_man_page_has_each_kind_of_step() -> None:
    """As they are in the JSON of a dry run."""
    page = re.sub(r'\.BR|"|\s+', " ", MAN_PAGE.read_text())
    (listed,) = re.findall(r"A step has +step +\(([a-z, -]+)\)", page)
    assert set(re.split(", +", listed)) == set(re.findall(r'"step": "([a-z-]+)"', SCRIPT.read_text()))


def test_closed_output_is_no_failure() -> None:
    """A closed standard output is no failure and no traceback."""
    result = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-IS", SCRIPT, "--help"],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
