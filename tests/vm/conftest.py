# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for tests that need machines.

- `target` and `client` are two machines on one wire, shared by all tests: a test leaves them as it found
  them. Their addresses are 192.0.2.1 and 192.0.2.2, and link-local ones.
- `boot` boots more, of any release, for one test only.
- `release` runs a test once for each release.

All but what asks for another release is Debian 13, or with `--release=` another one. A test, or one of its
parameters, that takes too long for every run is marked `reach`: `make test-vm` leaves it out, and
`make test-reach` runs it. That runs on Debian unstable, and with it all of the modules in `EVERYWHERE`.

What a machine has shown on its console is in build/vm-logs/, and is added to the report of a test that
fails.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.harness import images as harness_images
from tests.harness.images import PROJECT, RELEASES, SID, Image
from tests.harness.machine import Disk, Machine, Nic, Wire, boot_all, live_machines

# Processes that run tests side by side have machines of the same names.
LOGS = PROJECT / "build" / "vm-logs" / os.environ.get("PYTEST_XDIST_WORKER", "")
TOOL = "/usr/local/bin/storagetm.pyz"

# One of every kind, with and without a serial number.
TARGET_DISKS = (
    Disk("alpha", serial="DISK-ALPHA"),
    Disk("beta", serial="DISK-BETA"),
    Disk("plain"),
    Disk("small", size=16 << 20, bus="scsi", serial="DISK-SCSI"),
    Disk("flash", bus="nvme", serial="DISK-NVME"),
    Disk("cdrom", bus="ide", kind="cd"),
)


# What depends most on the kernel, systemd, udev and dracut.
EVERYWHERE = ("test_access", "test_crash", "test_hotplug", "test_initrd", "test_peer")

# For a parameter `release`. The second is for what other tests show on Debian 13, the third for what differs
# little between 12 and 13.
ONCE_FOR_EACH = ("trixie", "bookworm", pytest.param(SID, marks=pytest.mark.reach))
ON_OLDER = (pytest.param("trixie", marks=pytest.mark.reach), "bookworm", ONCE_FOR_EACH[2])
ON_NEWER = ("trixie", pytest.param("bookworm", marks=pytest.mark.reach), ONCE_FOR_EACH[2])


class BootMachine(Protocol):
    """What the fixture `boot` is: `Machine()`, with a release instead of an image."""

    def __call__(
        self, name: str, image: str | None = None, *, wait: bool = True, **options: Any
    ) -> Machine: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--release", choices=RELEASES, default=RELEASES[0], help="what machines are unless a test says so"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reach: not for every run; see `make test-reach`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("release") == RELEASES[0]:
        return
    for item in items:
        if item.path.stem in EVERYWHERE and not asked_for(item):
            item.add_marker(pytest.mark.reach)


def asked_for(item: pytest.Item) -> set[str]:
    """The releases among a test's parameters."""
    callspec = getattr(item, "callspec", None)
    return {value for value in callspec.params.values() if value in RELEASES} if callspec else set()


def prepare(machine: Machine, tool: Path, number: int = 0) -> None:
    """Put the tool into a machine that has booted, and switch its network on."""
    machine.put(TOOL, tool, mode=0o755)
    # Without the check for duplicates an address can be used at once.
    for nic in range(machine.nic_count):
        machine.run(f"sysctl -q net.ipv6.conf.eth{nic}.accept_dad=0 && ip link set eth{nic} up")
    if number:
        machine.run(f"ip address add 192.0.2.{number}/24 dev eth0")


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest, standard: str) -> Iterator[dict[str, Image]]:
    """The images of all releases. Those that are surely used are made at the same time."""
    used = set().union(*map(asked_for, request.session.items)) | {standard}
    found = harness_images.Images(*(release for release in RELEASES if release in used))
    yield found
    found.close()


@pytest.fixture(scope="session")
def standard(request: pytest.FixtureRequest) -> str:
    """The release of all machines for which no test asks for another one."""
    value: str = request.config.getoption("release")
    return value


@pytest.fixture(scope="session")
def tool() -> Path:
    """The packed program, built from what is in the work tree now."""
    subprocess.run(["make", "--silent", "storagetm.pyz"], cwd=PROJECT, check=True)
    return PROJECT / "storagetm.pyz"


@pytest.fixture(scope="session")
def shared_machines(images: dict[str, Image], standard: str, tool: Path) -> Iterator[list[Machine]]:
    wire = Wire()
    target = Machine("target", images[standard], disks=TARGET_DISKS, nics=[Nic(wire, 0)], log_directory=LOGS)
    client = Machine("client", images[standard], nics=[Nic(wire, 1)], log_directory=LOGS)
    with target, client:
        boot_all(target, client)
        prepare(target, tool, 1)
        prepare(client, tool, 2)
        yield [target, client]


@pytest.fixture(scope="session")
def target(shared_machines: list[Machine]) -> Machine:
    """The machine with the disks, `TARGET_DISKS`."""
    return shared_machines[0]


@pytest.fixture(scope="session")
def client(shared_machines: list[Machine]) -> Machine:
    """The machine that connects to them."""
    return shared_machines[1]


@pytest.fixture(params=ONCE_FOR_EACH)
def release(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(autouse=True)
def forget_disks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets no test know which disks others have plugged into the target."""
    yield
    if "shared_machines" in request.fixturenames:
        request.getfixturevalue("target").run("rm -f /run/storagetm/*.disks*")


@pytest.fixture
def boot(
    images: dict[str, Image], standard: str, tool: Path, request: pytest.FixtureRequest
) -> Iterator[BootMachine]:
    """Boot a machine that is gone when the test ends.

    With `wait=False` it returns at once. Otherwise the tool is put into the machine, and its network is
    switched on.
    """
    machines: list[Machine] = []
    logs = LOGS / re.sub(r"[^\w.-]+", "-", request.node.name).strip("-")

    def boot_machine(name: str, image: str | None = None, *, wait: bool = True, **options: Any) -> Machine:
        machine = Machine(name, images[image or standard], log_directory=logs, **options)
        machines.append(machine)
        machine.start()
        if wait:
            machine.wait_boot()
            prepare(machine, tool)
        return machine

    try:
        yield boot_machine
    finally:
        for machine in machines:
            machine.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    report = yield
    if report.failed:
        for machine in live_machines():
            report.sections.append(
                (f"console of {machine.name}: {machine.console_log}", machine.console_tail())
            )
    return report
