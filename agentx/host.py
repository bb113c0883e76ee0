"""What a process sets before its first JAX operation, for XLA to use a CPU well.

XLA runs the small operations of a small model on one core each. With one device a core, and rows
split over the devices as over any mesh, all cores work.
"""

from __future__ import annotations

import os

import jax


def prepare_cpu(num_devices: int) -> None:
    """Makes `num_devices` devices of the CPU; with 1, does nothing.

    XLA_FLAGS that say how many devices to make go first. Raises RuntimeError once JAX has devices.
    """
    if num_devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_devices)
