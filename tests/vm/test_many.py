"""Many disks, and the peer beside them. Times are printed, not judged: see `make bench`."""

from __future__ import annotations

import pytest

from tests.harness.machine import Nic, Wire
from tests.programs import bench
from tests.vm import nvmet
from tests.vm.conftest import BootMachine


@pytest.mark.parametrize("state", ["rest", "probing"])
def test_256_disks_are_exported_when_it_says_so(boot: BootMachine, state: str) -> None:
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


def test_much_at_once_loses_nothing(boot: BootMachine) -> None:
    """Many disks on a screen, hot-plugs and changes of addresses as fast as can be: nothing is lost.

    With more of everything it is part of `make bench`.
    """
    machine = boot("stress", memory=2048, steady=True, nics=[Nic(Wire(), 0)])
    bench.install(machine)
    result = bench.much_at_once(machine, disks=128, seconds=1, addresses=60)
    print(result)
    assert result["plugs"] == 200
    assert result["same"], result
    assert result["unreadable"] == 0
    assert result["exported"] == 128
    assert result["addresses"] == [result["address"]]
    # Seen from the other end of the terminal.
    assert result["shortest"] > 0.74, result
    assert 1 < result["drawn"] <= result["during"] / 0.75 + 1, result
    assert result["code"] == 0
    assert nvmet.left_over(machine) == []
