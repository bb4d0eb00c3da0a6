#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carries out the test harness's commands inside an emulated machine.

Speaks over a virtio-serial port, so it needs no network and works whatever a test does to it. A request is
one line of JSON with an `id` and an `op`; the reply is one line with the same `id` and either the results or
an `error`. Bytes travel as base64. Every request gets a thread, so a long one does not hold up the others.
"""

import base64
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

PORT_NAME = "storagetm.agent"

_write_lock = threading.Lock()
_processes: dict[int, tuple[subprocess.Popen[bytes], str]] = {}


def find_port() -> str:
    """The device node of the port; found through sysfs, since udev's link to it may come later than this
    agent.
    """
    while True:
        for path in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(path) as file:
                if file.read().strip() == PORT_NAME:
                    return "/dev/" + path.split("/")[-2]
        time.sleep(0.05)


def spawn(request: dict[str, Any], **keywords: Any) -> subprocess.Popen[bytes]:
    # Its own session, so that a time-out can kill everything that it started.
    return subprocess.Popen(
        request["command"],
        shell=isinstance(request["command"], str),
        executable="/bin/bash" if isinstance(request["command"], str) else None,
        env={**os.environ, **request.get("environment", {})},
        cwd=request.get("directory", "/root"),
        start_new_session=True,
        **keywords,
    )


def kill_session(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def op_hello(_request: dict[str, Any]) -> dict[str, Any]:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return {"boot_id": file.read().strip(), "uptime": time.clock_gettime(time.CLOCK_BOOTTIME)}


def op_run(request: dict[str, Any]) -> dict[str, Any]:
    # Files rather than pipes: a daemon that inherits them must not keep this waiting for the end of a pipe.
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(base64.b64decode(request.get("stdin", "")))
        stdin.seek(0)
        process = spawn(request, stdin=stdin, stdout=stdout, stderr=stderr)
        timed_out = False
        try:
            process.wait(request.get("timeout"))
        except subprocess.TimeoutExpired:
            timed_out = True
            kill_session(process.pid)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                pass  # Stuck in the kernel; the answer is that it timed out.
        stdout.seek(0)
        stderr.seek(0)
        return {
            "returncode": process.returncode,
            "timed_out": timed_out,
            "stdout": base64.b64encode(stdout.read()).decode(),
            "stderr": base64.b64encode(stderr.read()).decode(),
        }


def op_start(request: dict[str, Any]) -> dict[str, Any]:
    number, path = tempfile.mkstemp(prefix="agent-", suffix=".out", dir="/run")
    with os.fdopen(number, "wb") as output:
        process = spawn(request, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    _processes[process.pid] = process, path
    return {"pid": process.pid}


def op_poll(request: dict[str, Any]) -> dict[str, Any]:
    process, path = _processes[request["pid"]]
    try:
        process.wait(request.get("timeout", 0))
    except subprocess.TimeoutExpired:
        pass
    with open(path, "rb") as file:
        file.seek(request.get("offset", 0))
        output = file.read()
    return {"returncode": process.returncode, "output": base64.b64encode(output).decode()}


def op_signal(request: dict[str, Any]) -> dict[str, Any]:
    process, _path = _processes[request["pid"]]
    if request.get("group"):
        kill_session(process.pid, request["signal"])
    else:
        process.send_signal(request["signal"])
    return {}


def op_put(request: dict[str, Any]) -> dict[str, Any]:
    path = request["path"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Replaced, not rewritten: a program that runs from the old file keeps it.
    temporary = (
        f"{path}.agent-{threading.get_ident()}"
        if not path.startswith(("/sys/", "/proc/", "/dev/"))
        else path
    )
    with open(temporary, "wb") as file:
        file.write(base64.b64decode(request["data"]))
        if temporary != path:
            os.fchmod(file.fileno(), request["mode"])
    if temporary != path:
        os.rename(temporary, path)
    return {}


def op_get(request: dict[str, Any]) -> dict[str, Any]:
    with open(request["path"], "rb") as file:
        return {"data": base64.b64encode(file.read()).decode()}


def answer(port: int, request: dict[str, Any]) -> None:
    try:
        reply = globals()["op_" + request["op"]](request)
    except Exception as e:
        reply = {"error": f"{type(e).__name__}: {e}"}
    data = memoryview((json.dumps({"id": request["id"], **reply}) + "\n").encode())
    with _write_lock:
        while data:
            data = data[os.write(port, data[:32768]) :]


def main() -> None:
    port = os.open(find_port(), os.O_RDWR | os.O_CLOEXEC)
    received = b""
    while True:
        data = os.read(port, 65536)
        if not data:  # Nobody is connected to the other end of the port.
            time.sleep(0.1)
            continue
        received += data
        if b"\n" not in data:
            continue
        *lines, received = received.split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
            except ValueError:
                print(f"Ignoring a line that is not JSON: {line[:80]!r}", file=sys.stderr)
                continue
            threading.Thread(target=answer, args=(port, request), daemon=True).start()


if __name__ == "__main__":
    main()
