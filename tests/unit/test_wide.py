# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names that are long, wide, or cannot be typed: what is shown of them, and that the rest stays."""

from __future__ import annotations

import os
import re
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import Named
from tests.unit.test_shown import PREFIX, addresses, disk, pages, report, rows, screen

__all__ = ["screen"]

TEXTS = st.text(st.sampled_from("ab /'日本한é\u0301\u0e33\u0e38🖴︎")) | st.text()
LONG = "/srv/images/of/machines/that/are/long/gone/and/yet/not/forgotten/disk.img"
WIDE = "/srv/日本語/ディスクイメージ/仮想マシン/開発環境/二〇二六年十一月/ハードディスク.img"


# Columns


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("", 0),
        ("abc", 3),
        ("é", 1),
        ("e\u0301", 1),
        ("日本", 4),
        ("한글", 4),
        ("ｆ", 2),
        ("🖴💽", 3),
        ("№", 1),
    ],
)
def test_wide_letters_take_two_columns(text: str, width: int) -> None:
    assert storagetm.columns(text) == width


def test_small_python_counts_rather_too_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the module that knows, rather too many than too few."""
    monkeypatch.setitem(__import__("sys").modules, "unicodedata", None)
    for text in ("日本é", "e\u0301", "💽"):
        exact = sum(0 if unicodedata.combining(c) else 1 + (c > "\u1100") for c in text)
        assert storagetm.columns(text) >= exact


@given(TEXTS, st.integers(-1, 12))
def test_cut_is_the_longest_start_that_fits(text: str, width: int) -> None:
    start = storagetm.cut(text, width)
    assert text.startswith(start)
    assert storagetm.columns(start) <= max(0, width)
    rest = text[len(start) :]
    assert not rest or storagetm.columns(start + rest[0]) > width


@given(TEXTS, st.integers(-1, 12))
def test_pieces_and_lines_lose_nothing(text: str, width: int) -> None:
    for piece in storagetm.pieces(text, width):
        assert storagetm.columns(piece) <= width or len(piece) == 1
    assert "".join(storagetm.pieces(text, width)) == text
    lines = storagetm.wrapped(text, width)
    assert lines
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_lines_are_broken_between_words() -> None:
    text = "it is in use by somebody/who/has/a/long/name and others"
    assert storagetm.wrapped(text, 16) == [
        "it is in use by",
        "somebody/who/has",
        "/a/long/name and",
        "others",
    ]


# On the screen


def named(node: str, number: int = 1) -> storagetm.Export:
    made = disk(os.path.basename(node), number)
    made.disk.node = node
    return made


@pytest.mark.parametrize("node", [LONG, WIDE, "/dev/nvme10n10", "/srv/virtual-machine-of-mine.img"])
@pytest.mark.parametrize("width", [30, 45, 80, 132])
def test_path_leaves_size_and_access(screen: storagetm.Screen, node: str, width: int) -> None:
    """And all of the path is there, too."""
    text = "\n".join(line for page in pages(screen, report([named(node)]), width, 25) for line in page)
    assert re.search(r" 1\.0 GB  READ-WRITE\b", text)
    if width >= 80:
        assert "SERIAL-1" in text
    joined = text.replace("\n", "").replace(" ", "")
    assert node in joined


def test_long_path_in_a_shared_subsystem_has_its_own_row(screen: storagetm.Screen) -> None:
    machine = Named()
    transport = storagetm.SharedNvmeTcp(machine, "quux")
    transport.ports = {storagetm.AF_INET: 59936}
    long = LONG[: 79 - len("   0x1 ")]
    disks = [named(long, 1), named("/dev/vda", 2)]
    for number, made in enumerate(disks, 1):
        made.stay = storagetm.Stay(number, "")
    shown = rows(
        screen.drawn(
            storagetm.take_report(machine, [transport], addresses(), disks, storagetm.Memory()), 80, 25
        )
    )
    start = shown.index("Namespaces:")
    assert shown[start + 2 : start + 5] == [
        "   0x2 /dev/vda       2.0 GB  READ-WRITE    QEMU HARDDISK  SERIAL-2",
        f"   0x1 {long}",
        f"{'':19}   1.0 GB  READ-WRITE    QEMU HARDDISK  SERIAL-1",
    ]


@pytest.mark.parametrize("node", ["/dev/vda", LONG, WIDE])
@pytest.mark.parametrize("width", [20, 60, 80])
def test_reason_is_whole(screen: storagetm.Screen, node: str, width: int) -> None:
    """Its end says what to do."""
    left_out = named(node)
    left_out.live = {}
    left_out.left_out = storagetm.Reason(
        "it is read-only, and was asked for read-write; see --read-only and --snapshot, or '日本語'"
    )
    text = "".join(line for page in pages(screen, report([left_out]), width, 25) for line in page)
    assert left_out.left_out.replace(" ", "") in text.replace(" ", "")
    assert node in text.replace(" ", "")


@pytest.mark.parametrize("letter", ["日", "e\u0301", "💽", "﷽", "a"])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 25), (2, 5), (3, 24), (80, 2), (20, 25), (79, 6), (80, 24), (81, 25)]
)
def test_title_stays_at_the_top(screen: storagetm.Screen, letter: str, width: int, height: int) -> None:
    """At the top, on a terminal of any size, which may count otherwise; with the last row for the hint."""
    shown = report([named(f"/srv/{letter * 40}.img", i) for i in range(2)])
    left_out = named(f"/{letter * 50}")
    left_out.live, left_out.left_out = {}, storagetm.Reason(f"it is {letter * 90}")
    shown.others.append(storagetm.OtherRow(left_out))
    shown.title = f"Storage target mode: {letter * 60}"
    for i in range(3):
        shown.messages.append(f"{i} {letter * 60}\n{letter * 60}")
    for number in range(3):
        screen.page = number
        page = rows(screen.drawn(shown, width, height), width, height)
        title = storagetm.cut(f" {shown.title}", width - 1).rstrip()
        assert page[0] == unicodedata.normalize("NFC", title)
        if height > 1:
            assert page[-1].startswith("Ctrl-C stops exporting."[: width - 1])
        assert width == 1 or "X" not in "".join(page)


def test_terminal_may_count_otherwise(screen: storagetm.Screen) -> None:
    """Each row stands where it should, whatever the one before it has done."""
    drawn = screen.drawn(report([named(WIDE)]), 80, 25)
    assert "\n" not in drawn
    for part in re.split(r"\x1b\[\d+;1H", drawn)[1:]:
        text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", part)
        if not text.isascii():
            assert re.search(r"\A\x1b\[\?7l.*\x1b\[\?7h(\x1b\[K)?\Z", part, re.DOTALL)
            assert storagetm.columns(text) < 80


def test_nothing_moves_the_cursor(screen: storagetm.Screen, capfd: pytest.CaptureFixture[str]) -> None:
    """In a title, a message or a name."""
    shown = report([disk("vda")])
    shown.title = "Storage\x1b[2J\ntarget"
    shown.messages.append("12:00:00 'new\nline\x1b[H\x07' is bad")
    page = rows(screen.drawn(shown, 80, 25))
    assert page[0] == " Storage?[2J target"
    assert page[-3].endswith(" 'new line?[H?' is bad")
    capfd.readouterr()
    storagetm.Plain().show(shown)
    assert capfd.readouterr().out.startswith("\nStorage?[2J target\n")


def test_columns_of_the_list_are_aligned(
    unpack: Callable[[str], CapturedMachine], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its columns stand one below the other, whatever a disk calls itself."""
    machine = unpack("trixie-fresh")
    entry = machine.path("/run/udev/data/b8:0")
    entry.write_text(entry.read_text() + "E:ID_MODEL=ディスク\nE:ID_SERIAL_SHORT=e\u0301-1\n")
    assert storagetm.main(["--list-devices"]) == 0
    lines = capfd.readouterr().out.splitlines()
    (wide,) = (line for line in lines if "ディスク" in line)
    expected = storagetm.columns(lines[0].partition("EXPORT")[0])
    assert storagetm.columns(wide.partition("read-only")[0]) == expected


# Commands


@given(
    st.binary(min_size=1, max_size=30).map(
        lambda raw: os.fsdecode(raw.replace(b"\0", b"").replace(b"\n", b""))
    )
)
def test_typed_name_is_ascii_and_the_same_to_a_shell(name: str) -> None:
    """In ASCII, and to a shell the same."""
    text = storagetm.typed(name)
    assert text.isascii() or not name
    script = f"printf '%s\\0' {text}"
    printed = subprocess.run(["bash", "-c", os.fsencode(script)], stdout=subprocess.PIPE, check=True).stdout
    assert printed == os.fsencode(name) + b"\0"


def test_typed_name_is_quoted_as_needed() -> None:
    assert storagetm.typed("quux.vda") == "quux.vda"
    assert storagetm.typed("a b") == "'a b'"
    assert storagetm.typed("Büro.it's!") == r"$'B\303\274ro.it\047s\041'"


@pytest.mark.parametrize("shared", [False, True])
def test_each_command_can_be_typed(
    screen: storagetm.Screen, shared: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Off the screen, a terminal that is dumb, the journal and Plymouth."""
    machine = Named()
    transport = (storagetm.SharedNvmeTcp if shared else storagetm.NvmeTcp)(machine, "büro")
    transport.ports = {storagetm.AF_INET: 59936}
    shown = storagetm.take_report(
        machine, [transport], addresses(), [named("/srv/日本.img")], storagetm.Memory()
    )
    expected = os.fsencode("büro" if shared else "büro.日本.img")
    storagetm.Plain().show(shown)
    plain = capfd.readouterr().out
    storagetm.Journal().show(shown)
    journal = "".join(re.findall(r"with: (.*\n)", capfd.readouterr().out))
    texts = [plain, "\n".join(rows(screen.drawn(shown, 80, 25)))]
    if shared:
        texts += [journal, shown.for_plymouth()]
    else:
        assert "connect-all" in journal
        assert "connect-all" in shown.for_plymouth()
    for text in texts:
        command = re.findall(r"^.*(nvme connect (?:.*\\\n)*.*)", text, re.MULTILINE)[-1]
        assert command.isascii()
        script = r"""nvme() { printf '%s\0' "$@"; }""" + "\n" + command
        printed = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True).stdout
        assert printed.split(b"\0")[-3:] == [b"-n", expected, b""]


def test_plymouth_gets_no_half_command() -> None:
    """What is too long for its protocol is replaced by what also attaches all disks."""
    machine = Named()
    transport = storagetm.SharedNvmeTcp(machine, "nqn." + "x" * 215)
    transport.ports = {storagetm.AF_INET: 59936}
    shown = storagetm.take_report(machine, [transport], addresses(), [disk("vda")], storagetm.Memory())
    assert shown.for_plymouth() == "nvme connect-all -t tcp -a 192.0.2.1 -s 59936"


def test_name_with_a_comma_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No client could attach it: it is refused before anything is done, in a prefix, too."""
    for name in ("a,b.img", "c.img"):
        (tmp_path / name).write_bytes(bytes(512))
    why = "its name has a comma, which no client can have in an NQN; rename it"
    arguments = ["--dry-run", "--nqn=quux", f"{tmp_path}/c.img", f"{tmp_path}/a,b.img"]
    assert storagetm.main(arguments) == 1
    assert tuple(capfd.readouterr()) == ("", f"Failed to export '{tmp_path}/a,b.img': {why}\n")
    # Where the disk's name is not in the NQN, it may be any.
    assert storagetm.main([*arguments, "--subsystem=shared"]) == 0
    capfd.readouterr()
    assert storagetm.main(["--all", "--nqn=a,b"]) == 2
    assert capfd.readouterr().err == "--nqn=a,b has a comma in it, and no client could attach that\n"


def test_disk_with_a_comma_is_left_out() -> None:
    """Should a driver ever give such a name, the others are exported."""
    transport = storagetm.NvmeTcp(Named(), PREFIX)
    disks = [disk("vda"), disk("v,b")]
    transport.check(disks)
    assert [bool(transport.why_not(d)) for d in disks] == [False, True]
    disks[1].source = storagetm.NamedDisks(["/dev/v,b"])
    with pytest.raises(storagetm.UserError, match="has a comma"):
        transport.check(disks)
    inventory = storagetm.Inventory([d.source for d in disks])
    inventory.exports = {d.disk.key: d for d in disks}
    exporter = storagetm.Exporter(PREFIX, [transport], inventory)
    assert exporter.choose() == disks[:1]
    assert disks[1].left_out.startswith("its name has a comma")
