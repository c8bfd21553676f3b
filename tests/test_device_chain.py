"""From the device to every layout and back: what was trained there is exported, converted, proven and loaded there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ottava import platforms
from ottava.checkpoint.convert import convert
from ottava.checkpoint.layouts import LAYOUTS
from ottava.models.load import load
from ottava.trainer import snapshot
from ottava.trainer.start import make_trainer
from ottava.trainer.worker import export
from ottava.verify.weights import compare

from .conftest import PLATFORM
from .test_trainer import base, spec, train

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A model that was trained on the device, exported, and its logits there on one row of tokens."""
    from ottava.models.chat import write_tiny
    from ottava.tasks import chains

    folder, args = tmp_path_factory.mktemp("trained"), base(dataset, spec(grid_from=0.5))
    trainer = make_trainer(args)
    assert trainer.state.arena.device.type == platforms.get(PLATFORM).own().type
    train(trainer, 12)
    write_tiny(folder / "model", chains.vocabulary())
    snapshot.save(folder / "state", trainer.state.snapshot())
    export({**args, "state": str(folder / "state"), "model": str(folder / "model")})
    return folder / "model", logits(folder / "model")


def logits(folder: Path) -> torch.Tensor:
    """On the device, read on the host."""
    device = platforms.get(PLATFORM).own()
    tokens = torch.arange(12, device=device)[None] % 11
    with torch.no_grad():
        found: Any = load(folder).to(device).eval()(input_ids=tokens, use_cache=False).logits
    return found.cpu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_what_was_trained(layout: str, trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    source, said = trained
    convert({"source": str(source), "out": str(tmp_path / "out"), "layout": layout})
    assert compare(source, tmp_path / "out", workers=1)["verdict"] == "identical"
    if layout in ("bf16", "deepseek"):
        assert torch.equal(logits(tmp_path / "out"), said)
