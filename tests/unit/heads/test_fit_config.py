"""Settings of a fit that would do nothing, or undo each other, are refused by name."""

import pytest

from hilum.core.config import override
from hilum.core.errors import ConfigError
from hilum.heads.config import FitConfig
from hilum.heads.registry import HEADS
from hilum.recipes import FIT_RECIPES, fit_recipe


@pytest.mark.parametrize(("changes", "message"), [
    (["head=ml_decoder", "patch_mean=true"], "patch_mean: of the head linear alone, which ml_decoder would ignore"),
    (["head=csra", "also_patch_mean=true"], "also_patch_mean: of the head linear alone"),
    (["head=linear", "cat_cls=true"], "cat_cls: of the head ml_decoder alone, which linear would ignore"),
    (["head=linear", "queries=learnable"], "queries: of the head ml_decoder alone, which linear would ignore"),
    (["head=csra", "dropout=0.2"], "dropout: of the head ml_decoder alone, which csra would ignore. Leave it at 0.1"),
    (["head=linear", "decoder_layers=2"], "decoder_layers: of the head ml_decoder alone"),
    (["csra_lambda=0.2"], "csra_lambda: of the head csra alone, which ml_decoder would ignore"),
    (["sampling_power=1"], "sampling_power would do nothing: sampling=natural draws every image alike"),
    (["sampling_over=mean"], "sampling_over would do nothing: sampling=natural"),
    (["cache_dtype=float16"], "cache_dtype would do nothing: augmented_views=0 keeps no view in memory"),
    (["pseudo_weight=0.3"], "pseudo_weight would do nothing: there are no pseudo-labels"),
    (["pseudo_certainty=0.3"], "pseudo_certainty would do nothing"),
    (["tune.method=lora", "ema=0.9"], "tune.method=lora goes with none of ema"),
    (["tune.method=full", "source_bias=true"], "tune.method=full goes with none of ema, source_bias"),
    (["tune.method=full", "classifier_epochs=2"], "goes with none of ema, source_bias and classifier_epochs"),
    (["loss=ldam", "deferred=0.8", "stop_epoch=2"], r"deferred=0.8 begins after epoch 8 of 10, stop_epoch=2"),
    (["loss=ldam", "deferred=0.85", "stop_epoch=9"], r"begins after epoch 9 of 10, stop_epoch=9"),
    (["loss=ldam", "deferred=0.95"], "deferred would do nothing: it begins after epoch 10 of 10"),
    (["tune.epochs=10"], "tune.epochs would do nothing: tune.method=none trains no backbone"),
    (["tune.rank=64"], "tune.rank would do nothing: tune.method=none"),
    (["tune.method=lora", "tune.blocks=2"], "tune.blocks would do nothing: .*or leave it at 4"),
    (["tune.method=full", "tune.alpha=8"], "tune.alpha would do nothing: .*or leave it at 16.0"),
    (["learning_rates=[1e-3]", "prune_after=[3]"], "prune_after would do nothing: a single head is tried"),
    (["views=memory", "consistency=1"], "consistency: with views=memory all images of a study have one answer"),
    (["weight_decay=nan"], "weight_decay: expected 0 or more, found nan"),
    (["consistency=inf"], "consistency: expected 0 or more, found inf"),
])  # fmt: skip
def test_a_setting_that_would_do_nothing_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(FitConfig(), changes)


@pytest.mark.parametrize("changes", [
    ["head=linear", "patch_mean=true", "also_patch_mean=true"], ["cat_cls=true"],
    ["tune.method=lora", "source_weights=[here=0.5]", "consistency=1", "refit=false"], ["ema=0.9"],
    ["loss=ldam", "deferred=0.5", "stop_epoch=6"], ["loss=ldam", "deferred=0.95", "tune.method=full"],
    ["tune.method=lora", "tune.rank=64"], ["tune.method=blocks", "tune.blocks=2", "tune.epochs=10"],
    ["learning_rates=[1e-3]", "also_blocks=[1]", "prune_after=[3]"], ["refit=false", "refit_epochs=3"],
    ["head=csra", "decoder_dim=128", "decoder_heads=4", "decoder_feed_forward=256"], ["kept_channels=64"],
    ["sampling=class_aware", "sampling_power=1"], ["classifier_epochs=2", "sampling_power=1", "sampling_over=mean"],
    ["augmented_views=2", "cache_dtype=float16"], ["pseudo_labels=MODEL", "pseudo_weight=0.3", "pseudo_certainty=0.1"],
])  # fmt: skip
def test_what_goes_together_is_not_refused(changes: list[str]) -> None:
    override(FitConfig(), changes)


@pytest.mark.parametrize(("changes", "message"), [
    (["loss=focal", "losses.asymmetric.gamma_negative=2"],
     "losses.asymmetric.gamma_negative would do nothing: loss=focal does not read it.*or leave it at 4.0"),
    (["losses.weighted_asymmetric.gamma_positive=0"], "loss=masked_bce_sum does not read it.*or leave it at 1.0"),
    (["losses.reduction=mean"], "losses.reduction would do nothing: loss=masked_bce_sum is reduced as it is called"),
])  # fmt: skip
def test_a_fit_refuses_settings_of_losses_that_it_would_not_read(changes: list[str], message: str) -> None:
    config = override(FitConfig(), changes)  # an extension may take up such settings, and change the loss
    with pytest.raises(ConfigError, match=message):
        config.refuse_unread_losses()


@pytest.mark.parametrize("changes", [
    [], ["loss=masked_bce_mean"], ["loss=masked_bce_mean", "losses.reduction=mean"],
    ["loss=focal", "losses.focal.gamma=1", "losses.reduction=mean"],
    ["loss=ldam", "losses.ldam.max_margin=0.3", "losses.class_balanced.beta=0.99", "deferred=0.8"],
])  # fmt: skip
def test_settings_that_a_loss_reads_are_not_refused(changes: list[str]) -> None:
    override(FitConfig(), changes).refuse_unread_losses()


@pytest.mark.parametrize("name", FIT_RECIPES)
def test_no_recipe_sets_what_its_loss_does_not_read(name: str) -> None:
    fit_recipe(name).refuse_unread_losses()
    fit_recipe(name, ["refit=false"]).refuse_unread_losses()  # whatever length the recipe gives the refit


def test_every_head_can_be_named() -> None:
    for name in HEADS:
        assert override(FitConfig(), [f"head={name}"]).describe_head(6, 2).name == name
