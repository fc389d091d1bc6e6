"""How a learning-rate search ends: which rate, which epoch, how long the refit is, and the record of it.

Pure functions of scores and counts (docs/reference/model.md, fit protocol). Scores come from whoever computes them;
no metric is known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from hilum.heads.sweep import select

RefitInit = Literal["cold", "warm"]


@dataclass(frozen=True)
class SearchEpoch:
    """One epoch of the search, over all rates in their order."""

    epoch: int
    """From 1."""
    scores: tuple[float, ...]
    """Macro average precision on validation, after the epoch."""
    losses: tuple[float, ...]
    """Mean training loss of a step, during the epoch."""


@dataclass(frozen=True)
class Choice:
    """What a search decided, and why."""

    learning_rate: float
    """Of the refit, and of the head that calibration sees."""
    epoch: int
    """Search epoch (from 1) whose weights predict validation for calibration."""
    score: float
    """Validation score at the chosen rate after the last search epoch, the one it was chosen by."""
    refit_epochs: int
    """Epochs that the refit runs before its weights are taken."""
    reasons: tuple[str, ...]
    """For people."""


@dataclass(frozen=True)
class SearchRecord:
    """`search.json`."""

    format: str
    criterion: str
    findings: tuple[str, ...]
    """Over which the criterion is averaged."""
    train_images: int
    val_images: int
    rates: tuple[float, ...]
    epochs: tuple[SearchEpoch, ...]
    chosen: Choice
    refit_init: RefitInit
    refit_losses: tuple[float, ...]
    """Mean training loss of a step, each refit epoch."""


def choose(
    scores: Float[np.ndarray, "E R"],
    rates: Sequence[float],
    *,
    train_images: int,
    val_images: int,
    refit_epochs: int,
    stop_epoch: int | None,
    refit_init: RefitInit,
) -> Choice:
    """Decide from the validation scores of every epoch and rate.

    The rate is the best after the last epoch, the lower of equals. The refit stops at `stop_epoch` where that is given;
    else at the chosen rate's best epoch (the first of equals) times n_train / (n_train + n_val), because an epoch of
    the refit has that many more steps; at least 1, at most `refit_epochs`.

    The search weights that calibrate are those closest to the refit head in training: of the epoch at which the refit
    stops (`stop_epoch`), or of the best epoch; of the last where the refit goes on from there (warm).
    """
    last = len(scores)
    rate = select(scores[-1].tolist(), rates)
    course = scores[:, list(rates).index(rate)]
    best = int(np.argmax(course)) + 1
    reasons = [f"rate {rate:g}: highest score after search epoch {last}, the lower rate of equals"]
    if stop_epoch is not None:
        stop, epoch = stop_epoch, min(stop_epoch, last)
        reasons.append(f"refit stops after epoch {stop}: stop_epoch, fixed in the settings")
    else:
        share = train_images / (train_images + val_images)
        stop, epoch = min(max(round(best * share), 1), refit_epochs), best
        reasons.append(
            f"refit stops after epoch {stop}: search epoch {best} was best at this rate, times {share:.3f} = n_train / "
            f"(n_train + n_val), at least 1, at most {refit_epochs}"
        )
    if refit_init == "warm":
        epoch = last
        reasons.append(f"calibration sees search epoch {epoch}: the weights that the refit starts from (warm)")
    else:
        reasons.append(f"calibration sees search epoch {epoch}: trained as long as the refit head, without validation")
    return Choice(rate, epoch, float(course[-1]), stop, tuple(reasons))
