"""Another implementation's log-probabilities of the same values: Hugging Face's model classes in bfloat16.

It is the control against which backends of other engines are measured (`verify.parity`). It shares the folder's values
and the precision with them, and no line of code with our engine, and runs in a process of its own:

    python -m ottava.verify.control FOLDER      texts, lists of ids, on standard input; their scores on standard output
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ottava.models.load import load


@torch.no_grad()
def scores(folder: Path, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities [texts][ids - 1], each text read at once and alone. Raises CheckpointError."""
    model: Any = load(folder, torch.bfloat16, "exact")
    found = []
    for text in texts:
        ids = torch.tensor([list(text)])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return found


if __name__ == "__main__":
    json.dump(scores(Path(sys.argv[1]), json.load(sys.stdin)), sys.stdout)
