"""The page of a recalibration: is this model fit for this site, in one look, and then what that rests on.

For a hospital engineer and a radiologist. Takes the content of `site_report.json` and curves, and computes nothing.
Built like the page of an evaluation (`report.py`): one file, no network, light, dark or printed, readable without a
script. The tables are in `site_tables.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.evaluation import report_assets as words
from hilum.evaluation import site_tables as tables
from hilum.evaluation.curves import Curves
from hilum.evaluation.markup import count, text
from hilum.evaluation.report import listing, page
from hilum.evaluation.site_judgement import NO, NOT_SHOWN, YES


def write_site_report(path: Path, result: Mapping[str, Any], after: Curves, before: Curves) -> None:
    """Write the page in one step; arguments as `render_site_report`.

    Raises:
        HilumError: the folder cannot be written.
    """
    write_text(path, render_site_report(result, after, before))


def render_site_report(result: Mapping[str, Any], after: Curves, before: Curves) -> str:
    """The page as text.

    Args:
        result: content of `site_report.json`.
        after: curves of the recalibrated probabilities, out of sample.
        before: of the same studies by the model as it was.
    """
    rows = result["findings"]
    judged = [name for name, row in rows.items() if row["enough"] and row["trained"]]
    judged.sort(key=lambda name: (-tables.ORDER.index(rows[name]["verdict"]), -_value(rows[name]["AUC"])))
    few = [name for name in rows if name not in judged]
    calibration = tables.calibration_table(result, judged, after, before)
    parts = [
        ("verdict", "Finding by finding", tables.verdict_lead(result), tables.verdict_table(result, judged)),
        ("points", "Operating points", tables.points_lead(result), tables.points_table(result, judged)),
        ("calibration", "Calibration", tables.calibration_lead(result), calibration),
    ]
    if few:
        parts.append(("few", "Too few to judge", tables.few_lead(result), tables.few_table(result, few)))
    if any(row["drift"] for row in rows.values()):
        parts.append(("drift", "Drift of the scores", tables.DRIFT_LEAD, tables.drift_table(result, [*judged, *few])))
    parts += [
        ("rules", "The rules", "Fixed before this run, the same for every model.", _rules(result)),
        ("provenance", "Provenance", "", _provenance(result)),
    ]
    return page(
        "Is this model fit for this site?", _masthead(result), parts, _notes(result), words.asset("site_report.css")
    )


def _value(part: Mapping[str, Any] | None) -> float:
    return float(part["value"]) if part else 0.0


def _masthead(result: Mapping[str, Any]) -> str:
    overall = result["overall"]
    facts = {
        "Labelled studies": count(result["studies"]), "Patients": count(result["patients"]),
        "Images": count(result["images"]), "Findings judged": count(len(overall["asked"])),
        "Model": result["model"],
    }  # fmt: skip
    details = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return (
        f'<header class="masthead"><div class="inner"><div class="words"><p class="maker">{words.BRAND}Hilum</p>'
        f'<h1 class="small">Is this model fit for this site?</h1>'
        f'<div class="judgement"><b class="{tables.CLASS[overall["verdict"]]}">{overall["verdict"].capitalize()}</b>'
        f"<p>{_sentence(result)}</p></div><dl>{details}</dl></div></div></header>"
    )


def _sentence(result: Mapping[str, Any]) -> str:
    """The verdict in words, with what to do."""
    overall = result["overall"]
    good, open_, bad = (overall[key] for key in ("yes", "not_shown", "no"))
    if not overall["asked"]:
        return (
            f"No finding has the {result['rules']['enough']} positive and {result['rules']['enough']} negative studies "
            "that a judgement takes. Label more studies; the table says how many."
        )
    said = []
    if good:
        said.append(f"Fit for {_names(good)}.")
    if bad:
        said.append(f"Shown not to be useful for {_names(bad)}: do not use it for {'it' if len(bad) == 1 else 'them'}.")
    if open_:
        said.append(f"Not shown for {_names(open_)}.")
    if overall["without_failures"] == YES:
        said.append("Without what failed it would be fit.")
    if overall["verdict"] != YES and not result["rules"]["findings"]:
        said.append("To ask about the findings that you need alone: --finding NAME.")
    return " ".join(said)


def _names(names: Sequence[str]) -> str:
    shown = [text(name) for name in names[:5]]
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    joined = ", ".join(shown) if rest or len(shown) < 2 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return joined + rest


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if result["exposed_images"]:
        notes.append(
            f"The model has met {result['exposed_images']} of these images in pretraining or training: nothing is "
            "called fit."
        )
    if result["overlap"]:
        notes.append(f"{result['overlap']} Nothing is called fit.")
    if result["exposure_not_recorded"]:
        notes.append(f"What the model has seen: {result['exposure_not_recorded']}.")
    if not result["was_calibrated"]:
        notes.append("The model was not calibrated before: its scores ranked images, and were no probabilities.")
    if result["left_out"]:
        left = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in result["left_out"].items())
        notes.append(f"Left out: {left}.")
    return notes


def _rules(result: Mapping[str, Any]) -> str:
    rules = result["rules"]
    least, enough = f"{rules['minimum_auc']:.2f}", rules["enough"]
    kept = "; and the sensitivity or specificity that was asked for is kept out of sample" * bool(rules["asked"])
    lines = (
        (NO, f"{enough} or more positive and negative studies, and the whole interval of the AUC lies below {least}."),
        (
            YES,
            f"As many studies; the whole interval of the AUC lies at {least} or above; the mean recalibrated "
            f"probability agrees with the share of positives (their difference may be zero, or is within "
            f"{rules['agrees']:.0%}){kept}.",
        ),
        (NOT_SHOWN, "Everything else, and always where the model has met the images."),
    )
    body = "".join(f"<tr><td>{tables.chip(word)}</td><td>{text(what)}</td></tr>" for word, what in lines)
    whole = (
        "Overall: no if any finding that is asked about is a no, yes if all are yes, not shown otherwise. Asked about: "
        + (", ".join(rules["findings"]) if rules["findings"] else "all findings with enough studies")
        + ". Fit means that the numbers hold up on these studies, not that the model may be used on patients."
    )
    return f'<table class="plain rules"><tbody>{body}</tbody></table><p class="note">{text(whole)}</p>'


def _provenance(result: Mapping[str, Any]) -> str:
    bootstrap = result["bootstrap"]
    facts = [
        ("Model before", result["model"]),
        ("Labels", f"{result['labels']['file']}, SHA-256 {result['labels']['sha256']}"),
        ("Images fitted on, SHA-256 of their ids", result["uids_sha256"]),
        ("Intervals", f"{bootstrap['resamples']} resamples of patients, seed {bootstrap['seed']}; Wilson for shares"),
        ("Hilum", result["hilum"]),
        (
            "Images met by the model",
            "not known for loose files" if result["exposed_images"] is None else str(result["exposed_images"]),
        ),
    ]
    return listing(facts)
