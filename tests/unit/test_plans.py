"""Plans of ablations: the slides' rows and numbers, what is refused before anything runs, YAML there and back."""

from dataclasses import replace

import pytest

from hilum import plans
from hilum.commands.ablate_plan import (
    AblationPlan,
    PlannedBackbone,
    PlannedHead,
    PlannedRow,
    PublishedNumber,
    build_order,
    check,
    keep_rows,
    needed,
    with_backbones,
)
from hilum.core.config import read_yaml, write_yaml
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.labels import CXRLT_2024_TASK1, CXRLT_2024_TASK2

TASK1 = (0.1795, 0.1852, 0.1842, 0.1798, 0.1922, 0.2031, 0.1943, 0.2311, 0.2449, 0.235, 0.236, 0.259, 0.271)
TASK2 = (0.2585, 0.2649, 0.2642, 0.2605, 0.2766, 0.2896, 0.2801, 0.3194, 0.3330, 0.323, 0.323, 0.342, 0.354)
"""The slides' development results, in the slides' order (method.md 9.1)."""


def small(**changes: object) -> AblationPlan:
    plan = AblationPlan(
        "small",
        (
            PlannedBackbone("high", "demo_160", init="low"),
            PlannedBackbone("low", "demo_128"),
            PlannedBackbone("none", weights="random:demo16"),
        ),
        (PlannedHead("a", "low", "linear"), PlannedHead("b", "high", "decoder"), PlannedHead("c", "none", "linear")),
        (
            PlannedRow("a", ("a",)),
            PlannedRow("b", ("b",), study="mean", against=("a",)),
            PlannedRow("both", ("a", "b"), against=("a", "b")),
        ),
    )
    return replace(plan, **changes)


def test_the_slides_plan_has_the_slides_rows_and_numbers() -> None:
    plan = plans.find_plan("slides")
    numbers = [{number.task: number.value for number in row.published} for row in plan.rows]
    one = [entry["cxrlt2024-task1"] for entry in numbers]
    two = [entry["cxrlt2024-task2"] for entry in numbers]
    del one[3], two[3]  # the second reading of "linear, epoch 50"
    assert (tuple(one), tuple(two)) == (TASK1, TASK2)
    fifty = [row for row in plan.rows if "epoch 50" in row.stands_for]
    assert len(fifty) == 2
    assert len({row.heads for row in fifty}) == 2
    assert all("reading" in row.note for row in fifty)
    assert set(CXRLT_2024_TASK2) < set(CXRLT_2024_TASK1)


@pytest.mark.parametrize("scale", plans.SCALES)
@pytest.mark.parametrize("name", plans.PLANS)
def test_built_in_plans_resolve_and_come_back_from_yaml(name: str, scale: str, tmp_path) -> None:
    plan = plans.find_plan(name, scale, "first", ("first", "second"))
    write_yaml(tmp_path / "plan.yaml", plan)
    assert read_yaml(AblationPlan, tmp_path / "plan.yaml") == plan
    resolved = plans.resolve(plan)
    assert set(resolved.fitting) == {head.name for head in plan.heads}
    assert plan.scale == scale
    assert bool(plan.scale_note) == (scale == "laptop")


def test_rows_without_added_labels_learn_from_the_target_alone() -> None:
    plan = keep_rows(plans.find_plan("slides", "laptop", "first", ("first", "second")), ["l336_decoder", "l336_added"])
    fitting = plans.resolve(needed(plan)).fitting
    assert fitting["l336_decoder"].datasets == ("first",)
    assert fitting["l336_decoder_added"].datasets is None
    assert {config.target for config in fitting.values()} == {"first"}
    with pytest.raises(ConfigError, match="--target first"):
        plans.find_plan("slides", "laptop", None, ("first", "second"))
    with pytest.raises(UnknownNameError, match="Did you mean 'first'"):
        plans.find_plan("slides", "laptop", "fist", ("first", "second"))


def test_only_what_the_rows_need_is_made() -> None:
    plan = needed(keep_rows(small(), ["b"]))
    assert [head.name for head in plan.heads] == ["b"]
    assert [backbone.name for backbone in plan.backbones] == ["high", "low"]
    assert plan.rows[0].against == ()
    given = needed(with_backbones(small(), ["high=runs/ssl"]))
    assert {backbone.name: backbone.weights for backbone in given.backbones} == {"high": "runs/ssl", "low": None}


def test_a_backbone_comes_after_the_one_it_starts_from() -> None:
    assert [backbone.name for backbone in build_order(small())] == ["low", "high", "none"]


LOW, HIGH = PlannedBackbone("low", "demo_128"), PlannedBackbone("high", "demo_160", init="low")
ROWS = (PlannedRow("a", ("a",)),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbones": (replace(LOW, init="high"), HIGH)}, "start from each other"),
        ({"backbones": (LOW, LOW)}, "'low' is there more than once"),
        ({"backbones": (LOW, replace(HIGH, init="lo"))}, "Did you mean 'low'"),
        ({"backbones": (LOW, replace(HIGH, weights="run"))}, "exactly one of recipe, weights"),
        ({"backbones": (LOW, PlannedBackbone("high", checkpoint_of="low"))}, "needs at"),
        ({"backbones": (LOW, PlannedBackbone("high", checkpoint_of="low", at=1.5))}, "found 1.5"),
        ({"backbones": (LOW, PlannedBackbone("high", weights="run", init="low"))}, "belong to a recipe"),
        ({"heads": (PlannedHead("a", "lowe"), PlannedHead("b", "high"))}, "Did you mean 'low'"),
        ({"rows": ()}, "at least one"),
        ({"rows": (PlannedRow("a", ("x",)),)}, "Unknown head of row 'a'"),
        ({"rows": (PlannedRow("a", ()),)}, "one or more"),
        ({"rows": (PlannedRow("a", ("a", "a")),)}, "all different"),
        ({"rows": (PlannedRow("a/b", ("a",)),)}, "is no name"),
        ({"rows": (PlannedRow("a", ("a",), study="men"),)}, "Did you mean 'mean'"),
        ({"rows": (PlannedRow("a", ("a",), ensemble="men"),)}, "Did you mean 'mean'"),
        ({"rows": (PlannedRow("a", ("a",), against=("a",)),)}, "other rows"),
        ({"rows": (PlannedRow("a", ("a",), against=("b",)),)}, "compared with"),
        ({"rows": (PlannedRow("a", ("a",), published=(PublishedNumber("all", 17.0),)),)}, "in \\[0, 1\\]"),
        ({"rows": (PlannedRow("a", ("a",), published=(PublishedNumber("cxrlt2023", 0.2),)),)}, "task of a published"),
        ({"rows": ROWS, "seeds": ()}, "seeds"),
        ({"rows": ROWS, "seeds": (1, 1)}, "seeds"),
        ({"rows": ROWS, "seeds": (-1,)}, "0 or more"),
        ({"rows": ROWS, "tasks": ("cxrlt2024-task9",)}, "Did you mean"),
        ({"rows": ROWS, "bootstraps": -1}, "bootstraps"),
    ],
)
def test_a_wrong_plan_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(small(**changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nbackbnes: []\n", "Did you mean 'backbones'"),
        ("name: x\nbackbones: [{name: a, recip: linear}]\nheads: []\nrows: []\n", "Did you mean 'recipe'"),
        ("name: x\nbackbones: []\nheads: []\n", "rows"),
        ("- x\n", "mapping"),
    ],
)
def test_a_plan_file_with_unknown_keys_is_refused(text: str, message: str, tmp_path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        plans.find_plan(str(path))


def test_recipes_and_settings_are_looked_up_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"head 'a': Unknown recipe 'liner'. Did you mean 'linear'"):
        plans.resolve(small(heads=(PlannedHead("a", "low", "liner"), PlannedHead("b", "high"))))
    with pytest.raises(ConfigError, match=r"backbone 'low': Unknown setting of PretrainConfig 'stps'"):
        plans.resolve(small(backbones=(replace(LOW, overrides=("stps=3",)), HIGH, small().backbones[2])))
    with pytest.raises(UnknownNameError, match="Did you mean 'slides'"):
        plans.find_plan("slide")
    with pytest.raises(UnknownNameError, match="scale"):
        plans.find_plan("slides", "lapto")


@pytest.mark.parametrize("setting", ["study=frontal_weighted", "normal_damping=power:0.5", "seed=3"])
def test_what_rows_and_the_plan_decide_is_no_setting_of_a_head(setting: str) -> None:
    heads = (PlannedHead("a", "low", "linear", (setting,)), PlannedHead("b", "high"))
    with pytest.raises(ConfigError, match=r"head 'a': .* (is|are) not for heads of a plan"):
        plans.resolve(small(heads=heads, rows=(PlannedRow("a", ("a",)),)))


def test_a_checkpoint_that_would_not_be_kept_is_refused() -> None:
    half = PlannedBackbone("none", checkpoint_of="low", at=0.5)
    with pytest.raises(ConfigError, match="not among the checkpoints that are kept"):
        plans.resolve(small(backbones=(HIGH, LOW, half)))
    kept = replace(LOW, overrides=("steps=40", "checkpoint_every=10", "keep=3"))
    plans.resolve(small(backbones=(HIGH, kept, half)))
    with pytest.raises(ConfigError, match="keep to more than 2"):
        plans.resolve(small(backbones=(HIGH, replace(kept, overrides=(*kept.overrides[:2], "keep=2")), half)))
    with pytest.raises(ConfigError, match="does not pretrain"):
        plans.resolve(with_backbones(small(backbones=(HIGH, kept, half)), ["low=run"]))


def test_a_file_has_no_scale_and_labels_need_several_datasets(tmp_path) -> None:
    write_yaml(tmp_path / "plan.yaml", small())
    with pytest.raises(ConfigError, match="runs as it is written"):
        plans.find_plan(str(tmp_path / "plan.yaml"), "laptop")
    assert plans.find_plan(str(tmp_path / "plan.yaml"), overrides=["seeds=[3,4]"]).seeds == (3, 4)
    with pytest.raises(ConfigError, match="several datasets"):
        plans.find_plan("labels", "laptop", None, ("first",))


@pytest.mark.parametrize("setting", ["scale=laptop", "scale_note=small"])
def test_the_scale_of_a_built_in_plan_is_an_option_and_no_setting(setting: str) -> None:
    """As a setting it would change the label of the full plan and nothing else."""
    with pytest.raises(ConfigError, match=rf"{setting}.*--scale laptop"):
        plans.find_plan("slides", None, "first", ("first", "second"), [setting])
