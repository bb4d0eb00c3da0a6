# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the project adds to an initrd, and how soon it is ready there; for `make bench`."""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.harness import images
from tests.harness.images import Image
from tests.harness.initrd_agent import with_agent
from tests.harness.machine import MIB, Disk, Machine, Nic, Wire

# Of dracut. The driver is the agent's.
OPTIONS = ("--hostonly", "--add-drivers", "virtio_console")
PEER_FILES = (
    "/usr/lib/systemd/systemd-storagetm",
    "/usr/lib/systemd/system/systemd-storagetm.service",
    "/usr/lib/systemd/system/storage-target-mode.target",
)
BOTH = (*OPTIONS, "--install", " ".join(PEER_FILES[:2]))
WITHOUT = (*OPTIONS, "--omit", "storagetm", "--add", "kernel-modules systemd-initrd udev-rules")
OURS = (
    "etc/systemd/system/storage",
    "usr/lib/python3",
    "usr/lib/udev/rules.d/54-storagetm.rules",
    "usr/local/",
)
TARGET = ("rd.systemd.unit=storage-target-mode.target", "ip=link-local")
DISKS = 8


def unpack(initrd: Path, directory: Path) -> Path:
    """Writes the files of an initrd, which is not compressed, to a directory."""
    with initrd.open("rb") as file:
        # Device nodes need root, and are not of interest.
        subprocess.run(
            ["cpio", "--quiet", "--extract", "--make-directories", "--no-preserve-owner"],
            cwd=directory,
            stdin=file,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    return directory


def files(tree: Path) -> set[str]:
    return {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file() and not p.is_symlink()}


def packed(tree: Path, names: Iterable[str]) -> int:
    """Bytes that these files take when compressed as initrds are: an archive, by zstd at level 19."""
    archive = subprocess.run(
        ["cpio", "--quiet", "--create", "--format=newc", "--reproducible"],
        cwd=tree,
        input="\n".join(sorted(set(names))).encode(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return len(
        subprocess.run(
            ["zstd", "-19", "-T0", "--quiet", "--stdout"], input=archive, stdout=subprocess.PIPE, check=True
        ).stdout
    )


def linked(tree: Path, names: Iterable[str]) -> set[str]:
    """The libraries that programs and libraries in a tree are linked with, as the tree's own loader says."""
    directories = [tree / "usr/lib/x86_64-linux-gnu", tree / "usr/lib/x86_64-linux-gnu/systemd"]
    loader = (tree / "usr/lib64/ld-linux-x86-64.so.2").resolve()
    found = set()
    for name in names:
        output = subprocess.run(
            [loader, "--library-path", ":".join(map(str, directories)), "--list", tree / name],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
        for line in output.splitlines():
            path = line.partition("=>")[2].partition("(")[0].strip()
            if path.startswith(str(tree)):
                found.add(str(Path(path).resolve().relative_to(tree.resolve())))
    found.add(str(loader.relative_to(tree.resolve())))
    return found


def parts(tree: Path) -> tuple[set[str], set[str]]:
    """The files of an image with the project: the interpreter with its libraries, and all else of ours."""
    all_files = files(tree)
    (interpreter,) = (n for n in all_files if n.startswith("usr/bin/python3"))
    floor = {interpreter} | linked(tree, [interpreter])
    modules = {n for n in all_files if n.startswith("usr/lib/python3") and n.endswith(".so")}
    ours = {n for n in all_files if n.startswith(OURS)} | linked(tree, modules)
    return floor, ours - floor


def ratio(tree: Path) -> float:
    """All that the project brings, the interpreter among it, over the interpreter alone, both compressed."""
    floor, ours = parts(tree)
    return packed(tree, floor | ours) / packed(tree, floor)


def sizes(image: Image) -> list[str]:
    """Lines of a Markdown table: what is added to an initrd, in bytes."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        both, without = (Path(name) / directory for directory in ("both", "without"))
        for directory, options in ((both, BOTH), (without, WITHOUT)):
            directory.mkdir()
            unpack(images.initrd(image, *options), directory)
        floor, ours = parts(both)
        there = files(without)
        peer = {PEER_FILES[0][1:], PEER_FILES[1][1:]}
        peer_all = (peer | linked(both, [PEER_FILES[0][1:]])) & files(both)
        added = files(both) - there - peer
        rows = [
            ("floor: the interpreter and the libraries that it links", floor),
            ("storagetm, all of it: the floor, its modules, the program, units", floor | ours),
            ("of which the image would not have without it", (floor | ours) - there),
            ("systemd-storagetm and the libraries that it links", peer_all),
            ("of which the image would not have without it", peer_all - there),
            ("drivers, networkd and udev rules that either needs", added - floor - ours - peer_all),
        ]
        lines = ["| in the initrd | files | bytes | compressed |", "| --- | --: | --: | --: |"]
        amounts = []
        for what, names in rows:
            amounts.append(packed(both, names) if names else 0)
            raw = sum((both / n).stat().st_size for n in names)
            lines.append(f"| {what} | {len(names)} | {raw} | {amounts[-1]} |")
        lines += ["", f"All of storagetm is {amounts[1] / amounts[0]:.3f} times the floor."]
    return lines


def start_times(image: Image, runs: int) -> list[str]:
    """Lines of a Markdown table: seconds from the unit's start to READY=1 in the booted initrd, and to the
    last disk: at READY=1 udev has not loaded their drivers yet.
    """
    units = {
        "systemd-storagetm": (
            "rd.systemd.mask=storagetm.service",
            "rd.systemd.wants=systemd-storagetm.service",
        ),
        "storagetm, read-write": ("rd.storagetm.read-write",),
        "storagetm, read-only": (),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in units}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        initrd = with_agent(image, images.initrd(image, *BOTH), Path(directory) / "initrd.img")
        for _ in range(runs):
            for name, options in units.items():
                taken[name].append(start_time(image, initrd, name.partition(",")[0], options))
    lines = [
        f"| {DISKS} disks | READY=1 | ratio | all exported | ratio |",
        "| --- | --: | --: | --: | --: |",
    ]
    first = [statistics.median(values) for values in zip(*taken["systemd-storagetm"])]
    for name, pairs in taken.items():
        cells = []
        for values, peer in zip(zip(*pairs), first):
            middle = statistics.median(values)
            cells += [f"{middle:.2f} s ({min(values):.2f}-{max(values):.2f})", f"{middle / peer:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def start_time(image: Image, initrd: Path, unit: str, options: Sequence[str]) -> tuple[float, float]:
    machine = Machine(
        f"bench-{unit}",
        image,
        initrd=initrd,
        machine_id="",
        kernel_options=(*TARGET, *options),
        disks=[Disk(f"disk{i}", size=16 * MIB, serial=f"DISK-{i}") for i in range(DISKS)],
        nics=[Nic(Wire(), 0)],
        steady=True,
    )
    names = ("InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    added = "journalctl --dmesg --output=short-monotonic --no-pager --grep='adding nsid'"
    with machine:
        machine.start()
        machine.agent.request({"op": "hello"}, 600)
        machine.wait_run(f"systemctl is-active {unit}.service", timeout=300)
        shown = machine.run(f"systemctl show {unit}.service --property={','.join(names)}").stdout
        values = dict(line.split("=") for line in shown.splitlines())
        begin, ready = (int(values[name]) / 1e6 for name in names)

        def times() -> list[float] | None:
            lines = machine.run(added, check=False).stdout.splitlines()
            found = [float(m[1]) for m in map(re.compile(r"\[ *([\d.]+)\]").match, lines) if m]
            return found if len(found) == DISKS else None

        last = max(machine.wait_until(times, timeout=300))
    return ready - begin, last - begin
