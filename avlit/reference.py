"""Reference curves: the held-out losses that each recipe had at `tiny` over several seeds, and where a run stands.

`recipes/PAPER/reference.json` holds them by recipe key; `just reference` writes it from finished runs. A reference is
of settings: every config key that decides a curve, and those of the runs whose weights it begins with. Code and
libraries are not among them: whether they have moved a curve is what a reference is there to tell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from avlit.comparison.differences import PLACES
from avlit.comparison.measures import number
from avlit.comparison.subject import config_of
from avlit.config import load_config, to_yaml
from avlit.discovery import RECIPES, recipe_folder
from avlit.errors import UserError
from avlit.provenance import Provenance
from avlit.runs import Run, find_run
from avlit.settings import as_word, flatten, read_yaml

FILE = "reference.json"
SIZE = "tiny"
WEIGHTS_AND_DATA = ("data.root", "model.weights", "codecs.*_weights")
NOT_DECIDING = (
    *(key for key in PLACES if key not in WEIGHTS_AND_DATA), "seed", "sample.*", "strategy.*", "attention", "compile",
    "data.max_bad", "train.accelerator", "train.devices", "train.accumulate", "train.max_*", "train.on_nonfinite",
)  # fmt: skip
"""Config keys on which no held-out loss of a step depends, but for rounding and the seed."""
ALONE = " from scratch"
"""After a recipe's name: the reference of runs that begin from nothing, where the other is of a curriculum's stage."""
LIKELY = 0.95
"""Share of the runs of further seeds that would be called normal."""
LEAST_SPREAD = 0.005
"""Of the mean: a few seeds agree better than that by chance, and other hardware rounds otherwise."""
MOST_KEYS = 3


@dataclass(frozen=True)
class ReferenceCurve:
    """A held-out loss over seeds, by step. spread: standard deviations, empty of one seed."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What the held-out losses of a recipe were.

    settings: by config key, all that decide a curve. begins_with: what weights, "" for none, see `beginning`.
    made_with: hardware, commits, corpus and libraries by name. curves: by metric.
    """

    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    begins_with: str
    made_with: Mapping[str, str]
    curves: Mapping[str, ReferenceCurve]

    @property
    def within(self) -> float:
        """Spreads from the mean within which a run of another seed is, LIKELY; infinity of one seed.

        Student's prediction interval: few seeds say little on how far others may be.
        """
        count = len(self.seeds)
        return float(stdtrit(count - 1, (1 + LIKELY) / 2)) * math.sqrt(1 + 1 / count) if count > 1 else math.inf

    def judge(self, name: str, value: float, step: int) -> tuple[str, bool] | None:
        """In words how a held-out loss compares, and whether it is normal; None where nothing is known of the step."""
        curve = self.curves.get(name)
        if curve is None or step not in curve.steps:
            return None
        place = curve.steps.index(step)
        expected, seeds = curve.mean[place], f"{len(self.seeds)} seeds"
        text = f"{name} {number(value)} at step {step}"
        if not math.isfinite(value):
            return f"{text}: not normal (reference {number(expected)})", False
        if not curve.spread:
            change = value / expected - 1
            return f"{text}: {change:+.1%} to the reference {number(expected)}, whose one seed knows no spread", True
        spread = max(curve.spread[place], LEAST_SPREAD * abs(expected))
        known = f"reference {number(expected)} ± {number(spread, digits=2)}, {seeds}"
        distance = (value - expected) / spread
        if abs(distance) <= self.within:
            return f"{text}: normal ({known})", True
        side = "higher" if distance > 0 else "lower"
        return (
            f"{text}: {side} than normal, by {abs(distance):.1f} spreads ({known}; {LIKELY:.0%} of runs are within "
            f"{self.within:.1f})"
        ), False


@dataclass(frozen=True)
class Standing:
    """A run against the reference of its recipe. other: why they cannot be compared, in words, empty where they can.

    changed: what was otherwise when the reference was made, and may explain a loss that is not normal.
    """

    reference: Reference
    recipe: str
    other: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def warnings(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Of a measurement during training: what is not normal."""
        return [text for text, is_normal in self._judged(metrics, step) if not is_normal]

    def lines(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Of the last measurement: where each loss stands, or why that is not known."""
        if self.other:
            more = f"; and {len(self.other) - MOST_KEYS} more" if len(self.other) > MOST_KEYS else ""
            return [
                f"Whether these losses are normal is not known, the reference of {self.recipe} is of other settings: "
                f"{'; '.join(self.other[:MOST_KEYS])}{more}"
            ]
        judged = self._judged(metrics, step)
        lines = [text for text, _ in judged]
        if self.changed and not all(is_normal for _, is_normal in judged):
            lines.append(f"Since the reference was made, these have changed: {', '.join(self.changed)}")
        return lines

    def _judged(self, metrics: Mapping[str, float], step: int) -> list[tuple[str, bool]]:
        if self.other:
            return []
        whole = sorted(name for name in metrics if kind_of(name) == "")
        return [found for name in whole if (found := self.reference.judge(name, metrics[name], step))]


def kind_of(name: str) -> str | None:
    """ "" for a held-out loss of a modality, `noise`, `subset` or `task` for a part of it, None for anything else."""
    match name.split("/"):
        case ["val", "loss", _]:
            return ""
        case ["val", "loss", _, kind, _]:
            return kind
    return None


def reference_path(recipe: str, root: Path = RECIPES) -> Path:
    """Where the references of a recipe's paper are."""
    return recipe_folder(recipe, root) / FILE


def read_references(path: Path) -> dict[str, Reference]:
    """Recipe key -> reference, of those that the file has; none where there is no file. UserError: it is damaged."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: Reference(
                seeds=tuple(map(int, entry["seeds"])),
                settings=dict(entry["settings"]),
                begins_with=str(entry["begins_with"]),
                made_with={str(name): str(value) for name, value in entry["made_with"].items()},
                curves={name: _curve(values) for name, values in entry["curves"].items()},
            )
            for key, entry in entries.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); put it back, or remove it to train without it") from error


def _curve(values: Mapping[str, Sequence[float]]) -> ReferenceCurve:
    mean, spread = (tuple(map(float, values[name])) for name in ("mean", "spread"))
    curve = ReferenceCurve(tuple(map(int, values["steps"])), mean, spread)
    if len(curve.mean) != len(curve.steps) or len(curve.spread) not in (0, len(curve.steps)):
        raise ValueError("a curve has not as many values as steps")
    return curve


def key_of(run: Run, references: Mapping[str, Reference]) -> str:
    """The key of the reference that a run is held to: its recipe, or with ALONE for one that begins from nothing."""
    alone = run.recipe + ALONE
    return alone if run.init_checkpoint is None and alone in references else run.recipe


def settings_of(run: Run) -> dict[str, Any]:
    """The config values of a run that decide its held-out losses."""
    values = config_of(run).items()
    return {key: value for key, value in values if not any(fnmatch(key, pattern) for pattern in NOT_DECIDING)}


def run_before(run: Run) -> Run | None:
    """The run whose weights a run begins with, None of none. UserError: they are of no run that is there."""
    checkpoint = run.init_checkpoint
    if checkpoint is None:
        return None
    try:
        return find_run(run.path.parent, checkpoint.parents[1])
    except (UserError, IndexError) as error:
        raise UserError(f"run={run.id}: begins with {checkpoint}, which is of no run that is there") from error


def beginning(run: Run) -> str:
    """What weights a run begins with: `RECIPE, step-N, settings DIGEST`, which stands for all before as well.

    "" for none, or for released ones, which the settings name. UserError: see `run_before`.
    """
    before = run_before(run)
    if before is None:
        return ""
    made = json.dumps([settings_of(before), beginning(before)], sort_keys=True)
    step = Path(str(run.record().init_checkpoint)).name
    return f"{before.recipe}, {step}, settings {hashlib.sha256(made.encode()).hexdigest()[:12]}"


def differing(run: Run, references: Mapping[str, Reference], root: Path = RECIPES) -> list[str]:
    """`KEY=VALUE instead of VALUE` for each key that makes a run another than the reference of its recipe; empty: none.

    A key that the reference is too old to have counts with the value that the recipe gives it now.
    """
    reference, settings = references[key_of(run, references)], settings_of(run)
    now = flatten(read_yaml(to_yaml(load_config([f"recipe={run.recipe}", f"size={SIZE}"], root=root)), run.recipe))
    expected = {**now, **reference.settings}
    # What neither has by now is a key that was removed; an entry of a mapping that only one has is a difference.
    keys = dict.fromkeys([*settings, *(key for key in reference.settings if key in now)])
    lines = [
        f"{key}={as_word(settings.get(key))} instead of {as_word(expected.get(key))}"
        for key in keys
        if settings.get(key) != expected.get(key)
    ]
    return lines + _differing_before(run, references, root)


def _differing_before(run: Run, references: Mapping[str, Reference], root: Path) -> list[str]:
    expected = references[key_of(run, references)].begins_with
    try:
        own, before = beginning(run), run_before(run)
    except UserError:
        return [f"init={run.init_checkpoint}, of no run that is there"]
    if own == expected:
        return []
    if before and key_of(before, references) in references and expected.startswith(f"{before.recipe},"):
        if further := differing(before, references, root):
            return [f"init, a {before.recipe} with {further[0]}"]
        if own.rsplit(",", 1)[0] == expected.rsplit(",", 1)[0]:  # the same step; keys that came or went since
            return []
    return [f"init, {own or 'no trained weights'} instead of {expected or 'none'}"]


def standing(run: Run, root: Path = RECIPES) -> Standing | None:
    """A run that is trained, or was, against its recipe's reference; None where there is none for its size.

    UserError: the file of references is damaged.
    """
    if config_of(run).get("size") != SIZE:
        return None
    references = read_references(reference_path(run.recipe, root))
    key = key_of(run, references)
    if key not in references:
        return None
    made, reference = made_with(run), references[key]
    changed = [
        f"{name} ({was} then, {made[name]} now)"
        for name, was in reference.made_with.items()
        if name in made and made[name] not in was.split(", ")
    ]
    return Standing(reference, run.recipe, tuple(differing(run, references, root)), tuple(changed))


def made_with(run: Run) -> dict[str, str]:
    """Commit, corpus and libraries that a run was trained with, as far as its folder says."""
    made = Provenance.read(run.provenance_path, is_damage_allowed=True)
    if made is None:
        return {}
    corpus = {"corpus": made.data["corpus_source"][:12]} if "corpus_source" in made.data else {}
    return {"commit": made.revision[:10], **corpus, **made.versions}
