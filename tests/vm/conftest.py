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
EVERYWHERE = (
    *("test_access", "test_crash", "test_homes", "test_hotplug", "test_initrd", "test_pairing", "test_peer"),
    "test_usb",
)

# For a parameter `release`. The second is for what other tests show on Debian 13, the third for what differs
# little between 12 and 13.
ONCE_FOR_EACH = ("trixie", "bookworm", pytest.param(SID, marks=pytest.mark.reach))
ON_OLDER = (pytest.param("trixie", marks=pytest.mark.reach), "bookworm", ONCE_FOR_EACH[2])
ON_NEWER = ("trixie", pytest.param("bookworm", marks=pytest.mark.reach), ONCE_FOR_EACH[2])

# What takes long and shows little more than what stands beside it in its file, or than a unit test: two
# hours of a processor in all, and there are computers that need twice as long.
FURTHER = """
test_access.py::test_client_sees_a_disk_grow_and_shrink_in_each_access[--snapshot=16M]
test_access.py::test_each_access_works_on_each_release[bookworm]
test_access.py::test_good_client_meets_no_error
test_access.py::test_hostile_client_changes_no_byte_at_any_moment
test_access.py::test_missing_modules_make_nothing_less_safe
test_access.py::test_odd_devices_are_exported_whole[--read-write]
test_access.py::test_odd_devices_are_exported_whole[--snapshot=8M]
test_access.py::test_read_only_devices_are_not_exported_to_be_written
test_access.py::test_what_a_client_flushed_is_on_the_disk
test_addresses.py::test_closed_output_ends_nothing[>&- 2>&-]
test_addresses.py::test_closed_output_ends_nothing[>&-]
test_addresses.py::test_each_disk_is_on_one_page
test_addresses.py::test_link_local_line_works_on_debian_12
test_addresses.py::test_locale_without_utf8_ends_nothing
test_addresses.py::test_terminal_that_is_stopped_stops_nothing
test_bad_input.py::test_firmware_replaces_a_bad_machine_id[00000000000000000000000000000000\\n]
test_bad_input.py::test_firmware_replaces_a_bad_machine_id[]
test_bad_input.py::test_firmware_replaces_a_bad_machine_id[xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\\n]
test_bad_input.py::test_missing_modules_are_named
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[character-device]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[comma]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[dangling-link]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[directory]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[loop-of-links]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[missing-node]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[node-left-over]
test_bad_input.py::test_one_bad_device_keeps_all_from_being_exported[not-a-directory]
test_clients.py::test_as_many_clients_come_in_as_asked_for[any-3]
test_clients.py::test_same_client_may_return
test_clients.py::test_second_client_is_turned_away[snapshot]
test_consoles.py::test_service_starts_without_a_console
test_crash.py::test_crash_or_failure_at_every_step_is_recovered[newer]
test_crash.py::test_crash_or_failure_at_every_step_is_recovered[older]
test_crash.py::test_crash_or_failure_at_every_step_is_recovered[shared]
test_crash.py::test_earlier_version_is_taken_over
test_crash.py::test_what_was_replaced_while_dead_is_told
test_exchange.py::test_client_keeps_twelve_disks_over_restart_and_reboot[shared]
test_exchange.py::test_disk_in_the_place_of_another_is_not_written[none]
test_exchange.py::test_disk_in_the_place_of_another_is_not_written[other]
test_exchange.py::test_disks_that_change_places_over_a_reboot_are_not_mixed_up
test_exchange.py::test_disks_with_one_serial_number_are_all_attached
test_exchange.py::test_multipath_disk_is_exported_and_no_path
test_exchange.py::test_next_card_is_neither_read_nor_written[read-only-per-disk]
test_exchange.py::test_next_card_is_neither_read_nor_written[read-write-per-disk]
test_exchange.py::test_next_card_is_neither_read_nor_written[read-write-shared]
test_harness.py::test_release_has_modules_and_sees_disks_come_grow_and_go[bookworm]
test_hotplug.py::test_client_sees_a_disk_grow_and_shrink[scsi]
test_images.py::test_disk_of_4096_bytes_in_use_keeps_its_sectors[snapshot]
test_images.py::test_image_has_its_own_sectors[read-write]
test_images.py::test_image_has_its_own_sectors[snapshot]
test_initrd.py::test_disks_appear_at_the_end_of_a_usb_cable[trixie]
test_initrd.py::test_identity_is_that_of_the_running_system[bookworm]
test_initrd.py::test_kernel_command_line_decides_about_access[bookworm]
test_initrd.py::test_one_command_attaches_a_shared_subsystem[trixie]
test_initrd.py::test_one_command_attaches_all[bookworm-ipv6]
test_initrd.py::test_one_command_attaches_all[trixie-ipv6]
test_initrd.py::test_only_units_that_are_needed_run[bookworm]
test_initrd.py::test_stop_leaves_nothing_and_reboots[bookworm]
test_initrd.py::test_tpm_is_told_before_the_export_begins[sid]
test_initrd.py::test_what_prevents_the_export_stays_on_the_screen[bookworm]
test_initrd.py::test_what_prevents_the_export_stays_on_the_screen[trixie]
test_iscsi.py::test_all_transports_have_the_same_bytes
test_iscsi.py::test_crash_or_failure_at_every_step_is_recovered[EIO]
test_iscsi.py::test_crash_or_failure_at_every_step_is_recovered[SIGKILL]
test_iscsi.py::test_disk_that_hangs_holds_up_no_other
test_iscsi.py::test_disks_come_grow_and_go_and_a_kill_beside_a_reader
test_iscsi.py::test_link_local_line_works
test_iscsi.py::test_raw_commands_change_no_byte[more1]
test_iscsi.py::test_session_does_not_go_on_after_another_boot
test_iscsi.py::test_what_clients_write[snapshot]
test_listening.py::test_own_seat_is_taken_at_the_only_address_and_is_no_client
test_many.py::test_256_disks_are_exported_when_it_says_so[probing]
test_many.py::test_256_disks_are_exported_when_it_says_so[rest]
test_many.py::test_much_at_once_loses_nothing
test_nbd.py::test_clients_of_two_transports_see_the_same
test_nbd.py::test_initrd_serves_disks
test_nbd.py::test_kernel_client_over_a_restart
test_nbd.py::test_python_without_keys_is_refused
test_own_use.py::test_nobody_else_takes_it[--read-write]
test_own_use.py::test_partition_table_is_read_again
test_own_use.py::test_what_was_taken_while_dead_is_not_exported
test_pairing.py::test_crash_or_failure_at_every_step_is_recovered[SIGKILL]
test_pairing.py::test_thousand_attempts_beside_a_reader
test_pairing.py::test_what_becomes_of_tls_later_is_shown
test_pairing.py::test_who_listens_to_an_attached_client
test_peer.py::test_all_looks_like_the_peers_to_clients[00000000000000000000000000000001]
test_peer.py::test_all_looks_like_the_peers_to_clients[8f1d5c2e9ab04d6f9e3c7b1a2d4e6f80]
test_peer.py::test_all_looks_like_the_peers_to_clients[ffffffffffffffffffffffffffffffff]
test_peer.py::test_variables_do_what_they_do_for_the_peer[long]
test_shared.py::test_20_disks_are_attached_at_once_on_each_release[bookworm]
test_snapshots.py::test_machine_with_little_memory_lives
test_units.py::test_isolate_works_from_a_serial_console[bookworm]
test_units.py::test_isolate_works_from_a_virtual_terminal
test_usb.py::test_crash_or_failure_at_every_step_is_recovered
""".strip().split("\n")


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
    names = [f"{item.path.name}::{item.name}" for item in items]
    # A name that no test has any longer leaves out nothing.
    files = {item.path.name for item in items}
    if not config.option.keyword and all("::" not in argument for argument in config.args):
        stale = [name for name in FURTHER if name.partition("::")[0] in files and name not in names]
        assert not stale, f"there are no such tests: {stale}"
    for item, name in zip(items, names):
        if name in FURTHER:
            item.add_marker(pytest.mark.reach)
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
    for release in sorted(used):
        try:
            found[release]
        except RuntimeError:
            pass  # it fails those that need it
    yield found
    found.close()


@pytest.fixture(scope="session")
def standard(request: pytest.FixtureRequest) -> str:
    """The release of all machines for which no test asks for another one."""
    value: str = request.config.getoption("release")
    return value


@pytest.fixture(scope="session")
def tool(images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed program, built from what is in the work tree now.

    With the bytecode of the machines' Pythons: to compile it takes an emulated machine 4 s at each start.
    """
    path = tmp_path_factory.mktemp("tool") / "storagetm.pyz"
    pythons = [harness_images.interpreter(release) for release in images]
    command = ["build_zipapp.py", f"--output={path}", *(f"--bytecode={python}" for python in pythons)]
    subprocess.run(["/usr/bin/python3", *command], cwd=PROJECT, check=True)
    return path


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
