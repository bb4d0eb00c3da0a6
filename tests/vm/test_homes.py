# SPDX-License-Identifier: LGPL-2.1-or-later
"""Home directories of systemd-homed on another machine, which has a signing key of its own."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import images as harness_images
from tests.harness.images import Image
from tests.harness.machine import CommandError, Disk, Machine, Nic, Result, Wire
from tests.unit.test_homes import HOME, MACHINE_ID, write_home
from tests.vm.conftest import BootMachine
from tests.vm.initiator import TARGET_ADDRESS
from tests.vm.nvmet import Service, exporting
from tests.vm.test_initrd import DRACUT_OPTIONS, OPTIONS
from tests.vm.test_pairing import FORGET_KEYS, HOST, KEY, attach, code_file, insert_key, start_tls, subsystem

LOGIN = Path(__file__).parent / "guest/login.py"
PASSWORD = "secret-Pass1"
PORT = 16858
# Quick, which a real one must not be.
CREATE = "--storage=luks --luks-pbkdf-type=pbkdf2 --luks-pbkdf-force-iterations=1000"
CREATE += " --enforce-password-policy=no"
STRANGER = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-4333-8444-555555555555"

_numbers = itertools.count(1)


def homectl(machine: Machine, *arguments: str, check: bool = True) -> Result:
    secrets = f"PASSWORD={PASSWORD} NEWPASSWORD={PASSWORD}"
    return machine.run(f"{secrets} homectl {' '.join(arguments)}", check=check)


def state(machine: Machine, user: str) -> str:
    """What systemd-homed says of a user's home directory; empty if it knows none."""
    found = re.search(rf"^{user} +\d+ +\d+ +(\S+)", homectl(machine, "list", check=False).stdout, re.M)
    return found[1] if found else ""


def wait_state(machine: Machine, user: str, expected: str) -> None:
    machine.wait_until(lambda: state(machine, user) == expected)


def sizes(machine: Machine, disk: str) -> tuple[int, int]:
    """Of a file or device and of the partition in it, in bytes."""
    script = f"stat -Lc %s {disk}; sfdisk --dump {disk}"
    text = machine.run(script).stdout
    (sectors,) = re.findall(r"size= *(\d+), type=773f91ef", text, re.IGNORECASE)
    return int(text.split()[0]), int(sectors) * 512


@pytest.fixture(scope="module")
def homed(target: Machine, client: Machine) -> Iterator[tuple[Machine, Machine]]:
    units = "systemd-homed.service systemd-userdbd.socket"
    for machine in (target, client):
        # systemd-homed may open the node of device-mapper only if that is there when it starts.
        machine.run(
            f"modprobe -a dm-mod dm-crypt btrfs nvme-tcp; rm -f /run/nologin; systemctl start {units}"
        )
        machine.put("/run/login.py", LOGIN)
        # On a busy computer a home directory may take longer than the minute that login(1) gives it.
        machine.run("sed -i '/^LOGIN_TIMEOUT/d' /etc/login.defs && echo LOGIN_TIMEOUT 600 >>/etc/login.defs")
    yield target, client
    for machine in (target, client):
        machine.run(f"systemctl stop {units} systemd-userdbd.service")


@pytest.fixture
def user(homed: tuple[Machine, Machine]) -> Iterator[str]:
    """Has a home directory on the target, and is known nowhere else."""
    target, client = homed
    name = f"user{next(_numbers)}"
    homectl(target, "create", name, CREATE, "--disk-size=300M --fs-type=btrfs")
    yield name
    for machine in (client, target):
        machine.set_link(True)
        machine.run("systemctl stop 'test-*.service'; systemctl reset-failed 'test-*.service'", check=False)
        machine.run("nvme disconnect-all")
        homectl(machine, "deactivate", name, check=False)
        homectl(machine, "remove", name, check=False)


def trust(target: Machine, client: Machine) -> None:
    """Has the client take the target's users, as the manual page says it."""
    key = "/var/lib/systemd/home/local.public"
    raw = target.get(key)
    if "add-signing-key" in client.run("homectl --help").stdout:
        if "target.public" not in client.run("homectl list-signing-keys").stdout:
            client.put("/run/target.public", target.run("homectl get-signing-key").stdout)
            client.run("homectl add-signing-key /run/target.public")
    else:
        client.put(key.replace("local", "target"), raw)
        client.run("systemctl restart systemd-homed")


def log_in(machine: Machine, user: str, command: str) -> str:
    """What the terminal has shown."""
    # The whole system is not up in these machines, which is what keeps users out.
    words = ["python3", "/run/login.py", user, PASSWORD, command]
    return machine.run(f"rm -f /run/nologin; {shlex.join(words)}", timeout=300).stdout


def connect(client: Machine, user: str, more: str = "", *, check: bool = True) -> Result:
    where = f"-t tcp -a {TARGET_ADDRESS} -s {PORT} -n quux.{user}"
    return client.run(f"nvme connect {where} {more}", check=check)


def test_user_is_on_the_other_machine(homed: tuple[Machine, Machine], user: str) -> None:
    """With a code and the usual password, and what was written there is here afterwards."""
    target, client = homed
    image = f"/home/{user}.home"
    for machine in homed:
        start_tls(machine)
    homectl(target, "activate", user)
    target.run(f"echo here >/home/{user}/file; chown {user}: /home/{user}/file")
    with exporting(target, "--homes", code_file(target)) as service:
        service.wait_output(f"^Not exporting '{image}': .*{user} is logged in here$")
        homectl(target, "deactivate", user)
        # Nobody has told the program.
        service.wait_output(f"^Exporting '{image}' .*home of {user}.* read-write")
        service.wait_output("^Each home directory is for one client at a time")
        went = sizes(target, image)
        refused = homectl(target, "activate", user, check=False)
        assert "being used elsewhere" in refused.stderr

        nqn, port = subsystem(target)
        insert_key(client, HOST, nqn, KEY)
        attach(client, nqn, port, "--tls")
        wait_state(client, user, "unfixated")
        # The key of another machine has to be made known first.
        refused = homectl(client, "activate", user, check=False)
        assert "not signed by any known key" in refused.stderr
        trust(target, client)
        shown = log_in(client, user, "cat file; echo there >>file; pwd")
        assert re.search(rf"^here\r?\n/home/{user}\r?$", shown, re.M), shown
        wait_state(client, user, "inactive")
        client.run("nvme disconnect-all")
    client.run(FORGET_KEYS)
    for machine in homed:
        machine.run("systemctl stop tlshd")
    assert sizes(target, image)[0] == went[0]
    assert sizes(target, image)[1] >= went[1]
    shown = log_in(target, user, "cat file")
    assert re.search(r"^here\r?\nthere\r?$", shown, re.M), shown
    wait_state(target, user, "inactive")


def test_other_client_is_kept_away_and_an_interrupted_home_marked(
    homed: tuple[Machine, Machine], user: str
) -> None:
    target, client = homed
    trust(target, client)
    service = Service(target, ["--nqn=quux", f"--homes={user}", "--read-write"])
    service.start()
    connect(client, user)
    wait_state(client, user, "inactive" if state(client, user) == "inactive" else "unfixated")
    homectl(client, "activate", user)
    refused = connect(client, user, f"--hostnqn={STRANGER} --hostid={STRANGER[-36:]}", check=False)
    assert refused.returncode != 0
    assert state(target, user) == "inactive"
    service.stop()
    assert f"'/home/{user}.home' was taken away while a client was attached" in service.output
    assert state(target, user) == "dirty"
    # The client's file system has to be gone before its disk.
    client.run("nvme disconnect-all")
    homectl(client, "deactivate", user, check=False)
    homectl(target, "activate", user)
    homectl(target, "deactivate", user)
    assert state(target, user) == "inactive"


@pytest.mark.reach
def test_session_outlasts_a_kill_and_a_pulled_cable(homed: tuple[Machine, Machine], user: str) -> None:
    target, client = homed
    trust(target, client)
    arguments = ["--nqn=quux", "--homes", "--read-write"]
    service = Service(target, arguments)
    service.start()
    connect(client, user)
    client.wait_until(lambda: state(client, user))
    homectl(client, "activate", user)
    script = f"n=0; while sleep 0.2; do n=$((n+1)); echo $n >>/home/{user}/log; sync /home/{user}/log; done"
    writer = client.start_process(["sh", "-c", script])

    def written() -> int:
        return int(client.run(f"wc -l </home/{user}/log").stdout)

    def goes_on() -> None:
        before = written()
        client.wait_until(lambda: written() > before + 3, 200)

    client.wait_run(f"test -s /home/{user}/log")
    goes_on()
    service.kill("SIGKILL")
    target.wait_until(lambda: service.show("ActiveState") == "failed")
    again = Service(target, arguments)
    again.start()
    goes_on()
    client.set_link(False)
    # Until the host has noticed and has tried in vain to come back.
    client.wait_until(lambda: "Failed reconnect attempt 1" in client.run("dmesg").stdout, 200)
    client.set_link(True)
    goes_on()
    writer.kill()
    writer.wait()
    count = written()
    homectl(client, "deactivate", user)
    client.run("nvme disconnect-all")
    again.stop()
    homectl(target, "activate", user)
    lines = target.run(f"cat /home/{user}/log").stdout.split()
    assert lines == [str(i) for i in range(1, count + 1)]
    homectl(target, "deactivate", user)


@pytest.mark.reach
def test_home_keeps_its_size_over_ten_trips(homed: tuple[Machine, Machine], user: str) -> None:
    """Although what fills it is deleted on the other machine, and comes back at home."""
    target, client = homed
    trust(target, client)
    image = f"/home/{user}.home"
    homectl(target, "resize", user, "600M")
    # Blocks that are only allocated are not enough: then nothing shrinks.
    fill = f"""
        for i in 1 2 3 4 5 6 7; do
            head -c 50M /dev/urandom >/home/{user}/big$i; sync -f /home/{user}
        done"""
    drop = f"rm /home/{user}/big?; for i in 1 2 3; do btrfs filesystem sync /home/{user}; sleep 1; done"
    shrunk = 0
    full: list[tuple[int, int]] = []
    for _ in range(10):
        homectl(target, "activate", user)
        full.append(sizes(target, image))
        target.run(fill, timeout=300)
        homectl(target, "deactivate", user)
        went = sizes(target, image)
        with exporting(target, "--nqn=quux", "--homes", "--read-write"):
            connect(client, user)
            client.wait_until(lambda: state(client, user) in ("inactive", "unfixated"))
            homectl(client, "activate", user)
            client.run(drop)
            homectl(client, "deactivate", user)
            client.run("nvme disconnect-all")
            shrunk += sizes(target, image)[1] < went[1] // 2
        back = sizes(target, image)
        assert back[0] == went[0]
        assert back[1] >= went[1] - (1 << 20)
    # Otherwise this shows nothing.
    assert shrunk == 10
    assert len({size for size, _ in full}) == 1
    assert max(part for _, part in full) - min(part for _, part in full) <= 4 << 20


@pytest.mark.reach
def test_home_is_on_a_stick_or_is_one(homed: tuple[Machine, Machine]) -> None:
    """A block device that is a home is exported whole; and over USB a home in a file is a stick."""
    target, client = homed
    name = f"user{next(_numbers)}"
    homectl(target, "create", name, CREATE, "--image-path=/dev/vdc --fs-type=ext4")
    target.run("udevadm settle")
    try:
        with exporting(target, "--nqn=quux", "--homes", "--read-write") as service:
            service.wait_output(f"^Exporting '/dev/vdc' .*home of {name}")
            trust(target, client)
            connect(client, name)
            client.wait_until(lambda: state(client, name))
            homectl(client, "activate", name)
            client.run(f"echo there >/home/{name}/file")
            with pytest.raises(CommandError):
                homectl(target, "activate", name)
            homectl(client, "deactivate", name)
            client.run("nvme disconnect-all")
        homectl(target, "activate", name)
        assert target.run(f"cat /home/{name}/file").stdout == "there\n"
        homectl(target, "deactivate", name)
    finally:
        client.run("nvme disconnect-all")
        homectl(target, "remove", name, check=False)
        target.run(
            "wipefs --quiet --all /dev/vdc && dd if=/dev/zero of=/dev/vdc bs=1M 2>/dev/null", check=False
        )
        target.run("blockdev --rereadpt /dev/vdc; udevadm settle")


@pytest.mark.reach
def test_initrd_exports_homes_of_the_root_file_system(
    boot: BootMachine, images: dict[str, Image], standard: str, tmp_path: Path
) -> None:
    """If that is mounted; its disk is in use then, and left out."""
    tree = tmp_path / "tree"
    for directory in ("dev", "etc", "proc", "run", "sys", "usr/bin", "var/lib/systemd/home"):
        (tree / directory).mkdir(parents=True)
    (tree / "etc/machine-id").write_text(f"{MACHINE_ID}\n")
    (tree / "etc/os-release").write_text("ID=debian\n")
    (tree / "var/lib/systemd/home/lennart.identity").write_text(HOME["record"])
    write_home(tree / "home/lennart.home")
    root = tmp_path / "root.img"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, root, "100M"], check=True)
    target = boot(
        "rooted",
        wait=False,
        initrd=harness_images.initrd(images[standard], *DRACUT_OPTIONS, "--filesystems", "ext4"),
        kernel_options=(
            *OPTIONS,
            *("root=/dev/vda", "rw", "rd.systemd.wants=sysroot.mount", "rd.storagetm.homes"),
            "rd.storagetm.read-write",
        ),
        disks=[Disk("root", path=root), Disk("other", serial="DISK-OTHER")],
        nics=[Nic(Wire(), 0)],
    )
    # The model behind it is cut off at the edge of the screen.
    target.wait_screen(r"^/sysroot/home/lennart\.home +593\.5 MB +READ-WRITE +home o", redraw="x")


@pytest.mark.reach
def test_home_is_a_stick_over_usb(homed: tuple[Machine, Machine], user: str) -> None:
    target, _ = homed
    target.run("modprobe dummy_hcd")
    with exporting(target, "--transport=usb", "--homes", "--read-write"):
        script = "lsblk --noheadings --output PARTTYPE,TRAN,PKNAME,PARTLABEL --list"
        target.wait_until(lambda: re.search(rf"773f91ef\S+ .*sd\w+ +{user}\b", target.run(script).stdout))
    target.run("modprobe -r dummy_hcd")
