"""GPU memory that processes of one machine share: one allocates it, others map it from a file descriptor.

By CUDA's virtual memory management, with which memory exists until the last process that maps it has let go, however
the others end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor


class GpuMemoryError(RuntimeError):
    """What CUDA refused, and why."""


class GpuMemory:
    """Memory of one GPU, mapped here until `close` is called or this and the last tensor in it are gone."""

    def __init__(self, handle: Any, size: int, device: torch.device) -> None:  # noqa: ANN401
        """Map all `size` bytes of the allocation `handle`. Raises `GpuMemoryError`."""
        self.size = size
        self._device = device
        self.address = int(_call("cuMemAddressReserve", size, 0, 0, 0))
        try:
            _call("cuMemMap", self.address, size, 0, handle, 0)
            try:
                _call("cuMemSetAccess", self.address, size, [_access(device)], 1)
            except GpuMemoryError:
                _call("cuMemUnmap", self.address, size)
                raise
        except GpuMemoryError:
            _call("cuMemAddressFree", self.address, size)
            raise
        self.close = weakref.finalize(self, _unmap, self.address, size, device)
        """Wait for the GPU and unmap the memory; its tensors must not be used any more."""
        self.close.atexit = False

    @classmethod
    def create(cls, size: int, device: torch.device) -> tuple[Self, int]:
        """Allocate at least `size` bytes; the file descriptor, for others to map them by, is the caller's to close."""
        driver, properties = _driver(), _properties(device)
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = _call("cuMemGetAllocationGranularity", properties, minimum)
        size = -(-size // granularity) * granularity
        handle = _call("cuMemCreate", size, properties, 0)
        try:
            memory = cls(handle, size, device)
            return memory, int(_call("cuMemExportToShareableHandle", handle, properties.requestedHandleTypes, 0))
        finally:
            _call("cuMemRelease", handle)

    @classmethod
    def open(cls, descriptor: int, size: int, device: torch.device) -> Self:
        """Map another process's memory, which must be all of an allocation of `size` bytes on `device` or one whose
        memory it reaches."""
        handle = _call("cuMemImportFromShareableHandle", descriptor, _properties(device).requestedHandleTypes)
        try:
            location = _call("cuMemGetAllocationPropertiesFromHandle", handle).location
            if location.type != _properties(device).location.type or not reaches(device, int(location.id)):
                raise GpuMemoryError(
                    f"the memory is on {location.type.name} {location.id}, to which {device} has no peer access"
                )
            # The driver refuses to map more than there is.
            return cls(handle, size, device)
        finally:
            _call("cuMemRelease", handle)

    def tensor(self, offset: int, length: int, released: Callable[[], object] | None = None) -> Tensor:
        """[length] uint8 from byte `offset` on; `released` is called, on any thread, when its last view is gone."""
        part = _Part(self, self.address + offset, length)
        if released is not None:
            weakref.finalize(part, released).atexit = False
        # Named, as torch would copy it to a default device that the program has set.
        return torch.as_tensor(part, device=self._device)


class _Part:
    """What torch makes a tensor of, and keeps as long as a view of it exists."""

    def __init__(self, memory: GpuMemory, address: int, length: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {"shape": (length,), "typestr": "|u1", "data": (address, False), "version": 3}


def stream_of(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream on which this thread works with a tensor of a GPU; None for one in host memory."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def reaches(device: torch.device, other: int) -> bool:
    """Whether work on `device` can use the memory of the GPU with that number, over NVLink or PCIe."""
    return device.index == other or torch.cuda.can_device_access_peer(device, other)


def wait_for(stream: torch.cuda.Stream, address: int) -> None:
    """Have a stream, or the graph that it is captured for, wait until the u32 in pinned memory is not 0."""
    _call("cuStreamWaitValue32", stream.cuda_stream, address, 1, 0)


def gpu_uuid(device: torch.device) -> str:
    """The GPU's name among all, as `nvidia-smi -L` prints it; empty of a CPU."""
    if device.type == "cpu":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _call(function: str, *arguments: Any) -> Any:  # noqa: ANN401
    """Call a function of the CUDA driver; its result, if it has one. Raises `GpuMemoryError`."""
    error, *results = getattr(_driver(), function)(*arguments)
    if error != 0:
        raise GpuMemoryError(f"{function}: {error.name}")
    return results[0] if results else None


def _driver() -> Any:  # noqa: ANN401
    try:
        # Takes time, and is of no use without a GPU.
        from cuda.bindings import driver
    except ImportError as error:
        raise GpuMemoryError(f"{error}; GPU memory is shared with the package cuda-bindings") from None
    return driver


def _properties(device: torch.device) -> Any:  # noqa: ANN401
    driver = _driver()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device.index
    return properties


def _access(device: torch.device) -> Any:  # noqa: ANN401
    driver = _driver()
    access = driver.CUmemAccessDesc()
    access.location = _properties(device).location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _unmap(address: int, size: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _call("cuMemUnmap", address, size)
    _call("cuMemAddressFree", address, size)
