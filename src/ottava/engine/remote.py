"""Rollouts by an engine of its own, such as vLLM, on another pool or another vendor's chips.

It is spoken to in OpenAI's completions protocol with ids for prompts, and gets its weights as folders: each hand-over
is a new one, checked as read back, which the engine is told to load in place. What it must be started with:

    VLLM_SERVER_DEV_MODE=1 vllm serve START_FOLDER --logprobs-mode processed_logprobs

in the layout that is handed over later, in reach of the folder. Replies are no function of anything held here, so
they count only as recorded. What it cannot tell is refused: the ids that top_p left, a budget for thinking, scores at
another temperature than 1. Log-probabilities from before the temperature (vLLM's default) are found out and refused.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from blake3 import blake3
from torch import Tensor, nn

from ottava.artifact import write_json
from ottava.engine import handoff
from ottava.engine.generate import PAD
from ottava.engine.handoff import Handoff, Layout
from ottava.engine.rollout import LENGTH, STOP, Rollouts, Sampling, Scores
from ottava.errors import DataError, PlatformError

NOTE = "handed.json"
"""In the folder of the hand-overs: what was handed over last, and in whose turn."""

COLD = 0.02
"""A temperature at which an engine is sure of its choice, unless it tells log-probabilities from before it."""
TRIALS = 16  # prompts by which that is found out
UNIFORM = 0.05  # nats: a model this near to guessing tells the same in both ways


class Remote:
    """url: the engine's, without /v1. folder: where weights are handed over, seen by both. turn: workers of one turn
    (a start of a run) hand the same weights over once. dtype: what the engine computes in. received: what it was told
    to load last."""

    received: Path | None = None

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        layout: Layout = "bf16",
        dtype: torch.dtype = torch.bfloat16,
        turn: str = "",
        at_once: int = 64,
        timeout_s: float = 600.0,
    ):
        self.url, self.folder, self.layout, self._turn = url.rstrip("/"), folder, layout, turn
        self._dtype, self._at_once, self._checked = dtype, at_once, False
        transport = httpx.HTTPTransport(retries=3, limits=httpx.Limits(max_connections=at_once))
        self._client = httpx.Client(timeout=timeout_s, transport=transport)
        self._model = ""

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    # ------------------------------------------------------------ weights

    def take(self, model: nn.Module) -> Handoff:
        """Write the weights, have the engine load them and forget what it kept of others.

        Returns what lies in the folder that it loaded, as read back. Raises CheckpointError where the values have no
        exact form in the layout, PlatformError where the engine does not do as told or tells raw log-probabilities.
        """
        offered = handoff.offer(model)
        with self._locked():
            place = self.folder / f"{offered.whole[:16]}-{self.layout}"
            if not self._handed(place):
                if not place.exists():
                    handoff.write(place, model, self.layout)
                self._post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(place.resolve())})
                self._post("/reset_prefix_cache")
                write_json(self.folder / NOTE, {"turn": self._turn, "folder": place.name})
                self._clear(place)
            self.received = place
            found = handoff.held(place)
        if not self._checked:
            self._refuse_raw(int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
            self._checked = True
        return found

    def _handed(self, place: Path) -> bool:
        """Whether another worker of this turn has handed over just this."""
        note = self.folder / NOTE
        last = json.loads(note.read_text()) if note.exists() else {}
        return place.exists() and last == {"turn": self._turn, "folder": place.name}

    def _clear(self, kept: Path) -> None:
        """Remove what was handed over before."""
        for path in self.folder.glob(f"*-{self.layout}"):
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _refuse_raw(self, vocabulary: int) -> None:
        """Find out whether log-probabilities are of the distribution that was drawn from.

        Drawn at a low temperature, a choice is near certain; before the temperature it was as likely as it scores.
        """
        prompts = torch.randint(0, vocabulary, (TRIALS, 8), generator=torch.Generator().manual_seed(0)).tolist()
        drawn = self.generate(prompts, Sampling(1, (), COLD), 0)
        ids = [[*prompt, reply] for prompt, reply in zip(prompts, drawn.replies[:, 0].tolist(), strict=True)]
        raw, told = self.score(ids).logprobs[:, -1], drawn.logprobs[:, 0]
        guessing = bool(((raw + math.log(vocabulary)).abs() < UNIFORM).all())
        if not guessing and (told - raw).abs().mean() < told.abs().mean():
            raise PlatformError(
                "the engine tells log-probabilities from before temperature and truncation: a learner cannot use them",
                where=self.url,
                fix="start it with --logprobs-mode processed_logprobs",
            )

    # ------------------------------------------------------------ replies

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, rows: Sequence[int] | None = None
    ) -> Rollouts:
        """As `InProcess.generate`, but for routes, which the engine does not tell. Raises DataError, PlatformError."""
        if sampling.top_p < 1 or sampling.think is not None:
            what = "top_p below 1" if sampling.top_p < 1 else "a budget for thinking"
            fix = "rollout.top_p: 1, or rollouts in process"
            raise DataError(f"{what}: an engine of its own does not say among which ids it chose", fix=fix)
        numbers = range(len(prompts)) if rows is None else rows
        asked = {
            "max_tokens": sampling.max_new, "temperature": sampling.temperature, "logprobs": 1, "ignore_eos": True,
            "stop_token_ids": list(sampling.stop), "include_stop_str_in_output": True,
        }  # fmt: skip

        def ask(item: tuple[Sequence[int], int]) -> tuple[list[int], list[float], bool]:
            prompt, number = item
            return _reply(self._ask(prompt, **asked, seed=_seed(seed, number)), sampling, self.url)

        replies = self._all(ask, list(zip(prompts, numbers, strict=True)))
        return _rollouts(prompts, replies)

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> Scores:
        """As `InProcess.score`, at temperature 1 only, without routes. Raises DataError, PlatformError."""
        if temperature != 1:
            raise DataError("an engine of its own scores sequences at temperature 1 only")

        def ask(ids: Sequence[int]) -> list[float]:
            found = self._ask(ids, max_tokens=1, temperature=0.0, prompt_logprobs=0).get("prompt_logprobs") or []
            try:
                return [float(at[str(token)]["logprob"]) for at, token in zip(found[1:], ids[1:], strict=True)]
            except (KeyError, TypeError, ValueError) as error:
                raise self._odd(f"no log-probability of each id of a prompt: {error}") from None

        rows = self._all(ask, sequences)
        out = torch.zeros(len(rows), max(map(len, sequences)) - 1)
        for target, row in zip(out, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        return Scores(out, None)

    # ------------------------------------------------------------ the line

    def _all(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(max(1, min(self._at_once, len(items)))) as pool:
            return list(pool.map(ask, items))

    def _ask(self, prompt: Sequence[int], **asked: Any) -> Mapping[str, Any]:
        """One choice of a completion. What the folder's generation_config.json says is overruled."""
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "return_tokens_as_token_ids": True}
        names = {"model": self._name(), "prompt": list(prompt), "return_token_ids": True}
        answer = self._post("/v1/completions", **names, **plain, **asked)
        try:
            choice: Mapping[str, Any] = answer["choices"][0]
            return choice
        except (KeyError, IndexError, TypeError):
            raise self._odd("no choice") from None

    def _name(self) -> str:
        if not self._model:
            try:
                found = self._client.get(f"{self.url}/v1/models").raise_for_status().json()
                self._model = str(found["data"][0]["id"])
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                raise self._odd(f"no list of models: {error}") from None
        return self._model

    def _post(self, path: str, **body: Any) -> Any:
        try:
            answer = self._client.post(self.url + path, json=body)
            if answer.status_code == 404 and not path.startswith("/v1"):
                fix = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
                raise PlatformError(f"the engine has no {path}: it takes no weights", where=self.url, fix=fix)
            answer.raise_for_status()
            return answer.json() if answer.content else {}
        except httpx.HTTPStatusError as error:
            words = " ".join(error.response.text.split())[:300]
            raise PlatformError(f"the engine refused {path}: {words}", where=self.url) from None
        except (httpx.HTTPError, ValueError) as error:
            raise PlatformError(
                f"the engine does not answer {path}: {error}", where=self.url, fix="start it, or look at its log"
            ) from None

    def _odd(self, what: str) -> PlatformError:
        return PlatformError(f"the engine gave {what}", where=self.url, fix="vLLM from 0.20 on is known to")


def _seed(seed: int, number: int) -> int:
    """A seed of its own for each row: equal ones would draw equal replies to equal prompts."""
    return int.from_bytes(blake3(f"{seed} {number}".encode()).digest()[:6], "little")


def _reply(choice: Mapping[str, Any], sampling: Sampling, where: str) -> tuple[list[int], list[float], bool]:
    """Ids, log-probabilities, and whether it ended by a stop id. Raises PlatformError."""
    try:
        ids = [int(token) for token in choice["token_ids"]]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise PlatformError(f"the engine gave no ids with log-probabilities: {error}", where=where) from None
    stopped = bool(ids) and ids[-1] in sampling.stop
    whole = stopped or len(ids) == sampling.max_new
    inside = not any(token in sampling.stop for token in ids[:-1])
    numbers = all(math.isfinite(value) and value < 1e-3 for value in logprobs)
    if not ids or len(ids) != len(logprobs) or not (whole and inside and numbers):
        why = choice.get("finish_reason")
        what = f"the engine gave {len(ids)} ids with {len(logprobs)} log-probabilities, and ended by {why!r}"
        raise PlatformError(what, where=where, fix=f"it is to draw {sampling.max_new} ids, or up to a stop id")
    return ids, logprobs, stopped


def _rollouts(
    prompts: Sequence[Sequence[int]], replies: Sequence[tuple[Sequence[int], Sequence[float], bool]]
) -> Rollouts:
    asked, asked_lengths = _padded(prompts, torch.int64)
    ids, lengths = _padded([reply for reply, _, _ in replies], torch.int64)
    logprobs, _ = _padded([values for _, values, _ in replies], torch.float32)
    finish = torch.tensor([STOP if stopped else LENGTH for _, _, stopped in replies], dtype=torch.uint8)
    forced = torch.zeros(ids.shape, dtype=torch.bool)
    return Rollouts(asked, asked_lengths, ids, lengths, logprobs, forced, finish, None, None)


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    out = torch.full((len(rows), int(lengths.max())), PAD, dtype=dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=dtype)
    return out, lengths
