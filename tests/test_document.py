"""Recipes: positions, types, overrides. Every message is compared whole."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ottava import document, stages
from ottava.errors import OttavaError, RecipeError
from ottava.recipe import Fleet, Pool, load_recipe

GOOD = """\
name: t
fleet: f
stages:
  label:
    audit: 60
  train:
    steps: 200
    direct: {begin: 0.3}
"""
FLEET = "name: f\npools:\n  - name: a\n  - name: b\n    workers: 2\n"


def load(folder: Path, text: str, sets: tuple[str, ...] = (), fleet: str = FLEET):  # type: ignore[no-untyped-def]
    (folder / "r.yaml").write_text(text)
    (folder / "f.yaml").write_text(fleet)
    return load_recipe(folder / "r.yaml", stages.specs(), sets)


DEEP = "nest less, and put no alias (*x) inside what it names (&x)"
CASES = {
    "misspelt key": (
        GOOD.replace("steps: 200", "stpes: 200"),
        (),
        "error: unknown key 'stpes'\n  where: r.yaml:7:5\n  mend:  did you mean 'steps'?",
    ),
    "misspelt key inside": (
        GOOD.replace("begin", "beginn"),
        (),
        "error: unknown key 'beginn'\n  where: r.yaml:8:14\n  mend:  did you mean 'begin'?",
    ),
    "wrong type": (
        GOOD.replace("200", "many"),
        (),
        "error: steps: input should be a valid integer, unable to parse string as an integer, found 'many'\n"
        "  where: r.yaml:7:12",
    ),
    "out of range": (
        GOOD.replace("0.3", "1.5"),
        (),
        "error: direct.begin: input should be less than or equal to 1, found 1.5\n  where: r.yaml:8:21",
    ),
    "unknown stage": (
        GOOD.replace("train:", "trane:"),
        (),
        "error: unknown stage 'trane'\n  where: r.yaml:6:3\n  mend:  did you mean 'train'?",
    ),
    "missing key": (
        GOOD.replace("fleet: f\n", ""),
        (),
        "error: the key 'fleet' is missing\n  where: r.yaml:1:1\n  mend:  add 'fleet' with its value",
    ),
    "no such fleet": (
        GOOD.replace("fleet: f", "fleet: g"),
        (),
        "error: no such fleet 'g'\n  where: r.yaml:2:8\n  mend:  name a file: beside the "
        "recipe, in ../fleets from there, in the working folder, or in fleets/ of that",
    ),
    "key twice": (
        GOOD + "name: u\n",
        (),
        "error: the key 'name' stands twice\n  where: r.yaml:9:1\n  mend:  keep one of them",
    ),
    "not YAML": (
        "name: [a\n",
        (),
        "error: not valid YAML: expected ',' or ']', but got '<stream end>'\n  where: r.yaml:2:1",
    ),
    "no mapping": (
        "- a\n",
        (),
        "error: the file is not a mapping of keys to values\n  where: r.yaml\n"
        "  mend:  write `key: value` lines, as in recipes/tiny.yaml",
    ),
    "empty": (
        "# nothing\n",
        (),
        "error: the file is empty\n  where: r.yaml\n  mend:  write `key: value` lines, as in recipes/tiny.yaml",
    ),
    "deep": (
        "a: " + "[" * 3000 + "]" * 3000,
        (),
        f"error: nested more than 50 deep\n  where: r.yaml:1:53\n  mend:  {DEEP}",
    ),
    "endless": (
        "name: t\na: &x [*x]\n",
        (),
        f"error: nested more than 50 deep\n  where: r.yaml:2:4\n  mend:  {DEEP}",
    ),
    "key that is no word": (
        GOOD + "? [a, b]\n: 1\n",
        (),
        "error: a key is a list or a mapping\n  where: r.yaml:9:3\n  mend:  write a word as the key",
    ),
    "name of another folder": (
        GOOD.replace("name: t", "name: ../../evil"),
        (),
        "error: name: a name has letters, digits, '.', '_' and '-' only, and begins with a letter or digit, "
        "found '../../evil'\n  where: r.yaml:1:7",
    ),
    "not a number": (
        GOOD.replace("0.3", "nan"),
        (),
        "error: direct.begin: input should be a finite number, found 'nan'\n  where: r.yaml:8:21",
    ),
    "endless work": (
        GOOD.replace("audit: 60", "answers: 100000000"),
        (),
        "error: answers: input should be less than or equal to 1000000, found 100000000\n  where: r.yaml:5:14",
    ),
    "set of a misspelt stage": (
        GOOD,
        ("trian.steps=3",),
        "error: unknown key 'trian'\n  where: --set trian.steps=3\n  mend:  did you mean 'train'?",
    ),
    "set inside a misspelt key": (
        GOOD,
        ("train.dirct.begin=0",),
        "error: unknown key 'dirct'\n  where: --set train.dirct.begin=0\n  mend:  did you mean 'direct'?",
    ),
    "no stages": (
        "name: t\nfleet: f\n",
        (),
        f"error: the recipe has no stages\n  where: r.yaml:1:1\n  mend:  known: {', '.join(stages.ORDER)}",
    ),
    "stage without mapping": (
        GOOD.replace("    audit: 60\n", "").replace("label:", "label: 3"),
        (),
        "error: expected a mapping, found 3\n  where: r.yaml:4:10",
    ),
    "set of nothing": (
        GOOD,
        ("train.steps",),
        "error: an assignment is written key.key=value\n  where: --set train.steps\n"
        "  mend:  e.g. --set train.steps=200",
    ),
    "set of a wrong key": (
        GOOD,
        ("train.stepz=3",),
        "error: unknown key 'stepz'\n  where: --set train.stepz=3\n  mend:  did you mean 'steps'?",
    ),
    "set of a wrong type": (
        GOOD,
        ("train.steps=x",),
        "error: steps: input should be a valid integer, unable to parse string as an integer, found 'x'\n"
        "  where: --set train.steps=x",
    ),
    "unknown pool": (
        GOOD.replace("audit: 60", "audit: 60\n    pool: c"),
        (),
        "error: the fleet 'f' has no pool 'c'\n  where: r.yaml:6:11\n  mend:  known: a, b",
    ),
    "shards": (
        GOOD + "    virtual_shards: 3\n",
        (),
        "error: train: virtual_shards must be a power of two\n  where: r.yaml:7:5",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, sets, expected = CASES[case]
    with pytest.raises(RecipeError) as error:
        load(Path(), text, sets)
    assert error.value.render() == expected


def test_fleet_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"workers must be a power of two"):
        load(Path(), GOOD, fleet=FLEET.replace("workers: 2", "workers: 3"))
    with pytest.raises(RecipeError, match=r"two pools have the same name"):
        load(Path(), GOOD, fleet=FLEET.replace("name: b", "name: a"))
    with pytest.raises(RecipeError, match=r"a name has letters"):
        load(Path(), GOOD, fleet=FLEET.replace("name: b", "name: .."))
    (tmp_path / "f.yaml").write_text(FLEET.replace("workers: 2", "platform: cdua"))
    with pytest.raises(RecipeError) as unknown:
        load_recipe("r.yaml", stages.specs(), platforms=["cpu", "cuda"])
    assert unknown.value.render() == (
        "error: unknown platform 'cdua'\n  where: f.yaml:5:15\n  mend:  did you mean 'cuda'?"
    )


def test_what_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\n")
    for path, what in ((tmp_path, "this is a folder"), (tmp_path / "r.yaml", "not text in UTF-8")):
        with pytest.raises(RecipeError, match=what) as error:
            document.read(path)
        assert error.value.where == str(path)
        assert error.value.fix


def test_missing_file() -> None:
    with pytest.raises(RecipeError) as error:
        document.read("nowhere.yaml")
    assert error.value.render() == "error: no such file\n  where: nowhere.yaml\n  mend:  check the path"


def test_good(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, ("train.steps=300", "seed=5", "label.pool=b"))
    assert list(recipe.stages) == ["label", "train"]
    assert (recipe.stages["train"].steps, recipe.seed, recipe.stages["label"].pool) == (300, 5, "b")  # type: ignore[attr-defined]
    assert recipe.digest != load(tmp_path, GOOD).digest
    assert load(tmp_path, GOOD).digest == load(tmp_path, GOOD + "# a comment\n").digest


def test_shipped_files() -> None:
    root = Path(__file__).parent.parent
    for path in sorted((root / "recipes").glob("*.yaml")):
        assert load_recipe(path, stages.specs()).stages
    for path in sorted((root / "fleets").glob("*.yaml")):
        file = document.read(path)
        if "pools" in file.data and "kind" not in file.data:  # other kinds of file have their own tests
            assert file.parse(Fleet).pools


SCALARS = (
    "1e-5",
    "1.5",
    "-3",
    "+4",
    ".5",
    "5.",
    "1e3",
    "0x10",
    "no",
    "yes",
    "on",
    "true",
    "null",
    "~",
    "''",
    "'1'",
    "a b",
)


@pytest.mark.parametrize(
    ("text", "value"),
    list(
        zip(
            SCALARS,
            (1e-5, 1.5, -3, 4, 0.5, 5.0, 1000.0, "0x10", "no", "yes", "on", True, None, None, "", "1", "a b"),
            strict=True,
        )
    ),
)
def test_scalars(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"x: {text}\n")
    found = document.read(tmp_path / "s.yaml").data["x"]
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**12), 10**12) | st.booleans())
def test_python_numbers_survive(value: float) -> None:
    text = {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert document._scalar(node) == value


@given(st.text(max_size=60))
def test_any_text_gives_a_recipe_error_or_data(text: str) -> None:
    with contextlib.suppress(OttavaError):
        document._plain(document._compose(text, "t"), "t", {}, {}, ())


def test_pool_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Pool(name="a").workers = 2  # type: ignore[misc]
