"""Backends on the machines of a Ray cluster. Ray chooses the machine, keeps its resources, and tells of its death.

Nothing else is Ray's: a keeper on the machine (an actor) starts the very process that would have been started here, and
the gateway speaks to it at a port of its own, so no token passes through Ray. Nothing is retried, restarted or moved by
Ray: a dead machine is a dead backend, which `child` has started again, then on another machine. Keepers end with the
process that made them, however it ends, and a backend ends with its keeper.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ottava.cluster import DOCS, code, join
from ottava.errors import DataError, OttavaError, PlatformError
from ottava.gateway import wire
from ottava.gateway.door import Address
from ottava.gateway.engines import EMBEDDED, KINDS, Choice
from ottava.gateway.keeper import Keeper
from ottava.gateway.launch import Order, address_of

START_S = 180.0  # for Ray to find a machine and start a keeper there, which a busy one takes a minute for
PATIENCE_S = 10.0  # for resources that others hold
KILL_S = 10.0  # for a keeper to end its backend
LISTED = 8  # nodes in a message

Resources = Mapping[str, float]


def resources(said: Sequence[str], chosen: Sequence[Choice]) -> list[dict[str, float]]:
    """What a backend of each folder takes of its machine, by Ray's names: as said ("GPU=8", "NPU=8,CPU=4"), one for all
    folders or one of each, else a CPU or as many of the engine's chips as it asks for. Raises DataError."""
    if len(said) not in (0, 1, len(chosen)):
        what = f"{len(said)} times resources and {len(chosen)} folders"
        fix = "give one --ray-resources for all, one for each DIR in their order, or none"
        raise DataError(what, where="--ray-resources", fix=fix)
    if said:
        found = [_resources(text) for text in said]
        return found if len(found) > 1 else found * len(chosen)
    return [{"CPU": 1.0} if one.kind == EMBEDDED else {KINDS[one.kind].resource: float(one.devices)} for one in chosen]


def _resources(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^=\s]+)\s*=\s*(\d{1,6}(?:\.\d{1,4})?)\s*", part)
        if match is None or match[1] in found or not float(match[2]):
            fix = "write it as GPU=8 or NPU=8,CPU=4: Ray's names of resources, each once, and how many a backend takes"
            raise DataError(f"these are no resources: {text!r}", where="--ray-resources", fix=fix)
        found[match[1]] = float(match[2])
    return found


class Placed(Keeper):
    """A keeper that Ray has placed: it knows where it is."""

    def __init__(self, setup: str):
        import ray

        super().__init__(setup, str(ray.util.get_node_ip_address()))
        self._node = ray.get_runtime_context().get_node_id()

    def node(self) -> str:
        """The id of its node."""
        return str(self._node)


class RayProcess:
    """A backend on a node of the cluster. pid: its number there; node: the node's name."""

    def __init__(self, ray: Any, keeper: Any, pid: int, node: str, key: str):
        self._ray, self._keeper, self._key = ray, keeper, key
        self.pid, self.node = pid, node
        self.heard = time.monotonic()
        self.fault: str | None = None
        self._told: dict[str, Any] | None = None
        self._over = asyncio.Event()
        self._killing: asyncio.Task[None] | None = None
        self._listening = asyncio.create_task(self._listen())

    def address(self) -> Address | None:
        try:
            return None if self._told is None else address_of(self._told, self._key)
        except OttavaError as error:
            error.what = f"on node {self.node}: {error.what}"
            raise

    async def wait(self) -> None:
        await self._over.wait()

    def kill(self) -> None:
        if self._killing is None and self.fault is None:
            self._killing = asyncio.create_task(self._kill())

    async def _listen(self) -> None:
        """Hear its keeper until one of them has ended. Ray says of a keeper at once that it died, of a machine that
        says nothing any more after 15 s: `child` asks the backend itself meanwhile."""
        try:
            while self.fault is None:
                told = json.loads(await self._keeper.news.remote())
                if told["words"]:
                    sys.stderr.write(told["words"])
                    sys.stderr.flush()
                self.heard, self._told = time.monotonic(), told["told"]
                self.fault = told["fault"]
        except Exception as error:  # whatever Ray says: there is no keeper any more, and so no backend
            self.fault = self.fault or f"it is gone with its keeper on node {self.node} ({type(error).__name__})"
        await self._end()

    async def _kill(self) -> None:
        with suppress(Exception):  # a machine that is gone does not answer
            async with asyncio.timeout(KILL_S):
                await self._keeper.kill.remote()
        self.fault = self.fault or f"it ended with status {-signal.SIGKILL}"
        self._listening.cancel()
        await self._end()

    async def _end(self) -> None:
        with suppress(Exception):
            await asyncio.to_thread(self._ray.kill, self._keeper)  # it waits for the head, which may be gone
        self._over.set()


class RayLauncher:
    """Starts backends on the nodes of a Ray cluster, spread over them.

    address: HOST:PORT of the head, or None: see `cluster.join`. bundles: what each backend takes, by its name; held
    until the end. digest: of a folder's values on this machine. Raises PlatformError where ray or the cluster is
    missing, or has no room.
    """

    def __init__(
        self,
        address: str | None,
        bundles: Mapping[str, Resources],
        digest: Callable[[Path], Awaitable[str]],
        patience_s: float = PATIENCE_S,
    ):
        self._ray, self._connected = join(address)
        self._bundles, self._digest = bundles, digest
        self._actor = self._ray.remote(max_restarts=0, max_task_retries=0)(Placed)
        try:
            self._group = self._reserved(patience_s)
        except BaseException:
            self._leave()
            raise

    async def start(self, order: Order) -> RayProcess:
        folder = os.path.abspath(order.folder)
        taken, key = self._bundles[order.name], secrets.token_urlsafe(32)
        wanted = replace(
            order,
            folder=folder,
            key=key,
            digest=await self._digest(Path(folder)),
            threads=int(taken.get("CPU", 0)) or None,
        )
        path = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        keeper = self._actor.options(**self._options(order.name)).remote(
            json.dumps({"folder": os.getcwd(), "path": path})
        )
        try:
            async with asyncio.timeout(START_S):
                node = await keeper.node.remote()
                said = json.loads(await keeper.start.remote(json.dumps(asdict(wanted)), code()))
                name = await asyncio.to_thread(self._name, node)
        except TimeoutError:
            self._ray.kill(keeper)
            raise ConnectionError(f"no node had room and time for its keeper within {START_S:g} s") from None
        except self._ray.exceptions.RayError as error:
            raise ConnectionError(f"its keeper died: {type(error).__name__}") from None
        except BaseException:
            self._ray.kill(keeper)
            raise
        if "error" in said:
            self._ray.kill(keeper)
            refused = wire.error_of(said)
            refused.what = f"on node {name}: {refused.what}"
            raise refused
        print(f"backend {order.name}: on node {name}", file=sys.stderr, flush=True)
        return RayProcess(self._ray, keeper, said["pid"], name, key)

    async def close(self) -> None:
        with suppress(Exception):  # a cluster that is gone needs no farewell
            self._ray.util.remove_placement_group(self._group)
        self._leave()

    def _leave(self) -> None:
        if self._connected:
            self._ray.shutdown()

    def _options(self, name: str) -> dict[str, Any]:
        taken = dict(self._bundles[name])
        place = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=list(self._bundles).index(name)
        )
        chips = {"num_cpus": taken.pop("CPU", 0), "num_gpus": taken.pop("GPU", 0), "resources": taken}
        return {**chips, "scheduling_strategy": place}

    def _name(self, node: str) -> str:
        return next((str(each["NodeName"]) for each in self._ray.nodes() if each["NodeID"] == node), node)

    def _reserved(self, patience_s: float) -> Any:
        """A place for each backend, on different nodes as far as there are; a dead node's are moved to others."""
        group = self._ray.util.placement_group([dict(taken) for taken in self._bundles.values()], strategy="SPREAD")
        if group.wait(patience_s):
            return group
        self._ray.util.remove_placement_group(group)
        nodes = sorted((node["NodeName"], node["Resources"]) for node in self._ray.nodes() if node["Alive"])
        names = sorted({name for taken in self._bundles.values() for name in taken})
        has = [f"{node} has {_amounts({name: own.get(name, 0) for name in names})}" for node, own in nodes]
        more = [f"{len(has) - LISTED} more nodes"] if len(has) > LISTED else []
        kinds = sorted({_amounts(taken) for taken in self._bundles.values()})
        raise PlatformError(
            f"the cluster has no room for {len(self._bundles)} backends of {' and '.join(kinds)} each",
            where="; ".join([*has[:LISTED], *more]),
            fix=f"add nodes, wait for what others hold, or say what a backend takes with --ray-resources; {DOCS}",
        )


def _amounts(taken: Resources) -> str:
    return ", ".join(f"{name}={amount:g}" for name, amount in taken.items())
