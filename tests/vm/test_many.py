"""Many disks, and the peer beside them. Times are printed, not judged: see `make bench`."""

from __future__ import annotations

import pytest

from tests import bench
from tests.vm.conftest import BootMachine


@pytest.mark.parametrize("state", ["rest", "probing"])
def test_256_disks(boot: BootMachine, state: str) -> None:
    """All are exported once the program says so, and gone once it ends."""
    machine = boot("many", memory=2048, steady=True)
    bench.install(machine)
    names = ("peer", "installed", "read-only")
    results = bench.measure(machine, 1, 256, state, names)
    print("\n".join(bench.table(results, names)))
    # The peer says that it is ready before udev has been at all disks, and with only some of them exported.
    for ours in (r for r in results if r["name"] != "peer"):
        assert (ours["exported"], ours["ports"], ours["code"], ours["left"]) == (256, 2, 0, 0), ours
        if state == "rest":
            assert ours["wakeups"] == 0, ours
    errors = machine.run("grep -iE 'failed|traceback' /run/measure.log", check=False).stdout
    assert not errors
