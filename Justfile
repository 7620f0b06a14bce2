# Every command makes the environment itself when it is missing or out of date. Words after a command are key=value.
set positional-arguments

# Python reads an empty value as unset; without bytecode, imports take three times as long.
export PYTHONDONTWRITEBYTECODE := ""
export PYRIGHT_PYTHON_IGNORE_WARNINGS := "1"

python := ".venv/bin/python"

[private]
default:
    @"{{just_executable()}}" --justfile "{{justfile()}}" --list --unsorted

# train a recipe: recipe=mtv_stage3 [size=tiny|paper] [init=RUN_OR_FOLDER] [KEY=VALUE …]
[no-exit-message]
train *words: setup
    @{{python}} -m avlit train "$@"

# train all stages of a paper, each from the last one's weights: recipe=mtv [KEY=VALUE …]
[no-exit-message]
curriculum *words: setup
    @{{python}} -m avlit curriculum "$@"

# train and measure a paper's table: table=jova_lambda [quick=true] [seeds=0,1] [jobs=2] [KEY=VALUE …]
[no-exit-message]
reproduce *words: setup
    @{{python}} -m avlit reproduce "$@"

# go on with a run exactly where it was stopped or killed: run=last|ID|FOLDER [KEY=VALUE …]
[no-exit-message]
resume *words: setup
    @{{python}} -m avlit resume "$@"

# make clips from a run: run=last [prompt=… speech=a.wav image.0=a.png out=a.mp4 | jobs=FILE out=FOLDER]
[no-exit-message]
sample *words: setup
    @{{python}} -m avlit sample "$@"

# what a model does, and its data: attention run=last … | mouth recipe=… out=FILE.png [data.root=…]
[no-exit-message]
inspect *words: setup
    @{{python}} -m avlit inspect "$@"

# the papers' metrics: run=last | clips_dir=FOLDER [metrics=A,B|list] [clips=64] [weights.KEY=PATH]
[no-exit-message]
evaluate *words: setup
    @{{python}} -m avlit evaluate "$@"

# runs side by side, as a table and a page: run=A run=B … | run=last:3 | tag=KEY=VALUE | experiment=NAME
[no-exit-message]
compare *words: setup
    @{{python}} -m avlit compare "$@"

# what held-out losses are normal, from finished runs of several seeds: run=A run=B … [hardware=TEXT]
[no-exit-message]
reference *words: setup
    @{{python}} -m avlit reference "$@"

# an adapter for your own clips: recipe=mtv_stage5 init=RUN data.root=my_clips/ [plan=true]
[no-exit-message]
finetune *words: setup
    @{{python}} -m avlit finetune "$@"

# an adapter as others load it, read back and compared: run=last format=diffusers|comfyui|peft
[no-exit-message]
export *words: setup
    @{{python}} -m avlit export "$@"

# a LoRA of diffusers, ComfyUI or peft as a run: file=LORA.safetensors recipe=mtv_stage5 init=RUN
[no-exit-message]
import *words: setup
    @{{python}} -m avlit import "$@"

# raw clips to shards: source=FOLDER captions=FILE.jsonl out=FOLDER
[no-exit-message]
prepare *words: setup
    @{{python}} -m avlit prepare "$@"

# list the recipes, one line each
[no-exit-message]
recipes *words: setup
    @{{python}} -m avlit recipes "$@"

# what a run needs of each GPU, and what to change: recipe=… size=paper [gpus=8 memory=80GB] [KEY=VALUE …]
[no-exit-message]
plan *words: setup
    @{{python}} -m avlit plan "$@"

# print every key of a config: recipe=mtv_stage3 [size=tiny|paper] [KEY=VALUE …]
[no-exit-message]
config *words: setup
    @{{python}} -m avlit config "$@"

# show the runs in MLflow's page, on this machine only
[no-exit-message]
ui *words: setup
    @{{python}} -m avlit ui "$@"

# run the tests; further words go to pytest
[no-exit-message]
test *words: setup
    @{{python}} -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile "$@"

# kill training at random moments and compare with a run that was never stopped: [kills=25] [seed=0] [KEY=VALUE …]
fuzz *words: setup
    @{{python}} -m tests.kill_fuzz "$@"

# lint, formatting and types
[no-exit-message]
lint: setup
    @{{python}} -m ruff check .
    @{{python}} -m ruff format --check .
    @{{python}} -m pyright

# lint, types and tests, as CI runs them
check: lint test

# measure speed
[no-exit-message]
bench *words: setup
    @{{python}} -m benchmarks "$@"

# make the environment in .venv, or bring it up to date
setup:
    @cat pyproject.toml constraints.txt | cmp -s - .venv/setup.stamp || "{{just_executable()}}" --justfile "{{justfile()}}" _install

_install:
    #!/usr/bin/env bash
    set -euo pipefail
    if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
        uv=(uv)
    else
        # The folder of pip's scripts may not be on PATH; the module always is.
        python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install --quiet uv
        uv=(python3 -m uv)
    fi
    rm -f .venv/setup.stamp
    [ -x {{python}} ] || "${uv[@]}" venv --quiet .venv --python 3.11
    echo "Installing the locked packages into .venv: a minute or two, once."
    export UV_COMPILE_BYTECODE=1
    "${uv[@]}" pip install --quiet --python {{python}} --require-hashes -r constraints.txt
    # Built with the locked setuptools, so that nothing unlocked is fetched.
    "${uv[@]}" pip install --quiet --python {{python}} --no-deps --no-build-isolation --editable .
    cat pyproject.toml constraints.txt > .venv/setup.stamp
