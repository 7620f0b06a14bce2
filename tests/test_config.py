"""Configuration: what wins over what, what is refused and with which words, and that a saved config reads back."""

from pathlib import Path
from typing import cast

import pytest

from avlit.config import (
    Config,
    ConfigError,
    curriculum_keys,
    from_yaml,
    load_config,
    recipe_folder,
    recipe_keys,
    recipe_module,
    to_yaml,
)
from avlit.settings import leaves
from recipes.mtv.config import MTVConfig


def mtv(*words: str) -> MTVConfig:
    return cast(MTVConfig, load_config(["recipe=mtv_stage3", *words]))


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        mtv(*words)
    return str(error.value)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder of recipes as a newcomer would make it: yaml files alone, on the core's schema."""
    root = tmp_path / "recipes"
    (root / "fifth" / "sizes").mkdir(parents=True)
    (root / "fifth" / "fifth.yaml").write_text("about: A fifth paper.\ntrain: {steps: 20, log_every: 20}\nseed: 20\n")
    (root / "fifth" / "sizes" / "tiny.yaml").write_text(
        "train: {steps: 30, log_every: 30}\nstages: {fifth: {train: {log_every: 40}}}\n"
    )
    return root


def load_fifth(root: Path, *words: str) -> Config:
    return load_config(["recipe=fifth", *words], root=root)


def test_each_layer_wins_over_those_before(recipes: Path):
    config = load_fifth(recipes, "checkpoint.keep=50")
    assert config.seed == 20  # the recipe's yaml over the schema
    assert config.train.steps == 30  # the size over the recipe's yaml
    assert config.train.log_every == 40  # the size's entry for the stage over the size
    assert config.checkpoint.keep == 50
    assert load_fifth(recipes, "train.log_every=60").train.log_every == 60  # words over everything


def test_a_yaml_alone_makes_a_recipe(recipes: Path):
    assert recipe_keys(recipes) == ["fifth"]
    assert load_fifth(recipes).about == "A fifth paper."
    assert recipe_module("fifth", recipes) == "recipes.fifth.recipe"


def test_two_files_of_one_key_are_refused(recipes: Path):
    for folder, name in (("a", "b_c.yaml"), ("a_b", "c.yaml")):
        (recipes / folder).mkdir()
        (recipes / folder / name).write_text("about: same key")
    with pytest.raises(ConfigError, match=r"recipe=a_b_c: both .* have this name"):
        recipe_keys(recipes)


@pytest.mark.parametrize("key", recipe_keys())
@pytest.mark.parametrize("size", ["tiny", "paper"])
def test_every_recipe_and_size_reads_back_from_its_yaml(key: str, size: str):
    config = load_config([f"recipe={key}", f"size={size}"])
    assert (config.recipe, config.size) == (key, size)
    assert config.about, "each stage says what it is in one line"
    assert (recipe_folder(key) / "recipe.py").is_file()
    assert from_yaml(to_yaml(config)) == config


def test_paper_size_is_as_published():
    config = mtv("size=paper")
    assert (config.train.steps, config.data.batch_size, config.optimizer.lr) == (40_000, 24, 1e-5)  # MTV, 4.3
    assert (config.data.num_frames, config.data.height, config.data.width, config.data.fps) == (49, 480, 720, 24)
    assert (config.optimizer.betas, config.optimizer.clip) == ((0.9, 0.95), 0.1)
    assert (config.model.num_layers, config.model.inner_dim, config.model.audio_layers) == (42, 3072, 12)
    assert (config.sample.guidance, config.sample.steps) == (3.5, 50)
    assert config.codecs.video == "cogvideox"


def test_curriculum_goes_by_the_order_key(recipes: Path):
    assert curriculum_keys("mtv") == [f"mtv_stage{number}" for number in range(1, 6)]
    (recipes / "two").mkdir()
    (recipes / "two" / "alpha.yaml").write_text("order: 2")
    (recipes / "two" / "beta.yaml").write_text("order: 1")
    assert curriculum_keys("two", recipes) == ["two_beta", "two_alpha"]
    (recipes / "two" / "gamma.yaml").write_text("order: 1")
    with pytest.raises(ConfigError, match=r"order=1 \(recipes/two/gamma.yaml\).*two_beta has it too"):
        curriculum_keys("two", recipes)


@pytest.mark.parametrize(
    ("name", "hint"), [("mvt", "mean mtv?"), ("mtv_stage3", "mean mtv?"), ("zzz", "are jova, mmcontrol, mtv")]
)
def test_unknown_paper_is_named_with_what_there_is(name: str, hint: str):
    with pytest.raises(ConfigError) as error:
        curriculum_keys(name)
    assert f"recipe={name}: " in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("word", "proposal"),
    [
        ("optimizer.lrr=2", "optimizer.lr"),
        ("lr=3", "optimizer.lr"),
        ("optimiser.lr=3", "optimizer.lr"),
        ("data.batchsize=8", "data.batch_size"),
        ("model.sample_heigth=8", "model.sample_height"),
        ("train.num_steps=8", "train.steps"),
        ("keyframes.image_haed=0", "keyframes.image_head"),
    ],
)
def test_unknown_key_proposes_the_nearest(word: str, proposal: str):
    key = word.split("=")[0]
    assert refused(word) == f"{key}: no such key; did you mean {proposal}?"


def test_unknown_key_like_no_other_points_to_the_list():
    assert "just config" in refused("xyzzy=3")


def test_unknown_key_in_a_file_names_the_file(recipes: Path):
    (recipes / "fifth" / "fifth.yaml").write_text("train: {stepz: 5}")
    with pytest.raises(ConfigError, match=r"train\.stepz \(recipes/fifth/fifth\.yaml\): .* mean train\.steps\?"):
        load_fifth(recipes)


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("train.steps=many", "a whole number of at least 1"),
        ("train.steps=2.5", "a whole number of at least 1"),
        ("train.steps=0", "a whole number of at least 1"),
        ("train.steps=true", "a whole number of at least 1"),
        ("train.steps=[1", "a whole number of at least 1"),
        ("train.steps=null", "a whole number of at least 1"),
        ("optimizer.lr=-1", "a number above 0"),
        ("optimizer.lr=nan", "a number above 0"),
        ("optimizer.lr=inf", "a number above 0"),
        ("optimizer.betas=[0.9]", "a list [a, b, …] of 2 numbers from 0 to 0.999999"),
        ("optimizer.betas=[0.9, 2]", "a list [a, b, …] of 2 numbers from 0 to 0.999999"),
        ("dropout.text=1.5", "a number from 0 to 1"),
        ("precision=fp64", "one of bf16, fp32"),
        ("codecs.video=ltx", "one of embedded, cogvideox, wan2.1"),
        ("strategy.cpu_offload=maybe", "true or false"),
        ("data.subsets=3", "a mapping {name: number, …}, each number of at least 0"),
        ("data.subsets={basic_face: -1}", "a mapping {name: number, …}, each number of at least 0"),
        ("data.subsets.basic_face=much", "a number of at least 0"),
        ("data.buckets={25x64x64: 0}", "a mapping {name: whole number, …}, each whole number of at least 1"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(word: str, allowed: str):
    message = refused(word)
    assert message.startswith(word.split("=")[0] + "=")
    assert message.endswith(f"must be {allowed}")


def test_wrong_value_in_a_file_names_the_file(recipes: Path):
    (recipes / "fifth" / "sizes" / "tiny.yaml").write_text("optimizer: {lr: fast}")
    with pytest.raises(ConfigError, match=r"optimizer\.lr=fast \(recipes/fifth/sizes/tiny\.yaml\): must be a number"):
        load_fifth(recipes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=mtv_stag3"], "recipe=mtv_stag3: no such recipe; did you mean mtv_stage3?"),
        (["recipe=mtv"], "recipe=mtv: has several stages, choose one of mtv_stage1, mtv_stage2"),
        (["recipe=zzz"], "recipe=zzz: no such recipe; there are jova_stage1_audio"),
        ([], "recipe=… is missing; there are jova_stage1_audio"),
        (["recipe=mtv_stage1", "size=huge"], "size=huge: must be one of paper, tiny"),
        (["recipe=mtv_stage1", "recipe=mtv_stage2"], "recipe: given twice, as 'mtv_stage1' and as 'mtv_stage2'"),
        (["recipe=mtv_stage1", "seed=1", "seed=1"], "seed: given twice"),
        (["mtv_stage1"], "'mtv_stage1': every word must be key=value"),
        (["--lr"], "did you mean lr=VALUE?"),
        (["--seed=1"], "did you mean seed=VALUE?"),
        (["=3"], "'=3': every word must be key=value"),
        (["recipe=mtv_stage1", "about=mine"], "about=mine: is set by the recipe"),
        (["recipe=mtv_stage1", "data=3"], "data=3 (command line): is a section, set the keys in it: data.root"),
    ],
)
def test_wrong_words_are_explained(words: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        load_config(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "because"),
    [
        (["data.root=shards", "data.num_clips=5"], "data.root=shards"),
        (["data.root=shards", "data.cache_dir=x"], "data.root=shards"),
        (["codecs.video_weights=vae"], "codecs.video=embedded"),
        (["ema.decay=0", "ema.every=5"], "ema.decay=0.0"),
        (["optimizer.schedule=constant", "optimizer.final=0.5"], "optimizer.schedule=constant"),
    ],
)
def test_a_setting_without_effect_is_refused(words: list[str], because: str):
    assert f"has no effect while {because}" in refused(*words)


def test_a_setting_with_its_condition_met_is_taken():
    assert mtv("codecs.video=cogvideox", "codecs.video_weights=vae").codecs.video_weights == "vae"
    assert mtv("ema.decay=0.9", "ema.every=5").ema.every == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.num_frames=24"], "data.num_frames=24: a causal video codec"),
        (["data.height=60"], "data.height=60: must be a multiple of the codec's 8"),
        (["data.buckets={24x64x64: 16}"], "data.buckets: num_frames=24"),
        (["data.buckets.tall=16"], "data.buckets.tall: a shape is FRAMESxHEIGHTxWIDTH"),
        (["data.subsets={basic_face: 0}"], "data.subsets: every weight is 0"),
        (["keyframes.random=0.9"], "keyframes: the shares add up to 1.14"),
        (["model.in_channels=3"], "model.in_channels=3: must be at least model.out_channels"),
        (["train.devices=3", "data.batch_size=16"], "must be a multiple of train.devices * train.accumulate = 3"),
        (["data.batch_size=16", "train.devices=2", "train.accumulate=5"], "or set train.accumulate=8"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(words: list[str], message: str):
    assert message in refused(*words)


@pytest.mark.parametrize("word", ["run_name=${oc.env:HOME}", "seed=${now:x}", "data.subsets={a: '${b}'}"])
def test_nothing_is_looked_up_for_a_word(word: str):
    assert "is not evaluated here" in refused(word)


def test_nothing_is_looked_up_for_a_saved_config(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "canary")
    text = to_yaml(mtv()).replace("run_name: null", "run_name: ${oc.env:SECRET}")
    with pytest.raises(ConfigError, match="is not evaluated here") as error:
        from_yaml(text)
    assert "canary" not in str(error.value)


def test_yaml_cannot_make_python_objects():
    with pytest.raises(ConfigError, match="not readable as yaml"):
        from_yaml(to_yaml(mtv()) + "\nextra: !!python/object/apply:os.getcwd []\n")


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "seed: 1\nseed: 2"])
def test_unreadable_saved_config_is_named(text: str):
    with pytest.raises(ConfigError, match=r"runs/x/config\.yaml"):
        from_yaml(text, source="runs/x/config.yaml")


def test_text_is_taken_as_typed():
    for name in ("007", "1e3", "true", "a: b", "{x}", "k=v"):
        assert mtv(f"run_name={name}").run_name == name
    assert mtv("run_name=null").run_name is None
    assert mtv("run_name=").run_name is None


def test_numbers_are_read_in_every_usual_spelling():
    assert [mtv(f"optimizer.lr={text}").optimizer.lr for text in ("1e-3", "1E-3", "0.001", ".001")] == [1e-3] * 4
    assert mtv("optimizer.betas=[0.8,0.9]").optimizer.betas == (0.8, 0.9)


def test_a_mapping_is_replaced_whole_and_changed_by_entry(recipes: Path):
    (recipes / "fifth" / "fifth.yaml").write_text("data: {subsets: {faces: 1}}")
    assert load_fifth(recipes, "data.subsets={birds: 2, bells: 1}").data.subsets == {"birds": 2, "bells": 1}
    assert load_fifth(recipes, "data.subsets.birds=0.5").data.subsets == {"faces": 1, "birds": 0.5}


def test_words_change_a_saved_config_but_not_its_recipe():
    text = to_yaml(mtv("seed=3"))
    changed = from_yaml(text, words=["train.steps=9", "recipe=mtv_stage3"])
    assert (changed.seed, changed.train.steps) == (3, 9)
    with pytest.raises(ConfigError, match="the run was made with recipe=mtv_stage3"):
        from_yaml(text, words=["recipe=mtv_stage1"])


def test_a_stage_name_that_a_size_does_not_know_is_refused(recipes: Path):
    (recipes / "fifth" / "sizes" / "tiny.yaml").write_text("stages: {sixth: {seed: 1}}")
    with pytest.raises(ConfigError, match=r"stages\.sixth .*must be one of fifth"):
        load_fifth(recipes)


def test_every_key_of_the_core_says_what_it_is():
    assert [key for key, leaf in leaves(Config).items() if not leaf.about] == []
