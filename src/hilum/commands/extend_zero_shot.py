"""`hilum extend --zero-shot`: findings without any label, scored from text vectors of their names.

A decoder whose queries are projected from text is trained on the findings that the model has and the store labels.
First some of these are held out as if they were unseen: what is reached on them chooses rate and length, and is the
only honest word on what to expect of the new ones. Then all are learned from, and the new vectors are put in. The
result is no probability: flagged, without calibrator and threshold. A model whose own head reads text needs no store.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from hilum.commands.extend import composition_of, feature_source
from hilum.commands.extend_files import ZERO_SHOT_GROUP, uncalibrated, write_extended
from hilum.commands.extend_inputs import Base, check_new, check_sides, open_base, settings_of, target_of
from hilum.commands.fit_inputs import Examples, open_examples
from hilum.commands.fit_outputs import exposure_of
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError
from hilum.core.seeding import stream
from hilum.core.tracking import next_step, say, warn
from hilum.core.types import POSITIVE, UNKNOWN
from hilum.data.store import Store
from hilum.deploy import model_files as files
from hilum.deploy.network import choose_device
from hilum.evaluation.definitions import mean_average_precision
from hilum.heads.batches import in_order
from hilum.heads.features import freeze
from hilum.heads.open_vocabulary import (
    VECTORS,
    DroppedClasses,
    give_vectors,
    held_out_findings,
    is_open,
    same_encoder,
)
from hilum.heads.protocol import choose
from hilum.heads.registry import Head, HeadConfig, on_meta
from hilum.heads.standardise import Standardisation, measure, preparation
from hilum.heads.text_queries import read_vectors
from hilum.heads.training import LearningSet, refit, search

SEARCH_FORMAT = "hilum-zero-shot-search-1"
HELD_OUT_SHARE, CLASS_DROPOUT = 0.25, 0.3


def run(
    model: Path,
    vectors: Path,
    findings: Sequence[str],
    out: Path,
    data: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Path:
    """Add findings that are scored from text and write a new MODEL directory.

    Args:
        model: a MODEL directory.
        vectors: text vectors (`heads.text_queries.read_vectors`) of the new findings and of those with labels.
        findings: names in that file.
        out: a new directory.
        data: a store with labels of findings that the model has; not needed where its own head reads text.
        overrides: key=value over the settings that the model was fitted with.
        device: auto, cpu or cuda.

    Returns:
        `out`.

    Raises:
        ConfigError: no store and no head that reads text, or settings for it; vectors of another encoder, or too few
            labelled findings.
        UnknownNameError: a finding without a vector.
        LeakageError, PreprocessingMismatchError, NonFiniteLossError: as `extend`.
    """
    out, vectors = Path(out), Path(vectors)
    files.require_new(out)
    base = open_base(Path(model))
    names = check_new(base, findings)
    composition_of(base)  # for what it refuses: the new scores are no probabilities, and nothing is fitted through it
    if data is None and overrides:
        raise ConfigError(
            f"{' '.join(overrides)}: without --data nothing is trained, and no setting is read. Leave it out, or give "
            "--data STORE."
        )
    new = read_vectors(vectors, names)
    if data is None:
        described, head, training, search_record = _from_own_head(base, vectors, new)
        exposure, leak = files.Exposure(), ""
    else:
        described, head, training, search_record, exposure, leak = _learn(
            base, vectors, new, Path(data), overrides, device
        )
    seen = training.pop("seen_vectors")
    cards = {
        name: {"vectors": vectors.name, "nearest": _nearest(row, *seen)} for name, row in zip(names, new, strict=True)
    }
    training |= {"extended_from": files.digest_of(base.path), "rung": "zero-shot"}
    added = tuple(files.Finding(name, ZERO_SHOT_GROUP, True, 0, 0) for name in names)
    extension = files.Extension(described, names, (), True, cards, training)
    write_extended(base, out, extension, head, added, uncalibrated(base, names), exposure, None, search_record, leak)
    warn(
        f"{', '.join(names)}: zero-shot. The scores order images; they are not probabilities, are not calibrated and "
        "have no threshold. Expect little, and label some positives (`hilum extend` without --zero-shot)."
    )
    say(f"{out}: {len(base.names)} findings as they were, and {len(names)} scored from text")
    next_step(f"hilum predict {out} IMAGES --out findings.csv")
    return out


def _from_own_head(
    base: Base, vectors: Path, new: Float32[np.ndarray, "K T"]
) -> tuple[HeadConfig, Head, dict[str, Any], dict[str, Any]]:
    """A copy of the model's head with other vectors."""
    config = base.network.head
    if not is_open(config):
        raise ConfigError(
            f"The head of {base.path} does not read text. Give --data STORE, on whose labels a decoder of text queries "
            "is trained beside it; or fit the model with queries=text shared_output=true."
        )
    seen = base.names[: config.findings]
    own = base.main.state_dict()[VECTORS]
    same_encoder(own, read_vectors(vectors, seen), seen)
    described, head = give_vectors(base.main, config, new)
    training = {"held_out": None, "seen_vectors": (seen, own.double().cpu().numpy())}
    return described, head, training, {"format": SEARCH_FORMAT, "trained": False}


def _learn(
    base: Base, vectors: Path, new: Float32[np.ndarray, "K T"], data: Path, overrides: Sequence[str], device: str
) -> tuple[HeadConfig, Head, dict[str, Any], dict[str, Any], files.Exposure, str]:
    """Train a decoder of text queries on the findings that have labels; test it on some that are held out."""
    store = Store.open(data)
    store.check_recipe(base.network.preprocess_id, base.path)
    seen = tuple(name for name in base.names if name in store.findings)
    if not seen:
        raise ConfigError(
            f"{data} has labels of no finding of {base.path}; a decoder of text queries learns from them."
        )
    start = ("head=ml_decoder", "views=single", "loss=masked_bce_mean")
    config = replace(settings_of(base, [*start, *overrides]), queries="text", shared_output=True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = choose_device(device)
    examples = open_examples(data, seen, target=target_of(base, store))
    check_sides(base, store, examples.train, examples.val)
    known = read_vectors(vectors, seen)
    train, val, labels = examples.train, examples.val, examples.labels

    backbone = freeze(base.backbone).to(place)
    embed_dim, text = backbone.config.embed_dim, torch.from_numpy(known)
    described = config.describe_head(embed_dim, len(seen), text_dim=known.shape[1])
    source = feature_source(config, base, examples, [described], place)
    scaling: Standardisation | None = None
    if config.standardise:
        batches = [batch.images for batch in in_order(train, config.batch_size)]
        scaling = measure(features for _, features in source.evaluation(batches))
    prepare = preparation(scaling)

    # Some findings are held out of training: what is reached on them chooses, and is reported.
    tested = held_out_findings(np.flatnonzero(examples.scored).tolist(), HELD_OUT_SHARE, config.seed)
    masked = labels.copy()
    masked[:, tested] = UNKNOWN

    def score(probabilities: np.ndarray) -> float:
        return mean_average_precision(probabilities, labels[val], np.array(tested))

    whole = config.needs_studies

    def dropping(of: np.ndarray, phase: str, held: np.ndarray) -> LearningSet:
        generator = stream(config.seed, "class dropout", phase)
        return DroppedClasses(
            train, held, of, studies=examples.studies if whole else None, views=examples.views if whole else None,
            text=text, drop=CLASS_DROPOUT, generator=generator,
        )  # fmt: skip

    searched = search(config, embed_dim, dropping(masked, "search", val), source, prepare, score, place)
    variants = config.variants()
    learned_from = val if config.refit else val[:0]  # beside train, in the last fit
    chosen = choose(
        searched.epochs, variants, train_images=len(train), val_images=len(learned_from),
        refit_epochs=config.refit_epochs, stop_epoch=config.stop_epoch, refit_init="cold",
    )  # fmt: skip
    held_out = _held_out(examples, tested, chosen.score)
    say(
        f"Held out as if unseen: {', '.join(held_out['findings'])}: mAP {chosen.score:.3f} on validation, chance "
        f"{held_out['prevalence']:.3f} ({chosen.variant})"
    )

    # All findings with labels, train + val (refit=false: train alone); then the vectors of the new ones.
    state, losses = refit(
        config, embed_dim, dropping(labels, "refit", learned_from), source, prepare, chosen.variant,
        chosen.refit_epochs, 0, None, place,
    )  # fmt: skip
    learned = on_meta(described)
    learned.load_state_dict(state, assign=True)
    if scaling is not None:
        learned.absorb(scaling)
    new_config, head = give_vectors(learned, described, new)
    training = {
        "held_out": held_out, "seen": list(seen), "class_dropout": CLASS_DROPOUT, "settings": to_dict(config),
        **examples.describe_data(),
        "store": {name: store.fingerprint(rows) for name, rows in (("train", train), ("val", val))},
        "seen_vectors": (seen, known.astype(np.float64)),
    }  # fmt: skip
    record = {
        "format": SEARCH_FORMAT, "trained": True, "criterion": "macro average precision of held-out findings on val",
        "held_out": held_out, "variants": [to_dict(one) for one in variants],
        "epochs": [to_dict(epoch) for epoch in searched.epochs], "chosen": to_dict(chosen),
        "refit_losses": list(losses),
    }  # fmt: skip
    return new_config, head, training, record, exposure_of(examples, config.refit), store.accepted_leak


def _held_out(examples: Examples, tested: Sequence[int], score: float) -> dict[str, Any]:
    labels = examples.labels[examples.val][:, list(tested)]
    known, positive = (labels >= 0).sum(axis=0), (labels == POSITIVE).sum(axis=0)
    return {
        "findings": [examples.names[column] for column in tested],
        "count": len(tested),
        "mAP": score,
        "prevalence": float(np.mean(positive / np.maximum(known, 1))),
    }


def _nearest(vector: np.ndarray, names: Sequence[str], vectors: np.ndarray) -> dict[str, Any]:
    """The finding with labels whose text is most alike."""
    cosine = vectors @ vector / np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector), 1e-12)
    best = int(np.argmax(cosine))
    return {"finding": names[best], "cosine": round(float(cosine[best]), 4)}
