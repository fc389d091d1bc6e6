"""Open-i, the chest X-rays of Indiana University: `ecgen-radiology/<n>.xml`, one report each, and `NLMCXR_png/*.png`.

A report lists its images (`parentImage id="CXR1_1_IM-0001-3001"`) and the terms that coders gave it, such as
"Calcified Granuloma/lung/upper lobe/right". Read are the terms called `major`, which people gave; those called
`automatic` are not. A term counts as its first part and as that part with each of the others ("Aorta/tortuous"), each
matched whole in `facts/labels/openi.csv`, without regard to case (the release spells "Lymph nodes" in two ways).
Where the DICOM files are there too (`<n>/1_IM-0001-3001.dcm`), their headers say view, sex and age; without them the
projection is unknown. Each report counts as a patient. Reports are free text of patients: they are not kept.
Source: Demner-Fushman et al., Journal of the American Medical Informatics Association 2016.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.parsers import expat

import polars as pl

from hilum.core.errors import ManifestError, PathError
from hilum.data.headers import header_columns
from hilum.data.label_cells import finding_columns, token_values
from hilum.data.label_maps import load_map
from hilum.data.rows import (
    Scan,
    SourceOptions,
    SourceRows,
    ages,
    existing_folder,
    flags,
    keep_existing,
    located,
    paths_by_name,
    scan,
    unknown_label,
)

REPORTS, IMAGES = "ecgen-radiology", "NLMCXR_png"
LARGEST_REPORT = 2**20
"""Bytes; real ones have some thousands."""
DEEPEST = 32
"""Elements within each other; real reports have six."""
UNSATISFACTORY = "Technical Quality of Image Unsatisfactory"
HEADER_FIELDS = {"view_raw": "ViewPosition", "sex": "PatientSex", "age_raw": "PatientAge"}
LABELS = load_map("openi")
SPELLED = {" ".join(label.split()).casefold(): label for label in LABELS.labels}


@dataclass
class Report:
    """What is used of one XML file."""

    number: str = ""
    terms: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


def read(options: SourceOptions) -> SourceRows:
    """Read all reports, and check that every image that they list is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `rows`, and `read_report`.
    """
    root = existing_folder(options.root, f"openi=ROOT holds {REPORTS}/ and {IMAGES}/")
    home = existing_folder(options.images, "--images openi=FOLDER") if options.images else root
    folder = next((place for place in (root / REPORTS, root) if any(place.glob("*.xml"))), None)
    if folder is None:
        raise PathError(f"{root} holds no {REPORTS}/*.xml.")
    reports, digest = _reports(folder)
    without = sum(not report.images for report in reports.values())
    notes = [f"{without} of {len(reports)} reports have no image: left out"] if without else []
    frame, columns, conflicts = _rows(reports, folder, options)
    frame, more = _files(frame.hstack(columns), scan(home), home, folder, options)
    return SourceRows(
        frame.with_columns(
            pl.col("sex", "age_raw").replace("", None),
            age_years=ages(pl.col("age_raw")),
            split_official=pl.lit(""),
            licence_tag=pl.lit("cc-by-nc-nd-4.0"),
            label_source=pl.lit("openi-mesh-major"),
            label_trust=pl.lit("manual"),
        ),
        LABELS.findings,
        home,
        official=False,
        tables={REPORTS: digest},
        notes=(*notes, *more),
        origin="openi",
        conflicts=conflicts,
    )


def _reports(folder: Path) -> tuple[dict[str, Report], str]:
    """File name -> report, in order of their numbers, and one hash over all of them."""
    paths = sorted(folder.glob("*.xml"), key=lambda path: (len(path.name), path.name))
    reports, digest = {}, hashlib.sha256()
    for path in paths:
        if path.stat().st_size > LARGEST_REPORT:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes; a report has some thousands.")
        content = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + content)
        reports[path.name] = read_report(content, str(path))
    return reports, digest.hexdigest()


def read_report(content: bytes, where: str) -> Report:
    """Read one report. A document type, which entities need, is refused; text outside the terms is passed over.

    Raises:
        ManifestError: not XML, not a report, or made to exhaust a parser.
    """
    report, trail, text = Report(), list[str](), list[str]()

    def start(name: str, attributes: Mapping[str, str]) -> None:
        trail.append(name)
        text.clear()
        if len(trail) > DEEPEST:
            raise ManifestError(f"{where}: elements more than {DEEPEST} deep; a report has six.")
        if name == "uId":
            report.number = attributes.get("id", "")
        elif name == "parentImage":
            report.images.append(attributes.get("id", ""))

    def end(name: str) -> None:
        trail.pop()
        if name == "major" and "".join(text).strip():
            report.terms.append("".join(text).strip())

    def characters(data: str) -> None:
        if trail[-1:] == ["major"]:
            text.append(data)

    def refuse(*_: object) -> None:
        raise ManifestError(f"{where}: a document type declaration; reports have none.")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, characters
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ManifestError(f"{where}, line {error.lineno}: not XML ({expat.errors.messages[error.code]}).") from error
    if not report.number:
        raise ManifestError(f"{where}: no element 'uId' with an 'id'; not a report of Open-i.")
    return report


def _rows(
    reports: Mapping[str, Report], folder: Path, options: SourceOptions
) -> tuple[pl.DataFrame, list[pl.Series], Mapping[str, int]]:
    """One row per image, its labels, and conflicts."""
    listed = [(name, report, image) for name, report in reports.items() for image in report.images]
    if not listed:
        raise PathError(f"{folder}: none of {len(reports)} reports lists an image.")
    tokens = {name: _tokens(report, folder / name) for name, report in reports.items() if report.images}
    frame = pl.DataFrame(
        {
            "image_id": [image for _, _, image in listed],
            "patient_id": [report.number for _, report, _ in listed],
            "raw_labels": [json.dumps(report.terms, ensure_ascii=False) for _, report, _ in listed],
            "file": [name for name, _, _ in listed],
        }
    )
    bad = ~frame["image_id"].str.contains(r"^CXR\d+_[0-9A-Za-z._-]+$")
    if bad.any():
        raise PathError(f"{folder / frame['file'].filter(bad)[0]}: a 'parentImage' whose id is not an image's name.")
    twice = frame["image_id"].is_duplicated()
    if twice.any():
        raise ManifestError(
            f"{folder / frame['file'].filter(twice)[0]}: an image is listed twice ({twice.sum()} such)."
        )
    one_each = [report.number for report in reports.values()]
    if len(set(one_each)) < len(one_each):
        raise ManifestError(f"{folder}: {len(one_each) - len(set(one_each))} reports repeat the 'uId' of another.")
    of_image = pl.Series("MeSH", [tokens[name] for name in frame["file"]], dtype=pl.List(pl.String))
    columns, conflicts = finding_columns(
        token_values(of_image, LABELS, folder), LABELS,
        replace(options.policy, blank="mask"),  # a report without terms is no blank cell
        annotated=of_image.is_not_null().to_numpy(),
    )  # fmt: skip
    frame = frame.with_columns(
        study_id=pl.lit("0"), quality=flags(suboptimal=pl.lit(of_image.list.contains(UNSATISFACTORY).fill_null(False)))
    )
    return frame, columns, conflicts


def _tokens(report: Report, path: Path) -> list[str] | None:
    """The labels that a report's terms are; None where nobody gave it any."""
    found: list[str] = []
    for term in report.terms:
        head, *others = [" ".join(part.split()).casefold() for part in term.split("/")]
        if head not in SPELLED:
            raise unknown_label(term.split("/")[0].strip(), LABELS.labels, str(path))
        found += [SPELLED[head], *(SPELLED[f"{head}/{other}"] for other in others if f"{head}/{other}" in SPELLED)]
    return list(dict.fromkeys(found)) or None


def _files(
    frame: pl.DataFrame, found: Scan, home: Path, folder: Path, options: SourceOptions
) -> tuple[pl.DataFrame, list[str]]:
    """Where the images are, and what the headers of their DICOM files say, where these are there."""
    short = frame["image_id"].str.replace(r"^CXR\d+_", "")
    dicom = paths_by_name(short, found, home, options)
    png = paths_by_name(frame["image_id"], found, home, options)
    listed = f"{IMAGES}/" + frame["image_id"] + ".png"
    frame = frame.with_columns(dicom=dicom, source_relpath=png.fill_null(dicom).fill_null(listed))
    rows = located(frame.drop("file"), folder)
    rows, missing = keep_existing(rows, found, home, options, studies=True)
    there = rows["dicom"].drop_nulls()
    headers, unread = header_columns(there, home, HEADER_FIELDS)
    fields = rows.select("dicom").join(headers.with_columns(dicom=there), on="dicom", how="left", maintain_order="left")
    views = pl.Series("view_source", ["stated" if view else "unknown" for view in fields["view_raw"]])
    rows = rows.drop("dicom").hstack(fields.select(pl.col(list(HEADER_FIELDS)).fill_null(""))).hstack([views])
    without = rows.height - len(there)
    notes = [f"{without} images without their DICOM file: projection, sex and age unknown"] if without else []
    return rows, [*missing, *unread, *notes]
