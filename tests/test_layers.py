"""Imports go one way: recipes -> callbacks, data -> avlit, and commands alone put them together."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("avlit", "callbacks", "data", "recipes")


def modules_of(root: Path) -> dict[str, str]:
    """Dotted module -> source of every file of the four packages."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def imports_of(module: str, source: str) -> set[str]:
    """Dotted names that a module imports anywhere in it; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def forbidden(module: str) -> list[str]:
    """Packages that a module must not import."""
    if is_inside(module, "avlit.commands"):
        return []
    if is_inside(module, "avlit"):
        return ["recipes", "data", "callbacks", *([] if module == "avlit.__main__" else ["avlit.commands"])]
    if is_inside(module, "data"):
        return ["recipes", "callbacks", "avlit.commands"]
    if is_inside(module, "callbacks"):
        return ["recipes", "avlit.commands"]
    return ["avlit.commands"]


def violations(modules: dict[str, str]) -> list[str]:
    """`module imports name` for every import against the rules."""
    found = []
    for module, source in modules.items():
        own = ".".join(module.split(".")[:2])
        for name in sorted(imports_of(module, source)):
            is_other_recipe = is_inside(module, "recipes") and is_inside(name, "recipes") and not is_inside(name, own)
            is_mlflow = is_inside(name, "mlflow") and not is_inside(module, "avlit.tracking")
            if is_other_recipe or is_mlflow or any(is_inside(name, package) for package in forbidden(module)):
                found.append(f"{module} imports {name}")
    return found


def test_imports_go_one_way():
    modules = modules_of(REPOSITORY)
    assert {module.split(".")[0] for module in modules} == set(PACKAGES)
    assert violations(modules) == []


def test_each_rule_is_enforced():
    wrong = {
        "avlit.module": "def build():\n    from data.datamodule import AVDataModule",
        "avlit.sampling": "import recipes.mtv.recipe",
        "avlit.metrics.lip_sync": "from avlit.commands import train",
        "data.loader": "from callbacks.ema import EMA",
        "callbacks.ema": "import mlflow.tracking",
        "recipes.mtv.recipe": "from recipes import jova",
        "recipes.jova.recipe": "from ..mtv.recipe import MTV",
    }
    assert len(violations(wrong)) == len(wrong)


def test_what_the_rules_allow_passes():
    right = {
        "avlit.commands.train": "from data.datamodule import AVDataModule\nimport callbacks.ema, recipes.mtv.recipe",
        "avlit.tracking": "import mlflow",
        "callbacks.samples": "from avlit.module import AVModule",
        "recipes.mtv.recipe": "from recipes.mtv.config import MTVConfig\nfrom .keyframes import keyframe_mask",
        "avlit.data_rates": "import dataclasses, database",
    }
    assert violations(right) == []
