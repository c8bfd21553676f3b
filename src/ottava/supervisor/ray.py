"""The launcher of a Ray cluster: the same workers as on one machine, placed on the nodes that have a pool's chips.

Ray is asked for three things: where a pool's chips are, a process on a node, and word of its death. It never retries,
restarts or moves anything: that is the supervisor's to decide. On each node an `Agent` (an actor) keeps a warm process
server and forks the workers, so that they start, end and are killed as they are by `LocalLauncher`.

A node is taken for dead when its agent is reported dead, or when the agent has not answered for `silence_s`. Its
workers then have ended with status -9 and the error "the node is gone". An agent that hears nothing kills its workers
a second sooner than that, so what is declared dead is dead, in a cut network too.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ottava.cluster import code, join
from ottava.errors import LauncherGone, PlatformError, PoolMissing
from ottava.recipe import Pool
from ottava.supervisor.agent import Agent
from ottava.supervisor.cluster import Places, resource, seat, spread
from ottava.supervisor.local import answer, call_group, visible
from ottava.supervisor.zygote import describe

START_S = 60.0  # for an agent to answer for the first time
MARGIN_S = 1.0  # between the end of an agent's lease and the moment when it is declared dead
SHUN_S = 30.0  # for this long a silent node is not used, even if Ray still lists it (it takes 15 s to notice)


@dataclass
class _Node:
    """A node and its agent. lost: why it is gone; heard: when it last answered (None: not yet)."""

    id: str
    name: str
    address: str
    agent: Any
    hello: Any
    interface: str | None = None
    processes: dict[int, RayProcess] = field(default_factory=dict)
    seen: int = 0
    beat: Any = None
    heard: float | None = None
    lost: str | None = None


class RayProcess:
    """A worker on a node of the cluster. node: the node's name."""

    def __init__(self, launcher: RayLauncher, node: _Node, number: int, pool: str | None, logs: Path):
        self._launcher, self._node, self._logs, self.pool = launcher, node, logs, pool
        self.number, self.node = number, node.name
        self.status: int | None = None
        self.outcome: dict[str, Any] = {}
        self.started: Any = None
        self._told: dict[str, Any] | None = None

    @property
    def pid(self) -> int:
        """Its number on its own node; 0 where it never started."""
        return int(self._start()["pid"])

    @property
    def log(self) -> Path:
        """Its output: in the folder that was asked for, on its own node where the nodes share no files."""
        return Path(self._start()["log"])

    def alive(self) -> bool:
        """True until the exit status is known."""
        return self.wait(0) is None

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status (negative: minus the signal; -9 where its node is gone), or None when it still runs."""
        return self._launcher.await_status(self, timeout)

    def terminate(self) -> None:
        self._launcher.signal(self, signal.SIGTERM)

    def kill(self) -> None:
        self._launcher.signal(self, signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        """What the function returned. Raises the OttavaError that it raised, or PlatformError if it died."""
        self.wait()
        if self._node.lost is None and not self._start()["shared"] and "error" in self.outcome:
            error = self.outcome["error"]
            return answer({"error": {**error, "where": f"{error['where'] or self.log} on node {self.node}"}})
        return answer(self.outcome)

    def _start(self) -> dict[str, Any]:
        if self._told is None:
            self._told = self._launcher.reply(self._node, self.started) if self.started is not None else None
            self._told = self._told or {"pid": 0, "log": str(self._logs), "shared": True}
        return self._told


class RayLauncher:
    """Starts functions by name on the nodes of a Ray cluster. Use as a context manager.

    address: HOST:PORT of the head (None: $RAY_ADDRESS, else the cluster of this machine); where this process has
    called `ray.init`, that cluster is used and left connected. pools: those whose nodes are to be warm from the start.
    silence_s: after how many seconds without an answer a node counts as dead; patience_s: how long to wait for chips
    that another run holds. Raises PlatformError where ray or the cluster is missing.
    """

    def __init__(
        self,
        address: str | None = None,
        pools: Sequence[Pool] = (),
        *,
        silence_s: float = 4.0,
        patience_s: float = 10.0,
    ):
        # a lease of a second at least, and over before Ray declares a silent node dead by itself (after 15 s)
        assert 2 * MARGIN_S <= silence_s <= 10.0, "silence_s is 2 to 10 seconds"
        self._address, self._pools = address, pools
        self._silence, self._patience = silence_s, patience_s
        self._lock = threading.RLock()  # placement and start of agents
        self._news = threading.Condition()  # statuses
        self._numbers = itertools.count()
        self._nodes: dict[str, _Node] = {}  # by id; a lost one is replaced
        self._shunned: dict[str, tuple[float, str]] = {}  # by id: until when, and what to say
        self._seats: dict[str, dict[int, str]] = {}  # by pool: the node's name of each chip
        self._devices: dict[tuple[str, str], dict[int, int]] = {}  # by pool and node: the number there of each chip
        self._markers: dict[Path, Path] = {}
        self._broken: str | None = None
        self._closing = threading.Event()
        self.host = "127.0.0.1"

    def __enter__(self) -> RayLauncher:
        self._ray, self._connected = join(self._address)
        self.host = str(self._ray.util.get_node_ip_address())
        once = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        self._actor = self._ray.remote(**once, concurrency_groups={"beat": 1})(Agent)
        self._places = Places(self._ray, self._patience)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        names = {resource(pool.name) for pool in self._pools}
        for node in self._ray.nodes():
            if node["Alive"] and names & set(node["Resources"]):
                self._start_agent(node["NodeID"])
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.join()
        nodes = [node for node in self._nodes.values() if node.lost is None]
        with suppress(Exception):  # a cluster that is gone needs no farewell
            self._ray.wait([node.agent.close.remote() for node in nodes], num_returns=len(nodes), timeout=5.0)
            for node in nodes:
                self._ray.kill(node.agent)
            self._places.close()
        for marker in self._markers.values():
            marker.unlink(missing_ok=True)
        if self._connected:
            self._ray.shutdown()

    # ------------------------------------------------------------ what a launcher does

    def call(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None = None, workers: int = 1, logs: Path
    ) -> list[dict[str, Any]]:
        """Run a function in `workers` processes that can form a process group; their results by rank.

        When one fails, the others are killed and its error is raised.
        """
        return call_group(self, target, args, pool=pool, workers=workers, logs=logs)

    def rendezvous(self, pool: Pool | None, workers: int, chips: Sequence[int] = ()) -> list[dict[str, str]]:
        """Place a group: the environment of each rank, in torchrun's variables, and OTTAVA_NODE, the node's name.

        chips: a number stays on its node while that lives, so those of a node that the run has left leave it free.
        Raises PoolMissing where the cluster has no chips for it, or its first node dies meanwhile.
        """
        nodes = self._place(pool, workers, chips)
        alone = len({node.id for node in nodes}) == 1
        master = "127.0.0.1" if alone else nodes[0].address
        port = self.reply(nodes[0], nodes[0].agent.port.remote(master))
        if port is None:
            raise PoolMissing("the node is gone", where=f"node {nodes[0].name}", fix="run the same command again")
        beside = Counter(node.name for node in nodes)
        passed: Counter[str] = Counter()
        environments = []
        for rank, node in enumerate(nodes):
            interface = "lo" if alone else node.interface
            device = self._device(pool, node, chips[rank]) if pool and chips else passed[node.name]
            environments.append(
                {
                    **visible(pool, device),
                    "OTTAVA_NODE": node.name, "MASTER_ADDR": master, "MASTER_PORT": str(port),
                    "WORLD_SIZE": str(workers), "RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(beside[node.name]), "LOCAL_RANK": str(passed[node.name]),
                    **({"GLOO_SOCKET_IFNAME": interface} if interface else {}),
                }
            )  # fmt: skip
            passed[node.name] += 1
        return environments

    def spawn(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None, logs: Path, env: Mapping[str, str] = {}
    ) -> RayProcess:
        """Start one process on the node that `rendezvous` named in `env`, else on any of the pool's; return at once.

        On a node that has died since, the process has ended with status -9.
        """
        node = self._named(env["OTTAVA_NODE"]) if "OTTAVA_NODE" in env else self._place(pool, 1)[0]
        request = {
            "target": target, "args": dict(args), "env": {"OTTAVA_NODE": node.name, **env},
            "pool": pool and pool.model_dump(mode="json"), "logs": str(logs.absolute()), "marker": self._marker(logs),
        }  # fmt: skip
        process = RayProcess(self, node, next(self._numbers), pool.name if pool else None, logs)
        with self._news:
            if node.lost is None:
                node.processes[process.number] = process
                process.started = node.agent.start.remote(process.number, json.dumps(request))
            else:
                _bury(process, node)
        return process

    def signal(self, process: RayProcess, number: int) -> None:
        """Send a signal to a worker, if it still runs and its node answers."""
        node = process._node
        if process.status is None and node.lost is None:
            node.agent.signal.remote(process.number, int(number))

    def await_status(self, process: RayProcess, timeout: float | None) -> int | None:
        """The exit status of a worker, or None where it still runs after `timeout` seconds. LauncherGone: Ray is."""
        with self._news:
            self._news.wait_for(lambda: process.status is not None or self._broken is not None, timeout)
            if process.status is None and self._broken is not None:
                raise LauncherGone("the Ray cluster is gone", where=self._broken, fix="run the same command again")
            return process.status

    def reply(self, node: _Node, reference: Any) -> Any:
        """An agent's answer, from JSON; None where its node is gone. Its first answer may take START_S."""
        end = time.monotonic() + START_S
        while True:
            gone = node.lost is not None or self._broken is not None
            try:
                return json.loads(self._ray.get(reference, timeout=0 if gone else 0.5))
            except self._ray.exceptions.GetTimeoutError:
                if gone:
                    return None
                if node.heard is None and time.monotonic() > end:
                    self._lose(node, f"no answer for {START_S:g} s", shun=True)
            except self._ray.exceptions.ActorUnavailableError:
                return None
            except self._ray.exceptions.RayError as error:
                self._lose(node, _last_line(error))
                return None

    def _device(self, pool: Pool, node: _Node, chip: int) -> int:
        """The number that a pool's chip has on its node. It keeps it, as a device that was left is left for good."""
        numbers = self._devices.setdefault((pool.name, node.name), {})
        return numbers.setdefault(chip, len(numbers))

    # ------------------------------------------------------------ places and agents

    def _place(self, pool: Pool | None, workers: int, chips: Sequence[int] = ()) -> list[_Node]:
        """The node of each rank, each with an agent that has answered."""
        with self._lock:
            if pool is None:
                here = self._ready(self._ray.get_runtime_context().get_node_id())
                if here is None:
                    raise PlatformError("no worker can be started on this machine's own node", fix="see docs/ray.md")
                return [here] * workers
            wanted = min(workers, pool.workers)
            while True:
                ids = self._take(pool.name, wanted, chips)
                nodes = [self._ready(identity) for identity in dict.fromkeys(ids)]
                if None not in nodes:
                    break
            named = {node.name: node for node in nodes if node is not None}
            slots = [self._nodes[identity].name for identity in ids]
            if chips:
                before, all_of_them = self._seats.get(pool.name, {}), range(max(chips) + 1)
                first = not before and len(slots) >= len(all_of_them)
                seats = self._seats[pool.name] = seat(before, slots, all_of_them if first else chips)
                if seats.keys() >= set(chips):
                    return [named[seats[chip]] for chip in chips]
            busy = {
                name: sum(process.pool == pool.name for process in list(node.processes.values()))
                for name, node in named.items()
            }
            return [named[name] for name in spread(slots, busy, workers)]

    def _take(self, pool: str, wanted: int, chips: Sequence[int]) -> list[str]:
        """A node's id for each chip that is held: those that are wanted, and those on living nodes that were left."""
        alive = {node.name for node in self._nodes.values() if node.lost is None}
        seats = self._seats.get(pool, {}) if chips else {}
        left = sum(node in alive for chip, node in seats.items() if chip not in chips)
        if chips and not seats:
            left = max(chips) + 1 - len(chips)
        try:
            return self._places.take(pool, wanted + left, self._avoided())
        except PoolMissing:
            if not left:
                raise
            return self._places.take(pool, wanted, self._avoided())

    def _avoided(self) -> dict[str, str]:
        """The nodes that are not to be used now, by id, and what to say of them."""
        now = time.monotonic()
        return {identity: text for identity, (until, text) in self._shunned.items() if now < until}

    def _ready(self, identity: str) -> _Node | None:
        """The node's agent, started if there is none, once it has said hello; None where the node fails to."""
        node = self._nodes.get(identity)
        if node is None or node.lost is not None:
            node = self._start_agent(identity)
        if node.hello is not None:
            told = self.reply(node, node.hello)
            if told is None:
                self._lose(node, "no answer")
                self._shun(node)
                return None
            if told["code"] != code():
                raise PlatformError(
                    f"the node has ottava {told['code']}, and this is {code()}: the bits may differ",
                    where=f"node {node.name}",
                    fix="install the same ottava on all nodes",
                )
            node.interface, node.hello = told["interface"], None
        return node

    def _start_agent(self, identity: str) -> _Node:
        known = next(node for node in self._ray.nodes() if node["NodeID"] == identity)
        name = known["NodeName"]
        if any(node.name == name and node.id != identity and node.lost is None for node in self._nodes.values()):
            name = f"{name}-{identity[:6]}"
        setup = {
            "node": name, "address": known["NodeManagerAddress"], "folder": os.getcwd(),
            "path": [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p],
            "lease_s": self._silence - MARGIN_S,
        }  # fmt: skip
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(identity, soft=False)
        agent = self._actor.options(scheduling_strategy=here).remote(json.dumps(setup))
        node = _Node(identity, name, known["NodeManagerAddress"], agent, agent.hello.remote())
        node.beat = _beat(node)
        self._nodes[identity] = node
        return node

    def _named(self, name: str) -> _Node:
        for node in reversed(list(self._nodes.values())):
            if node.name == name:
                return node
        raise PlatformError(f"there is no node called {name!r}", fix="take OTTAVA_NODE from `rendezvous`")

    def _marker(self, logs: Path) -> str:
        """A file beside the logs by which a node tells whether it sees the same folder."""
        logs = logs.absolute()
        logs.mkdir(parents=True, exist_ok=True)
        if logs not in self._markers:
            self._markers[logs] = logs / f".shared-{uuid.uuid4().hex}"
        self._markers[logs].touch()
        return str(self._markers[logs])

    # ------------------------------------------------------------ news

    def _listen(self) -> None:
        """Ask all agents in turn what has happened, for as long as the launcher is open."""
        try:
            while not self._closing.is_set():
                nodes = [node for node in list(self._nodes.values()) if node.lost is None]
                asked = {node.beat: node for node in nodes if node.beat is not None}
                if asked:
                    ready, _ = self._ray.wait(list(asked), timeout=0.1)
                    if ready:
                        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=0)
                    for reference in ready:
                        self._hear(asked[reference], reference)
                else:
                    self._closing.wait(0.05)
                now = time.monotonic()
                for node in nodes:
                    if node.heard is not None and now - node.heard > self._silence:
                        self._lose(node, f"no answer for {self._silence:g} s", shun=True)
        except Exception as error:  # whatever Ray says, the waiting must be told
            with self._news:
                self._broken = f"{type(error).__name__}: {error}".splitlines()[0]
                self._news.notify_all()

    def _hear(self, node: _Node, reference: Any) -> None:
        errors = self._ray.exceptions
        try:
            told = json.loads(self._ray.get(reference))
        except errors.ActorUnavailableError:  # a dead node, or a cut link in which calls were lost: it is given up
            node.heard, node.beat = node.heard or time.monotonic(), None
            return
        except (errors.ActorDiedError, errors.ActorUnschedulableError, errors.RayTaskError) as error:
            self._lose(node, _last_line(error))
            return
        with self._news:
            for end in told["ended"]:
                process = node.processes.pop(end["number"], None)
                if process is not None:  # else the node was given up a moment ago
                    process.status, process.outcome = end["status"], end["outcome"]
            node.seen += len(told["ended"])
            self._news.notify_all()
        if told["gone"]:
            self._lose(node, "the process that starts workers is gone")
        node.heard, node.beat = time.monotonic(), _beat(node)

    def _lose(self, node: _Node, reason: str, shun: bool = False) -> None:
        """From now on the node has no agent, and what ran there has ended. shun: the node is to be avoided, too."""
        with self._news:
            if node.lost is not None:
                return
            node.lost = reason
            for process in node.processes.values():
                _bury(process, node)
            node.processes.clear()
            if shun:
                self._shun(node)
            self._news.notify_all()
        with suppress(Exception):
            self._ray.kill(node.agent)

    def _shun(self, node: _Node) -> None:
        self._shunned[node.id] = (time.monotonic() + SHUN_S, f"{node.name} ({node.lost})")


def _bury(process: RayProcess, node: _Node) -> None:
    error = PlatformError("the node is gone", where=f"node {node.name}: {node.lost}")
    process.status, process.outcome = -signal.SIGKILL, {"error": describe(error)}


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _beat(node: _Node) -> Any:
    return node.agent.beat.options(concurrency_group="beat").remote(node.seen)
