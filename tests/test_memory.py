"""Memory of large tensors goes back when they are freed."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from mopeq.memory import give_back_freed
asked = {asked}
if asked:
    assert give_back_freed()
def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
torch.ones(1 << 20)
torch.empty(31 << 20, dtype=torch.uint8).fill_(1)  # as large as glibc lets the size grow
before = resident()
kept = []
for _ in range(20):
    large = torch.empty(8 << 20, dtype=torch.uint8).fill_(1)
    kept.append(torch.empty(64 << 10, dtype=torch.uint8).fill_(1))
    more = torch.empty(9 << 20, dtype=torch.uint8).fill_(1)
    del large
    kept.append(torch.empty(8 << 10, dtype=torch.uint8).fill_(1))
    del more
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_tensors_leave_no_holes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(asked=True)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 << 20
