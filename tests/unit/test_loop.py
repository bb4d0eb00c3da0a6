# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the service waits for, on a clock that only goes on while it waits."""

from __future__ import annotations

import errno
import os
import pty
import select
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import storagetm
from tests.unit.exports import Named, made_service
from tests.unit.test_shown import addresses, disk, report

HOUR = 3600.0


class Clock:
    """The time, and poll(2), which lets it pass. It ends the `service`'s loop when the time is up."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.end = self.now
        self.service: storagetm.Service | None = None
        self.readable: set[int] = set()  # descriptors that stay so whatever is done
        self.waits: list[float | None] = []  # in seconds; None for as long as it takes
        self.masks: dict[int, int] = {}

    def poll(self) -> Clock:
        self.masks = {}
        return self

    def register(self, fd: int, mask: int) -> None:
        assert fd >= 0
        self.masks[fd] = mask

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        self.waits.append(None if timeout is None else timeout / 1000)
        assert len(self.waits) < 10_000, "it spins"
        ready = [(fd, select.POLLIN) for fd, mask in self.masks.items() if fd in self.readable and mask]
        if not ready:
            self.now = self.end if timeout is None else self.now + timeout / 1000
        else:
            self.now += 0.0001
        if self.service and self.now >= self.end:
            self.service.signals.stop_asked = True
        return ready


class Poll:
    """What select.poll() returns."""

    def __init__(self, clock: Clock) -> None:
        self.register = clock.register
        self.poll = clock.wait


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(select, "poll", lambda: Poll(made.poll()))
    return made


@pytest.fixture
def service(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> storagetm.Service:
    """One that exports a disk, of which no part is in a kernel."""
    for name in ("CONFIGFS", "RUN", "PROC", "SYS", "DEV"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/{name.lower()}/")
    made = made_service(Named(), storagetm.NvmeTcp(Named(), "quux"), on_consoles=True)
    made.exporter.opened = True
    made.display.take = lambda: report([disk("vda")], addresses(1))
    made.sources = [
        storagetm.SnapshotNews(made.exporter, made.display.outdate),
        storagetm.Reminder(made.exporter),
        storagetm.Exports(made.exporter, made.synchronise),
    ]
    clock.service = made
    return made


@pytest.fixture
def synchronised(
    service: storagetm.Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[float]]:
    """Tells when exports have been looked at since the last time this was asked."""
    times: list[float] = []
    monkeypatch.setattr(service.exporter, "synchronise", lambda **_: times.append(clock.now))

    def asked() -> list[float]:
        found = [round(t - 1000, 1) for t in times]
        times.clear()
        return found

    return asked


def run(service: storagetm.Service, clock: Clock, seconds: float) -> int:
    """Runs the loop for so long; returns how often it has waited."""
    before = len(clock.waits)
    clock.end = clock.now + seconds
    service.signals.stop_asked = False
    service.loop()
    return len(clock.waits) - before


class Waiting(storagetm.News):
    """News that is due at certain times, or when there is something at a descriptor."""

    def __init__(
        self, name: str, acted: list[str], *times: float, fd: int = -1, again: bool = False
    ) -> None:
        self.name, self.acted, self.times, self.fd, self.again = name, acted, list(times), fd, again

    def wants(self) -> tuple[int, int]:
        return self.fd, select.POLLIN

    def due(self) -> float | None:
        return self.times[0] if self.times else None

    def act(self) -> bool:
        self.acted.append(self.name)
        del self.times[:1]
        return self.again


def names(news: Sequence[storagetm.News]) -> list[str]:
    return [each.name for each in storagetm.attend(news) if isinstance(each, Waiting)]


# Waiting


def test_what_has_come_and_what_is_due(clock: Clock) -> None:
    """In the order of the list; the rest is left alone."""
    acted: list[str] = []
    clock.readable = {7, 9}
    news = [
        Waiting("due", acted, clock.now - 1),
        Waiting("never", acted),
        Waiting("came", acted, fd=7),
        Waiting("silent", acted, fd=8),
        Waiting("late", acted, clock.now + 60),
        Waiting("also came", acted, clock.now + 60, fd=9),
    ]
    assert names(news) == ["due", "came", "also came"]
    assert clock.masks == {7: select.POLLIN, 8: select.POLLIN, 9: select.POLLIN}


def test_it_waits_for_the_first_that_is_due(clock: Clock) -> None:
    acted: list[str] = []
    news = [
        Waiting("b", acted, clock.now + 60),
        Waiting("a", acted, clock.now + 20),
        Waiting("never", acted),
    ]
    assert names(news) == ["a"]
    assert clock.waits == [pytest.approx(20, abs=0.01)]
    assert names(news[2:]) == []
    assert clock.waits[1] is None


def test_one_may_make_the_next_due(clock: Clock) -> None:
    """What disks have done is shown in the same pass."""
    acted: list[str] = []
    first, second = Waiting("first", acted, clock.now), Waiting("second", acted)
    found = []
    for each in storagetm.attend([first, second]):
        assert isinstance(each, Waiting)
        found.append(each.name)
        each.act()
        if each is first:
            second.times.append(0.0)
    assert found == ["first", "second"]


def test_two_wait_at_one_descriptor() -> None:
    """As at a terminal that is the same for keys and output. The third ends it if they are missed."""
    master, slave = pty.openpty()
    try:

        class Writing(Waiting):
            def wants(self) -> tuple[int, int]:
                return self.fd, select.POLLOUT

        acted: list[str] = []
        news = [Waiting("keys", acted, fd=slave), Writing("output", acted, fd=slave)]
        late = Waiting("late", acted, time.monotonic() + 5)
        # One of both has come, and either finds out.
        assert names([*news, late]) == ["keys", "output"]
        assert names([*news[::-1], late]) == ["output", "keys"]
    finally:
        os.close(master)
        os.close(slave)


# The loop


def test_nothing_wakes_it_up_without_reason(service: storagetm.Service, clock: Clock) -> None:
    service.views.on_consoles = False
    assert run(service, clock, HOUR) <= 2
    assert clock.waits[-1] is None
    shown = service.display.shown
    assert run(service, clock, HOUR) == 1
    assert service.display.shown == shown


def test_screen_looks_every_other_second_who_is_attached(service: storagetm.Service, clock: Clock) -> None:
    """The kernel does not tell. Where nothing shows it, nobody looks."""
    service.views.on_consoles = False
    transports = service.exporter.transports
    service.sources.append(storagetm.Attendance(transports, service.views, service.display.outdate))
    run(service, clock, 1)
    assert run(service, clock, HOUR) == 1
    service.views.terminals = [storagetm.Plain()]
    shown = service.display.shown
    assert 1800 <= run(service, clock, HOUR) <= 1801
    assert service.display.shown == shown


def test_news_of_disks_are_acted_on_before_they_are_shown(
    service: storagetm.Service, clock: Clock, synchronised: Callable[[], list[float]]
) -> None:
    """Also when it is just then that something else is to be shown: none is seen half changed."""
    service.views.on_consoles = False
    run(service, clock, 1)
    acted: list[str] = []
    due = clock.now + 10
    service.sources.insert(0, Waiting("disk", acted, due, again=True))
    service.display.shown = due - storagetm.REDRAW_SEC
    service.display.outdate()
    before: list[list[float]] = []

    def take() -> storagetm.Report:
        before.append(synchronised())
        return report([])

    service.display.take = take
    run(service, clock, HOUR)
    assert acted == ["disk"]
    assert before == [[11.0]]


def test_redraws_are_not_too_frequent(service: storagetm.Service, clock: Clock) -> None:
    """What changes meanwhile is shown together, and the last change is shown, too."""
    service.views.on_consoles = False
    run(service, clock, 1)
    times: list[float] = []
    start = clock.now

    def take() -> storagetm.Report:
        times.append(clock.now)
        return report([])

    service.display.take = take

    class Changes(Waiting):
        def act(self) -> bool:
            service.display.outdate()
            return super().act()

    service.sources.append(Changes("change", [], *(start + i / 100 for i in range(1000))))
    run(service, clock, HOUR)
    assert all(b - a >= storagetm.REDRAW_SEC for a, b in zip(times, times[1:]))
    assert 12 <= len(times) <= 15
    assert start + 9.99 <= times[-1] <= start + 11


def test_waiting_for_disks(
    service: storagetm.Service,
    clock: Clock,
    synchronised: Callable[[], list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Less and less often, until there is news; and not at all once there is nothing to wait for."""
    waiting = [disk("vda")]
    monkeypatch.setattr(service.exporter, "pending", lambda: waiting)
    service.exporter.outdated = True
    run(service, clock, 60)
    times = synchronised()
    assert len([t for t in times if t < 1]) > 5
    assert 100 < len([t for t in times if 2 <= t < 60]) < 120
    service.sources.insert(0, Waiting("disk", [], clock.now + 0.1, again=True))
    run(service, clock, 1)
    assert len(synchronised()) > 5
    waiting.clear()
    run(service, clock, HOUR)
    assert len(synchronised()) <= 1
    run(service, clock, HOUR)
    assert synchronised() == []
    service.exporter.opened = False  # as while a disk of the run before has not come back
    service.exporter.outdated = True
    run(service, clock, 10)
    assert 18 < len(synchronised()) < 30


def test_what_comes_up_inside(
    service: storagetm.Service, clock: Clock, synchronised: Callable[[], list[float]]
) -> None:
    """Removals that have ended in threads, and exports that something else has made outdated: each once."""
    service.exporter.outdated = True
    run(service, clock, HOUR)
    assert len(synchronised()) == 1
    finished = service.exporter.tree.finished
    finished.append((storagetm.Branch("", [storagetm.Directory("x")]), None))
    service.exporter.synchronise = lambda **_: finished.clear()  # type: ignore[method-assign]
    run(service, clock, HOUR)
    assert finished == []


def test_clients_that_have_to_be_told(
    service: storagetm.Service, clock: Clock, synchronised: Callable[[], list[float]]
) -> None:
    (transport,) = service.exporter.transports
    assert isinstance(transport, storagetm.NvmeTcp)
    transport.courtesy.again = clock.now + 10
    run(service, clock, 5)
    assert synchronised() == []

    def told(**_: bool) -> None:
        transport.courtesy.again = 0.0

    service.exporter.synchronise = told  # type: ignore[method-assign]
    assert run(service, clock, HOUR) < 10
    assert transport.courtesy.again == 0


class Stores:
    """Snapshots' memory, and when it was looked at."""

    def __init__(self, service: storagetm.Service, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exporter, self.clock = service.exporter, clock
        self.times: list[float] = []
        self.exporter.stores.news = 77
        self.exporter.memory.filled = {"x": (0, 1, "")}
        monkeypatch.setattr(self.exporter, "share_memory", self.share)

    def share(self, *_: object) -> None:
        self.times.append(self.clock.now)
        self.exporter.stores.divided = self.clock.now


@pytest.fixture
def stores(service: storagetm.Service, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Stores:
    return Stores(service, clock, monkeypatch)


def test_memory_is_looked_at(service: storagetm.Service, clock: Clock, stores: Stores) -> None:
    """As often as it may run full; what has not changed is not shown again."""
    service.views.on_consoles = False
    waited = run(service, clock, 60)
    assert 59 <= len(stores.times) <= 62
    assert waited <= len(stores.times) + 5
    shown = service.display.shown
    assert shown < 1002


@pytest.mark.parametrize("filled", [True, False])
def test_descriptor_that_stays_readable(
    service: storagetm.Service, clock: Clock, stores: Stores, filled: bool
) -> None:
    """Device-mapper's does until its news were looked at, for which there is a time: nothing spins."""
    clock.readable = {77}
    if not filled:
        service.exporter.memory.filled = {}
    waited = run(service, clock, 10)
    shortest = storagetm.STORE_POLL_SEC[0]
    assert all(b - a >= shortest for a, b in zip(stores.times, stores.times[1:]))
    assert len(stores.times) <= 10 / shortest + 1
    assert len(stores.times) > 150 if filled else stores.times == []
    assert waited <= 2 * len(stores.times) + 20


# Consoles


def test_consoles_are_looked_for(
    service: storagetm.Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When others may have written there, then never again; or less and less often if one does not work."""
    looked: list[float] = []

    def consoles() -> list[str]:
        looked.append(round(clock.now - 1000, 1))
        return []

    monkeypatch.setattr(storagetm, "named_consoles", list)
    monkeypatch.setattr(storagetm, "consoles", consoles)
    service.views.begin()
    run(service, clock, HOUR)
    assert looked == [0, 1, 4]
    looked.clear()
    start = round(clock.now - 1000, 1)
    monkeypatch.setattr(storagetm, "named_consoles", lambda: ["/dev/ttyS0"])
    service.views.begin()
    run(service, clock, 100)
    times = [round(t - start) for t in looked]
    assert times == [0, 1, 3, 7, 15, 31, 63]


class Late(storagetm.Terminal):
    """A console that gets its keys when it is shown for the first time."""

    HAS_MESSAGES = True
    shown = False

    def __init__(self, path: str, outdate: Callable[[], None]) -> None:
        super().__init__(path)

    @property
    def whole(self) -> bool:
        return self.shown

    def show(self, _: storagetm.Report) -> None:
        self.shown = True


def test_console_that_works_once_it_is_shown(
    service: storagetm.Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to look less often than for one that worked at once."""
    looked: list[float] = []

    def consoles() -> list[str]:
        looked.append(round(clock.now - 1000, 1))
        return ["/dev/ttyS0"]

    monkeypatch.setattr(storagetm, "Screen", Late)
    monkeypatch.setattr(storagetm, "named_consoles", consoles)
    monkeypatch.setattr(storagetm, "consoles", lambda: ["/dev/ttyS0"])
    drawn: list[float] = []
    monkeypatch.setattr(service.views.journal, "show", lambda _: drawn.append(round(clock.now - 1000, 1)))
    service.views.begin()
    run(service, clock, HOUR)
    assert looked == [0]
    assert drawn == [0, 1, 4]


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """The other end's descriptor, and the path."""
    master, slave = pty.openpty()
    yield master, os.ttyname(slave)
    os.close(master)
    os.close(slave)


def test_terminal_that_takes_no_more(terminal: tuple[int, str]) -> None:
    """As after Ctrl-S: it is waited for, and gets what is shown then, once."""
    master, path = terminal
    asked: list[int] = []
    screen = storagetm.Screen(path, lambda: asked.append(1))
    keys, unsent = screen.news()
    assert keys is screen
    assert unsent.wants() == (-1, 0)
    os.write(master, b"\x13")
    shown = report([disk(f"vd{i}") for i in range(30)])
    for _ in range(100):
        screen.show(shown)
        screen.page += 1
    assert unsent.wants() == (screen.descriptor, select.POLLOUT)
    waiting = select.poll()
    waiting.register(*unsent.wants())
    assert waiting.poll(0) == []  # or it would be woken up all the time
    assert asked == []
    os.write(master, b"\x11")
    deadline = time.monotonic() + 60
    while unsent.wants()[0] >= 0:
        assert time.monotonic() < deadline
        if select.select([master], [screen.descriptor], [], 60)[0]:
            os.read(master, 65536)
        assert not unsent.act()
    assert asked == [1]
    screen.close()


def test_hung_up_terminal_is_left_alone(terminal: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors always have an error; none of them is waited at any more."""
    _, path = terminal
    screen = storagetm.Screen(path)
    assert screen.wants()[0] >= 0
    assert screen.whole
    with monkeypatch.context() as hung_up:
        hung_up.setattr(os, "read", lambda *_: b"")
        assert not screen.act()
    assert [each.wants()[0] for each in screen.news()] == [-1, -1]
    assert not screen.whole

    def write(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    screen = storagetm.Screen(path)
    monkeypatch.setattr(os, "write", write)
    screen.show(report([disk("vda")]))
    assert screen.news()[1].wants()[0] == -1
    assert not screen.whole


# Disks


class Names:
    """Uevents of these devices, or lost ones."""

    def __init__(self, names: set[str] | None) -> None:
        self.names = names

    def changed(self) -> set[str] | None:
        return self.names


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ({"dm-7"}, []),
        (set(), []),
        ({"dm-7", "dm-8", "vda"}, [{"dm-8", "vda"}]),
        ({"dm-9"}, [{"dm-9"}]),
        (None, ["all"]),
    ],
)
def test_what_is_in_between_has_no_news(
    service: storagetm.Service,
    monkeypatch: pytest.MonkeyPatch,
    names: set[str] | None,
    read: list[set[str] | str],
) -> None:
    """No disk is looked at again for udev's events about our own devices: there are three a disk."""
    for name, uuid in ("dm-7", "storagetm-vda-0123456789abcdef"), ("dm-8", "LVM-vg"):
        (Path(storagetm.SYS) / "class/block" / name / "dm").mkdir(parents=True)
        (Path(storagetm.SYS) / "class/block" / name / "dm/uuid").write_text(uuid + "\n")
    found: list[set[str] | str] = []
    monkeypatch.setattr(service.inventory, "update", found.append)
    monkeypatch.setattr(service.inventory, "rescan", lambda: found.append("all"))
    assert service.read_disks(Names(names)) == bool(read)  # type: ignore[arg-type]
    assert found == read


def test_events_cost_nothing_for_disks_that_have_none(
    service: storagetm.Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is waited for is looked up once after each change, not each time the loop goes round."""
    looked: list[float] = []

    def pending() -> list[storagetm.Export]:
        looked.append(clock.now)
        return []

    monkeypatch.setattr(service.exporter, "pending", pending)
    service.sources.insert(0, Waiting("event", [], *(clock.now + i / 100 for i in range(100))))
    run(service, clock, 10)
    assert len(looked) <= 2
