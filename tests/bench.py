"""`make bench`: the project beside systemd-storagetm, on one kernel, in one run.

One emulated machine of Debian 13 is booted, and both are started and stopped in it in turn, with 1 and with
256 disks. What is printed are medians, the spread, and the ratio of the two. The machine's clock counts
instructions, so that the figures do not depend on what else runs on the host; only what stands in one line
may be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.harness import images
from tests.harness.images import PROJECT
from tests.harness.machine import Machine, boot_all

PEER = "/usr/lib/systemd/systemd-storagetm"
MEASURE = "/root/measure.py"
READS = "/root/reads.py"
COMMANDS = {
    "peer": PEER,
    "installed": "/usr/local/bin/storagetm --read-write",
    "one file": "/usr/local/bin/storagetm.pyz --read-write",
    "read-only": "/usr/local/bin/storagetm --read-only",
}
ACCESS = {
    "peer": PEER,
    **{mode: f"/usr/local/bin/storagetm --{mode}" for mode in ("read-write", "read-only", "snapshot")},
}


def install(machine: Machine) -> None:
    """Puts the program into a machine in both its forms: the one file, and installed, with bytecode."""
    subprocess.run(["make", "--silent", "storagetm.pyz"], cwd=PROJECT, check=True)
    machine.put("/usr/local/bin/storagetm.pyz", PROJECT / "storagetm.pyz", mode=0o755)
    for name in ("storagetm.py", "Makefile"):
        machine.put(f"/root/{name}", PROJECT / name)
    machine.run("make -C /root install-program")
    machine.put("/usr/local/lib/udev/rules.d/54-storagetm.rules", PROJECT / "units/54-storagetm.rules")
    machine.run("udevadm control --reload")
    for path in (MEASURE, READS):
        machine.put(path, PROJECT / "tests/harness/guest" / path.rpartition("/")[2])


def measure(
    machine: Machine,
    runs: int,
    disks: int,
    state: str,
    names: Sequence[str] = tuple(COMMANDS),
    timeout: float = 3000,
) -> list[dict[str, Any]]:
    """The results of measure.py: `ready` and `stop` in seconds, `memory` in KiB, `wakeups` in 3 s."""
    arguments = [f"{name}={COMMANDS[name]}" for name in names]
    output = machine.run(
        ["python3", MEASURE, str(runs), str(disks), state, *arguments], timeout=timeout
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


def table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a row for each quantity, medians with the lowest and highest value."""
    lines = [f"| | {' | '.join(names)} | {' | '.join(f'{n} / peer' for n in names[1:])} |"]
    lines.append("| --- |" + " --: |" * (2 * len(names) - 1))
    cases = sorted({(r["disks"], r["state"]) for r in results}, key=lambda c: (c[0], c[1] != "rest"))
    for disks, state in cases:
        rows = [r for r in results if (r["disks"], r["state"]) == (disks, state)]
        quantities = [("ready", "s"), ("stop", "s"), ("memory", "KiB"), ("wakeups", "")]
        for quantity, unit in quantities if state == "rest" else quantities[:2]:
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
                "stop": "stop",
                "memory": "resident memory",
                "wakeups": "wake-ups in 3 s",
            }[quantity]
            where = f"{disks} disk{'s' if disks > 1 else ''}" + (", udev probing" if state != "rest" else "")
            lines.append(f"| {where}: {what} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    return lines


def reads(machine: Machine, runs: int) -> list[str]:
    """Lines of a Markdown table: how fast one disk is read, by kind of access."""
    arguments = [f"{name}={command}" for name, command in ACCESS.items()]
    output = machine.run(["python3", READS, str(runs), *arguments], timeout=3000).stdout
    results = [json.loads(line) for line in output.splitlines()]
    lines = [f"| | {' | '.join(ACCESS)} | {' | '.join(f'{n} / peer' for n in list(ACCESS)[1:])} |"]
    lines.append("| --- |" + " --: |" * (2 * len(ACCESS) - 1))
    for quantity, what, unit in (
        ("sequential", "reads of 128 KiB in turn", "MB/s"),
        ("random", "reads of 4 KiB at random", "1/s"),
    ):
        medians = [
            statistics.median(float(r[quantity]) for r in results if r["name"] == name) for name in ACCESS
        ]
        cells = [f"{m:.0f} {unit}" for m in medians]
        ratios = [f"{m / medians[0]:.3f}" for m in medians[1:]]
        lines.append(f"| {what} | {' | '.join(cells)} | {' | '.join(ratios)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each case (default: %(default)s)")
    parser.add_argument("--disks", type=int, nargs="+", default=[1, 256])
    args = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    image = images.build("trixie")["trixie"]
    say("booting an emulated machine")
    results = []
    with Machine("bench", image, memory=2048, steady=True) as machine:
        boot_all(machine)
        install(machine)
        for disks in args.disks:
            for state in ("rest", "probing"):
                if disks == 1 and state == "probing":
                    continue
                say(f"{disks} disks, udev {'at rest' if state == 'rest' else 'probing'}")
                for _ in range(args.runs):
                    results += measure(machine, 1, disks, state)
                    say(
                        "  "
                        + ", ".join(f"{r['name']} {r['ready']:.2f} s" for r in results[-len(COMMANDS) :])
                    )
        say("reads through each kind of access")
        access = reads(machine, args.runs)
        kernel = machine.run("uname -r").stdout.strip()
        version = machine.run([PEER, "--version"]).stdout.split("\n")[0]
    size = (PROJECT / "storagetm.pyz").stat().st_size
    print(
        f"\nLinux {kernel}, {version}, emulated processor (2 ns an instruction). "
        f"All read-write but the last; medians of {args.runs} runs (lowest-highest).\n"
    )
    print("\n".join(table(results, list(COMMANDS))))
    print("\nOne disk, read over the loopback interface, one read at a time.\n")
    print("\n".join(access))
    print(f"\nstoragetm.pyz: {size} bytes ({size / 1024:.1f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
