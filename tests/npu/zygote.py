"""A warm process whose workers fail on order: what `LocalLauncher` asks for workers in the drills (test_drills.py).

Run as `python -m tests.npu.zygote FD PATH`. torch_npu is loaded and no device is open, so a fork costs milliseconds: on
host memory a driver's state cannot be broken by it, which is why Ottava itself forks no worker of an accelerator.

What to do stands in a worker's environment, ORDER: `code=507015 place=boundary step=2 rank=1`. At that step and place
the rank gets a rule for the stand-in, and the next call that the rule names returns the code.
"""

from __future__ import annotations

import os

import torch_npu  # noqa: F401  (loaded before the forks)

from ottava.supervisor import zygote
from ottava.trainer import worker

ORDER = "TESTS_NPU_ORDER"
RULES = "HOST_CANN_FAULTS"
NONE = ""
"""Rules have to be there from the first call on, if only none."""

PLACES = {
    "boundary": ("kept", "call=aclrtSynchronizeStreamWithTimeout code={code}"),
    "collective": (
        "reduce",
        "call=HcclBatchSendRecv code={code} later=1",
    ),  # the exchange itself, in its stream's order
    "launch": ("reduce", "call=HcclBatchSendRecv code={code}"),  # at the call, as HCCL's own codes come
}
"""Where a code comes: the worker's phase in which the rule is given, and the rule."""


def main() -> None:
    enter = worker.Worker._enter

    def obedient(self: worker.Worker, phase: str) -> None:
        order = dict(word.split("=") for word in os.environ.get(ORDER, "").split())
        step = self.trainer.state.step + (phase == "reduce")  # of a step that is done, or that is under way
        if order and (int(order["step"]), int(order["rank"])) == (step, self.group.rank):
            where, rule = PLACES[order["place"]]
            if where == phase:
                os.environ[RULES] = rule.format(code=order["code"])
        enter(self, phase)

    worker.Worker._enter = obedient  # type: ignore[method-assign]
    zygote.main()


if __name__ == "__main__":
    main()
