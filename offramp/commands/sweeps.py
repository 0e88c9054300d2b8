"""Sweeps: which runs a grid of recipes, variants and seeds comes to, as short TOML files say it.

Nothing is trained here; `sweep_run.py` does that.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp.commands.benchmark import BenchOptions
from offramp.commands.recipes import RECIPES, Recipe, load_recipe, recipe_names, recipe_path, toml_from_file
from offramp.errors import OptionError
from offramp.models.options import check_names, nearest, options_from_dict
from offramp.models.plan import check_at_least
from offramp.tuning.certify import CertifyOptions

SWEEPS = RECIPES / "sweeps"
_UNSAFE = re.compile(r"[^\w.,=+\[\]-]+")  # in names of folders


@dataclass(frozen=True)
class Variant:
    """A recipe with changes: `set` by dotted name, as `offramp train --set` has them, after `without` is left out.

    `recipe` is another one than the sweep's. `teacher` is the variant whose checkpoint, of the same seed and grid
    point, the stages with a teacher_weight learn from.
    """

    recipe: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    teacher: str = ""


@dataclass(frozen=True)
class Measure:
    """How the runs of a sweep are exported, calibrated and timed. Raises OptionError.

    `precision` is what is exported, `bench.precision` what runs. At most so many rows of each split are recorded; 0:
    all. Calibrated is on validation, everything else is about test.
    """

    precision: str = "fp32"
    validation_rows: int = 0
    test_rows: int = 0
    calibrate: CertifyOptions = field(default_factory=CertifyOptions)
    bench: BenchOptions = field(default_factory=lambda: BenchOptions(batch_sizes=(1, 32)))

    def __post_init__(self) -> None:
        for name in ("validation_rows", "test_rows"):
            check_at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Sweep:
    """A grid of runs: every variant, with every combination of the grid's values, with every seed. Raises OptionError.

    `grid` has the values to try, by dotted name.
    """

    name: str
    recipe: str
    variants: Mapping[str, Variant]
    summary: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    measure: Measure = field(default_factory=Measure)

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) != len(self.seeds):
            raise OptionError(f"{self.name}: got seeds {self.seeds}, expected different numbers from 0, at least one")
        if not self.variants:
            raise OptionError(f"{self.name}: got no variants, expected at least one [variant.NAME]")
        for name, variant in self.variants.items():
            if variant.teacher and variant.teacher not in self.variants:
                raise OptionError(
                    f"variant {name}: got teacher {variant.teacher!r}, {nearest(variant.teacher, self.variants)}"
                )


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep; `teacher` is the name of the run that it learns from, "" for none of the sweep."""

    variant: str
    point: str  # of the grid, "" without one
    seed: int
    recipe: Recipe
    teacher: str = ""

    @property
    def name(self) -> str:
        """Return where it lies in the sweep's folder."""
        return run_name(self.variant, self.point, self.seed)

    @property
    def group(self) -> str:
        """Return what its seeds have in common."""
        return "/".join(part for part in (self.variant, self.point) if part)


def run_name(variant: str, point: str, seed: int) -> str:
    """Return the name of one run: variant/point/seed-N."""
    return "/".join(part for part in (variant, point, f"seed-{seed}") if part)


def load_sweep(argument: str) -> Sweep:
    """Read the sweep that `argument` names: one of the package's, a recipe (a sweep of one variant), or a .toml file.

    A name that both have is the sweep's. Raises OptionError for names and values that are not known.
    """
    if argument.endswith(".toml"):
        path = recipe_path(argument)
    elif argument in sweep_names():
        path = SWEEPS / f"{argument}.toml"
    elif argument in recipe_names():
        path = recipe_path(argument)
    else:
        known = (*sweep_names(), *recipe_names())
        raise OptionError(f"sweep: got {argument!r}, {nearest(argument, known)}; or give the path of a .toml file")
    values = toml_from_file(path)
    if "recipe" not in values:
        return Sweep(path.stem, argument, {path.stem: Variant()}, str(values.get("summary", "")))
    return sweep_from_dict(path, values)


def sweep_names() -> tuple[str, ...]:
    """Return the names of the sweeps that come with the package."""
    return tuple(sorted(path.stem for path in SWEEPS.glob("*.toml")))


def sweep_from_dict(path: Path, values: Mapping[str, Any]) -> Sweep:
    """Build a sweep from what the TOML file at `path` says; a recipe's path there is relative to the file."""
    where = f"sweep {path}"
    check_names(values, ("summary", "recipe", "seeds", "variant", "grid", "measure"), where)
    seeds, variants = values.get("seeds", 3), values.get("variant", {})
    if not isinstance(variants, Mapping):
        raise OptionError(f"{where}: got variant {variants!r}, expected tables [variant.NAME]")
    made = {
        _checked_name(name): _beside(options_from_dict(Variant, table, f"{where}, [variant.{name}]"), path)
        for name, table in variants.items()
    }
    grid = values.get("grid", {})
    if not isinstance(grid, Mapping) or not all(isinstance(tried, list) and tried for tried in grid.values()):
        raise OptionError(f"{where}: got grid {grid!r}, expected lists of values by dotted name")
    recipe = _beside(Variant(str(values["recipe"])), path).recipe
    return Sweep(
        path.stem,
        recipe,
        made or {path.stem: Variant()},
        str(values.get("summary", "")),
        seeds_from(seeds),
        {name: tuple(tried) for name, tried in grid.items()},
        options_from_dict(Measure, values.get("measure", {}), f"{where}, [measure]"),
    )


def seeds_from(value: object) -> tuple[int, ...]:
    """Read seeds: a number of them, from 0 on, or a list. Raises OptionError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(range(value))
    if isinstance(value, list) and all(type(seed) is int for seed in value):
        return tuple(value)
    raise OptionError(f"seeds: got {value!r}, expected how many, such as 3, or a list of numbers")


def grid_from_text(text: str) -> tuple[str, tuple[Any, ...]]:
    """Read NAME=V1,V2 of --grid, values as TOML has them or else as texts. Raises OptionError."""
    name, sign, listed = text.partition("=")
    if not (name.strip() and sign and listed.strip()):
        raise OptionError(f"--grid: got {text!r}, expected NAME=V1,V2 such as stage.encoder_lr=2e-5,5e-5")
    try:
        values = tomllib.loads(f"values = [{listed}]")["values"]
    except tomllib.TOMLDecodeError:
        values = [value.strip() for value in listed.split(",")]
    return name.strip(), tuple(values)


def runs_of(sweep: Sweep) -> tuple[SweepRun, ...]:
    """Return all runs, a teacher before who learns from it. Raises OptionError for what recipes refuse."""
    runs = [
        _run(sweep, name, dict(zip(sweep.grid, point, strict=True)), seed)
        for point in itertools.product(*sweep.grid.values())
        for name in _teachers_first(sweep.variants)
        for seed in sweep.seeds
    ]
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise OptionError(f"{sweep.name}: {', '.join(sorted(twice))} is there twice; give different values")
    return tuple(runs)


def _run(sweep: Sweep, name: str, point: Mapping[str, Any], seed: int) -> SweepRun:
    variant = sweep.variants[name]
    overrides = {**variant.set, **point, "run.seed": seed}
    recipe = load_recipe(variant.recipe or sweep.recipe, overrides, variant.without)
    teacher = run_name(variant.teacher, point_name(point), seed) if variant.teacher else ""
    return SweepRun(name, point_name(point), seed, recipe, teacher)


def point_name(point: Mapping[str, Any]) -> str:
    """Return how a point of the grid is called: stage.encoder_lr=2e-05,model.window=32."""
    texts = (
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in point.items()
    )
    return _UNSAFE.sub("_", ",".join(texts))


def _teachers_first(variants: Mapping[str, Variant]) -> list[str]:
    """Names in their order, but a teacher before who learns from it; OptionError where they go in a circle."""
    ordered: list[str] = []

    def add(name: str, learners: Sequence[str]) -> None:
        if name in learners:
            raise OptionError(f"variants {', '.join(learners)} are each other's teachers; one must have none")
        if name not in ordered:
            if teacher := variants[name].teacher:
                add(teacher, (*learners, name))
            ordered.append(name)

    for name in variants:
        add(name, ())
    return ordered


def _beside(variant: Variant, path: Path) -> Variant:
    """The variant, a relative path of its recipe taken from where the sweep's file lies."""
    if not variant.recipe.endswith(".toml"):
        return variant
    return replace(variant, recipe=str(path.parent / variant.recipe))


def _checked_name(name: str) -> str:
    if not name or _UNSAFE.search(name) or name.startswith("."):
        raise OptionError(f"variant {name!r}: expected a name of letters, digits, - and _")
    return name
