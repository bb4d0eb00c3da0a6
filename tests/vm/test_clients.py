# SPDX-License-Identifier: LGPL-2.1-or-later
"""One client at a time has a disk that it can write to, and the same one is let in again."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.harness.machine import Machine, Result
from tests.vm.initiator import TARGET_ADDRESS, attached
from tests.vm.nvmet import Service, exporting
from tests.vm.test_addresses import on_console

PORT, PORT6 = 16858, 29423
NQN = "quux.vdb"


@pytest.fixture(autouse=True)
def detached(client: Machine) -> Iterator[None]:
    yield
    client.set_link(True)
    client.run("nvme disconnect-all")


def connect(client: Machine, nqn: str = NQN, *, where: str = "", host: bool = False) -> Result:
    """Attaches once more, perhaps as another host, with the kernel's usual patience of 5 s."""
    other = str(uuid.uuid4())
    options = f"--hostid {other} --hostnqn nqn.2014-08.org.nvmexpress:uuid:{other}" if host else ""
    where = where or f"-a {TARGET_ADDRESS} -s {PORT}"
    # As another host, the same machine may attach the same subsystem twice.
    return client.run(f"nvme connect -t tcp {where} -n {nqn} {options} --duplicate-connect", check=False)


def controllers(client: Machine) -> list[str]:
    return client.run("cat /sys/class/nvme/nvme*/state 2>/dev/null", check=False).stdout.split()


def connections(target: Machine) -> str:
    return target.run(f"ss --no-header -tan '( sport = {PORT} or sport = {PORT6} )'").stdout


def time_until_attached(client: Machine, where: str) -> float:
    """Seconds until it is let in again, tried all the time."""
    began = time.monotonic()
    client.wait_until(lambda: connect(client, where=where).returncode == 0, 120)
    return time.monotonic() - began


def wait_line(service: Service, pattern: str) -> None:
    service.machine.wait_until(lambda: re.search(pattern, service.output, re.MULTILINE))


SAFE = "No client is attached: it is safe to switch this machine off."


def wait_status(service: Service, expected: str) -> None:
    """No key is pressed meanwhile, after which all would be shown anew."""
    service.machine.wait_until(lambda: service.show("StatusText") == expected)


def shown(target: Machine) -> str:
    """What is on the serial console, a blank between two lines."""
    return " ".join(" ".join(target.screen()).split())


def test_screen_says_whether_the_machine_can_be_switched_off(target: Machine, client: Machine) -> None:
    """Soon after a client has come, of which the kernel tells nobody, and when it has gone."""
    alone = "Exporting 2 disks at 2 addresses."
    with on_console(target, "--nqn=quux", "/dev/vdb", "/dev/vdc") as service:
        wait_status(service, alone)
        target.wait_until(lambda: SAFE in shown(target))
        with attached(client, NQN, PORT):
            wait_status(service, "Exporting 2 disks at 2 addresses to 1 client.")
            first = target.wait_until(
                lambda: re.search(
                    r"192.0.2.2: since (\d\d:\d\d), (\d+) conn\S+, not encrypted", shown(target)
                )
            )
            assert "1 client is attached: detach the disks there before you switch" in shown(target)
            assert SAFE not in shown(target)
            ours = [line for line in connections(target).splitlines() if line.startswith("ESTAB")]
            assert int(first[2]) == len(ours) > 1
            # Another disk is more connections of the same client; over IPv6 it has another address.
            local = target.run("ip -6 -o address show dev eth0 scope link | grep -o 'fe80::[^/]*'").stdout
            assert connect(client, "quux.vdc", where=f"-a {local.strip()}%eth0 -s {PORT6}").returncode == 0
            wait_status(service, "Exporting 2 disks at 2 addresses to 2 clients.")
            target.wait_until(lambda: "2 clients are attached: detach" in shown(target))
            assert f"192.0.2.2: since {first[1]}, {first[2]} " in shown(target)
            client.run("nvme disconnect -n quux.vdc")
            wait_status(service, "Exporting 2 disks at 2 addresses to 1 client.")
        wait_status(service, alone)
        target.wait_until(lambda: SAFE in shown(target))


@pytest.mark.parametrize("access", ["read-write", "snapshot"])
def test_second_client_is_turned_away(target: Machine, client: Machine, access: str) -> None:
    """And the first one notices nothing; the screen says who has the disk."""
    with exporting(target, "--nqn=quux", f"--{access}", "/dev/vdb", "/dev/vdc") as service:
        with attached(client, NQN, PORT) as attachment:
            assert connect(client, host=True).returncode != 0
            assert connect(client).returncode != 0
            # Another disk has controllers' IDs of its own.
            assert connect(client, "quux.vdc", host=True).returncode == 0
            assert connect(client, "quux.vdc", host=True).returncode != 0
            wait_line(service, "^Attached from 192.0.2.2; what can be written to is for 1 client at a time$")
            client.run(f"dd if={attachment.node} of={attachment.node} bs=64k count=16 conv=fsync")
            attachment.check()
            client.run("nvme disconnect -n quux.vdc")
        # It has gone, and the next one gets in.
        wait_line(service, "^No longer: Attached from 192.0.2.2; ")
        assert connect(client, host=True).returncode == 0


def test_read_only_disks_are_for_all(target: Machine, client: Machine) -> None:
    with exporting(target, "--nqn=quux", "/dev/vdb"):
        assert [connect(client, host=True).returncode for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(("clients", "expected"), [("2", 2), ("any", 3)])
def test_as_many_clients_come_in_as_asked_for(
    target: Machine, client: Machine, clients: str, expected: int
) -> None:
    with exporting(target, "--nqn=quux", "--read-write", f"--clients={clients}", "/dev/vdb"):
        codes = [connect(client, host=True).returncode for _ in range(3)]
        assert [code == 0 for code in codes] == [True] * expected + [False] * (3 - expected)


def test_shared_subsystem_that_can_be_written_is_for_one_client(target: Machine, client: Machine) -> None:
    """As soon as one of its disks can be written to."""
    arguments = ["--nqn=quux", "--subsystem=shared", "--access=/dev/vdc:read-write", "/dev/vdb", "/dev/vdc"]
    with exporting(target, *arguments):
        codes = [connect(client, "quux", host=True).returncode for _ in range(2)]
        assert codes[0] == 0
        assert codes[1] != 0
        # A disk that comes later, read-only, is protected although our own connection is turned away, too.
    with exporting(target, *arguments[:2], *arguments[3:]):
        assert [connect(client, "quux", host=True).returncode for _ in range(2)] == [0, 0]


def test_same_client_may_return(target: Machine, client: Machine) -> None:
    """After a pulled cable by itself, and after a crash at once or in a few seconds, over either family."""
    link_local = re.search(r"inet6 (fe80:\S+)/", target.run("ip -6 address show dev eth0 scope link").stdout)
    assert link_local
    ways = {"IPv4": f"-a {TARGET_ADDRESS} -s {PORT}", "IPv6": f"-a {link_local[1]} -s {PORT6} -f eth0"}
    ways["IPv6"] = f"-a {link_local[1]}%eth0 -s {PORT6}"
    took = {}
    with exporting(target, "--nqn=quux", "--read-write", "/dev/vdb"):
        client.run("modprobe nvme-tcp")
        assert connect(client, where=ways["IPv4"]).returncode == 0
        client.wait_run("test -b /dev/nvme0n1")
        # The cable: long enough that both sides have noticed.
        client.set_link(False)
        client.wait_until(lambda: controllers(client) != ["live"], 60)
        # Or else the target may still have the old connection when the client comes again, 10 s later.
        target.wait_until(lambda: "ESTAB" not in connections(target), 60)
        client.set_link(True)
        began = time.monotonic()
        client.wait_until(lambda: controllers(client) == ["live"], 60)
        took["cable"] = time.monotonic() - began
        client.run("dd if=/dev/nvme0n1 of=/dev/nvme0n1 bs=64k count=4 conv=fsync")
        # A crash: nobody tells the target that the client has gone.
        for way in ("IPv6", "IPv4"):
            client.set_link(False)
            client.run("nvme disconnect -n quux.vdb")
            client.set_link(True)
            took[way] = time_until_attached(client, ways[way])
    print(f"Attached again, in seconds: {took}")
    assert max(took["IPv4"], took["IPv6"]) < 60
