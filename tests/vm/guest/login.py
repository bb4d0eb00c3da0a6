# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log in on a terminal as a person would: login.py USER PASSWORD COMMAND. Prints what the terminal showed.

Nobody waits for seconds: each line is typed once what asks for it was shown.
"""

from __future__ import annotations

import os
import pty
import select
import sys
import time

TIMEOUT = 240  # seconds, in all


def main() -> int:
    user, password, command = sys.argv[1:]
    deadline = time.monotonic() + TIMEOUT
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv("/usr/bin/login", ["login", user])
    shown = b""

    def wait_for(text: bytes | None, since: int = 0) -> bool:
        """Until that is shown, or with None until the terminal is closed."""
        nonlocal shown
        while text is None or text not in shown[since:]:
            if not select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            try:
                shown += os.read(terminal, 4096)
            except OSError:
                # login(1) hangs its terminal up and opens it anew. Without it, that is the end.
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return text is None
                time.sleep(0.05)
                if time.monotonic() > deadline:
                    return False
        return True

    done = wait_for(b"assword: ")
    before = len(shown)
    os.write(terminal, password.encode() + b"\n")
    if done and wait_for(b"$ ", before):
        os.write(terminal, command.encode() + b"; exit\n")
        done = wait_for(None)
    else:
        done = False
    sys.stdout.write(shown.decode(errors="replace"))
    if not done:
        os.kill(pid, 9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if done else 1


sys.exit(main())
