"""Memory of a training process: what is kept free does not grow without end."""

import subprocess
import sys
from ctypes.util import find_library

import pytest

from hadal.train.memory import kept

_GROW = """
import ctypes, resource, sys
from hadal.train import memory
memory._TRIM_EVERY_S = 0.0

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

trimmer = memory.Trimmer()
before = resident()
held = [ctypes.create_string_buffer(4 << 20) for _ in range(64)]
for buffer in held:
    ctypes.memset(buffer, 1, len(buffer))
full = resident()
del held, buffer
free = resident()
trimmer.trim()
print(full - before, free - before, resident() - before)
"""


@pytest.mark.skipif(find_library("jemalloc") is None, reason="jemalloc is not installed")
def test_free_memory_is_kept_until_it_is_trimmed():
    with kept():
        done = subprocess.run(
            [sys.executable, "-c", _GROW], capture_output=True, text=True, check=True
        )
    full, free, trimmed = (int(n) >> 20 for n in done.stdout.split())
    assert full > 240
    assert free > 240
    assert trimmed < 64


def test_nothing_is_trimmed_with_another_allocator():
    code = _GROW + "assert trimmer._control is None\n"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
