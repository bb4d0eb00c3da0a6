# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root file systems, kernels and initrds of three Debian releases for the emulated machines, made once and
cached.

Making them needs root, for chroot and mounts. That part runs as a process of its own (`python3 -m
tests.harness.images`, through sudo if need be) in a mount namespace of its own, so that no mount outlives it
however it ends.

What is in the cache, under `${STORAGETM_CACHE:-${XDG_CACHE_HOME:-~/.cache}/storagetm}`:

- `RELEASE-base-KEY/root/`: the release as mmdebstrap made it. This is what takes two minutes.
- `RELEASE-KEY/`: `root.img` is that tree with our settings and the agent as an ext4 file system; `vmlinuz`
  its kernel; `boot.img` an initrd that does no more than mount that file system.
- `RELEASE-storagetm-KEY.img`: an initrd made by the release's own dracut, with the project installed.

KEY is a hash of all that the thing is made from, so nothing is ever out of date. Older ones are removed.

sid is Debian's unstable release, and has other packages each day. What is made of it is used until the week
ends; `STORAGETM_SID` names another week, such as the one that is still in the cache when the packages of
today do not go together.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).resolve().parent / "guest"

SID = "sid"
RELEASES = ("trixie", "bookworm", SID)

# Taken once, so that all that belongs to one test run agrees on it.
SID_WEEK = os.environ.get("STORAGETM_SID") or time.strftime("%G-W%V")

PACKAGES = (
    "btrfs-progs",
    "busybox-static",  # For boot.img: it needs no library.
    "cryptsetup-bin",
    "dbus",
    "dmsetup",
    "dosfstools",
    "dracut",
    "dracut-network",
    "e2fsprogs",
    "fdisk",
    "iproute2",
    "iputils-ping",
    "kbd",
    "kmod",
    "libiscsi-bin",
    "libnbd-bin",
    "linux-image-amd64",
    "lvm2",
    "make",  # To install the project by its own Makefile.
    "mdadm",
    "nbd-client",
    "nvme-cli",
    "open-iscsi",
    "plymouth",
    "procps",
    "python3",
    "qemu-utils",
    "strace",
    "systemd",
    "systemd-sysv",
    "udev",
    "util-linux",
    "xfsprogs",
)
# Debian 12's kernel has no TLS for NVMe.
TLS_PACKAGES = ("keyutils", "ktls-utils", "tcpdump")
# What transports are compared with.
BENCH_PACKAGES = ("openssh-client", "openssh-server")
# A login that activates home directories.
HOME_PACKAGES = ("libnss-systemd", "libpam-systemd", "login", "systemd-homed")
# Parts of the packages above in older releases.
SID_PACKAGES = ("systemd-tpm",)

# What no test needs. The drivers make up most of a kernel package, and all that remain end up in an initrd
# made with --no-hostonly, which the emulated machine then has to unpack.
LEAVE_OUT = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/etc/kernel/postinst.d/dracut",  # Replaced by a stub: see NO_INITRD.
    "/*lib/modules/*/kernel/drivers/accel/*",
    "/*lib/modules/*/kernel/drivers/gpu/drm/amd/*",
    "/*lib/modules/*/kernel/drivers/gpu/drm/gma500/*",
    "/*lib/modules/*/kernel/drivers/gpu/drm/i915/*",
    "/*lib/modules/*/kernel/drivers/gpu/drm/nouveau/*",
    "/*lib/modules/*/kernel/drivers/gpu/drm/radeon/*",
    "/*lib/modules/*/kernel/drivers/gpu/drm/xe/*",
    "/*lib/modules/*/kernel/drivers/iio/*",
    "/*lib/modules/*/kernel/drivers/isdn/*",
    "/*lib/modules/*/kernel/drivers/media/*",
    "/*lib/modules/*/kernel/drivers/net/wireless/*",
    "/*lib/modules/*/kernel/drivers/staging/*",
    "/*lib/modules/*/kernel/net/mac80211/*",
    "/*lib/modules/*/kernel/net/wireless/*",
    "/*lib/modules/*/kernel/sound/*",
)

# The packages of the kernel and of dracut both call this hook to make an initrd, which takes a minute and is
# not used.
NO_INITRD = r"""
mkdir -p "$1/etc/kernel/postinst.d"
printf '#!/bin/sh\n' >"$1/etc/kernel/postinst.d/dracut"
chmod +x "$1/etc/kernel/postinst.d/dracut"
"""

# Of the system that an initrd is made on. With --hostonly it is the initrd's, too.
MACHINE_ID = "0123456789abcdef0123456789abcdef"

# Units that make the boot slower and that no test is about. The activation of LVM volumes and RAID arrays by
# udev stays.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-hugepages.mount",
    "blk-availability.service",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "dracut-shutdown.service",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "logrotate.timer",
    "lvm2-monitor.service",
    "mdcheck_continue.timer",
    "mdcheck_start.timer",
    "mdmonitor-oneshot.timer",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "networking.service",
    "nvmefc-boot-connections.service",
    "nvmf-autoconnect.service",
    "plymouth-quit-wait.service",
    "plymouth-quit.service",
    "plymouth-read-write.service",
    "plymouth-start.service",
    "proc-sys-fs-binfmt_misc.automount",
    "run-lock.mount",
    "serial-getty@ttyS0.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "system-xfs_scrub.slice",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-udev-load-credentials.service",
    "systemd-update-done.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
    "tmp.mount",
    "uuidd.socket",
    "xfs_scrub_all.timer",
)

SID_FAILED = f"""
sid is Debian's unstable release: its packages change each day, and now and then cannot be installed
together. If that is what the messages say, try again later, or have STORAGETM_SID=YEAR-WWEEK name an earlier
week whose image is still in the cache (this week is {SID_WEEK}). Only the tests on sid need it."""

# Those that carry out what the kernel command line says about units; the others take a second, and find
# nothing.
GENERATORS = ("systemd-debug-generator", "systemd-run-generator")

# Without what no disk and no network adapter depends on, which is most of all that there is.
TRIGGER_DROP_IN = """\
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-nomatch=acpi --subsystem-nomatch=clocksource \\
    --subsystem-nomatch=clockevents --subsystem-nomatch=cpu --subsystem-nomatch=event_source \\
    --subsystem-nomatch=mem --subsystem-nomatch=memory --subsystem-nomatch=node --subsystem-nomatch=pnp \\
    --subsystem-nomatch=tty --subsystem-nomatch=vc --subsystem-nomatch=vtconsole \\
    --subsystem-nomatch=workqueue
# Has the kernel look for media in drives.
ExecStart=-udevadm trigger --action=add /sys/module/block
"""

AGENT_UNIT = """\
[Unit]
Description=Agent of the Test Harness
DefaultDependencies=no
After=systemd-tmpfiles-setup-dev.service systemd-udevd.service systemd-remount-fs.service
Before=sysinit.target

[Service]
ExecStart=/usr/bin/python3 -I /usr/local/lib/storagetm-agent.py
OOMScoreAdjust=-1000

[Install]
WantedBy=sysinit.target
"""

# A root shell on the serial console, which nothing starts by itself. The machine ends with it.
SHELL_UNIT = """\
[Unit]
Description=Root Shell on the Serial Console
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Environment=TERM=xterm HOME=/root
WorkingDirectory=/root
ExecStartPre=cat /etc/motd
ExecStart=/bin/bash --login
StandardInput=tty-force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
"""

BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "crc32c_generic", "ext4")

BOOT_INIT = """\
#!/busybox sh
/busybox mount -t devtmpfs dev /dev
# These load their modules when they are opened; making them at every boot is what kmod has a slow service
# for.
/busybox mknod /dev/loop-control c 10 237
/busybox mknod /dev/btrfs-control c 10 234
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
for module in {modules}; do
    /busybox insmod /modules/$module
done
until [ -b /dev/vda ]; do
    /busybox usleep 10000
done
/busybox mount -t ext4 -o noatime /dev/vda /root
for directory in dev proc sys; do
    /busybox mount --move /$directory /root/$directory
done
exec /busybox switch_root /root /sbin/init "$@"
"""


@dataclasses.dataclass(frozen=True)
class Image:
    """What a machine of one release is booted from."""

    release: str
    directory: Path

    @property
    def root(self) -> Path:
        """The root file system: ext4, raw, never written to by a machine."""
        return self.directory / "root.img"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def boot_initrd(self) -> Path:
        """The initrd that boots from `root`, and nothing else."""
        return self.directory / "boot.img"

    @property
    def kernel_version(self) -> str:
        return (self.directory / "kernel-version").read_text().strip()


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("STORAGETM_CACHE") or os.path.join(base, "storagetm"))


def digest(*parts: str | bytes | Path) -> str:
    """A short hash of texts, and of files and whole directories with their names and modes."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            paths = sorted(part.rglob("*")) if part.is_dir() else [part]
            for path in paths:
                if path.is_file() and "__pycache__" not in path.parts:
                    total.update(
                        f"{path.relative_to(part.parent)}\0{path.stat().st_mode & 0o111:o}\0".encode()
                    )
                    total.update(hashlib.sha256(path.read_bytes()).digest())
        else:
            total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()[:16]


def base_command(release: str, target: str) -> list[str]:
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        "--aptopt=Acquire::Languages none",
        "--aptopt=APT::Install-Recommends false",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEAVE_OUT),
        f"--essential-hook={NO_INITRD}",
        # A mirror that is a few days behind its date is as good as one that is not.
        *(['--aptopt=Acquire::Check-Valid-Until "false"'] if release == SID else []),
        f"--include={','.join(packages(release))}",
        release,
        target,
    ]


def packages(release: str) -> tuple[str, ...]:
    more = () if release == "bookworm" else TLS_PACKAGES + HOME_PACKAGES + BENCH_PACKAGES
    return PACKAGES + more + (SID_PACKAGES if release == SID else ())


def base_path(release: str) -> Path:
    week = [SID_WEEK] if release == SID else []
    return (
        cache_directory()
        / f"{release}-base-{digest(*base_command(release, ''), 'modules unpacked and not signed', *week)}"
    )


def image_path(release: str) -> Path:
    key = digest(base_path(release).name, Path(__file__).read_bytes(), GUEST)
    return cache_directory() / f"{release}-{key}"


def initrd_path(release: str, options: Sequence[str]) -> Path:
    parts = [
        PROJECT / name for name in ("Makefile", "build_zipapp.py", "dracut-module", "storagetm.py", "units")
    ]
    return (
        cache_directory() / f"{release}-storagetm-{digest(image_path(release).name, *parts, *options)}.img"
    )


class Images(dict[str, Image]):
    """Images by release. Those that are asked for in advance and are not in the cache are made at the same
    time, others when they are looked up, which also waits for them: a release that cannot be made fails
    whoever needs it, and nobody else. Raises RuntimeError.
    """

    def __init__(self, *releases: str) -> None:
        missing = [release for release in releases if not image_path(release).exists()]
        self._builders = {release: start_builder("image", release) for release in missing}
        self._failed: dict[str, str] = {}

    def __missing__(self, release: str) -> Image:
        if release in self._failed:
            raise RuntimeError(self._failed[release])
        builder = self._builders.pop(release, None)
        if builder is None and not image_path(release).exists():
            builder = start_builder("image", release)
        try:
            if builder:
                finish_builder(builder, f"the image of {release}")
        except RuntimeError as e:
            self._failed[release] = f"{e}{SID_FAILED if release == SID else ''}"
            raise RuntimeError(self._failed[release]) from None
        self[release] = Image(release, image_path(release))
        return self[release]

    def close(self) -> None:
        """End what is being made and was not asked for so far."""
        for builder in self._builders.values():
            builder.terminate()
            builder.wait()


def build(*releases: str) -> dict[str, Image]:
    """Make the images of these releases, those that are not in the cache; all at the same time."""
    images = Images(*releases)
    return {release: images[release] for release in releases}


def initrd(image: Image, *options: str, spoil: str = "") -> Path:
    """The path of an initrd with the project in it, made by the release's own dracut with these further
    options, and after the shell command `spoil` has been run on the system that it is made on. Raises
    RuntimeError, with what dracut says.
    """
    path = initrd_path(image.release, (*options, spoil) if spoil else options)
    if not path.exists():
        builder = start_builder("initrd", image.release, *options, spoil=spoil)
        finish_builder(builder, f"the initrd for {image.release}")
    return path


def interpreter(release: str) -> Path:
    """A program that runs a release's own Python here, once its image is made: for bytecode that fits it."""
    path = cache_directory() / f"{release}-python"
    command = [*([] if os.geteuid() == 0 else ["sudo"]), "chroot", f"{base_path(release)}/root"]
    text = f'#!/bin/sh\nexec {shlex.join(command)} /usr/bin/python3 "$@"\n'
    if not path.exists() or path.read_text() != text:
        # Renamed into place: several processes may do this at the same time.
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(text)
        new.chmod(0o755)
        new.replace(path)
    return path


def start_builder(kind: str, release: str, *options: str, spoil: str = "") -> subprocess.Popen[bytes]:
    cache_directory().mkdir(parents=True, exist_ok=True)
    # The system's Python: whatever runs the tests may not be readable, or not be found, by root.
    return subprocess.Popen(
        [
            *([] if os.geteuid() == 0 else ["sudo"]),
            *("env", f"STORAGETM_CACHE={cache_directory()}", f"STORAGETM_SID={SID_WEEK}"),
            *("unshare", "--mount", "--propagation", "private"),
            *("/usr/bin/python3", "-m", "tests.harness.images", f"--spoil={spoil}"),
            *(kind, release, "--", *options),
        ],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # Why it fails, if it does.
    )


def finish_builder(builder: subprocess.Popen[bytes], what: str) -> None:
    try:
        reason = builder.communicate()[0].decode(errors="replace").strip()
        if builder.returncode != 0:
            raise RuntimeError(f"Could not make {what}: {reason or 'see the messages above.'}")
    except BaseException:
        builder.terminate()
        raise


# From here on: what runs in the builder's process, as root, in a mount namespace of its own.


def say(release: str, message: str) -> None:
    print(f"{time.strftime('%T')} {release}: {message}", file=sys.stderr, flush=True)


def run(*command: str | Path, **keywords: str) -> None:
    """Run a command. Only if it fails, show what it printed, and tell the end of that to who has started the
    builder.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **keywords},
    )
    if done.returncode != 0:
        output = done.stdout.decode(errors="replace")
        sys.stderr.write(output)
        message = f"{command[0]} failed with exit status {done.returncode}."
        print(message, output[-4000:], sep="\n")
        raise SystemExit(message)


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Keep two builders from making the same thing."""
    with open(cache_directory() / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def overlay(lower: Path) -> Iterator[Path]:
    """A writable view of a tree that leaves the tree itself as it is."""
    with tempfile.TemporaryDirectory(prefix="storagetm-") as name:
        scratch = Path(name)
        run("mount", "-t", "tmpfs", "-o", "size=4G", "tmpfs", scratch)
        for directory in ("upper", "work", "merged"):
            (scratch / directory).mkdir()
        merged = scratch / "merged"
        run(
            *("mount", "-t", "overlay", "-o"),
            f"lowerdir={lower},upperdir={scratch / 'upper'},workdir={scratch / 'work'}",
            *("overlay", merged),
        )
        try:
            yield merged
        finally:
            run("umount", "--recursive", scratch)


def remove_older(pattern: str, keep: Path) -> None:
    """Remove what an earlier recipe made, but nothing that a test may be running on just now."""
    for path in cache_directory().glob(pattern):
        outdated = path.stat().st_mtime < time.time() - 3 * 3600
        if outdated and path.name != keep.name and len(path.name) == len(keep.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_base(release: str) -> Path:
    path = base_path(release)
    if path.exists():
        return path
    started = time.monotonic()
    say(release, "fetching and unpacking packages, about two minutes ...")
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    partial.chmod(0o755)
    run(*base_command(release, str(partial / "root")), LC_ALL="C.UTF-8")
    unpack_modules(partial / "root")
    partial.rename(path)
    remove_older(f"{release}-base-*", path)
    say(release, f"unpacked in {time.monotonic() - started:.0f} s.")
    return path


def unpack_modules(root: Path) -> None:
    """Unpack the kernel's modules and cut their signatures off.

    Unpacking and verifying takes an emulated machine seconds at every boot.
    """
    modules = root / "usr/lib/modules"
    packed = [str(path) for path in modules.rglob("*.ko.xz")]
    if packed:
        run("xz", "--decompress", "--threads=0", *packed)
    magic = b"~Module signature appended~\n"
    for path in modules.rglob("*.ko"):
        data = path.read_bytes()
        if data.endswith(magic):
            # Behind the module come the signature, 12 bytes of which the last four are its length, and the
            # magic.
            end = len(data) - len(magic) - 12
            os.truncate(path, end - int.from_bytes(data[end + 8 : end + 12], "big"))
    for version in modules.iterdir():
        run("chroot", root, "depmod", version.name)


def configure(root: Path) -> None:
    """Our settings, and the agent."""
    (root / "etc/machine-id").write_text(
        ""
    )  # Empty, not missing, so that no boot takes itself for the first.
    (root / "etc/hostname").write_text("machine\n")
    (root / "etc/fstab").write_text("")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    shadow = root / "etc/shadow"
    shadow.write_text(shadow.read_text().replace("root:*:", "root::", 1))

    units = root / "etc/systemd/system"
    for unit in MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    # Those tests start it that are about it.
    (units / "remote-fs.target.wants/tlshd.service").unlink(missing_ok=True)
    for service in ("ssh", "systemd-homed"):
        (units / f"multi-user.target.wants/{service}.service").unlink(missing_ok=True)
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    (units / "harness-agent.service").write_text(AGENT_UNIT)
    (units / "sysinit.target.wants").mkdir(exist_ok=True)
    (units / "sysinit.target.wants/harness-agent.service").symlink_to("../harness-agent.service")
    (units / "harness-shell.service").write_text(SHELL_UNIT)
    # It is started when something connects to its socket.
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/dbus.service").symlink_to("/dev/null")
    (units / "systemd-udev-trigger.service.d").mkdir()
    (units / "systemd-udev-trigger.service.d/harness.conf").write_text(TRIGGER_DROP_IN)
    generators = root / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    for generator in (root / "usr/lib/systemd/system-generators").iterdir():
        if generator.name not in GENERATORS:
            (generators / generator.name).symlink_to("/dev/null")
    for name in ("journald", "system"):
        (root / f"etc/systemd/{name}.conf.d").mkdir(exist_ok=True)
    # In memory: quicker, and the file system is thrown away anyway.
    (root / "etc/systemd/journald.conf.d/harness.conf").write_text("[Journal]\nStorage=volatile\n")
    # An emulated machine on a busy host may well take longer than the defaults allow.
    (root / "etc/systemd/system.conf.d/harness.conf").write_text(
        "[Manager]\nDefaultTimeoutStartSec=300s\nDefaultTimeoutStopSec=60s\nDefaultDeviceTimeoutSec=300s\n"
    )
    shutil.copyfile(GUEST / "agent.py", root / "usr/local/lib/storagetm-agent.py")


def make_boot_initrd(root: Path, version: str, path: Path) -> None:
    """An initrd with just enough to find and mount the root file system."""
    directory = root / "usr/lib/modules" / version
    needs = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[module] = others.split()
    by_name = {Path(module).name.partition(".")[0].replace("-", "_"): module for module in needs}
    wanted: list[str] = []
    for name in BOOT_MODULES:
        if name in by_name:  # Otherwise it is built in.
            # depmod lists what a module needs with the one to load first at the end.
            wanted += [
                module for module in [*reversed(needs[by_name[name]]), by_name[name]] if module not in wanted
            ]

    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for directory_name in ("dev", "modules", "proc", "root", "sys"):
            (tree / directory_name).mkdir()
        for module in wanted:
            shutil.copy(directory / module, tree / "modules")
        shutil.copy(root / "usr/bin/busybox", tree / "busybox")
        modules = " ".join(Path(module).name for module in wanted)
        (tree / "init").write_text(BOOT_INIT.format(modules=modules))
        (tree / "init").chmod(0o755)
        files = "\n".join(str(file.relative_to(tree)) for file in sorted(tree.rglob("*")))
        with path.open("wb") as output:
            subprocess.run(
                ["cpio", "--quiet", "--create", "--format=newc", "--owner=+0:+0"],
                cwd=tree,
                input=files.encode(),
                stdout=output,
                check=True,
            )


def make_image(release: str) -> None:
    path = image_path(release)
    with lock(release):
        if path.exists():
            return
        base = make_base(release)
        say(release, "making the disk image ...")
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        partial.chmod(0o755)
        with overlay(base / "root") as root:
            configure(root)
            (version,) = sorted(entry.name for entry in (root / "usr/lib/modules").iterdir())
            (partial / "kernel-version").write_text(version + "\n")
            shutil.copyfile(root / f"boot/vmlinuz-{version}", partial / "vmlinuz")
            make_boot_initrd(root, version, partial / "boot.img")
            run(
                *(
                    "mke2fs",
                    "-q",
                    "-t",
                    "ext4",
                    "-O",
                    "^has_journal",
                    "-E",
                    "root_owner=0:0",
                    "-m",
                    "0",
                    "-L",
                    "root",
                ),
                *("-d", root, partial / "root.img", "2G"),
            )
        partial.rename(path)
        remove_older(f"{release}-*", path)
        say(release, "the disk image is made.")


def make_initrd(release: str, options: Sequence[str], spoil: str) -> None:
    path = initrd_path(release, (*options, spoil) if spoil else options)
    with lock(f"{release}-storagetm"):
        if path.exists():
            return
        started = time.monotonic()
        say(release, "making an initrd with dracut ...")
        version = Image(release, image_path(release)).kernel_version
        partial = path.with_suffix(".partial")
        with overlay(base_path(release) / "root") as root:
            for kind, directory in (("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "run"), ("tmpfs", "tmp")):
                run("mount", "-t", kind, kind, root / directory)
            run("mount", "--bind", "/dev", root / "dev")
            run("mount", "--bind", "-o", "ro", PROJECT, root / "mnt")
            (root / "etc/machine-id").write_text(MACHINE_ID + "\n")
            # By the release's own Python: what is installed may contain its bytecode.
            run("chroot", root, "make", "-C", "/mnt", "install")
            if spoil:
                run("chroot", root, "sh", "-c", spoil)
            run(
                *(
                    "chroot",
                    root,
                    "dracut",
                    "--force",
                    "--no-hostonly",
                    "--no-hostonly-cmdline",
                    "--no-early-microcode",
                ),
                # Not compressed: unpacking it is what an emulated machine would spend most of its boot on.
                *("--no-compress", "--add", "storagetm", *options, "--kver", version, "/tmp/initrd.img"),
            )
            shutil.copyfile(root / "tmp/initrd.img", partial)
        partial.rename(path)
        # The newest few are kept: tests ask for more than one kind.
        for old in sorted(cache_directory().glob(f"{release}-storagetm-*.img"), key=os.path.getmtime)[:-4]:
            old.unlink()
        say(release, f"the initrd is made, in {time.monotonic() - started:.0f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="images.py", description="Make what the emulated machines boot from."
    )
    parser.add_argument("--spoil", default="", help="a shell command to run before dracut")
    parser.add_argument("kind", choices=("image", "initrd"))
    parser.add_argument("release", choices=RELEASES)
    parser.add_argument("options", nargs="*", help="further options for dracut")
    arguments = parser.parse_args()
    os.umask(0o022)
    if arguments.kind == "image":
        make_image(arguments.release)
    else:
        make_initrd(arguments.release, arguments.options, arguments.spoil)


if __name__ == "__main__":
    main()
