# SPDX-License-Identifier: LGPL-2.1-or-later
"""Texts for the kernel, for shells and for people."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm

# What the kernel can hand over as a name: any bytes but NUL, as Python decodes them.
NAMES = st.binary(max_size=30).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))


def kernel_takes(text: str, maximum: int) -> bool:
    """What nvmet's attr_{serial,model,firmware}_store() ask for (drivers/nvme/target/configfs.c)."""
    length = len(text.split("\n")[0].encode())
    return 0 < length <= maximum and all(0x20 <= c <= 0x7E for c in text.encode()[:length])


@given(st.text(max_size=60), st.sampled_from([8, 20, 40]))
def test_kernel_takes_each_nvme_string(text: str, length: int) -> None:
    clean = storagetm.nvme_string(text, length)
    assert clean == "" or kernel_takes(clean, length)
    # It is compared with what is read back, whose blanks at the ends mean nothing.
    assert clean == clean.strip()
    assert storagetm.nvme_string(clean, length) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("QEMU HARDDISK   ", "QEMU HARDDISK"),
        ("   WD-1234", "WD-1234"),
        ("café", "caf_"),
        ("a\nb", "a_b"),
        ("a\tb\x7f", "a_b_"),
        ("~ !", "~ !"),
        ("1234567890123456789 1", "1234567890123456789"),
        ("   ", ""),
    ],
)
def test_nvme_string_has_no_blanks_at_its_ends(text: str, clean: str) -> None:
    assert storagetm.nvme_string(text, 20) == clean


@given(st.lists(NAMES, min_size=1, max_size=20))
def test_quoted_word_is_one_word_to_a_shell(words: list[str]) -> None:
    script = r"printf '%s\0' " + " ".join(storagetm.quoted(word) for word in words)
    printed = subprocess.run(["sh", "-c", os.fsencode(script)], stdout=subprocess.PIPE, check=True).stdout
    assert printed == b"".join(os.fsencode(word) + b"\0" for word in words)


def test_quoted_only_where_needed() -> None:
    assert (
        storagetm.quoted("nqn.2023-10.io.systemd:storagetm.0123.vda")
        == "nqn.2023-10.io.systemd:storagetm.0123.vda"
    )
    assert storagetm.quoted("/dev/vda") == "/dev/vda"
    assert storagetm.quoted("") == "''"
    assert storagetm.quoted("it's") == "'it'\\''s'"
    assert storagetm.quoted("é") == "'é'"


@given(NAMES.filter(bool), st.integers(20, 300))
def test_folded_command_is_the_same_to_a_shell(name: str, width: int) -> None:
    """Pasted into a shell, a folded command does what the command on one line would do."""
    command, more = "nvme connect -t tcp -a fe80::1 -s 1 -f INTERFACE", f"-n {storagetm.quoted(name)}"
    lines = storagetm.folded([command, more], width)
    script = r"""nvme() { printf '%s\0' "$@"; }""" + "\n" + "\n".join(lines)
    printed = subprocess.run(["sh", "-c", os.fsencode(script)], stdout=subprocess.PIPE, check=True).stdout
    assert printed.split(b"\0")[:-1] == [*map(os.fsencode, command.split()[1:]), b"-n", os.fsencode(name)]
    if len(lines) == 1:
        assert len(lines[0]) < width


def test_folded_only_where_needed() -> None:
    assert storagetm.folded(["nvme connect", "-n x"], 30) == ["  nvme connect -n x"]
    assert storagetm.folded(["nvme connect", "-n x"], 20) == ["  nvme connect \\", "    -n x"]
    assert storagetm.folded(["nvme connect-all"], 10) == ["  nvme connect-all"]
    parts = ["nvme connect", "-n x", "-a y", "--hostnqn=z"]
    assert storagetm.folded(parts, 22) == ["  nvme connect -n x \\", "    -a y --hostnqn=z"]
    assert storagetm.folded(parts, 5) == [
        "  nvme connect \\",
        "    -n x \\",
        "    -a y \\",
        "    --hostnqn=z",
    ]


@given(st.binary(max_size=60))
def test_printable_text_moves_no_cursor(raw: bytes) -> None:
    text = storagetm.printable(raw)
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode()


@pytest.mark.parametrize(
    ("raw", "text"),
    [(b"\x1b[2Jx", "?[2Jx"), (b"a\nb\tc", "a\nb?c"), ("é".encode(), "é"), (b"\xff", "\ufffd"), (b"\r", "?")],
)
def test_what_moves_a_cursor_is_replaced(raw: bytes, text: str) -> None:
    assert storagetm.printable(raw) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (64 << 20, "67.1 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (2_000_398_934_016, "2.0 TB"),
        (10**16, "10.0 PB"),
    ],
)
def test_size_has_one_digit_behind_the_point(size: int, text: str) -> None:
    assert storagetm.size_text(size) == text


@given(st.integers(0, 1 << 64))
def test_size_text_is_near(size: int) -> None:
    value, unit = storagetm.size_text(size).split()
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert abs(float(value) * factor - size) <= (0.051 * factor if factor > 1 else 0)
    assert unit == "PB" or float(value) < 1000


def test_disks_are_sorted_as_the_kernel_counts() -> None:
    names = ["sdaa", "sdb", "sda", "nvme10n1", "nvme0n1", "vda"]
    assert sorted(names, key=storagetm.natural_order) == ["sda", "sdb", "vda", "sdaa", "nvme0n1", "nvme10n1"]


def test_reason_is_the_systems_text() -> None:
    assert storagetm.reason_of(OSError(28, "whatever", "/somewhere")) == "No space left on device"
    assert storagetm.reason_of(OSError("timed out")) == "timed out"
