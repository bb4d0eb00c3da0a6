# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where clients may come in: --listen= and --port=, and addresses that come and go meanwhile."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm
from storagetm import READ_WRITE
from tests.unit.configfs import Nvmet
from tests.unit.conftest import CapturedMachine
from tests.unit.exports import Named, made_service

V4, V6 = storagetm.AF_INET, storagetm.AF_INET6
PORT4, PORT6 = 59936, 36681  # of the captured machine


def made(text: str, interface: str = "eth0") -> storagetm.Address:
    return storagetm.Address(V6 if ":" in text else V4, text, interface, text.startswith(("fe80", "169.")))


NET4, NET6, LOCAL = made("192.0.2.1"), made("2001:db8::1"), made("fe80::1")
OTHER4, OTHER = made("198.51.100.1", "eth1"), made("fe80::1", "eth1")
LO = [made("127.0.0.1", "lo"), made("::1", "lo")]
ALL = [NET4, OTHER4, NET6, LOCAL, OTHER, *LO]


# What the words mean


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("FE80::1%eth0", "fe80::1%eth0"),
        ("::", "::"),
        ("eth0", "eth0"),
        ("wlp0s20f3.100", "wlp0s20f3.100"),
        ("eth0:1", ""),
        ("192.0.2.1%eth0", ""),
        ("fe80::1%", ""),
        ("fe80::1%a/b", ""),
        ("a-name-that-is-16", ""),
        ("a b", ""),
        ("..", ""),
        ("", ""),
        ("2001:db8::/64", ""),
        ("192.0.2.1:4420", ""),
    ],
)
def test_words_are_addresses_or_possible_names(word: str, expected: str) -> None:
    assert storagetm.parse_listen(word) == expected


@given(st.text(max_size=30))
def test_any_text_is_understood_or_refused(text: str) -> None:
    found = storagetm.parse_listen(text)
    assert storagetm.parse_listen(found) == found


@pytest.mark.parametrize(
    ("words", "places", "missing"),
    [
        (["eth0"], ["192.0.2.1", "2001:db8::1", "fe80::1%eth0"], []),
        (["eth1", "eth1"], ["198.51.100.1", "fe80::1%eth1"], []),
        (["fe80::1"], ["fe80::1%eth0", "fe80::1%eth1"], []),
        (["fe80::1%eth1"], ["fe80::1%eth1"], []),
        (["192.0.2.1", "eth9", "192.0.2.9"], ["192.0.2.1"], ["eth9", "192.0.2.9"]),
        (["lo"], ["127.0.0.1", "::1"], []),
        (["0.0.0.0", "eth0"], ["0.0.0.0", "2001:db8::1", "fe80::1%eth0"], []),
        (["::"], ["2001:db8::1", "fe80::1%eth0", "fe80::1%eth1"], []),
        ([], ["0.0.0.0", "2001:db8::1", "fe80::1%eth0", "fe80::1%eth1"], []),
    ],
)
def test_words_stand_for_addresses(words: list[str], places: list[str], missing: list[str]) -> None:
    listening = storagetm.Listening(words, 4420)
    assert listening.places(ALL) == places
    assert listening.missing == missing


def test_without_addresses_all_is_missing_but_what_stands_for_all() -> None:
    listening = storagetm.Listening(["eth0", "192.0.2.1"])
    assert (listening.places([]), listening.missing) == ([], ["eth0", "192.0.2.1"])
    listening = storagetm.Listening([], 4420)
    assert (listening.places([]), listening.missing) == (["0.0.0.0"], [])


# The command line


def test_options_say_where_to_listen() -> None:
    options = storagetm.parse_arguments(["--listen=eth0", "--listen=FE80::1%eth1", "--port=4420", "-a"])
    assert (options.listen, options.port) == (["eth0", "fe80::1%eth1"], 4420)
    words = ["rd.storagetm.listen=eth0", "rd.storagetm.listen=192.0.2.1", "storagetm.port=1024"]
    options = storagetm.options_from_kernel(words, initrd=True)
    assert (options.listen, options.port) == (["eth0", "192.0.2.1"], 1024)
    ours = storagetm.parse_arguments(["--listen=lo", "-a"])
    storagetm.add_options(ours, options)
    assert (ours.listen, ours.port) == (["lo"], 1024)
    ours = storagetm.parse_arguments(["--port=7", "-a"])
    storagetm.add_options(ours, options)
    assert (ours.listen, ours.port) == (["eth0", "192.0.2.1"], 7)


@pytest.mark.parametrize("word", ["a/b", "192.0.2.1:4420", "a-name-that-is-16"])
def test_word_that_can_be_nothing_is_refused(word: str) -> None:
    with pytest.raises(storagetm.UsageError, match=r"is neither an address nor the name of an interface$"):
        storagetm.parse_arguments([f"--listen={word}", "-a"])


@pytest.mark.parametrize("number", ["0", "65536", "-1", "4420x", "٤", "99999999999999999999"])
def test_number_that_is_no_port_is_refused(number: str) -> None:
    with pytest.raises(storagetm.UsageError, match=r"is no number from 1 to 65535$"):
        storagetm.parse_arguments([f"--port={number}", "-a"])


def test_without_the_options_ports_are_those_of_the_contract() -> None:
    """None of it is asked then, not even which addresses there are."""
    (transport,) = storagetm.chosen_transports(storagetm.Options(), Named(), "x", storagetm.Access())
    assert isinstance(transport, storagetm.NvmeTcp)
    assert transport.listening is None

    def held() -> list[storagetm.Address]:
        raise AssertionError

    assert not transport.follow(held)


# What is exported


class Run:
    """One start, without the service's loop."""

    def __init__(
        self,
        kind: type[storagetm.NvmeTcp],
        words: Sequence[str],
        port: int,
        addresses: list[storagetm.Address],
    ) -> None:
        machine = storagetm.Machine()
        stays = storagetm.Stays(storagetm.RUN + "disks", machine.id)
        stays.kept = True
        inventory = storagetm.Inventory(
            [storagetm.NamedDisks(["/dev/vdb", "/dev/vdc"])], storagetm.Access((), READ_WRITE), stays
        )
        listening = storagetm.Listening(words, port) if words or port else None
        self.transport = kind(machine, clients=2, writable=True, listening=listening)
        self.exporter = storagetm.Exporter(self.transport.prefix, [self.transport], inventory)
        self.addresses = addresses
        inventory.check_named()
        self.exporter.ledger.lock()
        self.exporter.begin()
        self.exporter.want.follow(lambda: self.addresses)
        self.exporter.synchronise(strict=True)

    def now(self, *addresses: storagetm.Address) -> bool:
        """What happens when there are other addresses; whether there was something to do."""
        self.addresses = [*addresses]
        changed = self.exporter.want.follow(lambda: self.addresses)
        if changed:
            self.exporter.synchronise()
        return changed

    def kill(self) -> None:
        for export in self.exporter.inventory.exports.values():
            export.release()
        self.exporter.ledger.close()


Start = Callable[..., Run]


@pytest.fixture
def start(nvmet: Nvmet) -> Iterator[Start]:
    runs: list[Run] = []
    assert nvmet.path("nvmet").is_dir()

    def begin(
        *words: str,
        port: int = 0,
        addresses: Sequence[storagetm.Address] = (NET4, NET6, LOCAL),
        kind: type[storagetm.NvmeTcp] = storagetm.NvmeTcp,
    ) -> Run:
        runs.append(Run(kind, words, port, [*addresses]))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def listening(nvmet: Nvmet) -> dict[str, tuple[str, int]]:
    """TCP port and number of disks by address."""
    found = {}
    for port in nvmet.path("nvmet/ports").iterdir():
        traddr, trsvcid = ((port / f"addr_{name}").read_text().strip() for name in ("traddr", "trsvcid"))
        assert (port / "addr_adrfam").read_text() == ("ipv6\n" if ":" in traddr else "ipv4\n")
        found[traddr] = trsvcid, len(os.listdir(port / "subsystems"))
    return found


def numbers(nvmet: Nvmet) -> dict[str, str]:
    return {
        (port / "addr_traddr").read_text().strip(): port.name for port in nvmet.path("nvmet/ports").iterdir()
    }


def test_without_words_there_is_a_port_for_each_family(start: Start, nvmet: Nvmet) -> None:
    run = start()
    assert listening(nvmet) == {"0.0.0.0": (str(PORT4), 2), "::": (str(PORT6), 2)}
    assert numbers(nvmet) == {"0.0.0.0": str(PORT4), "::": str(PORT6)}
    calls = len(nvmet.calls)
    assert not run.now(OTHER4)
    assert nvmet.calls[calls:] == []


def test_interface_is_followed(start: Start, nvmet: Nvmet) -> None:
    """Who came in at one address notices nothing of what happens to others."""
    run = start("eth0", addresses=[NET4, OTHER4, LOCAL, OTHER])
    expected = {"192.0.2.1": (str(PORT4), 2), "fe80::1%eth0": (str(PORT6), 2)}
    assert listening(nvmet) == expected
    before, calls = numbers(nvmet), len(nvmet.calls)
    assert run.now(NET4, NET6, LOCAL)
    assert listening(nvmet) == {**expected, "2001:db8::1": (str(PORT6), 2)}
    assert numbers(nvmet).items() > before.items()
    touched = {number for call in nvmet.calls[calls:] for number in before.values() if number in call}
    assert touched == set()
    number = numbers(nvmet)["2001:db8::1"]
    assert run.now(NET4, LOCAL)
    assert listening(nvmet) == expected
    assert run.now(NET4, NET6, LOCAL)
    assert numbers(nvmet)["2001:db8::1"] == number
    assert not run.now(NET4, NET6, LOCAL, OTHER4)
    assert run.exporter.stop()
    assert listening(nvmet) == {}


def test_shared_subsystem_follows_too(start: Start, nvmet: Nvmet) -> None:
    run = start("eth0", addresses=[NET4], kind=storagetm.SharedNvmeTcp)
    assert listening(nvmet) == {"192.0.2.1": (str(PORT4), 1)}
    before, calls = numbers(nvmet), len(nvmet.calls)
    assert run.now(NET4, LOCAL)
    assert listening(nvmet) == {"192.0.2.1": (str(PORT4), 1), "fe80::1%eth0": (str(PORT6), 1)}
    assert not [c for c in nvmet.calls[calls:] if f"/{before['192.0.2.1']}/" in c or "/namespaces/" in c]
    # One command attaches all, which works at a link-local address, too.
    prefix = run.transport.prefix
    assert [i.line for i in run.transport.instructions([], [NET4, LOCAL])] == [
        f"nvme connect -t tcp -a 192.0.2.1 -s {PORT4} -n {prefix}",
        f"nvme connect -t tcp -a fe80::1 -s {PORT6} -f INTERFACE -n {prefix}",
    ]
    assert run.now()
    assert listening(nvmet) == {}
    assert run.now(NET4)
    assert listening(nvmet) == {"192.0.2.1": (str(PORT4), 1)}
    assert run.exporter.stop()
    assert listening(nvmet) == {}


def test_what_is_not_there_is_waited_for_with_all_doors_shut(start: Start, nvmet: Nvmet) -> None:
    run = start("eth7", "192.0.2.7")
    assert listening(nvmet) == {}
    assert [e.live != {} for e in run.exporter.inventory.exports.values()] == [True, True]
    way = run.transport.way(run.addresses)
    assert way.shut == "192.0.2.7 is no address of this machine yet, and eth7 has no address yet"
    assert way.where == f"no address ({way.shut})"
    assert (way.effect, way.remedy) == (
        "no disk can be attached yet",
        "plug in a cable, or wait for an address",
    )
    assert run.transport.instructions([], run.addresses) == []
    assert run.transport.remarks([]) == []  # it stands above already
    assert run.now(NET4, made("192.0.2.7", "eth7"))
    assert listening(nvmet) == {"192.0.2.7": (str(PORT4), 2)}
    way = run.transport.way(run.addresses)
    assert (way.where, way.shut) == ("1 address", "")
    assert [i.line for i in run.transport.instructions([], run.addresses)] == [
        f"nvme connect-all -t tcp -a 192.0.2.7 -s {PORT4}"
    ]
    # The cable alone is out.
    assert run.transport.way([NET4]).shut == "the network is down"


def test_some_that_are_not_there_are_told(start: Start) -> None:
    run = start("eth0", "eth7")
    assert run.transport.remarks([]) == ["eth7 has no address yet"]
    run.now(NET4, made("192.0.2.7", "eth7"))
    assert run.transport.remarks([]) == []


def test_run_that_was_killed_is_taken_over(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its numbers, and the TCP port that it had to take instead of another."""

    def intercept(number: int) -> None:
        call = nvmet.calls[number].split("/")
        if call[0].startswith("symlink") and nvmet.path("/".join(["nvmet", *call[1:3], "addr_trsvcid"])):
            trsvcid = nvmet.path(f"nvmet/ports/{call[2]}/addr_trsvcid").read_text()
            if trsvcid == f"{PORT4}\n":
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    nvmet.intercept = intercept
    first = start("eth0")
    assert f"Port {PORT4} is taken at 192.0.2.1, using " in capfd.readouterr().err
    assert first.transport.ports[V4] not in (PORT4, PORT6)
    assert first.transport.ports[V6] == PORT6
    before = nvmet.contents()
    first.kill()
    calls = len(nvmet.calls)
    second = start("eth0")
    assert second.transport.ports == first.transport.ports
    assert nvmet.contents() == before
    assert [c for c in nvmet.calls[calls:] if c.startswith(("mkdir", "rmdir", "unlink", "symlink"))] == []
    assert second.exporter.stop()
    second.kill()
    assert listening(nvmet) == {}


@pytest.mark.parametrize(("before", "after"), [((), ("192.0.2.1",)), (("192.0.2.1",), ())])
def test_run_that_listens_elsewhere_leaves_no_port_open(
    start: Start, nvmet: Nvmet, before: Sequence[str], after: Sequence[str]
) -> None:
    start(*before).kill()
    start(*after)
    expected = {"192.0.2.1": (str(PORT4), 2)}
    assert listening(nvmet) == (expected if after else {"0.0.0.0": (str(PORT4), 2), "::": (str(PORT6), 2)})


def test_port_is_for_both_families(start: Start, nvmet: Nvmet) -> None:
    """At [::] it would take connections over IPv4, too, so that both could not listen."""
    run = start(port=4420)
    assert listening(nvmet) == dict.fromkeys(("0.0.0.0", "2001:db8::1", "fe80::1%eth0"), ("4420", 2))
    assert [i.line for i in run.transport.instructions([], run.addresses)] == [
        "nvme connect-all -t tcp -a 192.0.2.1 -s 4420",
        "nvme connect-all -t tcp -a 2001:db8::1 -s 4420",
    ]
    assert run.transport.firewall_text() == "This machine has a firewall, which must let in TCP port 4420"


def taken(nvmet: Nvmet, *addresses: str) -> None:
    """Has another program listen at these addresses, whatever the TCP port."""

    def intercept(number: int) -> None:
        step, _, path = nvmet.calls[number].partition(" ")
        if step == "symlink" and path.startswith("nvmet/ports/"):
            traddr = nvmet.path("/".join(path.split("/")[:3])) / "addr_traddr"
            if traddr.read_text().strip() in addresses:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    nvmet.intercept = intercept


def test_port_of_another_program_is_not_replaced(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is exported at that family then, and the other one goes on."""
    taken(nvmet, "0.0.0.0")
    run = start(port=4420)
    assert listening(nvmet) == dict.fromkeys(("2001:db8::1", "fe80::1%eth0"), ("4420", 2))
    text = "TCP port 4420 is taken at 0.0.0.0 by another program: no disk is exported there"
    way_out = "stop that and start storagetm again, or give another --port"
    assert capfd.readouterr().err == f"{text}; {way_out}\n"
    assert run.transport.remarks([]) == [text]
    assert [a.text for a in run.transport.reachable(run.addresses)] == ["2001:db8::1", "fe80::1"]
    # It is not tried again at each change, which would take the links away for a moment.
    calls = len(nvmet.calls)
    assert not run.now(NET4, NET6, LOCAL)
    assert nvmet.calls[calls:] == []


def test_port_taken_everywhere_shuts_the_way(start: Start, nvmet: Nvmet) -> None:
    taken(nvmet, "0.0.0.0", "2001:db8::1")
    run = start(port=4420, addresses=[NET4, NET6])
    assert listening(nvmet) == {}
    way = run.transport.way(run.addresses)
    assert way.shut == "TCP port 4420 is taken by another program"
    assert way.remedy == "stop that and start storagetm again, or give another --port"


def test_address_taken_later_leaves_the_others_alone(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their TCP port is not changed for it, since clients are there."""
    run = start("eth0", "eth1", addresses=[NET4])
    taken(nvmet, "198.51.100.1")
    number = numbers(nvmet)["192.0.2.1"]
    calls = len(nvmet.calls)
    assert run.now(NET4, OTHER4)
    assert listening(nvmet) == {"192.0.2.1": (str(PORT4), 2)}
    assert not [c for c in nvmet.calls[calls:] if f"/{number}/" in c]
    assert f"TCP port {PORT4} is taken at 198.51.100.1 by another program" in capfd.readouterr().err
    # Once the address has gone, it is forgotten.
    nvmet.succeed()
    run.now(NET4)
    run.now(NET4, OTHER4)
    assert listening(nvmet)["198.51.100.1"] == (str(PORT4), 2)


def test_address_taken_while_the_program_was_dead_leaves_the_others_alone(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
    start("eth0", "eth1", addresses=[NET4]).kill()
    taken(nvmet, "198.51.100.1")
    number, calls = numbers(nvmet)["192.0.2.1"], len(nvmet.calls)
    start("eth0", "eth1", addresses=[NET4, OTHER4])
    assert listening(nvmet) == {"192.0.2.1": (str(PORT4), 2)}
    assert not [c for c in nvmet.calls[calls:] if f"/{number}/" in c]
    assert f"TCP port {PORT4} is taken at 198.51.100.1 by another program" in capfd.readouterr().err


def test_address_that_has_gone_again_is_no_failure(
    start: Start, nvmet: Nvmet, capfd: pytest.CaptureFixture[str]
) -> None:
    run = start("eth0", addresses=[NET4])

    def intercept(number: int) -> None:
        if nvmet.calls[number].startswith(f"symlink nvmet/ports/{run.transport.numbers['2001:db8::1']}/"):
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    nvmet.intercept = intercept
    run.now(NET4, NET6)
    assert listening(nvmet) == {"192.0.2.1": (str(PORT4), 2)}
    assert capfd.readouterr().err == ""
    nvmet.succeed()
    assert run.now(NET4, NET6)
    assert listening(nvmet)["2001:db8::1"] == (str(PORT6), 2)


def test_number_of_another_program_is_left_alone(start: Start, nvmet: Nvmet) -> None:
    wanted = start("192.0.2.1")
    number = wanted.transport.numbers["192.0.2.1"]
    assert wanted.exporter.stop()
    wanted.kill()
    nvmet.mkdir(f"{nvmet.root}/nvmet/ports/{number}")
    run = start("192.0.2.1")
    assert run.transport.numbers["192.0.2.1"] != number
    assert os.listdir(nvmet.path(f"nvmet/ports/{number}/subsystems")) == []


def test_own_seat_is_taken_where_something_listens(machine: CapturedMachine) -> None:
    host = storagetm.OwnHost(storagetm.Admission(), {V4: 1024, V6: 1025}, 7)
    assert machine
    assert host.seat_address("0.0.0.0") == ("127.0.0.1", 1024)
    assert host.seat_address("::") == ("::1", 1025)
    assert host.seat_address("192.0.2.1") == ("192.0.2.1", 1024)
    assert host.seat_address("2001:db8::1") == ("2001:db8::1", 1025)
    assert host.seat_address("fe80::1%lo") == ("fe80::1", 1025, 0, 1)


def test_seat_moves_with_the_first_port(start: Start, nvmet: Nvmet) -> None:
    """Where the kernel makes room for two, the one at an address that goes would be anybody's."""
    nvmet.room_for_two = True
    run = start("eth0", addresses=[NET4, NET6])
    run.transport.clients = 1
    subsystem = run.transport.root(run.exporter.inventory.exports["vdb"])
    seats = [e for e in run.transport.links(subsystem, 1) if isinstance(e, storagetm.Seat)]
    assert [seat.value for seat in seats] == ["192.0.2.1"]
    run.transport.host.roomy.add(subsystem)

    class Attached:
        def is_attached(self) -> bool:
            return True

    run.transport.host.seats[seats[0].path] = Attached()  # type: ignore[assignment]
    run.transport.host.seated[seats[0].path] = "192.0.2.1"
    assert seats[0].is_live("")
    run.transport.texts = ["2001:db8::1"]
    (moved,) = (e for e in run.transport.links(subsystem, 1) if isinstance(e, storagetm.Seat))
    assert not moved.is_live("")
    run.transport.texts = []
    assert run.transport.links(subsystem, 1) == []


def test_loopback_is_shown_where_it_is_all_there_is(start: Start) -> None:
    """Who comes in by way of a tunnel types it."""
    run = start("127.0.0.1", addresses=[NET4, *LO])
    assert [i.line for i in run.transport.instructions([], [NET4])] == [
        f"nvme connect-all -t tcp -a 127.0.0.1 -s {PORT4}"
    ]
    assert run.transport.way([NET4]).where == "1 address"


def test_passage_has_no_number_of_another_port(start: Start) -> None:
    run = start("192.0.2.1")
    run.transport.numbers["192.0.2.1"] = run.transport.host.passage
    (passage,) = run.transport.scaffolds({})
    assert passage.root != f"nvmet/ports/{run.transport.numbers['192.0.2.1']}"


# The service


class Addresses:
    """Stands for the kernel's addresses, and word of them."""

    now: ClassVar[list[storagetm.Address]] = []

    def __init__(self) -> None:
        self.socket = socket.socket()

    def changed(self) -> bool:
        return True

    def addresses(self) -> list[storagetm.Address]:
        return [a for a in self.now if a.interface != "lo"]

    def held(self) -> list[storagetm.Address]:
        return list(self.now)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> type[Addresses]:
    monkeypatch.setattr(storagetm, "Network", Addresses)
    monkeypatch.setattr(Addresses, "now", [NET4, *LO])
    return Addresses


def test_service_listens_at_once_and_follows(
    nvmet: Nvmet, network: type[Addresses], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = storagetm.Machine()
    inventory = storagetm.Inventory([storagetm.NamedDisks(["/dev/vdb"])], storagetm.Access((), READ_WRITE))
    transport = storagetm.NvmeTcp(machine, listening=storagetm.Listening(["eth0"]))
    monkeypatch.setattr(transport, "prepare", lambda: None)
    service = made_service(machine, transport, inventory)
    steps = []

    def loop() -> None:
        steps.append(listening(nvmet))
        network.now = [NET4, NET6]
        (incoming,) = (s for s in service.sources if isinstance(s, storagetm.Incoming) and s.act())
        assert not service.exporter.outdated
        service.synchronise()
        steps.append(listening(nvmet))
        assert not incoming.act()
        assert any(isinstance(source, storagetm.Attendance) for source in service.sources)

    monkeypatch.setattr(service, "loop", loop)
    assert service.run() == 0
    assert steps[0] == {"192.0.2.1": (str(PORT4), 1)}
    assert steps[1] == {**steps[0], "2001:db8::1": (str(PORT6), 1)}
    assert listening(nvmet) == {}


def test_dry_run_shows_the_ports_of_the_addresses(nvmet: Nvmet, network: type[Addresses]) -> None:
    assert network.now
    machine = storagetm.Machine()
    inventory = storagetm.Inventory([storagetm.NamedDisks(["/dev/vdb"])], storagetm.Access((), READ_WRITE))
    inventory.check_named()
    transport = storagetm.NvmeTcp(machine, listening=storagetm.Listening(["eth0"], 4420))
    steps: list[dict[str, str]] = []
    exporter = storagetm.Exporter(transport.prefix, [transport], inventory, rehearse=steps.append)
    assert exporter.rehearse() == []
    written = {s["path"].rpartition("/")[2]: s["value"] for s in steps if "addr_" in s["path"]}
    assert written == {
        "addr_adrfam": "ipv4",
        "addr_trtype": "tcp",
        "addr_trsvcid": "4420",
        "addr_traddr": "192.0.2.1",
    }
    assert nvmet.calls == []


# Which addresses there are


def test_addresses_that_are_idle_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients stay at them: where a cable is out, and at those that are deprecated."""

    def attribute(kind: int, raw: bytes) -> bytes:
        return bytes(storagetm.rtattr(4 + len(raw), kind)) + raw + bytes(-len(raw) % 4)

    def address(index: int, raw: bytes, flags: int = 0, scope: int = 0) -> tuple[int, bytes]:
        family = V4 if len(raw) == 4 else V6
        head = storagetm.ifaddrmsg(ifa_family=family, ifa_flags=flags, ifa_scope=scope, ifa_index=index)
        return storagetm.RTM_NEWADDR, bytes(head) + attribute(storagetm.IFA_ADDRESS, raw)

    running = storagetm.IFF_UP | storagetm.IFF_RUNNING
    names = [("lo", running | storagetm.IFF_LOOPBACK), ("eth0", running), ("eth1", storagetm.IFF_UP)]
    links = [
        (
            storagetm.RTM_NEWLINK,
            bytes(storagetm.ifinfomsg(ifi_index=i, ifi_flags=flags))
            + attribute(storagetm.IFLA_IFNAME, name.encode() + b"\0"),
        )
        for i, (name, flags) in enumerate(names, 1)
    ]
    found = [
        address(1, bytes([127, 0, 0, 1]), scope=storagetm.RT_SCOPE_HOST),
        address(2, bytes([192, 0, 2, 1])),
        address(2, b"\x20\x01" + bytes(13) + b"\x01", storagetm.IFA_F_DEPRECATED),
        address(2, b"\x20\x01" + bytes(13) + b"\x02", storagetm.IFA_F_TENTATIVE),
        address(2, b"\x20\x01" + bytes(13) + b"\x03", storagetm.IFA_F_DADFAILED),
        address(3, bytes([198, 51, 100, 1])),
    ]

    def dump(kind: int, _: object) -> tuple[list[tuple[int, bytes]], bool]:
        return (links if kind == storagetm.RTM_GETLINK else found), True

    monkeypatch.setattr(storagetm.Network, "dump", staticmethod(dump))
    network = storagetm.Network()
    network.socket.close()
    assert [a.text for a in network.addresses()] == ["192.0.2.1"]
    assert sorted(a.scoped for a in network.held()) == [
        "127.0.0.1",
        "192.0.2.1",
        "198.51.100.1",
        "2001::1",
    ]
