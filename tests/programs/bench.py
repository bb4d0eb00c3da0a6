"""`make bench`: the project beside systemd-storagetm, on one kernel, in one run.

One emulated machine of Debian 13 is booted, and both are started and stopped in it in turn, with few disks
and with many, and beside them the shortest program that does the same steps: that is the kernel's own share.
docs/benchmarks.md gets medians, the spread, ratios and pictures. The machine's clock counts instructions, so
that the figures do not depend on what else runs on the host; only what stands in one line may be compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from tests.harness import images
from tests.harness.images import PROJECT
from tests.harness.machine import Machine, Nic, Wire, boot_all
from tests.programs import bench_initrd, bench_nbd

TEMPLATE = Path(__file__).with_name("benchmarks.md.template")
PEER = "/usr/lib/systemd/systemd-storagetm"
MEASURE = "/root/measure.py"
CLIENT = "/root/client.py"
STRESS = "/root/stress.py"
REPLAY = "/root/replay"
MANY = 500  # disks, with more than which one run has to do: it takes half an hour
COMMANDS = {
    "peer": PEER,
    "installed": "/usr/local/bin/storagetm --read-write",
    "one file": "/usr/local/bin/storagetm.pyz --read-write",
    # As it is where it was packed without bytecode of the Python that it meets.
    "one file, compiled": "/usr/local/bin/storagetm-source.pyz --read-write",
    "read-only": "/usr/local/bin/storagetm --read-only",
}
# Packs the file without any bytecode.
PACK_SOURCE = """
import pathlib, sys
sys.path.insert(0, "/root")
import build_zipapp
path = pathlib.Path("/usr/local/bin/storagetm-source.pyz")
path.write_bytes(build_zipapp.pack(pathlib.Path("/root/storagetm.py").read_bytes(), pythons=()))
path.chmod(0o755)
"""
# An earlier version in the same forms, if one is asked for, by what it is to be compared with.
BEFORE = {
    "installed": ("before", "/usr/local/bin/before --read-write"),
    "one file": ("before, one file", "/usr/local/bin/before.pyz --read-write"),
    "read-only": ("before, read-only", "/usr/local/bin/before --read-only"),
}
# What of it is not ours: the same steps by replay.c, and the interpreter's start.
SHARES = {
    "kernel": "replay /usr/local/bin/storagetm --read-write",
    "kernel, read-only": "replay /usr/local/bin/storagetm --read-only",
    "python": "python",
}
ACCESS = {
    "peer": PEER,
    **{mode: f"/usr/local/bin/storagetm --{mode}" for mode in ("read-write", "read-only", "snapshot")},
}
# Pairing makes all disks namespaces of one subsystem, so that what it is compared with has that, too.
PROTECTION = {
    "plain": "/usr/local/bin/storagetm --read-only --subsystem=shared",
    "authenticated": "/usr/local/bin/storagetm --read-only --pair --encrypt=no",
    "encrypted": "/usr/local/bin/storagetm --read-only --pair",
}
TOOL = "/usr/local/bin/storagetm --read-only --transport="
TRANSPORTS = {name: TOOL + name for name in ("nvme-tcp", "iscsi", "nbd", "usb")} | {"ssh … dd": "ssh"}
WITH_AES = "encrypted, AES instructions"


def install(machine: Machine) -> None:
    """Puts the program into a machine in both its forms: the one file, and installed, with bytecode.

    The machine packs the file itself: bytecode of another Python is of no use there.
    """
    subprocess.run(["make", "--silent", "storagetm.pyz"], cwd=PROJECT, check=True)
    for name in ("storagetm.py", "build_zipapp.py", "Makefile"):
        machine.put(f"/root/{name}", PROJECT / name)
    machine.run("make -C /root install-program")
    machine.run("python3 /root/build_zipapp.py --output /usr/local/bin/storagetm.pyz /root/storagetm.py")
    machine.run(["python3", "-c", PACK_SOURCE])
    machine.put("/usr/local/lib/udev/rules.d/54-storagetm.rules", PROJECT / "units/54-storagetm.rules")
    machine.run("udevadm control --reload")
    for path in (MEASURE, CLIENT, STRESS):
        machine.put(path, PROJECT / "tests/harness/guest" / path.rpartition("/")[2])


def install_before(machine: Machine, revision: str) -> None:
    """Puts the program as it was at a commit into a machine, in both its forms."""
    for name in ("storagetm.py", "build_zipapp.py", "Makefile"):
        content = subprocess.check_output(["git", "show", f"{revision}:{name}"], cwd=PROJECT)
        path = PROJECT / f"build/before-{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        machine.put(f"/root/before/{name}", path)
    machine.run(
        "make -C /root/before install-program LIBDIR=/usr/local/lib/before DESTDIR=/root/before/root && "
        "cp -r /root/before/root/usr/local/lib/before /usr/local/lib/ && "
        "cp /root/before/root/usr/local/bin/storagetm /usr/local/bin/before && "
        "cd /root/before && make --silent storagetm.pyz && cp storagetm.pyz /usr/local/bin/before.pyz"
    )


def install_replay(machine: Machine) -> None:
    """Compiles replay.c, and puts it into a machine."""
    source, binary = PROJECT / "tests/harness/guest/replay.c", PROJECT / "build/replay"
    binary.parent.mkdir(exist_ok=True)
    subprocess.run(["gcc", "-O2", "-static", "-pthread", "-o", binary, source], check=True)
    machine.put(REPLAY, binary, mode=0o755)


def measure(
    machine: Machine,
    runs: int,
    disks: int,
    state: str,
    names: Sequence[str] = tuple(COMMANDS),
    timeout: float = 3000,
) -> list[dict[str, Any]]:
    """The results of measure.py: `ready` and `stop` in seconds, `memory` in KiB, `wakeups` in 3 s."""
    commands = {**COMMANDS, **SHARES, **dict(BEFORE.values())}
    arguments = [f"{name}={commands[name]}" for name in names]
    output = machine.run(
        ["python3", MEASURE, str(runs), str(disks), state, *arguments], timeout=timeout
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


def table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a row for each quantity, medians with the lowest and highest value."""
    lines = [f"| | {' | '.join(names)} | {' | '.join(f'{n} / peer' for n in names[1:])} |"]
    lines.append("| --- |" + " --: |" * (2 * len(names) - 1))
    results = [r for r in results if r["name"] in names]
    cases = sorted({(r["disks"], r["state"]) for r in results}, key=lambda c: (c[0], c[1] != "rest"))
    for disks, state in cases:
        rows = [r for r in results if (r["disks"], r["state"]) == (disks, state)]
        quantities = [("ready", "s"), ("exported", ""), ("stop", "s"), ("memory", "KiB"), ("wakeups", "")]
        if state != "rest":
            quantities = quantities[:3]
        if all(r["exported"] == disks for r in rows):
            quantities.remove(("exported", ""))
        for quantity, unit in quantities:
            cells, medians = [], []
            for name in names:
                values = [float(r[quantity]) for r in rows if r["name"] == name]
                medians.append(statistics.median(values))
                digits = 2 if unit == "s" else 0
                cells.append(
                    f"{medians[-1]:.{digits}f} {unit} ({min(values):.{digits}f}-{max(values):.{digits}f})"
                )
            ratios = [f"{m / medians[0]:.2f}" if medians[0] else "-" for m in medians[1:]]
            what = {
                "ready": "READY=1",
                "exported": "disks exported then",
                "stop": "stop",
                "memory": "resident memory",
                "wakeups": "wake-ups in 3 s",
            }[quantity]
            where = f"{disks} disk{'s' if disks > 1 else ''}" + (", udev probing" if state != "rest" else "")
            lines.append(f"| {where}: {what} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    return lines


def measure_reads(
    machine: Machine, runs: int, commands: Mapping[str, str], what: str = "reads"
) -> list[dict[str, Any]]:
    """The results of `client.py reads`: `sequential` in MB/s, `random` in reads a second, and `cipher`."""
    arguments = [f"{name}={command}" for name, command in commands.items()]
    output = machine.run(["python3", CLIENT, what, str(runs), *arguments], timeout=3000).stdout
    return [json.loads(line) for line in output.splitlines()]


def reads_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: how fast one disk is read, with ratios to the first case."""
    names = list(dict.fromkeys(r["name"] for r in results))
    lines = [f"| | {' | '.join(names)} | {' | '.join(f'{n} / {names[0]}' for n in names[1:])} |"]
    lines.append("| --- |" + " --: |" * (2 * len(names) - 1))
    for quantity, what, unit in (
        ("sequential", "reads of 128 KiB in turn", "MB/s"),
        ("random", "reads of 4 KiB at random", "1/s"),
    ):
        medians = [
            statistics.median(float(r[quantity]) for r in results if r["name"] == name) for name in names
        ]
        cells = [f"{m:.0f} {unit}" for m in medians]
        ratios = [f"{m / medians[0]:.3f}" for m in medians[1:]]
        lines.append(f"| {what} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    return lines


def reads(machine: Machine, runs: int) -> list[str]:
    """Lines of a Markdown table: how fast one disk is read, by kind of access."""
    return reads_table(measure_reads(machine, runs, ACCESS))


def transports(machine: Machine, runs: int) -> list[str]:
    """Lines of a Markdown table: how fast one disk is read over each transport, and by ssh and dd."""
    return reads_table(measure_reads(machine, runs, TRANSPORTS, "transports"))


def protection(machine: Machine, runs: int) -> list[str]:
    """Lines of Markdown: how fast one disk is read, by what protects it, and what encrypts it then."""
    # The module has the drivers that use the processor's instructions for AES. Without it, C code does it.
    machine.run("modprobe -r aesni_intel")
    results = measure_reads(machine, runs, PROTECTION)
    machine.run("modprobe aesni_intel")
    results += measure_reads(machine, runs, {WITH_AES: PROTECTION["encrypted"]})
    machine.run("modprobe -r aesni_intel")
    ciphers = dict.fromkeys((r["name"], r["cipher"]) for r in results if r["cipher"])
    return [
        *reads_table(results),
        "",
        "| | cipher and the kernel's driver for it |",
        "| --- | --- |",
        *(f"| {name} | {cipher} |" for name, cipher in ciphers),
    ]


def versions(results: Sequence[dict[str, Any]], disks: Sequence[int]) -> list[str]:
    """Lines of a Markdown table: each form of the program now and before."""
    lines = ["| disks | form | | before | now | now / before |", "| --: | --- | --- | --: | --: | --: |"]
    for count in disks:
        for name, (former, _) in BEFORE.items():
            for quantity in ("ready", "stop"):
                old, new = (median(results, n, count, quantity) for n in (former, name))
                what = "READY=1" if quantity == "ready" else quantity
                lines.append(f"| {count} | {name} | {what} | {old:.3f} s | {new:.3f} s | {new / old:.2f} |")
    return lines


SHARED_RO = "kernel, read-only"
SUBSYSTEMS = {
    kind: f"/usr/local/bin/storagetm --read-write --subsystem={kind}" for kind in ("per-disk", "shared")
}


def attachments(machine: Machine, runs: int, disks: int) -> list[str]:
    """Lines of a Markdown table: how soon a client has many disks, by kind of subsystem."""
    arguments = [f"{name}={command}" for name, command in SUBSYSTEMS.items()]
    command = ["python3", CLIENT, "attach", str(runs), str(disks), *arguments]
    output = machine.run(command, timeout=3000).stdout
    results = [json.loads(line) for line in output.splitlines()]
    lines = [f"| {disks} disks | {' | '.join(SUBSYSTEMS)} | ratio |", "| --- | --: | --: | --: |"]
    for quantity, what, unit in (
        ("command", "nvme connect-all", " s"),
        ("disks", "all disks there", " s"),
        ("sockets", "connections", ""),
    ):
        each, shared = (
            statistics.median(float(r[quantity]) for r in results if r["name"] == name)
            for name in SUBSYSTEMS
        )
        digits = 2 if unit else 0
        cells = " | ".join(f"{value:.{digits}f}{unit}" for value in (each, shared))
        lines.append(f"| {what} | {cells} | {each / shared:.1f} |")
    return lines


def much_at_once(machine: Machine, disks: int, seconds: int, addresses: int) -> dict[str, Any]:
    """The results of stress.py, with 200 plugs a second; the machine needs an interface eth0."""
    machine.run("ip link set lo up; ip link set eth0 up")
    command = [
        "python3",
        STRESS,
        str(disks),
        "200",
        str(seconds),
        str(addresses),
        "/usr/local/bin/storagetm",
    ]
    result: dict[str, Any] = json.loads(machine.run(command, timeout=3000).stdout)
    return result


def changes(result: dict[str, Any], disks: int, addresses: int) -> list[str]:
    """Lines of a Markdown table: what came of many changes in a short time."""
    plugs, during = result["plugs"], result["plugged in"]
    right = result["same"] and not result["unreadable"] and result["addresses"] == [result["address"]]
    return [
        "| | |",
        "| --- | --- |",
        f"| disks, all on the screen | {disks} |",
        f"| pulled or plugged in | {plugs} times in {during:.1f} s: {plugs / during:.0f} a second |",
        f"| udev and storagetm are through with them | {result['settled after']:.1f} s later |",
        f"| changes of addresses | {addresses}, all at once |",
        f"| lost | {'nothing' if right else 'something'}: {result['exported']} of {result['present']} "
        f"disks are exported, and {' '.join(result['addresses'])} is on the screen |",
        f"| one drawing of the screen | {result['drawing']:.2f} s |",
        f"| drawn | {result['drawn']} times in {result['during']:.0f} s, never sooner than "
        f"{result['shortest']:.2f} s after the one before |",
        f"| resident memory before and after | {result['memory before']} and {result['memory after']} KiB |",
    ]


def median(results: Sequence[dict[str, Any]], name: str, disks: int, quantity: str) -> float:
    return statistics.median(
        float(r[quantity]) for r in results if (r["name"], r["disks"], r["state"]) == (name, disks, "rest")
    )


def shares(results: Sequence[dict[str, Any]], disks: Sequence[int]) -> list[str]:
    """Lines of a Markdown table: of what the time until READY=1 is made up, and the time to stop."""
    lines = [
        "| disks | access | READY=1 | interpreter | kernel | ours | ours / kernel | ours for each disk | "
        "stop | kernel's stop | stop / kernel's |",
        "| --: | --- |" + " --: |" * 9,
    ]
    for mode, name, kernel in (("read-write", "installed", "kernel"), ("read-only", "read-only", SHARED_RO)):
        for count in disks:
            ready = median(results, name, count, "ready")
            start, steps = median(results, "python", count, "ready"), median(results, kernel, count, "ready")
            ours = ready - start - steps
            stop, least = (median(results, n, count, "stop") for n in (name, kernel))
            lines.append(
                f"| {count} | {mode} | {ready:.3f} s | {start:.3f} s | {steps:.3f} s | {ours:.3f} s | "
                f"{ours / steps:.2f} | {1000 * ours / count:.2f} ms | {stop:.3f} s | {least:.3f} s | "
                f"{stop / least:.2f} |"
            )
    return lines


def draw(results: Sequence[dict[str, Any]], disks: Sequence[int], quantity: str, path: Path) -> None:
    """A picture of the time over the number of disks."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("svg")
    # The same bytes for the same figures, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "storagetm", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label, style in (
        ("peer", "systemd-storagetm", "C0o-"),
        ("read-only", "storagetm, read-only", "C1s-"),
        ("installed", "storagetm, read-write", "C2^-"),
        (SHARED_RO, "the kernel's share, read-only", "C1s:"),
        ("kernel", "the kernel's share, read-write", "C2^:"),
    ):
        times = [median(results, name, count, quantity) for count in disks]
        axes.plot(disks, times, style, label=label)
        if quantity != "ready" or name in SHARES:
            continue
        for count, seconds in zip(disks, times):
            if (exported := median(results, name, count, "exported")) != count:
                note = f"with {exported:.0f} exported"
                axes.annotate(note, (count, seconds), (4, -16), textcoords="offset points", ha="right")
    axes.set_xlabel("disks")
    axes.set_ylabel("seconds, emulated")
    axes.set_title({"ready": "From the start to READY=1", "stop": "From SIGTERM to the end"}[quantity])
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def starts_and_stops(
    machine: Machine,
    runs: int,
    numbers: Sequence[int],
    say: Callable[[str], None],
    more: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The results of all cases, a run of each after the other, with `more` commands than the usual ones."""
    results = []
    cases = [(disks, "rest") for disks in numbers] + [(d, "probing") for d in numbers if d == 256]
    for disks, state in cases:
        say(f"{disks} disks, udev {'at rest' if state == 'rest' else 'probing'}")
        names = [*COMMANDS, *SHARES, *more] if state == "rest" else list(COMMANDS)
        for _ in range(runs if disks <= MANY else 1):
            results += measure(machine, 1, disks, state, names)
            say("  " + ", ".join(f"{r['name']} {r['ready']:.3f} s" for r in results[-len(names) :]))
    return results


def many_changes(machine: Machine, disks: int) -> list[str]:
    """Lines of a Markdown table: what comes of many changes beside so many disks."""
    addresses = 500
    return changes(much_at_once(machine, disks, 10, addresses), disks, addresses)


# Beside the starts, each by its name in the template: what it is, and what makes the lines of it.
PARTS: dict[str, tuple[str, Callable[[Machine, argparse.Namespace], list[str]]]] = {
    "reads": ("reads through each kind of access", lambda machine, args: reads(machine, args.runs)),
    "protection": (
        "reads, authenticated and encrypted",
        lambda machine, args: protection(machine, args.runs),
    ),
    "transports": ("reads over each transport", lambda machine, args: transports(machine, args.runs)),
    "attachments": ("attaching 64 disks", lambda machine, args: attachments(machine, args.runs, 64)),
    "changes": (
        "many changes beside many disks",
        lambda machine, args: many_changes(machine, max(1000, *args.disks)),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each case (default: %(default)s)")
    parser.add_argument("--disks", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--before", metavar="REVISION", help="compare starts and stops with this commit's")
    parser.add_argument(
        "--only",
        choices=("starts", *PARTS, "nbd"),
        help="measure this alone, and print it; nothing is written",
    )
    parser.add_argument("--output", type=Path, default=PROJECT / "docs", help="directory to write to")
    args = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    if args.only == "nbd":
        print("\n".join(bench_nbd.table(args.runs)))
        return 0
    image = images.build("trixie")["trixie"]
    say("booting an emulated machine")
    with Machine("bench", image, memory=4096, steady=True, nics=[Nic(Wire(), 0)]) as machine:
        boot_all(machine)
        install(machine)
        tables: dict[str, list[str]] = {}
        if args.only in (None, "starts"):
            install_replay(machine)
            if args.before:
                install_before(machine, args.before)
            earlier = [name for name, _ in BEFORE.values()] if args.before else []
            results = starts_and_stops(machine, args.runs, args.disks, say, earlier)
            if earlier:
                print("\n".join(versions(results, args.disks)), flush=True)
            tables["starts"] = table(results, list(COMMANDS))
        for name, (what, lines_of) in PARTS.items():
            if args.only in (None, name):
                say(what)
                tables[name] = lines_of(machine, args)
        if args.only:
            print("\n".join(tables[args.only]))
            return 0
        # What the template has names for: lines, or what stands in one.
        parts: dict[str, object] = {**tables}
        parts["kernel"] = machine.run("uname -r").stdout.strip()
        parts["systemd"] = machine.run([PEER, "--version"]).stdout.split("\n")[0]
        parts["python"] = machine.run("python3 --version").stdout.strip()
    say("reads over NBD, on this machine itself")
    parts["nbd"] = bench_nbd.table(args.runs)
    say("what an initrd gets")
    parts["initrd_sizes"] = bench_initrd.sizes(image)
    say("starts in an initrd")
    parts["initrd_starts"] = bench_initrd.start_times(image, args.runs)
    for quantity in ("ready", "stop"):
        draw(results, args.disks, quantity, args.output / f"benchmarks-{quantity}.svg")
    parts |= {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "runs": args.runs,
        "many": MANY,
        "size": (PROJECT / "storagetm.pyz").stat().st_size,
        "commands": [f"| {name} | `{command} --all` |" for name, command in COMMANDS.items()],
        "shares": shares(results, args.disks),
    }
    lines = {name: "\n".join(part) if isinstance(part, list) else part for name, part in parts.items()}
    text = Template(TEMPLATE.read_text()).substitute(lines)
    (args.output / "benchmarks.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
