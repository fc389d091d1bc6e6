"""A model recalibrated for a site, as a folder of its own: the same weights, other calibrators and operating points.

Weights are linked where the disk allows it, else copied; the members of an ensemble come along, so that the folder
needs nothing else. The old folder is only read. What is fitted, and how it is judged: `evaluation/recalibration.py`.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hilum
from hilum.core.files import atomic_path, write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.card import with_preface
from hilum.deploy.checklist import CHECKLIST_NAME
from hilum.deploy.predictor import member_folders

MEMBERS = "members"
REPORT_NAME, NUMBERS_NAME = "site_report.html", "site_report.json"
_OWN = (files.CONFIG_NAME, files.CARD_NAME, CHECKLIST_NAME, REPORT_NAME, NUMBERS_NAME)
CHECKLIST_PREFACE = (
    f"Recalibrated for a site (`{REPORT_NAME}`): what is said here of calibration, thresholds and performance is of "
    "the model as it was."
)


def write_site_model(
    model: Path, out: Path, calibrators: files.Calibrators, fitted_on: Mapping[str, Any], site: Mapping[str, Any]
) -> list[Path]:
    """Write everything of the new model but its report; `config.json` last.

    Args:
        model: MODEL or ensemble directory.
        out: a new folder.
        calibrators: for images and for studies.
        fitted_on: what they were fitted on, for `config.json`.
        site: how, and what came of it.

    Returns:
        the folders that hold a network each.

    Raises:
        CheckpointError: the old model is incomplete.
        HilumError: the disk is full or the folder cannot be written.
    """
    content = files.read_config(model)
    out.mkdir(parents=True, exist_ok=True)
    if content["format"] == files.MODEL_FORMAT:
        folders = [out]
    else:
        folders, named = [], []
        for number, (folder, member) in enumerate(zip(member_folders(model, content), content["members"], strict=True)):
            inside = out / MEMBERS / f"{number:02d}"
            take_along(folder, inside)
            folders.append(inside)
            named.append({**member, "path": inside.relative_to(out).as_posix()})
        content = {**content, "members": named}
    take_along(model, out, leave=_OWN)
    new = {key: value for key, value in content.items() if key != "uncalibrated"}
    new |= {
        "hilum": hilum.__version__,
        "calibration": files.describe_calibrators(calibrators),
        "fitted_on": dict(fitted_on),
        "recalibrated": {"from": files.digest_of(model), "by": hilum.__version__, **site},
    }
    write_text(out / files.CARD_NAME, _card(model, site))
    if (model / CHECKLIST_NAME).is_file():
        before = (model / CHECKLIST_NAME).read_text(encoding="utf-8")
        write_text(out / CHECKLIST_NAME, with_preface(before, CHECKLIST_PREFACE))
    files.write_config(out, new)
    return folders


def take_along(source: Path, out: Path, leave: tuple[str, ...] = ()) -> None:
    """Link the files of a folder into another, or copy them where that cannot be; folders in it stay behind."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name in leave:
            continue
        if file.name != files.CONFIG_NAME:  # small, and the one that a link would let grow old together
            try:
                os.link(file.resolve(), out / file.name)
                continue
            except OSError:
                pass
        with atomic_path(out / file.name) as temporary:
            shutil.copyfile(file, temporary)


def _card(model: Path, site: Mapping[str, Any]) -> str:
    card = model / files.CARD_NAME
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    overall = site["overall"]
    names = {word: ", ".join(overall[word]) or "none" for word in ("yes", "not_shown", "no")}
    preface = (
        f"# Recalibrated for a site\n\n{RESEARCH_NOTICE}\n\n"
        f"Calibrators and operating points were fitted on {site['studies']} labelled studies of {site['patients']} "
        f"patients of one site; the weights are those of the model below. Fit for this site: **{overall['verdict']}** "
        f"(yes: {names['yes']}; not shown: {names['not_shown']}; no: {names['no']}). The whole report is in "
        f"`{REPORT_NAME}`. What the card below says of calibration and scores is of the model as it was."
    )
    return with_preface(before, preface)
