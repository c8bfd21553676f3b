"""Bytes of training on the fullest chip: arithmetic on shapes.

State: BF16 weight, FP32 gradient and, spread over the replicas by the distributed optimiser, FP32 weight and two
moments: 18 bytes a parameter on one replica (arXiv 1910.02054; Megatron's gradients are FP32). Activations: arXiv
2205.05198, equations 1 to 5.
"""

from __future__ import annotations

from ottava.planner import steptime
from ottava.planner.workload import Layout, Workload

WEIGHT, GRADIENT, MOMENTS = 2, 4, 12
"""Bytes a parameter."""


def parameters_on_first_stage(work: Workload, layout: Layout) -> tuple[float, float]:
    """On a chip of the first pipeline stage, which has the embedding beside its layers: (without experts, experts)."""
    model = work.model
    table = model.hidden * model.vocabulary
    both = table * (1 if model.tied else 2)
    experts = model.expert_parameters() / layout.expert / layout.pipeline
    layers = (model.parameters() - both - model.expert_parameters()) / layout.pipeline
    return (layers + (table if layout.pipeline > 1 else both)) / layout.tensor, experts / layout.tensor


def state(work: Workload, layout: Layout) -> float:
    """Bytes of weights, gradients and optimiser, the last spread over the replicas (of experts there are fewer)."""
    data = max(1, work.chips // layout.size)
    if steptime.sharded(work, layout):
        return work.model.parameters() * (WEIGHT + GRADIENT + MOMENTS) / data
    common, experts = parameters_on_first_stage(work, layout)
    replicas = max(1.0, data * layout.context / layout.expert)
    fixed = WEIGHT + GRADIENT
    return common * (fixed + MOMENTS / data) + experts * (fixed + MOMENTS / replicas)


def activations(work: Workload, layout: Layout) -> float:
    """Bytes kept from forward to backward on a chip of the first stage, which has the most micro-batches in flight."""
    model, micro = work.model, layout.micro
    rows = micro * work.sequence / layout.context
    unit = rows * model.hidden / layout.tensor
    scores = 0.0 if work.flash else 5 * model.heads * work.sequence * rows / layout.tensor
    dense, sparse = (_layer(work, unit, routed) for routed in (False, True))
    if work.recompute == "full":
        kept = 2 * unit * model.layers
    else:
        kept = dense * (model.layers - model.sparse_layers) + sparse * model.sparse_layers
        kept += scores * model.layers if work.recompute == "none" else 0.0
    virtual = max(1, layout.virtual)
    waves = 1 + (layout.pipeline - 1) / (layout.pipeline * virtual) if virtual > 1 else 1.0
    if layout.pipeline > 1:  # a first stage keeps `pipeline` micro-batches of its share of the layers
        return kept * waves
    return kept + 4 * rows * model.vocabulary / layout.tensor  # logits in FP32


def _layer(work: Workload, unit: float, routed: bool) -> float:
    """Bytes one layer keeps, without scores, where `unit` values are a hidden state.

    Plain (GPT): 11 of attention, 4 of norms, 19 of an MLP four times as wide. Gated: two norms' inputs, the two
    products' inputs, queries, keys, values and what attention gives, the gate, its partner and their product (for each
    expert met), and the copies that are sent to experts.
    """
    model = work.model
    experts = model.experts if routed else None
    if not model.gated and experts is None:
        return unit * (15 + 19 * model.width / (4 * model.hidden))
    width = model.width if experts is None else experts.width * (experts.chosen + experts.shared)
    heads = model.heads * (model.qk_width + model.value_width) + model.kv_heads * (model.qk_width + model.value_width)
    sent = 0 if experts is None else 4 * experts.chosen
    return unit * (8 + 2 * heads / model.hidden + (6 if model.gated else 4) * width / model.hidden + sent)


def total_gb(work: Workload, layout: Layout) -> float:
    """1e9 bytes on the fullest chip."""
    return (state(work, layout) + activations(work, layout)) / 1e9
