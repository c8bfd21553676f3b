"""Read a Hugging Face folder into a model exactly, whatever layout it is in.

Loaders that skip a missing expert or copy a scale byte as a number still generate text. This one
checks that every published tensor is there once, in its shape, and that nothing is left over.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ottava.checkpoint.layouts import exact, read_config, weights
from ottava.errors import CheckpointError
from ottava.models.build import from_config
from ottava.models.published import published


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a BF16, UE8M0-FP8 or MXFP8 folder, with exactly the folder's values, in eval mode.

    dtype: float32 or bfloat16, the type computed in; both hold every value of a folder exactly,
    except F32 tensors (the router's bias), which stay float32. Raises CheckpointError.
    """
    model = from_config(read_config(folder), folder / "config.json")
    if dtype != torch.float32:
        model = model.to(dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()
    tensors = published(model)
    missing = set(tensors)
    with torch.no_grad():
        for name, weight in weights(folder).items():
            if name == "lm_head.weight" and name not in tensors:
                continue  # tied to the embeddings
            values = exact(weight)
            if name not in missing:
                raise CheckpointError(f"unexpected tensor {name!r}", where=folder)
            target = tensors[name].tensor
            if target.shape != values.shape:
                raise CheckpointError(
                    f"{name!r} has shape {tuple(values.shape)}, the model needs {tuple(target.shape)}", where=folder
                )
            target.copy_(values)
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, first {min(missing)!r}", where=folder)
    return model.eval()
