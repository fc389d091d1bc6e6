"""How often the rules of `hilum recalibrate` say yes, not shown and no, where the true AUC is known. Minutes, no data.

    python runs/site_rules.py

Scores of two normal classes, so that the AUC is Phi(distance / sqrt 2); one study a patient, 20 % positive; scores that
are right elsewhere and, here, too bold and too high, or right here too. For each AUC and number of studies 100 sites.
Then what fitting costs where nothing was wrong, and gains where something was: log loss on 20,000 other studies.
"""

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from hilum.evaluation.definitions import log_loss
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.recalibration import cross_fit_site, recalibrate
from hilum.evaluation.site_judgement import Rules, judge_site

AUCS, STUDIES, PREVALENCE = (0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90), (100, 300, 600), 0.2
SITES, TOGETHER, RESAMPLES = 100, 20, 200


def draw(rng: np.random.Generator, auc: float, count: int, columns: int, wrong: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels (count, columns): log-odds of the posterior, doubled and raised by 1 where wrong."""
    distance = norm.ppf(auc) * np.sqrt(2)
    labels = rng.random((count, columns)) < PREVALENCE
    odds = distance * (rng.normal(0, 1, labels.shape) + distance * labels - distance / 2) + logit(PREVALENCE)
    return expit(2 * odds + 1 if wrong else odds), labels.astype(np.int8)


def table_of(values: np.ndarray) -> Predictions:
    """Studies of as many patients."""
    ids, none = np.array([f"s{n}" for n in range(len(values))]), np.full(len(values), "")
    names = tuple(f"finding {n}" for n in range(values.shape[1]))
    return Predictions(ids, none, ids, ids, none, none, names, values, {"stage": "study", "unit": "study"})


def verdicts(rng: np.random.Generator, auc: float, count: int) -> list[str]:
    """Of SITES sites, TOGETHER at a time as findings of one."""
    said = []
    for part in range(SITES // TOGETHER):
        values, labels = draw(rng, auc, count, TOGETHER, wrong=True)
        table = table_of(values)
        new, after = recalibrate(None, table, labels, {}), cross_fit_site(None, table, labels, {})
        result = judge_site(table, table, after, labels, new, Rules(), {}, {}, bootstraps=RESAMPLES, seed=part)
        said += [row["verdict"] for row in result["findings"].values()]
    return said


def gains(rng: np.random.Generator, count: int, wrong: bool) -> np.ndarray:
    """Log loss on others after minus before, of each of SITES sites with an AUC of 0.8."""
    values, labels = draw(rng, 0.8, count, SITES, wrong)
    new = recalibrate(None, table_of(values), labels, {})
    others, truth = draw(rng, 0.8, 20_000, SITES, wrong)
    mapped = new.apply(others)
    after, before = ([log_loss(one[:, c], truth[:, c]) or 0.0 for c in range(SITES)] for one in (mapped, others))
    return np.array(after) - np.array(before)


def main() -> None:
    """Print both tables."""
    rng = np.random.default_rng(0)
    print(f"{'AUC':>5}" + "".join(f"  {count:>4} studies: yes  not shown  no" for count in STUDIES))
    for auc in AUCS:
        cells = []
        for count in STUDIES:
            said = verdicts(rng, auc, count)
            cells.append(
                "".join(f"{said.count(word):>{width}}" for word, width in (("yes", 20), ("not shown", 11), ("no", 4)))
            )
        print(f"{auc:5.2f}" + "".join(cells))
    print("\nlog loss on others, after minus before: mean over sites [worst tenth]")
    for wrong in (False, True):
        for count in STUDIES:
            found = gains(rng, count, wrong)
            words = "doubled, raised by 1" if wrong else "right as they were"
            print(f"{words:22} {count:4} studies: {found.mean():+.4f} [{np.quantile(found, 0.9):+.4f}]")


if __name__ == "__main__":
    main()
