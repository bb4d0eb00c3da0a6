#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a machine: ends or disturbs the tool at each single step that changes something.

    crash.py [KIND,...] TOOL ARGUMENT...

First comes an undisturbed run under strace(1), from the start over READY=1 to the end after SIGTERM. Each
call in it that changes configfs, device-mapper or the tool's own directory is a step: the n-th call of its
kind for its path. (Numbers for calls of all paths would not do, since directories are removed in several
threads.) What is sent on a socket is one, too, to be killed at. Then strace makes each step go wrong once,
in a run of its own:

- SIGKILL comes instead of the step. The next run has to find or make again all that is in configfs in the
  undisturbed run, attribute by attribute, without making anew what was complete, and to leave configfs as it
  was before.
- The step fails with an error, EIO or one that is likely there. The tool has to say so, or to have all as in
  the undisturbed run nevertheless, and when it has ended configfs is as it was before.
- A removal fails each time it is tried ("stuck"). Then something has to be left, but the next run can cope.

KINDs of these, "SIGKILL" for example, are the only ones that are done then.

What other programs have in configfs belongs to both states. Prints a line for each step, and in the end one
with the result as JSON.
"""

from __future__ import annotations

import collections
import errno
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

# The part of configfs in which the tool works, and how far below it its objects are.
# Of all disturbances, only each one of so many.
EVERY = int(os.environ.get("CRASH_EVERY", "1"))
PART = os.environ.get("CONFIGFS_PART", "/sys/kernel/config/nvmet")
DEPTH = 1 if PART.endswith("/usb_gadget") else 2
# What the kernel sets in a gadget once a host has asked for it, and what it counts in targets.
VOLATILE = ("bMaxPacketSize0", "bcdUSB", "dynamic_sessions", "hba_info")
OURS = "/run/storagetm"
# What device-mapper is asked for, and where the device made read-only has its settings.
MAPPER = ("/dev/mapper/control", "/sys/devices/virtual/block/dm-")
CALLS = "mkdir,symlink,write,rmdir,unlink,rename,ftruncate,ioctl,chmod,add_key,keyctl"
# Of no path. What is sent later than READY=1 depends on the time.
PATHLESS = ("sendto", "add_key", "keyctl")
TIMEOUT = 120  # seconds

# Beside EIO, which all get.
MORE_ERRORS = {"mkdir": "ENOMEM", "symlink": "EADDRINUSE", "rmdir": "EBUSY", "add_key": "EDQUOT"}


class Wrong(Exception):
    """Something is not as it has to be."""


def tree() -> dict[str, str]:
    """All that is in this part of configfs: the text of an attribute, where a link leads, nothing for a
    directory. And the tables of what is in device-mapper, and the identities of keys for TLS.
    """
    mapped = subprocess.run(["dmsetup", "table"], stdout=subprocess.PIPE, check=True).stdout
    with open("/proc/keys") as file:
        # The kernel takes those away a little later that are invalidated.
        keys = sorted(re.findall(r"^\w+ I-\S{4}- .* psk +(.*)", file.read(), re.MULTILINE))
    found = {"/device-mapper": mapped.decode(), "/keys": "\n".join(keys)}
    for directory, directories, files in os.walk(PART):
        if directory.endswith("statistics"):
            directories.clear()
            continue
        found[directory + "/"] = ""
        for name in directories + files:
            path = f"{directory}/{name}"
            if os.path.islink(path):
                found[path] = "-> " + os.readlink(path)
            elif os.path.isfile(path) and name not in VOLATILE:
                try:
                    with open(path) as file:
                        found[path] = file.read()
                except OSError as e:
                    found[path] = f"errno {e.errno}"
    return found


def roots(found: dict[str, str]) -> list[str]:
    """The subsystems and ports, or the gadgets, in a tree."""
    depth = PART.count("/") + DEPTH + 1
    return [path for path in found if path.endswith("/") and path.count("/") == depth]


def below(found: dict[str, str], root: str) -> dict[str, str]:
    """The attributes of a subsystem or port. What is linked to a port is not its own."""
    return {
        path: value for path, value in found.items() if path.startswith(root) and not value.startswith("-> ")
    }


def open_passages() -> list[int]:
    """The TCP ports on which something listens that is for this machine alone (proc(5))."""
    with open("/proc/net/tcp") as file:
        sockets = [line.split() for line in file]
    listening = [fields[1].split(":") for fields in sockets if fields[3] == "0A"]
    return [int(port, 16) for address, port in listening if address == "0100007F"]


def difference(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return [
        f"{path.removeprefix(PART)}: {found.get(path)!r} instead of {wanted.get(path)!r}"
        for path in sorted(found.keys() | wanted.keys())
        if found.get(path) != wanted.get(path)
    ]


class Run:
    """The tool, from its start to its end; with `strace`, under strace with these options."""

    last: Run

    def __init__(self, command: list[str], strace: list[str] | None = None) -> None:
        Run.last = self
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"\0storagetm-crash-{os.getpid()}"
        self.socket.bind(name)
        self.output = open("/run/crash.out", "w+b", buffering=0)  # noqa: SIM115
        if strace:
            # -D: strace is the grandchild, so that all that is known of the child is known of the tool.
            command = ["strace", "-D", "-f", "-qq", *strace, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            env={"NOTIFY_SOCKET": "@" + name[1:], "PATH": os.environ["PATH"]},
        )

    def wait_ready(self) -> bool:
        """Whether READY=1 came, and not the end."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if select.select([self.socket], [], [], 0 if ended else 0.05)[0]:
                if b"READY=1" in self.socket.recv(4096).split(b"\n"):
                    return True
            elif ended:
                return False
        # It must not stand in the way of the next run.
        self.process.kill()
        raise Wrong(f"neither ready nor ended within {TIMEOUT} s, it says: {self.text()}")

    def end(self) -> int:
        """Asks it to end, if it has not yet. Returns its exit code, or minus a signal's number."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Wrong(f"does not end within {TIMEOUT} s, it says: {self.text()}") from None
        finally:
            self.socket.close()

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


class Step:
    """A call of the undisturbed run."""

    def __init__(self, phase: str, call: str, path: str, number: int) -> None:
        self.phase = phase
        self.call = call
        self.path = path
        self.number = number

    def __str__(self) -> str:
        return f"{self.phase}: {self.call} {self.number} of {self.path}"

    def strace(self, action: str, log: str, more: str = "") -> list[str]:
        """Options for strace. With a "+" as `more` it happens each time from then on."""
        inject = f"inject={self.call}:{action}:when={self.number}{more}"
        # Only what is traced stops, which takes much less time. But a signal gets lost there.
        quick = [] if action.startswith("signal") else ["--seccomp-bpf"]
        path = ["-P", self.path] if self.path else []
        return [*quick, "-o", log, *path, "-e", f"trace={self.call}", "-e", inject]


def steps_in(log: str) -> list[Step]:
    """The steps in what strace has written. Calls are counted for each thread, as strace does."""
    found: dict[tuple[str, str, int], Step] = {}
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    phase = "start"
    for line in log.splitlines():
        called = re.match(r"(\d+) +(\w+)\((.*)", line)
        if not called:
            continue
        thread, call, operands = called.groups()
        # The last path is the one that is made; what is written comes after the descriptor's.
        paths = re.findall(r'(?:^\d+<|")(/[^">]+)', operands.partition(", 0")[0])
        path = paths[-1] if paths else ""
        if call in ("write", "ioctl"):
            path = paths[0] if operands[0].isdigit() and paths else ""
        if call in PATHLESS and (phase == "start" or call != "sendto"):
            path = ""
        elif not path.startswith((PART, OURS, *MAPPER)):
            continue
        if call in (*CALLS.split(","), *PATHLESS):
            counts[thread, call, path] += 1
            key = call, path, counts[thread, call, path]
            found.setdefault(key, Step(phase, *key))
        if "READY=1" in line:
            phase = "stop"
    return list(found.values())


def kinds_of(step: Step) -> list[str]:
    """The ways in which a step goes wrong."""
    if step.call == "sendto":
        return ["SIGKILL"]
    kinds = ["SIGKILL", "EIO"]
    if step.call in MORE_ERRORS:
        kinds.append(MORE_ERRORS[step.call])
    if step.call in ("rmdir", "unlink") and step.path.startswith(PART):
        kinds.append("stuck")
    return kinds


class Trial:
    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.restricted = any(word.startswith("--code-file=") for word in command)
        self.log = "/run/crash.log"
        self.reset()
        self.before = tree()
        run = Run(
            command, ["--seccomp-bpf", "-y", "-s", "16", "-o", self.log, "-e", f"trace={CALLS},sendto"]
        )
        if not run.wait_ready():
            raise Wrong(f"the undisturbed run is not ready, it says: {run.text()}")
        self.wanted = tree()
        self.check_end(run, 0)
        # A host that is only there for a while has a random name: strace could not find it in another run.
        self.steps = [
            step for step in steps_in(self.read_log("exited with 0")) if not self.passing_host(step.path)
        ]

    def passing_host(self, path: str) -> bool:
        found = re.match(rf"{PART}/(?:subsystems/[^/]+/allowed_hosts|hosts)/([^/]+)", path)
        return found is not None and f"{PART}/hosts/{found[1]}/" not in self.wanted

    def clean_up(self) -> None:
        """Has the tool take away what was left, so that one fault is not told at each step after it."""
        Run.last.process.kill()
        Run.last.process.wait()
        Run.last.socket.close()
        run = Run(self.command)
        try:
            run.wait_ready()
            run.end()
        except Wrong as e:
            print(f"and then: {e}", flush=True)

    @staticmethod
    def reset() -> None:
        shutil.rmtree(OURS, ignore_errors=True)

    def read_log(self, text: str) -> str:
        """What strace has written; it may come a little later than the end of what it traces."""
        deadline = time.monotonic() + 10
        while True:
            with open(self.log) as file:
                log = file.read()
            if text in log or time.monotonic() > deadline:
                return log
            time.sleep(0.02)

    def check_end(self, run: Run, *codes: int) -> None:
        """It ends with one of these codes, and leaves all as it was."""
        code = run.end()
        text = run.text()
        if "Traceback" in text:
            raise Wrong(f"a traceback: {text}")
        if code not in codes:
            raise Wrong(f"exit code {code}, it says: {text}")
        if changed := difference(tree(), self.before):
            raise Wrong(f"not as it was before, it says: {text}\n{changed}")

    def kill(self, step: Step) -> None:
        self.reset()
        run = Run(self.command, step.strace("signal=SIGKILL", self.log))
        run.wait_ready()
        if (code := run.end()) != -signal.SIGKILL:
            raise Wrong(f"not killed, but ended with {code}")
        if self.restricted and (ports := open_passages()):
            raise Wrong(f"everybody on this machine is let in to ports {ports}")
        left = tree()
        complete = [r for r in roots(left) if below(left, r) == below(self.wanted, r)]
        numbers = {r: os.stat(r).st_ino for r in complete}
        run = Run(self.command)
        if not run.wait_ready():
            raise Wrong(f"not ready, it says: {run.text()}")
        if changed := difference(tree(), self.wanted):
            raise Wrong(f"not as in an undisturbed run, it says: {run.text()}\n{changed}")
        if anew := [r for r in complete if os.stat(r).st_ino != numbers[r]]:
            raise Wrong(f"complete, but made anew: {anew}")
        self.check_end(run, 0)
        # Which namespace is whose is for the next start.
        kept = (".lock", ".disks", ".awaited")
        if left_over := [name for name in os.listdir(OURS) if not name.endswith(kept)]:
            raise Wrong(f"left in {OURS}: {left_over}")

    def error(self, step: Step, name: str) -> None:
        self.reset()
        run = Run(self.command, step.strace(f"error={name}", self.log))
        as_wanted = run.wait_ready() and not difference(tree(), self.wanted)
        self.check_end(run, 0, 1)
        if "INJECTED" not in self.read_log("INJECTED"):
            raise Wrong("nothing went wrong")
        # A port that is taken is no error, but is told of, too.
        message = "is taken" if name == "EADDRINUSE" else os.strerror(getattr(errno, name))
        if step.phase == "start" and not as_wanted and message not in run.text():
            raise Wrong(f"it says nothing of that, but: {run.text()}")

    def stuck(self, step: Step) -> None:
        """It fails each time. That is told, and the next run can do it."""
        self.reset()
        run = Run(self.command, step.strace("error=EBUSY", self.log, "+"))
        if not run.wait_ready() or run.end() != 1:
            raise Wrong(f"ended with {run.end()}, it says: {run.text()}")
        text = run.text()
        if "Traceback" in text or "Failed to remove" not in text or os.strerror(errno.EBUSY) not in text:
            raise Wrong(f"it says: {text}")
        run = Run(self.command)
        if not run.wait_ready() or difference(tree(), self.wanted):
            raise Wrong(f"not as in an undisturbed run, it says: {run.text()}")
        self.check_end(run, 0)


def main() -> None:
    begin = time.monotonic()
    kinds = sys.argv.pop(1).split(",") if "/" not in sys.argv[1] else []
    trial = Trial(sys.argv[1:])
    print(f"{len(trial.steps)} steps, undisturbed in {time.monotonic() - begin:.1f} s", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    chosen = [(s, kind) for s in trial.steps for kind in kinds_of(s) if not kinds or kind in kinds]
    for step, kind in chosen[::EVERY]:
        began = time.monotonic()
        try:
            if kind == "SIGKILL":
                trial.kill(step)
            elif kind == "stuck":
                trial.stuck(step)
            else:
                trial.error(step, kind)
        except (Wrong, OSError) as e:
            wrong.append(f"{kind} at {step}: {e}")
            print(f"WRONG: {wrong[-1]}", flush=True)
            trial.clean_up()
        counts[f"{step.call} {kind}"] += 1
        print(f"{time.monotonic() - began:.1f} s: {kind} at {step}", flush=True)
    seconds = time.monotonic() - begin
    print(json.dumps({"counts": counts, "wrong": wrong, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
