"""What a run shows, claim by claim, each with its level and the way to check it again.

The levels are never mixed. proven: bytes are equal. measured: a number with what it was held
against. rehearsal: something stood in for what is not here. extrapolated: figures from elsewhere.
A claim that turned out false is stated as loudly as one that held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ottava.console import reasoning, students
from ottava.console.rows import LEVELS, Content, artifact, model, row
from ottava.console.words import interval, listed, percent, plural, scientific, seconds, short

NO_CHIP = "no NPU, GPU or vendor library took part, so nothing is shown of the chip (evidence levels L0 to L4: none)"


def evidence(content: Content) -> list[dict[str, Any]]:
    """Rows {claim, how, level, holds, check}, by level. holds: None where there is nothing to fail.

    check: a command to look again, to run in the run's folder, or None. Some compute the claim anew, others only
    show the record of it.
    """
    sections = (
        _moved, _moved_again, _compared, _weighed, _answered, reasoning.claims, _served, _labelled, _qualified,
        _rehearsed, _priced,
    )  # fmt: skip
    rows = [found for section in sections for found in section(content)]
    return sorted(rows, key=lambda found: LEVELS.index(found["level"]))


def _qualified(content: Content) -> Iterator[dict[str, Any]]:
    qualify = content["qualify"]
    if qualify is None:
        return
    file = f"cat {artifact(content, 'qualify')}/qualification.json"
    pools = qualify["pools"]
    yield row(
        "measured",
        "Every pool may carry the run",
        "matrix products against float64 and an a-priori error bound; sums over workers exact on integers; bandwidth, "
        "stragglers, memory and disk against the recipe's limits" + "".join(f"; {r}" for r in qualify["reasons"]),
        set(pools) == set(qualify["passed"]),
        file,
    )
    if len(pools) > 1:
        classes = ", ".join(f"{name} {pool['numerics_class']}" for name, pool in pools.items())
        differ = bool(qualify["classes_differ"])
        claim = "The pools round differently" if differ else "The pools compute the same bits: moving changes nothing"
        yield row("measured", claim, f"hash of one layer's loss and gradients in each pool: {classes}", None, file)


def _labelled(content: Content) -> Iterator[dict[str, Any]]:
    labels = content["labels"]
    if labels is None:
        return
    where = artifact(content, "label")
    stands_in = "oracle" in str(labels["annotator"])
    how = (
        f"blind random audit of {labels['audited']}, {plural(labels['errors'] or 0, 'error')} found, Clopper-Pearson "
        "bound"
        if labels.get("votes") is None
        else f"{labels['votes']} blind votes where machines leave doubt, {labels['audited']} decisions audited, "
        f"{plural(labels['errors'] or 0, 'trace')} refuted; a martingale of bets"
    )
    yield row(
        "rehearsal" if stands_in else "measured",
        f"At most {percent(labels['error_upper_95'])} of the {labels['cold_start']:,} cold-start traces are wrong "
        "(95% confidence)",
        f"{how}; judged by: {labels['annotator']}",
        None if labels["max_error"] is None else labels["error_upper_95"] <= labels["max_error"],
        f"cat {where}/certificate.json",
    )
    if labels["disjoint"] is not None:
        yield row(
            "proven",
            "No test problem, nor a sibling of one, is in the training data",
            "the files were read back after they were written, and compared by problem family",
            bool(labels["disjoint"]),
            f'cat {where}/*.jsonl | grep -o \'"question": *"[^"]*"\' | sort | uniq -d | wc -l',
        )


def _moved(content: Content) -> Iterator[dict[str, Any]]:
    training, move = content["training"], content["fallback"]
    if move is not None and move["handoff_identical"] is not None:
        yield from _move_rows(artifact(content, "train"), move)
    if training is not None and training["replay_identical"] is not None:
        yield row(
            "proven",
            "Without the fault, the same schedule of pools ends in the same bytes" if move
            else "The same run again ends in the same bytes",
            "the whole run was replayed; " + _states(training),
            training["replay_identical"],
            _ends(artifact(content, "train")),
        )  # fmt: skip


def _moved_again(content: Content) -> Iterator[dict[str, Any]]:
    found = content["reinforce"]
    if found is None:
        return
    where, move = artifact(content, found["stage"]), found["fallback"]
    if move is not None:
        yield from _move_rows(where, move, "In reinforcement: ")
    yield row(
        "proven",
        "Reinforcement again, from the rollouts that were recorded, ends in the same bytes"
        + (": the same schedule of pools, without the fault" if move else ""),
        f"all {plural(found['steps'], 'step')} were taken a second time; no reply was drawn anew; " + _states(found),
        found["replay_identical"],
        _ends(where),
    )


def _states(found: Content) -> str:
    return f"SHA-256 of the last state: {short(found['final_state'])} and {short(found['replayed_state'])}"


def _ends(where: str) -> str:
    load = f"p = json.load(open('{where}/proof.json'))"
    return f"python -c \"import json; {load}; print(p['final'], p['replay'])\""


def _move_rows(where: str, move: Content, when: str = "") -> Iterator[dict[str, Any]]:
    """where: the artifact of the stage that moved; when: said before each claim."""
    for found in _move_claims(where, move, when):
        yield {**found, "claim": found["claim"][0].upper() + found["claim"][1:]}


def _move_claims(where: str, move: Content, when: str) -> Iterator[dict[str, Any]]:
    yield row(
        "proven",
        f"{when}the state that arrived on {move['to']} is the state that left {move['from']}",
        f"SHA-256 of weights, optimiser and router state, by the supervisor before ({short(move['before'])}) and by "
        f"every worker after ({', '.join(short(d) for d in move['after'] or ()) or 'none'})",
        move["handoff_identical"],
        f'python -c "from pathlib import Path; from ottava.trainer.snapshot import load; '
        f"print(load(Path('{where}/handoff.state')).digest)\"",
    )
    yield row(
        "proven",
        f"{when}no step was lost in the move",
        f"last step that a worker reported, against the step {move['at_step']} that was handed over: "
        f"{plural(move['lost_steps'], 'step')} lost, {seconds(move['seconds_without_a_step'])} without a step",
        move["lost_steps"] == 0,
        "grep train.fallback journal.jsonl",
    )
    yield row(
        "measured",
        f"{when}the move drifts no further than rounding alone explains",
        f"{move['window']} steps on, against staying: {scientific(move['drift'])} relative; envelope "
        f"{scientific(move['envelope'])} from {len(move['replicas'] or ())} replicas with the pools' measured "
        "difference as noise (99% prediction limit)",
        move["inside"],
        f"cat {where}/proof.json",
    )  # fmt: skip
    yield row(
        "proven",
        f"{when}one worker alone computes the very bits that the pool's workers did",
        f"{move['window']} steps after the move were repeated by one process; its state is the same",
        move["one_worker_identical"],
        f"cat {where}/proof.json",
    )


def _compared(content: Content) -> Iterator[dict[str, Any]]:
    found = content["go_no_go"]
    if found is None:
        return
    looks = found["looks"]
    examples = looks[-1]["examples"] if found["reused"] else sum(look["examples"] for look in looks)
    shared = ", the same at every look" if found["reused"] else ""
    shown = found["proven"] or found["action"] == "stop"
    margin = f"more than {found['margin']:g} nats a token"
    yield row(
        "measured",
        f"After step {found['step']} the run is no worse than its baseline by {margin}" if shown
        else f"After step {found['step']} nothing shows that the run is worse than its baseline by {margin}",
        f"sequential test, error rate {percent(found['alpha'])} over all looks: {plural(len(looks), 'look')}, "
        f"{plural(examples, 'held-out example')}{shared}; at the last {found['reason']}",
        found["action"] != "stop" if shown else None,
        "grep train.verdict journal.jsonl",
    )  # fmt: skip


def _weighed(content: Content) -> Iterator[dict[str, Any]]:
    fp8 = content["fp8"]
    if fp8 is None:
        return
    master, came = f"{artifact(content, 'convert')}/model", model(content)
    if fp8["on_grid"]:
        again = f"ottava verify {came} {master}" if content["accuracy"] else None
        how = (
            "every linear weight was an E4M3 code times a power of two already, every other one BF16; "
            "read back, the bits are the same"
        )
        yield row("proven", "Conversion to UE8M0 FP8 changed no weight", how, True, again)
    else:
        yield row("measured", "Conversion to UE8M0 FP8 rounded the weights", _rounding(fp8))
    if fp8["digest_equal"] is not None:
        names = list(fp8["layouts"] or ())
        yield row(
            "proven",
            f"The layouts {listed(names)} hold the same values",
            f"each was written, read back, and digested by exact value: {short(fp8['digest'])}",
            fp8["digest_equal"],
            f"cat {artifact(content, 'verify')}/verification.json",
        )
    if fp8["weights_identical"] is not None:
        yield row(
            "proven",
            "The master holds the values that were trained",
            "digest of the exact value of every tensor, in the trained model and in the master",
            fp8["weights_identical"],
            came and f"ottava verify {came} {master}",
        )


def _rounding(fp8: Content) -> str:
    parts = []
    if fp8["sqnr_db"] is not None:
        parts.append(f"signal to rounding noise {fp8['sqnr_db']:.1f} dB")
    if (found := fp8["divergence"]) is not None:
        parts.append(f"likeliest token the same: {_agreement(found)}")
        parts.append(f"KL {scientific(found['kl'])} nats")
    return "against the source: " + ("; ".join(parts) or "not measured yet")


def _agreement(found: Content) -> str:
    span = f" (95%: {percent(found['top1_low'])} to {percent(found['top1_high'])})" if "top1_low" in found else ""
    return f"{percent(found['top1'])}{span} of {found['positions']:,} positions"


def _answered(content: Content) -> Iterator[dict[str, Any]]:
    accuracy, fp8 = content["accuracy"], content["fp8"]
    if fp8 is not None and fp8["answers_identical"] is not None:
        count = f" of {fp8['accuracy']['n']} problems thinking, and as many directly" if fp8["accuracy"] else ""
        yield row(
            "proven",
            "The master gives the trained model's answers, token by token",
            f"digest over all generated ids{count}",
            fp8["answers_identical"],
            _evaluate(content, f"{artifact(content, 'convert')}/model"),
        )
    for mode, name in (("thinking", "Thinking"), ("direct", "Answering directly"), ("direct_one_step", "")):
        entry = (accuracy or {}).get(mode)
        if entry is None:
            continue
        what = f"{name}, the model solves" if name else "Answering one-step problems directly, it solves"
        yield row(
            "measured",
            f"{what} {percent(entry['value'])} (95%: {interval(entry)})",
            f"{entry['n']} test problems that training never saw, greedy decoding, Wilson interval",
            None,
            _evaluate(content, str(model(content))),
        )


def _evaluate(content: Content, folder: str) -> str:
    tests = artifact(content, "label") or artifact(content, "problems")
    longest = (content["model"] or {}).get("max_new")
    args = {"model": folder, "data": tests, **({"max_new": longest} if longest else {})}
    return f'python -c "from ottava.engine.evaluate import evaluate_folder; print(evaluate_folder({args}))"'


def _served(content: Content) -> Iterator[dict[str, Any]]:
    serve = content["serve"]
    if serve is None:
        return
    modes = "with thinking on and off" if serve["thinking_ok"] is not None else "directly (it has no thinking switch)"
    checks = [serve["thinking_ok"] is not False, serve["direct_ok"], serve["streamed"], serve["drained"]]
    yield row(
        "measured",
        f"The server answers {modes}, streams the same text, and drains without breaking a stream",
        "a real server asked by the openai client; SIGTERM in mid-stream",
        all(checks),
        f"ottava serve {artifact(content, 'convert')}/model",
    )


def _rehearsed(content: Content) -> Iterator[dict[str, Any]]:
    for pool in content["fleet"]:
        if pool["imitates"] is not None:
            shows = NO_CHIP if pool["platform"] == "cpu" else "nothing is shown of the chip itself"
            claim = f"The pool {pool['pool']} stands for {pool['imitates']}"
            yield row("rehearsal", claim, f"{really(pool)}; {shows}")
        elif pool["platform"] == "npu" and pool["chip"] is not None:
            yield row("measured", f"The pool {pool['pool']} is {pool['chip']}", "a real NPU: evidence level L4")


def really(pool: Content) -> str:
    """What a pool of the report's fleet is made of, in words."""
    made = {"cpu": "CPU", "npu": "NPU", "cuda": "GPU"}.get(pool["platform"], pool["platform"])
    using = f" using {pool['instruction_set']}" if pool["instruction_set"] else ""
    return f"{pool['workers']} {made} {'process' if pool['workers'] == 1 else 'processes'}{using}"


def _priced(content: Content) -> Iterator[dict[str, Any]]:
    reference = (content["plan"] or {}).get("reference")
    if reference:
        yield row(
            "extrapolated",
            f"What the same training costs on the fleet {reference['fleet']}",
            f"{reference['method']}; not priced: {reference['not_priced']}",
        )


def verdict(content: Content) -> list[str]:
    """The run in a few sentences, the most important first. content: with its evidence."""
    said = [*_trouble(content), *_story(content)]
    stand_ins = [f"{pool['pool']} for {pool['imitates']}" for pool in content["fleet"] if pool["imitates"]]
    if stand_ins:
        places = listed(stand_ins)
        said.append(f"This was a rehearsal, with processes in the place of chips: {places}. No such chip took part.")
    return said


def _trouble(content: Content) -> Iterator[str]:
    for stage in content["stages"]:
        message = f": {stage['message']}" if stage["message"] else ""
        if stage["verdict"] is False:
            broken = listed([f'"{row["claim"]}"' for row in content["evidence"] if row["holds"] is False])
            reason = stage["reason"] or (f"{broken} does not hold" if broken else "see its artifact")
            yield f"The stage {stage['name']} says no: {reason}."
        elif stage["status"] == "running":
            yield f"The run is at {stage['name']} ({stage['progress']:.0%}){message}."
        elif stage["status"] in ("failed", "interrupted", "altered"):
            yield f"The stage {stage['name']} is {stage['status']}{message}."
    if content["status"] == "unfinished":
        waiting = [stage["name"] for stage in content["stages"] if stage["status"] == "waiting"]
        yield f"The run is not finished: {listed(waiting)} still to come."


def _story(content: Content) -> Iterator[str]:
    fp8, reinforced = content["fp8"], content["reinforce"]
    proof = {True: "; the state that arrived is the state that left", False: "; BUT THE STATE CHANGED ON THE WAY"}
    for what, move in (("Training", content["fallback"]), ("Reinforcement", reinforced and reinforced["fallback"])):
        if move is not None:
            yield (
                f"{what} lost the pool {move['from']} at step {move['at_step']} and continued on {move['to']}, "
                f"{plural(move['lost_steps'], 'step')} lost{proof.get(move['handoff_identical'], '')}."
            )
    if fp8 is not None and fp8["digest_equal"] is not None:
        yield _bits(fp8)
    if content["accuracy"] is not None:
        yield _solved(content["accuracy"])
    yield from reasoning.story(content)


def _solved(accuracy: Content) -> str:
    thinking, direct, short_ones = (accuracy[mode] for mode in ("thinking", "direct", "direct_one_step"))
    one_step = ""
    if short_ones is not None:
        one_step = f", and {percent(short_ones['value'])} of {short_ones['n']} with one step ({interval(short_ones)})"
    if thinking is None:
        return f"It solves {percent(direct['value'])} of {direct['n']} unseen problems (95%: {interval(direct)})."
    return (
        f"Thinking, it solves {percent(thinking['value'])} of {thinking['n']} unseen problems "
        f"(95%: {interval(thinking)}); answering directly, {percent(direct['value'])} ({interval(direct)}){one_step}."
    )


def _bits(fp8: Content) -> str:
    if fp8["digest_equal"] is False or fp8["weights_identical"] is False or fp8["answers_identical"] is False:
        return "What would be served is NOT what was trained: see the claims that do not hold."
    if fp8["weights_identical"]:
        return "The weights that are served are the weights that were trained, bit for bit, in UE8M0 FP8."
    rounded = "" if fp8["on_grid"] else ", rounded from the source"
    same = f" Likeliest token as its source's: {_agreement(fp8['divergence'])}." if fp8["divergence"] else ""
    return f"The model's weights are UE8M0 FP8{rounded}, with the same values in every layout.{same}"


def standing(content: Content) -> dict[str, list[str]]:
    """What is real here, what is a rehearsal, what is extrapolated: sentences by heading."""
    labels = content["labels"]
    real: list[str] = []
    rehearsal: list[str] = []
    extrapolated: list[str] = []
    if content["training"] is not None:
        real.append("The training: every step, loss, state and byte, and the model that came out")
    if content["reinforce"] is not None:
        real.append("The reinforcement: every reply, verdict, step, state and byte")
    if content["students"] is not None:
        real.append("The students and their controls: each was trained and evaluated")
        rehearsal += students.stand_ins(content)
    for stage in (content["training"], content["reinforce"]):
        for fault in stage["injected"] if stage else ():
            what = f"{fault['kind'].upper()} to worker {fault['rank']} of {fault['pool']}"
            real.append(f"The fault: {what}; its timing was planned")
    if content["fp8"] is not None:
        real.append("The checkpoint: UE8M0 FP8 bytes in a Hugging Face folder")
    if content["serve"] is not None:
        real.append("The server and the openai client that asked it")
    for pool in content["fleet"]:
        if pool["imitates"] is not None:
            rehearsal.append(f"{pool['pool']} stands for {pool['imitates']}: {really(pool)}")
    if labels is not None:
        if "oracle" in str(labels["annotator"]):
            rehearsal.append(f"The audit's annotator: {labels['annotator']}")
        if labels["teachers"]:
            rehearsal.append(f"The teachers: {labels['teachers']}")
    if content["plan"] is not None and content["plan"]["reference"]:
        extrapolated.append(f"Time and cost on the fleet {content['plan']['reference']['fleet']}")
    return {"real": real, "rehearsal": rehearsal, "extrapolated": extrapolated}
