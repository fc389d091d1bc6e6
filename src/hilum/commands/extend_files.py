"""The files of a MODEL that `extend` writes: what the model had, unchanged, and what was added beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

import hilum
from hilum.commands.extend_inputs import Base
from hilum.commands.extend_training import Rung
from hilum.commands.fit_inputs import Examples
from hilum.core.files import write_bytes, write_json
from hilum.core.types import POSITIVE
from hilum.data.labels import IMPLIES
from hilum.deploy import model_files as files
from hilum.deploy.card import write_cards
from hilum.deploy.screening import SCREENING_NAME
from hilum.evaluation.calibration import Calibrator, describe_items
from hilum.evaluation.calibrators import IDENTITY
from hilum.evaluation.fitted_items import are_among, merge_items
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.studies import study_uids
from hilum.heads.extension import ExtendedHead
from hilum.heads.registry import Head
from hilum.pretraining.exposure import join_leaks

ZERO_SHOT_GROUP = "zero-shot"
ZERO_SHOT_FLAG = "zero-shot: scored from text, no label seen; uncalibrated, no threshold"


def write_extended(
    base: Base,
    out: Path,
    extension: files.Extension,
    added: Head,
    findings: Sequence[files.Finding],
    calibrators: files.Calibrators,
    exposure: files.Exposure,
    validation: tuple[Predictions, Int[np.ndarray, "M C"]] | None,
    search: Mapping[str, Any],
    leak: str = "",
) -> dict[str, Any]:
    """Write a MODEL with one extension more; `config.json` last.

    Args:
        base: the model it was made from.
        out: a new directory.
        extension: description of the new head.
        added: the new head, with weights.
        findings: of the new head.
        calibrators: of the new findings, by unit.
        exposure: images that the new head has met (train, val, pictures).
        validation: raw predictions of the head that had not seen validation, and labels; None: there are none.
        search: how it was found, for `extension_N_search.json`.
        leak: one by design that the store accepted.

    Returns:
        `config.json`.
    """
    network = replace(
        base.network, findings=(*base.network.findings, *findings), extensions=(*base.network.extensions, extension)
    )
    before = base.head.heads if isinstance(base.head, ExtendedHead) else [base.head]
    outputs = (network.head.findings, *(one.head.findings for one in network.extensions))
    out.mkdir(parents=True, exist_ok=True)
    copy_kept(base, out)
    write_json(out / files.validation_name(files.SEARCH_NAME, len(base.network.extensions)), search)
    if validation is not None:
        files.write_validation(out, *validation, extension=len(base.network.extensions))
    content = dict(base.content) | files.describe(network)
    content |= {
        "hilum": hilum.__version__,
        "weights": files.write_weights(
            out, base.backbone, ExtendedHead(before[0], [*before[1:], added], outputs), network.extensions
        ),
        "calibration": files.describe_calibrators(join_calibrators(base, calibrators, validation)),
        "exposure": said_of_exposure(base) | files.write_exposure(out, files.Exposure.join([base.exposure, exposure])),
        "accepted_leak": join_leaks(str(base.content.get("accepted_leak") or ""), leak),
        "extended_from": files.digest_of(base.path),
    }
    if "recalibrated" in content:
        content["recalibrated"] = {**content["recalibrated"], "elsewhere": calibrated_elsewhere(base)}
    write_cards(out, content, more=extension_card(content))
    files.write_config(out, content)
    return content


def copy_kept(base: Base, out: Path) -> None:
    """Copy what stays as it is, byte for byte: searches and validation predictions of the heads that there are."""
    names = [files.SEARCH_NAME, files.LOGITS_NAME, files.LABELS_NAME]
    for number in [None, *range(len(base.network.extensions))]:
        for name in names:
            source = base.path / files.validation_name(name, number)
            if source.is_file():
                write_bytes(out / source.name, source.read_bytes())
    if "screening" in base.content:
        write_bytes(out / SCREENING_NAME, (base.path / SCREENING_NAME).read_bytes())


def join_calibrators(
    base: Base, added: files.Calibrators, validation: tuple[Predictions, np.ndarray] | None
) -> files.Calibrators:
    """The model's maps and thresholds as they are, and those of the new findings after them.

    The record of what was fitted on is the union: neither kind of finding may be judged on items of the other's.
    """
    return {unit: _join(base, base.calibrators[unit], added[unit], validation) for unit in base.calibrators}


def _join(
    base: Base, old: Calibrator, new: Calibrator, validation: tuple[Predictions, np.ndarray] | None
) -> Calibrator:
    items = old.fitted_on
    if validation is not None and items is not None:
        uids = {uid for one, _ in (*base.validations, validation) for uid in _items(one, old.unit)}
        items = merge_items([describe_items(uids), items])  # a site's may be among them
    return replace(
        old, findings=old.findings + new.findings, maps=old.maps | new.maps, thresholds=old.thresholds | new.thresholds,
        raw_thresholds=old.raw_thresholds | new.raw_thresholds, fitted_on=items,
    )  # fmt: skip


def said_of_exposure(base: Base) -> dict[str, Any]:
    """What a model says of images that nobody has recorded; whatever is made from it says so too."""
    said = base.content.get("exposure") or {}
    return {name: said[name] for name in ("not_recorded", "weights", "datasets") if name in said}


def calibrated_elsewhere(base: Base) -> list[str]:
    """Findings of a recalibrated model whose maps are of a site, while the validation that it holds is not.

    The union of items can no longer tell, once something is added that was fitted on that validation.
    """
    recalibrated = base.content.get("recalibrated") or {}
    items, fitted_on = _items(base.validations[0][0], "image"), base.calibrators["image"].fitted_on
    if not recalibrated or "elsewhere" in recalibrated:
        return list(recalibrated.get("elsewhere", ()))
    return [] if fitted_on and are_among(items, fitted_on) else list(base.names)


def _items(predictions: Predictions, unit: str) -> list[str]:
    p = predictions
    if unit == "image":
        return p.image_uid.tolist()
    return study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid).tolist()


def uncalibrated(base: Base, names: Sequence[str]) -> files.Calibrators:
    """Calibrators of zero-shot findings: the identity, flagged, without thresholds."""
    one = {
        "kind": "temperature_bias", "parameters": dict(IDENTITY), "positives": 0, "known": 0, "group": ZERO_SHOT_GROUP,
        "flag": ZERO_SHOT_FLAG, "threshold_shrunk": False,
    }  # fmt: skip
    return {
        unit: Calibrator(tuple(names), {name: dict(one) for name in names}, {}, {}, old.stage, old.unit, old.fitted_on)
        for unit, old in base.calibrators.items()
    }


def make_cards(examples: Examples, rung: Rung, old: Sequence[str]) -> dict[str, Any]:
    """What is kept of each new finding: its labels, where they come from and what it started from."""
    train, val = examples.labels[examples.train], examples.labels[examples.val]
    return {
        name: {
            "train_positives": int((train[:, column] == POSITIVE).sum()),
            "train_known": int((train[:, column] >= 0).sum()),
            "val_positives": int((val[:, column] == POSITIVE).sum()),
            "val_known": int((val[:, column] >= 0).sum()),
            "datasets": _datasets(examples, column),
            "parent": next((one for one in IMPLIES.get(name, ())[:1] if one in old), None) if rung.initial else None,
        }
        for column, name in enumerate(examples.names)
    }


def _datasets(examples: Examples, column: int) -> list[str]:
    labelled = examples.both[examples.labels[examples.both, column] >= 0]
    return np.unique(examples.store.datasets[labelled]).tolist()


def memory_has_seen(base: Base, rung: Rung, examples: Examples) -> bool:
    """Whether what is taken over, or a tuned backbone, was trained on images that calibrate the new findings."""
    tuned = bool((base.content["training"].get("tuning") or {}).get("refit_epochs"))
    if rung.initial is None and not tuned:
        return False
    store, val = examples.store, examples.val
    return bool(base.exposure.learned_from(store.uids[val], store.pictures[val]).any())


def extension_card(content: Mapping[str, Any]) -> str:
    """What the model card says of findings that were added."""
    lines = []
    if elsewhere := (content.get("recalibrated") or {}).get("elsewhere"):
        lines += [
            "", "## Recalibrated for a site", "",
            f"{', '.join(elsewhere)}: calibrated on studies of one site, not on the validation above. Findings added "
            "since are calibrated on the validation named below, not at that site.",
        ]  # fmt: skip
    for number, extension in enumerate(content.get("extensions", ()), 1):
        names, training = extension["findings"], extension["training"]
        lines += ["", f"## Extension {number}: {', '.join(names)}", ""]
        if extension["zero_shot"]:
            held_out = training["held_out"]
            expected = (
                "How well was not tested on findings held out."
                if held_out is None
                else f"Findings that were held out of the training of this head as if unseen ({held_out['count']} of "
                f"them, which also chose its rate) reached a mean average precision of {held_out['mAP']:.3f} on "
                f"validation, where chance is {held_out['prevalence']:.3f}."
            )
            lines.append(
                "**Zero-shot**: scored from text vectors of their names alone. No label of them was seen, nothing is "
                "calibrated and there is no threshold: the scores order images, they are no probabilities. " + expected
            )
            continue
        lines += [
            f"Added to the model {training['extended_from']} without changing it ({training['rung']}): its own "
            "outputs are the same bits. Trained, selected and calibrated on:",
            "",
            "| finding | train positives | val positives | known in train | known in val | parent |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {card['train_positives']} | {card['val_positives']} | {card['train_known']} | "
                f"{card['val_known']} | {card['parent'] or ''} |"
                for name, card in extension["cards"].items()
            ),
        ]
        if training["memory_has_seen_validation"]:
            lines += ["", SEEN_NOTE]
    return "\n".join(lines) + "\n" if lines else ""


SEEN_NOTE = (
    "What is taken over from the model was trained on these validation images, with the labels of the earlier "
    "findings, so calibration may be a little optimistic. A model fitted with refit=false has not seen them."
)
