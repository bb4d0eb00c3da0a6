# SPDX-License-Identifier: LGPL-2.1-or-later
"""Storage target mode from an initrd: two machines, one wire, and nothing configured on it.

The client is of another release than the target, so that each is seen in both roles. Whatever it does, it
does with a command off the target's screen. The initrd is one for this host (`dracut --hostonly`), but the
host that it is made on isn't the machine that boots it: it has to bring drivers for what dracut saw nothing
of, and no command line tells it its machine ID.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import random
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import images as harness_images
from tests.harness.images import SID, Image
from tests.harness.initrd_agent import with_agent
from tests.harness.machine import MIB, Disk, Machine, Nic, Wire
from tests.vm.conftest import LOGS, ON_NEWER, ONCE_FOR_EACH
from tests.vm.initiator import namespaces

# Of dracut. The driver and the shell are the agent's.
DRACUT_OPTIONS = ("--hostonly", "--add-drivers", "virtio_console", "--install", "bash")
OPTIONS = ("rd.systemd.unit=storage-target-mode.target", "ip=link-local")
# Disks that come later may be written to, what is written to one is forgotten, the rest is read-only.
ACCESS = ("rd.storagetm.access=/dev/vd[bc]:read-write", '"rd.storagetm.access=QEMU HARDDISK:snapshot"')

# What is exported under the machine ID that the initrd is made with.
PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"
PORTS = {"ipv4": 59936, "ipv6": 36681}

# What the image knows of the hardware of another machine, that it was made on, and the UUID of this one's.
OTHER_MACHINE = {"/etc/storagetm-image": f"MACHINE_ID={harness_images.MACHINE_ID}\nUUID={'0' * 64}\n"}
FIRMWARE_UUID = "a3b5c7d9-0123-4567-89ab-cdef00112233"

DROP_IN = "/etc/systemd/system/storagetm.service.d/test.conf"

# Any link-local address does that isn't the target's.
CLIENT_ADDRESS = "169.254.10.10/16"

# Without dd and sha256sum, which an initrd does not have.
DIGEST_SCRIPT = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"

# Prints the NQN's last part and the disk of each NVMe subsystem that is attached.
ATTACHED_SCRIPT = """
for disk in /sys/class/nvme-subsystem/*/nvme*n1; do
    [ -e "$disk" ] && nqn=$(cat "${disk%/*}/subsysnqn") && echo "${nqn##*.} /dev/${disk##*/}"
done
true
"""


@dataclass
class Pair:
    """A target that has booted from an initrd, and a client on the same wire.

    `checksums` are of the target's disks, by their names there.
    """

    release: str
    target: Machine
    client: Machine
    checksums: dict[str, str]

    def screen(self, *patterns: str) -> str:
        """What the target shows as soon as it shows all of these.

        It is drawn twice: an emulated serial line now and then doubles a character. Any key makes it draw.
        """
        shown = [""]

        def steady() -> bool:
            self.target.send_keys("x")
            time.sleep(1.5)
            shown.append("\n".join(self.target.screen()))
            return shown[-1] == shown[-2] and all(re.search(p, shown[-1], re.MULTILINE) for p in patterns)

        try:
            self.target.wait_until(steady, timeout=180)
        except TimeoutError:
            pytest.fail(f"The screen never showed {patterns}, but:\n{shown[-1]}")
        return shown[-1]

    def commands(self) -> list[str]:
        """The commands on the screen once it offers both addresses, as somebody would copy them."""
        screen = self.screen(
            r"^  nvme connect-all .* -a 169\.254\.",
            r"^  nvme connect-all .* -a fe80:",
            r"^/dev/vda",
            r"^/dev/sda",
        )
        return re.findall(r"^  (nvme (?:.*\\\n)*.*)", screen, re.MULTILINE)

    def attach(self, command: str) -> dict[str, str]:
        """Type a command on the client. Returns the disks that it has then, by their names on the target."""
        self.client.run(command)

        def found() -> dict[str, str] | None:
            lines = self.client.run(ATTACHED_SCRIPT).stdout.splitlines()
            disks = dict(line.split() for line in lines)
            return disks if len(disks) == (len(self.checksums) if "connect-all" in command else 1) else None

        return self.client.wait_until(found)

    def read(self, node: str) -> str:
        """The checksum of a whole disk, read on the client past its cache."""
        script = f"dd if={node} bs=1M iflag=direct status=none | sha256sum"
        return self.client.run(script, timeout=300).stdout.split()[0]


def fill(path: Path, size: int) -> str:
    """Write random bytes; returns their checksum."""
    content = random.Random(str(path.name)).randbytes(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module", params=ONCE_FOR_EACH)
def pair(
    request: pytest.FixtureRequest, images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    release: str = request.param
    other = {"trixie": "bookworm"}.get(release, "trixie")
    directory = tmp_path_factory.mktemp(f"initrd-{release}")
    initrd = with_agent(
        images[release], harness_images.initrd(images[release], *DRACUT_OPTIONS), directory / "initrd.img"
    )
    checksums = {"sda": fill(directory / "sda", 24 * MIB), "vda": fill(directory / "vda", 16 * MIB)}
    wire = Wire()
    target = Machine(
        f"initrd-{release}",
        images[release],
        initrd=initrd,
        machine_id="",
        kernel_options=(*OPTIONS, *ACCESS),
        disks=[
            Disk("scsi", path=directory / "sda", serial="DISK-SCSI", bus="scsi"),
            Disk("virtio", path=directory / "vda"),
        ],
        nics=[Nic(wire, 0)],
        log_directory=LOGS,
    )
    client = Machine(f"client-{other}", images[other], nics=[Nic(wire, 1)], log_directory=LOGS)
    with target, client:
        target.start()
        client.start()
        client.wait_boot()
        client.run(f"ip link set eth0 up && ip address add {CLIENT_ADDRESS} dev eth0 && modprobe nvme-tcp")
        client.wait_run(
            "! ip -6 address show dev eth0 tentative | grep . && ip -6 address show dev eth0 | grep fe80"
        )
        target.agent.request({"op": "hello"}, 300)
        yield Pair(release, target, client, checksums)


def test_only_units_that_are_needed_run(pair: Pair) -> None:
    pair.screen(r"^  nvme connect-all .* -a 169\.254\.", "all 2 disks|both disks")
    target = pair.target
    target.wait_run("systemctl is-active storage-target-mode.target")
    assert target.run("systemctl list-units --failed --plain --no-legend").stdout == ""
    assert target.run("systemctl list-jobs --no-legend").stdout in ("", "No jobs running.\n")
    for unit in ("storagetm", "systemd-networkd", "systemd-udevd", "systemd-journald"):
        assert target.run(["systemctl", "is-active", f"{unit}.service"]).stdout == "active\n"
    # The program that systemd brings for the same is not even there, and nothing else of an initrd runs.
    assert target.run(
        "systemctl is-active systemd-storagetm.service initrd.target", check=False
    ).stdout.split() == [
        "inactive",
        "inactive",
    ]
    status = target.run("systemctl status --no-pager storagetm.service").stdout
    assert re.search(r'Status: "Exporting 2 disks at 2 addresses; snapshots use .*\(0 %\)\."', status)


def test_identity_is_that_of_the_running_system(pair: Pair) -> None:
    """As on the running system: the machine ID is in the initrd, and names and ports are made from it."""
    assert pair.target.run("cat /etc/machine-id").stdout.strip() == harness_images.MACHINE_ID
    connect_all, connect_all_6, *ones = pair.commands()
    assert connect_all.endswith(f" -s {PORTS['ipv4']}")
    assert f" -s {PORTS['ipv6']} " in connect_all_6
    assert [command.split()[-1] for command in ones] == [f"{PREFIX}.sda", f"{PREFIX}.vda"]


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_one_command_attaches_all(pair: Pair, family: str) -> None:
    (command,) = (
        c for c in pair.commands() if "connect-all" in c and ("169.254." in c) == (family == "ipv4")
    )
    try:
        disks = pair.attach(command.replace("INTERFACE", "eth0"))
        assert {name: pair.read(node) for name, node in disks.items()} == pair.checksums
    finally:
        pair.client.run("nvme disconnect-all")


@pytest.mark.parametrize("pair", ON_NEWER, indirect=True, scope="module")
def test_two_lines_attach_one_disk(pair: Pair) -> None:
    """The two lines below a disk's name, typed as they are, attach that disk and no other."""
    (command,) = (c for c in pair.commands() if c.endswith(".vda"))
    assert command.count("\\\n") == 1
    try:
        disks = pair.attach(command)
        assert {name: pair.read(node) for name, node in disks.items()} == {"vda": pair.checksums["vda"]}
    finally:
        pair.client.run("nvme disconnect-all")


def test_kernel_command_line_decides_about_access(pair: Pair) -> None:
    """The kernel command line says which disk may be written to, and the screen says so."""
    pair.screen(r"^/dev/sda .* snapshot  0 % ", r"^/dev/vda .* read-only ")
    (command,) = (c for c in pair.commands() if "connect-all" in c and "169.254." in c)
    try:
        disks = pair.attach(command)
        write = "echo written from the client | dd of={} conv=fsync status=none"
        assert "Operation not permitted" in pair.client.run(write.format(disks["vda"]), check=False).stderr
        pair.client.run(write.format(disks["sda"]))
        assert pair.read(disks["sda"]) != pair.checksums["sda"]
    finally:
        pair.client.run("nvme disconnect-all")
    for disk, name in (("scsi", "sda"), ("virtio", "vda")):
        assert hashlib.sha256(pair.target.disk_path(disk).read_bytes()).hexdigest() == pair.checksums[name]


class Refusing:
    """A machine in whose initrd the service is started again and again, each time with something wrong."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.line = machine.run("cat /proc/cmdline").stdout.split(" rd.storagetm.")[0]
        # Without the reboot that comes with its end.
        machine.put(DROP_IN, "[Unit]\nSuccessAction=none\n")
        machine.put("/run/cmdline", self.line)
        machine.run("systemctl daemon-reload && mount --bind /run/cmdline /proc/cmdline")

    def restart(self, options: str = "", meanwhile: str = "true") -> None:
        self.machine.run("systemctl stop storagetm")
        self.machine.run(["sh", "-c", f"echo '{self.line} {options}' >/run/cmdline"])
        self.machine.run(f"{meanwhile} && systemctl start storagetm", timeout=180)

    def wait_reason(self, pattern: str) -> None:
        """Wait until the screen has it, which it has while the service is up and nothing is exported."""
        # The reason goes on where the row ends.
        self.machine.wait_screen(rf"\A.*\n\nNo disk is exported:\n\n{pattern}", redraw="x")
        assert self.machine.run("systemctl is-active storagetm.service").stdout == "active\n"
        assert self.machine.run("ls -A /sys/kernel/config/nvmet/subsystems", check=False).stdout == ""


def own_prefix() -> str:
    """What the names of a machine begin with whose ID is the UUID of its firmware."""
    application = bytes.fromhex("b4f94e52b8e245db88846e2ec3f4ef18")
    digest = hmac.digest(bytes.fromhex(FIRMWARE_UUID.replace("-", "")), application, "sha256")
    derived = uuid.UUID(bytes=digest[:16], version=4)
    return f"nqn.2023-10.io.systemd:storagetm.{derived.hex}"


def test_what_prevents_the_export_stays_on_the_screen(
    release: str, images: dict[str, Image], tmp_path: Path
) -> None:
    """What prevents the export stays on the screen. What cannot be shown there leaves time to read it."""
    initrd = harness_images.initrd(images[release], *DRACUT_OPTIONS)
    machine = Machine(
        f"failures-{release}",
        images[release],
        initrd=with_agent(images[release], initrd, tmp_path / "initrd.img", OTHER_MACHINE),
        machine_id="",
        kernel_options=(
            *(OPTIONS[0], "ip=dhcp", "bond=bond0:eth1", "bridge=br0:bond0", "vlan=br0.5:br0"),
            *("rd.storagetm.snapshot=lots", "rd.storagetm.colour=red"),
        ),
        disks=[Disk("virtio")],
        nics=[Nic(Wire(), 0), Nic(Wire(), 0)],
        terminal=(250, 30),
        qemu_options=["-uuid", FIRMWARE_UUID],
        log_directory=LOGS,
    )
    with machine:
        machine.start()
        reason = r"Kernel command line: storagetm.snapshot=lots is no size; "
        machine.wait_screen(
            rf"^No disk is exported:\n\n{reason}(.*\n)*Ctrl-C reboots this machine\.", redraw="x"
        )
        machine.agent.request({"op": "hello"}, 300)
        refusing = Refusing(machine)
        refusing.wait_reason(reason)
        messages = machine.run(
            "journalctl -b --no-pager --output=cat _COMM=storagetm; systemctl status storagetm"
        ).stdout
        assert "Exporting nothing" in messages

        # The network is there all the same, as the kernel command line has it, with an address for a cable.
        for path in ("/sys/class/net/bond0/bonding", "/sys/class/net/br0/bridge", "/proc/net/vlan/br0.5"):
            machine.wait_run(f"test -e {path}")
        machine.wait_until(lambda: "-- 169.254." in machine.run("cat /proc/net/fib_trie").stdout)

        refusing.restart("rd.storagetm.list-devices")
        refusing.wait_reason(r"Kernel command line: 'rd\.storagetm\.list-devices' prints text ")
        refusing.restart("rd.storagetm.pairr")
        refusing.wait_reason(r"Kernel command line: unknown option 'rd\.storagetm\.pairr'; correct it")
        refusing.restart(f"rd.storagetm.nqn={'n' * 220}")
        refusing.wait_reason(r"--nqn= is too long for '/dev/vda': ")
        modules = "$(echo /lib/modules/*/kernel/drivers/nvme/target)"
        refusing.restart(meanwhile=f"rmmod nvmet_tcp nvmet && mount -t tmpfs tmpfs {modules}")
        refusing.wait_reason("The module 'nvmet-tcp', the kernel's NVMe target, cannot be loaded; ")
        machine.run(f"umount {modules}")

        machine.run("systemctl stop storagetm")
        other = machine.start_process(
            "unset PYTHONHOME; exec /usr/local/bin/storagetm --all", environment={"NOTIFY_SOCKET": ""}
        )
        other.wait_output("Exporting '/dev/vda'")
        machine.run("systemctl start storagetm", timeout=180)
        machine.wait_screen(
            rf"^Another storagetm exports under this NQN already, process {other.pid}; ", redraw="x"
        )
        other.kill()
        assert other.wait() == 0

        # Now it works, until it is killed. Its names are made of its firmware's UUID, as the machine ID in
        # the image is another machine's.
        refusing.restart("rd.storagetm.read-write")
        warning = "'/etc/machine-id' is that of the machine on which this image was made,"
        machine.wait_screen(rf"^/dev/vda .* READ-WRITE(.*\n)*.*{warning}", redraw="x")
        assert machine.run("ls /sys/kernel/config/nvmet/subsystems").stdout == f"{own_prefix()}.vda\n"
        machine.run("systemctl kill --kill-whom=main --signal=KILL storagetm.service")
        machine.wait_run("systemctl is-active storagetm-failure.service")
        machine.wait_until(lambda: b"this machine reboots in 30 seconds" in machine.console_bytes())
        pressed = time.monotonic()
        machine.qmp.call("send-key", keys=[{"type": "qcode", "data": k} for k in ("ctrl", "alt", "delete")])
        machine.wait_end()
        assert time.monotonic() - pressed < 25


@pytest.mark.parametrize("release", [SID])
def test_tpm_is_told_before_the_export_begins(
    release: str, images: dict[str, Image], tmp_path: Path
) -> None:
    """It exports on the newest release, too, and there the TPM has been told of it before."""
    initrd = harness_images.initrd(images[release], *DRACUT_OPTIONS)
    machine = Machine(
        "newest",
        images[release],
        initrd=with_agent(images[release], initrd, tmp_path / "initrd.img"),
        machine_id="",
        # What a unified kernel image says of itself.
        kernel_options=(*OPTIONS, "systemd.tpm2_measured_os=yes"),
        disks=[Disk("virtio", serial="DISK-A")],
        nics=[Nic(Wire(), 0)],
        tpm=True,
        log_directory=LOGS,
    )
    with machine:
        machine.start()
        machine.agent.request({"op": "hello"}, 300)
        machine.wait_run("systemctl is-active storage-target-mode.target")
        machine.wait_screen(r"^  nvme connect-all .* -a 169\.254\.", redraw="x")
        assert machine.run("ls /sys/kernel/config/nvmet/subsystems").stdout == f"{PREFIX}.vda\n"
        assert machine.run("systemctl list-units --failed --plain --no-legend").stdout == ""

        # The event is in the log, the register has been extended by its digest and by nothing else, and that
        # was over before the program was started.
        event = b"storage-target-mode-start"
        assert event in machine.run("cat /run/log/systemd/tpm2-measure.log").stdout_bytes
        register = machine.run("cat /sys/class/tpm/tpm0/pcr-sha256/11").stdout.strip().lower()
        assert register == hashlib.sha256(bytes(32) + hashlib.sha256(event).digest()).hexdigest()
        measured, started = (
            int(machine.run(["systemctl", "show", "--value", f"--property={key}", unit]).stdout)
            for unit, key in (
                ("systemd-pcrphase-storage-target-mode", "ActiveEnterTimestampMonotonic"),
                ("storagetm", "ExecMainStartTimestampMonotonic"),
            )
        )
        assert 0 < measured < started


@pytest.mark.reach
def test_one_image_does_for_two_machines(images: dict[str, Image], standard: str, tmp_path: Path) -> None:
    """A client that attaches the disks of both, none of which has a serial number, does not mix them up."""
    image = images[standard]
    initrd = harness_images.initrd(image, *DRACUT_OPTIONS)
    digest = hashlib.sha256(FIRMWARE_UUID.encode().replace(b"-", b"")).hexdigest()
    noted = f"MACHINE_ID={harness_images.MACHINE_ID}\nUUID={digest}\n"
    initrd = with_agent(image, initrd, tmp_path / "initrd.img", {"/etc/storagetm-image": noted})
    wires = [Wire(), Wire()]
    checksums = [fill(tmp_path / name, 16 * MIB) for name in ("first", "second")]
    targets = [
        Machine(
            f"twin-{number}",
            image,
            initrd=initrd,
            machine_id="",
            kernel_options=(OPTIONS[0], f"ip=192.0.{number}.1:::255.255.255.0::eth0:none"),
            disks=[Disk("virtio", path=tmp_path / name)],
            nics=[Nic(wires[number], 0)],
            qemu_options=["-uuid", own_uuid],
            log_directory=LOGS,
        )
        for number, (name, own_uuid) in enumerate(
            (("first", FIRMWARE_UUID), ("second", FIRMWARE_UUID.replace("a", "b")))
        )
    ]
    client = Machine("twins-client", image, nics=[Nic(wire, 1) for wire in wires], log_directory=LOGS)
    with targets[0], targets[1], client:
        for machine in (*targets, client):
            machine.start()
        client.wait_boot()
        client.run("modprobe nvme-tcp")
        prefixes = []
        for number, target in enumerate(targets):
            client.run(f"ip link set eth{number} up && ip address add 192.0.{number}.2/24 dev eth{number}")
            pattern = r"^  nvme connect-all .* -a 192\.0\.(.*\n)*    -n \S+\.vda$"
            screen = "\n".join(target.wait_screen(pattern, redraw="x"))
            (command,) = re.findall(r"^  (nvme connect-all .* -a 192\.0\..*)", screen, re.MULTILINE)
            prefixes += re.findall(r"-n (\S+)\.vda", screen)
            client.wait_run(f"ping -c 1 -W 5 192.0.{number}.1")
            client.run(command)
        # The first one's are those of the running system.
        assert prefixes[0] == PREFIX
        assert prefixes[1] != PREFIX

        def attached() -> dict[str, str] | None:
            script = "for d in /dev/nvme*n1; do echo $(cat /sys/block/${d#/dev/}/device/subsysnqn) $d; done"
            found = dict(line.split() for line in client.run(script).stdout.splitlines() if " " in line)
            return found if len(found) == 2 else None

        nodes = client.wait_until(attached)
        read = [
            client.run(f"dd if={nodes[f'{prefix}.vda']} bs=1M iflag=direct status=none | sha256sum")
            for prefix in prefixes
        ]
        assert [result.stdout.split()[0] for result in read] == checksums


@pytest.mark.parametrize("pair", ON_NEWER, indirect=True, scope="module")
def test_later_disks_are_shown_and_attached(pair: Pair) -> None:
    """Disks that come later are shown and can be attached, on a second page where the first is full."""
    for number in range(2):
        pair.target.add_disk(Disk(f"late-{number}", size=8 * MIB))
    try:
        pair.screen("all 4 disks", r"\bPage 1 of 2\b")
        pair.target.send_keys(" ")
        screen = pair.screen(r"^/dev/vdc", r"\bPage 2 of 2\b")
        (command,) = re.findall(r"^/dev/vdc +8\.4 MB .*\n  (nvme .*\\\n.*\.vdc)$", screen, re.MULTILINE)
        node = pair.attach(command)["vdc"]
        pair.client.run(f"echo written from the client | dd of={node} conv=fsync status=none")
        written = [pair.target.disk_path(f"late-{number}").read_bytes()[:24] for number in range(2)]
        assert sorted(written) == [bytes(24), b"written from the client\n"]
    finally:
        pair.client.run("nvme disconnect-all")
        for number in range(2):
            pair.target.remove_disk(f"late-{number}")

    def first_page() -> str:
        """Where the last lines need a second page, it is still there that one was."""
        pair.target.send_keys("b")
        time.sleep(1.5)
        text = "\n".join(pair.target.screen())
        return text if re.search("all 2 disks|both disks", text) else ""

    assert not re.search(r"/dev/vd[bc]", pair.target.wait_until(first_page, timeout=180))


@contextlib.contextmanager
def restarted(target: Machine, change: Callable[[str], str]) -> Iterator[None]:
    """Has the service run with another kernel command line, and in the end as before."""
    line = target.run("cat /proc/cmdline").stdout.strip()
    target.put("/run/cmdline", f"{change(line)}\n")
    # Without the reboot that comes with its end.
    target.put(DROP_IN, "[Unit]\nSuccessAction=none\n")
    reload = "systemctl daemon-reload"
    again = "systemctl stop storagetm && {} && systemctl start storagetm"
    target.run(f"{reload} && {again.format('mount --bind /run/cmdline /proc/cmdline')}", timeout=180)
    yield
    target.run(again.format(f"umount /proc/cmdline && rm {DROP_IN} && {reload}"), timeout=180)


@pytest.fixture
def shared(pair: Pair) -> Iterator[None]:
    """The service as it is with one more option on the kernel command line."""
    with restarted(pair.target, lambda line: f"{line} rd.storagetm.subsystem=shared"):
        yield


@pytest.mark.parametrize("pair", ON_NEWER, indirect=True, scope="module")
@pytest.mark.usefixtures("shared")
def test_one_command_attaches_a_shared_subsystem(pair: Pair) -> None:
    """The command on the screen attaches all disks, whose numbers are there, too, and so do later ones."""
    screen = pair.screen(
        r"^  nvme connect .* -a 169\.254\.",
        r"^Namespaces:",
        r"^ *0x\w+ /dev/sda .*",
        r"^ *0x\w+ /dev/vda .*",
    )
    (command,) = re.findall(r"^  (nvme connect .* -a 169\.254(?:.*\\\n)*.*)", screen, re.MULTILINE)
    try:
        pair.client.run(command)
        numbers = {
            name: int(n, 16) for n, name in re.findall(r"^ *(0x\w+) /dev/(\w+)", screen, re.MULTILINE)
        }
        pair.client.wait_until(lambda: namespaces(pair.client, PREFIX).keys() == set(numbers.values()))
        nodes = {number: fields[4] for number, fields in namespaces(pair.client, PREFIX).items()}
        read = {name: pair.read(nodes[numbers[name]]) for name in ("sda", "vda")}
        assert read == pair.checksums
        pair.target.add_disk(Disk("later", size=8 * MIB))
        pair.client.wait_until(lambda: len(namespaces(pair.client, PREFIX)) == 3)
        pair.screen("all 3 disks", r"^ *0x\w+ /dev/vdb .* READ-WRITE")
        pair.target.remove_disk("later")
        pair.client.wait_until(lambda: namespaces(pair.client, PREFIX).keys() == set(numbers.values()))
    finally:
        pair.client.run("nvme disconnect-all")


@pytest.fixture
def with_usb(pair: Pair) -> Iterator[None]:
    """The service as it is with --transport=auto on the kernel command line, and all disks read-only."""
    with restarted(
        pair.target, lambda line: f"{line.split(' rd.storagetm.')[0]} rd.storagetm.transport=auto"
    ):
        yield


@pytest.mark.parametrize("pair", ON_NEWER, indirect=True, scope="module")
@pytest.mark.usefixtures("with_usb")
def test_disks_appear_at_the_end_of_a_usb_cable(pair: Pair) -> None:
    """The image has all that USB takes; where the machine has a device port, it is used, too."""
    target = pair.target
    screen = pair.screen(r"^  nvme connect-all .* -a 169\.254\.", r"^/dev/vda", r"^/dev/sda")
    assert "USB" not in screen
    # A device port, and at the other end of the cable this machine itself.
    target.run("modprobe dummy_hcd && modprobe usb-storage && modprobe sd_mod")
    try:
        pair.screen(r"^USB: a host is connected", r"^  nvme connect-all .* -a 169\.254\.")
        names = (
            r"for d in /sys/block/sd*; do case $(readlink -f $d) in */dummy_hcd*) echo ${d##*/};; esac; done"
        )

        def read() -> list[str] | None:
            found = target.run(names).stdout.split()
            sizes = {int(target.run(f"cat /sys/block/{n}/size").stdout): n for n in found}
            nodes = [sizes.get(size * MIB // 512) for size in (24, 16)]
            return [n for n in nodes if n] if all(nodes) else None

        scsi, virtio = target.wait_until(read)
        for name, own in ((scsi, "sda"), (virtio, "vda")):
            read_there = ["python3", "-s", "-S", "-c", DIGEST_SCRIPT, f"/dev/{name}"]
            assert target.run(read_there).stdout.split() == [pair.checksums[own]]
        status = target.run("systemctl status --no-pager storagetm.service").stdout
        assert 'Status: "Exporting 2 disks at 2 addresses and USB (a host is connected)' in status
    finally:
        target.run("modprobe -r dummy_hcd")
    pair.screen(r"^  nvme connect-all .* -a 169\.254\.", r"\A(?!(.*\n)*.*USB)")


def test_stop_leaves_nothing_and_reboots(pair: Pair) -> None:
    """Ctrl-C stops exporting and leaves nothing behind, and so does SIGTERM; either reboots the machine."""
    target = pair.target
    (command,) = (c for c in pair.commands() if "connect-all" in c and "169.254." in c)
    pair.attach(command)

    # Without the reboot, to see what is left.
    target.put(DROP_IN, "[Unit]\nSuccessAction=none\n")
    target.run("systemctl daemon-reload")
    target.run("systemctl kill --kill-whom=main storagetm.service")
    target.wait_run('test "$(systemctl is-active storagetm)" = inactive')
    assert target.run("systemctl show --value --property=ExecMainStatus storagetm").stdout == "0\n"
    assert target.run(
        "ls /sys/kernel/config/nvmet/ports /sys/kernel/config/nvmet/subsystems"
    ).stdout.split() == [
        "/sys/kernel/config/nvmet/ports:",
        "/sys/kernel/config/nvmet/subsystems:",
    ]
    pair.client.run("nvme disconnect-all")

    target.run(f"rm {DROP_IN}; systemctl daemon-reload; systemctl start storagetm", timeout=180)
    assert pair.commands()[0] == command
    pair.screen(r"^Ctrl-C stops exporting and reboots this machine\.")
    target.send_keys("\x03")
    target.wait_end()


@pytest.mark.parametrize(
    "module",
    [
        *("ahci", "net2280", "nvme", "nvmet_tcp", "r8152", "thunderbolt_net", "uas"),
        *("usb_f_mass_storage", "virtio_net"),
    ],
)
def test_drivers_of_what_comes_later_are_there(module: str, images: dict[str, Image], release: str) -> None:
    """An initrd for this host has the drivers of what may be plugged in later, too."""
    initrd = harness_images.initrd(images[release], *DRACUT_OPTIONS)
    # In file names, the kernel's makefiles have dashes and underscores as they like, and change them.
    assert f"/{module}.ko" in listing(initrd).replace("-", "_")


def test_drivers_of_device_ports_are_there(images: dict[str, Image], standard: str) -> None:
    """Of those in the processor, too, which Debian 12 lacks on this architecture."""
    files = listing(harness_images.initrd(images[standard], *DRACUT_OPTIONS))
    assert "/dwc3.ko" in files
    # What turns a port that can be both into a device's.
    assert "/roles/" in files


@pytest.mark.parametrize("release", ON_NEWER)
def test_image_that_could_not_work_is_refused(images: dict[str, Image], release: str) -> None:
    """No image is made that could not do what it is for."""
    for spoil, reason in (
        (
            "rm /lib/modules/*/kernel/drivers/md/dm-flakey.ko* && depmod $(ls /lib/modules)",
            r"storagetm: the kernel \S+ has no module 'dm-flakey', .*; install .*--kver",
        ),
        (
            # What python3-minimal leaves out.
            "rm -r /usr/lib/python3.*/ctypes",
            "storagetm: Python's module 'ctypes' is missing; install the package 'python3', ",
        ),
    ):
        with pytest.raises(RuntimeError, match=reason):
            harness_images.initrd(images[release], *DRACUT_OPTIONS, spoil=spoil)


def listing(initrd: Path) -> str:
    with initrd.open("rb") as file:
        done = subprocess.run(
            ["cpio", "--quiet", "--list"], stdin=file, stdout=subprocess.PIPE, check=True, text=True
        )
    return done.stdout
