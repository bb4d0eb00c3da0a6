# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD, with the kernel's own client on another machine, with libnbd and with QEMU."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storagetm import Code
from tests.harness import images as harness_images
from tests.harness.images import Image
from tests.harness.initrd_agent import with_agent
from tests.harness.machine import Disk, Machine, Nic, Wire
from tests.vm.conftest import LOGS, TOOL, BootMachine
from tests.vm.initiator import TARGET_ADDRESS
from tests.vm.nvmet import Service, exporting, left_over
from tests.vm.test_initrd import CLIENT_ADDRESS, DRACUT_OPTIONS, OPTIONS, fill

DISKS = ("/dev/sda", "/dev/vdb")  # the first is a small one, which is soon read
URL = f"nbd://{TARGET_ADDRESS}"


def digest(machine: Machine, node: str) -> str:
    return machine.run(["sha256sum", node]).stdout.split()[0]


def steady_screen(machine: Machine, pattern: str) -> list[str]:
    """What a screen shows twice in a row: an emulated serial line now and then doubles a character."""
    shown = [machine.wait_screen(pattern, redraw="x")]

    def steady() -> bool:
        machine.send_keys("x")
        time.sleep(1.5)
        shown.append(machine.screen())
        return shown[-1] == shown[-2] and bool(re.search(pattern, "\n".join(shown[-1]), re.MULTILINE))

    machine.wait_until(steady, timeout=120)
    return shown[-1]


@pytest.fixture(scope="module")
def target(target: Machine) -> Iterator[Machine]:
    """With something on the disk that is read, which other disks do not have."""
    target.run("head -c 16M /dev/urandom >/dev/sda && sync /dev/sda")
    yield target
    target.run("blkdiscard --zeroout /dev/sda")


@pytest.fixture
def disconnected(client: Machine) -> Iterator[Machine]:
    client.run("modprobe nbd nbds_max=4")
    yield client
    detach = "for n in 0 1 2 3; do nbd-client -d /dev/nbd$n; qemu-nbd -d /dev/nbd$n; done; rmmod nbd"
    client.run(detach, check=False)


def test_command_on_the_screen_attaches_a_disk(target: Machine, disconnected: Machine) -> None:
    """Read-only, beside NVMe/TCP; and a client that reads is no reason to wait at the stop."""
    client = disconnected
    with exporting(target, "--transport=nbd,nvme-tcp", "--console", *DISKS) as service:
        screen = steady_screen(target, r"^  nbd-client .*(\n.*)* -timeout")
        said = re.sub(r" *\\\n +", " ", "\n".join(line.rstrip() for line in screen))
        assert f"nbd://{TARGET_ADDRESS}/NAME" in re.sub(r"\n", " ", said)
        line, name = re.findall(r"^  (nbd-client .* -N (\S+) .*)", said, re.MULTILINE)[0]
        client.run(line)
        assert digest(client, "/dev/nbd0") == digest(target, DISKS[0])
        assert client.run("blockdev --getro /dev/nbd0").stdout == "1\n"
        assert client.run("echo x | dd of=/dev/nbd0 conv=fsync", check=False).returncode
        service.wait_output(rf"^Exporting .* as .*NBD export {re.escape(name)}")
        target.wait_screen(rf"{re.escape('192.0.2.')}\d+: since ", redraw="x")
        reader = client.start_process("dd if=/dev/nbd0 of=/dev/null iflag=direct bs=64k; true")
    assert reader.wait(120) == 0
    assert left_over(target) == []


def test_clients_of_two_transports_see_the_same(target: Machine, disconnected: Machine) -> None:
    """What is written to a snapshot over one is read over the other, and the disk has none of it."""
    client = disconnected
    before = digest(target, "/dev/sda")
    with exporting(target, "--transport=nvme-tcp,nbd", "--snapshot", "--clients=any", "/dev/sda") as service:
        name = service.wait_output(r"NBD export (\S+)").group(1)
        (command,) = service.wait_output(r"Attach all disks with: (nvme .*)").groups()
        client.run(f"modprobe nvme-tcp; {command}")
        client.run(f"nbd-client {TARGET_ADDRESS} 10809 /dev/nbd0 -N {name} -b 512")
        client.wait_run("ls /dev/nvme*n1")
        (node,) = client.run("ls /dev/nvme*n1").stdout.split()
        for number, (there, here) in enumerate(((node, "/dev/nbd0"), ("/dev/nbd0", node))):
            dd, place = "dd bs=4k status=none", number * 64
            client.run("head -c 65536 /dev/urandom >/run/data")
            client.run(f"{dd} if=/run/data of={there} seek={place} oflag=direct conv=fsync")
            client.run(f"{dd} if={here} skip={place} count=16 iflag=direct | cmp - /run/data")
        client.run("nvme disconnect-all; nbd-client -d /dev/nbd0")
    assert digest(target, "/dev/sda") == before


def test_disk_that_is_pulled_and_a_kill(target: Machine, disconnected: Machine) -> None:
    """The connections of a disk that is pulled end, and no others; after a kill all begin anew."""
    client = disconnected
    service = Service(target, ["--transport=nbd", "--all"])
    before = service.start()
    target.add_disk(Disk("pulled", serial="DISK-PULLED", size=8 << 20))
    pulled = service.wait_output(r"^Exporting '(/dev/\w+)' \([^)]*DISK-PULLED[^)]*\) as NBD export (\S+)")
    stays = service.wait_output(r"^Exporting '/dev/sda' .* as NBD export (\S+)")
    for number, name in enumerate((pulled.group(2), stays.group(1))):
        client.run(f"nbd-client {TARGET_ADDRESS} 10809 /dev/nbd{number} -N {name} -b 512")
    assert digest(client, "/dev/nbd0") == digest(target, pulled.group(1))
    target.remove_disk("pulled")
    client.wait_run("! dd if=/dev/nbd0 of=/dev/null count=1 iflag=direct")
    assert digest(client, "/dev/nbd1") == digest(target, "/dev/sda")
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit}")
    client.wait_run("! dd if=/dev/nbd1 of=/dev/null count=1 iflag=direct")
    again = Service(target, ["--transport=nbd", "--all"])
    again.start()
    client.run(f"nbd-client {TARGET_ADDRESS} 10809 /dev/nbd2 -N {stays.group(1)} -b 512")
    assert digest(client, "/dev/nbd2") == digest(target, "/dev/sda")
    assert again.stop() == before
    assert left_over(target) == []
    client.wait_run("! dd if=/dev/nbd2 of=/dev/null count=1 iflag=direct")


def names_of(service: Service) -> dict[str, str]:
    """Which disk has which name over NBD."""
    return dict(re.findall(r"^Exporting '(\S+)' .* as .*NBD export (\S+)", service.output, re.MULTILINE))


def test_tools_read_and_what_is_read_only_stays(target: Machine, client: Machine) -> None:
    """Of who is root there or not. Nothing that a client sends is written, and nothing below would do it."""
    before = [digest(target, node) for node in DISKS]
    with exporting(target, "--transport=nbd", *DISKS) as service:
        names = names_of(service)
        assert sorted(names) == sorted(DISKS)
        listed = json.loads(client.run(f"nbdinfo --json --list {URL}").stdout)["exports"]
        assert {e["export-name"] for e in listed} == set(names.values())
        assert all(e["is_read_only"] for e in listed)
        name = names["/dev/sda"]
        as_nobody = "cd /run/nobody && setpriv --reuid=65534 --regid=65534 --clear-groups"
        client.run("install -d -o 65534 /run/nobody")
        client.run(f"{as_nobody} nbdcopy --connections=4 {URL}/{name} copied")
        client.run(f"{as_nobody} qemu-img convert -f raw -O raw {URL}/{name} converted")
        assert {digest(client, f"/run/nobody/{path}") for path in ("copied", "converted")} == {before[0]}
        client.run("rm -r /run/nobody")
        for command in ("write -P 1 0 4k", "discard 0 64k", "write -z 0 64k"):
            words = ["qemu-io", "-f", "raw", "-c", command, f"{URL}/{name}"]
            assert client.run(words, check=False).returncode
        assert client.run(
            f"head -c 1M /dev/zero >/run/z; nbdcopy /run/z {URL}/{name}", check=False
        ).returncode
        # What the program has open would not take it either.
        held = target.run(f"ls -l /proc/{service.pid}/fd").stdout
        nodes = set(re.findall(r"-> (/dev/dm-\d+|/dev/mapper/storagetm\S+)", held))
        assert len(nodes) == len(DISKS)
        for node in nodes:
            dd = f"dd if=/dev/urandom of={node} bs=4k count=1 oflag=direct"
            assert "Input/output error" in target.run(dd, check=False).stderr
    assert [digest(target, node) for node in DISKS] == before


def test_disk_that_can_be_written_to_is_for_one_machine(target: Machine, client: Machine) -> None:
    before = digest(target, "/dev/sda")
    with exporting(target, "--transport=nbd", "--snapshot", "/dev/sda") as service:
        (name,) = names_of(service).values()
        write = ["qemu-io", "-f", "raw", "-c", "write -f -P 0xaa 4k 64k", "-c", "read -P 0xaa 4k 64k"]
        client.run([*write, f"{URL}/{name}"])
        holding = client.start_process(f"qemu-io -f raw {URL}/{name} -c 'read 0 4k' -c 'sleep 100000'")
        target.wait_run(f"! nbdinfo nbd://127.0.0.1/{name}")
        other = target.run(f"nbdinfo nbd://127.0.0.1/{name}", check=False)
        assert other.returncode
        assert "it is for 1 at a time, and taken" in other.stderr
        client.run([*write, f"{URL}/{name}"])
        holding.kill()
        holding.wait()
        target.wait_run(f"nbdinfo nbd://127.0.0.1/{name}")
    assert digest(target, "/dev/sda") == before


def test_kernel_client_over_a_restart(target: Machine, disconnected: Machine) -> None:
    """Even with -persist, nbd-client gives up while nothing listens, so that reads fail."""
    client = disconnected
    arguments = ["--transport=nbd", "--snapshot", "/dev/sda"]
    service = Service(target, arguments)
    before = service.start()
    (name,) = names_of(service).values()
    command = f"nbd-client {TARGET_ADDRESS} 10809 /dev/nbd0 -N {name} -b 512 -persist -timeout 60"
    client.run(command)
    client.run("dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct")
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit}")
    again = Service(target, arguments)
    again.start()
    client.wait_run("! dd if=/dev/nbd0 of=/dev/null count=1 iflag=direct")
    client.run("nbd-client -d /dev/nbd0", check=False)
    client.run(command)
    assert digest(client, "/dev/nbd0") == digest(target, "/dev/sda")
    client.run("nbd-client -d /dev/nbd0")
    assert again.stop() == before
    assert left_over(target) == []


def test_sector_that_cannot_be_read_is_an_error_of_its_own(target: Machine, client: Machine) -> None:
    """What is around it is read, over the same connection, and nothing is made up."""
    with exporting(target, "--transport=nbd", "--all") as service:
        target.add_disk(Disk("worn", serial="DISK-WORN", size=8 << 20, bad_sectors=(5001,)))
        name = service.wait_output(r"^Exporting .*DISK-WORN.* as .*NBD export (\S+)").group(1)
        reads = [
            ("0 2M", True),
            ("2M 1M", False),
            ("2560512 512", False),
            ("2560000 512", True),  # in the same page
            ("2561024 512", True),
            ("2500k 4k", False),
            ("2504k 4k", True),
            ("3M 1M", True),
            ("0 8M", False),
            ("4M 4M", True),
        ]
        words = [word for place, _ in reads for word in ("-c", f"read -P 0 {place}")]
        said = client.run(["qemu-io", "-r", "-f", "raw", *words, f"{URL}/{name}"], check=False)
        found = re.findall(r"^(read .*|.*failed.*)", said.stdout + said.stderr, re.MULTILINE)
        assert [
            not re.search("failed", line) for line in found if "bytes at" in line or "failed" in line
        ] == [good for _, good in reads], said.stdout + said.stderr
        assert client.run(f"nbdcopy {URL}/{name} null:", check=False).returncode
        target.remove_disk("worn")


def test_dry_run_tells_what_it_would_do(target: Machine) -> None:
    words = [TOOL, "--dry-run", "--transport=nbd", "/dev/sda"]
    lines = target.run(words).stdout.splitlines()
    (name,) = [line.split()[5] for line in lines if line.startswith("# as nbdkit --read-only -e ")]
    assert [line for line in lines if line.startswith("# listen at ")]
    assert not any("nvmet" in line for line in lines)
    steps = json.loads(target.run([*words, "--json"]).stdout)
    served = next(step for step in steps if step["step"] == "serve")
    assert served["path"] == f"nbd/{name}"
    paired = target.run([*words, "--pair"]).stdout
    assert "# listen at 0.0.0.0, TCP port 10809, TLS required" in paired.splitlines()
    assert left_over(target) == []


def test_who_has_the_code_is_let_in(target: Machine, disconnected: Machine) -> None:
    """With the commands on the screen, over TLS, and nobody else; a code outlives a kill and no stop."""
    client = disconnected
    arguments = ["--pair", "--transport=nbd", "--console", *DISKS]
    service = Service(target, arguments)
    before = service.start()
    screen = steady_screen(target, r"^  qemu-nbd (.*\n)*.*export=\S+ *$")
    assert all(len(line.rstrip()) < 80 for line in screen)
    text = "\n".join(line.rstrip() for line in screen)
    (code,) = re.findall(r"^Code: (\S+)$", text, re.MULTILINE)
    key = Code.parse(code).nbd_key().reveal().hex()
    typed = re.findall(
        r"^  ((?:install|>|modprobe|qemu-nbd).*)", re.sub(r" *\\\n +", " ", text), re.MULTILINE
    )
    assert [line.split()[0] for line in typed[:4]] == [
        "install",
        ">storagetm/keys.psk",
        "modprobe",
        "qemu-nbd",
    ]
    for line in typed[:4]:
        client.run(f"cd /run && {line}")
    assert digest(client, "/dev/nbd0") == digest(target, "/dev/sda")
    assert client.run("blockdev --getro /dev/nbd0; stat -c %a /run/storagetm/keys.psk").stdout == "1\n600\n"
    target.wait_screen(r"^  192\.0\.2\.2: since .*, encrypted \(TLS 1\.3, ", redraw="x")
    client.run("qemu-nbd -d /dev/nbd0")
    name = names_of(service)["/dev/sda"]
    hint = re.search(r"nbdcopy '(\S+)/NAME\?(\S+)'", text.replace("\n", " "))
    assert hint
    url = f"{hint[1]}/{name}?{hint[2]}"
    copied = client.run(f"cd /run && nbdcopy {shlex.quote(url)} - | sha256sum").stdout.split()[0]
    assert copied == digest(target, "/dev/sda")
    file = "storagetm/keys.psk"
    for wrong in (
        f"nbdinfo --list {URL}",
        f"nbdinfo {URL}/{name}",
        f"nbdcopy {URL}/{name} null:",
        f"nbd-client -l {TARGET_ADDRESS}",
        f"nbd-client {TARGET_ADDRESS} 10809 /dev/nbd1 -N {name}",
        f"sed s/:../:00/ {file} >wrong && nbdinfo '{url.replace(file, 'wrong')}'",
        f"sed s/^./x/ {file} >wrong && nbdinfo '{url.replace('//s', '//x').replace(file, 'wrong')}'",
        f"nbdinfo 'nbds://{TARGET_ADDRESS}/{name}'",
    ):
        assert client.run(f"cd /run && {wrong}", check=False).returncode, wrong
    # What anybody can read has none of it.
    said = service.output + target.run("cat /proc/*/cmdline; journalctl").stdout
    assert code not in said
    assert key not in said
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit}")
    again = Service(target, arguments)
    again.start()
    client.run(f"cd /run && nbdinfo {shlex.quote(url)}")
    assert again.stop() == before
    assert left_over(target) == []
    client.run("rm -r /run/storagetm /run/wrong")


def test_python_without_keys_is_refused(boot: BootMachine) -> None:
    """As Debian 12's: nothing is exported then, by no transport."""
    machine = boot("old", "bookworm", disks=[Disk("alpha", serial="DISK-ALPHA")])
    machine.put("/run/code", "k7fm-2qxd-9wtr-4hcn\n", mode=0o600)
    words = [TOOL, "--code-file=/run/code", "--transport=nbd", "--all"]
    done = machine.run(words, check=False)
    assert done.returncode == 1
    assert re.search(r"Over NBD nobody can be kept out here: Python 3\.11\S* has no TLS", done.stderr)
    assert machine.run("ss -tln").stdout.count(":10809") == 0
    with exporting(machine, "--transport=nbd", "--all"):
        machine.run("nbdinfo --list nbd://127.0.0.1")


def test_initrd_serves_disks(images: dict[str, Image], standard: str, tmp_path: Path) -> None:
    """By the kernel command line alone."""
    image = images[standard]
    initrd = with_agent(image, harness_images.initrd(image, *DRACUT_OPTIONS), tmp_path / "initrd.img")
    content = fill(tmp_path / "disk", 8 << 20)
    wire = Wire()
    target = Machine(
        "nbd-initrd",
        image,
        initrd=initrd,
        machine_id="",
        kernel_options=(*OPTIONS, "rd.storagetm.transport=nbd"),
        disks=[Disk("virtio", path=tmp_path / "disk")],
        nics=[Nic(wire, 0)],
        log_directory=LOGS,
    )
    client = Machine("nbd-client", image, nics=[Nic(wire, 1)], log_directory=LOGS)
    with target, client:
        target.start()
        client.start()
        client.wait_boot()
        client.run(f"ip link set eth0 up && ip address add {CLIENT_ADDRESS} dev eth0 && modprobe nbd")
        screen = steady_screen(target, r"^  nbd-client 169\.254\..*(\n.*)*-timeout")
        said = re.sub(r" *\\\n +", " ", "\n".join(line.rstrip() for line in screen))
        (line,) = re.findall(r"^  (nbd-client .*)", said, re.MULTILINE)
        client.run(line)
        script = "dd if=/dev/nbd0 bs=1M iflag=direct status=none | sha256sum"
        assert client.run(script).stdout.split()[0] == content
        client.run("nbd-client -d /dev/nbd0")
