"""Go or no-go, the supervisor's part: the verdict on a run is a fold of its journal, so any restart finds the same.

After a look every worker waits for the supervisor's word. So nothing is computed beyond a checkpoint before its look
and its verdict are on disk, and wherever anybody dies, the look is there or it is made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ottava import journal
from ottava.artifact import digest_of
from ottava.errors import TrainingFailed
from ottava.journal import Event
from ottava.supervisor.attempt import Watched, say
from ottava.supervisor.hub import Hub
from ottava.trainer.heldout import model_folder
from ottava.trainer.supervised import GoNoGo, Supervised
from ottava.verify.sequential import Look, Rule, Verdict, judge


def plan_of(spec: Supervised) -> str:
    """What is compared with what, and when; looks of another plan do not count."""
    assert spec.go_no_go is not None
    asked = spec.go_no_go.model_dump(mode="json", include={"baseline", "examples", "reused"})
    return digest_of([asked, list(spec.looks)])[:16]


def rule_of(asked: GoNoGo) -> Rule:
    """The test's rule as the recipe has it."""
    return Rule(asked.margin, asked.alpha, asked.bound, "lower", asked.reused)


def looks_of(events: Iterable[Event], phase: str, plan: str) -> list[Look]:
    """The looks that count, in the order of their steps. Pure."""
    told = [event for event in journal.standing(events, "train.look", phase) if event.get("plan") == plan]
    return [Look(event["step"], event["ids"], event["run"], event["baseline"]) for event in told]


class Gate:
    """The checkpoints of one supervised run. refused: a verdict was to stop, and the workers were told to end."""

    def __init__(self, run: Watched, spec: Supervised, hub: Hub):
        self._run, self._spec, self._hub = run, spec, hub
        self.refused = False

    def settle(self, step: int) -> None:
        """Before a start from the state after `step` steps: raise TrainingFailed where the answer is no.

        A verdict that the supervisor before did not come to say is said.
        """
        asked = self._spec.go_no_go
        if asked is None:
            return
        events = list(journal.read(self._run.journal.path))
        plan = plan_of(self._spec)
        looks = [look for look in looks_of(events, self._run.phase, plan) if look.step <= step]
        if not looks:
            return
        verdict = judge(looks, rule_of(asked))
        told = journal.standing(events, "train.verdict", self._run.phase)
        if not any((event["step"], event.get("plan")) == (verdict.step, plan) for event in told):
            self._say(verdict)
        if _ends(asked, verdict):
            say(self._run, "train.stop", kind="no-go", step=verdict.step, reason=verdict.reason)
            raise TrainingFailed(
                f"no-go after step {verdict.step}: {verdict.reason}",
                where=f"baseline {asked.baseline}",
                fix="change what is trained; or train.go_no_go, if it asks too much of this step",
            )

    def args(self, step: int) -> dict[str, Any]:
        """What workers that begin after `step` steps are given: which looks are to come, and at which baseline."""
        pending = self.pending(step)
        if not pending:
            return {}
        assert self._spec.go_no_go is not None
        return {"looks": pending, "baseline": str(model_folder(self._spec.go_no_go.baseline))}

    def pending(self, step: int) -> list[int]:
        """The looks to come of a run whose state is that after `step` steps: also that one's, if nobody looked."""
        if self._spec.go_no_go is None:
            return []
        looks = looks_of(journal.read(self._run.journal.path), self._run.phase, plan_of(self._spec))
        first = step + any(look.step == step for look in looks)
        return [due for due in self._spec.looks if due >= first]

    def hear(self, message: Mapping[str, Any]) -> None:
        """A worker's look: journal it, judge it with all before it, journal that, and tell the workers."""
        assert self._spec.go_no_go is not None
        step, plan = int(message["step"]), plan_of(self._spec)
        names = ("epoch", "ids", "run", "baseline")
        fields = {name: message[name] for name in names}
        self._run.journal.append("train.look", phase=self._run.phase, step=step, plan=plan, **fields)
        self._run.journal.sync()
        looks = looks_of(journal.read(self._run.journal.path), self._run.phase, plan)
        verdict = judge(looks, rule_of(self._spec.go_no_go))
        self._say(verdict)
        self.refused = _ends(self._spec.go_no_go, verdict)
        if self.refused:
            self._hub.tell("stop")
        else:
            self._hub.tell("on", step=step)

    def _say(self, verdict: Verdict) -> None:
        assert self._spec.go_no_go is not None
        rule = self._spec.go_no_go.model_dump(include={"margin", "alpha", "bound", "reused", "on_stop", "baseline"})
        say(self._run, "train.verdict", plan=plan_of(self._spec), **verdict.event(), **rule)


def _ends(asked: GoNoGo, verdict: Verdict) -> bool:
    return verdict.action == "stop" and asked.on_stop == "stop"
