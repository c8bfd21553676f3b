"""Another implementation's log-probabilities of the same values: Hugging Face's model classes in bfloat16.

It is the control against which backends of other engines are measured (`verify.parity`). It shares the folder's values
and the precision with them, and no line of code with our engine, and runs in a process of its own:

    python -m ottava.verify.control FOLDER      the arguments of `scores` as JSON on standard input; what it returns
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ottava.models.load import load

Others = Sequence[Sequence[Sequence[int]]]


@torch.no_grad()
def scores(folder: Path, texts: Sequence[Sequence[int]], others: Others = ()) -> list[list[list[float]]]:
    """Log-probabilities [texts][ids - 1][1 + others], each text read at once and alone.

    others: [texts][ids - 1], further ids at each place. Raises CheckpointError.
    """
    model: Any = load(folder, torch.bfloat16, "exact")
    found = []
    for number, text in enumerate(texts):
        logits = model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0, :-1].float()
        wanted = others[number] if others else [()] * len(logits)
        rows = zip(torch.log_softmax(logits, -1), text[1:], wanted, strict=True)
        found.append([row[[own, *more]].tolist() for row, own, more in rows])
    return found


if __name__ == "__main__":
    json.dump(scores(Path(sys.argv[1]), **json.load(sys.stdin)), sys.stdout)
