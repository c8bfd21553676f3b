"""What is the same for everything that Ray places, workers and backends: joining a cluster, and what a node must share.

Nothing of Ray is imported before a cluster is asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import signal
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ottava import __version__
from ottava.errors import PlatformError

CONNECT_S = 30.0  # to reach the cluster
DOCS = "see docs/ray.md"
SIOCGIFADDR = 0x8915


def join(address: str | None) -> tuple[Any, bool]:
    """(ray, whether it was this call that connected): a driver that prints nothing, as stdout belongs to the command.

    Where this process has called `ray.init` before, that cluster is used. Raises PlatformError.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise PlatformError("ray is not installed", fix="pip install -e '.[ray]'") from None
    if ray.is_initialized():
        return ray, False
    ray._private.worker._worker_logs_enabled = False  # what its daemons report would be printed on stdout
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    terminate = signal.getsignal(signal.SIGTERM)
    _connect(ray, address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's native part has put its own in its place
    return ray, True


def _connect(ray: Any, address: str | None) -> None:
    """In a thread, since an address that does not answer holds `ray.init` for many minutes."""
    ended: list[BaseException | None] = []

    def init() -> None:
        try:
            ray.init(address=address or "auto", log_to_driver=False, configure_logging=False)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=init, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    if not ended:
        raise PlatformError(f"the Ray cluster did not answer in {CONNECT_S:g} s", where=where, fix=DOCS)
    if ended[0] is not None:
        told = str(ended[0]).strip().splitlines() or [type(ended[0]).__name__]
        raise PlatformError(
            f"no Ray cluster: {told[0]}", where=where, fix=f"start one, or give the token that it asks for: {DOCS}"
        ) from ended[0]


def move_to(folder: str, path: list[str]) -> None:
    """Work where the supervisor works and find the modules that it finds, as far as this node has these folders."""
    with suppress(OSError):
        os.chdir(folder)
    found = [entry for entry in path if Path(entry).is_dir()]
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*found, *filter(None, here)]))


def code() -> str:
    """This installation of ottava: its version, and the start of a SHA-256 over its Python files."""
    package = Path(__file__).parent
    sha = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sha.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{__version__} ({sha.hexdigest()[:12]})"


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, or None (Linux). All of 127.0.0.0/8 is the loopback's."""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                told = fcntl.ioctl(asker, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(told[20:24]) == address:
                    return name
    return None
