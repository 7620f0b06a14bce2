"""The command line: `python -m avlit COMMAND key=value …`; each command is imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence

from avlit.errors import UserError
from avlit.settings import nearest

COMMANDS = {
    "train": "train a recipe: recipe=mtv_stage3 [size=tiny|paper] [init=RUN_OR_FOLDER] [KEY=VALUE …]",
    "curriculum": "train all stages of a paper, each from the last one's weights: recipe=mtv [KEY=VALUE …]",
    "reproduce": "train and measure a paper's table: table=jova_lambda [quick=true] [seeds=0,1] [jobs=2] [KEY=VALUE …]",
    "resume": "go on with a run exactly where it was stopped or killed: run=last|ID|FOLDER [KEY=VALUE …]",
    "sample": "make clips from a run: run=last [prompt=… speech=a.wav image.0=a.png out=a.mp4 | jobs=FILE out=FOLDER]",
    "inspect": "what a model does, and its data: attention run=last … | mouth recipe=… out=FILE.png [data.root=…]",
    "evaluate": "the papers' metrics: run=last | clips_dir=FOLDER [metrics=A,B|list] [clips=64] [weights.KEY=PATH]",
    "compare": "runs side by side, as a table and a page: run=A run=B … | run=last:3 | tag=KEY=VALUE | experiment=NAME",
    "reference": "what held-out losses are normal, from finished runs of several seeds: run=A run=B … [hardware=TEXT]",
    "finetune": "an adapter for your own clips: recipe=mtv_stage5 init=RUN data.root=my_clips/ [plan=true]",
    "export": "an adapter as others load it, read back and compared: run=last format=diffusers|comfyui|peft",
    "import": "a LoRA of diffusers, ComfyUI or peft as a run: file=LORA.safetensors recipe=mtv_stage5 init=RUN",
    "prepare": "raw clips to shards: source=FOLDER captions=FILE.jsonl out=FOLDER",
    "recipes": "list the recipes, one line each",
    "plan": "what a run needs of each GPU, and what to change: recipe=… size=paper [gpus=8 memory=80GB] [KEY=VALUE …]",
    "config": "print every key of a config: recipe=mtv_stage3 [size=tiny|paper] [KEY=VALUE …]",
    "ui": "show the runs in MLflow's page, on this machine only",
}
"""Name -> one line; kept here, so that help imports no command."""

MODULES = {"import": "import_adapter", "plan": "estimate"}
"""Commands whose module has another name: `import` is a word of Python, `plan` lays out a sampler's request."""

USER_MISTAKE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str]) -> int:
    """Run one command; a user's mistake is printed as one message, everything else keeps its traceback."""
    name, words = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = nearest(name, list(COMMANDS))
        print(f"{name}: no such command{f'; did you mean {near}?' if near else ''}\n\n{usage()}", file=sys.stderr)
        return USER_MISTAKE
    if "-h" in words or "--help" in words:
        print(f"just {name}: {COMMANDS[name]}")
        return 0
    try:
        return importlib.import_module(f"avlit.commands.{MODULES.get(name, name)}").main(words)
    except UserError as error:
        print(f"just {name}: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(f"just {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def usage() -> str:
    """All commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(["Usage: just COMMAND KEY=VALUE …   (or python -m avlit COMMAND KEY=VALUE …)", "", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
