"""A worker that waits with its device open, so that a restart on an accelerator does not wait for it.

A process that has opened an accelerator must not be forked, and a fresh one spends seconds on imports, on the device's
context and on loading kernels. So the zygote keeps some of these: started fresh, warm, and without work. One becomes a
worker when it reads a request; it ends when the zygote does.

Run as `python -m ottava.supervisor.standby FD PLATFORM`; the request is one JSON line over the socket FD.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from contextlib import suppress

from ottava import platforms
from ottava.supervisor.zygote import WARM, become, lead

WORKER = "ottava.trainer.worker"


def main() -> None:
    """Open the device, wait for a request, and be that worker."""
    lead()
    control = socket.socket(fileno=int(sys.argv[1]))
    with suppress(Exception):  # what is wrong here will be wrong for the worker too, whose log somebody reads
        for module in (*WARM, WORKER):
            importlib.import_module(module)
        platforms.get(sys.argv[2]).warm()
    with control.makefile("rb") as lines:
        request = lines.readline()
    control.close()
    if request.endswith(b"\n"):
        become(json.loads(request))


if __name__ == "__main__":
    main()
    os._exit(0)
