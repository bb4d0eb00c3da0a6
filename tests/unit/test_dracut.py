# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell of the dracut module, with stand-ins for dracut and for what a boot has made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import storagetm

MODULE = Path(storagetm.__file__).parent / "dracut-module"

# Installs what modules.dep knows, as dracut does, and nothing else.
DRACUT = """
dfatal() { echo "fatal: $*"; }
dwarn() { echo "warning: $*"; }
instmods() {
    for name in "$@"; do
        found=$(find "$srcmods" -name "$name.ko*")
        [ -z "$found" ] || cp "$found" "$initdir/lib/modules/$kernel"
    done
}
"""


def install_kernel(tmp_path: Path, *modules: str, builtin: str = "") -> tuple[int, str]:
    """The exit status and output of installkernel() for a kernel with these modules."""
    source, image = tmp_path / "lib/modules/6.1-x", tmp_path / "image/lib/modules/6.1-x"
    program = tmp_path / "storagetm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {storagetm.__file__} "$@"\n')
    program.chmod(0o755)
    source.mkdir(parents=True)
    image.mkdir(parents=True)
    for name in modules:
        (source / name).touch()
    (source / "modules.builtin").write_text("".join(f"kernel/x/{name}\n" for name in builtin.split()))
    script = (
        f"{DRACUT}\ninitdir={tmp_path}/image srcmods={source} kernel=6.1-x\n. {MODULE}/module-setup.sh\n"
        f"storagetm_program() {{ echo {program}; }}"
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}\ninstallkernel"], stdout=subprocess.PIPE, check=False, text=True
    )
    return done.returncode, done.stdout


ALL = ("nvmet-tcp.ko.xz", "dm-mod.ko", "dm-flakey.ko.zst", "dm-snapshot.ko", "loop.ko")


@pytest.mark.parametrize("missing", ["nvmet-tcp", "dm-mod", "dm-flakey"])
def test_kernel_that_cannot_do_it_is_refused(missing: str, tmp_path: Path) -> None:
    code, output = install_kernel(tmp_path, *(name for name in ALL if not name.startswith(missing)))
    assert code == 1
    assert output == (
        f"fatal: storagetm: the kernel 6.1-x has no module '{missing}', without which no disk can be "
        "exported read-only; install the package with the rest of its modules, or name another kernel with "
        "--kver\n"
    )


def test_kernel_that_can_do_it_is_taken(tmp_path: Path) -> None:
    assert install_kernel(tmp_path, *ALL) == (0, "")


def test_built_in_modules_count(tmp_path: Path) -> None:
    """Names in modules.builtin have dashes and underscores as the makefiles have them."""
    builtin = "nvmet-tcp.ko dm_mod.ko dm_flakey.ko dm-snapshot.ko loop.ko"
    assert install_kernel(tmp_path, builtin=builtin) == (0, "")
    # One name may end in another.
    (tmp_path / "other").mkdir()
    code, output = install_kernel(tmp_path / "other", builtin=builtin.replace("dm_flakey", "xdm_flakey"))
    assert code == 1
    assert "'dm-flakey'" in output


@pytest.mark.parametrize("missing", ["dm-snapshot", "loop"])
def test_kernel_without_snapshots_gets_a_warning(missing: str, tmp_path: Path) -> None:
    code, output = install_kernel(tmp_path, *(name for name in ALL if not name.startswith(missing)))
    assert code == 0
    assert output.startswith("warning: storagetm: the kernel 6.1-x has no module 'loop' or no 'dm-snapshot'")


LINK_LOCAL = "\n[Network]\nLinkLocalAddressing=yes\n"


@pytest.mark.parametrize(
    ("network", "added"),
    [
        ("DHCP=ipv4", True),
        ("DHCP=yes", True),
        ("DHCP=no", False),
        ("DHCP=ipv6", False),
        ("DHCP=no\nAddress=192.0.2.9/24", False),
        # What somebody has asked for.
        ("DHCP=yes\nLinkLocalAddressing=no", False),
        ("LinkLocalAddressing=ipv6\nDHCP=yes", False),
    ],
)
@pytest.mark.parametrize(
    ("line", "mode"),
    [
        ("quiet rd.systemd.unit=storage-target-mode.target ip=dhcp", True),
        ("ip=dhcp rd.systemd.unit=storage-target-mode.target", True),
        ("root=/dev/sda ip=dhcp", False),
        ("rd.systemd.unit=storage-target-mode.target.x ip=dhcp", False),
    ],
)
def test_dhcp_gets_a_link_local_address_as_well(
    network: str, added: bool, line: str, mode: bool, tmp_path: Path
) -> None:
    """What asks for an IPv4 address by DHCP takes a link-local one as well, in this mode."""
    (tmp_path / "cmdline").write_text(line + "\n")
    before = f"# Generated\n[Match]\nName=eth0\n\n[Network]\n{network}\n\n[DHCP]\n"
    for name in ("71-default", "90-eth0"):
        (tmp_path / f"{name}.network").write_text(before)
    (tmp_path / "90-eth0.netdev").write_text(before)
    script = (MODULE / "dhcp-link-local").read_text()
    script = script.replace("/run/systemd/network", str(tmp_path)).replace("/proc", str(tmp_path))
    subprocess.run(["sh", "-c", script], check=True)
    for name in ("71-default", "90-eth0"):
        expected = before + LINK_LOCAL if added and mode else before
        assert (tmp_path / f"{name}.network").read_text() == expected
    assert (tmp_path / "90-eth0.netdev").read_text() == before


def test_no_file_is_made_where_there_was_none(tmp_path: Path) -> None:
    (tmp_path / "cmdline").write_text("rd.systemd.unit=storage-target-mode.target\n")
    script = (MODULE / "dhcp-link-local").read_text()
    script = script.replace("/run/systemd/network", str(tmp_path)).replace("/proc", str(tmp_path))
    subprocess.run(["sh", "-c", script], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["cmdline"]


@pytest.mark.parametrize("wanted", [False, True])
def test_openssl_is_only_there_if_asked_for(wanted: bool, tmp_path: Path) -> None:
    for path in ("bin/storagetm", "lib/storagetm/storagetm.py"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(Path(storagetm.__file__).read_bytes())
    (tmp_path / "image").mkdir()
    more = ["ssl"] if wanted else []
    objects = subprocess.run(
        (
            sys.executable,
            "-IS",
            MODULE / "python-initrd",
            tmp_path / "bin/storagetm",
            tmp_path / "image",
            *more,
        ),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    names = {path.stem for path in (tmp_path / "image").rglob("*.pyc")}
    assert {"os", "storagetm"} <= names
    assert ("ssl" in names) == ("/libssl.so" in objects) == ("/libcrypto.so" in objects) == wanted


@pytest.mark.parametrize("capable", [True, False])
def test_python_that_cannot_encrypt_nbd_makes_no_image_for_it(capable: bool, tmp_path: Path) -> None:
    """Which is found out by the one that goes into the image."""
    text = (MODULE / "module-setup.sh").read_text()
    begin = text.index("    more=''\n")
    check = text[begin : text.index("more=ssl\n    fi\n", begin)] + "more=ssl; fi"
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{'exit' if capable else 'exit 1'}\n")
    (tmp_path / "python3").chmod(0o755)
    check = check.replace("/usr/bin/python3", f"{tmp_path}/python3")
    script = f"{DRACUT}\nstoragetm_nbd_tls=yes\n{check}\necho more=$more"
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=False, text=True)
    if capable:
        assert done.stdout == "more=ssl\n"
    else:
        assert done.returncode == 1
        assert done.stdout.startswith("fatal: storagetm: this Python can't encrypt NBD")
