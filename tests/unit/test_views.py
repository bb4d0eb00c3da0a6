# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the screen is shown, if it is not the terminal that somebody has started the program on."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

import storagetm
from tests.unit.exports import Named, made_service
from tests.unit.test_shown import addresses, disk, report


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a console."""
    for name in ("SYS", "DEV", "PROC"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/{name.lower()}/")
    for name in ("console", "tty0"):
        (tmp_path / "sys/class/tty" / name).mkdir(parents=True)
    (tmp_path / "sys/class/tty/console/active").write_text("\n")
    (tmp_path / "dev").mkdir()
    return tmp_path


@pytest.fixture
def terminal() -> Iterator[Callable[[], tuple[int, str]]]:
    """Makes pseudo terminals: the other end's descriptor, and the path."""
    opened: list[int] = []

    def make() -> tuple[int, str]:
        opened.extend(pty.openpty())
        return opened[-2], os.ttyname(opened[-1])

    yield make
    for fd in opened:
        os.close(fd)


Terminal = Callable[[], "tuple[int, str]"]


# Which


@pytest.mark.parametrize(
    ("active", "foreground", "working", "expected"),
    [
        ("ttyS0", "tty1", ["ttyS0", "tty1"], ["ttyS0"]),
        # The last one is the main one.
        ("tty0 ttyS0", "tty1", ["ttyS0", "tty1"], ["ttyS0", "tty1"]),
        ("ttyS0 tty0", "tty3", ["ttyS0", "tty1", "tty3"], ["tty3", "ttyS0"]),
        ("tty1 tty0", "tty1", ["tty1"], ["tty1"]),
        # No hardware, no console, the null console, or none that has a terminal.
        ("ttyS0", "tty1", ["tty1"], ["tty1"]),
        ("", "tty1", ["tty1"], ["tty1"]),
        ("ttynull0", "tty1", ["tty1", "ttynull0"], ["tty1"]),
        ("netcon0 ttyS1 hvc0", "", ["hvc0", "tty1"], ["hvc0"]),
        ("ttyS0 ttyS1", "", [], []),
        ("tty0", "", ["tty0"], ["tty0"]),
    ],
)
def test_consoles_are_those_that_work(
    places: Path,
    terminal: Terminal,
    active: str,
    foreground: str,
    working: list[str],
    expected: list[str],
) -> None:
    (places / "sys/class/tty/console/active").write_text(f"{active}\n")
    (places / "sys/class/tty/tty0/active").write_text(f"{foreground}\n")
    for name in working:
        (places / "dev" / name).symlink_to(terminal()[1])
    assert storagetm.consoles() == [f"{places}/dev/{name}" for name in expected]


def test_node_that_takes_nothing_is_no_terminal(
    places: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a serial line without hardware does it: the node can be opened."""
    (places / "dev/ttyS0").symlink_to(terminal()[1])
    (places / "dev/file").touch()
    assert storagetm.is_working_terminal(f"{places}/dev/ttyS0")
    assert not storagetm.is_working_terminal(f"{places}/dev/file")
    assert not storagetm.is_working_terminal(f"{places}/dev/missing")

    def write(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", write)
    assert not storagetm.is_working_terminal(f"{places}/dev/ttyS0")


def test_kernel_command_line_may_know_the_size(places: Path, terminal: Terminal) -> None:
    """A serial line does not know its own; the kernel command line may."""
    (places / "proc").mkdir()
    _, path = terminal()
    name = os.path.basename(path)
    for line, expected in (
        ("quiet", (80, 24)),
        (f"systemd.tty.columns.{name}=132 systemd.tty.rows.{name}=50", (132, 50)),
        (f"systemd.tty.rows.{name}=30 systemd.tty.rows.other=5", (80, 30)),
        (f"systemd.tty.columns.{name}=-5 systemd.tty.rows.{name}=99999", (80, 24)),
    ):
        (places / "proc/cmdline").write_text(line)
        assert storagetm.Screen(path).size() == expected
    (places / "proc/cmdline").unlink()
    assert storagetm.Screen(path).size() == (80, 24)
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    os.close(fd)
    assert storagetm.Screen(path).size() == (90, 40)


# Keys


def output(master: int, text: bytes) -> bytes:
    """What comes out of a terminal up to this."""
    found = b""
    deadline = time.monotonic() + 60
    while text not in found:
        assert select.select([master], [], [], deadline - time.monotonic())[0], found
        found += os.read(master, 65536)
    return found


def test_keys_work_on_either_console(terminal: Terminal) -> None:
    """Both turn their own pages, and Ctrl-C ends it on either: the first is the controlling terminal."""
    ends = [terminal(), terminal()]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            caught: list[int] = []
            signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
            view, screens = storagetm.Views(lambda: None), [storagetm.Screen(path) for _, path in ends]
            view.own, view.terminals = True, [*screens]
            settings = [termios.tcgetattr(s.keys)[3] for s in screens]
            assert [bool(s & termios.ISIG) for s in settings] == [True, False]
            assert not any(s & (termios.ICANON | termios.ECHO) for s in settings)
            shown = report([disk(f"vd{i}") for i in range(30)])
            view.show(shown)
            told = 0
            while told < 2:
                if len(caught) > told:
                    screens[told].write("caught")
                    told += 1
                ready = select.select([s.keys for s in screens], [], [], 0.1)[0]
                for screen in screens:
                    if screen.keys in ready:
                        screen.act()
                        screen.show(shown)
            pages = [s.page for s in screens]
            view.close()
            assert pages == [2, 1]
            code = 0
        finally:
            os._exit(code)
    try:
        for (master, _), keys in zip(ends, ("  ", " ")):
            output(master, b"Page 1 of")
            for number, key in enumerate(keys, 2):
                os.write(master, key.encode())
                output(master, f"Page {number} of".encode())
        for master, _ in ends:
            os.write(master, b"\x03")
            output(master, b"caught")
    finally:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for _, path in ends:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        usual = termios.ISIG | termios.ICANON | termios.ECHO
        assert termios.tcgetattr(fd)[3] & usual == usual
        os.close(fd)


# What goes where


@pytest.fixture
def service(places: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[storagetm.Service]:
    """One that is to show the screen on consoles, and whose output is no terminal."""
    assert places
    monkeypatch.setattr(storagetm, "RUN", f"{places}/run/")
    monkeypatch.setattr(storagetm, "end_text_plymouth", lambda: True)
    monkeypatch.delenv("TERM", raising=False)
    transport = storagetm.NvmeTcp(Named(), "quux")
    made = made_service(Named(), transport, on_consoles=True)
    yield made
    made.views.close()


def test_each_console_has_the_whole_screen(
    service: storagetm.Service,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each has the whole screen, messages included; facts are in the journal as well, once."""
    ends = [terminal(), terminal()]
    monkeypatch.setattr(storagetm, "consoles", lambda: [path for _, path in ends])
    service.views.open()
    storagetm.log.journal = {1, 2}
    assert service.views.terminals
    storagetm.info("a fact")
    storagetm.warning("a warning")
    shown = report([disk("vda")], addresses(1))
    shown.messages = service.report().messages
    service.views.show(shown)
    for master, _ in ends:
        text = output(master, b"Ctrl-C stops")
        for part in (b"connect-all -t tcp -a 192.0.2.1", b"a fact", b"a warning", b"/dev/vda "):
            assert part in text
        # Nothing but rows that are drawn in place: no line of the journal's.
        assert b"\n" not in text
        assert b"<6>" not in text
        assert b"<4>" not in text
    out, err = capfd.readouterr()
    # Standard error is also the console's.
    assert err == ""
    assert out.splitlines()[:3] == [
        "<6>a fact",
        "<4>a warning",
        "<6>Attach all disks with: nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
    ]
    assert len(out.splitlines()) == 4


@pytest.mark.parametrize("term", ["linux", "dumb"])
def test_console_that_works_later_gets_the_screen(
    service: storagetm.Service,
    places: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    term: str,
) -> None:
    """The screen is not left where it was shown meanwhile; a console that is hung up is opened anew."""
    monkeypatch.setenv("TERM", term)
    (places / "sys/class/tty/console/active").write_text("ttyS0\n")
    (serial, path), (monitor, other) = terminal(), terminal()
    (places / "dev/tty1").symlink_to(other)
    shown = report([disk("vda")], addresses(1))
    service.views.open()
    service.views.show(shown)
    assert b"connect-all -t tcp -a 192.0.2.1" in output(monitor, b".vda")
    assert service.views.lost_consoles() == {f"{places}/dev/ttyS0"}
    before = service.views.terminals
    service.views.follow()
    assert service.views.terminals is before  # that would draw it again for nothing

    (places / "dev/ttyS0").symlink_to(path)
    service.views.follow()
    assert service.views.lost_consoles() == set()
    service.views.show(shown)
    assert b"connect-all -t tcp -a 192.0.2.1" in output(serial, b".vda")
    before = service.views.terminals
    service.views.follow()
    assert service.views.terminals is before

    with monkeypatch.context() as hung_up:
        hung_up.setattr(os, "write", Mock(side_effect=OSError(errno.EIO, "hung up")))
        service.views.show(shown)
    assert service.views.lost_consoles() == {f"{places}/dev/ttyS0"}
    service.views.follow()
    assert service.views.lost_consoles() == set()
    service.views.show(shown)
    assert b"connect-all -t tcp -a 192.0.2.1" in output(serial, b".vda")
    assert capfd.readouterr().out.count("Attach all disks with:") <= 1


def test_messages_stay(
    service: storagetm.Service, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the consoles are opened anew: those from before there was a screen, and the later ones, once."""
    paths = [terminal()[1], terminal()[1]]
    storagetm.warning("early")
    monkeypatch.setattr(storagetm, "consoles", lambda: paths[:1])
    service.views.open()
    storagetm.info("late")
    monkeypatch.setattr(storagetm, "consoles", lambda: paths)
    service.views.follow()
    assert service.views.paths == paths
    assert [message.split(" ")[1] for message in service.views.messages] == ["early", "late"]
    monkeypatch.setattr(storagetm, "consoles", list)
    service.views.follow()
    assert service.views.messages == []  # nobody sees them


def echoes(path: str) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        return bool(termios.tcgetattr(fd)[3] & termios.ECHO)
    finally:
        os.close(fd)


def test_console_that_others_set_up_is_set_up_again(terminal: Terminal) -> None:
    """With the next drawing it is as it has to be, and in the end as it was."""
    master, path = terminal()
    screen = storagetm.Screen(path)
    shown = report([disk("vda")], addresses(1))
    for _ in range(2):
        screen.show(shown)
        assert output(master, b"connect-all")
        assert not echoes(path)
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        mode = termios.tcgetattr(fd)
        mode[3] |= termios.ECHO | termios.ICANON
        termios.tcsetattr(fd, termios.TCSANOW, mode)
        os.close(fd)
        assert echoes(path)
    screen.show(shown)
    assert not echoes(path)
    os.write(master, b"n")
    assert select.select([screen.keys], [], [], 60)[0]
    screen.close()
    assert echoes(path)


def test_keys_of_a_console_may_come_later(
    service: storagetm.Service, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not left without any, since Ctrl-C is the way out."""
    _, path = terminal()
    monkeypatch.setattr(storagetm, "consoles", lambda: [path])
    open_file = os.open

    def opened(name: str, flags: int, *mode: int) -> int:
        if name == path and flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(name, flags, *mode)

    with monkeypatch.context() as closing:
        closing.setattr(os, "open", opened)
        service.views.open()
    assert service.views.lost_consoles() == {path}
    service.views.show(report([disk("vda")], addresses(1)))
    assert service.views.lost_consoles() == set()
    assert not echoes(path)


@pytest.mark.parametrize("on_consoles", [True, False])
def test_without_a_console_there_is_the_journal(
    service: storagetm.Service,
    on_consoles: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Then there is the journal; and nobody looks for a console who is not asked to."""
    service.views.on_consoles = on_consoles
    monkeypatch.setattr(storagetm, "consoles", lambda: [] if on_consoles else pytest.fail("it looked"))
    service.views.open()
    storagetm.warning("a warning")
    service.views.show(report([disk("vda")], addresses(1)))
    out, err = capfd.readouterr()
    assert out.startswith("Attach all disks with: nvme connect-all")
    assert err == "a warning\n"


def test_dumb_console_gets_plain_lines(
    service: storagetm.Service, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the service is told so, and if a console goes while it is opened."""
    master, path = terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(storagetm, "consoles", lambda: [path, f"{path}-gone"])
    service.views.open()
    service.views.show(report([disk("vda")], addresses(1)))
    text = output(master, b".vda\r\n")
    assert b"\x1b" not in text
    assert b"connect-all -t tcp -a 192.0.2.1" in text


# The journal's sign


def test_journal_may_be_two_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output and error may be two of its sockets, of which the variable names the second."""
    ends = socket.socketpair()
    incoming, outgoing = os.pipe()
    try:
        first, second = (end.fileno() for end in ends)
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
        assert not storagetm.is_journal(first)
        st = os.fstat(second)
        monkeypatch.setenv("JOURNAL_STREAM", f"{st.st_dev}:{st.st_ino}")
        assert storagetm.is_journal(first)
        assert storagetm.is_journal(second)
        assert not storagetm.is_journal(outgoing)
        assert not storagetm.is_journal(99999)
    finally:
        for end in ends:
            end.close()
        os.close(incoming)
        os.close(outgoing)
