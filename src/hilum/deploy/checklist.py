"""Two reporting checklists beside a model, filled where its own files know the answer: CLAIM 2024 and TRIPOD+AI.

CLAIM: Checklist for Artificial Intelligence in Medical Imaging, 2024 update (Tejani et al., Radiology: Artificial
Intelligence 2024;6(4):e240300), 44 items. TRIPOD+AI: reporting of clinical prediction models (Collins et al., BMJ
2024;385:e078378), 27 items in 52 parts. Numbers are theirs, words are ours; what counts is the published text. Past 300
lines: 96 items.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.card_evidence import Evidence
from hilum.evaluation.markup import decimal

CHECKLIST_NAME = "checklist.md"
OPEN = "*to be filled by the authors*"


class Item(NamedTuple):
    """One thing to report."""

    number: str
    section: str
    asks: str


CLAIM: tuple[Item, ...] = tuple(
    Item(str(number), section, asks)
    for number, (section, asks) in enumerate(
        (
            ("Title and abstract", "The title names the work as one of AI, and which kind"),
            ("Title and abstract", "The abstract sums up design, methods, results and conclusions"),
            ("Introduction", "Background, and what the AI is meant to do in practice"),
            ("Introduction", "Aims and hypotheses"),
            ("Design", "Looking forward or back in time"),
            ("Design", "What kind of study it is (a new model, feasibility, a trial)"),
            ("Data", "Where the data come from"),
            ("Data", "Who and what was let in or left out"),
            ("Data", "What was done to the images before the model saw them"),
            ("Data", "How parts of the data were picked"),
            ("Data", "How identities were removed"),
            ("Data", "What was done about missing data"),
            ("Data", "How the images were acquired"),
            ("Reference standard", "How the truth was defined and obtained"),
            ("Reference standard", "Why that truth and no other"),
            ("Reference standard", "Who or what made the labels, with which qualification"),
            ("Reference standard", "How the test set was labelled"),
            ("Reference standard", "How far labellers agreed, among themselves and with themselves"),
            ("Partitions", "How data were dealt into training, tuning and test"),
            ("Partitions", "At which level the parts share nothing (patient, study, image)"),
            ("Testing data", "How large the test set was meant to be, and why"),
            ("Model", "The model in enough detail to build it again"),
            ("Model", "Software and versions"),
            ("Model", "How weights were initialised, what was transferred"),
            ("Training", "How it was trained, with all settings"),
            ("Training", "How the final model was picked"),
            ("Training", "How models were put together, if several"),
            ("Evaluation", "By which measures it is judged"),
            ("Evaluation", "How uncertainty and significance were found"),
            ("Evaluation", "Whether results hold when something is varied"),
            ("Evaluation", "How outputs are explained, and whether the explanations were tested"),
            ("Evaluation", "Evaluation on data of the same source"),
            ("Evaluation", "Evaluation on data of another source"),
            ("Evaluation", "Registration, if it is a trial"),
            ("Results", "How many patients or examinations were included and left out"),
            ("Results", "Who the people of each part are"),
            ("Results", "Performance with its uncertainty, for each part and group"),
            ("Results", "Diagnostic accuracy with its precision"),
            ("Results", "Where and how it fails"),
            ("Discussion", "Limits of the work"),
            ("Discussion", "What it means for practice, and the intended use"),
            ("Other", "Where the protocol or further details are"),
            ("Other", "Where software, model and data are, and on which terms"),
            ("Other", "Who paid, and what they decided"),
        ),
        1,
    )
)

TRIPOD: tuple[Item, ...] = tuple(
    Item(number, section, asks)
    for number, section, asks in (
        ("1", "Title", "It says that a model is developed or judged, for whom, and for which outcome"),
        ("2", "Abstract", "As the checklist for abstracts asks"),
        ("3a", "Introduction", "The medical setting, why a model, and which there are"),
        ("3b", "Introduction", "For whom and by whom it is meant to be used, and where in their care"),
        ("3c", "Introduction", "Known inequalities between groups of people"),
        ("4", "Introduction", "Aims: development, evaluation, or both"),
        ("5a", "Data", "Sources for development and for evaluation, why these, and how typical they are"),
        ("5b", "Data", "From when to when the data are"),
        ("6a", "Participants", "Kind, number and place of the centres"),
        ("6b", "Participants", "Who could take part"),
        ("6c", "Participants", "Treatments, and how they were dealt with"),
        ("7", "Data preparation", "Preparation and quality checks, and whether the same for all groups"),
        ("8a", "Outcome", "What is predicted, how and when it was determined, and why this"),
        ("8b", "Outcome", "Who judged it, where that takes judgement"),
        ("8c", "Outcome", "Whether those who judged it were blinded"),
        ("9a", "Predictors", "How predictors were picked"),
        ("9b", "Predictors", "What each predictor is and how it was measured"),
        ("9c", "Predictors", "Who measured it, where that takes judgement"),
        ("10", "Sample size", "How the size was arrived at, and why it is enough"),
        ("11", "Missing data", "What was done about missing data"),
        ("12a", "Analysis", "How the data were used and divided"),
        ("12b", "Analysis", "How predictors entered the model"),
        ("12c", "Analysis", "Kind of model, every step of building it, tuning and internal validation"),
        ("12d", "Analysis", "How differences between centres or countries were handled"),
        ("12e", "Analysis", "Every measure and plot of performance, and why"),
        ("12f", "Analysis", "Updating of the model after evaluation"),
        ("12g", "Analysis", "How predictions were computed for evaluation"),
        ("13", "Class imbalance", "What was done about it and whether probabilities were put right afterwards"),
        ("14", "Fairness", "What was done for fairness, and why"),
        ("15", "Output", "What comes out, and how thresholds were found"),
        ("16", "Training and evaluation", "How the data of both differ"),
        ("17", "Ethics", "Approval, and consent or its waiver"),
        ("18a", "Open science", "Funding and the funders' part"),
        ("18b", "Open science", "Conflicts of interest"),
        ("18c", "Open science", "Where the protocol is"),
        ("18d", "Open science", "Registration"),
        ("18e", "Open science", "Whether and where the data can be had"),
        ("18f", "Open science", "Whether and where the code can be had"),
        ("19", "Involvement", "How patients and the public took part"),
        ("20a", "Results: participants", "Their flow, with and without the outcome"),
        ("20b", "Results: participants", "Their characteristics, for each source"),
        ("20c", "Results: participants", "How those of evaluation differ from those of development"),
        ("21", "Results: development", "Participants and outcomes in each analysis"),
        ("22", "Results: specification", "The whole model, for others to use, and on which terms"),
        ("23a", "Results: performance", "Performance with intervals, also of groups"),
        ("23b", "Results: performance", "Differences between centres or countries, if looked at"),
        ("24", "Results: updating", "What updating gave"),
        ("25", "Discussion", "What the results mean, fairness included"),
        ("26", "Discussion", "Limits, and what they do to the results"),
        ("27a", "Usability", "What to do with poor or missing input"),
        ("27b", "Usability", "What users have to do and to know"),
        ("27c", "Usability", "What comes next, with a view to where it would hold"),
    )
)


def checklist(
    content: Mapping[str, Any], evidence: Sequence[Evidence] = (), members: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Both checklists as Markdown.

    Args:
        content: of `config.json` of a model or an ensemble.
        evidence: what was measured on its validation.
        members: of an ensemble, the `config.json` of each.
    """
    claim, tripod = answers(content, evidence, members)
    filled = len(claim) + len(tripod)
    return (
        f"# Reporting checklists\n\n{RESEARCH_NOTICE}\n\n"
        f"{filled} of {len(CLAIM) + len(TRIPOD)} items say what the files of this model record; the others are the "
        "authors' to fill. An item that is filled here is a start and may need more. Words are ours: report by the "
        "published checklists.\n\n"
        f"## CLAIM, 2024 update\n\n{_table(CLAIM, claim)}\n\n## TRIPOD+AI\n\n{_table(TRIPOD, tripod)}\n"
    )


def _table(items: Sequence[Item], filled: Mapping[str, str]) -> str:
    rows = [f"| {one.number} | {one.section} | {one.asks} | {cell(filled.get(one.number) or OPEN)} |" for one in items]
    return "\n".join(["| item | section | what is asked | what is recorded |", "| --- | --- | --- | --- |", *rows])


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def answers(
    content: Mapping[str, Any], evidence: Sequence[Evidence] = (), members: Sequence[Mapping[str, Any]] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """What is recorded, by the number of the item: of CLAIM, and of TRIPOD+AI. Items that it cannot know are absent."""
    models = list(members) or [content]
    measured = {
        "data": _sources(models), "images": _images(models), "counts": _counts(evidence), "settings": _settings(models),
        "start": _start(models), "network": _networks(models), "performance": _performance(evidence),
        "groups": _groups(evidence), "recipe": _recipes(models), "selection": _selection(content, models),
        "ensemble": _together(content), "calibration": _calibration(content, evidence),
        "labelled": _labelled(content), "split": SPLIT if any(one.get("fitted_on") for one in models) else "",
    }  # fmt: skip
    software = f"Hilum {content['hilum']}; versions of its libraries were not recorded"
    claim = {
        "7": measured["data"],
        "9": measured["recipe"],
        "12": UNKNOWN_LABELS if measured["settings"] else "",
        "19": measured["split"],
        "20": _disjoint(models) if measured["split"] else "",
        "22": measured["network"],
        "23": software,
        "24": measured["start"],
        "25": measured["settings"],
        "26": measured["selection"],
        "27": measured["ensemble"],
        "28": MEASURES if evidence else "",
        "29": UNCERTAINTY if evidence else "",
        "31": EXPLAINED,
        "32": f"On validation only, which also chose the settings: {measured['performance']}" if evidence else "",
        "35": measured["images"],
        "37": " ".join(part for part in (measured["performance"], measured["groups"]) if part),
        "38": measured["performance"],
        "40": LIMITS,
        "41": RESEARCH_NOTICE,
        "43": _terms(models),
    }
    tripod = {
        "3b": RESEARCH_NOTICE,
        "5a": measured["data"],
        "7": measured["recipe"],
        "8a": measured["labelled"],
        "9a": "The whole image; no predictor was picked",
        "9b": measured["recipe"],
        "11": UNKNOWN_LABELS if measured["settings"] else "",
        "12a": measured["split"],
        "12b": measured["recipe"],
        "12c": ". ".join(part for part in (measured["network"], measured["settings"], measured["selection"]) if part),
        "12e": f"{MEASURES}. {UNCERTAINTY}" if evidence else "",
        "12g": "`hilum predict`, or `hilum.load(FOLDER).predict` in Python",
        "13": measured["calibration"],
        "15": THRESHOLDS if not content.get("uncalibrated") else "Scores that order images; no thresholds",
        "18f": _terms(models),
        "21": " ".join(part for part in (measured["images"], measured["counts"]) if part),
        "22": SPECIFICATION,
        "23a": " ".join(part for part in (measured["performance"], measured["groups"]) if part),
        "26": LIMITS,
        "27a": POOR_INPUT if any(one.get("screening") for one in models) else UNSCREENED,
    }
    return {k: v for k, v in claim.items() if v}, {k: v for k, v in tripod.items() if v}


UNKNOWN_LABELS = (
    "A finding that is not annotated is unknown, not negative: it takes no part in the loss and in the measures; "
    "uncertain labels are treated as the manifest's label policy says"
)
SPLIT = (
    "By the splits of the store: the head is fitted on train, everything is chosen and calibrated on val, test is not "
    "looked at; where a last fit takes val too, calibration stays that of the head that had not seen it"
)
PATIENTS = "The patient: a patient in two splits is refused when a model is fitted"
MEASURES = (
    "Average precision and area under the ROC curve per finding, their plain means; log loss, Brier score and ECE"
)
UNCERTAINTY = "95 % intervals from resampling whole patients; operating points and calibration fitted on validation"
EXPLAINED = (
    "Maps per finding and image, where the head has them. They show where it looked; `hilum evaluate --maps "
    "--regions` on data with outlines or boxes measures how often that is the lesion"
)
LIMITS = "See the limits in the model card; those of the data and the study are the authors' to add"
SOFTWARE = "Software: Hilum, Apache-2.0. The model: this directory; its terms are"
THRESHOLDS = (
    "A probability per finding and study. Operating points from validation: best F1, best sensitivity plus "
    "specificity, sensitivity at 95 % specificity, and others in `config.json`; few positives are drawn to their group"
)
_CHOSEN = "the authors' to choose"
SPECIFICATION = "This directory: weights, architecture, preprocessing, calibrators and operating points"
UNSCREENED = "Unreadable files are refused with a reason; whether a picture is a chest X-ray is not looked at"
POOR_INPUT = (
    "Unreadable files are refused with a reason; an image that does not look like an upright chest X-ray is flagged "
    "and not scored"
)


def _sources(models: Sequence[Mapping[str, Any]]) -> str:
    names = {name for one in models for training in files.trainings(one) for name in training.get("sources") or {}}
    return f"Labels of the head: {', '.join(sorted(names))}" if names else ""


def _disjoint(models: Sequence[Mapping[str, Any]]) -> str:
    leaks = [one["accepted_leak"] for one in models if one.get("accepted_leak")]
    return f"{PATIENTS}. Leak accepted: {'; '.join(leaks)}" if leaks else PATIENTS


def _images(models: Sequence[Mapping[str, Any]]) -> str:
    found = []
    for number, one in enumerate(models, 1):
        exposure = one.get("exposure") or {}
        prefix = f"member {number}: " if len(models) > 1 else ""
        if told := exposure.get("not_recorded"):
            found.append(f"{prefix}{told}")
        elif images := exposure.get("images"):
            found.append(f"{prefix}{images['pretraining']} images in pretraining, {images['train']} in training")
    return f"Images met: {'; '.join(found)}." if found else ""


def _counts(evidence: Sequence[Evidence]) -> str:
    parts = [
        f"{one.metrics['n_studies']} studies of {one.metrics['n_patients']} patients ({one.images} images)"
        for one in evidence
    ]
    return f"Validation: {'; '.join(parts)}." if parts else ""


def _settings(models: Sequence[Mapping[str, Any]]) -> str:
    used = [one["training"] for one in models if (one.get("training") or {}).get("settings")]
    if not used:
        return ""
    first = used[0]["settings"]
    return (
        f"Loss {first['loss']}, learning rate {used[0]['learning_rate']:g}, batch {first['batch_size']}, "
        f"{first['search_epochs']} search epochs, {used[0]['refit_epochs']} in the last fit, sampling "
        f"{first['sampling']}, seed {first['seed']}; all settings in `config.json`"
        + (" of each member" if len(models) > 1 else "")
    )


def _start(models: Sequence[Mapping[str, Any]]) -> str:
    named = []
    for one in models:
        training = one.get("training") or {}
        backbone = training.get("backbone") or {}
        if imported := training.get("imported"):
            named.append(f"published weights ({imported['backbone']['file']}, head {imported['head']['file']})")
        elif backbone.get("kind"):
            named.append(f"{backbone['kind']}" + (f" ({backbone['name']})" if backbone.get("name") else ""))
    return f"Backbone from {', '.join(dict.fromkeys(named))}" if named else ""


def _terms(models: Sequence[Mapping[str, Any]]) -> str:
    imported = any((one.get("training") or {}).get("imported") for one in models)
    return f"{SOFTWARE} {'those of the publishers of its weights' if imported else _CHOSEN}"


def _networks(models: Sequence[Mapping[str, Any]]) -> str:
    described = []
    for one in models:
        if "architecture" in one:
            backbone, head = one["architecture"]["backbone"], one["architecture"]["head"]
            described.append(
                f"vision transformer, {backbone['depth']} blocks of {backbone['embed_dim']} channels, patch "
                f"{backbone['patch_size']}, head {head['name']}, {one['preprocessing']['resolution']} pixels"
            )
    return f"{'; '.join(dict.fromkeys(described))}. Complete in `config.json`" if described else ""


def _recipes(models: Sequence[Mapping[str, Any]]) -> str:
    recipes = sorted({one["preprocessing"]["id"] for one in models if "preprocessing" in one})
    return f"Grey values, size and normalisation by the recipe {', '.join(recipes)} (docs/reference/images.md)"


def _selection(content: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    if not any((one.get("training") or {}).get("settings") for one in models):
        return ""
    chosen = "; members and rules were chosen there as well" if "choice" in content else ""
    return f"Macro average precision on validation in a search over learning rates; record in `search.json`{chosen}"


def _together(content: Mapping[str, Any]) -> str:
    if "members" not in content:
        return ""
    return f"{len(content['members'])} models by {content['ensemble']}, images of a study by {content['study']}"


def _calibration(content: Mapping[str, Any], evidence: Sequence[Evidence]) -> str:
    if content.get("uncalibrated"):
        return f"Not calibrated: {content['uncalibrated']}"
    macro = next((one.calibration["macro"] for one in evidence if one.calibration and one.calibration["macro"]), None)
    if macro is None:
        return ""
    before, after = macro["ECE"]
    return f"Probabilities were calibrated on validation; cross-fitted ECE {decimal(before, 4)} to {decimal(after, 4)}"


def _labelled(content: Mapping[str, Any]) -> str:
    return (
        f"{len(content['findings'])} findings, present or absent in the study; how they were determined is not recorded"
    )


def _performance(evidence: Sequence[Evidence]) -> str:
    parts = []
    for one in evidence:
        macro = one.metrics["macro"]
        for key, words in (("mAP", "mean average precision"), ("mAUC", "mean AUC")):
            if macro.get(key) is not None:
                ends = macro["ci95"].get(key)
                between = f" [{decimal(ends[0])}, {decimal(ends[1])}]" if ends else ""
                parts.append(f"{words} {decimal(macro[key])}{between} over {macro['counted'][key]} findings")
    return f"Validation: {', '.join(parts)}." if parts else ""


def _groups(evidence: Sequence[Evidence]) -> str:
    names = [f"{name} {level}" for one in evidence for name, part in one.groups.items() for level in part["groups"]]
    return f"Groups judged in the card: {', '.join(names)}." if names else ""
