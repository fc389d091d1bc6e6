"""What heads learn from in a fit: labels with weights of datasets, studies, text vectors, and what a teacher says."""

import numpy as np
import torch
from jaxtyping import Float32

from hilum.commands.fit_inputs import Examples
from hilum.core.errors import ConfigError, LeakageError
from hilum.core.tracking import progress, say, warn
from hilum.deploy.predictor import load
from hilum.heads.config import FitConfig
from hilum.heads.sources import parse_source_weights
from hilum.heads.targets import pseudo_targets
from hilum.heads.text_queries import read_vectors
from hilum.heads.training import LearningSet


def open_learning_set(config: FitConfig, examples: Examples, device: torch.device) -> LearningSet:
    """The examples as heads learn from them: studies, sources, pseudo-labels and text vectors where settings ask.

    Raises:
        ConfigError, UnknownNameError: weights of datasets that are not there, a bias for a single dataset, findings
            without a text vector, text queries without vectors, or a teacher of other findings.
        LeakageError: the model that gives pseudo-labels was trained on validation or test images.
    """
    if (config.queries == "text") != (config.text_vectors is not None):
        raise ConfigError(
            f"queries={config.queries}, text_vectors={config.text_vectors}: queries=text needs text_vectors=FILE, and "
            "no other queries read it (docs/how-to/add-findings.md)."
        )
    several = bool(config.source_weights) or config.source_bias
    if config.source_bias and len(examples.sources) < 2:
        raise ConfigError(f"source_bias: all training images are of {examples.sources[0]}; it needs a second dataset.")
    if config.needs_studies and len(np.unique(examples.studies[examples.train])) == len(examples.train):
        warn("no study has two training images: views and consistency have nothing to learn from")
    text = None
    if config.text_vectors is not None:
        text = torch.from_numpy(read_vectors(config.text_vectors, examples.names))
    weights = parse_source_weights(config.source_weights, examples.sources) if several else None
    soft = None if config.pseudo_labels is None else _pseudo_labels(config, examples, device)
    return LearningSet(
        examples.train, examples.val, examples.labels, soft,
        studies=examples.studies if config.needs_studies else None,
        views=examples.views if config.needs_studies else None,
        sources=examples.source_of_image if several else None, source_weights=weights, text=text,
    )  # fmt: skip


def _pseudo_labels(
    config: FitConfig, examples: Examples, device: torch.device
) -> tuple[Float32[np.ndarray, "N C"], Float32[np.ndarray, "N C"]]:
    """Values and weights of all images: labels where known, the teacher's probabilities where not, in training alone.

    Validation images keep their labels: what is unknown there judges nothing and, in the refit, teaches nothing.
    """
    assert config.pseudo_labels is not None
    teacher = load(config.pseudo_labels, str(device))
    store, train = examples.store, examples.train
    for split, images in (("validation", examples.val), ("test", store.indices("test"))):
        if trained_on := int(teacher.exposure.learned_from(store.uids[images], store.pictures[images]).sum()):
            raise LeakageError(
                f"{config.pseudo_labels} was trained on {trained_on} of {len(images)} {split} images; its "
                "pseudo-labels would carry their labels into training. Fit the teacher on the same splits with "
                "refit=false."
            )
    scored_from_text = {
        name for network in teacher.networks for one in network.config.extensions if one.zero_shot
        for name in one.findings
    }  # fmt: skip
    known = set(teacher.findings) - scored_from_text
    columns = [column for column, finding in enumerate(examples.findings) if finding.trained and finding.name in known]
    if not columns:
        raise ConfigError(
            f"{config.pseudo_labels} was trained on none of {', '.join(examples.names)}; it has nothing to teach."
        )
    with progress("pseudo-labels", len(train), "images") as bar:
        predicted = teacher.predict_store(
            store, train, batch_size=config.batch_size, workers=config.workers, done=bar.advance
        )
    place = {name: column for column, name in enumerate(predicted.findings)}
    probabilities = np.full(examples.labels.shape, np.nan)
    found = predicted.probabilities[:, [place[examples.names[column]] for column in columns]]
    probabilities[train[:, None], np.array(columns)] = found
    low, high = 0.5 - config.pseudo_certainty, 0.5 + config.pseudo_certainty
    values, weights = pseudo_targets(examples.labels, probabilities, weight=config.pseudo_weight, low=low, high=high)
    filled = int(((weights[train] > 0) & (examples.labels[train] < 0)).sum())
    say(f"Pseudo-labels: {filled} of {int((examples.labels[train] < 0).sum())} unknown training labels filled")
    return values, weights
