"""Lets the k-th system call of a kind kill the program, or fail, for every k: runs in an emulated machine.

    inject.py kill|fail CALL PROGRAM DEVICE...

strace does it from outside. Each time the program is started and, once it is ready, stopped, until k is
larger than the number of those calls. "kill": the program is then started again, must make the tree what it
is undisturbed, and take it away when it is stopped. "fail": the program itself must leave configfs as it
was. Prints one JSON object: `calls` counts those that were disturbed, `problems` lists what was not as it
should be.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

CONFIGFS = "/sys/kernel/config/nvmet"
NOTIFY = "/run/inject.notify"
LOG = "/run/inject.log"
TIMEOUT = 120.0


def tree() -> dict[str, str]:
    """All of the target's configuration: attributes with their values, links with what they lead to."""
    found = {}
    for directory, directories, files in os.walk(CONFIGFS):
        for name in directories:
            path = f"{directory}/{name}"
            found[path] = os.readlink(path) if os.path.islink(path) else "directory"
        for name in files:
            path = f"{directory}/{name}"
            try:
                with open(path, errors="replace") as attribute:
                    found[path] = attribute.read()
            except OSError as e:  # some can only be written
                found[path] = str(e.errno)
    return found


def run(command: list[str]) -> tuple[int, dict[str, str]]:
    """Starts the program and, once it is ready, stops it; its exit code and the tree while it was ready."""
    if os.path.exists(NOTIFY):
        os.unlink(NOTIFY)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(NOTIFY)
    notify.settimeout(0.1)
    ready: dict[str, str] = {}
    with open(LOG, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": NOTIFY},
        )
        while process.poll() is None:
            try:
                if b"READY=1" not in notify.recv(8192):
                    continue
            except TimeoutError:
                continue
            ready = tree()
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)
    notify.close()
    return process.returncode, ready


def difference(before: dict[str, str], after: dict[str, str]) -> list[str]:
    keys = sorted(set(before) | set(after))
    return [f"{k}: {before.get(k)!r}, {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def main() -> None:
    mode, call, *program = sys.argv[1:]
    what = "signal=SIGKILL" if mode == "kill" else "error=EIO"
    problems: list[str] = []
    empty = tree()
    code, reference = run(program)
    if code != 0 or difference(empty, tree()):
        problems.append(f"undisturbed: exit code {code}, left: {difference(empty, tree())}")
    calls = 0
    codes = []
    while calls < 500:
        k = calls + 1
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={k}"]
        trace = "/run/inject.trace"
        code, ready = run(["strace", "-D", "-f", "-qq", "-o", trace, *inject, *program])
        with open(trace) as lines:
            hit = any("INJECTED" in line or "killed by SIGKILL" in line for line in lines)
        if not hit and code == 0:
            break
        calls += 1
        codes.append(code)
        if mode == "kill":
            code, ready = run(program)
            if code != 0 or difference(reference, ready):
                problems.append(f"{call} {k}: restart: exit code {code}, {difference(reference, ready)}")
        if left := difference(empty, tree()):
            problems.append(f"{call} {k}: left: {left}")
    with open(LOG, errors="replace") as log:
        text = log.read()
    if "Traceback" in text:
        problems.append("traceback: " + text[text.index("Traceback") :][:3000])
    print(json.dumps({"call": call, "calls": calls, "codes": codes, "problems": problems}))


if __name__ == "__main__":
    main()
