# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench ONLY=nbd`: how fast nbdcopy reads from us, beside nbdkit's file plugin, in one run.

    python -m tests.programs.bench_nbd [SOURCE...]

Unlike the other parts, this one runs on the machine itself, as it is: what counts is how much is copied, and
what it costs to switch between threads. So the figures depend on what else runs, and ratios do less. Further
versions of storagetm.py can be named, to compare them.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.harness.images import PROJECT

SIZE = 1 << 30  # of the file, which is in memory
IDENTITY, KEY = "storagetm", bytes(range(32)).hex()
Server = Callable[[], AbstractContextManager[tuple[int, int]]]
SERVER = """
import importlib.util, os, select, sys
_, source, path, key, access = sys.argv
spec = importlib.util.spec_from_file_location("storagetm", source)
storagetm = sys.modules["storagetm"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storagetm)
key = storagetm.Secret(bytes.fromhex(key)) if key else None
server = storagetm.NbdServer(key) if key else storagetm.NbdServer()
if key:
    server.tls = storagetm.NbdTls(key)
disk = storagetm.NamedDisks.resolve(path)
with open(path, "rb") as file:
    disk.size = file.seek(0, 2)
server.serve("disk", storagetm.NbdDisk(path, disk, read_only=access == "read-only"))
server.listen("127.0.0.1", 0)
print(server.listening["127.0.0.1"].getsockname()[1], flush=True)
poll = select.poll()
poll.register(server.poll.fileno(), select.POLLIN)
while True:
    poll.poll()
    server.accept()
"""


@contextmanager
def ours(source: Path, path: Path, key: str = "", access: str = "read-only") -> Iterator[tuple[int, int]]:
    """The TCP port and process of a server of ours."""
    words = (sys.executable, "-IS", "-c", SERVER, source, path, key, access)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield int(server.stdout.readline()), server.pid
        finally:
            server.kill()


@contextmanager
def nbdkit(path: Path, key_file: Path | None = None) -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = ("--tls=require", f"--tls-psk={key_file}") if key_file else ()
    words = ("nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "--readonly", *tls, "file", str(path))
    with subprocess.Popen(words) as server:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield port, server.pid
        finally:
            server.kill()


@contextmanager
def block_device(path: Path) -> Iterator[Path]:
    """One that reads a file: on files in memory, there is no page cache to go past. For root alone."""
    if os.geteuid():
        yield path
        return
    words = ("losetup", "--find", "--show", str(path))
    node = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        yield Path(node)
    finally:
        subprocess.run(("losetup", "--detach", node), check=True)


def processor_time(pid: int) -> float:
    """In seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def copy(port: int, pid: int, connections: int, key_file: Path | None = None) -> tuple[float, float]:
    """Bytes in a second that nbdcopy reads, and the server's seconds for each GB."""
    uri = f"nbd://127.0.0.1:{port}/disk"
    if key_file:
        uri = f"nbds://{IDENTITY}@127.0.0.1:{port}/disk?tls-psk-file={key_file}"
    before, begin = processor_time(pid), time.monotonic()
    subprocess.run(("nbdcopy", f"--connections={connections}", uri, "null:"), check=True)
    took = time.monotonic() - begin
    return SIZE / took, (processor_time(pid) - before) / SIZE * 1e9


def row(what: str, runs: int, connections: int, servers: Mapping[str, Server], key_file: Path | None) -> str:
    """A line of the table; of the servers, nbdkit comes first."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for _ in range(runs):
        for name, server in servers.items():
            with server() as (port, pid):
                found[name].append(copy(port, pid, connections, key_file))
    rates = [statistics.median(rate for rate, _ in results) for results in found.values()]
    costs = [statistics.median(cost for _, cost in results) for results in found.values()]
    cells = [f"{rate / 1e9:.2f} GB/s ({cost:.2f} s/GB)" for rate, cost in zip(rates, costs)]
    ratios = [f"{rate / rates[0]:.2f}" for rate in rates[1:]]
    many = f"{connections} connection{'s' * (connections > 1)}"
    return f"| {what}, {many} | {' | '.join(cells)} | {' | '.join(ratios)} |"


def table(runs: int, sources: Sequence[Path] = (), directory: Path = Path("/dev/shm")) -> list[str]:
    """Lines of a Markdown table."""
    names = ["nbdkit", "storagetm", *(f"storagetm, {source}" for source in sources)]
    lines = [f"| | {' | '.join(names)} | {' | '.join(f'{name} / nbdkit' for name in names[1:])} |"]
    lines.append("| --- |" + " --: |" * (2 * len(names) - 1))
    with TemporaryDirectory(dir=directory) as place, ExitStack() as stack:
        path, key_file = Path(place) / "disk", Path(place) / "keys.psk"
        with path.open("wb") as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
        key_file.write_text(f"{IDENTITY}:{KEY}\n")
        node = stack.enter_context(block_device(path))
        for what, disk, access, tls in (
            ("read-only", path, "read-only", None),
            ("that can be written to", node, "read-write", None),
            ("read-only, TLS 1.3", path, "read-only", key_file),
        ):
            if tls and sys.version_info < (3, 13):
                continue
            servers: dict[str, Server] = {"nbdkit": partial(nbdkit, disk, tls)}
            for name, source in zip(names[1:], (PROJECT / "storagetm.py", *sources)):
                servers[name] = partial(ours, source, disk, KEY if tls else "", access)
            for connections in (1, 4):
                lines.append(row(what, runs, connections, servers, tls))
                print(lines[-1], file=sys.stderr)
    version = subprocess.run(("nbdkit", "--version"), check=True, stdout=subprocess.PIPE, text=True).stdout
    lines += ["", f"{version.strip()}; Python {platform.python_version()}, {os.cpu_count()} processors."]
    return lines


if __name__ == "__main__":
    print("\n".join(table(5, list(map(Path, sys.argv[1:])))))
