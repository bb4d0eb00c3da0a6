# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people are told: addresses as they come and go, on the screen and in the journal, and the commands
for the client, which are tried there as they stand.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.machine import CommandError, Disk, Machine, Nic, Process, Wire
from tests.vm.conftest import TOOL, BootMachine, prepare
from tests.vm.disks import expected_uuid, uuids
from tests.vm.nvmet import Service, exported, exporting, names

PRINTK = "/proc/sys/kernel/printk"
COLUMNS, ROWS = 80, 25  # of the serial console
PAGES = 5  # for 30 disks
REDRAW = "\x0c"  # as any key does that turns no page

# A service that has the serial console.
CONSOLE = ("StandardInput=tty-force", "StandardOutput=tty", "StandardError=tty", "TTYPath=/dev/ttyS0")


def link_local(machine: Machine, interface: str = "eth0") -> str:
    """The machine's link-local address, without the prefix's length."""
    script = f"ip -6 -o address show dev {interface} scope link -tentative | grep -o 'fe80::[^/]*'"
    return machine.wait_run(script).stdout.strip()


def commands(machine: Machine, what: str = "connect-all") -> list[str]:
    """The `nvme` commands on the screen, from top to bottom."""
    # What does not fit into a row goes on in the next.
    text = "".join(row if len(row) == COLUMNS else f"{row}\n" for row in machine.screen())
    text = text.replace("\\\n", "")
    return [" ".join(c.split()) for c in re.findall(rf"^ +(nvme {what} .*)$", text, re.MULTILINE)]


def wait_commands(machine: Machine, expected: list[str], what: str = "connect-all") -> None:
    begin = time.monotonic()
    while (found := commands(machine, what)) != expected:
        assert time.monotonic() < begin + 120, found
        machine.send_keys(REDRAW)  # QEMU's serial line doubles a character now and then
        time.sleep(2)


def command(address: str, *, scope: bool = False) -> str:
    """What the screen says about an address, for the prefix "quux"."""
    port = 29423 if ":" in address else 16858
    return f"nvme connect-all -t tcp -a {address} -s {port}" + (" -f INTERFACE" if scope else "")


def clear(machine: Machine) -> None:
    """Clears the serial console of what was on it before."""
    machine.run("printf '\\033[2J' > /dev/ttyS0")
    machine.wait_until(lambda: not any(machine.screen()))


@contextlib.contextmanager
def on_console(machine: Machine, *arguments: str) -> Iterator[Service]:
    """The tool on the serial console."""
    clear(machine)
    with exporting(machine, *arguments, properties=CONSOLE) as service:
        machine.wait_screen("Ctrl-C stops", redraw=REDRAW)
        yield service


def test_screen_follows_addresses(target: Machine) -> None:
    with on_console(target, "--nqn=quux", "/dev/nvme0n1") as service:
        check_following(target, service)


def check_following(target: Machine, console: Service) -> None:
    """IPv4 stands before IPv6, global before link-local, and nothing that cannot be reached."""
    ipv4, local = command("192.0.2.1"), command(link_local(target), scope=True)
    wait_commands(target, [ipv4, local])
    title = r"\A Storage target mode: .*\(Debian GNU/Linux 13 \(trixie\)\) *$"
    target.wait_screen(title, redraw=REDRAW)

    target.run("ip address add 2001:db8::1/64 dev eth0; ip address add 198.51.100.7/24 dev eth0")
    both = [ipv4, command("198.51.100.7")]
    wait_commands(target, [*both, command("2001:db8::1"), local])
    assert console.show("StatusText") == "Exporting 1 disk at 4 addresses."
    target.run("ip address change 2001:db8::1/64 dev eth0 preferred_lft 0")
    wait_commands(target, [*both, local])
    target.run("ip address delete 2001:db8::1/64 dev eth0; ip address delete 198.51.100.7/24 dev eth0")
    wait_commands(target, [ipv4, local])

    # An interface without hardware comes behind those with, whatever it is called. A bridge has that of its
    # port; of the port's own addresses, those remain that the bridge answers for, at the end.
    target.run(
        "ip link add aaa0 type dummy && ip address add 172.17.0.1/16 dev aaa0 && ip link set aaa0 up &&"
        "sysctl -q net.ipv6.conf.aaa0.disable_ipv6=1"
    )
    wait_commands(target, [ipv4, local, command("172.17.0.1")])
    target.run(
        "ip link add zzz0 type bridge && ip address add 198.51.100.7/24 dev zzz0 && ip link set zzz0 up &&"
        "sysctl -q net.ipv6.conf.zzz0.disable_ipv6=1 && ip link set eth0 master zzz0"
    )
    wait_commands(target, [command("198.51.100.7"), command("172.17.0.1"), ipv4])
    target.run("ip link delete zzz0; ip link delete aaa0")
    wait_commands(target, [ipv4, local])

    # The address stays while the interface is down, but nobody gets there.
    target.run("ip link set eth0 down")
    target.wait_screen("The network is down", redraw=REDRAW)
    wait_commands(target, [])
    wait_commands(target, [], "connect")
    assert console.show("StatusText") == "Exporting 1 disk at no address (the network is down)."
    target.run("ip link set eth0 up")
    wait_commands(target, [ipv4, local])

    # The same for the cable.
    target.set_link(False)
    try:
        target.wait_screen("The network is down", redraw=REDRAW)
    finally:
        target.set_link(True)
    wait_commands(target, [ipv4, local])


def test_addresses_of_no_use_are_never_shown(target: Machine, client: Machine) -> None:
    """Lines in the journal: addresses that are tentative, duplicate, deprecated or local never appear."""
    never = ["2001:db8::7e", "2001:db8::dd", "2001:db8::de", "203.0.113.1", "2001:db8::10"]
    settings = "net.ipv6.conf.eth0.accept_dad net.ipv6.conf.eth0.dad_transmits"
    before = target.run(f"sysctl {settings}").stdout
    # Two addresses for one check each: one that the client has already, and one whose check takes minutes.
    client.run("ip address add 2001:db8::dd/64 dev eth0 nodad")
    try:
        with exporting(target, "--nqn=quux", "/dev/nvme0n1") as service:
            target.run(
                "sysctl -q net.ipv6.conf.eth0.accept_dad=1;"
                "ip address add 203.0.113.1/24 dev lo scope global; ip address add 2001:db8::10/64 dev lo;"
                "ip address add 2001:db8::de/64 dev eth0 preferred_lft 0 nodad;"
                "ip address add 2001:db8::dd/64 dev eth0"
            )
            target.wait_run("ip -6 address show dev eth0 dadfailed | grep 2001:db8::dd")
            target.run(
                "sysctl -q net.ipv6.conf.eth0.dad_transmits=1000; ip address add 2001:db8::7e/64 dev eth0"
            )
            target.run("ip -6 address show dev eth0 tentative | grep 2001:db8::7e")
            # What comes last is shown, so that the others have been looked at by then.
            target.run("ip address add 198.51.100.7/24 dev eth0")
            service.wait_output("^Attach all disks with: nvme connect-all -t tcp -a 198.51.100.7 -s 16858$")
            target.run("ip address delete 198.51.100.7/24 dev eth0")
            service.wait_output(
                "^No longer: Attach all disks with: nvme connect-all -t tcp -a 198.51.100.7 -s 16858$"
            )
            journal = service.journal()
            target.run("ip -6 address show dev eth0 tentative | grep 2001:db8::7e")
    finally:
        client.run("ip address delete 2001:db8::dd/64 dev eth0")
        target.run(
            "ip address delete 203.0.113.1/24 dev lo; ip address delete 2001:db8::10/64 dev lo;"
            "for last in 7e dd de; do ip address delete 2001:db8::$last/64 dev eth0; done;"
            + "".join(f"sysctl -q {line};" for line in before.replace(" ", "").splitlines())
        )
    for priority, line in journal:
        assert not any(f" {address} " in line for address in never)
        assert " ::1 " not in line
        assert " 127." not in line
        # Facts, each on a line of its own.
        assert priority == 6
    lines = [line for _, line in journal]
    assert len(lines) == len(set(lines))
    assert f"Attach all disks with: {command('192.0.2.1')}" in lines


def attach(target: Machine, client: Machine, sources: list[str]) -> None:
    """Types the commands on the target's screen on the client, and compares the disks with their sources."""
    # Until it is on the screen as it was meant.
    target.wait_screen(
        r" -n nqn\.2023-10\.io\.systemd:storagetm\.[0-9a-f]{32}\.(virtio-|file)", redraw=REDRAW
    )
    digests = target.run("cat " + " ".join(f"<(sha256sum < {source})" for source in sources)).stdout
    for what in ("connect-all", "connect"):
        lines = commands(target, what)
        # Each stands on a line of its own, or on two with a backslash in between.
        assert len(lines) == (1 if what == "connect-all" else len(sources))
        try:
            for line in lines:
                assert line.count(" -f INTERFACE") == 1
                client.run(line.replace("INTERFACE", "eth0"))
            client.wait_run(f"ls /dev/nvme*n1 && test $(ls /dev/nvme*n1 | wc -l) = {len(sources)}")
            found = client.run("for disk in /dev/nvme*n1; do sha256sum < $disk; done").stdout
        finally:
            client.run("nvme disconnect-all")
        client.wait_run("! ls /dev/nvme*n1")
        assert sorted(found.splitlines()) == sorted(digests.splitlines())


def test_link_local_line_works_as_it_stands(target: Machine, client: Machine) -> None:
    """With link-local addresses only, the commands on the screen work on the client as they stand."""
    disk = "/dev/disk/by-id/virtio-DISK-ALPHA"
    target.run(f"head -c 1M /dev/urandom > {disk}; ip address delete 192.0.2.1/24 dev eth0")
    client.run("modprobe nvme-tcp")
    try:
        with on_console(target, disk):
            attach(target, client, [disk])
    finally:
        target.run("ip address add 192.0.2.1/24 dev eth0")


def test_link_local_line_works_on_debian_12(boot: BootMachine, tool: Path) -> None:
    """The same with nvme-cli 2.4 and Linux 6.1 on both sides, whose tmpfs also has no direct I/O."""
    wire = Wire()
    disks = [Disk("alpha", serial="DISK-ALPHA")]
    target = boot("old-target", "bookworm", wait=False, disks=disks, nics=[Nic(wire, 0)])
    client = boot("old-client", "bookworm", wait=False, nics=[Nic(wire, 1)])
    for machine in (target, client):
        machine.wait_boot()
        prepare(machine, tool)
    sources = ["/dev/disk/by-id/virtio-DISK-ALPHA", "/run/file"]
    target.run(f"head -c 1M /dev/urandom | tee {sources[0]} > {sources[1]}")
    client.run("modprobe nvme-tcp")
    link_local(target)
    with on_console(target, "--read-write", *sources):
        attach(target, client, sources)
        # The loop device over the file does without, too.
        assert target.run("losetup --noheadings --output DIO,BACK-FILE").stdout.split() == ["0", "/run/file"]


def test_kernel_messages_do_not_tear_the_screen(target: Machine) -> None:
    """Kernel messages do not tear the screen; the console's level is put back even after a crash."""
    level = target.run(f"cat {PRINTK}").stdout
    assert not level.startswith("1\t")
    first, second = (Service(target, ["--nqn=quux", "/dev/nvme0n1"], properties=CONSOLE) for _ in range(2))
    clear(target)
    first.start()
    target.wait_screen("Ctrl-C stops", redraw=REDRAW)
    assert target.run(f"cat {PRINTK}").stdout == "1" + level[1:]
    target.run("echo '<2>This would tear the screen.' > /dev/kmsg")
    assert "tear the screen" not in "\n".join(target.screen())
    first.kill("KILL")
    target.wait_run(f"systemctl is-failed {first.unit}")
    target.run(f"systemctl reset-failed {first.unit}")
    assert target.run(f"cat {PRINTK}").stdout.startswith("1\t")

    # The next one takes all of that over.
    clear(target)
    second.start()
    target.wait_screen("Ctrl-C stops", redraw=REDRAW)
    assert target.run(f"cat {PRINTK}").stdout.startswith("1\t")
    assert exported(target) == {"nvme0n1"}
    target.send_keys("\x03")
    target.wait_run(f"! systemctl --quiet is-active {second.unit}")
    assert target.run(f"systemctl --quiet is-failed {second.unit}", check=False).returncode
    assert target.run(f"cat {PRINTK}").stdout == level
    assert not names(target)


def test_each_disk_is_on_one_page(target: Machine) -> None:
    """30 disks: each is on just one of the pages, and every page fits."""
    target.run("modprobe null_blk nr_devices=30 gb=1; udevadm settle")
    devices = [f"/dev/nullb{number}" for number in range(30)]
    try:
        with on_console(target, "--nqn=quux", *devices):
            shown: list[str] = []
            for number in range(1, PAGES + 1):
                # Title, blank line, ..., blank line, hint: all rows of the terminal.
                page = rf"\A Storage target mode: .*\n\n(.*\n){{{ROWS - 4}}}\n.* Page {number} of {PAGES} "
                begin = time.monotonic()
                while True:
                    text = "\n".join(target.wait_screen(page, redraw=REDRAW))
                    found = re.findall(r"^(/dev/nullb\d+) +1.1 GB ", text, re.MULTILINE)
                    # No disk is torn from its command.
                    named = re.findall(r"^  nvme connect -t .* -n quux\.(nullb\d+)$", text, re.MULTILINE)
                    if found == [f"/dev/{name}" for name in named] == devices[len(shown) :][: len(found)]:
                        break
                    assert time.monotonic() < begin + 60, text
                    target.send_keys(REDRAW)  # as in wait_screen()
                    time.sleep(1)
                shown += found
                target.send_keys(" ")
            assert shown == devices
            # After the last comes the first, and before that the last.
            target.wait_screen(f" Page 1 of {PAGES} ", redraw=REDRAW)
            target.send_keys("b")
            target.wait_screen(f" Page {PAGES} of {PAGES} ", redraw=REDRAW)
    finally:
        target.run("modprobe -r null_blk; udevadm settle")


# Runs a command on a new pseudo terminal of 80 columns and 25 rows, and copies what it writes there. SIGUSR1
# takes the terminal away, SIGTERM is passed on. Ends with the command's return code.
PTY = """
import fcntl, os, pty, signal, struct, sys, termios

pid, master = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    os.execv(sys.argv[1], sys.argv[1:])

def take_away(*_):
    global master
    os.close(master)
    master = -1

signal.signal(signal.SIGUSR1, take_away)
signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
try:
    while data := os.read(master, 65536):
        os.write(1, data)
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def on_terminal(machine: Machine, *arguments: str, term: str) -> Process:
    """Starts the tool on a pseudo terminal; see PTY."""
    machine.put("/run/terminal.py", PTY)
    return machine.start_process(
        ["python3", "/run/terminal.py", TOOL, *arguments], environment={"TERM": term}
    )


def test_dumb_terminal_gets_ascii(target: Machine, client: Machine) -> None:
    """Plain ASCII, whatever the machine and its disks are called, and nothing that moves a cursor.

    A command that names such a disk can be typed as it stands.
    """
    target.run("echo 'PRETTY_HOSTNAME=Büro' > /etc/machine-info; truncate -s 1M /run/büro.img")
    try:
        process = on_terminal(target, "--nqn=quux", "/dev/nvme0n1", "/run/büro.img", term="dumb")
        process.wait_output("-n quux.nvme0n1")
        typed = process.wait_output(r"(nvme connect -t .*(?:\\\r\n)?.*-n \$'quux\.b.*ro\.img')\r$")[1]
        client.run(f"modprobe nvme-tcp; {typed}".replace("\r", ""))
        client.run("grep -x quux.büro.img /sys/class/nvme/nvme*/subsysnqn; nvme disconnect-all")
        target.run("ip address add 198.51.100.7/24 dev eth0")
        process.wait_output(" 198.51.100.7 ")
        output = process.output
        process.kill()
        assert process.wait() == 0
    finally:
        client.run("nvme disconnect-all")
        target.run("rm /etc/machine-info /run/büro.img; ip address delete 198.51.100.7/24 dev eth0")
    assert output.isascii()
    assert all(c.isprintable() or c in "\r\n" for c in output)
    assert "Storage target mode: B?ro (Debian" in output
    assert f"\n  {command('192.0.2.1')}\r\n" in output
    assert not names(target)


def test_locale_without_utf8_ends_nothing(target: Machine) -> None:
    """One that is not UTF-8: letters that it lacks end nothing, and a disk is the same as ever.

    They are in a mount point, in a file's name, and in the serial number of a disk that comes later.
    """
    serial = "SÉRIE-№7"
    with exporting(target, "--nqn=quux", "--all") as service:
        target.add_disk(Disk("letters", serial=serial))
        try:
            target.wait_until(lambda: expected_uuid(target, serial) in uuids(target))
        finally:
            target.remove_disk("letters")
    # A disk that returns is a new one otherwise.
    target.run(
        "rm /run/storagetm/*.disks*; mkdir /mnt/Łódź && mkfs.ext4 -q /dev/nvme0n1 &&"
        "mount /dev/nvme0n1 /mnt/Łódź &&"
        "truncate -s 1M /run/日本 && losetup -f /run/日本"
    )
    # Python takes the locale C for UTF-8 unless told not to, and the machine has no other ones.
    service = Service(
        target,
        ["LC_ALL=C", "python3", "-ISXutf8=0", TOOL, "--nqn=quux", "--all"],
        program="/usr/bin/env",
    )
    try:
        service.start()
        service.wait_output("^Not exporting '/dev/nvme0n1': .* mounted on '/mnt/Łódź'$")
        target.add_disk(Disk("letters", serial=serial))
        target.wait_until(lambda: expected_uuid(target, serial) in uuids(target))
    finally:
        target.remove_disk("letters")
        service.stop()
        target.run("losetup -D; umount /mnt/Łódź; rmdir /mnt/Łódź; rm /run/日本; wipefs -qa /dev/nvme0n1")
    assert "Traceback" not in service.output
    assert not names(target)


def test_terminal_that_goes_ends_nothing(target: Machine) -> None:
    """The terminal is taken away, which also hangs up: the disks stay, and are followed."""
    process = on_terminal(target, "--all", "--nqn=quux", term="xterm")
    process.wait_output(r"\x1b\[H")
    before = exported(target)
    process.kill(signal.SIGUSR1)
    target.wait_run("! ls /dev/pts/[0-9]*")
    try:
        target.add_disk(Disk("late", serial="DISK-LATE"))
        target.wait_until(lambda: len(exported(target)) == len(before) + 1)
        assert process.poll() is None
    finally:
        target.remove_disk("late")
    target.wait_until(lambda: exported(target) == before)
    process.kill()
    assert process.wait() == 0
    assert not names(target)


def test_terminal_that_is_stopped_stops_nothing(target: Machine) -> None:
    """Nobody reads what is written to the terminal, as after Ctrl-S: the disks are followed all the same."""
    process = on_terminal(target, "--all", "--nqn=quux", term="xterm")
    process.wait_output(r"\x1b\[H")
    before = exported(target)
    process.kill(signal.SIGSTOP)
    # All is shown anew each time, until the terminal takes no more: a pseudo terminal 8 KiB.
    target.run("for i in $(seq 15); do pkill -WINCH -f nqn=quux; sleep 0.8; done")
    target.add_disk(Disk("late", serial="DISK-LATE"))
    target.wait_until(lambda: len(exported(target)) == len(before) + 1)
    target.remove_disk("late")
    target.wait_until(lambda: exported(target) == before)
    target.run("ip address add 198.51.100.9/24 dev eth0")
    try:
        process.kill(signal.SIGCONT)
        # What has changed meanwhile is shown as it is now.
        process.wait_output(r"-a 198\.51\.100\.9 ")
    finally:
        target.run("ip address delete 198.51.100.9/24 dev eth0")
    process.kill(signal.SIGSTOP)
    target.run("for i in $(seq 15); do pkill -WINCH -f nqn=quux; sleep 0.8; done")
    target.run("pkill -TERM -f '[-]IS.*nqn=quux'")
    target.wait_until(lambda: not names(target))
    process.kill(signal.SIGCONT)
    assert process.wait() == 0
    assert not names(target)


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_output_ends_nothing(target: Machine, closed: str) -> None:
    process = target.start_process(f"exec {TOOL} --nqn=quux /dev/nvme0n1 {closed}")
    target.wait_until(lambda: exported(target) == {"nvme0n1"})
    target.run("ip address add 198.51.100.7/24 dev eth0 && ip address delete 198.51.100.7/24 dev eth0")
    assert process.poll(timeout=1) is None
    process.kill()
    assert process.wait() == 0
    assert "Traceback" not in process.output
    assert not names(target)


# Prints what comes in on the socket of the service manager, a line a message.
NOTIFY_LISTENER = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1].replace("@", "\\0"))
print("listening", flush=True)
while True:
    print(s.recv(4096).decode(), flush=True)
"""


@pytest.mark.parametrize("address", ["/run/notify-test", "@notify-test"])
def test_service_manager_is_told_in_order(target: Machine, address: str) -> None:
    """What a service manager is told, and in which order."""
    listener = target.start_process(["python3", "-c", NOTIFY_LISTENER, address])
    listener.wait_output("listening")
    try:
        process = target.start_process(
            [TOOL, "--nqn=quux", "/dev/nvme0n1"], environment={"NOTIFY_SOCKET": address}
        )
        listener.wait_output("^STATUS=Exporting 1 disk at 2 addresses.$")
        assert exported(target) == {"nvme0n1"}
        process.kill()
        assert process.wait() == 0
        listener.wait_output("^STOPPING=1$")
    finally:
        listener.kill()
        listener.wait()
        target.run("rm -f /run/notify-test")
    assert listener.output.splitlines() == [
        "listening",
        "READY=1",
        "STATUS=Exporting 1 disk at 2 addresses.",
        "STOPPING=1",
    ]


def test_messages_have_priorities(target: Machine) -> None:
    """Facts, warnings and errors in the journal, each with its priority."""
    with exporting(target, "--nqn=quux", "/dev/nvme0n1", "/dev/nvme0n1") as service:
        journal = service.journal()
    assert (4, "'/dev/nvme0n1' is the same as '/dev/nvme0n1', exporting it once") in journal
    assert (6, f"Attach all disks with: {command('192.0.2.1')}") in journal
    assert {priority for priority, _ in journal} == {4, 6}

    service = Service(target, ["--nqn=quux", "/dev/no-such-disk"])
    with pytest.raises(CommandError):
        service.start()
    target.run(f"systemctl reset-failed {service.unit}")
    assert service.journal() == [(3, "Failed to export '/dev/no-such-disk': No such file or directory")]


def test_plymouth_shows_the_shortest_command(target: Machine) -> None:
    """Plymouth takes the shortest of the commands, and later that there is no network."""
    target.run("plymouthd --mode=boot --tty=/dev/tty1")
    try:
        target.wait_run("plymouth --ping")
        strace = target.start_process("exec strace -f -s 300 -e trace=read,write -p $(pgrep -x plymouthd)")
        strace.wait_output("attached")
        with exporting(target, "--nqn=quux", "/dev/nvme0n1"):
            # After each message comes Plymouth's ACK.
            ack = r'\\0", \d+\) += \d+\n(?:[^\n]*EAGAIN[^\n]*\n)*[^\n]*write\(\d+, "\\6", 1\)'
            strace.wait_output(f'"{command("192.0.2.1")}{ack}')
            target.run("ip address add 10.0.0.1/8 dev eth0")
            strace.wait_output(f'"{command("10.0.0.1")}{ack}')
            target.run("ip address delete 10.0.0.1/8 dev eth0; ip link set eth0 down")
            try:
                strace.wait_output(f'"Storage target mode: the network is down{ack}')
            finally:
                target.run("ip link set eth0 up")
        target.run("plymouth --ping")
    finally:
        target.run("plymouth quit")
    strace.wait()
