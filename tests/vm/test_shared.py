# SPDX-License-Identifier: LGPL-2.1-or-later
"""All disks as namespaces of one subsystem: one attachment, in which disks come and go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.machine import MIB, Disk, Machine, Nic, Wire
from tests.vm import nvmet
from tests.vm.conftest import ON_OLDER, TOOL, BootMachine, prepare
from tests.vm.disks import hang, throttle, wait_name
from tests.vm.initiator import TARGET_ADDRESS, Reader, attached, namespaces, write_content
from tests.vm.nvmet import NVMET, Service, exporting

NQN = "quux"
PORT = 16858  # that follows from it
SHARED = ["--subsystem=shared", f"--nqn={NQN}"]


@pytest.fixture(autouse=True)
def nothing_left(target: Machine) -> Iterator[None]:
    """Nothing of the tool's is left."""
    yield
    target.wait_run('! dmsetup ls 2>/dev/null | grep storagetm-; test -z "$(losetup -n -O NAME)"')
    assert nvmet.left_over(target) == []


def numbers(target: Machine) -> dict[str, int]:
    """The numbers of the namespaces, by the disks' nodes."""
    tree = nvmet.tree(target)
    return {
        value.split("\n")[0]: int(path.split("/")[3])
        for path, value in tree.items()
        if path.startswith(f"subsystems/{NQN}/namespaces/")
        and path.endswith("/device_path")
        and tree[path.replace("device_path", "enable")] == "1\n"
    }


def test_client_sees_disks_come_and_go(target: Machine, client: Machine, tmp_path: Path) -> None:
    """An attached client sees it. Numbers last as long as a disk is here, and none is given again."""
    path = tmp_path / "guest.raw"
    write_content(path, 1, 4 * MIB)
    with exporting(target, *SHARED, "--all") as service:
        before = numbers(target)
        assert len(set(before.values())) == len(before)
        with attached(client, NQN, PORT) as attachment:
            assert namespaces(client, NQN).keys() == set(before.values())
            target.add_disk(Disk("guest", path=path, serial="DISK-GUEST"))
            node = f"/dev/{wait_name(target, 'DISK-GUEST')}"
            number = target.wait_until(lambda: numbers(target).get(node))
            client.wait_until(lambda: number in namespaces(client, NQN))
            assert numbers(target) == {**before, node: number}
            client.wait_until(lambda: namespaces(client, NQN)[number][3] == "1")
            theirs = namespaces(client, NQN)[number][4]
            read = client.run(f"dd if={theirs} bs=1M iflag=direct status=none | sha256sum").stdout
            assert read == target.run(f"sha256sum <{node}").stdout

            target.remove_disk("guest", timeout=120)
            client.wait_until(lambda: number not in namespaces(client, NQN))
            assert numbers(target) == before
            # Another one does not get its number, nor does what says that it is the same disk.
            target.add_disk(Disk("other", serial="DISK-OTHER"))
            other = f"/dev/{wait_name(target, 'DISK-OTHER')}"
            target.wait_until(lambda: other in numbers(target))
            target.add_disk(Disk("guest", path=path, serial="DISK-GUEST"))
            client.wait_until(lambda: len(namespaces(client, NQN)) == len(before) + 2)
            after = numbers(target)
            assert number not in after.values()
            assert before.items() < after.items()
            seen = namespaces(client, NQN)
            target.remove_disk("other", timeout=120)
            client.wait_until(lambda: after[other] not in namespaces(client, NQN))
            del seen[after.pop(other)]
            attachment.check()
        assert [line for priority, line in service.journal() if priority < 5] == []
    try:
        # And so it is after a stop, whoever comes first.
        with exporting(target, *SHARED, "--all"):
            assert numbers(target) == after
            with attached(client, NQN, PORT):
                again = namespaces(client, NQN)
                assert {n: f[:3] for n, f in again.items()} == {n: f[:3] for n, f in seen.items()}
    finally:
        target.remove_disk("guest", timeout=120)
    # Each disk is told apart.
    assert len({fields[0] for fields in seen.values()}) == len(seen)
    assert len({fields[1] for fields in seen.values()}) == len(seen)


def test_reader_does_not_notice_a_crash(target: Machine, client: Machine, tmp_path: Path) -> None:
    """Taken over after SIGKILL, with a client that reads all the time and notices nothing."""
    path = tmp_path / "read.raw"
    write_content(path, 3, 4 * MIB)
    target.add_disk(Disk("read", path=path, serial="DISK-READ"))
    node = f"/dev/{wait_name(target, 'DISK-READ')}"
    service = Service(target, [*SHARED, "--all"])
    service.start()
    inodes = f"cd {NVMET} && ls -id subsystems/* subsystems/*/namespaces/* ports/*"
    try:
        live, before = target.run(inodes).stdout, numbers(target)
        with attached(client, NQN, PORT) as attachment:
            theirs = namespaces(client, NQN)[before[node]][4]
            reader = Reader(client, theirs, 3, 4 * MIB)
            for _ in range(3):
                reader.wait_progress()
                service.kill("KILL")
                target.wait_run(f"systemctl is-failed --quiet {service.unit}")
                target.run(f"systemctl reset-failed {service.unit}")
                reader.wait_progress()
                service = Service(target, [*SHARED, "--all"])
                service.start()
            assert (target.run(inodes).stdout, numbers(target)) == (live, before)
            reader.wait_progress()
            # A disk that goes while nobody looks.
            service.kill("KILL")
            target.wait_run(f"systemctl is-failed --quiet {service.unit}")
            target.run(f"systemctl reset-failed {service.unit}")
            print(reader.stop())
            attachment.check()
            target.remove_disk("read", timeout=120)
            service = Service(target, [*SHARED, "--all"])
            service.start()
            del before[node]
            assert numbers(target) == before
            client.wait_until(lambda: namespaces(client, NQN).keys() == set(before.values()))
    finally:
        assert service.stop() == set()


def test_tool_goes_on_while_a_pulled_disk_owes_an_answer(target: Machine, client: Machine) -> None:
    """While a disk that was pulled owes an answer to a client, the tool goes on, and others wait for it."""
    target.add_disk(Disk("doomed", serial="DISK-DOOMED"))
    doomed = f"/dev/{wait_name(target, 'DISK-DOOMED')}"
    target.run("udevadm settle --timeout=120")
    with exporting(target, *SHARED, "--all") as service:
        before = numbers(target)
        with attached(client, NQN, PORT):
            theirs = namespaces(client, NQN)[before[doomed]][4]
            busy = hang(target, client, "doomed", Path(doomed).name, theirs)
            target.qmp.call("device_del", id="doomed-device")
            service.wait_output(f"^No longer: Exporting '{doomed}'")
            # From here on, nothing may look into that part of configfs, where the kernel would have it wait.
            target.add_disk(Disk("other", serial="DISK-OTHER", bus="scsi"))
            other = f"/dev/{wait_name(target, 'DISK-OTHER')}"
            service.wait_output(f"^Not exporting '{other}': the kernel is still taking away what was there")
            throttle(target, "doomed", 0)
            target.qmp.wait_event("DEVICE_DELETED", 120, device="doomed-device")
            target.qmp.call("blockdev-del", node_name="doomed")
            service.wait_output(f"^Exporting '{other}'")
            del before[doomed]
            target.wait_until(lambda: numbers(target).keys() == {*before, other})
            after = numbers(target)
            client.wait_until(lambda: namespaces(client, NQN).keys() == set(after.values()))
            assert busy.wait() == 1  # the disk that it read is gone
            assert before.items() < after.items()
        target.remove_disk("other", timeout=120)
        target.wait_until(lambda: numbers(target) == before)
        assert [line for priority, line in service.journal() if priority < 6] == []


def test_each_namespace_has_its_own_access(target: Machine, client: Machine, tmp_path: Path) -> None:
    """Each namespace has its own kind of access."""
    contents = {}
    for name in ("one", "two", "three"):
        write_content(tmp_path / name, 4, 2 * MIB)
        target.add_disk(Disk(name, path=tmp_path / name, serial=f"DISK-{name}"))
    nodes = {name: f"/dev/{wait_name(target, f'DISK-{name}')}" for name in ("one", "two", "three")}
    try:
        rules = ["--access=DISK-two:snapshot", "--access=DISK-three:read-write"]
        with exporting(target, *SHARED, *rules, *nodes.values()) as service:
            assert "1 read-write" in service.show("StatusText")
            with attached(client, NQN, PORT) as attachment:
                found, order = namespaces(client, NQN), numbers(target)
                for name, node in nodes.items():
                    fields = found[order[node]]
                    assert fields[3] == ("1" if name == "one" else "0")
                    write = f"dd if=/dev/zero of={fields[4]} bs=64k count=1 oflag=direct conv=fsync"
                    assert (client.run(write, check=False).returncode == 0) == (name != "one")
                    contents[name] = client.run(
                        f"dd if={fields[4]} bs=64k count=1 iflag=direct"
                    ).stdout_bytes
                attachment.check()
        first = {name: (tmp_path / name).read_bytes()[: 64 << 10] for name in nodes}
        assert first["one"] == first["two"] == contents["one"] != bytes(64 << 10)
        assert first["three"] == contents["two"] == contents["three"] == bytes(64 << 10)
    finally:
        for name in nodes:
            target.remove_disk(name, timeout=120)


def test_other_kind_of_subsystem_takes_over(target: Machine) -> None:
    """The other kind of subsystem, started after a SIGKILL, takes the place of the one that is there."""
    for first, second in (("shared", "per-disk"), ("per-disk", "shared")):
        services = [
            Service(target, [f"--subsystem={kind}", f"--nqn={NQN}", "/dev/vdb", "/dev/vdc"])
            for kind in (first, second)
        ]
        services[0].start()
        services[0].kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {services[0].unit}")
        target.run(f"systemctl reset-failed {services[0].unit}")
        services[1].start()
        found = {n for n in nvmet.names(target) if n.startswith("subsystems/")}
        if str(second) == "shared":
            assert found == {f"subsystems/{NQN}"}
            assert numbers(target).keys() == {"/dev/vdb", "/dev/vdc"}
        else:
            assert found == {f"subsystems/{NQN}.vdb", f"subsystems/{NQN}.vdc"}
        assert services[1].stop() == set()


def test_subsystem_of_another_program_is_left_alone(target: Machine) -> None:
    """Another program's subsystem of this name is left alone."""
    target.run(f"modprobe nvmet-tcp; mkdir -p {NVMET}/subsystems/{NQN}/namespaces/7")
    try:
        before = nvmet.tree(target)
        refused = target.run([TOOL, *SHARED, "/dev/vdb"], check=False)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1, refused.stderr
        assert f"another program made '{NQN}'; stop it, or give another --nqn" in refused.stderr
        assert nvmet.tree(target) == before
    finally:
        target.run(f"cd {NVMET}/subsystems && rmdir {NQN}/namespaces/7 {NQN}")


@pytest.mark.parametrize("release", ON_OLDER)
def test_20_disks_are_attached_at_once_on_each_release(boot: BootMachine, tool: Path, release: str) -> None:
    """On the kernels of both releases, with 20 disks that a client of the same one attaches at once."""
    wire = Wire()
    disks = [Disk(f"disk{i}", serial=f"DISK-{i}") for i in range(20)]
    target = boot("target2", release, wait=False, disks=disks, nics=[Nic(wire, 0)])
    client = boot("client2", release, wait=False, nics=[Nic(wire, 1)])
    for number, machine in enumerate((target, client), 1):
        machine.wait_boot()
        prepare(machine, tool, number)
    with exporting(target, *SHARED, "--all") as service:
        ours = numbers(target)
        assert len(ours) == 20
        assert f"nvme connect -t tcp -a {TARGET_ADDRESS} -s {PORT} -n {NQN}" in service.output
        client.run(f"modprobe nvme-tcp; nvme connect -t tcp -a {TARGET_ADDRESS} -s {PORT} -n {NQN}")
        client.wait_until(lambda: len(namespaces(client, NQN)) == 20)
        client.wait_until(lambda: all(f[3] == "1" for f in namespaces(client, NQN).values()))
        # Discovery shows the one subsystem, and connect-all attaches it.
        client.run(
            f"nvme disconnect-all; nvme connect-all -t tcp -a {TARGET_ADDRESS} -s {PORT}", timeout=180
        )
        client.wait_until(lambda: namespaces(client, NQN).keys() == set(ours.values()))
        listed = json.loads(target.run([TOOL, "--list-devices", "--json"]).stdout)
        assert {d["node"] for d in listed if d["export"]} == ours.keys()
        client.run("nvme disconnect-all")
