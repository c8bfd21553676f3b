"""Rounds a model to the grid with calibration text, one decoder layer after another.

Plain rounding needs the weights only. `fp8.rounding.gptq` also needs the inputs that each linear layer sees, and they
depend on the layers before it as they will be served. So the text goes through the model layer by layer: a layer is
loaded, sees the outputs of the rounded layers before it, is rounded with what its linears saw, and passes the text on.
In memory are one decoder layer, the text's activations and one Hessian for each distinct input of the layer.

The result is an overlay: a folder with one safetensors file a layer, BF16 values that lie on the grid, under published
names. `checkpoint.convert` writes the master from the source and the overlay, and measures what changed against the
source. A run that is stopped goes on after the last layer that is whole. The bits depend on the source, the text, the
settings and the numerics class (instruction set, thread count), which is why the overlay is kept and not recomputed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ottava.artifact import digest_of, file_digest, require_room, write_json
from ottava.checkpoint.convert import check, check_apart, convert
from ottava.checkpoint.layouts import NEEDS_MASTER, Weight, exact, read_config, weights
from ottava.checkpoint.names import storage_of
from ottava.checkpoint.resume import check_free, locked
from ottava.checkpoint.safetensors import load as load_tensor
from ottava.checkpoint.safetensors import read_header, write
from ottava.errors import CheckpointError, DataError
from ottava.fp8.codec import project
from ottava.fp8.rounding import damping_for, gptq, grid_scale, nearest, output_error
from ottava.models.chat import read_tokenizer
from ottava.models.published import published
from ottava.models.walk import LayeredModel

Progress = Callable[[int, int], object]
"""Called with how much is done, and of how much."""

VERSION = 1
TOKENS, WINDOW = 16384, 512
REPORT = "rounding.json"
OURS = r"(rounding\.json|layer-\d{5}\.(safetensors|json))(\.part)?"
"""The names of an overlay's files."""
TOPICS, PASSAGES = "pydoc_data.topics", "calibration.txt"
"""The default texts, half of the tokens from each: the reference topics in Python's own standard library, and, beside
this module, passages of many kinds that were written for this purpose. One kind of text is not enough: the topics alone
gained less on prose, and its KL not at all."""


@dataclass(frozen=True)
class Fact:
    """How one tensor was rounded. tokens: how many its inputs were; damping: as `fp8.rounding.gptq` takes it; gain_db:
    of the squared error of its outputs on the calibration text against plain rounding, positive where it is smaller,
    None where neither has one."""

    method: str
    tokens: int
    damping: float | None
    gain_db: float | None


def round_model(args: Mapping[str, Any], progress: Progress | None = None) -> dict[str, Any]:
    """Round the model folder args["source"] by GPTQ into the overlay folder args["out"]; return its rounding.json.

    progress counts decoder layers.
    args: text, a UTF-8 file or a list of them (default: `TOPICS` and `PASSAGES`); tokens (16384) and window (512): how
    much of the text is used, the same from each file, in windows spread evenly over it. A tensor whose inputs were
    fewer tokens than it has columns (a rarely routed expert) is rounded to nearest.
    Returns {"version", "method", "texts": [{"name", "sha256", "tokens"}], "tokens", "window", "nearest": names,
    "gain_db": {"median", "lowest", "highest"} on the calibration text itself, "tensors": {name: {"method", "tokens",
    "damping", "gain_db"}}}.
    What another source, text or setting left in `out` is removed.
    Raises CheckpointError, FormatError or DataError, Busy where another process rounds into `out`; what is whole is
    kept, and used by the next call.
    """
    with locked(Path(args["out"]), OURS):
        return _rounded(args, progress)


def _rounded(args: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    """`round_model` in a folder that is locked."""
    source, out = Path(args["source"]), Path(args["out"])
    config, found = read_config(source), weights(source)
    window = int(args.get("window", WINDOW))
    ids, texts = _windows(source, _texts(args.get("text")), int(args.get("tokens", TOKENS)), window)
    facts: dict[str, Any] = {
        "version": VERSION,
        "method": "gptq",
        "texts": texts,
        "tokens": ids.numel(),
        "window": window,
    }
    files = sorted({weight.data.path for weight in found.values()})
    state = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = digest_of([facts, file_digest(source / "config.json"), state])
    tensors: dict[str, Fact] = {}
    for number, count, done in _layers(LayeredModel(source, config, found), ids, out, key):
        tensors |= done
        if progress is not None:
            progress(number + 1, count)
    gains = sorted(fact.gain_db for fact in tensors.values() if fact.gain_db is not None)
    report = facts | {
        "nearest": sorted(name for name, fact in tensors.items() if fact.method == "nearest"),
        "gain_db": {"median": gains[len(gains) // 2], "lowest": gains[0], "highest": gains[-1]} if gains else None,
        "tensors": {name: asdict(tensors[name]) for name in sorted(tensors)},
    }
    if _read(out / REPORT) != report:  # a conversion that was stopped goes on only where its overlay is untouched
        write_json(out / REPORT, report)
    return report


def convert_calibrated(
    args: Mapping[str, Any], progress: Progress | None = None, layers: Progress | None = None
) -> dict[str, Any]:
    """Round args["source"] by `round_model` and convert it; return convert's report with the calibration's facts.

    args: those of `round_model` (text, tokens, window) and of `convert`. The overlay lies beside `out` while the work
    lasts, as `OUT.rounding`, so that a stopped run goes on. layers counts layers, then progress bytes; without layers,
    progress counts both. The report gains {"calibration": rounding.json without its list of tensors}; rounding.json
    goes with the master.
    Raises what those two raise; what can be known before the rounding is said before it.
    """
    check_apart(Path(args["source"]), Path(args["out"]))
    check_free(Path(args["out"]))
    out = Path(os.path.abspath(args["out"]))
    overlay = out.with_name(out.name + ".rounding")
    passed = {key: value for key, value in args.items() if key not in ("text", "tokens", "window")}
    with locked(overlay, OURS):
        linear = check(passed)
        off = [weight for weight in linear.values() if not _on_grid(weight)]
        if not off:
            return convert(passed, progress)  # there is nothing to round
        again = next((weight for weight in off if weight.scale is not None), None)
        if again is not None and not args.get("allow_lossy"):
            what = "this weight was rounded once already, and not to this grid"
            fix = f"{NEEDS_MASTER}, or allow a lossy conversion"
            raise CheckpointError(what, where=again.data.where, fix=fix, tensor=again.name)
        _check_room(overlay, linear)
        rounding = _rounded({**args, "out": overlay}, layers or progress)
        calibration = {key: value for key, value in rounding.items() if key != "tensors"}
        report = convert({**passed, "overlay": overlay, "notes": {"calibration": calibration}}, progress)
        shutil.rmtree(overlay)
    return report


def _on_grid(weight: Weight) -> bool:
    """Whether a weight's values are what plain rounding makes of them."""
    values = exact(weight)
    narrowed = values.float()
    return torch.equal(narrowed.double(), values.double()) and torch.equal(project(narrowed), narrowed)


def _check_room(overlay: Path, linear: Mapping[str, Weight]) -> None:
    """Raise ResourceError where the disk has no room for the rounded weights, BF16, that are not there yet."""
    need = sum(2 * math.prod(weight.shape) for weight in linear.values())
    need -= sum(path.stat().st_size for path in overlay.glob("layer-*.safetensors"))
    fix = "free some space or choose another place for the output"
    require_room(overlay, need, "the rounded weights, which are kept while it lasts", fix)


# The text.


def _texts(given: str | Path | Sequence[str | Path] | None) -> dict[str, str]:
    if given is None:
        topics: dict[str, str] = import_module(TOPICS).topics
        passages = Path(__file__).with_name(PASSAGES).read_text(encoding="utf-8")
        return {TOPICS: "\n\n".join(topics[name] for name in sorted(topics)), PASSAGES: passages}
    texts = {}
    for path in [given] if isinstance(given, str | Path) else given:
        try:
            texts[str(path)] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "name a UTF-8 file"
            raise DataError(f"the calibration text cannot be read: {error}", where=path, fix=fix) from None
    return texts


def _windows(source: Path, texts: Mapping[str, str], tokens: int, width: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Token ids [n, width], the same number from each text as far as it has them, spread evenly over it; the facts."""
    tokenizer = read_tokenizer(source / "tokenizer.json")
    windows, facts = [], []
    for name, text in texts.items():
        try:
            ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)
        except Exception as error:
            what = f"the calibration text has words that the tokenizer lacks: {error}"
            fix = "give a text in words that this model knows: --calibration TEXT"
            raise DataError(what, where=f"the default text {name}" if name == TOPICS else name, fix=fix) from None
        whole = [part for part in torch.split(ids, width) if len(part) == width]
        count = min(tokens // len(texts) // width, len(whole))
        windows += [whole[i * len(whole) // count] for i in range(count)]
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts.append({"name": Path(name).name, "sha256": digest, "tokens": count * width})
    if not windows:
        raise DataError(
            f"the calibration text has no window of {width} tokens",
            where=", ".join(texts),
            fix="name a longer text",
        )
    return torch.stack(windows), facts


@torch.no_grad()
def _layers(model: LayeredModel, ids: Tensor, out: Path, key: str) -> Iterator[tuple[int, int, dict[str, Fact]]]:
    """Round every layer that is not on disk yet; (number, how many there are, the facts of its tensors)."""
    _clear(out, key)
    hidden = model.embed(ids)
    for number in range(len(model.layers)):
        layer, given = model.layer(number)
        prefix = f"model.layers.{number}."
        path = out / f"layer-{number:05d}.safetensors"
        facts = _resume(path, key)
        if facts is None:
            facts = _round_layer(model, layer, prefix, hidden, given)
            views = published(layer)
            write(path, {name: views[name.removeprefix(prefix)].tensor.bfloat16() for name in sorted(facts)}.items())
            write_json(path.with_suffix(".json"), {"key": key, "tensors": {n: asdict(f) for n, f in facts.items()}})
        else:
            views = published(layer)
            for name, entry in read_header(path).items():
                views[name.removeprefix(prefix)].tensor.copy_(load_tensor(entry))
        for window in range(len(hidden)):
            hidden[window] = model.run(layer, hidden[window], given)
        layer.to("meta")
        yield number, len(model.layers), facts


def _round_layer(
    model: LayeredModel, layer: nn.Module, prefix: str, hidden: Tensor, given: Mapping[str, Any]
) -> dict[str, Fact]:
    """Round the linears and experts of one layer in place, with the inputs they have for `hidden`."""
    views = published(layer)
    seen = Inputs(layer, prefix)
    for window in hidden:
        model.run(layer, window, given)
        seen.sum_up()
    seen.close()
    facts: dict[str, Fact] = {}
    for names, hessian in seen.hessians.items():
        done = _round([views[name].tensor for name in names], hessian, seen.tokens[names])
        facts |= {prefix + name: fact for name, fact in zip(names, done, strict=True)}
    for name, calls in seen.experts.items():
        with model.walking():
            facts |= _round_experts(layer.get_submodule(name), prefix + name, calls)
    return facts


class Inputs:
    """What the linears of a layer see: sums of x x^T, one for all linears with the same input; experts' calls.

    The products are float64: rounded to float32, those of nearly parallel inputs are not positive semidefinite.
    """

    def __init__(self, layer: nn.Module, prefix: str):
        self.hessians: dict[tuple[str, ...], Tensor] = {}
        self.tokens: Counter[tuple[str, ...]] = Counter()
        self.experts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._calls: list[tuple[str, Tensor]] = []
        self._hooks = []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and storage_of(f"{prefix}{name}.weight", 2) == "fp8":
                self._hooks.append(module.register_forward_pre_hook(self._linear(name + ".weight")))
            elif name.endswith("experts") and isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                self._hooks.append(module.register_forward_pre_hook(self._routed(name)))

    def _linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: self._calls.append((name, given[0]))

    def _routed(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: self.experts.setdefault(name, []).append((given[0].clone(), given[1]))

    def sum_up(self) -> None:
        """Add one window's inputs. Linears that were given one and the same tensor share a sum."""
        shared: dict[int, list[str]] = {}
        inputs = {id(x): x for _, x in self._calls}
        for name, x in self._calls:
            shared.setdefault(id(x), []).append(name)
        for number, names in ((number, tuple(names)) for number, names in shared.items()):
            x = inputs[number].flatten(0, -2).double()
            self.tokens[names] += len(x)
            self.hessians.setdefault(names, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)
        self._calls.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _round_experts(experts: Any, name: str, calls: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Fact]:
    """Round experts that Transformers keeps in one tensor, each with the tokens that were routed to it."""
    inputs, routes = (torch.cat(parts) for parts in zip(*calls, strict=True))
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    half = gate_up.shape[1] // 2
    facts: dict[str, Fact] = {}
    for expert in range(gate_up.shape[0]):
        x = inputs[(routes == expert).any(-1)]
        gates = [gate_up[expert, :half], gate_up[expert, half:]]
        pair = _round(gates, _products(x), len(x))
        inner = experts.act_fn(x @ gates[0].T) * (x @ gates[1].T)
        last = _round([down[expert]], _products(inner), len(x))
        for part, fact in zip(("gate_proj", "up_proj", "down_proj"), pair + last, strict=True):
            facts[f"{name}.{expert}.{part}.weight"] = fact
    return facts


def _products(x: Tensor) -> Tensor:
    wide = x.double()
    return wide.T @ wide


def _round(matrices: Sequence[Tensor], hessian: Tensor, tokens: int) -> list[Fact]:
    """Round matrices that share their inputs, in place: by GPTQ, or to nearest where tokens are fewer than columns."""
    columns = hessian.shape[-1]
    w, scale = torch.cat(list(matrices)), torch.cat([grid_scale(matrix) for matrix in matrices])
    plain = nearest(w, scale)
    sizes = [len(matrix) for matrix in matrices]
    if tokens < columns:
        for matrix, values in zip(matrices, torch.split(plain, sizes), strict=True):
            matrix.copy_(values)
        return [Fact("nearest", tokens, None, None)] * len(matrices)
    damping = damping_for(columns, tokens)
    facts = []
    parts = (torch.split(side, sizes) for side in (gptq(w, hessian, scale, damping=damping), plain))
    for matrix, new, old in zip(matrices, *parts, strict=True):
        before, after = (float(output_error(matrix, values, hessian)) for values in (old, new))
        gain = round(10 * math.log10(before / after), 3) if before > 0 and after > 0 else None
        facts.append(Fact("gptq", tokens, round(damping, 6), gain))
        matrix.copy_(new)
    return facts


def _resume(path: Path, key: str) -> dict[str, Fact] | None:
    """The facts of a layer that an earlier run with the same key has finished."""
    found = _read(path.with_suffix(".json"))
    try:
        whole = found.get("key") == key and path.is_file()
        return {name: Fact(**fact) for name, fact in found["tensors"].items()} if whole else None
    except (KeyError, TypeError, AttributeError):
        return None


def _clear(out: Path, key: str) -> None:
    """Remove layers of another key: a conversion would take them for this model's."""
    for path in out.glob("layer-*"):
        if _read(path.with_suffix(".json")).get("key") != key:
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A JSON table; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
