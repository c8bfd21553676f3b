"""The diagnosis: its rules case by case, its folder from workers that really hang and crash, and no secret in it."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import signal
import string
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ottava.errors import DataError
from ottava.journal import Journal
from ottava.supervisor import causes as rules
from ottava.supervisor import diagnose as writer
from ottava.supervisor import observe, redact, stacks
from ottava.supervisor.causes import LIKELIHOODS, RULES, TODO, Facts, RankFacts, Seen, causes, signal_of
from ottava.supervisor.decide import KINDS
from ottava.supervisor.diagnose import Diagnosis, diagnose, within

GB = 10**9
PLAIN = string.ascii_letters + string.digits
DEVICE = "device_lost"


def rank(number: int, status: int | None = None, **more: Any) -> RankFacts:
    more = {"phase": "reduce", "step": 7, "silent_s": 0.2, **more}
    return RankFacts(number, f"n0/{number}", 1000 + number, status, **more)


def facts(kind: str, *ranks: RankFacts, **more: Any) -> Facts:
    return Facts("nvidia", 3, kind, ranks, **{"journal": Path("/none"), "step": 7, **more})


def well(count: int = 2) -> tuple[RankFacts, ...]:
    return tuple(rank(number) for number in range(count))


PEER = "a worker died with status 70: Connection closed by peer [127.0.0.1]:4021"
KILLED = (rank(0, 70, message=PEER), rank(1, -9))
OOM_LINE = "Out of memory: Killed process 1001 (python) total-vm:24804996kB"
CRASH_LINE = "traps: python[1001] general protection fault ip:7f sp:7f error:0 in libhccl.so[17c82,7f82+27000]"

CASES: list[tuple[str, Facts, Seen, list[str]]] = [
    # stopped, frozen, held
    ("stopped", facts("hang", rank(0), rank(1, silent_s=30.0)), Seen({0: "S", 1: "T"}), ["stopped from outside"]),
    ("debugger", facts("hang", *well()), Seen(states={0: "S", 1: "t"}), ["stopped from outside"]),
    ("frozen", facts("hang", *well()), Seen({0: "S", 1: "D"}, {1: "__refrigerator"}),
     ["stopped from outside", "waits for storage"]),
    ("slow by stops", facts("straggler", *well(), blamed=(1,)), Seen(states={1: "T"}), ["stopped from outside"]),
    # memory
    ("oom by pid", facts("killed", *KILLED), Seen(kernel=(OOM_LINE,)), ["out of memory", "a lost peer"]),
    ("oom by counter", facts("killed", *KILLED, oom_kills=2), Seen(oom_kills=3), ["out of memory", "a lost peer"]),
    ("oom counter stands still", facts("killed", *KILLED, oom_kills=3), Seen(oom_kills=3),
     ["killed from outside, or by the kernel", "a lost peer"]),
    ("oom some time", facts("killed", *KILLED), Seen(oom_kills=3),
     ["out of memory", "killed from outside, or by the kernel", "a lost peer"]),
    ("memory is low", facts("killed", rank(0, -9)), Seen(memory=(GB // 10, 25 * GB)),
     ["out of memory", "killed from outside, or by the kernel"]),
    ("memory is low, and nobody was killed", facts("hang", *well()), Seen(memory=(GB // 10, 25 * GB)),
     ["something that all workers share"]),
    ("oom of somebody else", facts("killed", rank(0, -9)), Seen(kernel=("Out of memory: Killed process 77 (x)",)),
     ["killed from outside, or by the kernel", "out of memory"]),
    ("allocator", facts("memory", rank(0, 70, message="DefaultCPUAllocator: can't allocate memory"), rank(1)),
     Seen(faults={0: "out_of_memory"}), ["out of memory"]),
    ("device memory", facts("error", rank(0, 70, message="CUDA out of memory"), rank(1)),
     Seen(faults={0: "out_of_memory"}), ["out of memory"]),
    # disk
    ("disk", facts("disk", message="disk full while writing a checkpoint of the run"), Seen(), ["disk full"]),
    ("disk in words", facts("error", rank(0, 2, message="[Errno 28] No space left on device"), rank(1)),
     Seen(disks={"/run": (0, GB)}), ["disk full"]),
    ("mapped memory without room", facts("killed", rank(0, -7), rank(1)),
     Seen(disks={"/dev/shm": (0, 64 << 20), "/run": (GB, 2 * GB)}), ["disk full", "a crash in native code"]),
    ("bus error, room enough", facts("killed", rank(0, -7), rank(1)), Seen(disks={"/dev/shm": (60 << 20, 64 << 20)}),
     ["a crash in native code"]),
    # errors
    ("a bug", facts("error", rank(0, 70, message="KeyError: 'x'"), rank(1, 70, message=PEER), message="KeyError: 'x'"),
     Seen(repeats=2), ["a bug", "a lost peer"]),
    ("an error", facts("error", rank(0, 70, message="KeyError: 'x'"), rank(1, 70, message=PEER)), Seen(repeats=1),
     ["an error in the program", "a lost peer"]),
    ("an error by message", facts("error", rank(0), message="KeyError: 'x'"), Seen(), ["an error in the program"]),
    ("an error that the platform reads", facts("error", rank(0, 70, message="EI0006 notify wait"), rank(1, 75)),
     Seen(faults={0: "collective"}), ["unknown", "a lost peer"]),
    ("chip", facts("error", rank(0, 70, message="GPU has fallen off the bus"), rank(1)), Seen(faults={0: DEVICE}),
     ["the chip is lost"]),
    ("xid", facts("error", rank(0, 70, message="oops"), rank(1)), Seen(kernel=("NVRM: Xid (PCI:0000:3b:00): 79",)),
     ["the chip is lost", "an error in the program"]),
    ("class", facts("class", *well(), message="the workers are of 2 numerics classes", blamed=(1,)), Seen(),
     ["another numerics class"]),
    # signals
    ("sigsegv, again", facts("crash", rank(0), rank(1, -11), message="a worker was killed by SIGSEGV"), Seen(repeats=2),
     ["a bug", "a crash in native code"]),
    ("stuck", facts("stuck", *well(), message="error code is 507000", blamed=(1,)), Seen(), ["a chip that got stuck"]),
    ("lost", facts("lost", *well(), message="error code is 507899", blamed=(1,)), Seen(), ["the chip is lost"]),
    ("no operator", facts("pool", rank(0, 1, message="error code is 100024"), rank(1)), Seen(faults={0: "unusable"}),
     ["the installation cannot do it"]),
    ("no chips", facts("pool", message="no node of the cluster has it"), Seen(), ["unknown"]),
    ("sigkill", facts("killed", *KILLED), Seen(), ["killed from outside, or by the kernel", "a lost peer"]),
    ("sigkill, in a shell's words", facts("killed", rank(0, 137)), Seen(), ["killed from outside, or by the kernel"]),
    ("gone", facts("hang", rank(0), rank(1)), Seen(states={0: "S", 1: ""}),
     ["killed from outside, or by the kernel", "something that all workers share"]),
    ("sigterm", facts("killed", rank(0, -15), rank(1, -15)), Seen(), ["told to end"]),
    ("sigsegv", facts("killed", rank(0), rank(1, -11)), Seen(kernel=(CRASH_LINE,)), ["a crash in native code"]),
    ("sigill", facts("killed", rank(0), rank(1, 132)), Seen(), ["a crash in native code"]),
    ("node", facts("node", rank(0, -9), rank(1, -9), message="node n0 is gone"), Seen(), ["the machine is gone"]),
    ("mismatch", facts("mismatch", rank(0), message="q_proj"), Seen(), ["another engine than the learner"]),
    ("rollout", facts("rollout", rank(0), message="generation 3"), Seen(), ["replies were lost"]),
    # hangs
    ("one hangs", facts("hang", rank(0), rank(1), rank(2, phase="forward", silent_s=0.1)), Seen(), ["one rank hangs"]),
    ("one is a step behind", facts("hang", rank(0), rank(1, step=6)), Seen(), ["one rank hangs"]),
    ("one is silent", facts("hang", rank(0), rank(1, silent_s=9.0), rank(2)), Seen(), ["one rank hangs"]),
    ("one never spoke", facts("collective", rank(0), rank(1, silent_s=None), rank(2)), Seen(), ["one rank hangs"]),
    ("a single worker", facts("hang", rank(0, phase="forward")), Seen(), ["one rank hangs"]),
    ("storage", facts("hang", rank(0), rank(1, phase="save")), Seen({1: "D"}, {1: "rpc_wait_bit_killable"}),
     ["waits for storage", "one rank hangs"]),
    ("all wait", facts("hang", *well(4)), Seen(), ["something that all workers share"]),
    ("all compute", facts("hang", rank(0, phase="forward"), rank(1, phase="update")), Seen(load=(9.0, 2)),
     ["something that all workers share", "the machine is overloaded"]),
    ("straggler", facts("straggler", *well(), blamed=(1,)), Seen(load=(1.0, 2)), ["a slow chip"]),
    # numbers
    ("nan on one", facts("nan", *well(), blamed=(1,)), Seen(repeats=1), ["bad numbers from one rank"]),
    ("nan on all", facts("nan", *well()), Seen(repeats=1), ["the recipe diverges"]),
    ("nan on all by name", facts("nan", *well(), blamed=(0, 1)), Seen(repeats=1), ["the recipe diverges"]),
    ("nan on all, again", facts("nan", *well()), Seen(repeats=2), ["the recipe diverges"]),
    ("spike", facts("spike", *well()), Seen(repeats=1), ["a bad batch", "the recipe diverges"]),
    ("spike, again", facts("spike", *well()), Seen(repeats=2), ["the recipe diverges"]),
    ("replicas", facts("corrupt", *well(4), blamed=(2,)), Seen(), ["silent corruption"]),
    ("two replicas", facts("corrupt", *well()), Seen(), ["silent corruption"]),
    ("gradient", facts("gradient", *well(4), blamed=(2,)), Seen(), ["silent corruption"]),
    # little to go by
    ("only lost peers", facts("error", rank(0, 70, message=PEER), rank(1, 75)), Seen(), ["unknown", "a lost peer"]),
    ("nothing", facts("error"), Seen(), ["unknown"]),
    ("a kind of the future", facts("meteor", *well(), message="a hole in the roof"), Seen(), ["unknown"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "seen", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_rules(case: Facts, seen: Seen, expected: list[str]) -> None:
    assert [cause.cause for cause in causes(case, seen)] == expected


def test_every_rule_and_every_cause_has_a_case() -> None:
    for rule in RULES:
        assert any(rule.find(case, seen) for _, case, seen, _ in CASES), rule
    first = {causes(case, seen)[0].cause for _, case, seen, _ in CASES}
    assert first | {"a lost peer", "the machine is overloaded"} == set(TODO)
    assert {case.kind for _, case, _, _ in CASES} >= set(KINDS)
    assert {cause for rule in RULES for cause in (rule.cause, *rule.moot)} <= set(TODO)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stopped", "rank 1 (chip n0/1, process 1001) is stopped (state T)"),
        ("debugger", "is held by a debugger (state t)"),
        ("oom by pid", f"the kernel says: {OOM_LINE}"),
        ("oom by counter", "the kernel killed 1 processes of this control group"),
        ("a bug", "2 times at step 7, in the same words: KeyError: 'x'"),
        ("sigsegv", "libhccl.so"),
        ("one hangs", "rank 2 (chip n0/2, process 1002) is in forward after step 7; its last beat was 0.1 s ago"),
        ("one never spoke", "it never spoke"),
        ("storage", "rpc_wait_bit_killable"),
        ("replicas", "this speaks against rank 2 (chip n0/2"),
        ("two replicas", "no majority says which rank is right"),
        ("a kind of the future", "a hole in the roof"),
    ],
)
def test_evidence_is_given_in_words(name: str, words: str) -> None:
    case, seen = next((case, seen) for title, case, seen, _ in CASES if title == name)
    assert any(words in line for line in causes(case, seen)[0].evidence), causes(case, seen)[0].evidence


def test_a_pid_is_not_found_in_a_number() -> None:
    """Process 1001 is none of these."""
    lines = (
        "Out of memory: Killed process 10010 (x)",
        "traps: python[11001] general",
        "[1001.25] Killed process 5 (y)",
    )
    assert causes(facts("killed", *KILLED), Seen(kernel=lines))[0].likelihood == "likely"


@pytest.mark.parametrize(
    ("status", "name"), [(-9, "SIGKILL"), (137, "SIGKILL"), (-11, "SIGSEGV"), (70, None), (0, None), (None, None)]
)
def test_signal_of(status: int | None, name: str | None) -> None:
    found = signal_of(status)
    assert (found and found.name) == name


words = st.sampled_from(["", PEER, "KeyError: 'x'", "No space left on device", "out of memory", "the loss is nan"])
some_ranks = st.lists(
    st.builds(
        RankFacts,
        rank=st.integers(0, 3),
        chip=st.just("c"),
        pid=st.integers(1, 2000),
        status=st.none() | st.integers(-70, 300),
        phase=st.none() | st.sampled_from(["forward", "reduce", "update", "snapshot", "save", "join", "load", "else"]),
        step=st.integers(-1, 9),
        silent_s=st.none() | st.floats(0, 1e6),
        message=words,
        here=st.booleans(),
    ),
    max_size=4,
).map(tuple)
some_facts = st.builds(
    Facts,
    pool=st.just("a"),
    epoch=st.integers(0, 9),
    kind=st.sampled_from([*KINDS, "else"]),
    ranks=some_ranks,
    journal=st.just(Path("/none")),
    message=words,
    blamed=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    oom_kills=st.none() | st.integers(0, 3),
)
some_seen = st.builds(
    Seen,
    states=st.dictionaries(st.integers(0, 3), st.sampled_from(["R", "S", "D", "T", "t", "Z", ""])),
    waits=st.dictionaries(st.integers(0, 3), st.sampled_from(["futex_wait", "", "__refrigerator"])),
    faults=st.dictionaries(st.integers(0, 3), st.sampled_from(["out_of_memory", "collective", DEVICE, "bug"])),
    oom_kills=st.none() | st.integers(0, 5),
    memory=st.none() | st.tuples(st.integers(0, GB), st.just(GB)),
    load=st.none() | st.tuples(st.floats(0, 99), st.just(2)),
    disks=st.dictionaries(st.just("/run"), st.tuples(st.integers(0, GB), st.just(GB))),
    kernel=st.lists(st.sampled_from([OOM_LINE, CRASH_LINE, "mce: [Hardware Error]"]), max_size=2).map(tuple),
    repeats=st.integers(0, 3),
)


@given(some_facts, some_seen)
def test_there_is_always_a_cause_and_a_consequence_is_never_first(case: Facts, seen: Seen) -> None:
    found = causes(case, seen)
    assert found[0].likelihood != "consequence"
    assert [LIKELIHOODS.index(c.likelihood) for c in found] == sorted(LIKELIHOODS.index(c.likelihood) for c in found)
    assert len({cause.cause for cause in found}) == len(found)
    assert all(cause.evidence and cause.todo == TODO[cause.cause] for cause in found)
    assert found == causes(case, seen)


# ---------------------------------------------------------------- secrets

SECRETS = {  # none of them opens anything
    "from the environment": "correct-horse-battery",
    "of a known make": "hf_" + "AbCdEfGhIjKlMnOpQrSt",
    "random": "9fQ2xL7bV4tZ8kR1mN6wC3yH5pJ0dS2gTq",
    "web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "password": "hunter22",
    "header": "QWxhZGRpbjpvcGVu",
    "in a url": "s3cr3t-pw",
    "argument": "zork-mid-ring",
    "key material": "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7",
}
DIGEST = "4b227777d4dd1fc61c6f884f48641d02b4d121d3fd328cb08b5531fcacdad8a1"
SAID = f"""plain words stay, so do {DIGEST} and /tmp/Run1/Worker2/Log3/Part4/Stage5/Epoch6
the store is at {SECRETS["from the environment"]} now
loading {SECRETS["of a known make"]}
session {SECRETS["random"]} opened, cookie {SECRETS["web token"]}
db_password = "{SECRETS["password"]}", tokens: 8192, max_tokens=77
Authorization: Basic {SECRETS["header"]}
cloning https://user:{SECRETS["in a url"]}@example.org/x.git
argv: run --api-key {SECRETS["argument"]} --steps 4
-----BEGIN RSA PRIVATE KEY-----
{SECRETS["key material"]}
-----END RSA PRIVATE KEY-----
at _ZN2at6native12_GLOBAL__N_116addmm_impl_cpu_ERNS_6TensorES3_S2_S2_RKN3c106ScalarES7_
"""
KEPT = (
    "plain words stay",
    DIGEST,
    "Log3/Part4/Stage5",
    "tokens: 8192",
    "max_tokens=77",
    "--steps 4",
    "_ZN2at6native12",
)


@pytest.fixture
def secret_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET", SECRETS["from the environment"])
    monkeypatch.setenv("OTTAVA_TOKEN", "0123456789abcdef0123456789abcdef")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NOBODY_KNOWS_THIS", "something")


@pytest.mark.usefixtures("secret_environment")
def test_texts_are_redacted() -> None:
    clean = redact.text(SAID, redact.secrets())
    assert [name for name, value in SECRETS.items() if value in clean] == []
    assert [kept for kept in KEPT if kept not in clean] == []
    assert all(value in SAID for value in SECRETS.values())
    assert redact.text(clean, redact.secrets()) == clean


@pytest.mark.parametrize("cut", ["begin", "end"])
def test_a_private_key_is_found_by_either_end(cut: str) -> None:
    """The tail of a log may begin in the middle of one."""
    lines = ["-----BEGIN PRIVATE KEY-----", *[SECRETS["key material"][:40] + "+/a"] * 3, "-----END PRIVATE KEY-----"]
    kept = lines[1:] if cut == "begin" else lines[:-1]
    assert "MIIE" not in redact.text("\n".join([*kept, "(after)"]))


@given(st.text("0123456789", min_size=redact.SHORTEST), st.text(), st.text())
def test_known_values_are_replaced_wherever_they_stand(secret: str, before: str, after: str) -> None:
    known = redact.secrets({"X_TOKEN": secret})
    assert known == (secret,)
    assert secret not in redact.text(before + secret + after, known)


@pytest.mark.parametrize(("alphabet", "size"), [(PLAIN, 40), (PLAIN, 32), (PLAIN + "-_", 43), (PLAIN + "+/", 64)])
def test_random_words_are_found(alphabet: str, size: int) -> None:
    words = ["".join(random.Random(seed).choices(alphabet, k=size)) for seed in range(1000)]
    assert sum(word not in redact.text(f"got {word} there") for word in words) > 960


def test_long_names_are_not_taken_for_random() -> None:
    texts = [path.read_text() for path in Path(torch.__path__[0], "distributed").rglob("*.py")]
    names = {name for text in texts for name in re.findall("[A-Za-z0-9_]{32,}|/[A-Za-z0-9_/.]{40,}", text)}
    assert len(names) > 400
    assert [name for name in names if redact.text(name) != name] == []


def test_the_working_folder_is_no_secret() -> None:
    assert redact.secrets({"PWD": "/srv/run", "OLDPWD": "/srv/other", "SSH_AUTH_SOCK": "/tmp/agent"}) == ()


def test_only_listed_variables_are_shown() -> None:
    shown = redact.environment({"RANK": "1", "HOME": "/root", "HF_TOKEN": "abcdef", "LD_PRELOAD": "/x/abcdef.so"})
    assert shown == {"RANK": "1", "LD_PRELOAD": f"/x/{redact.GONE}.so"}


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("api_key"), inner),
)


@given(json_data)
def test_data_stays_json(value: Any) -> None:
    json.dumps(redact.data(value, ("abcdef",)), allow_nan=False)


def test_data_under_a_secret_name() -> None:
    before = {"hub_token": "x", "tokens": 12, "key": DIGEST, "deep": [{"password": ""}, {"api_key": 5}]}
    assert redact.data(before) == {**before, "hub_token": redact.GONE}


# ---------------------------------------------------------------- real workers


def stand_in_a_named_function() -> None:
    time.sleep(600)


def answer(args: dict[str, Any]) -> dict[str, Any]:
    """A worker that can be asked where it stands."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    print(SAID, "ready", flush=True)
    stand_in_a_named_function()
    return {}


def ignore(args: dict[str, Any]) -> dict[str, Any]:
    """A worker as another launcher starts it: the signal would kill it."""
    faulthandler.unregister(signal.SIGUSR1)
    print("ready", flush=True)
    time.sleep(600)
    return {}


def crash(args: dict[str, Any]) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)
    return {}


Start = Callable[..., Any]


@pytest.fixture
def start(launcher: Any, tmp_path: Path) -> Iterator[Start]:
    """Starts a function of this file and waits until it is ready."""
    started = []

    def run(name: str, wait: bool = True) -> Any:
        worker = launcher.spawn(f"tests.test_diagnose:{name}", {}, pool=None, logs=tmp_path / "logs")
        started.append(worker)
        until(lambda: not wait or (worker.log.exists() and "ready" in worker.log.read_text()))
        return worker

    yield run
    for worker in started:
        worker.kill()
        worker.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def as_facts(kind: str, path: Path, *workers: Any, **more: Any) -> Facts:
    """What a supervisor would know of these workers."""
    log = Journal(path)
    ranks = []
    for number, worker in enumerate(workers):
        log.append("train.join", rank=number, pid=worker.pid, api_key="sesame-open")
        ranks.append(rank(number, worker.wait(0), log=worker.log))
        ranks[-1] = replace(ranks[-1], pid=worker.pid)
    log.append("train.fault", kind=kind, step=7, message=f"no step for 6 s {SECRETS['of a known make']}")
    return facts(kind, *ranks, **{"message": f"no step {SECRETS['random']}", **more, "journal": path})


def everything(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("secret_environment")
def test_a_stopped_worker(start: Start, tmp_path: Path) -> None:
    """A real SIGSTOP: named as the cause, with the stack of the worker that waits for it, and without secrets."""
    waiting, stopped = start("answer"), start("answer")
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: observe.process(stopped.pid)[0] == "T")
    case = as_facts("hang", tmp_path / "journal.jsonl", waiting, stopped)
    found = diagnose(tmp_path, case, "fall back to 'ascend'")
    assert found.folder == tmp_path / "diagnosis" / "epoch-3-hang"
    assert found.causes[0].cause == "stopped from outside"
    assert f"process {stopped.pid}) is stopped (state T)" in found.causes[0].evidence[0]
    files = everything(found.folder)
    assert set(files) >= {"README.txt", "diagnosis.json", "journal.jsonl", "environment.json", "logs/rank-1.log"}
    assert "stand_in_a_named_function" in files["stacks/rank-0.txt"]
    assert "plain words" not in files["stacks/rank-0.txt"], "what was in the log before is no stack"
    assert "T (stopped)" in files["stacks/rank-1.proc.txt"]
    assert any("rank 1: it is stopped" in note for note in found.notes) or "stacks/rank-1.txt" in files
    assert observe.process(stopped.pid)[0] == "T", "a diagnosis must not change what it looks at"
    assert waiting.alive()
    assert [path.name for path in (tmp_path / "diagnosis").iterdir()] == ["epoch-3-hang"]
    _check_contents(files)


def _check_contents(files: dict[str, str]) -> None:
    told = json.loads(files["diagnosis.json"])
    assert told["causes"][0]["cause"] == "stopped from outside"
    assert {"likelihood", "evidence", "todo"} <= set(told["causes"][0])
    assert (told["pool"], told["epoch"], told["action"]) == ("nvidia", 3, "fall back to 'ascend'")
    assert [r["rank"] for r in told["ranks"]] == [0, 1]
    events = [json.loads(line) for line in files["journal.jsonl"].splitlines()]
    assert [event["event"] for event in events] == ["train.join", "train.join", "train.fault"]
    about = json.loads(files["environment.json"])
    assert about["variables"]["OMP_NUM_THREADS"] == "1"
    assert about["doctor"]["machine"]["cores"] > 0
    assert about["disk_bytes"]
    assert "1. stopped from outside (certain)" in files["README.txt"]
    assert "fall back to 'ascend'" in files["README.txt"]
    for name, text in files.items():
        hidden = [*SECRETS.values(), "sesame-open", "0123456789abcdef0123456789abcdef", "NOBODY_KNOWS_THIS"]
        assert [value for value in hidden if value in text] == [], name
    assert all(kept in files["logs/rank-0.log"] for kept in KEPT)


def test_a_worker_that_takes_no_signal_is_left_alone(start: Start, tmp_path: Path) -> None:
    worker = start("ignore")
    found = diagnose(tmp_path, as_facts("hang", tmp_path / "j", worker), "stop")
    assert worker.alive()
    assert found.causes[0].cause == "one rank hangs"
    assert found.folder is not None
    assert (found.folder / "stacks/rank-0.proc.txt").exists()
    assert any("rank 0: it does not answer SIGUSR1" in note for note in found.notes)
    assert "does not answer SIGUSR1" in (found.folder / "README.txt").read_text()


def test_a_crashed_worker(start: Start, tmp_path: Path) -> None:
    worker = start("crash", wait=False)
    assert worker.wait(60) == -signal.SIGSEGV
    found = diagnose(tmp_path, as_facts("killed", tmp_path / "j", worker), "start again")
    assert found.causes[0].cause == "a crash in native code"
    assert "SIGSEGV" in found.causes[0].evidence[0]
    assert found.folder is not None
    assert "Segmentation fault" in (found.folder / "logs/rank-0.log").read_text()
    assert not (found.folder / "stacks").exists()


def test_py_spy_is_used_where_it_is(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it, which can look into one of the two processes."""
    good, bad = start("answer"), start("answer")
    spy = tmp_path / "bin" / "py-spy"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\n[ "$4" = {good.pid} ] || exit 1\necho "spied $1 $2 $3 $4"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    texts = stacks.collect(as_facts("hang", tmp_path / "j", good, bad), Seen(states={0: "S", 1: "S"}), [])
    assert texts["rank-0.txt"] == f"spied dump --nonblocking --pid {good.pid}\n"
    assert "stand_in_a_named_function" in texts["rank-1.txt"]


def test_stacks_that_a_worker_wrote_are_taken(tmp_path: Path) -> None:
    """A worker elsewhere, which was asked over its line."""
    (tmp_path / "s").write_text("in reduce")
    far = rank(0, here=False, stacks=tmp_path / "s")
    assert stacks.collect(facts("hang", far), Seen(), []) == {"rank-0.txt": "in reduce"}


# ---------------------------------------------------------------- nothing must fail


def simple(tmp_path: Path) -> Facts:
    (tmp_path / "w.log").write_text("last words\n")
    return facts(
        "killed", rank(0, -9, log=tmp_path / "w.log"), rank(1, 70, log=tmp_path / "none"), journal=tmp_path / "j"
    )


def test_missing_parts_are_noted(tmp_path: Path) -> None:
    found = diagnose(tmp_path, simple(tmp_path), "stop")
    assert found.folder is not None
    assert any("rank-1.log: FileNotFoundError" in note for note in found.notes)
    assert any("the journal" in note for note in found.notes)
    assert (found.folder / "logs/rank-0.log").read_text() == "last words\n"
    assert set(found.notes) <= set(json.loads((found.folder / "diagnosis.json").read_text())["notes"])


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (observe, "classify"), (observe, "kernel"), (observe, "memory"), (observe, "disks"), (observe, "repeats"),
        (stacks, "collect"), (writer, "_environment"), (writer, "_tail"), (writer, "readme"), (redact, "environment"),
    ],
)  # fmt: skip
def test_a_part_that_fails_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(place, name, fail)
    case = simple(tmp_path)
    Journal(case.journal).append("x")
    found = diagnose(tmp_path, case, "stop")
    assert found.causes[0].cause == "killed from outside, or by the kernel"
    if name == "_tail":  # it reads the journal too
        assert found.folder is None or found.notes
    else:
        assert found.folder is not None
    assert any("broken" in note for note in found.notes)


@pytest.mark.parametrize(
    ("place", "name"), [(writer, "observe"), (writer, "causes"), (redact, "secrets"), (redact, "data")]
)
def test_where_all_fails_there_is_still_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(place, name, fail)
    found = diagnose(tmp_path, simple(tmp_path), "stop")
    assert found.causes
    assert any("broken" in note for note in found.notes)
    assert not list(tmp_path.glob("diagnosis/.*"))


def test_nothing_unredacted_is_written_where_redaction_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(redact, "text", fail)
    diagnose(tmp_path, simple(tmp_path), "stop")
    assert not any("last words" in text for text in everything(tmp_path / "diagnosis").values())


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the `number`-th of the writes, flushes and renames fail as on a full disk; what was tried."""
    tried: list[str] = []

    def wrap(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            tried.append(name)
            if len(tried) == number:
                raise OSError(28, "No space left on device")
            return act(*args, **more)

        return counted

    monkeypatch.setattr(Path, "write_bytes", wrap("write", Path.write_bytes))
    monkeypatch.setattr(Path, "mkdir", wrap("mkdir", Path.mkdir))
    monkeypatch.setattr(writer, "fsync", wrap("fsync", writer.fsync))
    monkeypatch.setattr(writer.os, "rename", wrap("rename", os.rename))
    return tried


def test_a_disk_that_is_full_at_any_moment(tmp_path: Path) -> None:
    """Whichever write is the first to fail: no folder or a whole one, nothing left over, nothing raised."""
    case = simple(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        tried = fail_at(patch, 0)
        whole = everything(diagnose(tmp_path / "ok", case, "stop").folder or Path())
    assert tried.count("write") == len(whole)
    for number in range(1, len(tried) + 1):
        run = tmp_path / f"run-{number}"
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, number)
            found = diagnose(run, case, "stop")
        assert found.causes[0].cause == "killed from outside, or by the kernel"
        left = [path.name for path in (run / "diagnosis").iterdir()] if (run / "diagnosis").exists() else []
        last = number == len(tried)  # the flush after the rename
        assert left == (["epoch-3-killed"] if last else [])
        assert (found.folder is None) != last
        assert last or any("No space left" in note for note in found.notes)
    assert set(everything(run / "diagnosis/epoch-3-killed")) == set(whole)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "fill").write_bytes(bytes(60 << 10))
        found = diagnose(disk, simple(tmp_path), "stop")
        assert found.folder is None
        assert found.causes
        assert not list(disk.glob("diagnosis/*")) + list(disk.glob("diagnosis/.*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folders_are_never_overwritten_and_remains_go(tmp_path: Path) -> None:
    case = simple(tmp_path)
    (tmp_path / "diagnosis/.epoch-2-hang.part").mkdir(parents=True)
    names = [(diagnose(tmp_path, case, "stop").folder or Path()).name for _ in range(3)]
    assert names == ["epoch-3-killed", "epoch-3-killed-2", "epoch-3-killed-3"]
    assert not list(tmp_path.glob("diagnosis/.*"))


def test_a_name_cannot_lead_elsewhere(tmp_path: Path) -> None:
    found = diagnose(tmp_path, replace(simple(tmp_path), kind="../../x"), "stop")
    assert found.folder == tmp_path / "diagnosis" / "epoch-3-------x"


def test_the_end_of_long_files(tmp_path: Path) -> None:
    case = simple(tmp_path)
    log = case.ranks[0].log
    assert log is not None
    log.write_text("".join(f"line {i}\n" for i in range(50_000)))
    journal = Journal(case.journal)
    for step in range(300):
        journal.append("train.step", step=step)
    with case.journal.open("a") as file:
        file.write('{"torn": ')
    found = diagnose(tmp_path, case, "stop")
    assert found.folder is not None
    text = (found.folder / "logs/rank-0.log").read_text()
    assert text.startswith("line ")
    assert text.endswith("line 49999\n")
    assert len(text) <= writer.LOG_BYTES
    events = [json.loads(line) for line in (found.folder / "journal.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == list(range(300 - writer.EVENTS, 300))


def test_within() -> None:
    assert within(60, lambda: 3) == 3
    with pytest.raises(TimeoutError):
        within(0.01, lambda: time.sleep(60))
    with pytest.raises(DataError):
        within(60, lambda: (_ for _ in ()).throw(DataError("x")))


# ---------------------------------------------------------------- what the machine says


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/self/cgroup": "4:memory:/a/b\n0::/\n",
          "sys/fs/cgroup/memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}, 4),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        ({"proc/self/cgroup": "0::/job\n"}, None),
        ({"proc/self/cgroup": "nonsense\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_oom_kills(tmp_path: Path, files: dict[str, str], count: int | None) -> None:
    assert observe.oom_kills(tree(tmp_path, files)) == count


def test_process(tmp_path: Path) -> None:
    tree(tmp_path, {"7/stat": "7 (a) b) c) D 1 2 3", "7/wchan": "io_schedule", "8/stat": "8 (x) R 1", "8/wchan": "0"})
    assert observe.process(7, tmp_path) == ("D", "io_schedule")
    assert observe.process(8, tmp_path) == ("R", "")
    assert observe.process(9, tmp_path) == ("", "")
    assert "(No such file" in observe.describe(7, tmp_path)


def test_catches(tmp_path: Path) -> None:
    tree(tmp_path, {"7/status": "Name:\tx\nSigCgt:\t0000000000000200\n", "8/status": "SigCgt:\t0000000180000002\n"})
    assert observe.catches(7, signal.SIGUSR1, tmp_path)
    assert not observe.catches(8, signal.SIGUSR1, tmp_path)
    assert not observe.catches(9, signal.SIGUSR1, tmp_path)


def test_lines_of_the_kernel() -> None:
    lines = ["[    1.0] usb 1-1: new device", f"[ 4082.652588] {OOM_LINE}", "[ 5.0] mce: [Hardware Error]: CPU 3"]
    assert observe.chosen(lines) == (OOM_LINE, "mce: [Hardware Error]: CPU 3")
    assert observe.chosen([f"[ 1.0] Killed process {i} (x)" for i in range(99)])[-1] == "Killed process 98 (x)"


def test_repeats() -> None:
    fault: dict[str, Any] = {"event": "train.fault", "kind": "nan", "step": 5, "message": "m"}
    assert observe.repeats([]) == 0
    assert observe.repeats([fault, {"event": "train.step"}, fault]) == 2
    assert observe.repeats([fault, {**fault, "step": 6}]) == 1


def test_platforms_read_the_words() -> None:
    case = facts("error", rank(0, 70, message="CUDA out of memory"), rank(1, 70, message=PEER), platform="cuda")
    assert observe.classify(case) == {0: "out_of_memory", 1: "collective"}
    assert [cause.cause for cause in causes(case, Seen(faults=observe.classify(case)))] == [
        "out of memory",
        "a lost peer",
    ]


def test_an_answer_is_small() -> None:
    """What a supervisor keeps of it can be put into an event."""
    found = Diagnosis(tuple(causes(facts("killed", *KILLED))), None, ())
    assert json.dumps(redact.data(found))
    assert rules.TODO["unknown"]
