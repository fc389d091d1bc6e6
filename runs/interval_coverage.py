"""How often 95 % intervals of average precision hold the truth: plain percentiles beside those that Hilum reports.

    python runs/interval_coverage.py

Cohorts of 200 and 600 patients with 1 to 6 images are judged against the values of 40,000 patients made in the same
way. Two models score every image; a third averages the first over each study. Then the same for scores that know
nothing, where the average of a study is no better than its images: how often is a gain shown? Fixed seeds; a minute.
"""

from collections import defaultdict

import numpy as np

from hilum.core.seeding import stream
from hilum.core.tracking import say
from hilum.evaluation.bootstrap import INTERVAL, basic_interval, interval, mean_over_findings, resample_weights
from hilum.evaluation.weighted import WeightedFinding

POPULATION, RESAMPLES, POSITIVES = 40_000, 300, 5
SIZES = ((200, 100, np.geomspace(0.04, 0.3, 8)), (600, 60, np.geomspace(0.01, 0.2, 6)))
"""Patients, cohorts, prevalence of each finding."""


def cohort(patients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Study and patient of each image."""
    of_study = np.repeat(np.arange(patients), rng.choice([1, 2], patients))
    study = np.repeat(np.arange(len(of_study)), rng.choice([1, 2, 3], len(of_study), p=[0.45, 0.4, 0.15]))
    return study, of_study[study]


def scores(y: np.ndarray, study: np.ndarray, signal: bool, rng: np.random.Generator) -> list[np.ndarray]:
    """In [0, 1]: of the two models, and of the first averaged over studies."""
    shared = 0.7 * rng.normal(size=study.max() + 1)[study]
    logits = [gain * signal * y + shared + 0.7 * rng.normal(size=len(y)) for gain in (1.4, 1.1)]
    one, other = (1 / (1 + np.exp(3 - value)) for value in logits)
    return [one, other, (np.bincount(study, one) / np.bincount(study))[study]]


def measured(
    patients: int, prevalence: np.ndarray, weights: np.ndarray, signal: bool, rng: np.random.Generator
) -> dict[int, np.ndarray]:
    """By finding with enough positives: average precision of the three, for each column of weights."""
    (study, patient), found = cohort(patients, rng), {}
    for number, share in enumerate(prevalence):
        y = (rng.random(study.max() + 1) < share).astype(np.int8)[study]
        if y.sum() >= POSITIVES:
            found[number] = np.stack([
                WeightedFinding(p, y, patient, patients, None).measure(weights, ["AP"])["AP"]
                for p in scores(y, study, signal, rng)
            ])  # fmt: skip
    return found


def main() -> None:
    """Print both tables."""
    for patients, cohorts, prevalence in SIZES:
        everyone = measured(POPULATION, prevalence, np.ones((POPULATION, 1)), True, stream(0, "population"))
        weights = np.concatenate([np.ones((patients, 1)), resample_weights(patients, 0, RESAMPLES, 0)], axis=1)
        held, shown = defaultdict(list), defaultdict(list)
        for number in range(cohorts):
            for signal in (True, False):
                found = measured(patients, prevalence, weights, signal, stream(number, "cohort", str(signal)))
                both = np.stack(list(found.values()))
                one, other, mean = (mean_over_findings(both[:, place].T) for place in range(3))
                truth = np.mean([everyone[c][:, 0] for c in found], axis=0)
                rows = [("level", one, truth[0], interval)] if signal else []
                rows.append(("study mean - images", mean - one, truth[2] - truth[0], basic_interval))
                rows += [("model - model", one - other, truth[0] - truth[1], basic_interval)] if signal else []
                for name, values, true, rule in rows:
                    for way, (low, high) in (
                        ("percentiles", np.quantile(values[1:], INTERVAL)), ("reported", rule(values[1:], values[0]))
                    ):  # fmt: skip
                        if signal:
                            held[name, way].append(low <= true <= high)
                        else:
                            shown[name, way].append(low > 0 or high < 0)
        say(f"{patients} patients, {cohorts} cohorts, {len(prevalence)} findings")
        for words, counts in (("holds the truth", held), ("no signal: shown", shown)):
            for (name, way), each in counts.items():
                say(f"  {words:18} {name:20} {way:12} {np.mean(each):4.0%}")


if __name__ == "__main__":
    main()
