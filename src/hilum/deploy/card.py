"""The model card of a directory: README.md for people who are handed it, and the checklists beside it.

Made from what `config.json` records and from the validation files; it claims nothing that was not recorded, and where
something was not it says so. What only the authors know they have to write themselves. Past 300 lines: one page of text
in the order in which it is read, for one model and for several.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.licences import licences
from hilum.deploy import model_files as files
from hilum.deploy.card_evidence import MIN_POSITIVES, Evidence, measure_validation
from hilum.deploy.checklist import CHECKLIST_NAME, cell, checklist
from hilum.evaluation.composition import Composition
from hilum.evaluation.markup import decimal

FRONT_MATTER = """---
library_name: hilum
pipeline_tag: image-classification
tags:
- chest-x-ray
- radiology
- medical
- multi-label-classification
- long-tailed
- vision-transformer
- research-use-only
# license: to be chosen by the authors; see the terms of the data below
---
"""
INTENDED = (
    "For research with chest radiographs, and for finding out how such a model behaves on images of one's own. Not for "
    "diagnosis, triage or patient management, not for other body parts or modalities, and not for deciding about a "
    "person. Whoever wants numbers for their own patients recalibrates and tests it there: `hilum recalibrate`, "
    "`hilum evaluate`."
)
WHOM = "Of whom the training images are (age, sex, region, how ill) is not recorded here; the authors should say."
LIMITS = (
    "Numbers above come from validation images that also chose the settings; a test on other patients, and on patients "
    "of another hospital, is the authors' to add.",
    "Labels of public datasets mostly come from reports by rules or language models, and are wrong now and then; "
    "performance against them is not performance against disease.",
    "A probability holds for people as common and as ill as those of validation. Elsewhere it must be recalibrated.",
    "Findings with few positives have wide intervals, and findings in no group of their own lean on their group's "
    "calibration.",
    "A map shows where the model looked, not where a lesion is.",
)


def write_cards(
    path: Path, content: Mapping[str, Any], composition: Composition | None = None, more: str = ""
) -> list[Evidence]:
    """Write `README.md` and `checklist.md` of a directory. Called before `config.json` is written.

    Args:
        path: MODEL or ensemble directory with its validation files (of an ensemble, its members').
        content: what `config.json` will hold.
        composition: how it puts predictions together; None: as `content` says (an ensemble by ranks needs it).
        more: sections that follow, in Markdown.

    Returns:
        what was measured for them.
    """
    evidence = measure_validation(path, content, composition or Composition.read(content))
    write_text(path / files.CARD_NAME, model_card(content, evidence, _members(path, content)) + more)
    write_text(path / CHECKLIST_NAME, checklist(content, evidence, _members(path, content)))
    return evidence


def model_card(
    content: Mapping[str, Any],
    evidence: Sequence[Evidence] | None = None,
    members: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md, beginning with the metadata that model hubs read.

    Args:
        content: of `config.json` of a model or an ensemble.
        evidence: of its validation; None: nothing was measured.
        members: of an ensemble, the `config.json` of each.
    """
    findings = content["findings"]
    name = next((one["name"] for one in findings if one["trained"]), findings[0]["name"])
    parts = [
        [FRONT_MATTER.rstrip(), f"# {len(findings)} findings on chest X-rays", RESEARCH_NOTICE],
        ["## Intended use", INTENDED, WHOM],
        ["## Use", _usage(name)],
        ["## Model", *(_ensemble(content, members) if members or "members" in content else _network(content))],
        ["## Data", *_data(content, members)],
        _validation(evidence),
        _calibration(content, evidence),
        _groups(evidence),
        ["## Limits", *(f"- {limit}" for limit in LIMITS)],
        ["## Findings", *_findings(content, evidence)],
        ["## Footprint", "Energy and carbon of training were not recorded; neither was the time it took."],
        ["## Reporting", f"`{CHECKLIST_NAME}`: the items of CLAIM 2024 and TRIPOD+AI, filled where this is recorded."],
    ]
    return "\n\n".join(_block(part) for part in parts if part) + "\n"


def with_preface(card: str, preface: str) -> str:
    """A card with something to read before it; what model hubs read stays at the top.

    Args:
        card: as `model_card` makes it, or any other text.
        preface: Markdown, of what the directory was made into.
    """
    parts = card.split("---\n", 2)
    metadata, rest = (f"---\n{parts[1]}---\n\n", parts[2]) if len(parts) == 3 and not parts[0] else ("", card)
    return f"{metadata}{preface.strip()}\n\n---\n\n{rest.lstrip()}"


def _block(lines: Sequence[str]) -> str:
    """Paragraphs; consecutive list items and table rows stay together."""
    text = ""
    for line in lines:
        together = line.startswith(("- ", "| ")) and text.rsplit("\n", 1)[-1].startswith(("- ", "| "))
        text += ("\n" if together else "\n\n" if text else "") + line.strip("\n")
    return text


def _members(path: Path, content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [files.read_config(path / member["path"]) for member in content.get("members", ())]


def _usage(finding: str) -> str:
    return (
        "```python\nimport hilum\n"
        'result = hilum.load("THIS_FOLDER").predict(["frontal.dcm", "lateral.dcm"])  # one study\n'
        f'result.probabilities["{finding}"]\n```'
    )


def _network(content: Mapping[str, Any]) -> list[str]:
    backbone, head = content["architecture"]["backbone"], content["architecture"]["head"]
    recipe, training = content["preprocessing"], content.get("training") or {}
    settings = training.get("settings") or {}
    lines = [
        f"A {_NAMES.get(head['name'], head['name'])} {_VIEWS.get(head.get('views', 'single'), '')}on a "
        f"{_method(training)} vision transformer ({backbone['depth']} blocks of {backbone['embed_dim']} channels, "
        f"patch {backbone['patch_size']}), {recipe['resolution']} x {recipe['resolution']} pixels, images read by the "
        f"recipe `{recipe['id']}`. Images of a study: {content.get('study', 'mean')}. Made by Hilum {content['hilum']}."
    ]
    if settings:
        lines.append(
            f"Trained with the loss {settings['loss']}, sampling {settings['sampling']}, seed {settings['seed']}; all "
            "settings are in `config.json`, the search in `search.json`."
        )
    return lines


def _ensemble(content: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> list[str]:
    weights = content.get("member_weights") or [1.0] * len(content["members"])
    damping = content.get("normal_damping")
    lines = [f"Ensemble of {len(content['members'])} models. Made by Hilum {content['hilum']}."]
    described = members or [{}] * len(content["members"])
    for member, weight, one in zip(content["members"], weights, described, strict=True):
        kind = ""
        if "architecture" in one:
            head, recipe = one["architecture"]["head"]["name"], one["preprocessing"]
            kind = f"; {_NAMES.get(head, head)}, {recipe['resolution']} pixels, recipe `{recipe['id']}`"
        lines.append(f"- `{member['path']}` (identity {member['digest']}, weight {weight:g}{kind})")
    lines.append(
        f"Order of operations: {content['order']}. Images of a study: {content['study']}. Models: "
        f"{content['ensemble']}." + (f" Abnormal findings are damped by Normal: {damping}." if damping else "")
    )
    return lines


def _data(content: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> list[str]:
    models = list(members) or [content]
    lines = []
    for number, one in enumerate(models, 1):
        exposure = one.get("exposure") or {}
        images = exposure.get("images") or {}
        prefix = f"Member {number}: " if members else ""
        if images:
            lines.append(
                f"{prefix}Pretraining: {_pretraining(exposure)}. Head: {images['train']} training images"
                f"{_and_val(images['val'])}."
            )
        for extension, training in enumerate(files.trainings(one)):
            if sources := training.get("sources"):
                listed = ", ".join(f"{name} ({n['train']} train, {n['val']} val)" for name, n in sources.items())
                head = f"extension {extension}" if extension else "the head"
                lines.append(f"{prefix}Labels of {head} come from {listed}.")
        if told := exposure.get("not_recorded"):
            known = f": {', '.join(exposure['datasets'])}" if exposure.get("datasets") else ""
            lines.append(f"{prefix}{told[0].upper()}{told[1:]}{known}.")
        if one.get("accepted_leak"):
            lines.append(f"{prefix}Leak accepted: {one['accepted_leak']}.")
    lines.append(
        "Identities of the images are in `exposure.npz`; an evaluation on any of them is not one on unseen images."
    )
    tags = sorted({tag for one in models for tag in licence_tags(one)})
    if tags:
        lines.append("Terms of the data, by tags of the store and the table of Hilum (no legal advice):")
        lines += [_licence(tag) for tag in tags]
    else:
        lines.append("Terms of the data were not recorded here; the store that it was trained on has their tags.")
    return lines


def licence_tags(content: Mapping[str, Any]) -> list[str]:
    """Tags of the licences of the training images, as far as they are recorded; of added findings' too."""
    recorded = [(training.get("licences") or {}).values() for training in files.trainings(content)]
    return sorted({tag for several in recorded for tags in several for tag in tags if tag})


def _licence(tag: str) -> str:
    known = licences().get(tag)
    return f"- `{tag}`: {known.cite}" if known else f"- `{tag}`"


def _validation(evidence: Sequence[Evidence] | None) -> list[str]:
    if evidence is None:
        return []
    lines = ["## Validation"]
    if not evidence:
        return [*lines, "This directory keeps no validation predictions that are out of sample; nothing was measured."]
    for one in evidence:
        metrics = one.metrics
        lines += [
            f"{metrics['n_studies']} studies of {metrics['n_patients']} patients ({one.images} images), scored by a "
            "head that had not been trained on them. Settings were chosen on these same images, so the numbers are a "
            "little optimistic, and they are no test. Intervals: 95 %, "
            f"{metrics['bootstrap']['resamples']} resamples of patients; findings with at least {MIN_POSITIVES} "
            "positive studies.",
            "| mean over findings | findings | AP | AUC |",
            "| --- | --- | --- | --- |",
            *_means(metrics),
        ]
        few = [*metrics["excluded"]["few_positives"], *metrics["excluded"]["no_labels"]]
        if few:
            lines.append(f"Too few positive studies for numbers of their own: {', '.join(few)}.")
    return lines


def _means(metrics: Mapping[str, Any]) -> list[str]:
    rows = [("all", metrics["macro"]), *((name, metrics["groups"].get(name) or {}) for name in _GROUPS)]
    return [
        f"| {name} | {part['counted']['mAP']} | {_with_ends(part, 'mAP')} | {_with_ends(part, 'mAUC')} |"
        for name, part in rows
        if part and part.get("mAP") is not None
    ]


def _with_ends(part: Mapping[str, Any], metric: str) -> str:
    value, ends = part.get(metric), (part.get("ci95") or {}).get(metric)
    if value is None:
        return "-"
    return decimal(value) + (f" [{decimal(ends[0])}, {decimal(ends[1])}]" if ends else "")


def _calibration(content: Mapping[str, Any], evidence: Sequence[Evidence] | None) -> list[str]:
    lines = ["## Calibration"]
    if content.get("uncalibrated"):
        return [*lines, f"Not calibrated: {content['uncalibrated']}. Scores order images and are no probabilities."]
    fitted, training = content.get("fitted_on") or {}, content.get("training") or {}
    if "members" in content:
        chosen = ", and the choice of members and rules," if "choice" in content else ""
        lines.append(
            f"Its own calibrators (per image and per study){chosen} were fitted on the members' out-of-sample "
            f"predictions of {fitted['images']} validation images."
        )
    elif {"epoch", "images"} <= set(fitted) and "learning_rate" in training:
        inherits = "the head in this folder inherits them" if training.get("refit_epochs") else _SAME
        lines.append(
            f"Calibrators and operating points were fitted on {fitted['images']} validation images, predicted by the "
            f"head of the learning-rate search (rate {training['learning_rate']:g}, epoch {fitted['epoch']}), which "
            f"had not been trained on them; {inherits}."
        )
    for one in evidence or ():
        macro = (one.calibration or {}).get("macro")
        if macro:
            lines += [
                f"Before and after, on patients left out of the fit ({one.calibration['folds']} folds; means over "  # type: ignore[index]
                "findings with both classes):",
                "| | before | after |",
                "| --- | --- | --- |",
                *(f"| {_WORDS[key]} | {decimal(pair[0], 4)} | {decimal(pair[1], 4)} |" for key, pair in macro.items()),
            ]
    maps = ((content.get("calibration") or {}).get("image") or {}).get("maps") or {}
    unlabelled = {name for one in content.get("extensions", ()) if one["zero_shot"] for name in one["findings"]}
    flagged = [name for name, one in maps.items() if one and one["flag"] and name not in unlabelled]
    if flagged:
        lines.append(f"Too few positives for a calibration of their own: {', '.join(flagged)}.")
    return lines if len(lines) > 1 else []


def _groups(evidence: Sequence[Evidence] | None) -> list[str]:
    if evidence is None:
        return []
    lines = ["## Groups"]
    rows = []
    for one in evidence:
        for attribute, judged in one.groups.items():
            for level, part in judged["groups"].items():
                gap = (part["gap"] or {}).get("mAUC") or {}
                ends = f" [{decimal(gap['low'])}, {decimal(gap['high'])}]" if gap.get("low") is not None else ""
                shown = f"{decimal(gap['difference'])}{ends}" if gap else "-"
                rows.append(
                    f"| {cell(f'{attribute} {level}')} | {part['n_patients']} | {len(part['findings'])} | "
                    f"{_with_ends({**part['values'], 'ci95': part['ci95']}, 'mAUC')} | {shown} |"
                )
            few = [f"{attribute} {level} ({count} patients)" for level, count in judged["too_few"].items()]
            if few:
                lines.append(f"Too few to judge: {', '.join(few)}.")
    if rows:
        lines += [
            "| group | patients | findings | mean AUC | gap to the rest |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    else:
        lines.append("No two groups by view or dataset are large enough to be told apart on validation.")
    lines.append(
        "Sex and age are not in the validation files; `hilum evaluate --by sex,age` judges them where a store records "
        "them."
    )
    return lines


def _findings(content: Mapping[str, Any], evidence: Sequence[Evidence] | None) -> list[str]:
    findings = content["findings"]
    untrained = [one["name"] for one in findings if not one["trained"]]
    lines = [
        "| finding | group | positive training images | known | positive validation studies | AP | AUC |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in findings:
        trained_on = f"{cell(one['name'])} | {one['group']} | {one['positives']} | {one['known']}"
        lines.append(f"| {trained_on} | {_measured(one['name'], evidence)} |")
    return [*lines, f"Never trained, and always null: {', '.join(untrained)}."] if untrained else lines


def _measured(name: str, evidence: Sequence[Evidence] | None) -> str:
    """Three cells: positives, AP and AUC, the latter where there are enough of the former."""
    found = next((one.metrics["findings"][name] for one in evidence or () if name in one.metrics["findings"]), None)
    if found is None:
        return "- | - | -"
    if found["positives"] < MIN_POSITIVES:
        return f"{found['positives']} | - | -"
    return f"{found['positives']} | {_with_ends(found, 'AP')} | {_with_ends(found, 'AUC')}"


def _pretraining(exposure: Mapping[str, Any]) -> str:
    """Images of pretraining; where something is not recorded, none listed are not none seen."""
    images = exposure["images"]["pretraining"]
    if not exposure.get("not_recorded"):
        return f"{images} images"
    return f"{images} images are recorded, and more were seen" if images else "images not recorded"


def _and_val(images: int) -> str:
    return f" and, in the last fit, {images} validation images" if images else "; no validation images"


def _method(training: Mapping[str, Any]) -> str:
    tuning = training.get("tuning")
    return "frozen" if not tuning or not tuning["chosen"] else f"tuned ({tuning['method']})"


_GROUPS = ("head", "medium", "tail")
_SAME = "it is the head in this folder"
_WORDS = {"log_loss": "log loss", "Brier": "Brier score", "ECE": "ECE, 15 equal bins"}
_NAMES = {"linear": "linear head", "ml_decoder": "ML-Decoder head", "csra": "class-specific attention (CSRA) head"}
_VIEWS = {
    "single": "", "concat": "reading pairs of views, ", "set": "reading all views of a study, ",
    "attention": "weighing the views of a study, ", "memory": "reading all views of a study, ",
}  # fmt: skip
