# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where clients may come in, with a real kernel: --listen= and --port=, and addresses that come and go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.machine import Disk, Machine, Nic, Result, Wire
from tests.vm.conftest import BootMachine, prepare
from tests.vm.initiator import TARGET_ADDRESS, attached
from tests.vm.nvmet import NVMET, Service, exporting
from tests.vm.test_addresses import link_local

PORT, PORT6 = 16858, 29423  # of the prefix "quux"
NQN = "quux.vdb"
SECOND = "198.51.100.1"  # another address of the target, in a network that the client is in, too


@pytest.fixture(autouse=True)
def second_network(target: Machine, client: Machine) -> Iterator[None]:
    target.run(f"ip address add {SECOND}/24 dev eth0")
    client.run("ip address add 198.51.100.2/24 dev eth0; modprobe nvme-tcp")
    yield
    client.run("nvme disconnect-all; ip address delete 198.51.100.2/24 dev eth0")
    target.run(f"ip address delete {SECOND}/24 dev eth0", check=False)


def listening(machine: Machine, *ports: int) -> set[str]:
    """Where the kernel listens at these TCP ports."""
    found = machine.run("ss --no-header --tcp --listening --numeric").stdout.splitlines()
    places = [line.split()[3].rpartition(":") for line in found]
    return {place[0] for place in places if int(place[2]) in (ports or (PORT, PORT6))}


def connect(client: Machine, address: str, port: int = PORT, *, nqn: str = NQN) -> Result:
    interface = "-f eth0" if address.startswith("fe80") else ""
    return client.run(f"nvme connect -t tcp -a {address} -s {port} -n {nqn} {interface}", check=False)


def wait_listening(machine: Machine, expected: set[str], *ports: int) -> None:
    machine.wait_until(lambda: listening(machine, *ports) == expected)


def test_nothing_listens_but_where_it_is_asked_to(target: Machine, client: Machine) -> None:
    with exporting(target, "--nqn=quux", f"--listen={TARGET_ADDRESS}", "/dev/vdb") as service:
        assert listening(target) == {TARGET_ADDRESS}
        assert connect(client, SECOND).returncode != 0
        assert connect(client, link_local(target), PORT6).returncode != 0
        with attached(client, NQN, PORT):
            pass
        # All other lines would be of no use.
        assert re.findall("^Attach all .*", service.output, re.MULTILINE) == [
            f"Attach all disks with: nvme connect-all -t tcp -a {TARGET_ADDRESS} -s {PORT}"
        ]
        target.wait_until(lambda: service.show("StatusText") == "Exporting 1 disk at 1 address.")
    with exporting(target, "--nqn=quux", "/dev/vdb"):
        assert listening(target) == {"0.0.0.0", "*"}  # [::], which takes IPv4, too


def test_interface_is_followed_and_clients_elsewhere_notice_nothing(
    target: Machine, client: Machine
) -> None:
    local = link_local(target)
    target.run(f"ip address delete {SECOND}/24 dev eth0")
    everywhere = {TARGET_ADDRESS, f"[{local}]%eth0"}
    with exporting(target, "--nqn=quux", "--listen=eth0", "--read-only", "/dev/vdb") as service:
        assert listening(target) == everywhere
        # A link-local address, by one disk's command.
        assert connect(client, local, PORT6).returncode == 0
        client.run(f"nvme disconnect -n {NQN}")
        with attached(client, NQN, PORT) as attachment:
            target.run(f"ip address add {SECOND}/24 dev eth0")
            wait_listening(target, {*everywhere, SECOND})
            number = target.run(f"grep -lx {SECOND} {NVMET}/ports/*/addr_traddr").stdout
            service.wait_output(f"^Attach all disks with: nvme connect-all -t tcp -a {SECOND} -s {PORT}$")
            assert connect(client, SECOND, nqn=NQN).returncode == 0
            target.run(f"ip address delete {SECOND}/24 dev eth0")
            wait_listening(target, everywhere)
            # It comes back under the same number, and its client with it.
            target.run(f"ip address add {SECOND}/24 dev eth0")
            wait_listening(target, {*everywhere, SECOND})
            assert target.run(f"grep -lx {SECOND} {NVMET}/ports/*/addr_traddr").stdout == number
            # A cable that is out takes no address away.
            target.set_link(False)
            target.wait_run("ip link show dev eth0 | grep NO-CARRIER")
            service.wait_output("^The network is down: ")
            assert listening(target) == {*everywhere, SECOND}
            target.set_link(True)
            attachment.check()


def test_what_is_not_there_is_waited_for(target: Machine) -> None:
    with exporting(target, "--nqn=quux", "--listen=late0", "--listen=203.0.113.9", "/dev/vdb") as service:
        assert listening(target) == set()
        why = "203.0.113.9 is no address of this machine yet, and late0 has no address yet"
        service.wait_output(f"^{why}: no disk can be attached yet$")
        assert service.show("StatusText") == f"Exporting 1 disk at no address ({why})."
        target.run("ip link add late0 type dummy; ip link set late0 up")
        try:
            target.run("ip address add 203.0.113.9/24 dev late0")
            target.wait_until(lambda: "203.0.113.9" in listening(target))
            local = link_local(target, "late0")
            wait_listening(target, {"203.0.113.9", f"[{local}]%late0"})
            assert service.show("StatusText") == "Exporting 1 disk at 2 addresses."
        finally:
            target.run("ip link delete late0")
        wait_listening(target, set())


def test_restart_after_a_crash_takes_the_ports_over(target: Machine, client: Machine) -> None:
    arguments = ["--nqn=quux", "--listen=eth0", "/dev/vdb"]
    first, second = Service(target, arguments), Service(target, arguments)
    before = first.start()
    with attached(client, NQN, PORT) as attachment:
        numbers = target.run(f"grep . {NVMET}/ports/*/addr_traddr").stdout
        places = listening(target)
        first.kill("KILL")
        target.wait_run(f"systemctl is-failed {first.unit}")
        target.run(f"systemctl reset-failed {first.unit}; ip address delete {SECOND}/24 dev eth0")
        second.start()
        assert listening(target) == places - {SECOND}
        left = [line for line in numbers.splitlines() if not line.endswith(f":{SECOND}")]
        assert target.run(f"grep . {NVMET}/ports/*/addr_traddr").stdout.splitlines() == left
        attachment.check()
    assert second.stop() == before


LISTENER = """
import socket, time
s = socket.create_server(("0.0.0.0", 4420))
print("listening", flush=True)
time.sleep(1000)
"""


def test_port_is_the_same_for_both_families_and_never_another(target: Machine, client: Machine) -> None:
    local = link_local(target)
    with exporting(target, "--nqn=quux", "--port=4420", "/dev/vdb"):
        assert listening(target, 4420) == {"0.0.0.0", f"[{local}]%eth0"}
        assert listening(target) == set()
        client.run(f"nvme connect-all -t tcp -a {TARGET_ADDRESS} -s 4420")
        client.run(f"grep -x {NQN} /sys/class/nvme/nvme*/subsysnqn && nvme disconnect-all")
        assert connect(client, local, 4420).returncode == 0
        client.run("nvme disconnect-all")
    other = target.start_process(["python3", "-c", LISTENER])
    other.wait_output("listening")
    try:
        with exporting(target, "--nqn=quux", "--port=4420", "/dev/vdb") as service:
            said = "TCP port 4420 is taken at 0.0.0.0 by another program: no disk is exported there"
            advice = "stop that and start storagetm again, or give another --port"
            assert (4, f"{said}; {advice}") in service.journal()
            assert listening(target, 4420) == {"0.0.0.0", f"[{local}]%eth0"}
            assert connect(client, local, 4420).returncode == 0
            assert connect(client, TARGET_ADDRESS, 4420).returncode != 0
            client.run("nvme disconnect-all")
    finally:
        other.kill()
        other.wait()


def test_own_seat_is_taken_at_the_only_address_and_is_no_client(boot: BootMachine, tool: Path) -> None:
    """Linux 6.1 makes room for two, and the second place is ours; nobody can come in at 127.0.0.1."""
    wire = Wire()
    target = boot(
        "seated", "bookworm", wait=False, disks=[Disk("alpha", serial="DISK-ALPHA")], nics=[Nic(wire, 0)]
    )
    client = boot("asking", "bookworm", wait=False, nics=[Nic(wire, 1)])
    for number, machine in enumerate((target, client), 1):
        machine.wait_boot()
        prepare(machine, tool, number)
    client.run("modprobe nvme-tcp")
    local = link_local(target)
    for address, port in ((TARGET_ADDRESS, PORT), (f"{local}%eth0", PORT6)):
        arguments = ["--nqn=quux", "--read-write", f"--listen={address}", "/dev/vdb"]
        with exporting(target, *arguments) as service:
            own = target.run(f"ss --no-header -tn state established '( sport = {port} )'").stdout
            assert len(own.splitlines()) == 1
            assert "Attached from" not in service.output
            assert service.show("StatusText") == "Exporting 1 disk (1 read-write) at 1 address."
            plain = address.partition("%")[0]
            assert connect(client, plain, port, nqn="quux.vdb").returncode == 0
            client.wait_run("test -b /dev/nvme0n1")
            # Another host; nvme-cli 2.4 would take it for the same one, and ask nobody.
            scope = ",host_iface=eth0" if "%" in address else ""
            host = "0f0f0f0f-0000-4000-8000-000000000001"
            asked = (
                f"transport=tcp,traddr={plain},trsvcid={port},nqn=quux.vdb,hostid={host},"
                f"hostnqn=nqn.2014-08.org.nvmexpress:uuid:{host},duplicate_connect{scope}"
            )
            assert client.run(f"echo {asked} > /dev/nvme-fabrics", check=False).returncode != 0
            service.wait_output("^Attached from .*; what can be written to is for 1 client at a time$")
            client.run("nvme disconnect-all")
