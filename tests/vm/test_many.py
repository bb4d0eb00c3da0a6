"""Many disks, and the peer beside them. Times are printed, not judged: see `make bench`."""

from __future__ import annotations

import pytest

from tests import bench
from tests.vm.conftest import BootMachine


@pytest.mark.parametrize("state", ["rest", "probing"])
def test_256_disks(boot: BootMachine, state: str) -> None:
    """All are exported once the program says so, and gone once it ends; so they are with the peer."""
    machine = boot("many", memory=2048, steady=True)
    bench.install(machine)
    names = ("peer", "installed")
    results = bench.measure(machine, 1, 256, state, names)
    print("\n".join(bench.table(results, names)))
    for result in results:
        assert result["exported"] == 256, result
        assert result["ports"] == 2, result
        assert result["code"] == 0, result
        assert result["left"] == 0, result
        if result["name"] != "peer":
            assert result["wakeups"] == 0, result
    errors = machine.run("grep -iE 'failed|traceback' /run/measure.log", check=False).stdout
    assert not errors
