"""Localisation in the report: how well maps point at masks or boxes, beside chance, and how map files compare.

Functions from `localisation` of `metrics.json` to HTML; they compute no score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hilum.evaluation.charts import nice_ticks
from hilum.evaluation.markup import bracket, count, decimal, finite, interval, share, text, undefined
from hilum.evaluation.report_rows import GROUPS, badge
from hilum.evaluation.report_tables import difference_axis, difference_cells, difference_scale
from hilum.evaluation.tracks import MARKS, Position, axis, interval_track

LEAD = (
    "Whether the model looked where the finding is. <b>Energy</b>: the share of a map that lies inside the true "
    "region; an even map would have the region's share of the area (tick). <b>Pointing</b>: how often the middle of "
    "the highest patch lies in the region, or within the tolerance of it; the tick is a patch taken at random. "
    "<b>Others</b>: what the mean map of the other images with the finding scores in its place; it knows the finding "
    "and not the image, so a map that is not above it may only say where such findings usually are."
)
KINDS = {"attention": "attention of the decoder", "evidence": "terms of the logit", "mixed": "attention and evidence"}
MEASURES = (("energy", "area", "Energy"), ("pointing", "pointing_chance", "Pointing"))
SIZES = ("macro", "head", "medium", "tail")


def localisation_section(found: Mapping[str, Any]) -> str:
    """Means by group for every map file, their differences, and one line for each finding."""
    files = found["maps"]
    return _means(found, files) + _differences(found) + _by_finding(files) + _notes(found)


def _means(found: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> str:
    scale, ticks = _scale(files)
    bodies = []
    for group in SIZES:
        rows = [(file, file[group]) for file in files if file[group]["counted"]]
        if not rows:
            continue
        size = rows[0][1]["counted"]
        title = "All findings" if group == "macro" else f"{badge(group)}{group.capitalize()}"
        lines = "".join(_mean_line(file, values, scale, ticks) for file, values in rows)
        tone = "plain" if group == "macro" else group
        bodies.append(
            f'<tbody class="tone-{tone}"><tr class="group"><th colspan="5" scope="rowgroup">{title} '
            f"<small>{size} finding{'' if size == 1 else 's'}</small></th></tr>{lines}</tbody>"
        )
    heads = "".join(f'<th class="wide">{name}{axis(ticks, scale, None)}</th><th></th>' for *_, name in MEASURES)
    return (
        f'<div class="scroll"><table class="plain steps localisation"><thead><tr><th>Maps</th>{heads}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
    )


def _mean_line(file: Mapping[str, Any], values: Mapping[str, Any], scale: Position, ticks: Sequence[float]) -> str:
    cells = ""
    for measure, chance, name in MEASURES:
        value, base, ends = finite(values[measure]), finite(values[chance]), interval(values["ci95"].get(measure))
        words = f"{name} {decimal(value)} {bracket(ends)}, chance {decimal(base)}"
        above, others = _is_above(values, measure), finite(values[f"{measure}_of_others"])
        track = interval_track(value, ends, scale=scale, ticks=ticks, reference=base, label=words, hollow=not above)
        verdict = "" if above else ' <em class="not-shown">not shown to be above chance</em>'
        if above and not _is_above(values, measure, "above_others"):
            verdict = ' <em class="not-shown">not shown to be above others</em>'
        cells += (
            f'<td class="track-cell">{track}</td><td class="difference"><b>{decimal(value)}</b> '
            f"<small>{bracket(ends)} chance {decimal(base)}, others {decimal(others)}</small>{verdict}</td>"
        )
    return f'<tr><th scope="row">{text(file["name"])}</th>{cells}</tr>'


def _is_above(values: Mapping[str, Any], measure: str, what: str = "above_chance") -> bool:
    """Whether a score is shown to be above chance (or above the maps of other images), on the same resamples."""
    gap = values[what].get(measure) or {}
    return bool(gap.get("shown")) and gap["difference"] > 0


def _scale(files: Sequence[Mapping[str, Any]]) -> tuple[Position, list[float]]:
    ends = [
        value
        for file in files
        for group in SIZES
        for measure, chance, _ in MEASURES
        for value in (*file[group]["ci95"].get(measure, ()), file[group][measure], file[group][chance])
        if finite(value) is not None
    ]
    upper = min(max([0.1, *(1.1 * float(value) for value in ends)]), 1.0)
    return Position(0.0, upper), nice_ticks(0.0, upper, 4)


def _differences(found: Mapping[str, Any]) -> str:
    rows = [
        (f"{part['first']} - {part['second']}", name, {"value": part[measure]["difference"], **part[measure]})
        for part in found["differences"]
        for measure, _, name in MEASURES
    ]
    if not rows:
        return ""
    scale = difference_scale([row for *_, row in rows])
    body = "".join(
        f'<tr><th scope="row">{text(title)}</th><td>{name}</td><td class="number">{decimal(finite(row["first"]))}</td>'
        f'<td class="number">{decimal(finite(row["second"]))}</td>{difference_cells(row, scale, metric=False)}</tr>'
        for title, name, row in rows
    )
    return (
        '<h3>Compared</h3><div class="scroll"><table class="plain steps"><thead><tr><th>Maps</th><th>Mean over findings'
        f'</th><th class="number">First</th><th class="number">Second</th><th class="wide">First minus second'
        f"{difference_axis(scale)}</th><th></th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _by_finding(files: Sequence[Mapping[str, Any]]) -> str:
    """The first file as circles, the second as diamonds; numbers of the first."""
    first, second = files[0], files[1] if len(files) > 1 else None
    scale, ticks = Position(0.0, 1.0, root=True), (0.0, 0.05, 0.25, 0.5, 1.0)
    bodies = []
    for group in GROUPS:
        names = [name for name, part in first["findings"].items() if (part["group"] or "other") == group]
        names.sort(key=lambda name: -first["findings"][name]["images"])
        lines = []
        for name in names:
            own, other = first["findings"][name], second["findings"][name] if second else None
            cells = ""
            for measure, chance, title in MEASURES:
                value, base = finite(own[measure]), finite(own[chance])
                beside = finite(other[measure]) if other else None
                ends = interval(own["ci95"].get(measure))
                words = f"{name}: {title.lower()} {decimal(value)} {bracket(ends)}, chance {decimal(base)}"
                if second and beside is not None:
                    words += f"; {second['name']} {decimal(beside)}"
                track = interval_track(
                    value, ends, scale=scale, ticks=ticks, reference=base, label=words, beside=beside,
                    mark=GROUPS[group][0], hollow=not _is_above(own, measure),
                )  # fmt: skip
                shown = decimal(value, 2) if value is not None else undefined("no image")
                also = f"<small>{decimal(beside, 2)}</small>" if beside is not None else ""
                cells += f'<td class="track-cell">{track}</td><td class="number" data-name="{title}">{shown}{also}</td>'
            about = f"{count(own['images'])} images, {share(finite(own['area']))} of the area"
            lines.append(f'<tr><th scope="row">{text(name)}<small>{about}</small></th>{cells}</tr>')
        if lines:
            bodies.append(
                f'<tbody class="tone-{group}"><tr class="group"><th colspan="5" scope="rowgroup">{badge(group)}'
                f"{group.capitalize()}</th></tr>{''.join(lines)}</tbody>"
            )
    heads = "".join(f'<th class="track-cell">{name}{axis(ticks, scale, None)}</th><th></th>' for *_, name in MEASURES)
    keys = f'<span><i class="key-filled"></i> {text(first["name"])}, hollow where not shown to be above chance</span>'
    if second:
        diamond = (
            f'<svg viewBox="-7 -7 14 14" width="12" height="12"><path class="beside" d="{MARKS["diamond"]}"/></svg>'
        )
        keys += f"<span>{diamond} {text(second['name'])}</span>"
    return (
        f'<h3>By finding</h3><p class="keys"><span><i class="key-reference"></i> chance</span>{keys}</p>'
        f'<table class="forest thresholds localisation"><thead><tr><th>Finding</th>{heads}</tr></thead>'
        f"{''.join(bodies)}</table>"
        f'<p class="note">Square-root scale.{" Small figures are of the second file." if second else ""}</p>'
    )


def _notes(found: Mapping[str, Any]) -> str:
    about, left = found["regions"], {why: n for why, n in found["left_out"].items() if n}
    lines = [
        f"{count(found['n_pairs'])} pairs of image and finding in {count(found['n_images'])} images; "
        f"{text(about['kind'])} of {text(about['file'])}. Tolerance of pointing: "
        f"{share(finite(found['tolerance']))} of the square's side."
    ]
    if left:
        lines.append("Left out: " + "; ".join(f"{count(n)} {text(why)}" for why, n in left.items()) + ".")
    if found["few_images"]:
        lines.append(
            f"Fewer than {count(found['min_images'])} images, in no mean: {text(', '.join(found['few_images']))}."
        )
    kinds = {file["name"]: KINDS.get(str(file["kind"]), str(file["kind"])) for file in found["maps"]}
    grids = {file["name"]: " x ".join(map(str, file["grid"])) for file in found["maps"]}
    lines.insert(0, "; ".join(f"{text(name)}: {text(kinds[name])}, {grids[name]} patches" for name in kinds) + ".")
    over_studies = [file["name"] for file in found["maps"] if file["over"] == "study"]
    if over_studies:
        lines.append(f"{text(', '.join(over_studies))}: maps of whole studies; each image is judged by its own part.")
    return "".join(f'<p class="note">{line}</p>' for line in lines)
