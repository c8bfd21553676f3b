"""Chooses who starts a command's workers: this machine alone, or a Ray cluster, which may be started for the occasion.

The choice is one word, as `ottava run --ray ADDRESS` takes it; nothing of Ray is imported unless it is asked for.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ottava.cluster import interface_of, join
from ottava.context import Launcher
from ottava.errors import PlatformError, RecipeError
from ottava.recipe import Pool
from ottava.supervisor.local import LocalLauncher

LOCAL, AUTO = "local", "auto"
MOST_NODES = 16  # that are started on one machine
SMALL = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": 80 << 20}


@dataclass(frozen=True)
class Where:
    """Who starts the workers. address: HOST:PORT of a Ray cluster's head, None: nobody but this machine.

    chips: of every pool that was asked for, how many each node has; away: those nodes that are not this machine.
    """

    address: str | None = None
    chips: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    away: tuple[str, ...] = ()


def launcher_for(
    address: str | None, pools: Sequence[Pool] = (), server: str | None = None
) -> Callable[[], AbstractContextManager[Launcher]]:
    """What makes the launcher of a run: Ray's for the cluster at `address`, this machine's for None.

    pools: those whose nodes are to be warm from the start; server: as `LocalLauncher` takes it.
    """
    if address is None:
        return partial(LocalLauncher, server)
    from ottava.supervisor.ray import RayLauncher

    return partial(RayLauncher, address, pools)


@contextmanager
def cluster_for(ray: str | None, pools: Sequence[Pool]) -> Iterator[Where]:
    """What `--ray` names, looked at before anything is begun; what was started for it ends with the context.

    ray: None for none, HOST:PORT of a cluster's head, `auto` for $RAY_ADDRESS or the cluster of this machine, `local`
    for one that is started on this machine with a node for each of the pools' machines: a rehearsal.
    Raises RecipeError for another word, PlatformError where ray or the cluster is missing, PoolMissing where no node
    has a chip of a pool.
    """
    if ray is None:
        yield Where()
    elif ray == LOCAL:
        with started(machines(pools)) as cluster:
            yield _look(cluster.address, pools)
    elif ray == AUTO or re.fullmatch(r"[^/\s]+:\d+", ray):
        yield _look(None if ray == AUTO else ray, pools)
    else:
        raise RecipeError(
            f"{ray!r} names no Ray cluster",
            where="--ray",
            fix=f"HOST:PORT of its head, {AUTO} for this machine's, {LOCAL} to start one here for a rehearsal",
        )


def _look(address: str | None, pools: Sequence[Pool]) -> Where:
    from ottava.supervisor.cluster import Places

    library, connected = join(address)
    try:
        chips = Places(library, 0.0).survey(pools)
        nodes = {node["NodeName"]: node["NodeManagerAddress"] for node in library.nodes() if node["Alive"]}
        used = sorted({name for held in chips.values() for name in held})
        away = tuple(name for name in used if name in nodes and interface_of(nodes[name]) is None)
        return Where(str(library.get_runtime_context().gcs_address), chips, away)
    finally:
        if connected:
            library.shutdown()


def machines(pools: Sequence[Pool]) -> dict[str, dict[str, int]]:
    """The nodes of a rehearsal, by name, with their resources: the machines of every pool. Raises PlatformError."""
    from ottava.supervisor.cluster import resource

    found = {}
    for pool in pools:
        count = min(pool.nodes, pool.workers)
        for number in range(count):
            workers = pool.workers // count + (number < pool.workers % count)
            found[f"{pool.name}-{number}"] = {resource(pool.name): workers}
    if len(found) > MOST_NODES:
        raise PlatformError(
            f"a cluster of {len(found)} nodes does not fit one machine: {MOST_NODES} at most",
            where=f"--ray {LOCAL}",
            fix="name a smaller fleet, or the address of a real cluster",
        )
    return found


def room(backends: int, resources: Sequence[str] | None) -> tuple[list[Pool], list[str]]:
    """For a rehearsal of serving: the pool of two nodes on each of which all backends fit, so that either may die, and
    what a backend takes of it. resources: what was asked for; raises RecipeError where it was anything."""
    from ottava.supervisor.cluster import resource

    if resources:
        what = f"the nodes of a rehearsal have none of {resources[0]}"
        raise RecipeError(
            what, where="--ray-resources", fix="leave it out, or name a cluster that has them: --ray ADDRESS"
        )
    pool = Pool(name="serve", workers=1 << (2 * backends - 1).bit_length(), nodes=2)
    return [pool], [f"{resource(pool.name)}=1"]


class Cluster:
    """A Ray cluster with all its nodes on this machine. address: HOST:PORT; folder: RAY_TMPDIR of its processes."""

    def __init__(self, made: Any, folder: str):
        self._made, self.folder = made, folder
        # a network for each process that starts a cluster; Ray would replace 127.0.0.1 by the machine's address
        self._network = f"127.{os.getpid() >> 8 & 63 | 64}.{os.getpid() & 255}"
        self._numbers = itertools.count(2)

    @property
    def address(self) -> str:
        return str(self._made.address)

    def add(self, name: str, resources: Mapping[str, int], **options: Any) -> Any:
        """Start a node; the first one is the head. Raises PlatformError."""
        address = f"{self._network}.{next(self._numbers)}"
        try:
            return self._made.add_node(
                **SMALL, **options, node_name=name, node_ip_address=address, resources=dict(resources)
            )  # Ray's cluster sets the options that are left out
        except Exception as error:  # whatever it is, there is no such node
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"no Ray cluster could be started: {told}"
            raise PlatformError(what, where=f"--ray {LOCAL}", fix="see docs/ray.md") from error

    def kill(self, node: Any) -> None:
        """End a node that `add` gave at once, as when its power goes."""
        self._made.remove_node(node, allow_graceful=False)


@contextmanager
def started(nodes: Mapping[str, Mapping[str, int]]) -> Iterator[Cluster]:
    """A Ray cluster of several nodes on this machine, made by `ray.cluster_utils`: a head without chips, and `nodes`.

    A token keeps other users out, unless RAY_AUTH_MODE says otherwise or ray was imported before: it reads its
    settings then. nodes: name -> resources. Everything ends with the context, and with this process, however it ends.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds sockets
    try:
        with _environment(_settings(folder)):
            made = _empty()
            try:
                cluster = Cluster(made, folder)
                cluster.add("head", {}, include_log_monitor=False, include_dashboard=False)
                for name, resources in nodes.items():
                    cluster.add(name, resources)
                yield cluster
            finally:
                made.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty() -> Any:
    try:
        from ray import cluster_utils
    except ImportError:
        raise PlatformError("ray is not installed", fix="pip install -e '.[ray]'") from None
    return cluster_utils.Cluster()


def _settings(folder: str) -> dict[str, str]:
    settings = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    if "ray" in sys.modules or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return settings
    return {**settings, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Ray's daemons, and the processes that join them, take their settings from the environment of this one."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
