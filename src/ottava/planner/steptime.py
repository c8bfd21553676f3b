"""The time of one optimiser step from first principles: matrix products, attention, memory, links, pipeline.

Each term is a physical quantity (FLOPs over a peak, bytes over a bandwidth) times a dimensionless constant of `Terms`.
Constants are fitted to published runs by `ottava.planner.calibrate`, starting from the priors that stand here; nothing
else in this file is tuned. Sources: pipeline bubble and interleaving arXiv 2104.04473, section 2.2; recomputation and
sequence parallelism arXiv 2205.05198; experts arXiv 2006.16668; ZeRO and FSDP arXiv 1910.02054.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ottava.planner.chips import Chip, need
from ottava.planner.workload import Layout, Model, Workload

PERMUTE = 8
"""Times that a token's hidden state is read or written for each expert it meets: put in order, copied for the exchange,
copied from it, put back."""

BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "mxfp8": 1, "int8": 1}
FP8 = ("fp8", "mxfp8")


@dataclass(frozen=True)
class Terms:
    """The constants, each 1 or a share.

    efficiency: of the BF16 peak that large matrix products reach; fp8: of the FP8 peak's advantage over BF16 that is
    kept; attention: efficiency of attention relative to matrix products; shape: cost of moving a product's operands
    against the roofline; elementwise: passes over memory against the count here; plain_attention: the same for
    attention that writes its scores; links, network, spread: share of tensor-parallel, data-parallel and expert traffic
    that is not hidden; imbalance: the fullest expert against the mean, minus 1; overhead: launches of a layer, 1e-4 s;
    routing: the same for the routing of experts; scale: loss per doubling beyond 256 chips; run: share of a run lost
    beside faults.
    """

    efficiency: float = 0.62
    fp8: float = 0.6
    attention: float = 0.7
    shape: float = 1.0
    elementwise: float = 1.0
    plain_attention: float = 1.0
    links: float = 0.7
    network: float = 0.35
    spread: float = 0.7
    imbalance: float = 0.15
    overhead: float = 1.0
    routing: float = 3.0
    scale: float = 0.01
    run: float = 0.05


NAMES = tuple(field.name for field in fields(Terms))


@dataclass(frozen=True)
class Machine:
    """What of a chip and its cluster the step depends on: FLOP/s, bytes/s, and how many chips are linked closely."""

    peak: float
    peak8: float | None
    memory: float
    link: float
    linked: int
    network: float

    @classmethod
    def of(cls, chip: Chip, network_gbps: float | None = None) -> Machine:
        """From the figures; the cluster's own network, where it is known, comes before the chip's usual one."""
        network = network_gbps or (chip.network_gbps.value if chip.network_gbps else 100.0)
        return cls(
            peak=chip.peak(), peak8=chip.fp8_tflops.value * 1e12 if chip.fp8_tflops else None,
            memory=need(chip.memory_tbs, "memory bandwidth") * 1e12,
            link=chip.scaleup_gbs.value * 1e9 if chip.scaleup_gbs else network / 8 * 1e9,
            linked=int(chip.scaleup_chips.value) if chip.scaleup_chips else 1, network=network / 8 * 1e9,
        )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step and what they consist of, and how many sequences a chip group sees at a time."""

    seconds: float
    parts: dict[str, float]
    micro_batches: int


def step(work: Workload, layout: Layout, machine: Machine, terms: Terms) -> Step:
    """The time of one step of `work` on this layout."""
    model = work.model
    data = max(1, work.chips // layout.size)
    micro = min(float(layout.micro), max(1.0, work.batch / data))
    count = max(1, math.ceil(work.batch / (data * micro)))
    dense, sparse = (_layer(work, layout, machine, terms, micro, routed) for routed in (False, True))
    layers = model.layers + model.depth_heads
    routed = model.sparse_layers + (model.depth_heads if model.experts else 0)
    mean = {name: (dense[name] * (layers - routed) + sparse[name] * routed) / layers for name in dense}
    each = sum(mean.values())
    head = _head(work, layout, machine, terms, micro)
    stage, virtual = _stage(layers, layout, each, head), abs(layout.virtual)
    bubble = (layout.pipeline - 1) / (count * virtual) * (0.35 if layout.virtual < 0 else 1)
    busy = stage * count
    hop = micro * work.sequence / layout.context / layout.tensor * model.hidden * 2 * 2 * virtual
    hops = terms.network * count * hop / machine.network if layout.pipeline > 1 else 0.0
    exchange = _exchange(work, layout, machine, terms, data, count)
    update = _held(model, layout) * 20 / data / machine.memory
    crowd = 1 + terms.scale * max(0.0, math.log2(work.chips / 256))
    seconds = (busy * (1 + bubble) + hops + exchange + update) * crowd
    share = busy / (each * layers / layout.pipeline + head / layout.pipeline) / layout.pipeline
    parts = {name: value * layers * share for name, value in mean.items()}
    parts |= {"head": head * share, "bubble": busy * bubble, "exchange": exchange + hops, "update": update}
    parts["scale"] = seconds - seconds / crowd
    return Step(seconds, parts, count)


MTBF_CHIP_HOURS, SAVE_S, RESTART_S = 50_677.0, 15.0, 600.0
"""Chip hours from one failure to the next (Llama 3 405B: 419 in 54 days on 16,384 chips, arXiv 2407.21783, table 5);
seconds of a save and of a restart: assumed."""


def lost(chips: int, terms: Terms) -> float:
    """Share of a whole run's time that does not train, against its steps: faults (Young's interval), and the rest."""
    between = MTBF_CHIP_HOURS * 3600 / chips
    return min(1.0, math.sqrt(2 * SAVE_S / between) + RESTART_S / between) + terms.run


def speed(work: Workload, layout: Layout, machine: Machine, terms: Terms) -> float:
    """Tokens a second and chip: of one step, or of a whole run with what it loses."""
    seconds = step(work, layout, machine, terms).seconds
    if work.scope == "run":
        seconds *= 1 + lost(work.chips, terms)
    return work.batch * work.sequence / seconds / work.chips


def _product(rows: float, out: float, inner: float, rate: float, machine: Machine, terms: Terms, size: int) -> float:
    """Seconds of a matrix product [rows, inner] x [inner, out] at `rate` FLOP/s, and of moving its operands."""
    moved = size * (rows * inner + inner * out) + 2 * rows * out
    return 2 * rows * out * inner / rate + terms.shape * moved / machine.memory


def _rates(work: Workload, machine: Machine, terms: Terms) -> tuple[float, float]:
    """FLOP/s of BF16 products and of the linear layers."""
    rate = machine.peak * terms.efficiency
    if work.precision in FP8 and machine.peak8 is not None:
        return rate, rate * (1 + terms.fp8 * (machine.peak8 / machine.peak - 1))
    return rate, rate


def _attention(model: Model, terms: Terms) -> float:
    """Efficiency of attention relative to matrix products: the exponentials of narrow heads take their own time.

    1.5 d / (d + 64) is 1 at a width of 128, about as FlashAttention-3 at 64, 128 and 256 (arXiv 2407.08608, figure 5).
    """
    width = (model.qk_width + model.value_width) / 2
    return terms.attention * 1.5 * width / (width + 64)


def _layer(
    work: Workload, layout: Layout, machine: Machine, terms: Terms, micro: float, routed: bool
) -> dict[str, float]:
    """Seconds of one layer for one micro-batch, forward and backward with recomputation, by part."""
    model, experts = work.model, work.model.experts if routed else None
    rate, linear = _rates(work, machine, terms)
    size, h, tensor = BYTES[work.precision], model.hidden, layout.tensor
    rows = micro * work.sequence / layout.context
    products = _product(rows, model.attention_parameters() / h / tensor, h, linear, machine, terms, size)
    scores = model.attention_flops(work.sequence) / model.layers * rows / tensor / (rate * _attention(model, terms))
    routing = 0.0
    if experts is None:
        across = (3 if model.gated else 2) * model.width
        products += _product(rows, across / tensor, h, linear, machine, terms, size)
        width = float(model.width)
    else:
        per, across = rows * experts.chosen, (3 if model.gated else 2) * experts.width
        here = experts.count / layout.expert
        full = 1 + (0.2 if work.balanced else 1) * terms.imbalance
        one = _product(per / here, across / tensor, h, linear, machine, terms, size)
        products += here * one * full
        if experts.shared:
            products += _product(rows, experts.shared * across / tensor, h, linear, machine, terms, size)
        width = float(experts.width * (experts.chosen + experts.shared))
        routing = terms.routing * 1e-4 + PERMUTE * per * h * 2 / machine.memory * terms.elementwise
    quantised = 3 * h + width + (experts.chosen * h if experts else 0)
    passes = 14 * h + 3 * width + (5 * quantised / 2 if work.precision in FP8 else 0)
    memory = terms.elementwise * rows * passes * 2 / tensor / machine.memory
    plain = 0.0 if work.flash else terms.plain_attention * 12 * rows * model.heads * work.sequence / tensor
    memory += plain / machine.memory
    links, spread = _layer_traffic(work, layout, machine, terms, rows, routed)
    again = work.recompute == "full"
    core = again or work.recompute == "selective"
    return {
        "products": products * (4 if again else 3),
        "attention": scores * ((3.5 if work.flash else 3) + core),
        "memory": memory * 3 + again * memory + (plain / machine.memory if core and not again else 0.0),
        "routing": routing * (2 + again),
        "links": links * (2 + again),
        "spread": spread * (2 + again),
        "overhead": terms.overhead * 1e-4 * (2 + again),
    }


def _layer_traffic(
    work: Workload, layout: Layout, machine: Machine, terms: Terms, rows: float, routed: bool
) -> tuple[float, float]:
    """Seconds in one direction of tensor and context parallelism, and of experts, that computation does not hide."""
    model, h, tensor = work.model, work.model.hidden, layout.tensor
    link = machine.link if tensor <= machine.linked else machine.network
    near = 4 * rows * h * 2 * (tensor - 1) / tensor / link * terms.links
    if layout.context > 1:
        keys = 2 * rows * model.kv_heads * model.head_width * 2 * (layout.context - 1) / tensor
        near += 0.2 * keys / machine.network
    experts = model.experts if routed else None
    if experts is None or layout.expert == 1:
        return near, 0.0
    group = min(layout.expert, max(1, machine.linked // tensor))
    nodes = layout.expert / group
    sent = rows * h * ((1 if work.precision in FP8 else 2) + 2) / tensor
    inside = sent * experts.chosen * (1 - 1 / group) / machine.link
    met = nodes * (1 - (1 - 1 / nodes) ** experts.chosen) if nodes > 1 else 0.0  # nodes that a token's experts are on
    outside = sent * min(met, 4.0) * (1 - 1 / nodes) / machine.network if nodes > 1 else 0.0
    return near, (inside + outside) * terms.spread * (0.2 if work.overlap else 1)


def _head(work: Workload, layout: Layout, machine: Machine, terms: Terms, micro: float) -> float:
    """Seconds of output head and loss, forward and backward, for one micro-batch."""
    model = work.model
    rows, words = micro * work.sequence / layout.context, model.vocabulary / layout.tensor
    rate, _ = _rates(work, machine, terms)
    product = 3 * _product(rows, words, model.hidden, rate, machine, terms, 2)
    loss = terms.elementwise * 6 * rows * words * 4 / machine.memory
    return (product + loss) * (1 + model.depth_heads)


def _stage(layers: int, layout: Layout, each: float, head: float) -> float:
    """Seconds of the slowest pipeline stage for one micro-batch: the last one also has the head, and fewer layers where
    they do not come out even."""
    most = math.ceil(layers / layout.pipeline)
    slack = min(most * layout.pipeline - layers, most)
    return max(most * each, (most - slack) * each + head)


def _held(model: Model, layout: Layout) -> float:
    """Parameters on one chip."""
    experts = model.expert_parameters()
    return ((model.parameters() - experts) + experts / layout.expert) / (layout.tensor * layout.pipeline)


def _exchange(work: Workload, layout: Layout, machine: Machine, terms: Terms, data: int, count: int) -> float:
    """Seconds of gradients and weights between replicas that computation does not hide."""
    if data == 1:
        return 0.0
    near = work.chips <= machine.linked
    if sharded(work, layout):
        rate = machine.link if near else machine.network * min(work.chips, max(1, machine.linked))
        whole = work.model.parameters() * (4 * count + 4)
        return terms.network * whole * (data - 1) / data / rate
    moved = 6 * _held(work.model, layout) * (data - 1) / data
    return terms.network * moved / (machine.link if near else machine.network)


def sharded(work: Workload, layout: Layout) -> bool:
    """True where weights themselves are spread over all chips (FSDP, ZeRO 3)."""
    return work.stack == "fsdp" and layout.size == 1
