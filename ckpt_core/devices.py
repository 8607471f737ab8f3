"""Devices by name."""

from __future__ import annotations

from ckpt_core.cpu import CpuDevice
from ckpt_core.cuda import driver
from ckpt_core.cuda.device import CudaDevice
from ckpt_core.device import CPU, Device
from ckpt_core.errors import ConfigError


def device_of(name: str) -> Device:
    """The device of that name: "cpu", or the UUID of a GPU.

    Raises:
        ConfigError: there is no such kind.
    """
    if name == CPU:
        return CpuDevice()
    if name.startswith("GPU-"):
        return CudaDevice(name)
    raise ConfigError(f"no device {name!r}; known: cpu, GPU-<uuid>")


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees."""
    return [driver.device_uuid(ordinal) for ordinal in range(driver.device_count())]
