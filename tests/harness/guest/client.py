# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures clients of the project's program or the peer inside an emulated machine, where it runs.

    client.py reads RUNS NAME=COMMAND...
    client.py attach RUNS DISKS NAME=COMMAND...
    client.py transports RUNS NAME=COMMAND...

Each command exports null_blk disks, and the same machine attaches them over its loopback interface. So there
is no network, which would hide some of the work. One with `--pair` gets a code, and its client what is made
from that: the secrets for DH-HMAC-CHAP with `--encrypt=no`, or else TLS. Prints one JSON object a line.

reads: One disk that answers after 50 microseconds, as a fast SSD does, is read past the cache: from the
beginning in pieces of 128 KiB, and 4 KiB at random places, one at a time; `sequential` in MB/s, `random` in
reads a second. `cipher` is what encrypts the connections, and the kernel's driver that does; empty without.

attach: DISKS disks are attached with `nvme connect-all`; `command` until nvme is done and `disks` until all
disks are there, in seconds, and `sockets`, the connections at the target's end.

transports: As reads, attached as the command's `--transport=` asks for it: by nvme, iscsiadm, nbd-client, or
the cable of dummy_hcd. A command that is just "ssh" is that with dd, for sequential reads in one go and for
each one at random anew, over one connection.
"""

from __future__ import annotations

import contextlib
import glob
import json
import mmap
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

NOTIFY = "/run/client.notify"
NQN = "quux"
PORT = "16858"  # that follows from the NQN
SUBSYSTEMS = "/sys/kernel/config/nvmet/subsystems"
# The example of the manual page, under "What is made from the code".
CODE = "k7fm-2qxd-9wtr-4hcn"
CODE_FILE = "/run/client.code"
HOST_ID = "79338e9a-2392-49a9-91f4-9675489fb8f3"
HOST = ["-q", f"nqn.2014-08.org.nvmexpress:uuid:{HOST_ID}", "-I", HOST_ID]
SECRETS = [
    *("-S", "DHHC-1:00:+CjuZwpXuWN6mZBucBOWV4WZl94PgPcNT6Vnyb31FBB10wjG:"),
    *("-C", "DHHC-1:00:Mq+KQxlduOENyArtRtykZGk2qd+vQDsSBRZoQD1PXfwFvqNK:"),
]
TIMEOUT = 600  # seconds, to start, to attach, to stop
LATENCY = 50_000  # of the disk that is read, in nanoseconds
PIECE, PIECES = 128 << 10, 2048
SMALL, SMALLS = 4 << 10, 2000
SSH_SMALLS = 20
SSH = [
    "ssh",
    "-p",
    "2222",
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "ControlPath=/run/client.ssh",
    "root@127.0.0.1",
]


@contextlib.contextmanager
def able_to_pair() -> Iterator[None]:
    """The machine with a code, and with what opens TLS connections for the kernel."""
    with open(os.open(CODE_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(CODE + "\n")
    # tlshd looks for the keyring when it starts.
    subprocess.run(["modprobe", "nvme-keyring"], check=True)
    subprocess.run(["systemctl", "restart", "tlshd"], check=True)
    try:
        yield
    finally:
        subprocess.run(["systemctl", "stop", "tlshd"], check=True)
        os.unlink(CODE_FILE)


@contextlib.contextmanager
def exported(command: str, what: str) -> Iterator[list[str]]:
    """What a command exports, once it says that it is ready; the options that its clients connect with."""
    words, options = shlex.split(command), []
    if "--pair" in words:
        # The target has put the key for TLS into the keyring, where this machine as the client finds it.
        options = [*HOST, *(SECRETS if "--encrypt=no" in words else ["--tls"])]
        words.append(f"--code-file={CODE_FILE}")
    subprocess.run(["udevadm", "settle"], check=True)
    if os.path.exists(NOTIFY):
        os.unlink(NOTIFY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open("/run/client.log", "wb") as log:
        notify.bind(NOTIFY)
        notify.settimeout(TIMEOUT)
        process = subprocess.Popen(
            [*words, f"--nqn={NQN}", what],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ, NOTIFY_SOCKET=NOTIFY),
        )
        try:
            while b"READY=1" not in notify.recv(8192).split(b"\n"):
                pass
            subprocess.run(["udevadm", "settle"], check=True)
            yield options
        finally:
            subprocess.run(["nvme", "disconnect-all"], check=True)
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)


def nvme(command: str, *options: str) -> None:
    words = ["nvme", command, "-t", "tcp", "-a", "127.0.0.1", "-s", PORT, *options]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def connections(*options: str) -> str:
    """What ss(8) says of the connections, at the target's end."""
    words = ["ss", "-Htn", *options, "state", "established", f"( sport = :{PORT} )"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def cipher() -> str:
    """What encrypts the connections, and the kernel's driver that does; empty if nothing does."""
    found = set(re.findall(r"\bcipher: (\S+)", connections("-i")))
    if not found:
        return ""
    (name,) = found
    # As the kernel's TLS asks for them: "aes-gcm-128" is "gcm(aes)".
    algorithm = re.sub(r"^(\w+)-(\w+)-\d+$", r"\2(\1)", name)
    with open("/proc/crypto") as file:
        entries = [dict(re.findall(r"(\w+) *: (.*)", entry)) for entry in file.read().split("\n\n")]
    able = [e for e in entries if e.get("name") == algorithm and e["internal"] == "no"]
    return f"{name}, {max(able, key=lambda e: int(e['priority']))['driver']}"


def attached(count: int) -> list[str]:
    """Waits for the nodes of this many disks, with their sizes, on the client's side."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        found = []
        for path in glob.glob("/sys/class/nvme-subsystem/*/nvme*n*/size"):
            with open(path) as size, open(f"{path.rsplit('/', 2)[0]}/subsysnqn") as nqn:
                if nqn.read().startswith(NQN) and size.read() != "0\n":
                    found.append("/dev/" + path.split("/")[-2])
        # The kernel makes the nodes a moment later.
        if len(found) >= count and all(map(os.path.exists, found)):
            return found
        time.sleep(0.01)
    raise TimeoutError("not attached")


def timed(fd: int, length: int, places: list[int]) -> float:
    """Seconds for reads of `length` bytes at these places."""
    buffer = mmap.mmap(-1, length)
    begin = time.monotonic()
    for place in places:
        if os.preadv(fd, [buffer], place) != length:
            raise OSError("short read")
    return time.monotonic() - begin


def read_from(node: str) -> dict[str, float | str]:
    """How fast a block device is read."""
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
    size = os.lseek(fd, 0, os.SEEK_END)
    subprocess.run(["udevadm", "settle"], check=True)
    sequential = timed(fd, PIECE, [i * PIECE for i in range(PIECES)])
    places = random.Random(1)
    at_random = timed(fd, SMALL, [places.randrange(size // SMALL) * SMALL for _ in range(SMALLS)])
    os.close(fd)
    return {"sequential": PIECE * PIECES / 1e6 / sequential, "random": SMALLS / at_random}


def measure_reads(command: str) -> dict[str, float | str]:
    with exported(command, "/dev/nullb0") as options:
        (nqn,) = os.listdir(SUBSYSTEMS)
        nvme("connect", "-n", nqn, *options)
        return {**read_from(attached(1)[0]), "cipher": cipher()}


def wait_for(path: str, pattern: str) -> re.Match[str]:
    """Until something in a file, or one of the paths of a glob's links, is as a regular expression says."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        text = "\n".join(map(os.path.realpath, glob.glob(path)))
        if os.path.isfile(path):
            with open(path) as file:
                text = file.read()
        if found := re.search(pattern, text, re.MULTILINE):
            return found
        time.sleep(0.05)
    raise TimeoutError(f"no {pattern} in {path}")


@contextlib.contextmanager
def node_over(transport: str) -> Iterator[str]:
    """The node of the exported disk, attached as this transport asks for."""
    if transport == "nvme-tcp":
        (nqn,) = os.listdir(SUBSYSTEMS)
        nvme("connect", "-n", nqn)
        yield attached(1)[0]  # all are detached at the end of exported()
    elif transport == "iscsi":
        iqn = wait_for("/run/client.log", r"as iSCSI LUN \d+ of (\S+)$")[1]
        node = ["iscsiadm", "-m", "node", "-T", iqn, "-p", "127.0.0.1:3260"]
        for action in (["-o", "new"], ["-l"]):
            subprocess.run([*node, *action], check=True, stdout=subprocess.DEVNULL)
        yield "/dev/" + wait_for("/sys/block/sd*", r"/session.*/(sd[a-z]+)$")[1]
        for action in (["-u"], ["-o", "delete"]):
            subprocess.run([*node, *action], check=True, stdout=subprocess.DEVNULL)
    elif transport == "nbd":
        subprocess.run(["modprobe", "nbd"], check=True)
        words = ["nbd-client", "127.0.0.1", "10809", "/dev/nbd0", "-N", "nullb0", "-b", "512"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield "/dev/nbd0"
        subprocess.run(["nbd-client", "-d", "/dev/nbd0"], check=True, stdout=subprocess.DEVNULL)
    else:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            # There are empty drives, too.
            for name in [
                p.split("/")[3] for p in glob.glob("/sys/block/sd*") if "/usb" in os.path.realpath(p)
            ]:
                with open(f"/sys/block/{name}/size") as size:
                    if size.read() != "0\n":
                        yield f"/dev/{name}"
                        return
            time.sleep(0.05)
        raise TimeoutError("no drive")


@contextlib.contextmanager
def ssh_server() -> Iterator[None]:
    """sshd on port 2222, and one connection to it that all commands go over."""
    os.makedirs("/root/.ssh", 0o700, exist_ok=True)
    os.makedirs("/run/sshd", exist_ok=True)
    if not os.path.exists("/root/.ssh/id_ed25519"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/.ssh/id_ed25519"], check=True
        )
        os.link("/root/.ssh/id_ed25519.pub", "/root/.ssh/authorized_keys")
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-p", "2222"])
    try:
        deadline = time.monotonic() + TIMEOUT
        while subprocess.run([*SSH[:-1], "-M", "-f", "-N", SSH[-1]], stderr=subprocess.DEVNULL).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError("no connection to sshd")
            time.sleep(0.2)
        yield
        subprocess.run([*SSH[:-1], "-O", "exit", SSH[-1]], check=True, stderr=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()


def measure_ssh() -> dict[str, float | str]:
    def read(length: int, count: int, place: int = 0) -> None:
        words = f"dd if=/dev/nullb0 bs={length} count={count} skip={place} iflag=direct status=none"
        with subprocess.Popen([*SSH, words], stdout=subprocess.PIPE) as process:
            assert process.stdout
            done = 0
            while piece := process.stdout.read(PIECE):
                done += len(piece)
        if done != length * count:
            raise OSError("short read")

    with ssh_server():
        begin = time.monotonic()
        read(PIECE, PIECES)
        sequential = time.monotonic() - begin
        places = random.Random(1)
        begin = time.monotonic()
        for _ in range(SSH_SMALLS):
            read(SMALL, 1, places.randrange((1 << 30) // SMALL))
        at_random = time.monotonic() - begin
    return {"sequential": PIECE * PIECES / 1e6 / sequential, "random": SSH_SMALLS / at_random}


def measure_transport(command: str) -> dict[str, float | str]:
    if command == "ssh":
        return measure_ssh()
    transport = re.findall(r"--transport=(\S+)", command)[0]
    subprocess.run(["modprobe", "dummy_hcd"], check=True)
    with exported(command, "/dev/nullb0"), node_over(transport) as node:
        return read_from(node)


def measure_attach(command: str, disks: int) -> dict[str, float | str]:
    with exported(command, "--all") as options:
        begin = time.monotonic()
        nvme("connect-all", *options)
        done = time.monotonic() - begin
        attached(disks)
        there = time.monotonic() - begin
        return {"command": done, "disks": there, "sockets": len(connections().splitlines())}


def main() -> None:
    what, runs, *arguments = sys.argv[1:]
    if what != "attach":
        disks = 1
        parameters = ["irqmode=2", f"completion_nsec={LATENCY}"]
    else:
        disks = int(arguments.pop(0))
        parameters = ["submit_queues=1", "hw_queue_depth=4"]
    subprocess.run(["modprobe", "-a", "nvmet-tcp", "nvme-tcp"], check=True)
    subprocess.run(["modprobe", "null_blk", "gb=1", f"nr_devices={disks}", *parameters], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with contextlib.ExitStack() as stack:
        if any(" --pair" in argument for argument in arguments):
            stack.enter_context(able_to_pair())
        for run in range(int(runs)):
            for argument in arguments:
                name, _, command = argument.partition("=")
                if what == "attach":
                    result = measure_attach(command, disks)
                else:
                    result = (measure_reads if what == "reads" else measure_transport)(command)
                print(json.dumps({"name": name, "run": run, **result}), flush=True)
    subprocess.run(["modprobe", "-r", "null_blk"], check=True)


if __name__ == "__main__":
    main()
