"""What a process sets before its first JAX operation, for XLA to use a CPU well.

XLA runs the small operations of a small model on one core each. With one device a core, and rows
split over the devices as over any mesh, all cores work. And XLA asks for the memory of each
program's intermediate results anew at every call: the C library would give it back to the system in
between, to be cleared and mapped again page by page.
"""

from __future__ import annotations

import ctypes
import os
import sys

import jax

# glibc's malloc.h: one arena, from the heap alone, which is never trimmed.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def prepare_cpu(num_devices: int) -> None:
    """Makes `num_devices` devices of the CPU, and keeps freed memory. With 1, does nothing.

    1 is what the hosts of accelerators have: one arena of memory is nothing that the many threads
    of a data pipeline should have to share. XLA_FLAGS that say how many devices to make go first.
    Raises RuntimeError once JAX has devices.
    """
    if num_devices == 1:
        return
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_devices)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_ARENA_MAX, 1)
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, _NEVER)
