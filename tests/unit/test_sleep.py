# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine stays awake as long as it exports, with a systemd-inhibit that tells what happens to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import storagetm
from tests.unit.conftest import CapturedMachine
from tests.unit.devicemapper import captured_kernel
from tests.unit.exports import made_service

# Like the real one, it ends when the program that it was given ends.
INHIBIT = """#!/bin/sh
echo "$*" >"$0.began"
for command; do :; done
$command
echo ended >"$0.ended"
"""


@pytest.fixture
def inhibit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with logind and systemd-inhibit."""
    path = tmp_path / "bin/systemd-inhibit"
    path.parent.mkdir()
    path.write_text(INHIBIT)
    path.chmod(0o755)
    monkeypatch.setattr(storagetm, "PROGRAMS", (f"{path.parent}/", *storagetm.PROGRAMS))
    (tmp_path / "logind").mkdir()
    monkeypatch.setattr(storagetm, "LOGIND", (f"{tmp_path}/none", f"{tmp_path}/logind"))
    return path


def happened(path: Path, what: str) -> bool:
    """Waits for it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (found := Path(f"{path}.{what}")).exists() and found.read_text().endswith("\n"):
            return True
        time.sleep(0.01)
    return False


def test_awake_while_it_exports(
    inhibit: Path, unpack: Callable[[str], CapturedMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = unpack("trixie-fresh")
    captured_kernel(machine, monkeypatch)
    made = storagetm.Machine()
    stays = storagetm.Stays(storagetm.RUN + "disks", made.id)  # a stop leaves a file beside it
    inventory = storagetm.Inventory([storagetm.BlockDevices()], stays=stays)
    service = made_service(made, inventory=inventory)
    service.exporter.ledger.lock()
    service.inventory.rescan()
    service.synchronise(strict=True)
    assert happened(inhibit, "began")
    pid = service.sleep_lock.pid
    assert Path(f"{inhibit}.began").read_text() == (
        "--what=sleep:idle:handle-lid-switch --who=storagetm --why=Other machines may be using its disks "
        f"--mode=block {storagetm.find_program('cat')}\n"
    )
    # The terminal's Ctrl-C is not for it.
    assert os.getpgid(pid) != os.getpgid(0)
    service.synchronise()
    assert service.sleep_lock.pid == pid
    assert not Path(f"{inhibit}.ended").exists()
    assert service.stop()
    assert happened(inhibit, "ended")
    os.waitpid(pid, 0)


def test_awake_only_once_clients_are_let_in(
    inhibit: Path, unpack: Callable[[str], CapturedMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = unpack("trixie-fresh")
    captured_kernel(machine, monkeypatch)
    made = storagetm.Machine()
    service = made_service(made)
    service.inventory.rescan()
    monkeypatch.setattr(service.exporter, "still_awaited", lambda _: ["'/dev/sda' (udev is busy)"])
    service.synchronise(strict=True)
    assert not service.sleep_lock.asked
    assert not Path(f"{inhibit}.began").exists()


def test_lock_ends_with_a_process_that_is_killed(inhibit: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(storagetm.__file__).parent)!r}); import storagetm, time\n"
        f"storagetm.PROGRAMS = {storagetm.PROGRAMS!r}; storagetm.LOGIND = {storagetm.LOGIND!r}\n"
        "storagetm.SleepLock().take(); storagetm.run_program('true'); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    assert happened(inhibit, "began")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert happened(inhibit, "ended")


@pytest.mark.usefixtures("inhibit")
@pytest.mark.parametrize("missing", ["logind", "program"])
def test_nothing_is_started_where_there_is_no_logind(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, asking on D-Bus would start what nobody needs."""
    if missing == "logind":
        os.rmdir(storagetm.LOGIND[1])
    else:
        monkeypatch.setattr(storagetm, "PROGRAMS", storagetm.PROGRAMS[1:])
        monkeypatch.setattr(os, "access", lambda path, _: not path.endswith("inhibit"))
    lock = storagetm.SleepLock()
    lock.take()
    assert (lock.fd, lock.pid) == (-1, 0)
    lock.release()


def refusing() -> storagetm.Service:
    """A service that exports nothing and has the lock."""
    made = storagetm.Machine()
    service = made_service(made, refused="for this test")
    service.signals.fd, service.signals.wakeup = os.pipe()
    service.sleep_lock.take()
    return service


def test_program_that_ends_is_noticed_once(
    inhibit: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it does when logind refuses. The loop notices that once, and goes on."""
    inhibit.write_text("#!/bin/sh\nexit 1\n")
    service = refusing()
    lost = service.sleep_lock.act

    def stop() -> bool:
        again = lost()
        service.signals.stop_asked = True
        service.signals.wake()
        return again

    monkeypatch.setattr(service.sleep_lock, "act", stop)
    service.loop()
    assert service.sleep_lock.fd == -1
    assert capfd.readouterr().err == (
        "Failed to keep this machine awake: systemd-inhibit has ended; it may go to sleep when it is idle "
        "or its lid is closed\n"
    )
    with pytest.raises(ChildProcessError):  # none is left to be waited for
        os.waitpid(-1, os.WNOHANG)
    service.sleep_lock.take()
    assert service.sleep_lock.fd == -1


def test_program_that_a_stop_ends_is_no_failure(
    inhibit: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A service manager ends all processes of a unit at once. That is no failure."""
    inhibit.write_text("#!/bin/sh\nexit 1\n")
    service = refusing()
    pid = service.sleep_lock.pid
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    # As a signal does while the loop waits for news, among which is the end of the program.
    due = service.display.due

    def signalled() -> float | None:
        service.signals.stop_asked = True
        return due()

    monkeypatch.setattr(service.display, "due", signalled)
    service.loop()
    assert service.sleep_lock.fd >= 0
    service.sleep_lock.release()
    os.waitpid(pid, 0)
    assert capfd.readouterr().err == ""


def test_program_that_does_not_start_leaves_nothing_open(inhibit: Path) -> None:
    inhibit.write_bytes(b"\x7fELF")
    lock = storagetm.SleepLock()
    before = os.listdir("/proc/self/fd")
    lock.take()
    assert lock.fd == -1
    assert os.listdir("/proc/self/fd") == before
