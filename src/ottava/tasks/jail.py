"""The inside of the sandbox: a script that shuts itself in and then runs a program that nobody has read.

Run by `sandbox.run` as `python -I -S jail.py STATUS RESULTS` in an empty folder with a `request.json`; standard
library only. The outer process builds the walls and forks; the inner one gives up every right, then runs the program.
STATUS and RESULTS are pipes: what the outer process says (the walls that stand, the inner process's id, how it ended),
and the values that the program's functions returned. What a right value is, is not known in here.

Walls, each said to stand only where it does:
  network    a network namespace of its own, without a way out
  files      a mount namespace in which only the interpreter and the system's libraries are there, read-only, besides
             a scratch folder in memory; no /proc
  processes  a PID namespace (no other process can be seen or signalled) in which no process or thread can be started
Without them an audit hook refuses the same acts. It is a guard rail and no wall: whoever means harm climbs over it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
SPACES = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY = 65534
DEVICES = ("null", "zero", "urandom")


def encode(value: Any) -> Any:
    """Plain data as JSON that keeps lists, tuples, sets and dictionaries apart. Raises TypeError on anything else."""
    kind = type(value)  # a subclass may lie about its value
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(x) for x in value]
    if kind is tuple:
        return {"tuple": [encode(x) for x in value]}
    if kind in (set, frozenset):
        return {"set": [encode(x) for x in value]}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    raise TypeError(f"{kind.__name__} is not plain data")


def decode(value: Any) -> Any:
    """What `encode` was given; a frozen set becomes a set. Raises ValueError on what `encode` did not write."""
    if isinstance(value, list):
        return [decode(x) for x in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("not what encode writes")
    kind, inside = next(iter(value.items()))
    if kind == "tuple":
        return tuple(decode(x) for x in inside)
    if kind == "set":
        return {decode(x) for x in inside}
    if kind == "dict":
        return {decode(k): decode(v) for k, v in inside}
    raise ValueError("not what encode writes")


def _call(name: str, *args: Any) -> None:
    """A function of libc by name; OSError with its number where it refuses."""
    if getattr(_LIBC, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def enter() -> tuple[bool, bool]:
    """Move to namespaces of our own. Returns whether they were entered with root's rights, and by a root user at all.

    Raises OSError where the system forbids both ways.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        try:
            _call("unshare", SPACES)
            return True, True
        except OSError:
            pass
    _call("unshare", SPACES | NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return False, uid == 0


def wall_files(place: str, roots: list[str], size: int) -> None:
    """Make `place` the whole file system: `roots` of the old one, read-only, three devices and a scratch /tmp."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=755")
    for root in roots:
        target = place + root
        if os.path.lexists(target) or not os.path.lexists(root):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(root):
            os.symlink(os.readlink(root), target)
            continue
        os.mkdir(target)
        _mount(root, target, None, MS_BIND | MS_REC)
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # locked ones must be named again
        _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)
    os.mkdir(f"{place}/dev")
    for device in DEVICES:
        open(f"{place}/dev/{device}", "w").close()
        _mount(f"/dev/{device}", f"{place}/dev/{device}", None, MS_BIND)
    os.mkdir(f"{place}/tmp")
    os.chmod(f"{place}/tmp", 0o777)
    os.chroot(place)
    os.chdir("/tmp")


def drop(entered: bool, privileged: bool) -> None:
    """Give up every right. After this the walls cannot be moved from within."""
    if entered and privileged:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)  # from root to another: all capabilities go
    elif entered:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        _call("capset", header, nothing)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # last: a change of user forgets it


def limit(limits: dict[str, int]) -> None:
    """Bound what a process may take: bytes of memory and of a file, seconds of CPU, no other process, no core."""
    for name, value in (
        ("AS", limits["memory"]),
        ("FSIZE", limits["file"]),
        ("CPU", limits["cpu"]),  # soft and hard alike: the first process of a PID namespace does not hear SIGXCPU
        ("CORE", 0),
        ("NPROC", 0),
        ("NOFILE", 64),
        ("STACK", 64 << 20),
    ):
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


REFUSED = (
    "ctypes.", "os.chdir", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
    "os.system", "pty.", "resource.", "signal.pthread_kill", "socket.", "subprocess.", "sys.addaudithook",
)  # fmt: skip
WRITES = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime", "shutil.",
)  # fmt: skip


def guard(scratch: str, roots: list[str]) -> None:
    """Refuse by Python's own audit events what no wall keeps out."""
    inside, readable = scratch + "/", tuple(f"{root}/" for root in roots)
    real, join = os.path.realpath, os.path.join

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "import" and args[0] in ("ctypes", "_ctypes", "_posixsubprocess"):
            raise ImportError(f"{args[0]} is not for programs in a sandbox")
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not for programs in a sandbox")
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = real(join(scratch, os.fsdecode(args[0])))
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if not path.startswith(inside) and (writes or not path.startswith(readable)):
                raise PermissionError(f"{path} is outside of the sandbox")
        elif event.startswith(WRITES):
            for named in (x for x in args[:2] if isinstance(x, (str, bytes))):
                if not real(join(scratch, os.fsdecode(named))).startswith(inside):
                    raise PermissionError(f"{event} outside of the sandbox")

    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    for name in ("ctypes", "_LIBC"):
        del globals()[name]
    sys.addaudithook(hook)


def inner(request: dict[str, Any], results: int) -> None:
    """Run the program; where functions are to be called, write a line for each value. Exceptions end it, said."""

    def say(**what: Any) -> None:
        data = json.dumps(what).encode() + b"\n"
        while data:
            data = data[os.write(results, data) :]

    try:
        if request["calls"] is None:
            with open("stdin.txt", "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(request["stdin"])
            os.dup2(os.open("stdin.txt", os.O_RDONLY), 0)
            os.close(results)
            exec(
                compile(request["source"], "program.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__}
            )
            return
        space: dict[str, Any] = {"__name__": "program", "__builtins__": __builtins__}
        code = compile(request["source"], "program.py", "exec")
        exec(code, space)
        for name, args in request["calls"]:
            if name not in space:
                raise NameError(f"there is no function {name!r}")
            say(value=encode(space[name](*decode(args))))
    except BaseException as error:  # SystemExit too: a program that leaves early has not answered
        if request["calls"] is None:
            raise
        text = f"{type(error).__name__}: {error}"
        say(raised=text[:200])


def main(status: int, results: int) -> None:
    """See the module's text. Never returns."""
    with open("request.json", encoding="utf-8") as file:
        request = json.load(file)
    os.remove("request.json")
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != request["parent"]:
        os._exit(1)
    walls = {"network": False, "files": False, "processes": False}
    why, entered, privileged = "not asked for", False, os.getuid() == 0
    if request["isolate"]:
        try:
            privileged, was_root = enter()
            entered, walls["network"], walls["processes"] = True, True, privileged or not was_root
            wall_files(os.getcwd(), request["roots"], request["limits"]["file"])
            walls["files"], why = True, ""
        except OSError as error:
            why = str(error)

    def say(**what: Any) -> None:
        os.write(status, json.dumps(what).encode() + b"\n")

    pid = os.fork()
    if pid == 0:
        os.close(status)
        if entered:
            os.setsid()  # the leader of a session can leave neither it nor its group
        drop(entered, privileged)
        limit(request["limits"])
        if not all(walls.values()):
            guard(os.getcwd(), request["roots"])
        inner(request, results)
        sys.stdout.flush()
        os._exit(0)
    os.close(results)
    say(walls=walls, why=why, pid=pid, group=entered)
    _, code, usage = os.wait4(pid, 0)
    say(code=os.waitstatus_to_exitcode(code), cpu=usage.ru_utime + usage.ru_stime)
    os._exit(0)


if __name__ == "__main__":
    _LIBC = ctypes.CDLL(None, use_errno=True)
    main(int(sys.argv[1]), int(sys.argv[2]))
