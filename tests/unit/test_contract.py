# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names, ports and identities: those that clients know from systemd-storagetm."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import random
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storagetm
from tests.unit.exports import Named, made_export, wanted_of

MACHINE_ID = "0123456789abcdef0123456789abcdef"
PREFIX = "nqn.2023-10.io.systemd:storagetm.e76a38b3eeb04f83a99185f6254a0e13"

# The first outputs of SipHash-2-4's reference implementation (vectors.h), for the key 00 01 .. 0f and inputs
# of 0, 1, 2, .. bytes 00 01 02 ..; that of 15 bytes is in the paper's appendix A as well.
SIPHASH_VECTORS = (
    "310e0edd47db6f72",
    "fd67dc93c539f874",
    "5a4fa9d909806c0d",
    "2d7efbd796666785",
    "b7877127e09427cf",
    "8da699cd64557618",
    "cee3fe586e46c9cb",
    "37d1018bf50002ab",
    "6224939a79f5f593",
    "b0e4a90bdf82009e",
    "f3b9dd94c5bb5d7a",
    "a7ad6b22462fb3f4",
    "fbe50e86bc8f1e75",
    "903d84c02756ea14",
    "eef27a8e90ca23f7",
    "e545be4961ca29a1",
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> storagetm.Machine:
    """The machine of the contract's vectors, which runs Debian 13."""
    (tmp_path / "machine-id").write_text(MACHINE_ID + "\n")
    (tmp_path / "os-release").write_text(
        'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n'
    )
    monkeypatch.setattr(storagetm, "ETC", f"{tmp_path}/")
    for name in ("MODEL", "FIRMWARE", "SERIAL", "UUID"):
        monkeypatch.delenv(f"SYSTEMD_NVME_{name}", raising=False)
    return storagetm.Machine()


@pytest.fixture
def transport(machine: storagetm.Machine) -> storagetm.NvmeTcp:
    return storagetm.NvmeTcp(machine)


def disk(node: str = "/dev/vda", **properties: str) -> storagetm.Export:
    """A disk with what udev says of it."""
    found = storagetm.BlockDevice(node.rpartition("/")[2], node, node.rpartition("/")[2])
    found.identify_by_udev(properties)
    export = storagetm.Export(found, storagetm.BlockDevices())
    export.stay = storagetm.Stay(1, "")
    export.stay.name = found.id_serial or found.stable()
    return export


# Primitives


def test_siphash_agrees_with_reference_vectors() -> None:
    key = bytes(range(16))
    for length, expected in enumerate(SIPHASH_VECTORS):
        assert storagetm.siphash24(key, bytes(range(length))).to_bytes(8, "little").hex() == expected, length
    assert storagetm.siphash24(key, bytes(range(63))).to_bytes(8, "little").hex() == "724506eb4c328a95"
    assert storagetm.siphash24(key, bytes(range(15))) == 0xA129CA6149BE45E5


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_hmac_is_that_of_the_library(key: bytes, message: bytes) -> None:
    assert storagetm.hmac_sha256(key, message) == hmac.new(key, message, "sha256").digest()


@given(st.binary(max_size=300))
def test_sha256_is_that_of_the_library(data: bytes) -> None:
    assert vars(storagetm)["sha256"](data).digest() == hashlib.sha256(data).digest()


def test_sha256_needs_no_private_module() -> None:
    """Another Python may lack them all; the name then is hashlib's."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['_sha2'] = sys.modules['_sha256'] = None;"
        "import storagetm, hashlib; sys.exit(storagetm.sha256 is not hashlib.sha256)"
    )
    root = str(Path(storagetm.__file__).parent)
    assert subprocess.run([sys.executable, "-IS", "-c", code, root], check=False).returncode == 0


@given(st.binary(min_size=16, max_size=32))
def test_digest_becomes_a_uuid_of_version_4(digest: bytes) -> None:
    made = uuid.UUID(hex=storagetm.uuid4_from(digest))
    assert (made.version, made.variant) == (4, uuid.RFC_4122)
    assert made.bytes[:6] + made.bytes[9:] == digest[:6] + digest[9:16]
    assert str(made) == storagetm.dashed(made.hex)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MACHINE_ID, True),
        (MACHINE_ID.upper(), False),
        (MACHINE_ID[:-1], False),
        (MACHINE_ID + "0", False),
        ("0" * 32, False),
        ("uninitialized", False),
        (str(uuid.UUID(MACHINE_ID)), False),
        ("", False),
    ],
)
def test_only_what_is_an_id128_is_taken_for_one(text: str, expected: bool) -> None:
    assert storagetm.is_id128(text) is expected


# Vectors


def test_prefix_follows_from_the_machine_id(transport: storagetm.NvmeTcp) -> None:
    assert transport.prefix == PREFIX
    assert transport.nqn(disk("/dev/vda")) == PREFIX + ".vda"


def test_app_specific_id_is_as_systemd_makes_it(machine: storagetm.Machine) -> None:
    # What systemd-storagetm takes as the serial number of every disk that has none of its own.
    assert machine.app_specific("397f4dbf1ebf466db3cb45b80d495bc1")[:20] == "0e06ea54baca4c67a335"


@pytest.mark.parametrize(
    ("nqn", "ipv4", "ipv6"),
    [
        ("", 59936, 36681),
        ("quux", 16858, 29423),
        ("nqn.2023-10.io.systemd:storagetm.099edbb9e5114193a828c46d31d9228f", 63558, 55673),
    ],
)
def test_ports_follow_from_the_prefix(machine: storagetm.Machine, nqn: str, ipv4: int, ipv6: int) -> None:
    transport = storagetm.NvmeTcp(machine, nqn)
    assert transport.port_number(storagetm.AF_INET) == ipv4
    assert transport.port_number(storagetm.AF_INET6) == ipv6


@given(st.text(st.characters(codec="utf-8"), max_size=50))
def test_ports_are_in_range_for_any_prefix(nqn: str) -> None:
    transport = storagetm.NvmeTcp(Named(), nqn)
    assert transport.port_number(storagetm.AF_INET) in range(1024, 65535, 2)
    assert transport.port_number(storagetm.AF_INET6) in range(1025, 65536, 2)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (disk(ID_SERIAL="DISK-A"), "23f6dcb9-5617-4019-9db0-49e2af0000e9"),
        (disk("/dev/nullb0"), "6cae16a3-f3e1-4b3b-9b53-091692726f45"),
        (made_export("/var/tmp/disk.img"), "56ff4049-df8e-4fca-aa73-09aabc53d99b"),
    ],
)
def test_uuid_is_as_systemd_makes_it(
    transport: storagetm.NvmeTcp, made: storagetm.Export, expected: str
) -> None:
    assert transport.identities.uuid(made) == expected


# Identity


def test_model_is_the_disks_with_the_systems_behind(transport: storagetm.NvmeTcp) -> None:
    assert transport.identities.model(disk(ID_MODEL="QEMU_NVMe_Ctrl")) == "QEMU_NVMe_Ctrl (debian)"
    assert (
        transport.identities.model(disk(ID_MODEL="X", ID_MODEL_FROM_DATABASE="Nice X")) == "Nice X (debian)"
    )
    assert transport.identities.model(disk()) == "debian"
    transport.machine.os = ""
    assert transport.identities.model(disk(ID_MODEL="QEMU_NVMe_Ctrl")) == "QEMU_NVMe_Ctrl"
    assert transport.identities.model(disk()) == ""
    assert len(transport.identities.model(disk(ID_MODEL="x" * 60))) == 40


def test_firmware_is_the_systems_version_cut_to_fit(machine: storagetm.Machine) -> None:
    assert storagetm.NvmeTcp(machine).identities.firmware == "13"
    machine.os_version = "2024.10.31-rc1"
    assert storagetm.NvmeTcp(machine).identities.firmware == "2024.10."


@pytest.mark.usefixtures("machine")
def test_image_id_comes_before_id(tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text("ID=debian\nIMAGE_ID=rescue\nVERSION_ID=13\nIMAGE_VERSION=7\n")
    transport = storagetm.NvmeTcp(storagetm.Machine())
    assert (transport.identities.model(disk()), transport.identities.firmware) == ("rescue", "7")


def test_serial_is_the_short_one_cut_to_fit(transport: storagetm.NvmeTcp) -> None:
    assert transport.identities.serial(disk(ID_SERIAL="long", ID_SERIAL_SHORT="short")) == "short"
    assert transport.identities.serial(disk(ID_SERIAL_SHORT="0123456789" * 3)) == "0123456789" * 2


def test_disk_without_a_serial_gets_its_own(transport: storagetm.NvmeTcp) -> None:
    """One for each disk and machine, the same at each start, and one that the kernel takes."""
    first, second = (
        transport.identities.serial(disk("/dev/vda")),
        transport.identities.serial(disk("/dev/vdb")),
    )
    assert first == transport.identities.serial(disk("/dev/vda"))
    assert first != second
    for serial in (first, second):
        assert len(serial) == 20
        assert set(serial) <= set("0123456789abcdef")
    transport.machine.id = bytes(16)
    assert transport.identities.serial(disk("/dev/vda")) != first


def test_environment_overrides_identities(
    machine: storagetm.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMD_NVME_MODEL", "Mine")
    monkeypatch.setenv("SYSTEMD_NVME_FIRMWARE", "F1")
    monkeypatch.setenv("SYSTEMD_NVME_SERIAL", "S1")
    monkeypatch.setenv("SYSTEMD_NVME_UUID", "01234567-89AB-cdef-0123-456789abcdef")
    transport = storagetm.NvmeTcp(machine)
    some = disk(ID_SERIAL="DISK-A", ID_SERIAL_SHORT="A", ID_MODEL="M")
    assert transport.identities.model(some) == "Mine"
    assert transport.identities.firmware == "F1"
    assert transport.identities.serial(some) == "S1"
    assert transport.identities.uuid(some) == "01234567-89ab-cdef-0123-456789abcdef"


def test_variable_that_is_no_uuid_is_ignored(
    machine: storagetm.Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SYSTEMD_NVME_UUID", "mine")
    transport = storagetm.NvmeTcp(machine)
    assert transport.identities.uuid(disk(ID_SERIAL="DISK-A")) == "23f6dcb9-5617-4019-9db0-49e2af0000e9"
    assert capfd.readouterr().err == "$SYSTEMD_NVME_UUID is not a UUID, ignoring it\n"


# The machine's ID


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories etc, sys, proc and run that the program takes for the machine's."""
    for name in ("ETC", "SYS", "PROC", "RUN"):
        monkeypatch.setattr(storagetm, name, f"{tmp_path}/{name.lower()}/")
    (tmp_path / "etc").mkdir()
    (tmp_path / "sys/class/dmi/id").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", "0" * 32, MACHINE_ID + "00"])
def test_firmware_uuid_replaces_a_bad_machine_id(
    places: Path, content: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (places / "etc/machine-id").write_text(content)
    (places / "sys/class/dmi/id/product_uuid").write_text("01234567-89AB-CDEF-0123-456789ABCDEF\n")
    assert storagetm.Machine.machine_id() == bytes.fromhex(MACHINE_ID)
    assert "using the firmware's UUID instead" in capfd.readouterr().err


def test_device_tree_uuid_replaces_a_missing_machine_id(places: Path) -> None:
    (places / "proc/device-tree").mkdir(parents=True)
    (places / "proc/device-tree/vm,uuid").write_bytes(b"01234567-89ab-cdef-0123-456789abcdef\0")
    assert storagetm.Machine.machine_id() == bytes.fromhex(MACHINE_ID)


def test_random_machine_id_outlasts_a_restart(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is the same after a restart, or what was exported before would not be found again."""
    first = storagetm.Machine.machine_id()
    assert storagetm.is_id128(first.hex())
    assert uuid.UUID(bytes=first).version == 4
    assert "systemd-machine-id-setup" in capfd.readouterr().err
    assert storagetm.Machine.machine_id() == first
    (places / "run/machine-id").unlink()
    assert storagetm.Machine.machine_id() != first


def test_random_machine_id_that_cannot_be_kept_changes(places: Path) -> None:
    (places / "run").write_text("no directory")
    assert storagetm.Machine.machine_id() != storagetm.Machine.machine_id()


@pytest.mark.parametrize(
    "shared",
    [
        "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        "00000000-0000-0000-0000-000000000000",
        "FEFEFEFE-FEFE-FEFE-FEFE-FEFEFEFEFEFE",
        "FFFFFF00-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        "56F49712-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        "03000200-0400-0500-0006-000700080009",
        "00020003-0004-0005-0006-000700080009",
        "12345678-1234-5678-90AB-CDDEEFAABBCC",
        "78563412-3412-7856-90AB-CDDEEFAABBCC",
        "4C4C4544-0000-2010-8020-80C04F202020",
        "Not Settable",
    ],
)
def test_uuid_of_many_machines_is_no_identity(
    places: Path, shared: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A firmware's UUID that nobody has set is no identity, nor is a machine ID that systemd made of it."""
    (places / "sys/class/dmi/id/product_uuid").write_text(shared + "\n")
    found = storagetm.Machine.machine_id().hex()
    assert found == (places / "run/machine-id").read_text()
    assert "the firmware has none of its own: names and ports are random" in capfd.readouterr().err
    (places / "etc/machine-id").write_text(shared.replace("-", "").lower())
    assert storagetm.Machine.machine_id().hex() == found
    # Somebody else's word is not doubted.
    (places / "etc/machine-id").write_text(MACHINE_ID)
    assert storagetm.Machine.machine_id().hex() == MACHINE_ID


@pytest.mark.parametrize(
    "own",
    [
        "4C4C4544-0042-3510-8052-B3C04F4B4E32",
        "00000000-0000-0000-0000-AC1F6B123456",  # made of a network adapter's address
        "A3B5C7D9-0123-4567-89AB-CDEF00112233",
    ],
)
def test_uuid_of_one_machine_is_its_identity(places: Path, own: str) -> None:
    (places / "sys/class/dmi/id/product_uuid").write_text(own + "\n")
    assert storagetm.Machine.machine_id().hex() == own.replace("-", "").lower()


UUIDS = ("a3b5c7d9-0123-4567-89ab-cdef00112233", "b3b5c7d9-0123-4567-89ab-cdef00112233")


class Hardware:
    """The hardware that a machine has, and an image that was made on it."""

    def __init__(self, places: Path) -> None:
        self.places = places
        self.directory = places / "sys/class/dmi/id"
        (places / "etc/machine-id").write_text(MACHINE_ID)
        (places / "proc").mkdir()
        (places / "proc/cmdline").write_text("quiet\n")

    def has(self, uuid: str = "", **serials: str) -> None:
        for path in self.directory.iterdir():
            path.unlink()
        (self.directory / "product_uuid").write_text(uuid + "\n")
        for name, text in serials.items():
            (self.directory / f"{name}_serial").write_text(text + "\n")

    def make_image(self) -> None:
        lines = {"MACHINE_ID": MACHINE_ID, **storagetm.hardware()}
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        assert "a3b5" not in text
        (self.places / "etc/storagetm-image").write_text(text)

    @property
    def uses_machine_id(self) -> bool:
        return storagetm.Machine.machine_id().hex() == MACHINE_ID


@pytest.fixture
def machine_hardware(places: Path) -> Hardware:
    return Hardware(places)


def test_image_of_this_machine_goes_by_the_machine_id(machine_hardware: Hardware) -> None:
    for own, serials in ((UUIDS[0], {}), (UUIDS[0], {"board": "B1"}), ("", {"board": "B1"}), ("", {})):
        machine_hardware.has(own, **serials)
        machine_hardware.make_image()
        assert machine_hardware.uses_machine_id
    # Another board in it, but still the same UUID.
    machine_hardware.has(UUIDS[0], board="B1")
    machine_hardware.make_image()
    machine_hardware.has(UUIDS[0], board="B2")
    assert machine_hardware.uses_machine_id


def test_image_of_another_machine_goes_by_the_firmware(
    machine_hardware: Hardware, places: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A client would take its disks for the other's, so it goes by its own firmware's name."""
    machine_hardware.has(UUIDS[0], board="B1")
    machine_hardware.make_image()
    machine_hardware.has(UUIDS[1], board="B1")
    assert storagetm.Machine.machine_id().hex() == UUIDS[1].replace("-", "")
    assert capfd.readouterr().err == (
        f"'{places}/etc/machine-id' is that of the machine on which this image was made, using the "
        "firmware's UUID instead\n"
    )
    # Nobody has set a UUID, but there are serial numbers.
    machine_hardware.has("03000200-0400-0500-0006-000700080009", board="B1")
    machine_hardware.make_image()
    machine_hardware.has("03000200-0400-0500-0006-000700080009", board="B2")
    assert storagetm.Machine.machine_id().hex() == (places / "run/machine-id").read_text()
    assert "at the next boot; make an image on this machine to fix them" in capfd.readouterr().err


def test_image_that_may_be_anyones_goes_by_the_machine_id(machine_hardware: Hardware, places: Path) -> None:
    """What cannot be told apart is left as it is."""
    machine_hardware.has(UUIDS[0])
    machine_hardware.make_image()
    machine_hardware.has("", board="B2")  # nothing of the kind that was noted
    assert machine_hardware.uses_machine_id
    machine_hardware.has("")
    assert machine_hardware.uses_machine_id
    # With a machine ID that did not come with the image there is nothing to doubt.
    machine_hardware.has(UUIDS[1])
    assert not machine_hardware.uses_machine_id
    (places / "etc/machine-id").write_text("c" * 32)
    assert storagetm.Machine.machine_id().hex() == "c" * 32
    # Nor where the boot loader says whose it is: the same one on a board that was exchanged, say.
    (places / "etc/machine-id").write_text(MACHINE_ID)
    (places / "proc/cmdline").write_text(f"quiet systemd.machine_id={MACHINE_ID}\n")
    assert machine_hardware.uses_machine_id


def test_machine_without_a_name_is_this_machine(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (places / "etc/machine-id").write_text(MACHINE_ID)
    machine = storagetm.Machine()
    names = iter(("workstation", "localhost", "(none)", "localhost"))

    class Uname:
        @property
        def nodename(self) -> str:
            return next(names)

    monkeypatch.setattr(os, "uname", Uname)
    assert machine.name == "workstation"
    assert machine.name == "this machine"
    (places / "sys/class/dmi/id/product_name").write_text("ThinkPad X1\n")
    assert machine.name == "ThinkPad X1"
    (places / "etc/machine-info").write_text('PRETTY_HOSTNAME="Lennart\'s Laptop"\n')
    assert machine.name == "Lennart's Laptop"


# Choosing ports


@pytest.fixture
def nvmet(places: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storagetm, "CONFIGFS", f"{places}/config/")
    (places / "config/nvmet/ports").mkdir(parents=True)
    (places / "proc/net").mkdir(parents=True)
    (places / "proc/net/if_inet6").write_text("")
    (places / "etc/machine-id").write_text(MACHINE_ID)
    (places / "etc/os-release").write_text("ID=debian\nVERSION_ID=13\n")
    return places / "config/nvmet/ports"


V4, V6 = storagetm.AF_INET, storagetm.AF_INET6


@pytest.mark.usefixtures("nvmet")
def test_ports_of_the_contract_come_first() -> None:
    transport = storagetm.NvmeTcp(storagetm.Machine())
    transport.adopt({})
    assert transport.ports == {V4: 59936, V6: 36681}


@pytest.mark.usefixtures("nvmet")
def test_without_ipv6_there_is_one_port(places: Path) -> None:
    (places / "proc/net/if_inet6").unlink()
    transport = storagetm.NvmeTcp(storagetm.Machine())
    transport.adopt({})
    assert transport.ports == {V4: 59936}


def test_ports_of_an_earlier_run_are_taken_again(nvmet: Path) -> None:
    """They are taken again although their directories are there: they are ours."""
    (nvmet / "1234").mkdir()
    (nvmet / "59936").mkdir()
    transport = storagetm.NvmeTcp(storagetm.Machine())
    live = {"nvmet/subsystems/x": "254:0 1", "nvmet/ports/1234": "port", "nvmet/ports/4321": "port"}
    live["nvmet/ports/2468"] = "passage"
    transport.adopt({r: storagetm.Branch(t, [storagetm.Directory(r)]) for r, t in live.items()})
    assert transport.ports == {V4: 1234, V6: 4321}


def test_ports_that_are_taken_are_replaced(nvmet: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (nvmet / "59936").mkdir()
    (nvmet / "36681").mkdir()
    transport = storagetm.NvmeTcp(storagetm.Machine())
    transport.adopt({})
    assert transport.ports[V4] != 59936
    assert transport.ports[V6] != 36681
    assert [n & 1 for n in transport.ports.values()] == [0, 1]
    assert "Port 59936 is taken, using" in capfd.readouterr().err


def test_search_for_a_free_port_ends(nvmet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nvmet / "59936").mkdir()
    taken = random.Random(1)
    numbers = []

    def urandom(length: int) -> bytes:
        value = taken.randbytes(length)
        if length > 4:  # what is no port
            return value
        numbers.append(1024 + int.from_bytes(value, "little") % 64511 & 0xFFFE)
        (nvmet / str(numbers[-1])).mkdir(exist_ok=True)
        return value

    monkeypatch.setattr(os, "urandom", urandom)
    with pytest.raises(storagetm.UserError, match="free port for IPv4"):
        storagetm.NvmeTcp(storagetm.Machine()).adopt({})
    assert len(numbers) == 17  # the last is not tried any more


@pytest.fixture
def busy(nvmet: Path) -> storagetm.NvmeTcp:
    """A transport that has chosen its ports."""
    transport = storagetm.NvmeTcp(storagetm.Machine())
    transport.adopt({})
    assert nvmet.exists()
    return transport


def failed_link(number: int, code: int) -> storagetm.Failure:
    """What a link to a port may fail with, which is when the kernel begins to listen."""
    link = storagetm.PortLink(f"nvmet/ports/{number}", "nvmet/subsystems/x")
    branch = storagetm.Branch("254:0 1", [storagetm.Directory("nvmet/subsystems/x"), link])
    return storagetm.Failure(branch, link, OSError(code, "reason"))


def failed_directory(path: str, code: int) -> storagetm.Failure:
    directory = storagetm.Directory(path)
    return storagetm.Failure(storagetm.Branch("", [directory]), directory, OSError(code, "reason"))


def test_other_failures_change_no_port(busy: storagetm.NvmeTcp) -> None:
    assert not busy.adapt(failed_directory("nvmet/subsystems/x", errno.EADDRINUSE))
    assert not busy.adapt(failed_directory("nvmet/subsystems/x", errno.EEXIST))
    assert not busy.adapt(failed_directory("nvmet/ports/59936", errno.EIO))
    assert not busy.adapt(failed_link(59936, errno.EIO))
    # Somebody else's link is no reason for another port.
    assert not busy.adapt(failed_link(59936, errno.EEXIST))
    # What could not be tried for another reason says nothing about a port.
    link = failed_link(59936, errno.EADDRINUSE)
    assert not busy.adapt(storagetm.Failure(link.branch, link.entry, link.error, cause=link))
    assert busy.ports == {V4: 59936, V6: 36681}


def test_port_taken_by_a_program_is_replaced(busy: storagetm.NvmeTcp) -> None:
    assert busy.adapt(failed_link(59936, errno.EADDRINUSE))
    assert busy.ports[V4] != 59936
    assert busy.ports[V4] % 2 == 0
    assert busy.ports[V6] == 36681


def test_port_taken_by_an_entry_is_replaced(busy: storagetm.NvmeTcp) -> None:
    assert busy.adapt(failed_directory("nvmet/ports/36681", errno.EEXIST))
    assert busy.ports[V6] != 36681
    assert busy.ports[V6] % 2 == 1
    assert busy.ports[V4] == 59936


@pytest.mark.parametrize("code", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_address_family_that_is_off_is_left_out(busy: storagetm.NvmeTcp, code: int) -> None:
    assert busy.adapt(failed_link(36681, code))
    assert busy.ports == {V4: 59936}
    # There has to be one.
    assert not busy.adapt(failed_link(59936, code))
    assert busy.ports == {V4: 59936}


def test_ports_are_not_tried_for_ever(busy: storagetm.NvmeTcp) -> None:
    tries = 0
    while busy.adapt(failed_link(busy.ports[V4], errno.EADDRINUSE)):
        tries += 1
    assert tries == 16


def test_only_families_with_a_port_are_reachable(busy: storagetm.NvmeTcp) -> None:
    addresses = [
        storagetm.Address(V4, "192.0.2.1", "eth0", False),
        storagetm.Address(V6, "fe80::1", "eth0", True),
        storagetm.Address(V6, "2001:db8::1", "eth0", False),
    ]
    assert busy.reachable(addresses) == addresses
    assert [i.line for i in busy.instructions([], addresses)] == [
        "nvme connect-all -t tcp -a 192.0.2.1 -s 59936",
        "nvme connect-all -t tcp -a fe80::1 -s 36681 -f INTERFACE",
        "nvme connect-all -t tcp -a 2001:db8::1 -s 36681",
    ]
    del busy.ports[V6]
    assert busy.reachable(addresses) == addresses[:1]


# The wanted tree


def test_disk_needs_what_is_between_and_its_ports(busy: storagetm.NvmeTcp) -> None:
    """What is in between is made before it and goes after it, as ports do; the passage is for protection."""
    made = disk(ID_SERIAL="DISK-A", ID_SERIAL_SHORT="A", ID_MODEL="Model")
    made.disk.tag, made.disk.size, made.access = "254:0 1", 1 << 20, storagetm.READ_WRITE
    between, branch = wanted_of(busy, made, PREFIX)
    assert (branch.root, branch.tag, branch.adopted) == (f"nvmet/subsystems/{PREFIX}.vda", "254:0 1", False)
    assert (between.root, between.tag, between.needs) == ("disk/254:0-1", "254:0 1", ())
    assert branch.needs == ("disk/254:0-1", "nvmet/ports/59936", "nvmet/ports/36681")
    assert branch.scaffold == ()
    made.access = storagetm.READ_ONLY
    (passage,) = busy.scaffolds({})
    between, branch = wanted_of(busy, made, PREFIX)
    assert between.root.startswith("dm/storagetm-vda-")
    assert branch.needs == (between.root, "nvmet/ports/59936", "nvmet/ports/36681")
    assert branch.scaffold == (passage.root,)


def test_wanted_tree_changes_only_with_the_disk(busy: storagetm.NvmeTcp) -> None:
    made = disk()
    between, first = wanted_of(busy, made, PREFIX)
    assert wanted_of(busy, made, PREFIX)[0] is between
    assert wanted_of(busy, made, PREFIX)[1] is first
    for name, value in (("size", 1), ("tag", "x"), ("model", "M"), ("serial", "S"), ("id_serial", "I")):
        setattr(made.disk, name, value)
        changed = wanted_of(busy, made, PREFIX)[1]
        assert not changed.same_as(first), name
        assert wanted_of(busy, made, PREFIX)[1] is changed
        first = changed
    del busy.ports[V6]
    assert not wanted_of(busy, made, PREFIX)[1].same_as(first)


@pytest.mark.parametrize("access", storagetm.ACCESS)
def test_file_never_has_the_block_size_of_its_file_system(busy: storagetm.NvmeTcp, access: str) -> None:
    """There is a device of ours in between, in each mode."""
    made = made_export("/run/disk.img", access=access, block=512, size=1 << 20)
    mapping = storagetm.mapping_of(wanted_of(busy, made, PREFIX)[0])
    assert mapping
    assert (mapping.block, mapping.source()) == (512, ("/run/disk.img", 2048))
