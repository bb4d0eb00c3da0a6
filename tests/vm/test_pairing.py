# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets in: hosts with and without codes, secrets and keys, over real connections."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import images as harness_images
from tests.harness.images import SID, Image
from tests.harness.initrd_agent import with_agent
from tests.harness.machine import Disk, Machine, Nic, Wire
from tests.programs import bench
from tests.vm.conftest import BootMachine
from tests.vm.initiator import TARGET_ADDRESS, Reader, write_content
from tests.vm.nvmet import NVMET, Service, exporting, left_over, names
from tests.vm.test_initrd import DRACUT_OPTIONS, OPTIONS

CRASH = Path(__file__).parent / "guest/crash.py"
KNOCK = [Path(__file__).parent / "guest" / name for name in ("knock.py", "hostile.py")]
DISKS = ("/dev/vdb", "/dev/vdc")
CODE = "k7fm-2qxd-9wtr-4hcn"
HOST = "nqn.2014-08.org.nvmexpress:uuid:79338e9a-2392-49a9-91f4-9675489fb8f3"
OTHER = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"
SECRET = "DHHC-1:00:+CjuZwpXuWN6mZBucBOWV4WZl94PgPcNT6Vnyb31FBB10wjG:"
CONTROLLER_SECRET = "DHHC-1:00:Mq+KQxlduOENyArtRtykZGk2qd+vQDsSBRZoQD1PXfwFvqNK:"
KEY = "NVMeTLSkey-1:01:c3wUf25ySjhnjXuogoZTuzLuJP9p5Wjz1eJ6eJ9V3wRQ5Q/m:"
# Of bytes that count up from 0.
WRONG_SECRET = "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:"
WRONG_KEY = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:"
FORGET_KEYS = "keyctl clear %:.nvme"


def start_tls(machine: Machine) -> None:
    machine.run("modprobe -a nvme-tcp nvme-keyring && systemctl restart tlshd")


@pytest.fixture(scope="module")
def paired(target: Machine, client: Machine) -> Iterator[tuple[Machine, Machine]]:
    """The two machines, with what opens TLS connections for the kernel."""
    for machine in (target, client):
        start_tls(machine)
    yield target, client
    for machine in (target, client):
        machine.run(f"systemctl stop tlshd; {FORGET_KEYS}")


@pytest.fixture(autouse=True)
def detached(request: pytest.FixtureRequest) -> Iterator[None]:
    """Takes away what a test leaves that ends half-way."""
    machines = request.getfixturevalue("paired") if "paired" in request.fixturenames else ()
    yield
    for machine in machines:
        machine.run(f"nvme disconnect-all; {FORGET_KEYS}", check=False)
        machine.run("systemctl stop 'test-*.service'; systemctl reset-failed 'test-*.service'", check=False)


def commands(screen: list[str]) -> list[str]:
    """What the screen says is to be typed for the first address, each command in one line."""
    text = re.sub(r" *\\\n +", " ", "\n".join(line.rstrip() for line in screen))
    found = re.findall(r"^  (?:modprobe|systemctl|nvme) .*", text, re.MULTILINE)
    last = next(i for i, line in enumerate(found) if line.startswith("  nvme connect"))
    return [line.strip() for line in found[: last + 1]]


def subsystem(machine: Machine) -> tuple[str, int]:
    """The NQN of the only subsystem, and the IPv4 port."""
    found = names(machine)
    (nqn,) = (n.partition("/")[2] for n in found if n.startswith("subsystems/"))
    (port,) = (int(n.partition("/")[2]) for n in found if n.startswith("ports/") and not int(n[6:]) & 1)
    return nqn, port


def digests(machine: Machine, *nodes: str) -> set[str]:
    lines = machine.run(["sha256sum", *nodes]).stdout.splitlines()
    return {line.split()[0] for line in lines}


def nodes(machine: Machine, count: int) -> list[str]:
    """The disks that are attached, once there are so many."""
    script = "ls -d /sys/block/nvme*n* 2>/dev/null | grep -v 'c[0-9]*n'; true"

    def found() -> list[str]:
        return [f"/dev/{line.rpartition('/')[2]}" for line in machine.run(script).stdout.split()]

    machine.wait_until(lambda: len(found()) == count)
    return found()


def insert_key(machine: Machine, host: str, nqn: str, key: str) -> None:
    machine.run(["nvme", "check-tls-key", "-I", "1", "--insert", "-n", host, "-c", nqn, "-d", key])


def attach(machine: Machine, nqn: str, port: int, more: str) -> None:
    """Attaches the disks as the host of the code."""
    where = f"-t tcp -a {TARGET_ADDRESS} -s {port} -n {nqn}"
    machine.run(f"nvme connect {where} -q {HOST} -I {HOST[-36:]} {more}")


def code_file(machine: Machine, code: str = CODE) -> str:
    machine.put("/run/code", code + "\n", mode=0o600)
    return "--code-file=/run/code"


def test_commands_on_the_screen_attach_the_disks(paired: tuple[Machine, Machine]) -> None:
    """And the client notices no kill. A clean stop forgets all."""
    target, client = paired
    service = Service(target, ["--pair", "--console", *DISKS])
    before = service.start()
    screen = target.wait_screen(r"^ +-I \S+ --tls", redraw="x")
    assert all(len(line.rstrip()) < 80 for line in screen)
    (code,) = re.findall(r"^Code: ((?:[0-9a-z]{4}-){3}[0-9a-z]{4}) *$", "\n".join(screen), re.MULTILINE)
    typed = commands(screen)
    assert [line.split()[0] for line in typed] == ["modprobe", "systemctl", "nvme", "nvme"]
    for line in typed:
        client.run(line)
    assert digests(client, *nodes(client, 2)) == digests(target, *DISKS)
    assert client.run("cat /sys/class/nvme/nvme*/tls_key").stdout.strip()
    # What anybody can read has none of it.
    key = re.findall(r"NVMeTLSkey-1:01:(\S+):", typed[2])[0]
    said = service.output + target.run("cat /proc/*/cmdline /proc/keys; journalctl").stdout
    assert code not in said
    assert code.replace("-", "") not in said
    assert key not in said
    service.kill("KILL")
    target.wait_run(f"systemctl is-failed --quiet {service.unit}")
    again = Service(target, ["--pair", "--console", *DISKS])
    again.start()
    screen = target.wait_screen(r"^ +-I \S+ --tls", redraw="x")
    assert f"Code: {code}" in [line.rstrip() for line in screen]
    assert digests(client, *nodes(client, 2)) == digests(target, *DISKS)
    client.run("dmesg | grep -E 'nvme.*(reconnect|reset)' && exit 1; nvme disconnect-all")
    assert again.stop() == before
    assert left_over(target) == []
    # Useless at once, they go when the kernel finds the time.
    target.wait_run("! grep ' psk ' /proc/keys")
    assert target.run(f"ls {NVMET}/hosts").stdout == ""


class Knock:
    """How a client tries to get in, and what it finds."""

    def __init__(self, client: Machine, nqn: str, port: int) -> None:
        self.client = client
        self.nqn = nqn
        self.port = port

    def connects(self, host: str, *more: str, key: str = "") -> bool:
        """Whether nvme-cli attaches the disks as this host, with a TLS key and further options."""
        self.client.run(FORGET_KEYS)
        if key:
            insert_key(self.client, host, self.nqn, key)
            more = (*more, "--tls")
        words = ("nvme", "connect", "-t", "tcp", "-a", TARGET_ADDRESS, "-s", str(self.port), "-n", self.nqn)
        names = ("-q", host, "-I", host[-36:])
        result = self.client.run([*words, *names, *more], check=False)
        if result.returncode == 0:
            # Only what can be read counts.
            disks = nodes(self.client, 2)
            readable = self.client.run(["dd", f"if={disks[0]}", "of=/dev/null", "count=1"], check=False)
            self.client.run("nvme disconnect-all")
            return readable.returncode == 0
        assert self.client.run("ls /sys/class/nvme").stdout == ""
        return False

    def lists(self, host: str, *more: str, key: str = "") -> bool:
        """Whether discovery tells this host of the subsystem."""
        self.client.run(FORGET_KEYS)
        if key:
            insert_key(self.client, host, "nqn.2014-08.org.nvmexpress.discovery", key)
            more = (*more, "--tls")
        words = ("nvme", "discover", "-t", "tcp", "-a", TARGET_ADDRESS, "-s", str(self.port))
        return self.nqn in self.client.run([*words, "-q", host, "-I", host[-36:], *more], check=False).stdout


SECRETS = ("-S", SECRET, "-C", CONTROLLER_SECRET)


def test_matrix_with_tls(paired: tuple[Machine, Machine]) -> None:
    """As in the manual page, under "Who gets in": TLS is required."""
    target, client = paired
    with exporting(target, code_file(target), *DISKS):
        knock = Knock(client, *subsystem(target))
        assert not knock.connects(OTHER)
        assert not knock.connects(HOST)
        assert not knock.connects(HOST, *SECRETS)
        assert not knock.connects(HOST, "--tls")
        assert not knock.connects(HOST, key=WRONG_KEY)
        assert not knock.connects(OTHER, key=KEY)
        assert knock.connects(HOST, key=KEY)
        assert not knock.lists(OTHER)
        assert not knock.lists(HOST)
        assert not knock.lists(HOST, key=WRONG_KEY)
        assert knock.lists(HOST, key=KEY)


def test_matrix_without_tls(paired: tuple[Machine, Machine]) -> None:
    """As in the manual page, under "Who gets in": with --encrypt=no."""
    target, client = paired
    with exporting(target, code_file(target), "--encrypt=no", *DISKS) as service:
        knock = Knock(client, *subsystem(target))
        assert not knock.connects(OTHER)
        assert not knock.connects(OTHER, *SECRETS)
        assert not knock.connects(HOST)
        assert not knock.connects(HOST, "-S", WRONG_SECRET)
        assert not knock.connects(HOST, "-S", SECRET, "-C", WRONG_SECRET)
        assert knock.connects(HOST, "-S", SECRET)
        assert knock.connects(HOST, *SECRETS)
        assert not knock.connects(HOST, key=KEY)
        # A name is all that guards the list.
        assert not knock.lists(OTHER)
        assert knock.lists(HOST)
        service.wait_output(
            "^What clients read and write is not encrypted: who listens on the network can read"
        )


def test_matrix_with_tls_offered(paired: tuple[Machine, Machine], standard: str) -> None:
    """As in the manual page, under "Who gets in": clients that cannot do TLS come in without."""
    target, client = paired
    with exporting(target, code_file(target), "--encrypt=offered", *DISKS) as service:
        knock = Knock(client, *subsystem(target))
        assert not knock.connects(HOST)
        assert not knock.connects(HOST, "-S", WRONG_SECRET)
        assert not knock.connects(HOST, key=WRONG_KEY)
        assert knock.connects(HOST, *SECRETS)
        assert knock.connects(HOST, *SECRETS, key=KEY)
        # Kernels that derive keys from secrets take the key for the secret.
        newer = standard == SID
        assert knock.connects(HOST, key=KEY) == newer
        if newer:
            # With a wrong secret as well, "nvme connect" on Linux 6.12 does not end.
            assert knock.connects(HOST, "-S", WRONG_SECRET, key=KEY)
            assert knock.connects(HOST, *SECRETS, "--concat")
            assert not knock.connects(HOST, "-S", WRONG_SECRET, "--concat")
        service.wait_output(
            "^What clients read and write is not encrypted: who listens on the network can read"
        )


def test_what_becomes_of_tls_later_is_shown(paired: tuple[Machine, Machine]) -> None:
    """A key of another program lets its owner pass for our host. Without tlshd nobody comes in."""
    target, client = paired
    with exporting(target, code_file(target), "--console", *DISKS):
        nqn, port = subsystem(target)
        target.wait_screen(r"^Code: k7fm-2qxd-9wtr-4hcn *$", redraw="x")
        for machine in (target, client):
            insert_key(machine, OTHER, nqn, WRONG_KEY)
        other = (
            r"^Another program has put keys into the keyring \.nvme; who has one of them can\s+pass for a "
        )
        target.wait_screen(other, redraw="x")
        key = client.run(rf"sed -n 's/ I-.* psk  *NVMe.*{OTHER}.*//p' /proc/keys").stdout.split()
        attach(client, nqn, port, f"--tls --tls-key=0x{key[0]}")
        assert digests(client, *nodes(client, 2)) == digests(target, *DISKS)
        client.run("nvme disconnect-all")

        target.run(f"{FORGET_KEYS}; systemctl stop tlshd")
        target.wait_screen(
            r"^tlshd has ended, so no client can connect with TLS; start it again", redraw="x"
        )
        target.run("systemctl start tlshd")
        target.wait_screen(r"\A(?!(.|\n)*^(tlshd has|Another program))(.|\n)*^Code: k7fm", redraw="x")


def test_hosts_of_a_file(paired: tuple[Machine, Machine]) -> None:
    """With a secret, and by the name alone, of which there is a warning."""
    target, client = paired
    lines = f"{HOST} {SECRET} {CONTROLLER_SECRET}\n{OTHER}\nnqn.2014-08.org.example:more {SECRET}\n"
    target.put("/run/hosts", lines, mode=0o644)
    arguments = ["--secret-file=/run/hosts", f"--allow-host={HOST}", f"--allow-host={OTHER}", *DISKS]
    refused = target.run(["/usr/local/bin/storagetm.pyz", *arguments], check=False)
    assert refused.returncode == 1
    assert re.search(r"can be read or changed by others \(mode 0644\); take that away with", refused.stderr)
    target.run("chmod 600 /run/hosts")
    with exporting(target, *arguments) as service:
        knock = Knock(client, *subsystem(target))
        assert not knock.connects(HOST)
        assert knock.connects(HOST, "-S", SECRET)
        assert knock.connects(OTHER)
        assert not knock.connects(OTHER.replace("1111", "3333"))
        service.wait_output(f"^The host {OTHER} is let in by its name alone, which crosses the network")
    assert left_over(target) == []


def test_wire_shows_nothing_of_the_disk(paired: tuple[Machine, Machine], tmp_path: Path) -> None:
    """With pairing no piece of the disk's content is on the wire; without, each is."""
    target, client = paired
    write_content(tmp_path / "content", 14, 1 << 20)
    target.put("/run/secret.img", tmp_path / "content")
    content = (tmp_path / "content").read_bytes()
    pieces = [content[i : i + 64] for i in range(0, len(content), 4096)]
    for arguments in ([code_file(target)], []):
        with exporting(target, *arguments, "/run/secret.img"):
            nqn, port = subsystem(target)
            capture = target.start_process(
                f"exec tcpdump -U -B 65536 -w /run/wire.pcap -i eth0 tcp port {port}"
            )
            capture.wait_output("listening on")
            more = ""
            if arguments:
                insert_key(client, HOST, nqn, KEY)
                more = f"-q {HOST} -I {HOST[-36:]} --tls"
            client.run(
                f"modprobe nvme-tcp; nvme connect -t tcp -a {TARGET_ADDRESS} -s {port} -n {nqn} {more}"
            )
            (disk,) = nodes(client, 1)
            assert digests(client, disk) == digests(target, "/run/secret.img")
            client.run("nvme disconnect-all")
            # Before it has written all, it would throw away the rest.
            script = 'old=$(stat -c %s /run/wire.pcap); sleep 1; [ "$(stat -c %s /run/wire.pcap)" = $old ]'
            target.wait_run(script)
            capture.kill()
            capture.wait()
            wire = target.get("/run/wire.pcap")
            captured = len(wire)
            assert captured > len(content)
            seen = sum(piece in wire for piece in pieces)
            # TCP's segments cut some, and some packets are lost to a slow machine's tcpdump.
            assert seen == 0 if arguments else seen > len(pieces) // 2, f"{seen} of {len(pieces)}"
    target.run("rm /run/secret.img /run/wire.pcap")


def test_thousand_attempts_beside_a_reader(paired: tuple[Machine, Machine], tmp_path: Path) -> None:
    """With guessed, sniffed and replayed names, while the program is killed and started again."""
    target, client = paired
    write_content(tmp_path / "content", 15, 4 << 20)
    target.put("/run/read.img", tmp_path / "content")
    for path in KNOCK:
        client.put(f"/run/{path.name}", path)
    arguments = [code_file(target), "/run/read.img"]
    service = Service(target, arguments)
    before = service.start()
    nqn, port = subsystem(target)
    insert_key(client, HOST, nqn, KEY)
    attach(client, nqn, port, "--tls")
    (disk,) = nodes(client, 1)
    reader = Reader(client, disk, 15, 4 << 20)
    reader.wait_progress()
    knocking = client.start_process(
        ["python3", "/run/knock.py", TARGET_ADDRESS, str(port), nqn, HOST, "1000"]
    )
    for _ in range(2):
        service.kill("KILL")
        target.wait_run(f"systemctl is-failed --quiet {service.unit}")
        service = Service(target, arguments)
        service.start()
        reader.wait_progress()
    assert knocking.wait(600) == 0, knocking.output
    result = json.loads(knocking.output.splitlines()[-1])
    print(result)
    assert result["attempts"] >= 1000
    assert result["in"] == 0
    reader.wait_progress()
    reader.stop()
    client.run("dmesg | grep -E 'nvme.*(reconnect|reset)' && exit 1; nvme disconnect-all")
    assert service.stop() == before
    assert left_over(target) == []


def test_who_listens_to_an_attached_client(paired: tuple[Machine, Machine]) -> None:
    """An I/O queue of a stranger's, who knows the names: what the screen says of this kernel is true."""
    target, client = paired
    for path in KNOCK:
        client.put(f"/run/{path.name}", path)
    for encrypt in ("required", "no"):
        arguments = [code_file(target), f"--encrypt={encrypt}", *DISKS]
        with exporting(target, *arguments) as service:
            nqn, port = subsystem(target)
            more = shlex.join(SECRETS)
            if encrypt == "required":
                insert_key(client, HOST, nqn, KEY)
                more = "--tls"
            attach(client, nqn, port, more)
            nodes(client, 2)
            number = client.run("cat /sys/class/nvme/nvme*/cntlid").stdout.strip()
            namespace = client.run("cat /sys/block/nvme*n1/nsid | head -n1").stdout.strip()
            words = [
                "python3",
                "/run/knock.py",
                TARGET_ADDRESS,
                str(port),
                nqn,
                HOST,
                "queue",
                number,
                namespace,
            ]
            result = json.loads(client.run(words, check=False).stdout.splitlines()[-1])
            print(encrypt, result)
            warned = "read and write the disks as a client does, without its secret" in service.output
            assert not (encrypt == "required" and result["in"])
            assert result["in"] <= warned
            # What the kernel says is that it asks for the secret first, not that the command makes no sense.
            assert result["in"] or result.get("status", 0x4191) == 0x4191
            client.run(f"nvme disconnect-all; {FORGET_KEYS}")


def test_initrd_shows_a_code_and_takes_credentials(
    boot: BootMachine, images: dict[str, Image], standard: str, tmp_path: Path
) -> None:
    """Who reads the screen gets in; and a host that firmware has told of, with its key."""
    hosts = f"{OTHER} {WRONG_KEY}"
    credential = f"type=11,value=io.systemd.credential:storagetm.hosts={hosts}"
    initrd = with_agent(
        images[standard], harness_images.initrd(images[standard], *DRACUT_OPTIONS), tmp_path / "initrd.img"
    )
    wire = Wire()
    target = boot(
        "screen",
        wait=False,
        initrd=initrd,
        kernel_options=(*OPTIONS, "rd.storagetm.pair"),
        disks=[Disk("first", serial="DISK-1")],
        nics=[Nic(wire, 0)],
        qemu_options=["-smbios", credential],
    )
    client = boot("reader", nics=[Nic(wire, 1)])
    client.run("ip address add 169.254.10.10/16 dev eth0")
    start_tls(client)
    screen = target.wait_screen(r"^ +-I \S+ --tls", redraw="x")
    print("\n".join(screen))
    typed = commands(screen)
    # Which of the addresses is there first, nobody knows.
    typed = [line.replace("INTERFACE", "eth0") for line in typed]
    for line in typed:
        client.run(line)
    (disk,) = nodes(client, 1)
    content = hashlib.sha256(target.disk_path("first").read_bytes()).hexdigest()
    assert digests(client, disk) == {content}
    client.run(f"nvme disconnect-all; {FORGET_KEYS}")
    # Without the key, not; with that of the credential.
    words = typed[-1].split()
    assert client.run([*words[:-1]], check=False).returncode
    assert client.run(words, check=False).returncode
    nqn = words[words.index("-n") + 1]
    words[words.index("-q") + 1 : words.index("-q") + 4] = [OTHER, "-I", OTHER[-36:]]
    assert client.run(words, check=False).returncode
    insert_key(client, OTHER, nqn, WRONG_KEY)
    client.run(words)
    (disk,) = nodes(client, 1)
    assert digests(client, disk) == {content}
    client.run("nvme disconnect-all")


@pytest.mark.parametrize("kinds", ["SIGKILL", pytest.param("EIO,EDQUOT,stuck", marks=pytest.mark.reach)])
def test_crash_or_failure_at_every_step_is_recovered(boot: BootMachine, kinds: str) -> None:
    machine = boot("steps", disks=[Disk("first", serial="DISK-1")])
    start_tls(machine)
    machine.run("modprobe -a nvmet-tcp dm-mod")
    bench.install(machine)
    machine.put("/run/harness/crash.py", CRASH)
    words = ["python3", "/run/harness/crash.py", kinds, "/usr/local/bin/storagetm", code_file(machine)]
    process = machine.start_process([*words, "/dev/vdb"])
    assert process.wait(3000) == 0, process.output
    print(process.output)
    result = json.loads(process.output.splitlines()[-1])
    assert result["wrong"] == []
    for kind in kinds.split(","):
        if kind in ("SIGKILL", "EIO"):
            assert result["counts"][f"add_key {kind}"] >= 4
            assert result["counts"][f"keyctl {kind}"] >= 10
