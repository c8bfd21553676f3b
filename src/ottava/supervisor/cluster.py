"""What is asked of Ray itself: to say where a run's pools are, and to keep these chips for it.

A worker of pool `p` takes one unit of the custom resource `ottava:p`. The first group on a pool reserves its chips with
a placement group; later groups of the same run find them reserved, so a recovery does not wait for a scheduler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ottava.cluster import DOCS
from ottava.errors import PoolMissing
from ottava.recipe import Pool

LISTED = 8  # nodes in a message


def resource(pool: str) -> str:
    """The name of the Ray resource that stands for the chips of a pool."""
    return f"ottava:{pool}"


def spread(slots: Sequence[str], busy: Mapping[str, int], workers: int) -> list[str]:
    """The node of each rank. slots: one node's name per reserved chip; busy: how many of a node's are in use.

    Free chips come first; ranks are contiguous on a node, so that neighbours in the tree of sums are neighbours in
    the cluster. Where there are more workers than chips, chips are shared evenly.
    """
    left = dict(busy)
    order = []
    for node in sorted(slots):
        order.append((left.get(node, 0) > 0, node))
        left[node] = left.get(node, 0) - 1
    chosen = sorted(node for _, node in sorted(order)[:workers])
    return [chosen[rank * len(chosen) // workers] for rank in range(workers)]


def seat(before: Mapping[int, str], slots: Sequence[str], chips: Sequence[int]) -> dict[int, str]:
    """The node of every chip that has one: where it was before, else on the first node with a slot that is left.

    before: chip -> node; slots: one node's name per reserved chip; chips: those that want a seat. Chips that a run has
    left keep theirs, so that no other takes it.
    """
    left = Counter(slots)
    seats = {}
    for chip, node in before.items():
        if left[node]:
            seats[chip] = node
            left[node] -= 1
    free = sorted(left.elements())
    for chip in chips:
        if chip not in seats and free:
            seats[chip] = free.pop(0)
    return seats


@dataclass(frozen=True)
class _Held:
    """A placement group: what it holds, a node's id for each chip."""

    group: Any
    pool: str
    nodes: tuple[str, ...]


class Places:
    """The chips that this run holds in a cluster. patience_s: how long to wait for those that others hold.

    avoid, in its methods: nodes that do not answer, whatever Ray says of them: id -> what to say of it.
    """

    def __init__(self, ray: Any, patience_s: float):
        self._ray, self._patience = ray, patience_s
        self._held: list[_Held] = []

    def take(self, pool: str, count: int, avoid: Mapping[str, str]) -> list[str]:
        """The node's id of each of the pool's chips that are held, at least `count`; reserves what is missing.

        A reservation that has lost a node is given back first. Raises PoolMissing.
        """
        alive = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in avoid]
        known = {node["NodeID"] for node in alive}
        for held in [held for held in self._held if not known.issuperset(held.nodes)]:
            self._held.remove(held)
            self._ray.util.remove_placement_group(held.group)
        missing = count - len(self._nodes(pool))
        if missing > 0:
            have = _chips(alive, pool)
            if sum(have.values()) < count:
                raise self._missing(pool, count, have, avoid)
            self._held.append(self._reserve(pool, missing, have, avoid))
        return self._nodes(pool)

    def survey(self, pools: Sequence[Pool]) -> dict[str, dict[str, int]]:
        """How many chips of each pool every living node has; raises PoolMissing for a pool of which none has any."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        found = {}
        for pool in pools:
            have = _chips(alive, pool.name)
            if not any(have.values()):
                raise self._missing(pool.name, pool.workers, have, {})
            found[pool.name] = {node: count for node, count in sorted(have.items()) if count}
        return found

    def close(self) -> None:
        """Give all chips back."""
        for held in self._held:
            self._ray.util.remove_placement_group(held.group)
        self._held.clear()

    def _nodes(self, pool: str) -> list[str]:
        return [node for held in self._held if held.pool == pool for node in held.nodes]

    def _reserve(self, pool: str, count: int, have: Mapping[str, int], avoid: Mapping[str, str]) -> _Held:
        selector = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        bundles: list[dict[str, float]] = [{resource(pool): 1}] * count
        group = self._ray.util.placement_group(bundles, bundle_label_selector=[selector] * count if avoid else None)
        if not group.wait(self._patience):
            self._ray.util.remove_placement_group(group)
            raise PoolMissing(
                f"{count} of the {sum(have.values())} workers of pool {pool!r} did not become free "
                f"in {self._patience:g} s",
                where=_where(have, avoid),
                fix="another run holds them: wait for its end or add nodes; `ray status` shows who uses what",
            )
        nodes = self._ray.util.placement_group_table(group)["bundles_to_node_id"]
        return _Held(group, pool, tuple(nodes[index] for index in range(count)))

    def _missing(self, pool: str, wanted: int, have: Mapping[str, int], avoid: Mapping[str, str]) -> PoolMissing:
        total = sum(have.values())
        head = self._ray.get_runtime_context().gcs_address
        order = f"--address={head} --resources='{{\"{resource(pool)}\": {wanted - total}}}'"
        return PoolMissing(
            f"the cluster cannot place {wanted} worker{'s' * (wanted > 1)} of pool {pool!r}: it has {total}, "
            f"{wanted - total} missing",
            where=_where(have, avoid),
            fix=f"start a node that has them: ray start {order}; {DOCS}",
        )


def _chips(nodes: Sequence[Mapping[str, Any]], pool: str) -> Counter[str]:
    """How many of a pool's chips each node has, by its name."""
    have = Counter[str]()
    for node in nodes:
        have[node["NodeName"]] += int(node["Resources"].get(resource(pool), 0))
    return have


def _where(have: Mapping[str, int], avoid: Mapping[str, str]) -> str:
    some = [f"{node} has {count}" for node, count in sorted(have.items()) if count]
    counts = [*some[:LISTED], *([f"{len(some) - LISTED} more nodes have some"] if len(some) > LISTED else [])]
    told = [*(counts or [f"none of the {len(have)} nodes has any"]), *(f"not used: {text}" for text in avoid.values())]
    return "; ".join(told)
