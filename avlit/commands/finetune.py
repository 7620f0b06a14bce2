"""`just finetune`: from one's own clips to an adapter: prepares them, trains it, shows what it changed, exports it.

Everything but the preparation is what `just train`, `just sample` and `just export` do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from avlit.adapter_config import AdapterConfig
from avlit.commands.resume import resume
from avlit.commands.session import join_session
from avlit.commands.train import settle_init, train
from avlit.config import Config, ConfigError, DataConfig, from_yaml, load_config
from avlit.durable import write_atomically
from avlit.errors import UserError
from avlit.runs import Run, find_run
from avlit.settings import nearest, read_words
from data.prepare.config import WindowConfig

FORMATS = ("none", "peft", "diffusers", "comfyui")
OWN_WORDS = ("plan", "format", "replay", "data.cache_dir")
PREPARE = "prepare."
PLAN = "finetuning.json"
"""In the run's folder from its beginning: what is to be done once it is trained."""
CHANGES = "finetune.json"
"""In the run's folder: losses before and after, written once the clips of both are there."""
CARD = "README.md"
"""What an export writes last."""
SETS = {"own": "these clips", "heldout": "clips of them kept apart", "unrelated": "what the base was trained on"}
DEFAULTS = {"adapter": "lora", "data.subsets": "{}", "sample.sync_clips": "0"}
"""What differs from the recipe's own settings unless it is said; subsets: all that the clips are of."""
DEFAULTS_OF_SIZE = {
    "tiny": {
        "adapter.rank": "32", "optimizer.lr": "3e-3", "train.steps": "250", "checkpoint.every": "50",
        "validation.every": "100",
    },
    "": {"optimizer.lr": "1e-4", "train.steps": "2000", "checkpoint.every": "250", "validation.every": "250"},
}  # fmt: skip
"""The same by size, "" for any other: chosen; those of `tiny` are measured (README)."""


@dataclass(frozen=True)
class Finetuning:
    """What the words ask for. data.root of `config` is as given: a plain folder, or shards.

    prepare: keys of `just prepare`, those that both share included; said: those that were for it alone. replay: share
    of the batches that is clips which the base was trained on; None is the default where those can be had. format: of
    the export, `none` for none.
    """

    config: Config
    words: dict[str, str]
    prepare: dict[str, str]
    said: tuple[str, ...]
    replay: float | None
    format: str
    is_plan: bool
    cache: Path


def main(words: Sequence[str]) -> int:
    """`recipe=… init=RUN data.root=FOLDER` and any key of the config; `plan=true` says what would be done.

    `prepare.KEY=VALUE` is a word for the preparation, `replay=0.5` the share of clips that the base was trained on,
    `format=peft|diffusers|comfyui|none` the export.
    """
    if (status := join_session()) is not None:
        return status
    wanted = read_request(words)
    from avlit.commands import custom_clips

    refuse_export(wanted.config, wanted.format)
    root = Path(str(wanted.config.data.root))
    is_prepared = custom_clips.is_prepared(root)
    if is_prepared and wanted.said:
        raise ConfigError(f"prepare.{wanted.said[0]}: has no effect, data.root={root} holds shards; leave it out")
    rows = [] if is_prepared else custom_clips.clip_rows(wanted.config)
    if wanted.is_plan:
        from avlit.commands.finetune_plan import plan_lines

        print("\n".join(plan_lines(wanted, rows)))
        return 0
    shards = root if is_prepared else custom_clips.prepared(wanted.config, rows, wanted.prepare, cache=wanted.cache)
    if shards is None:
        return 1
    words_of_data = {"data.root": str(shards), **custom_clips.replayed(wanted, shards)}
    wanted = replace(wanted, config=load_config(as_words({**wanted.words, **words_of_data})))
    outcome = train(wanted.config, files={PLAN: json.dumps({"format": wanted.format}) + "\n"})
    if outcome.exit_status:
        return outcome.exit_status
    conclude(outcome.run, wanted.format)
    return 0


def refuse_export(config: Config, layout: str) -> None:
    """ConfigError where the adapter's export cannot be of this layout: known before anything is trained."""
    if layout == "none":
        return
    if config.adapter.kind == "own":
        raise ConfigError(
            f"format={layout}: adapter=own trains the recipe's own modules, which no other program has; take "
            "format=none"
        )
    if layout == "peft":
        return
    from avlit.adapters import target_layers
    from avlit.commands.estimate import drawn_module
    from avlit.commands.export import refuse_layers

    model: Any = drawn_module(replace(config, adapter=AdapterConfig())).model
    layers = target_layers(model, config.adapter, parts=config.adapter_parts)
    refuse_layers(layers, layout, class_name=type(model.backbone).__name__, word="adapter.modality")


def resume_finetuning(run: Run, words: Sequence[str], *, allow_change: bool = False) -> int:
    """Go on with a fine-tuning's run, as `resume` does, and do what is left once it is trained.

    UserError: it can be resumed no further, and nothing is left; or its plan is damaged.
    """
    try:
        layout = json.loads((run.path / PLAN).read_text(encoding="utf-8"))["format"]
        if layout not in FORMATS:
            raise ValueError(f"format={str(layout)[:20]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run={run.id}: {PLAN} cannot be read ({error}); without that file it is resumed as any run is, and "
            f"`just export run={run.id} format=peft` exports it"
        ) from error
    is_trained = run.record().status == "finished"
    if words or not is_trained or is_concluded(run, layout):
        outcome = resume(run, words, allow_change=allow_change)
        if outcome.exit_status:
            return outcome.exit_status
        (run.path / CHANGES).unlink(missing_ok=True)  # of an earlier step
    conclude(run, layout)
    return 0


def is_concluded(run: Run, layout: str) -> bool:
    """Whether nothing is left to do for the run."""
    return (run.path / CHANGES).exists() and (layout == "none" or (export_folder(run, layout) / CARD).exists())


def conclude(run: Run, layout: str) -> None:
    """Measure and show what a trained run's adapter changed, and export it; what was done before is not done again.

    layout: of the export, `none` for none.
    """
    if not (run.path / CHANGES).exists():
        from avlit.commands.before_after import compare_with_base
        from avlit.commands.sample import newest_checkpoint

        config = from_yaml(run.read_config())
        changes = compare_with_base(config, run, newest_checkpoint(run, config))
        for key, change in changes.items():
            print(f"loss on {SETS[key]}: {change}")
        losses = {key: {"before": each.before, "after": each.after} for key, each in changes.items()}
        write_atomically(run.path / CHANGES, json.dumps(losses, indent=1) + "\n")
        print(f"Clips of the base and of the adapter: {run.samples_dir}/before, {run.samples_dir}/after")
    if layout == "none":
        return
    from avlit.commands import export

    folder = export_folder(run, layout)
    if (folder / CARD).exists():
        print(
            f"{folder} is of an earlier step and was left as it is; `just export run={run.path} format={layout} "
            "out=FOLDER` exports what the run is now"
        )
        return
    shutil.rmtree(folder, ignore_errors=True)  # begun, and stopped before it was read again
    export.main([f"run={run.path}", f"format={layout}"])


def export_folder(run: Run, layout: str) -> Path:
    """Where `just export` writes unless it is told otherwise."""
    return run.path / "export" / layout


def read_request(words: Sequence[str]) -> Finetuning:
    """What the words ask for, with the defaults of fine-tuning; ConfigError for a wrong or missing one."""
    given = read_words(words)
    for key, example in (("recipe", "recipe=mtv_stage5"), ("data.root", "data.root=my_clips/")):
        if key not in given:
            raise ConfigError(f"{key}=… is missing, for example {example}")
    own = {key: given.pop(key) for key in OWN_WORDS if key in given}
    prepare = {key.removeprefix(PREPARE): given.pop(key) for key in list(given) if key.startswith(PREPARE)}
    if fixed := [key for key in prepare if key in ("source", "out", "recipe", "size", "captions")]:
        raise ConfigError(f"prepare.{fixed[0]}={prepare[fixed[0]]}: comes from the other words; leave it out")
    for key, allowed in (("plan", ("true", "false")), ("format", FORMATS)):
        if own.get(key, allowed[0]) not in allowed:
            near = nearest(own[key], allowed)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(f"{key}={own[key]}: must be one of {', '.join(allowed)}{hint}")
    said = tuple(prepare)
    shared = {f"data.{name}" for name in asdict(WindowConfig())}
    prepare = {key: text for key, text in given.items() if key in shared or key.startswith("codecs.")} | prepare
    size = given.get("size", "tiny")
    defaults = {**DEFAULTS, **DEFAULTS_OF_SIZE.get(size, DEFAULTS_OF_SIZE[""])}
    if "adapter.kind" in given:
        del defaults["adapter"]
    if "own" in (given.get("adapter"), given.get("adapter.kind")):
        defaults.pop("adapter.rank", None)
    if given.get("init"):
        settled, _ = settle_init(Config(init=given["init"], runs_dir=given.get("runs_dir", Config.runs_dir)))
        given["init"] = str(settled.init)
        if not any(key == "adapter" or key.startswith("adapter.") for key in given):
            defaults |= adapter_words(Path(given["init"]))
    merged = {**defaults, **given}
    config = load_config(as_words(merged))
    return Finetuning(
        config=config,
        words=merged,
        prepare=prepare,
        said=said,
        replay=_share(own.get("replay")),
        format=own.get("format", "none" if config.adapter.kind == "own" else "peft"),
        is_plan=own.get("plan") == "true",
        cache=Path(own.get("data.cache_dir", DataConfig.cache_dir)),
    )


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"replay={text}: must be a share of the clips, from 0 (none) to below 1")
    return share


def adapter_words(checkpoint: Path) -> dict[str, str]:
    """The adapter of a checkpoint's run as words, where it holds one: it is then gone on with."""
    from avlit.checkpoints import load_state

    if not load_state(checkpoint).adapter:
        return {}
    try:
        run = find_run(checkpoint.parents[2], checkpoint.parents[1])
    except UserError as error:
        raise ConfigError(f"init={checkpoint}: holds an adapter, and is in no run's folder; say adapter=…") from error
    theirs = from_yaml(run.read_config(), source=str(run.config_path)).adapter
    words = {"adapter": theirs.kind}
    if theirs.kind != "own":
        words |= {"adapter.rank": str(theirs.rank), "adapter.alpha": f"{theirs.scale:g}"}
        words |= {"adapter.modality": theirs.modality} if theirs.modality else {}
        words |= {"adapter.targets": f"[{','.join(theirs.targets)}]"} if theirs.targets else {}
    return words


def as_words(given: dict[str, str]) -> list[str]:
    """A mapping as `key=value` words."""
    return [f"{key}={value}" for key, value in given.items()]
