"""One rank through the unmodified torch_npu: memory, copies, training, and what fails loudly.

Equal bits with the CPU are equal by construction here; what a test shows is that the bytes got where they belong.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu  # noqa: F401  (registers the device)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
NPU = torch.device("npu", 0)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).masked_fill(future, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 61, width: int = 32, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(ids))))
        return out


def trained(
    device: torch.device, dtype: torch.dtype, steps: int = 4, **options: Any
) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters after some steps; everything random is drawn on the host."""
    torch.manual_seed(0)
    model, draw = Transformer().to(dtype).to(device), torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    losses, ids = [], torch.randint(0, 61, (3, 17), generator=draw).to(device)
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_a_transformer_trains_to_the_same_bits(dtype: torch.dtype, foreach: bool) -> None:
    losses, parameters = trained(torch.device("cpu"), dtype, foreach=foreach)
    again, others = trained(NPU, dtype, foreach=foreach)
    assert losses == again
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def layouts(values: Tensor) -> list[Tensor]:
    """One tensor in several orders of memory."""
    return [values, values.mT.contiguous().mT, values[::2, 1:], values[:, :1].expand(-1, 5), values[:0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_between_host_and_device(dtype: torch.dtype) -> None:
    values = torch.arange(42).view(6, 7).remainder(251).to(dtype)
    for source, other in itertools.product(layouts(values), (dtype, torch.float32)):
        there = source.to(NPU)
        assert torch.equal(there.cpu(), source)
        assert torch.equal(there.to(other).cpu(), source.to(other))
        target = torch.zeros(source.shape, dtype=other, device=NPU).mT.contiguous().mT
        assert torch.equal(target.copy_(source).cpu(), source.to(other))
        assert torch.equal(target.copy_(there).cpu(), source.to(other))
        assert torch.equal(torch.zeros(source.shape, dtype=other).copy_(there), source.to(other))


def test_the_host_is_another_device() -> None:
    """A tensor that was left on the host is an error, as on a chip, though its memory could be read."""
    there, here = torch.ones(3, device=NPU), torch.ones(3)
    assert (there.device, there.cpu().device, there.to("cpu").device) == (NPU, here.device, here.device)
    for wrong in (lambda: there + here, lambda: torch.equal(there, here), lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3, device="npu:1")
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)  # a number may come from the host
    assert torch.equal(there[torch.tensor([0, 2])].cpu(), here[:2])  # so may indices


def test_views_share_memory_and_are_written_through() -> None:
    whole = torch.zeros(4, 6, device=NPU)
    whole[1:3, ::2] = 5
    whole.T[0].add_(1)
    whole.view(2, 12)[1].mul_(2)
    expected = torch.zeros(4, 6)
    expected[1:3, ::2] = 5
    expected.T[0].add_(1)
    expected.view(2, 12)[1].mul_(2)
    assert torch.equal(whole.cpu(), expected)
    out = torch.empty(0, device=NPU)
    torch.add(whole, 1, out=out)
    assert torch.equal(out.cpu(), expected + 1)


def test_work_of_other_streams_is_waited_for() -> None:
    """A pinned copy on a side stream, and a computation that its event orders."""
    side, host = torch.npu.Stream(), torch.arange(1 << 16, dtype=torch.float32).pin_memory()
    for _ in range(20):
        there = torch.zeros(1 << 16, device=NPU)
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            there.copy_(host, non_blocking=True)
            ready = side.record_event()
        torch.npu.current_stream().wait_event(ready)
        assert torch.equal((there * 2).cpu(), host * 2)


def test_memory_is_counted_and_its_end_is_said() -> None:
    before = torch.npu.memory_allocated()
    held = torch.empty(1 << 20, device=NPU)
    assert 1 << 22 <= torch.npu.memory_allocated() - before <= (1 << 22) + 1024  # rounded up
    del held
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(1 << 50, device=NPU, dtype=torch.uint8)


REFUSED = """
import torch, torch_npu
values = torch.ones(4, 8, device="npu")
try:
    torch_npu.npu_dynamic_quant(values.half())
except RuntimeError as error:
    print("first:", error)
try:
    torch_npu.fast_gelu(values)
    torch.npu.synchronize()
except RuntimeError as error:
    print("second:", error)
for use in (lambda: values + 1, lambda: values.cpu(), torch.npu.synchronize):
    try:
        use()
        print("went on")
    except RuntimeError as error:
        print("after:", error)
"""


def test_an_operator_that_is_not_redirected_fails_with_its_name() -> None:
    """Success without a result would be a wrong number that nobody sees; nor does the device go on afterwards."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    said = done.stdout
    assert "first: aclnnDynamicQuant" in said
    assert "second:" in said
    assert "FastGelu" in said
    assert "operator FastGelu is not there" in done.stderr
    assert said.count("after:") == 3
    assert "went on" not in said


def test_pieces_that_training_uses() -> None:
    """Autocast, checkpointing, e4m3, save and load: through the device and back."""
    layer = nn.Linear(8, 8).to(NPU)
    with torch.autocast("npu", torch.bfloat16):
        assert layer(torch.ones(2, 8, device=NPU)).dtype == torch.bfloat16
    x = torch.ones(2, 8, device=NPU, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert x.grad.device == NPU
    codes = torch.linspace(-400, 400, 64).to(NPU).to(torch.float8_e4m3fn)
    expected = torch.linspace(-400, 400, 64).to(torch.float8_e4m3fn)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))
    properties = torch.npu.get_device_properties(0)
    assert properties.total_memory > 0
    assert properties.cube_core_num > 0
