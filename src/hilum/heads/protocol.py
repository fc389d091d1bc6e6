"""How a search ends: which candidate, which epoch, how long the refit is, and the record of it.

Pure functions of scores and counts (docs/reference/model.md, fit protocol). Scores come from whoever computes them;
no metric is known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from hilum.core.errors import ConfigError

RefitInit = Literal["cold", "warm"]


@dataclass(frozen=True)
class Variant:
    """What a search tries: a head that differs from the others in these alone."""

    learning_rate: float
    blocks: int
    """n, last blocks whose tokens it reads."""
    patch_mean: bool = False
    """Linear: the mean patch token beside [CLS]."""

    def __str__(self) -> str:
        return f"rate {self.learning_rate:g}, {self.blocks} blocks" + (", patch mean" if self.patch_mean else "")


@dataclass(frozen=True)
class SearchEpoch:
    """One epoch of the search, over all candidates in their order; None for those that were pruned before."""

    epoch: int
    """From 1."""
    scores: tuple[float | None, ...]
    """Macro average precision on validation, after the epoch."""
    losses: tuple[float | None, ...]
    """Mean training loss of a step, during the epoch."""
    stage: Literal["whole", "classifier"] = "whole"
    """What was trained."""


@dataclass(frozen=True)
class Choice:
    """What a search decided, and why."""

    variant: Variant
    """Of the refit, and of the head that calibration sees."""
    epoch: int
    """Search epoch (from 1) whose weights predict validation for calibration."""
    score: float
    """Validation score of the chosen one after the last search epoch, by which it was chosen."""
    refit_epochs: int
    """Epochs that the refit runs before its weights are taken; 0: there is no refit."""
    classifier_epochs: int
    """Epochs of the refit for the classifier alone, after those."""
    reasons: tuple[str, ...]
    """For people."""
    second_stage: int | None = None
    """Epochs of the refit before the second stage of the loss (`FitConfig.deferred`); None: it stays in the first."""


@dataclass(frozen=True)
class SearchRecord:
    """`search.json`."""

    format: str
    criterion: str
    findings: tuple[str, ...]
    """Over which the criterion is averaged."""
    train_images: int
    val_images: int
    variants: tuple[Variant, ...]
    epochs: tuple[SearchEpoch, ...]
    chosen: Choice
    refit_init: RefitInit
    refit_losses: tuple[float, ...]
    """Mean training loss of a step, each refit epoch."""


def best(scores: Sequence[float | None], variants: Sequence[Variant]) -> int:
    """Position of the highest score; of equal ones the lower rate, then fewer blocks, then no patch mean.

    Raises:
        ConfigError: a score that is not finite, or nothing to choose from.
    """
    alive = [(score, one, place) for place, (score, one) in enumerate(zip(scores, variants, strict=True))
             if score is not None]  # fmt: skip
    if not alive or not np.isfinite([score for score, _, _ in alive]).all():
        raise ConfigError(f"Cannot choose among {', '.join(map(str, variants))} by scores {list(scores)}.")
    return min(alive, key=lambda row: (-row[0], row[1].learning_rate, row[1].blocks, row[1].patch_mean))[2]


def survivors(scores: Sequence[float], variants: Sequence[Variant]) -> list[int]:
    """Positions of the better half (rounded up), ties as `best` breaks them, in their order."""
    left: list[float | None] = list(scores)
    kept: list[int] = []
    while len(kept) < -(-len(scores) // 2):
        kept.append(best(left, variants))
        left[kept[-1]] = None
    return sorted(kept)


def choose(
    epochs: Sequence[SearchEpoch],
    variants: Sequence[Variant],
    *,
    train_images: int,
    val_images: int,
    refit_epochs: int,
    stop_epoch: int | None,
    refit_init: RefitInit,
    refit: bool = True,
    deferred_from: int | None = None,
) -> Choice:
    """Decide from the validation scores of every epoch and candidate.

    The candidate is the best after the last epoch (`best`). The refit stops at `stop_epoch` where that is given; else
    at the chosen one's best epoch (the first of equals) times n_train / (n_train + n_val), because an epoch of the
    refit has that many more steps; at least 1, at most `refit_epochs`. A search that ends with a classifier stage is
    taken as it ends, and both stages of the refit are scaled.

    The search weights that calibrate are those closest to the refit head in training: of the epoch at which the refit
    stops (`stop_epoch`), or of the best epoch; of the last where the refit goes on from there (warm). After
    `deferred_from` search epochs the loss has a second stage; the refit enters it if, and only if, these weights had.
    """
    last = len(epochs)
    place = best(epochs[-1].scores, variants)
    chosen, score = variants[place], epochs[-1].scores[place]
    assert score is not None
    course: Float[np.ndarray, " E"] = np.array([epoch.scores[place] for epoch in epochs], dtype=np.float64)
    peak, share = int(np.argmax(course)) + 1, train_images / (train_images + val_images)
    classifier = sum(epoch.stage == "classifier" for epoch in epochs)
    whole = last - classifier
    reasons = [f"{chosen}: highest score after search epoch {last}, the lower rate of equals"]
    if not refit:
        epoch = last if refit_init == "warm" else min(stop_epoch or (last if classifier else peak), last)
        reasons.append(f"no refit: the head of search epoch {epoch} is the model; it has not seen validation")
        return Choice(chosen, epoch, score, 0, 0, tuple(reasons))
    if classifier:
        epoch, alike = last, round(whole * share)
        stop, classifier = min(max(alike, 1), refit_epochs), max(round(classifier * share), 1)
        reasons.append(
            f"refit: {stop} epochs, then {classifier} of the classifier alone: the search's times {share:.3f}, the "
            f"former at most {refit_epochs}"
        )
    elif stop_epoch is not None:
        epoch = alike = min(stop_epoch, last)
        stop = stop_epoch
        reasons.append(f"refit stops after epoch {stop}: stop_epoch, fixed in the settings")
    else:
        epoch, alike = peak, round(peak * share)
        stop = min(max(alike, 1), refit_epochs)
        reasons.append(
            f"refit stops after epoch {stop}: search epoch {peak} was best of this one, times {share:.3f} = n_train / "
            f"(n_train + n_val), at least 1, at most {refit_epochs}"
        )
    if refit_init == "warm":
        epoch = last
        reasons.append(f"calibration sees search epoch {epoch}: the weights that the refit starts from (warm)")
    else:
        trained = "as long as" if alike == stop else "longer than" if alike > stop else "less long than"
        reasons.append(f"calibration sees search epoch {epoch}: trained {trained} the refit head, without validation")
    second_stage = None
    if deferred_from is not None and min(epoch, whole) > deferred_from:
        # After as many steps as in the search, or in its last epoch where it ends before; a warm one goes on in it.
        second_stage = 0 if refit_init == "warm" else min(round(deferred_from * share), stop - 1)
        reasons.append(f"the loss weighs by rarity after refit epoch {second_stage}, as in search epoch {epoch}")
    return Choice(chosen, epoch, score, stop, classifier, tuple(reasons), second_stage)
