# SPDX-License-Identifier: LGPL-2.1-or-later
"""Codes, what is derived from them, and the forms that secrets and keys have, beside those of nvme-cli."""

from __future__ import annotations

import ctypes
import os
import re
import traceback
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import storagetm
from storagetm import AllowedHost, Code, Secret, UserError

HOST = "nqn.2014-08.org.nvmexpress:uuid:79338e9a-2392-49a9-91f4-9675489fb8f3"
COUNTED = bytes(range(64))
PR_GET_DUMPABLE = 3

# What nvme-cli 2.13 and 2.16 print for the secrets 00 01 02 ... with "gen-dhchap-key --hmac=0".
DHCHAP = {
    32: "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
    48: "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
    64: (
        "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P4zODhA=:"
    ),
}
# With a hash, it prints the secret as that changes it.
CHANGED = [
    "DHHC-1:01:rM6vS7gGFZoTzvWACnIltawTT7JmPfemWcYwM20JcAXK47xp:",
    "DHHC-1:02:S3pauXTMt1uxMb+7m0SsUpjLWsbwTZveDygtepAFDvUCMlyin2+iYycvPzUFfpyGYwkPOA==:",
    "DHHC-1:03:9SeGwz1Jf5OtRuPx7n1VeF/A95MFK9yn4LYTnp8SvlxIFIUtht8GPT5WYYDBxrNtHKbGNXQ7ISGjm6LkaWqdA9oG8pg=:",
]
PSK = "NVMeTLSkey-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:"
PSK_384 = "NVMeTLSkey-1:02:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:"


# Codes


def test_everything_a_host_needs_follows_from_the_code() -> None:
    """The test vectors of the manual page."""
    code = Code.parse("k7fm-2qxd-9wtr-4hcn")
    host = code.host()
    assert host.nqn == HOST
    assert host.host_id == HOST[-36:]
    assert host.secret == Secret(b"DHHC-1:00:+CjuZwpXuWN6mZBucBOWV4WZl94PgPcNT6Vnyb31FBB10wjG:")
    assert host.controller_secret == Secret(b"DHHC-1:00:Mq+KQxlduOENyArtRtykZGk2qd+vQDsSBRZoQD1PXfwFvqNK:")
    assert host.psk
    assert (
        storagetm.psk_text(host.psk) == "NVMeTLSkey-1:01:c3wUf25ySjhnjXuogoZTuzLuJP9p5Wjz1eJ6eJ9V3wRQ5Q/m:"
    )
    manual = (Path(storagetm.__file__).parent / "docs/storagetm.8").read_text().replace("\\-", "-")
    nbd = code.nbd_key().reveal().hex()
    assert nbd == "2d7427b8bdac1bfe7436486ff6e3c063509e33397f783a9264cab15a5da9e323"
    for text in (code.text(), host.nqn, storagetm.psk_text(host.psk), f"storagetm:{nbd}"):
        assert text in manual
    for secret in (host.secret, host.controller_secret):
        assert secret.reveal().decode() in manual


def test_code_is_random_and_long_enough() -> None:
    codes = {Code.random().text() for _ in range(1000)}
    assert len(codes) == 1000
    assert all(re.fullmatch(r"([0-9a-hjkmnp-tv-z]{4}-){3}[0-9a-hjkmnp-tv-z]{4}", code) for code in codes)
    used = [{code[i] for code in codes} for i in (0, 1, 2, 3, 15, 16, 17, 18)]
    assert all(len(letters) == 32 for letters in used)


@pytest.mark.parametrize(
    "text",
    [
        "k7fm-2qxd-9wtr-40c1",
        "K7FM-2QXD-9WTR-40C1",
        "k7fm2qxd9wtr40c1",
        " k7fm 2qxd 9wtr\t40c1\n",
        "k7fm-2qxd-9wtr-4oci",
        "k7fm-2qxd-9wtr-4OCL",
        "k-7-f-m-2-q-x-d-9-w-t-r-4-0-c-1",
    ],
)
def test_code_may_be_written_in_many_ways(text: str) -> None:
    assert Code.parse(text).text() == "k7fm-2qxd-9wtr-40c1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it has 0 letters and digits, not 16 to 64"),
        ("k7fm-2qxd-9wtr-4hc", "it has 15 letters and digits, not 16 to 64"),
        ("k7fm" * 17, "it has 68 letters and digits, not 16 to 64"),
        ("u7fm-2qxd-9wtr-4hcn", "it may only have digits and letters other than u"),
        ("k7fm_2qxd_9wtr_4hcn", "it may only have digits and letters other than u"),
        ("k7fm-2qxd-9wtr-4hc\u0665", "it may only have digits and letters other than u"),
    ],
)
def test_code_that_is_none_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(why)}$"):
        Code.parse(text)


@given(st.text())
@example("k7fm-2qxd-9wtr-4hcn\0")
@example("\u0130" * 16)
def test_code_may_be_any_text(text: str) -> None:
    try:
        code = Code.parse(text)
    except ValueError as e:
        assert not text or text not in str(e) or len(text) < 4  # noqa: PT017
    else:
        assert Code.parse(code.text()).text() == code.text()


# Secrets


@pytest.mark.parametrize("length", [32, 48, 64])
def test_secret_is_written_as_nvme_cli_writes_it(length: int) -> None:
    assert storagetm.dhchap_text(COUNTED[:length]).decode() == DHCHAP[length]


@pytest.mark.parametrize("text", [*DHCHAP.values(), *CHANGED])
def test_secret_of_nvme_cli_is_taken_as_it_is(text: str) -> None:
    assert storagetm.parse_dhchap(text) == Secret(text.encode())


GOOD = DHCHAP[32]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not of the form"),
        ("DHHC-1", "it is not of the form"),
        (GOOD[:-1], "it is not of the form"),
        (GOOD.replace("DHHC-1", "DHHC-2"), "it is not of the form"),
        (GOOD.replace(":00:", ":04:"), "it is not of the form"),
        (GOOD.replace(":00:", ":0:"), "it is not of the form"),
        (PSK, "it is not of the form"),
        (GOOD.replace("KfiaR", "KfiaS"), "its check sum is wrong"),
        (GOOD.replace("AAEC", "AAED"), "its check sum is wrong"),
        (GOOD.replace("AAEC", "AA"), "it is no base 64|it holds"),
        (GOOD.replace("AAEC", "AAE!C"), "it is no base 64"),
        (GOOD.replace("AAEC", "AA\u00e4C"), "it is no base 64"),
        (GOOD.replace("AAECAwQF", "AAEC"), "it holds 29 bytes, not 32, 48 or 64"),
        ("DHHC-1:00::", "it holds 0 bytes, not 32, 48 or 64"),
        ("DHHC-1:00:" + GOOD, "it is no base 64"),
    ],
)
def test_malformed_secret_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^({why})") as caught:
        storagetm.parse_dhchap(text)
    assert "AwQF" not in str(caught.value)


@given(st.text())
@example("DHHC-1:00:" + "A" * 48 + ":")
@example("NVMeTLSkey-1:01:" + "A" * 48 + ":")
@example("NVMeTLSkey-1:01:====:")
def test_secret_may_be_any_text(text: str) -> None:
    for parse in (storagetm.parse_dhchap, storagetm.parse_psk):
        try:
            found = parse(text)
        except ValueError:
            continue
        assert found.reveal()


@given(st.sampled_from([32, 48, 64]).flatmap(lambda n: st.binary(min_size=n, max_size=n)))
def test_secret_is_read_as_it_was_written(raw: bytes) -> None:
    assert storagetm.without_crc(storagetm.with_crc(raw)) == raw
    text = storagetm.dhchap_text(raw).decode()
    assert storagetm.parse_dhchap(text).reveal().decode() == text


def test_psk_has_the_interchange_format() -> None:
    assert storagetm.parse_psk(PSK) == Secret(COUNTED[:32])
    assert storagetm.psk_text(Secret(COUNTED[:32])) == PSK
    with pytest.raises(ValueError, match="it is not for SHA-256; make one with"):
        storagetm.parse_psk(PSK_384)
    with pytest.raises(ValueError, match="it is not of the form"):
        storagetm.parse_psk(GOOD)


@pytest.mark.parametrize(
    ("exact", "digest", "key"),
    [
        # nvme-cli 2.13 with libnvme 1.13, and 2.16 with --compat
        (
            False,
            "1l6lRFAijy7XF6iXRO/X3l1k8tAC6HzjUPczKJy5jWI=",
            "d3999d01f6aeeb3f15ed2680452f7d303b58e3a5d0f7893c27b0cec0de6d7898",
        ),
        # nvme-cli 2.16 with libnvme 1.16
        (
            True,
            "xdwt2T2acJBe9feEbYxFTJHrKfDeceDRyepLwAa+zmA=",
            "8d2908cf27338c5093ec29a335bff00d7fdd61555435f012f6f34f1c4c99d652",
        ),
    ],
)
def test_keys_of_old_and_new_clients(exact: bool, digest: str, key: str) -> None:
    """The identities are those that "nvme check-tls-key --identity=1" prints for the PSK of the code."""
    subsystem = "nqn.2014-08.org.nvmexpress:uuid:subsys"
    found = storagetm.tls_key(Code.parse("k7fm-2qxd-9wtr-4hcn").host(), subsystem, exact=exact)
    assert found == (f"NVMe1R01 {HOST} {subsystem} {digest}", Secret(bytes.fromhex(key)))


def test_lengths_are_in_the_label() -> None:
    prk = storagetm.hmac_sha256(bytes(32), COUNTED[:32])
    info = b"\0\x20\x09tls13 abc\x03xyz\x01"
    assert storagetm.expand_label(COUNTED[:32], "abc", b"xyz", exact=True) == storagetm.hmac_sha256(
        prk, info
    )


# Files


def hosts(*lines: str) -> list[AllowedHost]:
    return storagetm.parse_hosts("\n".join(lines).encode(), "'hosts'")


def test_hosts_are_read_from_lines() -> None:
    found = hosts(
        "# the workshop's machines",
        "",
        f"nqn.a {DHCHAP[32]}",
        f"  nqn.b\t{DHCHAP[48]}   {DHCHAP[64]}  \r",
        "nqn.c",
        f"nqn.d {DHCHAP[32]} {PSK}",
        f"nqn.e {PSK}",
    )
    assert [h.nqn for h in found] == ["nqn.a", "nqn.b", "nqn.c", "nqn.d", "nqn.e"]
    a, b, c, d, e = found
    assert (a.secret, a.controller_secret, a.psk) == (Secret(DHCHAP[32].encode()), None, None)
    assert (b.secret, b.controller_secret) == (Secret(DHCHAP[48].encode()), Secret(DHCHAP[64].encode()))
    assert (c.secret, c.controller_secret, c.psk) == (None, None, None)
    assert (d.secret, d.psk) == (Secret(DHCHAP[32].encode()), Secret(COUNTED[:32]))
    assert (e.secret, e.psk) == (None, Secret(COUNTED[:32]))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("host " + GOOD, "the first word is no host NQN: it does not begin with 'nqn.'"),
        (GOOD + " nqn.x", "the first word is no host NQN: it does not begin with 'nqn.'"),
        ("nqn.a/b " + GOOD, "the first word is no host NQN: it has a '/'"),
        ("nqn.a,b " + GOOD, "the first word is no host NQN: it has a '/'"),
        ("nqn." + "x" * 220, "the first word is no host NQN: it has 224 bytes, 223 are allowed"),
        (storagetm.DISCOVERY_NQN, "the first word is no host NQN: it is that of discovery"),
        ("nqn.x " + GOOD[:-1], "word 2 is no secret: it is not of the form DHHC-1:00:...:"),
        (f"nqn.x {GOOD} {GOOD} {GOOD}", "word 4 is no secret: there is nothing it could be for"),
        (f"nqn.x {PSK} {PSK}", "word 3 is no secret: it is not of the form DHHC-1:00:...:"),
        (f"nqn.x {PSK_384}", "word 2 is no secret: it is not for SHA-256; make one with"),
        ("nqn.y " + GOOD, "the host is there twice; leave one of its lines out"),
    ],
)
def test_malformed_line_is_refused(line: str, why: str) -> None:
    with pytest.raises(UserError, match=f"^'hosts', line 2: {re.escape(why)}") as caught:
        hosts("nqn.y", line)
    # Neither the message nor what Python would print has the secret.
    assert "AwQF" not in "".join(traceback.format_exception(caught.value))
    assert not caught.value.__context__ or caught.value.__suppress_context__


@given(st.binary())
@example(b"nqn.x\0")
@example(b"nqn.\xff " + GOOD.encode())
def test_hosts_may_be_any_bytes(raw: bytes) -> None:
    try:
        found = storagetm.parse_hosts(raw, "x")
    except UserError:
        return
    assert all("/" not in host.nqn and host.nqn.isprintable() for host in found)


def test_secret_shows_in_nothing() -> None:
    host = Code.parse("k7fm-2qxd-9wtr-4hcn").host()
    code = Code.parse("k7fm-2qxd-9wtr-4hcn")
    for thing in (host.secret, host.psk, code.letters, [host.secret], {"a": host.psk}):
        for text in (str(thing), repr(thing), f"{thing}", f"{thing!r}", ascii(thing)):
            assert "DHHC" not in text
            assert "k7fm" not in text
    with pytest.raises(TypeError):
        bytes(host.secret)  # type: ignore[call-overload]
    assert "k7fm" not in f"{code}{code!r}"


def test_memory_with_secrets_is_in_no_core_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secrets").write_text("k7fm-2qxd-9wtr-4hcn")
    (tmp_path / "secrets").chmod(0o600)
    asked: list[bool] = []
    monkeypatch.setattr(storagetm, "keep_memory_private", lambda: asked.append(True))
    options = storagetm.Options()
    storagetm.chosen_admission(options, "")
    assert asked == []
    options.code_file = str(tmp_path / "secrets")
    storagetm.chosen_admission(options, "")
    assert asked == [True]
    monkeypatch.undo()
    if (child := os.fork()) == 0:
        # Another test may have had it so in this process.
        ctypes.CDLL(None).prctl(storagetm.PR_SET_DUMPABLE, 1, 0, 0, 0)
        before = ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
        storagetm.keep_memory_private()
        os._exit(0 if before and ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secrets file"
    path.write_text("x")
    for mode in (0o600, 0o400, 0o700):
        path.chmod(mode)
        assert storagetm.read_secrets(str(path), "file") == b"x"
    for mode in (0o644, 0o640, 0o604, 0o620, 0o602, 0o666):
        path.chmod(mode)
        with pytest.raises(
            UserError, match=rf"\(mode {mode:04o}\); take that away with 'chmod go= '.*file''$"
        ):
            storagetm.read_secrets(str(path), "file")


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Failed to read the file '.*/none': No such file or directory$"):
        storagetm.read_secrets(str(tmp_path / "none"), "file")
    with pytest.raises(UserError, match=r"is no regular file$"):
        storagetm.read_secrets(str(tmp_path), "file")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UserError, match=r"is no regular file$"):
        storagetm.read_secrets(str(tmp_path / "fifo"), "file")


# The kernel's keyring

KEYS = b"""\
010c2b4c I------     1 perm 1f030000     0     0 asymmetri Debian Secure Boot CA: X509.rsa 4a2b []
0d5e2ac1 I--Q---     4 perm 3f030000  1000 65534 keyring   .nvme: empty
1a2b3c4d I------     1 perm 3f0f0000     0     0 keyring   .nvme: empty
24a1b2c3 I--Q---     1 perm 3f010000     0     0 psk       NVMe1R01 a b c: 32
"""


def test_keyring_is_found_among_the_keys() -> None:
    assert storagetm.parse_keys(KEYS, "psk", "NVMe1R01 a b c") == 0x24A1B2C3
    assert storagetm.parse_keys(KEYS, "keyring", ".nvme") == 0x1A2B3C4D  # the kernel's own, not a user's
    assert storagetm.parse_keys(KEYS, "keyring", ".nfs") == 0


@given(st.binary())
@example(b"x I 1 perm 1 0 0 keyring .nvme: empty")
def test_keys_may_be_any_bytes(raw: bytes) -> None:
    assert storagetm.parse_keys(raw, "keyring", ".nvme") >= 0


@pytest.mark.parametrize(
    ("machine", "narrow", "calls"),
    [
        ("x86_64", False, (248, 250)),
        ("x86_64", True, (286, 288)),
        ("i586", True, (286, 288)),
        ("aarch64", False, (217, 219)),
        # Raspberry Pi OS has programs of 32 bits on a kernel of 64.
        ("aarch64", True, (309, 311)),
        ("armv6l", True, (309, 311)),
        ("s390x", False, (278, 280)),
        ("vax", True, None),
    ],
)
def test_system_calls_are_those_of_the_program(
    machine: str, narrow: bool, calls: tuple[int, int] | None
) -> None:
    assert storagetm.key_calls(machine, narrow=narrow) == calls
