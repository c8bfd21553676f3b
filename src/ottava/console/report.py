"""A run summed up: what was proven, how, and what was a rehearsal. One object for people and programs.

Everything is read from the run's folder, at any moment of the run. Artifacts are checked against
their manifests first: a report says nothing of bytes that were altered.
"""

from __future__ import annotations

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ottava import artifact, journal
from ottava.console import reasoning
from ottava.console.claims import evidence, standing, verdict
from ottava.console.source import FINISHED, Source, accuracies, entry, move, read, readable
from ottava.console.summary import text
from ottava.errors import from_os_error

__all__ = ["build", "text", "write"]

LIBRARIES = ("ottava", "torch", "transformers")


def build(folder: Path) -> dict[str, Any]:
    """The report of a run as one JSON object; stages that have not finished give nulls.

    Raises OttavaError where there is no run, ArtifactError where its records cannot be read.
    """
    source = read(folder)
    with readable(source.folder):
        return _content(source)


def write(folder: Path) -> None:
    """Write report.json (what `--json` prints) and report.html beside the journal, each whole or not at all."""
    from ottava.console.page import render

    source = read(folder)
    with readable(source.folder):
        content = _content(source)
        page = render(content, source.history)
    _replace(source.folder / "report.json", json.dumps(content) + "\n")
    _replace(source.folder / "report.html", page)


def _content(source: Source) -> dict[str, Any]:
    content: dict[str, Any] = {
        "run": str(source.folder),
        "recipe": source.asked.get("name"),
        "description": source.asked.get("description", ""),
        "seed": source.asked.get("seed"),
        "fleet": _fleet(source),
        "stages": _stages(source),
        "qualify": source.summary("qualify"),
        "plan": _plan(source),
        "labels": _labels(source),
        "training": _training(source),
        "model": _model(source),
        "accuracy": accuracies((source.summary(source.model) or {}).get("accuracy")),
        "accuracy_by_pool": _by_pool(source),
        "fallback": _fallback(source),
        "go_no_go": _go_no_go(source),
        **reasoning.content(source),
        "remarks": reasoning.remarks(source),
        "fp8": _fp8(source),
        "serve": _serve(source),
        "versions": _versions(source),
        "peak_memory_mb": source.history.peak_memory_mb,
    }
    content["seconds"] = round(sum(stage["seconds"] for stage in content["stages"]), 3)
    content["status"] = _status(content["stages"])
    finite: dict[str, Any] = _finite(content)
    finite["evidence"] = evidence(finite)
    return finite | {"verdict": verdict(finite), "standing": standing(finite)}


def _stages(source: Source) -> list[dict[str, Any]]:
    rows = []
    for name, spec in source.asked["stages"].items():
        stage = source.history.state.stages.get(name, journal.StageState(name))
        found = source.artifacts.get(name)
        altered = name in source.altered
        rows.append(
            {
                "name": name,
                "status": "altered" if altered else stage.status,
                "seconds": stage.seconds,
                "pool": stage.pool,
                "progress": stage.progress,
                "message": source.altered.get(name, stage.message if stage.status not in FINISHED else ""),
                "verdict": None if found is None else found.manifest.get("verdict"),
                "reason": None if found is None else found.summary.get("reason"),
                "artifact": f"artifacts/{stage.artifact}" if stage.artifact else None,
                "budget_s": spec.get("budget_s"),
            }
        )
    return rows


def _status(stages: list[dict[str, Any]]) -> str:
    """done, refused (a stage says no), or that of the first stage which is not done."""
    if any(stage["verdict"] is False for stage in stages):
        return "refused"
    open_ones = [stage["status"] for stage in stages if stage["status"] not in FINISHED]
    active = [status for status in open_ones if status != "waiting"]
    return active[0] if active else "unfinished" if open_ones else "done"


def _fleet(source: Source) -> list[dict[str, Any]]:
    """The pools, and what each really is. imitates: the chip that a rehearsal stands for."""
    measured = (source.file("qualify", "qualification.json") or {}).get("pools", {})
    rows = []
    for pool in source.asked.get("fleet", {}).get("pools", ()):
        about = (measured.get(pool["name"]) or {}).get("describe") or {}
        rows.append(
            {
                "pool": pool["name"],
                "platform": pool.get("platform"),
                "workers": pool.get("workers"),
                "imitates": pool.get("stands_for"),
                "chip": about.get("chip"),
                "instruction_set": about.get("instruction_set"),
            }
        )
    return rows


def _plan(source: Source) -> dict[str, Any] | None:
    """What was planned beside what was: rows by stage. The plan speaks of the stages after itself."""
    plan = source.file("plan", "plan.json")
    if plan is None:
        return None
    actual = {stage["name"]: stage for stage in _stages(source)}
    rows = []
    for row in plan["stages"]:
        stage = actual.get(row["name"], {})
        seconds = stage.get("seconds") if stage.get("status") in FINISHED else None
        inside = None if seconds is None else row["low"] <= seconds <= row["high"]
        keep = ("pool", "low", "high", "start_s", "end_s", "usd", "reason", "basis")
        rows.append(
            {
                "stage": row["name"],
                "planned_s": row["seconds"],
                "actual_s": seconds,
                "inside": inside,
                **{key: row.get(key) for key in keep},
            }
        )
    return {
        "rows": rows,
        "makespan_s": plan.get("makespan_s"),
        "usd": plan.get("usd"),
        "unavailable": plan.get("unavailable", {}),
        "reference": plan.get("reference"),
    }


def _labels(source: Source) -> dict[str, Any] | None:
    summary = source.summary("label")
    certificate = source.file("label", "certificate.json") or {}
    keep = ("audited", "errors", "error_upper_95", "annotator", "teachers", "cold_start", "answers", "test", "disjoint")
    more = ("rejected", "duplicates_removed", "contaminated_removed", "votes")
    if summary is None:
        return None
    return {key: summary.get(key) for key in (*keep, *more)} | {
        key: certificate.get(key) for key in ("population", "sampling", "bound", "max_error")
    }


def _training(source: Source) -> dict[str, Any] | None:
    """Steps and faults as the journal has them; the rest once the stage is done."""
    points = source.history.curve
    if "train" not in source.asked["stages"]:
        return None
    summary, proof = source.summary("train") or {}, source.file("train", "proof.json") or {}
    return {
        "steps": points[-1].step if points else 0,
        "of": source.asked["stages"]["train"].get("steps"),
        "parameters": summary.get("parameters"),
        "on_grid_from_step": summary.get("on_grid_from_step"),
        "segments": proof.get("segments"),
        **source.faults("main", "replay"),
        "numerics_classes": proof.get("classes"),
        "final_state": proof.get("final"),
        "replayed_state": proof.get("replay"),
        "replay_identical": proof.get("replay_identical"),
    }


def _model(source: Source) -> dict[str, Any] | None:
    """The model so far: the stage that made it last, its parameters, and how many ids its evaluated replies may have
    where the recipe says."""
    if source.model not in source.artifacts:
        return None
    evaluated = source.file(source.model, "evaluation.json") or {}
    parameters = source.artifacts[source.model].summary.get("parameters")
    return {"stage": source.model, "parameters": parameters, "max_new": evaluated.get("max_new")}


def _by_pool(source: Source) -> dict[str, Any] | None:
    """The same model, evaluated on every pool."""
    pools = (source.file(source.model, "evaluation.json") or {}).get("pools")
    return pools and {pool: accuracies(found) for pool, found in pools.items()}


def _fallback(source: Source) -> dict[str, Any] | None:
    """Training's move between pools: proven once training is done, told by the journal before."""
    told = [event for event in source.history.state.fallbacks if event.get("phase", "main") == "main"]
    found = (source.summary("train") or {}).get("fallback")
    if found is None and told and source.summary("train") is None:
        event = told[-1]
        found = {"from": event["source"], "to": event["target"], "before": event.get("digest")}
        found |= {key: event.get(key) for key in ("at_step", "lost_steps")}
    return move(found)


def _go_no_go(source: Source) -> dict[str, Any] | None:
    """How the run compares with its baseline, by its last look; None where there was none. Losses in nats a token."""
    verdicts = source.history.verdicts
    if not verdicts:
        return None
    keep = (
        "action", "step", "excess", "low", "high", "proven", "evidence", "reason", "margin", "alpha", "bound", "reused",
        "on_stop", "baseline",
    )  # fmt: skip
    rows = [{key: event.get(key) for key in ("step", "action", "examples", "excess", "proven")} for event in verdicts]
    return {key: verdicts[-1].get(key) for key in keep} | {"looks": rows}


def _fp8(source: Source) -> dict[str, Any] | None:
    converted, verified = source.summary("convert"), source.summary("verify") or {}
    if converted is None:
        return None
    accuracy = verified.get("accuracy") or {}
    return {
        "digest": converted.get("digest"),
        "digest_equal": verified.get("digest_equal"),
        "on_grid": converted.get("on_grid"),
        "label": converted.get("label"),
        "accuracy": entry(accuracy.get("thinking")),
        "layouts": verified.get("layouts"),
        "weights_identical": verified.get("weights_identical"),
        "answers_identical": verified.get("answers_identical"),
        "divergence": verified.get("divergence"),
        "sqnr_db": converted.get("sqnr_db"),
        "bytes": converted.get("bytes"),
    }


def _serve(source: Source) -> dict[str, Any] | None:
    summary = source.summary("serve")
    if summary is None:
        return None
    model = source.artifacts["convert"].path / "model" if "convert" in source.artifacts else Path(summary["model_dir"])
    keep = ("example", "thinking_ok", "direct_ok", "streamed", "drained", "correct")
    there = model.is_dir()
    return {"model_dir": str(model.resolve()) if there else None, **{key: summary.get(key) for key in keep}}


def _versions(source: Source) -> dict[str, Any]:
    """Those that qualify met in its workers; where it did not run, those installed where the report is made."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    for pool in ((source.file("qualify", "qualification.json") or {}).get("pools") or {}).values():
        about = pool.get("describe") or {}
        versions |= {k: v for k, v in {"python": about.get("python"), **about.get("libraries", {})}.items() if v}
    return versions


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: str) -> None:
    try:
        with artifact.replacing(path) as part:
            part.write_text(content, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, f"writing {path.name}") from error
