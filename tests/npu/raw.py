"""The stand-in's C interface by ctypes: streams, events and collectives without torch, in milliseconds a test."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3
Array = NDArray[Any]


class Failed(Exception):
    """A call of the C interface that returned a code: (name, code)."""


class Library:
    """Calls that raise Failed unless they return 0."""

    def __init__(self, name: str):
        self.its = ctypes.CDLL(str(Path(os.environ["HOST_CANN_LIBRARIES"]) / name), mode=ctypes.RTLD_GLOBAL)

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self.its, name)

        def call(*args: Any) -> None:
            code = function(*args)
            if code:
                raise Failed(name, code)

        return call


acl = Library("libascendcl.so")
hccl = Library("libhccl.so")


def last_message() -> str:
    """What aclGetRecentErrMsg has to say; it says it once."""
    acl.its.aclGetRecentErrMsg.restype = c_char_p
    return str(acl.its.aclGetRecentErrMsg().decode())


def stream() -> c_void_p:
    made = c_void_p()
    acl.aclrtCreateStream(byref(made))
    return made


def event() -> c_void_p:
    made = c_void_p()
    acl.aclrtCreateEventWithFlag(byref(made), c_uint32(0))
    return made


def allocate(size: int) -> c_void_p:
    made = c_void_p()
    acl.aclrtMalloc(byref(made), c_size_t(size), 0)
    return made


def put(values: Array) -> c_void_p:
    """An array's bytes on the device."""
    room = allocate(max(1, values.nbytes))
    acl.aclrtMemcpy(room, c_size_t(values.nbytes), values.ctypes.data_as(c_void_p), c_size_t(values.nbytes), TO_DEVICE)
    return room


def fetch(place: c_void_p, like: Array) -> Array:
    """The device's bytes as an array of another's shape and type. Waits for nothing."""
    found = np.empty_like(like)
    acl.aclrtMemcpy(found.ctypes.data_as(c_void_p), c_size_t(found.nbytes), place, c_size_t(found.nbytes), TO_HOST)
    return found


def copy_later(to: c_void_p, source: c_void_p, size: int, where: c_void_p) -> None:
    acl.aclrtMemcpyAsync(to, c_size_t(size), source, c_size_t(size), ON_DEVICE, where)


def communicator(name: bytes, ranks: int, rank: int) -> c_void_p:
    made = c_void_p()
    info = ctypes.create_string_buffer(name, 4108)
    hccl.HcclCommInitRootInfo(c_uint32(ranks), info, c_uint32(rank), byref(made))
    return made


def root_info() -> bytes:
    info = ctypes.create_string_buffer(4108)
    hccl.HcclGetRootInfo(info)
    return info.value


def counts(*numbers: int) -> Any:
    return (c_uint64 * len(numbers))(*numbers)


def device(index: int) -> None:
    acl.aclrtSetDevice(c_int(index))
