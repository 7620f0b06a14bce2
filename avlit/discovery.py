"""Which recipes there are: the yaml files under `recipes/`. There is no registry; a folder is enough."""

from pathlib import Path
from typing import Any

from avlit.errors import ConfigError
from avlit.settings import nearest, read_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def recipe_paths(root: Path = RECIPES) -> dict[str, Path]:
    """Recipe key -> yaml. `mtv/stage3.yaml` is `mtv_stage3`; a yaml named as its folder is the folder's name alone."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/*.yaml")):
        folder, stem = path.parent.name, path.stem
        key = folder if stem == folder else f"{folder}_{stem}"
        if key in found:
            raise ConfigError(f"recipe={key}: both {found[key]} and {path} have this name; rename one of them")
        found[key] = path
    return found


def recipe_keys(root: Path = RECIPES) -> list[str]:
    """What `recipe=` can be, sorted."""
    return list(recipe_paths(root))


def recipe_path(key: str, root: Path = RECIPES) -> Path:
    """The yaml of a recipe; ConfigError with the nearest key where there is none."""
    paths = recipe_paths(root)
    if key in paths:
        return paths[key]
    inside = [name for name, path in paths.items() if path.parent.name == key]
    if inside:
        raise ConfigError(f"recipe={key}: has several stages, choose one of {', '.join(inside)}")
    near = nearest(key, list(paths))
    raise ConfigError(f"recipe={key}: no such recipe; {f'did you mean {near}?' if near else listing(paths)}")


def listing(paths: dict[str, Path]) -> str:
    """The known keys as part of a message."""
    return f"there are {', '.join(paths)}" if paths else "there are none"


def recipe_folder(key: str, root: Path = RECIPES) -> Path:
    """The folder of a recipe's paper."""
    return recipe_path(key, root).parent


def recipe_module(key: str, root: Path = RECIPES) -> str:
    """The dotted name of the module with the recipe's `build`."""
    return f"recipes.{recipe_folder(key, root).name}.recipe"


def recipe_yaml(key: str, root: Path = RECIPES) -> tuple[dict[str, Any], str]:
    """A recipe's own values and the name of their file for messages."""
    path = recipe_path(key, root)
    return _read(path, root)


def curriculum_keys(paper: str, root: Path = RECIPES) -> list[str]:
    """The stages of a paper (a folder of `recipes/`) by the `order:` of their yaml files, which starts at 1."""
    paths = recipe_paths(root)
    stages: dict[int, str] = {}
    for key, path in paths.items():
        if path.parent.name != paper:
            continue
        values, source = _read(path, root)
        order = values.get("order")
        if not isinstance(order, int) or order < 1 or order in stages:
            taken = f"; {stages[order]} has it too" if order in stages else ""
            raise ConfigError(f"order={order} ({source}): a stage of a curriculum needs its own place from 1 on{taken}")
        stages[order] = key
    if not stages:
        papers = sorted({path.parent.name for path in paths.values()})
        near = nearest(paper, papers) if paper not in paths else paths[paper].parent.name
        raise ConfigError(
            f"recipe={paper}: a curriculum is named by its paper; "
            + (f"did you mean {near}?" if near else f"there are {', '.join(papers)}")
        )
    return [stages[order] for order in sorted(stages)]


def size_yaml(key: str, size: str, root: Path = RECIPES) -> list[tuple[dict[str, Any], str]]:
    """The layers of a size for one recipe: the file's values, then its `stages:` entry for this stage, if any."""
    recipe = recipe_path(key, root)
    sizes = {path.stem: path for path in sorted((recipe.parent / "sizes").glob("*.yaml"))}
    if size not in sizes:
        raise ConfigError(f"size={size}: must be one of {', '.join(sizes) or '(none exist)'}")
    values, source = _read(sizes[size], root)
    stages = values.pop("stages", {})
    known = [path.stem for path in recipe_paths(root).values() if path.parent == recipe.parent]
    for name, inner in stages.items() if isinstance(stages, dict) else [(stages, None)]:
        if name not in known or not isinstance(inner, dict):
            raise ConfigError(f"stages.{name} ({source}): must be one of {', '.join(known)} with `key: value` lines")
    own = stages.get(recipe.stem)
    return [(values, source)] + ([(own, f"{source}, stages.{recipe.stem}")] if own else [])


def _read(path: Path, root: Path) -> tuple[dict[str, Any], str]:
    source = str(path.relative_to(root.parent))
    return read_yaml(path.read_text(encoding="utf-8"), source), source
