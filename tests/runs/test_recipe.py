"""Recipes: strict reading, overrides, one report for every problem, and the way back to YAML."""

from __future__ import annotations

import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.adapters.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.evaluation.config import EvalConfig
from lorakit.runs.recipe import INPUT_FILES, Recipe, load_recipe, save_recipe
from lorakit.settings import Settings
from lorakit.training.config import TrainConfig

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"

MINIMAL = """\
title: addresses as JSON
output: runs/addresses
model:
  path: smollm2-135m-instruct
data:
  train: train.jsonl
"""


DOCS = Path(__file__).parents[2] / "docs"
PRINTED = [
    pytest.param(block, id=page.stem)
    for page in sorted(DOCS.rglob("*.md"))
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if block.startswith("title:")
]


@pytest.mark.parametrize("text", PRINTED)
def test_the_recipes_in_the_documentation(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml", check_files=False)


def test_there_are_recipes_in_the_documentation() -> None:
    assert {"own-data", "fit-in-memory"} <= {str(param.id) for param in PRINTED}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds one data file; relative paths start there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    return tmp_path


def written(text: str, name: str = "recipe.yaml") -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def refused(text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_recipe(written(text), overrides)
    return caught.value


class TestReading:
    def test_defaults_are_those_of_the_sections(self) -> None:
        recipe = load_recipe(written(MINIMAL))
        assert recipe.lora == LoraConfig()
        assert recipe.eval is None
        assert recipe.model.quant_type == "nf4" and recipe.model.double_quant
        assert recipe.train.lr == TrainConfig().lr

    def test_train_receives_what_the_recipe_says_once(self) -> None:
        text = MINIMAL.replace("data:\n", "seed: 7\ndata:\n  max_length: 300\n")
        train = load_recipe(written(text)).train
        assert (train.seed, train.output, train.max_length) == (7, Path("runs/addresses"), 300)

    @pytest.mark.parametrize(
        ("key", "value", "place"),
        [("seed", "3", "seed"), ("max_length", "99", "data.max_length"), ("output", "x", "output")],
    )
    def test_train_may_not_contradict_the_recipe(self, key: str, value: str, place: str) -> None:
        error = refused(MINIMAL + f"train:\n  {key}: {value}\n")
        assert f"contradicts {place} (" in str(error)

    @pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", "0.0001", "'1e-4'"])
    def test_floats_without_a_dot_are_floats(self, text: str) -> None:
        assert load_recipe(written(MINIMAL + f"train:\n  lr: {text}\n")).train.lr == 1e-4

    def test_eval_and_eval_fraction_exclude_each_other(self) -> None:
        error = refused(MINIMAL + "  eval: train.jsonl\n  eval_fraction: 0.1\n")
        assert error.problems == [("data", "set eval or eval_fraction, not both")]

    def test_metrics_need_held_out_records(self) -> None:
        error = refused(MINIMAL + "eval: {metrics: [chrf]}\n")
        assert "eval needs held-out records; set data.eval or data.eval_fraction" in str(error)

    def test_quant_type_is_one_that_the_quantizer_has(self) -> None:
        error = refused(MINIMAL, "model.quant_type=nf5")
        assert "model.quant_type: unknown 'nf5'; did you mean 'nf4'? (known: nf4" in str(error)

    @pytest.mark.parametrize(("start", "needs"), [("eva", "losses"), ("lora_ga", "losses"), ("loftq", "sources")])
    def test_a_start_that_needs_data_is_refused(self, start: str, needs: str) -> None:
        error = refused(MINIMAL + f"lora:\n  r: 8\n  init_lora_weights: {start}\n")
        assert error.problems[0][0] == "lora.init_lora_weights"
        assert f"recipe.yaml:9: lora.init_lora_weights: '{start}' needs `{needs}`, which a recipe cannot give" in str(
            error
        )

    def test_block_size_is_one_that_the_quantizer_has(self) -> None:
        assert refused(MINIMAL, "model.block_size=100").problems[0][0] == "model.block_size"

    def test_anchors_and_merge_keys_work(self) -> None:
        text = MINIMAL + "lora: &lora {r: 4, rank_pattern: &ranks {q_proj: 2}, alpha_pattern: {<<: *ranks}}\n"
        assert load_recipe(written(text)).lora.alpha_pattern == {"q_proj": 2.0}


class TestFaultsOfTheFile:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("title: x\nmodel: [a, b\n", "recipe.yaml:3: is not YAML"),
            ("title: x\n\tmodel: y\n", "recipe.yaml:2: is not YAML"),
            ("title: &a [*a]\n", "recipe.yaml:1: is not YAML: an anchor contains itself"),
            ("title: x\n1: y\n", "recipe.yaml:2: is not YAML: a key must be text"),
            ("title: x\nmodel: !!python/object/apply:os.getcwd []\n", "recipe.yaml:2: is not YAML"),
            ("title: x\n---\ntitle: y\n", "recipe.yaml:2: is not YAML"),
            ("- a\n", "recipe.yaml: expected settings of the form `key: value`, found a list"),
            ("", "recipe.yaml: expected settings of the form `key: value`, found nothing"),
            ("title: \x00\n", "recipe.yaml:1: is not YAML"),
        ],
    )
    def test_is_named_with_its_line(self, text: str, message: str) -> None:
        assert message in str(refused(text))

    def test_not_utf8(self, folder: Path) -> None:
        (folder / "recipe.yaml").write_bytes(b"title: caf\xe9\n")
        with pytest.raises(ConfigError, match=r"recipe.yaml: is not UTF-8 text \(byte 10\)"):
            load_recipe("recipe.yaml")

    def test_missing_recipe_names_the_nearest(self) -> None:
        written(MINIMAL, "quickstart.yaml")
        with pytest.raises(ConfigError, match=r"no such recipe; did you mean 'quickstart\.yaml'"):
            load_recipe("quikstart.yaml")

    def test_folder_instead_of_recipe(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="is a folder, expected a recipe such as"):
            load_recipe(folder)

    @pytest.mark.parametrize("section", ["seed: 1\nseed: 1\n", "train: {lr: 1, epochs: 1, lr: 2}\n"])
    def test_repeated_keys_are_refused(self, section: str) -> None:
        error = refused(MINIMAL + section)
        assert "is set twice, first at recipe.yaml:7" in str(error)


class TestOneReport:
    def test_everything_wrong_is_reported_together_with_its_place(self) -> None:
        text = """\
title: x
seed: zero
model: {path: smollm2-135m-instrukt, quant_typ: nf4}
data:
  train: trian.jsonl
  eval: .
lora: {r: 0}
trian: {lr: 1e-4}
eval:
  base_prompt: {instructions_file: base.txt}
  metrics: [chrff, {kind: json_schema, schema_file: gone/schema.json}]
"""
        error = refused(text, "train.lrr=3")
        lines = {line.split(": ")[1]: line.strip() for line in str(error).splitlines()[1:]}
        assert lines["output"] == "recipe.yaml: output: is required"
        assert lines["seed"].startswith("recipe.yaml:2: seed: input should be a valid integer")
        assert lines["model.quant_typ"] == "recipe.yaml:3: model.quant_typ: unknown key; did you mean 'quant_type'?"
        assert lines["model.path"].endswith("did you mean 'smollm2-135m-instruct'?")
        assert (
            lines["data.train"] == "recipe.yaml:5: data.train: no such file: trian.jsonl; did you mean 'train.jsonl'?"
        )
        assert lines["data.eval"] == "recipe.yaml:6: data.eval: is a folder, expected a file: ."
        assert lines["lora.r"].startswith("recipe.yaml:7: lora.r: ")
        assert lines["trian"] == "recipe.yaml:8: trian: unknown key; did you mean 'train'?"
        assert lines["eval.base_prompt.instructions_file"].startswith("recipe.yaml:10: ")
        assert "did you mean 'chrf'?" in lines["eval.metrics.0.kind"]
        assert (
            lines["eval.metrics.1.schema_file"]
            == "recipe.yaml:11: eval.metrics.1.schema_file: no such file: gone/schema.json"
        )
        assert lines["train.lrr"] == "override 'train.lrr=3': train.lrr: unknown key; did you mean 'lr'?"
        assert {key for key, _ in error.problems} == set(lines)
        assert str(error).startswith(f"recipe.yaml is not valid ({len(lines)} problems):")

    @pytest.mark.parametrize(
        ("override", "hint"),
        [
            ("train.learning_rate=1e-4", "here it is called 'lr'"),
            ("learning_rate=1e-4", "here it is called 'train.lr'"),
            ("lora.rank=8", "here it is called 'r'"),
            ("train.bf16=true", "here it is called 'model.dtype': bfloat16, float16 or float32"),
            ("train.per_device_train_batch_size=4", "here it is called 'batch_size': all conversations of a step"),
            ("train.lr_scheduler_type=linear", "the rate rises, then falls along half a cosine"),
            ("lr=1e-4", "here it is called 'train.lr'"),
            ("max_length=512", "here it is called 'data.max_length'"),
            ("train.quant_type=nf4", "here it is called 'model.quant_type'"),
            ("eval.seed=1", "here it is called 'seed'"),
        ],
    )
    def test_keys_of_other_tools_and_in_other_sections(self, override: str, hint: str) -> None:
        assert f"unknown key; {hint}" in str(refused(MINIMAL, override))

    def test_model_folder_is_accepted(self, folder: Path) -> None:
        (folder / "my-model").mkdir()
        load_recipe(written(MINIMAL.replace("smollm2-135m-instruct", "my-model")))

    def test_old_runs_can_be_read_without_their_data(self, folder: Path) -> None:
        (folder / "train.jsonl").unlink()
        assert load_recipe(written(MINIMAL), check_files=False).data.train == Path("train.jsonl")
        assert "data.train: no such file: train.jsonl" in str(refused(MINIMAL))

    def test_every_input_file_of_the_sections_is_checked(self) -> None:
        """A path that someone adds to a section must be added to INPUT_FILES too (metrics are chosen at run time)."""
        paths = set(_path_keys(Recipe)) - {"output", "train.output"}
        assert paths == {name for name in INPUT_FILES if "*" not in name}


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "section", "key", "value"),
        [
            ("train.lr=1e-4", "train", "lr", 1e-4),
            ("train.max_steps=null", "train", "max_steps", None),
            ("train.progress=false", "train", "progress", False),
            ("lora.target_modules=[q_proj, v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
            ("lora.rank_pattern={q_proj: 4}", "lora", "rank_pattern", {"q_proj": 4}),
            ("lora.rank_pattern.q_proj=4", "lora", "rank_pattern", {"q_proj": 4}),
            ("model.quant_type=", "model", "quant_type", None),
            ("data.train=./a=b.jsonl", "data", "train", Path("a=b.jsonl")),
        ],
    )
    def test_value_is_yaml(self, folder: Path, override: str, section: str, key: str, value: object) -> None:
        (folder / "a=b.jsonl").write_text("{}\n")
        recipe = load_recipe(written(MINIMAL), [override])
        assert getattr(getattr(recipe, section), key) == value

    def test_the_last_one_wins(self) -> None:
        assert load_recipe(written(MINIMAL + "seed: 1\n"), ["seed=2", "seed=3"]).seed == 3

    def test_an_override_can_mend_the_file(self) -> None:
        assert load_recipe(written(MINIMAL + "seed: zero\n"), ["seed=0"]).seed == 0

    @pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=3", ".lr=3", "", " = "])
    def test_malformed(self, override: str) -> None:
        assert f"override '{override}': is not of the form key=value" in str(refused(MINIMAL, override))

    def test_value_that_is_not_yaml(self) -> None:
        assert "override 'seed=[1': seed: the value is not YAML" in str(refused(MINIMAL, "seed=[1"))

    def test_key_inside_a_value(self) -> None:
        assert "'title' is a value, not a section" in str(refused(MINIMAL, "title.x=1"))

    @pytest.mark.parametrize(
        ("override", "hint"),
        [
            ("train.epoch=1", "did you mean 'epochs'?"),
            ("tarin.lr=1", "did you mean 'train'?"),
            ("sed=1", "mean 'seed'?"),
        ],
    )
    def test_unknown_key(self, override: str, hint: str) -> None:
        error = refused(MINIMAL, override)
        assert f"override '{override}'" in str(error) and hint in str(error)


class TestSaving:
    def test_every_default_is_written_out(self) -> None:
        save_recipe(load_recipe(written(MINIMAL)), "out.yaml")
        values = yaml.safe_load(Path("out.yaml").read_text())
        assert set(values) == set(Recipe.model_fields)
        assert set(values["lora"]) == set(LoraConfig.model_fields)
        assert set(values["train"]) == set(TrainConfig.model_fields) - {"seed", "output", "max_length"}

    def test_saved_recipe_takes_overrides(self) -> None:
        save_recipe(load_recipe(written(MINIMAL)), "out.yaml")
        changed = load_recipe("out.yaml", ["seed=5", "output=elsewhere", "data.max_length=64"])
        assert (changed.train.seed, changed.train.output, changed.train.max_length) == (5, Path("elsewhere"), 64)

    def test_metrics_keep_their_parameters(self, folder: Path) -> None:
        (folder / "schema.json").write_text("{}")
        metrics = "[chrf, {kind: json_field_equals, field: topic}, {kind: json_schema, schema_file: schema.json}]"
        recipe = load_recipe(written(MINIMAL), ["data.eval_fraction=0.2", f"eval.metrics={metrics}"])
        save_recipe(recipe, "out.yaml")
        assert load_recipe("out.yaml") == recipe
        inline = load_recipe("out.yaml", ["eval.metrics=[{kind: json_schema, schema: {type: object}}]"])
        save_recipe(inline, "again.yaml")
        assert load_recipe("again.yaml") == inline

    @pytest.mark.parametrize("title", ["0E0", "1e-4", "1.0e+3", "12", "null", "yes", "~", "a\x85b"])
    def test_text_that_looks_like_something_else_stays_text(self, title: str) -> None:
        recipe = load_recipe(written(MINIMAL)).model_copy(update={"title": title})
        save_recipe(recipe, "out.yaml")
        assert load_recipe("out.yaml").title == title

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        title=st.text(),
        lr=st.floats(min_value=1e-12, max_value=10, allow_subnormal=False),
        seed=st.integers(0, 2**63 - 1),
        ranks=st.dictionaries(st.text(min_size=1), st.integers(1, 512), max_size=4),
        eval_fraction=st.none() | st.floats(min_value=1e-6, max_value=0.99),
        evaluation=st.none() | st.builds(EvalConfig, limit=st.none() | st.integers(1, 100)),
    )
    def test_round_trip(
        self,
        title: str,
        lr: float,
        seed: int,
        ranks: dict[str, int],
        eval_fraction: float | None,
        evaluation: EvalConfig | None,
    ) -> None:
        recipe = Recipe(
            title=title,
            output=Path("runs/x"),
            seed=seed,
            model={"path": "smollm2-135m-instruct", "quant_type": None},
            data={"train": "train.jsonl", "eval_fraction": eval_fraction},
            lora={"rank_pattern": ranks},
            train={"lr": lr},
            eval=evaluation if eval_fraction is not None else None,
        )
        save_recipe(recipe, "out.yaml")
        assert load_recipe("out.yaml") == recipe


def test_quickstart_recipe_is_valid_and_uses_what_its_data_set_brings(folder: Path) -> None:
    recipe = load_recipe(QUICKSTART, check_files=False)
    assert recipe.eval is not None
    assert [metric.label for metric in recipe.eval.metrics] == ["schema_valid", "topic_accuracy", "reply_chrf"]
    data = folder / "runs" / "quickstart" / "data"
    data.mkdir(parents=True)
    for name in ("train.jsonl", "eval.jsonl", "schema.json", "base_prompt.txt"):  # as `lorakit data build` names them
        (data / name).write_text("{}")
    assert load_recipe(QUICKSTART) == recipe
    os.remove(data / "schema.json")
    with pytest.raises(ConfigError, match="schema_file: no such file"):
        load_recipe(QUICKSTART)


def _path_keys(section: type[Settings], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        for kind in _alternatives(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Settings):
                keys += _path_keys(kind, f"{prefix}{name}.")
            elif kind is Path:
                keys.append(f"{prefix}{name}")
    return keys


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)
