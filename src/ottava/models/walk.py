"""A model of Transformers whose decoder layers are in memory one at a time.

The model is built without memory; in the place of its layers stand `Passage`s, which learn what the layers are called
with. Then each layer is filled from the checkpoint when it is asked for, run on what the layers before it made, and
let go by whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ottava.checkpoint.layouts import Weight, exact
from ottava.errors import CheckpointError, OttavaError
from ottava.models.published import published


class _Reached(Exception):
    """The last layer was called: what the model does after it is not needed."""


class Passage(nn.Module):
    """Stands for a decoder layer: passes its input on, and keeps it and what else it is given (mask, rotation)."""

    def __init__(self, last: bool):
        super().__init__()
        self.last = last
        self.hidden: Tensor | None = None
        self.given: dict[str, Any] | None = None

    def forward(self, hidden: Tensor, **given: Any) -> Tensor:
        if self.given is not None and not _same(self.given, given):
            raise ValueError("its layers are given what depends on the text besides their inputs")
        self.hidden, self.given = hidden, given
        if self.last:
            raise _Reached
        return hidden


class LayeredModel:
    """A causal LM of Transformers without memory, whose decoder layers are loaded when they are asked for."""

    def __init__(self, source: Path, config: Mapping[str, Any], found: Mapping[str, Weight]):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.found, self.source, self.kind = found, source, str(config.get("model_type"))
        dropped = ("model_type", "quantization_config", "compression_config", "architectures", "dtype", "torch_dtype")
        settings = {key: value for key, value in config.items() if key not in dropped}
        with self.walking():
            self.config = AutoConfig.for_model(self.kind, **settings)
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(self.config, attn_implementation="eager", dtype=torch.float32)
            self.body = whole.eval().model
            self.layers = list(self.body.layers)
            if hasattr(self.body, "rotary_emb"):
                self.body.rotary_emb = type(self.body.rotary_emb)(config=whole.config)  # computed, not loaded
            self.passages = [Passage(layer is self.layers[-1]) for layer in self.layers]
            self.body.layers = nn.ModuleList(self.passages)

    @contextmanager
    def walking(self) -> Iterator[None]:
        """Turns what Transformers' code raises, which is of many kinds, into a refusal of the model."""
        try:
            yield
        except (OttavaError, OSError, MemoryError):
            raise
        except Exception as error:
            raise self._refusal(" ".join(str(error).split()) or type(error).__name__) from error

    def _refusal(self, what: str) -> CheckpointError:
        said = f"{self.kind!r}: this model cannot be calibrated layer by layer: {what}"
        return CheckpointError(said, where=self.source, fix="convert it with --rounding nearest")

    def embed(self, ids: Tensor) -> Tensor:
        """The inputs of the first layer, [n, window, hidden]; what the layers are given besides is kept."""
        with self.walking():
            self._fill(self.body.embed_tokens, "model.embed_tokens.")
            hidden = torch.cat([self._enter(window) for window in ids])
            self.body.embed_tokens.to("meta")
        return hidden

    def _enter(self, window: Tensor) -> Tensor:
        for passage in self.passages:
            passage.hidden = None
        with suppress(_Reached):
            self.body(input_ids=window[None], use_cache=False)
        hidden = self.passages[0].hidden
        if hidden is None or hidden.is_meta or any(passage.hidden is not hidden for passage in self.passages):
            raise self._refusal("its layers do not follow upon one another")
        return hidden

    def layer(self, number: int) -> tuple[nn.Module, dict[str, Any]]:
        """A decoder layer with its source's values, float32, and what it is called with."""
        with self.walking():
            self._fill(self.layers[number], f"model.layers.{number}.")
        return self.layers[number], self.passages[number].given or {}

    def run(self, layer: nn.Module, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        """A layer's output for one window, [window, hidden]."""
        with self.walking():
            return _first(layer(hidden[None], **given))

    def _fill(self, module: nn.Module, prefix: str) -> None:
        module.to_empty(device="cpu")
        tensors = published(module)
        unknown = [name for name, _ in module.named_buffers() if name not in tensors]
        if unknown:
            raise self._refusal(f"{prefix}{unknown[0]}: a buffer that no checkpoint holds")
        for name, item in tensors.items():
            weight = self.found.get(prefix + name)
            if weight is None:
                raise self._refusal(f"{prefix + name!r} is missing")
            values = exact(weight)
            if values.shape != item.tensor.shape:
                shapes = f"{tuple(values.shape)}, the model needs {tuple(item.tensor.shape)}"
                raise self._refusal(f"{prefix + name!r} has shape {shapes}")
            item.tensor.copy_(values)


def _same(a: Any, b: Any) -> bool:
    """Whether two calls' arguments are equal, as far as tensors can tell."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, Tensor) == isinstance(b, Tensor)


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.squeeze(0)
