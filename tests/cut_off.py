"""Runs a command where there is no network but loopback, and says what it tried nevertheless.

python -m tests.cut_off COMMAND..., inside `unshare --map-root-user --net`. Prints {"status", "no_route"} last: packets
that the kernel found no route for, whoever sent them, and in which language.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1

AUDIT = """
import os, sys
def _look(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else None
        host = host.decode() if isinstance(host, bytes) else host
        if host not in (None, "", "localhost", "::1") and not host.startswith("127."):
            with open(os.environ["OTTAVA_AUDIT"], "a") as said:
                said.write(f"{event} {host}\\n")
            raise PermissionError(f"{event} {host}")
sys.addaudithook(_look)
"""
"""A sitecustomize module: each Python process that finds it may speak to loopback alone; attempts are written down."""


def main() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _GET_FLAGS, asked))[1]
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
    before = no_route()
    status = subprocess.run(sys.argv[1:]).returncode
    print(json.dumps({"status": status, "no_route": no_route() - before}))
    return 0


def no_route() -> int:
    """Packets of this namespace, of both versions of IP, that went nowhere."""
    names, values = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:3] == "Ip:"]
    found = int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    for line in Path("/proc/net/snmp6").read_text().splitlines():
        found += int(line.split()[1]) if line.startswith("Ip6OutNoRoutes") else 0
    return found


if __name__ == "__main__":
    sys.exit(main())
