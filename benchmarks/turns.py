"""A trainer of Transformers or TRL that takes turns with ours in one process: both are measured side by side."""

from __future__ import annotations

import threading
import time
from typing import Any


class Turns:
    """A trainer in a thread of its own, which runs `block` steps when it is asked to, and else waits.

    steps: those that it has done.
    """

    def __init__(self, trainer: Any, block: int):
        from transformers import TrainerCallback

        self._trainer, self._block = trainer, block
        self._go, self._done, self._over, self.steps = threading.Semaphore(0), threading.Semaphore(0), False, 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        turns = self

        class Waits(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                turns.steps = state.global_step
                if state.global_step % block == 0:
                    turns._done.release()
                    turns._go.acquire()
                control.should_training_stop = turns._over
                return control

        trainer.add_callback(Waits())

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def block(self) -> float:
        """Seconds of CPU of the next `block` steps. The thread that waits costs nothing."""
        import torch

        if not self._thread.is_alive():
            self._thread.start()
        pinned = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # what our trainer pins would cost the other most of its speed
        begun = time.process_time()
        self._go.release()
        self._done.acquire()
        seconds = time.process_time() - begun
        torch.use_deterministic_algorithms(pinned)
        if self._error is not None:
            raise self._error
        return seconds

    def end(self) -> None:
        """Stop it."""
        self._over = True
        self._go.release()
        self._thread.join()
