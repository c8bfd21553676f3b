"""What every chip family must offer, so that nothing above this package knows a vendor's name.

An implementation imports torch inside its methods: the process that walks a recipe asks a platform
for its name, its environment or the class of a fault without paying for the import.
"""

from __future__ import annotations

import os
import platform as python_platform
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from ottava.errors import FormatError, PlatformError

if TYPE_CHECKING:
    import torch


class FaultClass(StrEnum):
    """What a failure calls for.

    transient: try again. out_of_memory: try a smaller shape. collective: a peer or a link is gone, restart the
    group. device_stuck: the device works again once it is opened anew. device_lost: leave this device. unusable: no
    device of this kind and installation will do it, leave the pool. numeric: the numbers are bad, go back. bug: stop
    and say so.
    """

    TRANSIENT = "transient"
    OUT_OF_MEMORY = "out_of_memory"
    COLLECTIVE = "collective"
    DEVICE_STUCK = "device_stuck"
    DEVICE_LOST = "device_lost"
    UNUSABLE = "unusable"
    NUMERIC = "numeric"
    BUG = "bug"


class Action(StrEnum):
    """What is done about it. Every restart of a group is one of its processes, which opens its devices anew, so that
    `retry` and `restart device` differ in what they ask of another supervisor, not in what this one does."""

    RETRY = "retry"
    RESTART_DEVICE = "restart device"
    EXCLUDE = "exclude"
    FALL_BACK = "fall back"
    STOP = "stop"


ACTIONS = {
    FaultClass.TRANSIENT: Action.RETRY,
    FaultClass.OUT_OF_MEMORY: Action.RETRY,
    FaultClass.COLLECTIVE: Action.RETRY,
    FaultClass.NUMERIC: Action.RETRY,
    FaultClass.DEVICE_STUCK: Action.RESTART_DEVICE,
    FaultClass.DEVICE_LOST: Action.EXCLUDE,
    FaultClass.UNUSABLE: Action.FALL_BACK,
    FaultClass.BUG: Action.STOP,
}
"""What `supervisor.decide` does about each class; whatever comes back too often ends on the next pool."""


Signs = Sequence[tuple[str, FaultClass]]

_BY_TYPE = {
    "OutOfMemoryError": FaultClass.OUT_OF_MEMORY,
    "MemoryError": FaultClass.OUT_OF_MEMORY,
    "DistBackendError": FaultClass.COLLECTIVE,
    "DistNetworkError": FaultClass.COLLECTIVE,
    "DistStoreError": FaultClass.COLLECTIVE,
    "ConnectionError": FaultClass.COLLECTIVE,
    "ArithmeticError": FaultClass.NUMERIC,
    FormatError.__name__: FaultClass.NUMERIC,
    "FileNotFoundError": FaultClass.BUG,
    "PermissionError": FaultClass.BUG,
    "OSError": FaultClass.TRANSIENT,
}

_COMMON: Signs = (
    (r"can't allocate memory|out of memory|bad_alloc", FaultClass.OUT_OF_MEMORY),
    (r"gloo|connection (closed|reset|refused)|timed out waiting|wait timeout|socket timeout", FaultClass.COLLECTIVE),
    (r"returned nan values|loss is (nan|inf)", FaultClass.NUMERIC),
)


class Platform(ABC):
    """One chip family. Holds no random state: randomness is a function of (seed, step, shard) and drawn on the host.

    signs: regular expressions, searched in an error's text in this order, before those common to all families.
    visible: the variable that limits which devices a process sees, or None. shared_memory: True where all workers of
    a machine draw on one memory. forks: True where a worker may be a fork of a process with its libraries loaded, and
    nothing slow is left to open; else workers are started fresh, and some are kept waiting with their device open.
    """

    name: ClassVar[str]
    visible: ClassVar[str | None] = None
    signs: ClassVar[Signs] = ()
    shared_memory: ClassVar[bool] = False
    forks: ClassVar[bool] = False

    @abstractmethod
    def available(self) -> tuple[bool, str]:
        """(True, what is here) or (False, why it cannot be used here)."""

    @abstractmethod
    def count(self) -> int:
        """The number of workers this machine can carry: devices, or cores for a CPU; 0 where none is available."""

    @abstractmethod
    def backend(self) -> str:
        """The process group's backend: gloo, nccl or hccl."""

    @abstractmethod
    def memory(self, index: int = 0) -> tuple[int, int]:
        """(used, total) bytes of a device. Raises PlatformError where it is missing."""

    @abstractmethod
    def peak_memory(self) -> int:
        """The most bytes that this process's tensors have had on its device so far; of a CPU, the whole process."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return once everything started on this process's device is done."""

    @abstractmethod
    def pin_numerics(self) -> None:
        """Fix every setting that changes bits: threads, reduced-precision matrix units, kernel choice, determinism.

        Call it before the first tensor operation of a process; calling it again changes nothing.
        """

    @abstractmethod
    def _device(self, index: int) -> torch.device:
        """The device object of an index known to be in range."""

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """chip, instruction_set and libraries of an available platform."""

    def device(self, index: int = 0) -> torch.device:
        """The torch device of a worker. Raises PlatformError where it is missing."""
        self.require()
        if not 0 <= index < self.count():
            raise PlatformError(f"there is no {self.name} device {index}: this machine has {self.count()}")
        return self._device(index)

    def own(self) -> torch.device:
        """This worker's device. Raises PlatformError where it is missing."""
        self.require()
        return self.device(worker_index() % self.count())

    def open(self) -> torch.device:
        """This worker's device, with the numerics pinned. Raises PlatformError where it is missing."""
        self.require()
        self.pin_numerics()
        return self.own()

    def warm(self) -> None:
        """Open this worker's device and load its libraries, so that the first step need not wait for them."""
        import torch

        square = torch.ones(16, 16, device=self.open(), requires_grad=True)
        (square @ square).sum().backward()  # type: ignore[no-untyped-call]
        self.synchronize()

    def process_group(self) -> str:
        """The backends of a worker's process group: tensors of the host, and those of its device."""
        return self.backend() if self.shared_memory else f"cpu:gloo,{self.name}:{self.backend()}"

    def require(self) -> None:
        """Raises PlatformError, with the reason, where the platform cannot be used on this machine."""
        here, reason = self.available()
        if not here:
            raise PlatformError(
                f"the platform {self.name!r} cannot be used here: {reason}",
                fix="run on a machine that has it, or give the pool another platform in the fleet file",
            )

    def describe(self) -> dict[str, Any]:
        """Chip, instruction set and library versions, as JSON."""
        here, reason = self.available()
        about = {"platform": self.name, "available": here, "reason": reason, "backend": self.backend()}
        return {**about, "python": python_platform.python_version(), **(self._describe() if here else {})}

    def visible_env(self, indices: Sequence[int]) -> dict[str, str]:
        """The environment in which a process sees only these devices."""
        return {self.visible: ",".join(map(str, indices))} if self.visible else {}

    def words(self, error: BaseException) -> str:
        """What an error says, without what is different each time: by its words it is known again."""
        return str(error)

    def classify_error(self, error: BaseException) -> FaultClass:
        """What a failure calls for, from its type and text. Unknown failures are bugs: they must not be retried."""
        for cause in _causes(error):
            text = str(cause)
            for pattern, fault in (*self.signs, *_COMMON):
                if re.search(pattern, text, re.IGNORECASE):
                    return fault
            for kind in type(cause).__mro__:
                if kind.__name__ in _BY_TYPE:
                    return _BY_TYPE[kind.__name__]
        return FaultClass.BUG


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def pin_torch() -> None:
    """The settings that change bits on every platform: one host thread, full float32 products, fixed kernels."""
    import torch

    torch.set_num_threads(1)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError:
            raise PlatformError(
                "the numerics were pinned after parallel work had started",
                fix="call pin_numerics() before the first tensor operation of the process",
            ) from None
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(False)


def libraries() -> dict[str, str]:
    """Versions of the libraries whose kernels decide the bits."""
    import torch

    lines = (line.strip(" -") for line in torch.__config__.show().splitlines())
    return {"torch": torch.__version__, "built_with": "; ".join(line for line in lines if line.startswith("Intel"))}


def worker_index() -> int:
    """The device index of this process: LOCAL_RANK, else RANK, else 0 (torchrun's variables)."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
