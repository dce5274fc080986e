"""Which device the work runs on."""

import torch

from evopress.util.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"compute.device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"compute.device: {name!r} is not there ({torch.cuda.device_count()} CUDA devices); use auto or cpu"
        )
    return device


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Type of the arithmetic on weights that are kept as ``stored``.

    It is the same, but for 16-bit types on a CPU that has no instructions for them, and bfloat16 on a GPU from before
    compute capability 8.0: torch emulates their products there, far slower than those of float32, which holds every
    number of theirs.
    """
    if stored in _16_BITS and not _multiplies(stored, device):
        return torch.float32
    return stored


def precise_dtype(working: torch.dtype) -> torch.dtype:
    """Type of the arithmetic where the rounding of ``working`` would hide what is measured: float32 for 16 bits."""
    return torch.float32 if working in _16_BITS else working


_16_BITS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has fast matrix products of a 16-bit type; of one that is not in this machine, as a new one."""
    if device.type == "cuda":
        new = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
        return new or dtype != torch.bfloat16
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _16_BITS[dtype])())


def device_of_rank(name: str, rank: int, processes: int) -> torch.device:
    """Device of one of several processes on a host: a CUDA device of its own, or the CPU that all share.

    Raises:
        ConfigError: no such device, or fewer than processes.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(f"compute.device: {name} is one device, for {processes} processes (compute.processes)")
    there = torch.cuda.device_count()
    if processes > there:
        raise ConfigError(f"compute.processes: {processes} need a CUDA device each, and there are {there}")
    return torch.device("cuda", rank)
