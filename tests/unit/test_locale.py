# SPDX-License-Identifier: LGPL-2.1-or-later
"""A locale that is not UTF-8 changes nothing; output that cannot be written is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import storagetm
from tests.unit.exports import Named, made_export

SCRIPT = Path(storagetm.__file__)
# Python takes "C" for UTF-8 unless told not to. Then it is ASCII, as if no other locale were installed.
ASCII = ("env", "LC_ALL=C", sys.executable, "-ISXutf8=0")
UTF8 = ("env", "LC_ALL=C.UTF-8", sys.executable, "-IS")
LETTERS = "Łódź-日本-é.img"


def run(*command: str | bytes | Path) -> tuple[int, bytes, bytes]:
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_steps_are_the_same_in_each_locale(tmp_path: Path, arguments: list[str]) -> None:
    """Names, identities, ports, and where things are."""
    (tmp_path / LETTERS).write_bytes(bytes(512))
    steps = ["--dry-run", "--nqn=préfixe", *arguments, f"{tmp_path}/{LETTERS}"]
    expected = run(*UTF8, SCRIPT, *steps)
    assert expected[0] == 0
    assert run(*ASCII, SCRIPT, *steps) == expected
    assert (b"subsystems/pr\\u00e9fixe." if arguments else "subsystems/préfixe.Łódź".encode()) in expected[1]


def test_refusals_are_the_same_in_each_locale(tmp_path: Path) -> None:
    """What is refused is refused in the same words, with the bytes that were given."""
    (tmp_path / "\udcff").write_bytes(bytes(512))
    for arguments in (
        ["--dry-run", f"{tmp_path}/\udcff"],
        ["--dry-run", f"{tmp_path}/{LETTERS}"],
        ["--nqn=\udcff", "-a"],
        ["--é"],
    ):
        given = [os.fsencode(a) for a in arguments]
        expected = run(*UTF8, SCRIPT, *given)
        assert expected[0] in (1, 2)
        assert run(*ASCII, SCRIPT, *given) == expected


def test_packed_program_is_the_same_in_each_locale(tmp_path: Path) -> None:
    """The one file is started again as well, without $PATH, too."""
    packed = tmp_path / "storagetm.pyz"
    subprocess.run([sys.executable, SCRIPT.with_name("build_zipapp.py"), "-o", packed], check=True)
    (tmp_path / LETTERS).write_bytes(bytes(512))
    steps = ["--dry-run", "--nqn=x", f"{tmp_path}/{LETTERS}"]
    expected = run(*UTF8, packed, *steps)
    assert expected[0] == 0
    assert run(*ASCII, packed, *steps) == expected
    assert run("env", "-i", *ASCII[1:], packed, *steps) == expected


@pytest.fixture
def ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that could not be started again."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))


@pytest.mark.usefixtures("ascii_only")
def test_letters_that_a_locale_lacks_raise_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(storagetm, "send_datagram", lambda _, message: sent.append(message))
    monkeypatch.setattr(storagetm, "plymouth_request", lambda request, *_: sent.append(request))
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    storagetm.info("日本")
    storagetm.warning("日本")
    storagetm.write_output("日本")
    storagetm.notify("STATUS=日本")
    storagetm.plymouth("日本" * 100)
    assert tuple(capfd.readouterr()) == ("日本\n日本\n", "日本\n")
    assert sent[0] == "STATUS=日本".encode()
    assert "日本".encode() in sent[1]


def test_identities_are_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a disk whose serial number has such a letter, wherever it was read."""
    export = made_export("vda", id_serial="SÉRIE-№1", tag="1:1 1")

    def identities() -> list[object]:
        transport = storagetm.NvmeTcp(Named(bytes(16)), "préfixe")
        found = [
            transport.identities.uuid(export),
            transport.identities.nguid(export),
            transport.identities.serial(export),
        ]
        return [*found, transport.port_number(storagetm.AF_INET), storagetm.Mapping.path_for("№", "é")]

    before = identities()
    for encoding in ("ascii", "latin-1", "utf-16"):
        monkeypatch.setattr(os, "fsencode", lambda text, to=encoding: text.encode(to, "surrogateescape"))
        assert identities() == before


# Output


@pytest.fixture
def arguments(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    (tmp_path / "disk").write_bytes(bytes(512))
    return [f"{tmp_path}/disk" if a == "DISK" else a for a in request.param]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["--list-devices"],
        ["--list-devices", "--json"],
        ["--dry-run", "DISK"],
        ["--dry-run", "--json", "DISK"],
    ],
    indirect=True,
)
def test_output_that_is_incomplete_is_a_failure(arguments: list[str]) -> None:
    """A list that is not whole is no list."""
    command = [sys.executable, "-IS", str(SCRIPT), *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
    message = b"Failed to write the output: No space left on device; it is incomplete\n"
    assert (done.returncode, done.stderr) == (1, message)
    incoming, outgoing = os.pipe()
    os.close(incoming)
    done = subprocess.run(command, stdout=outgoing, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(outgoing)
    assert (done.returncode, done.stderr) == (1, message.replace(b"No space left on device", b"Broken pipe"))


def test_output_that_is_read_slowly_is_whole(capfd: pytest.CaptureFixture[str]) -> None:
    """Another program may have set the pipe so that writing does not wait."""
    incoming, outgoing = os.pipe2(os.O_NONBLOCK)
    text = "x" * (1 << 20)
    read = []

    def reader() -> None:
        os.set_blocking(incoming, True)
        while data := os.read(incoming, 1 << 16):
            read.append(data)

    stdout = os.dup(1)
    thread = threading.Thread(target=reader)
    try:
        os.dup2(outgoing, 1)
        os.close(outgoing)
        thread.start()
        storagetm.write_output(text)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        thread.join()
        os.close(incoming)
    assert b"".join(read).decode() == text + "\n"
    assert tuple(capfd.readouterr()) == ("", "")
