"""A trainer from plain data, as every function that is started by name in a worker gets it.

args, of all kinds of training: spec, seed, chat (the tokenizer's folder), data (a label artifact's files), platform,
objective (`sft`, `grpo`, `on_policy`), start_model (the folder of the model that it begins from; without it, `sft`
begins from a fresh one), teacher (the folder of the model that `on_policy` learns from). Where rollouts are kept:
rollouts (a folder), run (the run's id), seals (what counts no longer, as `supervisor.record` says).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ottava import link, platforms
from ottava.checkpoint.layouts import read_config
from ottava.engine.remote import Remote
from ottava.models import lora
from ottava.models.build import fresh
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.tasks import Problem
from ottava.tasks.base import problem_of, read_lines, task_of
from ottava.trainer import data
from ottava.trainer.grpo import Grpo, Place
from ottava.trainer.loop import Trainer
from ottava.trainer.on_policy import OnPolicy
from ottava.trainer.rl_spec import OnPolicySpec, ReinforceSpec
from ottava.trainer.sft import Sft
from ottava.trainer.spec import TrainSpec
from ottava.trainer.supervised import Supervised

SPECS: dict[str, type[Supervised]] = {"sft": TrainSpec, "grpo": ReinforceSpec, "on_policy": OnPolicySpec}
"""The section of a kind of training, by its objective."""


def spec_of(args: Mapping[str, Any]) -> Supervised:
    """What a run is asked for."""
    return SPECS[args.get("objective", "sft")].model_validate(args["spec"])


def make_trainer(args: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> Trainer:
    """A trainer on this worker's device. check: raises where this worker may write nothing any more."""
    make = {"sft": _sft, "grpo": _grpo, "on_policy": _grpo}[args.get("objective", "sft")]
    return make(args, Chat.load(Path(args["chat"])), check)


def config_of(args: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The content of config.json of the model that is trained."""
    if "start_model" in args:
        config = read_config(Path(args["start_model"]))
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return _shaped(TrainSpec.model_validate(args["spec"]), Path(args["chat"]), Chat.load(args["chat"]))


def _shaped(spec: TrainSpec, folder: Path, chat: Chat) -> dict[str, Any]:
    """The content of config.json of a fresh model with the tokenizer in `folder`: its ids, and the context of the model
    that it is from."""
    ids = chat.tokenizer.get_vocab()
    pad = ids.get(chat.words.get("pad_token", ""))
    found = spec.shape.config(max(ids.values()) + 1) | {
        "pad_token_id": None if pad in chat.stop_ids else pad,  # an id that is padding has no gradient
        "eos_token_id": chat.stop_ids[0] if len(chat.stop_ids) == 1 else list(chat.stop_ids),
        "bos_token_id": chat.first,
    }
    if (folder / "config.json").is_file():
        context = read_config(folder).get("max_position_embeddings")
        found |= {} if context is None else {"max_position_embeddings": context}
    return found


def _sft(args: Mapping[str, Any], chat: Chat, _: Callable[[], None]) -> Trainer:
    spec, seed, folder = TrainSpec.model_validate(args["spec"]), int(args["seed"]), Path(args["chat"])
    objective = Sft(spec, seed, data.load(Path(args["data"]), chat, spec.mode))
    model = _begun(args, spec, seed) if "start_model" in args else fresh(_shaped(spec, folder, chat), seed)
    return Trainer(spec, seed, model, objective, platforms.asked(args).own())


def _engine(spec: ReinforceSpec, args: Mapping[str, Any]) -> Remote | None:
    its = spec.rollout.engine
    if its is None:
        return None
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[its.dtype]
    turn = f"{args.get('run')} {os.environ.get(link.EPOCH, '0')}"
    return Remote(its.url, Path(its.folder), layout=its.layout, dtype=dtype, turn=turn)


def _grpo(args: Mapping[str, Any], chat: Chat, check: Callable[[], None]) -> Trainer:
    spec, seed = spec_of(args), int(args["seed"])
    assert isinstance(spec, ReinforceSpec)
    problems: defaultdict[int, list[Problem]] = defaultdict(list)
    lines = read_lines(Path(args["data"]) / "answers.jsonl")
    for line in lines:
        problem = problem_of(line)
        if problem.steps in spec.levels or not spec.levels:
            problems[problem.steps].append(problem)
    place = None
    if "rollouts" in args:
        seals = [(int(epoch), int(step)) for epoch, step in args.get("seals", ())]

        def usable(epoch: int, step: int) -> bool:
            return all(epoch > sealed or step <= limit for sealed, limit in seals)

        epoch, again = int(os.environ.get(link.EPOCH, "0")), bool(args.get("replay"))
        place = Place(Path(args["rollouts"]), epoch, args["run"], args.get("pool", ""), usable, check, again)
    device, engine = platforms.asked(args).own(), _engine(spec, args)

    def model(name: str) -> nn.Module:
        return load(Path(args[name])).to(device)

    if isinstance(spec, OnPolicySpec):
        reader = None if spec.divergence.kind == "gkd" else Chat.load(Path(args["teacher"]))
        objective: Grpo = OnPolicy(spec, seed, chat, task_of(lines), problems, place, engine, model("teacher"), reader)
    else:
        came = partial(model, "start_model")
        objective = Grpo(spec, seed, chat, task_of(lines), problems, place, engine, came)
    return Trainer(spec, seed, _begun(args, spec, seed), objective, device)


def _begun(args: Mapping[str, Any], spec: Supervised, seed: int) -> nn.Module:
    """The model that training begins from, with adapters where only these are to be trained."""
    model = load(Path(args["start_model"]))
    if spec.lora is None:
        return model
    return lora.adapt(model, spec.lora.rank, spec.lora.alpha, spec.lora.targets, seed)
