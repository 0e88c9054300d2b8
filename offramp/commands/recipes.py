"""Recipes: what `offramp train` trains, on what and how, as short TOML files.

Some come with the package (`offramp train --list`), others are the user's. Command-line options change single values.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp.errors import OptionError
from offramp.models.options import check_names, nearest, options_from_dict
from offramp.models.plan import Plan, RunOptions, Stage, check_at_least

RECIPES = Path(__file__).parent.parent / "recipes"
DEMO = "minilm-rotten-tomatoes"  # what is trained when no recipe is named
_TABLES = ("summary", "data", "model", "run", "stage", "teacher")


@dataclass(frozen=True)
class DataOptions:
    """What to learn from: a named data set or a .csv or .jsonl file. Raises OptionError.

    `path` is where a named data set lies that no package installs. Texts are cut to `max_length` tokens. `unlabelled`
    is "imdb" or a file of texts. `seed` shares a named data set out; a file is shared out by the run's seed. `limit`
    is the most rows to train on, 0 for all.
    """

    name: str = "rotten-tomatoes"
    path: str = ""
    max_length: int = 128
    unlabelled: str = ""
    seed: int = 1
    limit: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "limit"):
            check_at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what and how. `model` has its `kind`, `weights` to begin with, and options of its kind.

    `teacher` is the checkpoint of a model that stages with a teacher_weight learn from.
    """

    summary: str = ""
    data: DataOptions = field(default_factory=DataOptions)
    model: Mapping[str, Any] = field(default_factory=lambda: {"kind": "bert"})
    run: RunOptions = field(default_factory=RunOptions)
    stages: tuple[Stage, ...] = (Stage(),)
    teacher: str = ""

    @property
    def plan(self) -> Plan:
        """Return the part that the training loop reads."""
        return Plan(self.stages, self.run)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as TOML has it."""
        values = asdict(self)
        return {**{name: values[name] for name in _TABLES if name != "stage"}, "stage": list(values["stages"])}


def load_recipe(argument: str, overrides: Mapping[str, Any], without: Sequence[str] = ()) -> Recipe:
    """Read the recipe that `argument` names, its own or a .toml file, with values changed by dotted name.

    `data.limit` or `run.seed` is one value, `stage.epochs` that of every stage, `stage.0.epochs` of the first. Those in
    `without` are left out first, so that they have their defaults. Raises OptionError for names and values that are not
    known, with the nearest that is.
    """
    values = toml_from_file(recipe_path(argument))
    for name in without:
        _leave_out(values, name.split("."), name)
    for name, value in overrides.items():
        _override(values, name, value)
    return recipe_from_dict(values, f"recipe {argument}")


def recipe_path(argument: str) -> Path:
    """Return the file of a recipe; OptionError with the nearest name if there is none."""
    if argument.endswith(".toml"):
        if not Path(argument).is_file():
            raise OptionError(f"recipe {argument}: there is no such file")
        return Path(argument)
    if argument not in (names := recipe_names()):
        raise OptionError(f"recipe: got {argument!r}, {nearest(argument, names)}; or give the path of a .toml file")
    return RECIPES / f"{argument}.toml"


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))


def recipe_from_dict(values: Mapping[str, Any], where: str) -> Recipe:
    """Build a recipe from what TOML says; OptionError that says where for what is not known."""
    check_names(values, _TABLES, where)
    stages = values.get("stage", [{}])
    if not isinstance(stages, list | tuple) or not stages:
        raise OptionError(f"{where}: got stage {stages!r}, expected [[stage]] tables, at least one")
    model = values.get("model", {})
    if not isinstance(model, Mapping):
        raise OptionError(f"{where}: got model {model!r}, expected a table")
    return Recipe(
        str(values.get("summary", "")),
        options_from_dict(DataOptions, values.get("data", {}), f"{where}, [data]"),
        {"kind": "bert", **_tuples(model)},
        options_from_dict(RunOptions, values.get("run", {}), f"{where}, [run]"),
        tuple(options_from_dict(Stage, stage, f"{where}, [[stage]] {number}") for number, stage in enumerate(stages)),
        str(values.get("teacher", "")),
    )


def differences(first: Recipe, second: Recipe) -> list[str]:
    """Say in which values two recipes differ, the summary aside."""
    one, other = (_flat(replace(recipe, summary="").to_dict()) for recipe in (first, second))
    return [
        f"{name} = {one.get(name)!r}, not {other.get(name)!r}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def value_from_text(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as TOML has it or else as text; OptionError without the sign."""
    name, sign, value = text.partition("=")
    if not (sign and name.strip()):
        raise OptionError(f"--set: got {text!r}, expected NAME=VALUE such as run.seed=3 or stage.0.epochs=2")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def toml_from_file(path: Path) -> dict[str, Any]:
    """Read a recipe's or a sweep's values; OptionError if the file is not there or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise OptionError(f"reading {path}: {exc}; expected a TOML file") from exc


def _override(values: dict[str, Any], name: str, value: Any) -> None:
    """Set one value by its dotted name."""
    table, _, rest = name.partition(".")
    if table != "stage":
        _set(values, name.split("."), value, name)
        return
    stages = values.setdefault("stage", [{}])
    if not isinstance(stages, list):
        raise OptionError(f"{name}: got stage {stages!r}, expected [[stage]] tables")
    number, _, inner = rest.partition(".")
    if number.isdecimal() and int(number) >= len(stages):
        raise OptionError(f"{name}: got stage {number}, expected 0 to {len(stages) - 1}")
    chosen = [stages[int(number)]] if number.isdecimal() else stages
    for stage in chosen:
        _set(stage, (inner if number.isdecimal() else rest).split("."), value, name)


def _leave_out(table: Any, path: Sequence[str], name: str) -> None:
    """Take one value away, or that of every stage; OptionError where there is none."""
    if isinstance(table, list) and any(path[0] in entry for entry in table):
        for entry in table:
            if path[0] in entry:
                _leave_out(entry, path, name)
    elif not isinstance(table, dict) or path[0] not in table:
        raise OptionError(f"without {name}: the recipe has no {path[0]!r} there")
    elif len(path) == 1:
        del table[path[0]]
    else:
        _leave_out(table[path[0]], path[1:], name)


def _set(table: Any, path: Sequence[str], value: Any, name: str) -> None:
    if not isinstance(table, dict):
        raise OptionError(f"{name}: got {table!r}, expected a table with {path[0]}")
    if len(path) == 1:
        table[path[0]] = value
    else:
        _set(table.setdefault(path[0], {}), path[1:], value, name)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted name."""
    if isinstance(values, Mapping | list):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        found: dict[str, Any] = {}
        for name, value in items:
            found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
        return found
    return {prefix: values}
