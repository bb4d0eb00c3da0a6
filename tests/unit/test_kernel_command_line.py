# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel command line: its words, which of them are options, and which of these count."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import storagetm
from storagetm import READ_ONLY, READ_WRITE, SNAPSHOT


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A /proc and an /etc of the test's own."""
    for name in ("ETC", "PROC"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"quiet  root=/dev/sda1\tro\n", ["quiet", "root=/dev/sda1", "ro"]),
        (b'a="b c" d', ["a=b c", "d"]),
        (b'"a=b c" d', ["a=b c", "d"]),
        (b"a='b \"c' d", ['a=b "c', "d"]),
        (b'a=b"c d"e', ["a=bc de"]),
        (b'a\\ b "" c\\"d', ["a\\", "b", "", "c\\d"]),
        (b'a "b c', ["a", "b c"]),
        (b"", []),
    ],
)
def test_words_are_split_as_by_the_kernel(raw: bytes, words: list[str]) -> None:
    assert storagetm.split_command_line(raw) == words


@given(st.binary(max_size=200))
@example(b'storagetm.access="')
@example(b"rd.storagetm.=\xff rd.storagetm.snapshot=9M storagetm. rd.=x =")
def test_command_line_may_be_any_bytes(raw: bytes) -> None:
    for text in (raw, b"rd.storagetm." + raw, b"storagetm.access=" + raw):
        try:
            found = storagetm.options_from_kernel(storagetm.split_command_line(text), True)
        except storagetm.UsageError:
            continue
        assert found.mode in ("", *storagetm.ACCESS)


def options(*words: str, initrd: bool = True) -> storagetm.Options:
    return storagetm.options_from_kernel(words, initrd)


def test_options_are_taken() -> None:
    found = options(
        "rd.storagetm.snapshot=2M",
        "storagetm.access=/dev/sda:read-write",
        "rd.storagetm.nqn=quux",
        "rd.systemd.unit=x",
    )
    assert (found.mode, found.store, found.nqn) == (SNAPSHOT, 2 << 20, "quux")
    assert found.rules == [("/dev/sda", READ_WRITE)]
    # Underscores and dashes are the same, as everywhere on the kernel command line.
    assert options("rd.storagetm.read_write").mode == READ_WRITE


@pytest.mark.parametrize(
    "word", ["rd.storagetm.colour=red", "rd.storagetm.pairr", "storagetm.kernel_command_line"]
)
def test_unknown_option_is_refused(word: str) -> None:
    """It may be a mistyped one that was meant to keep somebody out."""
    name = word.partition("=")[0]
    with pytest.raises(
        storagetm.UsageError, match=f"^Kernel command line: unknown option '{name}'; correct it$"
    ):
        options("rd.storagetm.read-only", word)
    assert options(word, initrd=False) if word.startswith("rd.") else True


def test_initrd_options_count_there_only() -> None:
    assert options("rd.storagetm.read-write", initrd=False).mode == ""
    assert options("storagetm.read-write", initrd=False).mode == READ_WRITE


@pytest.mark.parametrize(
    ("words", "transports"),
    [
        (["rd.storagetm.transport=usb"], ["usb"]),
        (["storagetm.transport=usb,nvme-tcp"], ["usb", "nvme-tcp"]),
        (["rd.storagetm.transport=auto"], ["auto"]),
        (["rd.storagetm.transport=nvme-tcp", "rd.storagetm.transport=usb"], ["nvme-tcp", "usb"]),
    ],
)
def test_transports_are_taken(words: list[str], transports: list[str]) -> None:
    """Unless the program's own options have some."""
    assert options(*words).transports == transports
    own = storagetm.parse_arguments(["--all"])
    storagetm.add_options(own, options(*words))
    assert own.transports == transports
    own = storagetm.parse_arguments(["--all", "--transport=nvme-tcp"])
    storagetm.add_options(own, options(*words))
    assert own.transports == ["nvme-tcp"]


def test_bad_transport_names_the_word_to_correct() -> None:
    with pytest.raises(storagetm.UsageError) as caught:
        options("rd.storagetm.transport=nbf")
    assert str(caught.value) == (
        "Kernel command line: storagetm.transport=nbf is no list of nvme-tcp, usb, nbd, iscsi, auto; "
        "correct it"
    )


@pytest.mark.parametrize(
    "word",
    [
        *("transport=", "transport", "transport=usb,nbf"),
        *("snapshot=lots", "snapshot=", "access=/dev/sda", "access", "read-write=1", "nqn=a/b", "nqn="),
        # What prints something and ends, which nobody could read there.
        *("help", "version", "list-devices", "list_devices", "dry-run", "json"),
    ],
)
def test_bad_options_are_refused(word: str) -> None:
    with pytest.raises(storagetm.UsageError, match=r"^Kernel command line: .*; correct it$"):
        options(f"rd.storagetm.{word}")


def test_own_options_come_first() -> None:
    own = storagetm.parse_arguments(["--all", "--read-only", "--access=a:snapshot"])
    storagetm.add_options(own, options("rd.storagetm.read-write", "rd.storagetm.access=b:read-write"))
    assert (own.mode, own.rules) == (READ_ONLY, [("a", SNAPSHOT)])
    own = storagetm.parse_arguments(["--all", "--access=a:snapshot"])
    storagetm.add_options(own, options("rd.storagetm.read-write", "rd.storagetm.access=b:read-only"))
    assert (own.mode, own.rules) == (READ_WRITE, [("a", SNAPSHOT), ("b", READ_ONLY)])


def test_options_for_pairing_are_taken_unless_there_are_own() -> None:
    more = options(
        *("rd.storagetm.pair", "storagetm.allow_host=nqn.a", "rd.storagetm.allow-host=nqn.b"),
        *("rd.storagetm.encrypt=no", "rd.storagetm.code-file=/c", "storagetm.hash=sha384"),
    )
    own = storagetm.parse_arguments(["--all"])
    storagetm.add_options(own, more)
    assert own.pair
    assert (own.allow_hosts, own.encrypt, own.code_file, own.hash) == (
        ["nqn.a", "nqn.b"],
        "no",
        "/c",
        "sha384",
    )
    own = storagetm.parse_arguments(["--all", "--allow-host=nqn.c", "--encrypt=required", "--code-file=x"])
    storagetm.add_options(own, more)
    assert own.pair
    assert (own.allow_hosts, own.encrypt, own.code_file, own.hash) == (["nqn.c"], "required", "x", "sha384")


@pytest.mark.parametrize(
    ("line", "mode", "refused"),
    [
        (b"quiet storagetm.read-write", READ_WRITE, ""),
        (b"quiet storagetm.snapshot=x", "", "Kernel command line: storagetm.snapshot=x is no size"),
        (
            b"storagetm.json",
            "",
            "Kernel command line: 'storagetm.json' prints text and exports nothing, which only helps in a "
            "shell; correct it",
        ),
        (b"storagetm.list-devices", "", "Kernel command line: 'storagetm.list-devices' prints text"),
    ],
)
@pytest.mark.usefixtures("places")
def test_it_counts_only_where_asked_for(line: bytes, mode: str, refused: str) -> None:
    with open(storagetm.PROC + "cmdline", "wb") as file:
        file.write(line)
    found = storagetm.parse_arguments(["--all", "--kernel-command-line"])
    assert found.mode == mode
    assert found.refused.startswith(refused)
    assert bool(found.refused) == bool(refused)
    assert not found.action
    assert storagetm.parse_arguments(["--all"]).mode == ""


@pytest.mark.usefixtures("places")
def test_nothing_is_exported_without_it() -> None:
    """There may have been something in it that keeps somebody out."""
    found = storagetm.parse_arguments(["--all", "--kernel-command-line"])
    why = "Failed to read the kernel command line: No such file or directory; mount proc on '/proc'"
    assert found.refused == why


@pytest.mark.parametrize("arguments", [["--colour", "--all"], ["--all", "sda"], [], ["--snapshot=x"]])
@pytest.mark.usefixtures("places")
def test_unit_keeps_bad_options_for_the_screen(arguments: list[str]) -> None:
    """A drop-in of the unit may make no sense, either."""
    for argv in (["--kernel-command-line", *arguments], [*arguments, "--kernel-command-line"]):
        found = storagetm.parse_arguments(argv)
        assert found.refused
        assert found.kernel_command_line
    with pytest.raises(storagetm.UsageError):
        storagetm.parse_arguments(arguments)


@pytest.mark.usefixtures("places")
def test_action_in_a_shell_is_taken_or_refused() -> None:
    """Who asks for text there gets it, or the error, and no service."""
    argv = ["--kernel-command-line", "--list-devices"]
    assert storagetm.parse_arguments(argv).list_devices
    with pytest.raises(storagetm.UsageError):
        storagetm.parse_arguments([*argv, "sda"])
