"""`hilum inspect`: a pretraining run, finished or not, as one page: RUN/report.html.

`hilum pretrain` writes it at the end; this program writes it again from what is in the folder. Curves and alarms come
from `metrics.jsonl`; pictures need the store, and are made in `pretrain_pictures.py`. No identifier is on the page.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hilum.backbones.vit import ViTConfig
from hilum.backbones.weights import CONFIG_NAME as BACKBONE_CONFIG
from hilum.backbones.weights import WEIGHTS_NAME
from hilum.commands.pretrain_pictures import Pictures, pictures_of
from hilum.core.config import read_yaml
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import read_json, write_text
from hilum.core.tracking import duration, next_step, read_history, say
from hilum.data.store import Store
from hilum.evaluation.markup import count, decimal, finite, signed
from hilum.evaluation.run_report import RunAlarm, RunPage, render_run
from hilum.pretraining.alarms import Alarm, alarms, initial_losses
from hilum.pretraining.config import FROM_INIT, PretrainConfig

REPORT_NAME, CONFIG_NAME, METRICS_NAME = "report.html", "config.yaml", "metrics.jsonl"
_RECENT_LINES = 20


def run(folder: Path, data: Path | None = None, device: str = "auto") -> Path:
    """Write RUN/report.html, and say where it is.

    Args:
        folder: a run of `hilum pretrain`.
        data: its store, for the pictures.
        device: where the pictures are computed.

    Raises:
        ConfigError: not a run.
        StoreError: not a store.
        CheckpointError: the backbone is damaged.
    """
    path = write_report(Path(folder), Store.open(data) if data is not None else None, device)
    say(f"Report: {path}")
    if data is None:
        next_step(f"hilum inspect {folder} --data STORE   (with pictures)")
    return path


def write_report(folder: Path, store: Store | None, device: str = "auto") -> Path:
    """Write `report.html` of a run from what its folder holds. The same run gives the same bytes.

    Args:
        folder: the run.
        store: for the pictures; None leaves them out, with a sentence.
        device: where the pictures are computed: auto, cpu or cuda.

    Returns:
        The file.

    Raises:
        ConfigError: not a run, or the store was prepared otherwise than what the run was trained on.
        CheckpointError: the backbone is damaged.
    """
    if not (folder / CONFIG_NAME).exists():
        raise ConfigError(f"{folder} is not a run of hilum pretrain: it has no {CONFIG_NAME}.")
    config = read_yaml(PretrainConfig, folder / CONFIG_NAME)
    history = read_history(folder / METRICS_NAME)
    saved = read_json(folder / BACKBONE_CONFIG, CheckpointError) if (folder / BACKBONE_CONFIG).exists() else {}
    notes, pictures = [], Pictures()
    if store is None:
        notes.append("No pictures: the page was written without the store. `hilum inspect RUN --data STORE` adds them.")
    elif not (folder / WEIGHTS_NAME).exists():
        notes.append("No pictures yet: the run has not saved a backbone.")
    else:
        pictures = pictures_of(folder, store, config, saved, device)
        notes += pictures.notes
    page = RunPage(
        title=f"Pretraining: {folder.resolve().name}",
        facts=_facts(config, saved, history),
        figures=_figures(config, history),
        history=history,
        alarms=past_alarms(history, config),
        initial=initial_losses(config),
        clip=config.clip,
        maps=pictures.maps,
        maps_note=pictures.maps_note,
        neighbours=pictures.neighbours,
        neighbours_note=pictures.neighbours_note,
        notes=notes,
        provenance=_provenance(folder, saved),
    )
    write_text(folder / REPORT_NAME, render_run(page))
    return folder / REPORT_NAME


def past_alarms(history: Sequence[Mapping[str, Any]], config: PretrainConfig) -> list[RunAlarm]:
    """Every alarm of a run with the steps of its last spell, standing ones first, then the latest.

    Which line had which comes from its column `alarms`; the newest line is judged again, since a run that was killed
    may not have had the time.
    """
    spells: dict[str, tuple[int, int]] = {}  # positions of the first and last line of the newest spell
    for place, line in enumerate(history):
        for name in line.get("alarms", ()):
            first, last = spells.get(name, (place, -1))
            spells[name] = (first if last == place - 1 else place, place)
    standing = {alarm.name: alarm for alarm in alarms(history, config)}
    for name in standing:
        spells.setdefault(name, (len(history) - 1, len(history) - 1))
    rows = []
    for name, (first, last) in spells.items():
        alarm = standing.get(name) or _again(history[: first + 1], config, name)
        if alarm is None:  # a name that this version does not know
            alarm = Alarm(name, name.replace("_", " "), "said by the run itself", "see docs/reference/run.md")
        steps = (int(history[first]["step"]), int(history[last]["step"]))
        rows.append(RunAlarm(name, alarm.what, alarm.evidence, alarm.try_, *steps, standing=name in standing))
    return sorted(rows, key=lambda row: (not row.standing, -row.last, row.name))


def _again(history: Sequence[Mapping[str, Any]], config: PretrainConfig, name: str) -> Alarm | None:
    return next((alarm for alarm in alarms(history, config) if alarm.name == name), None)


def _facts(config: PretrainConfig, saved: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    network = "that of the weights it starts from"
    if "architecture" in saved or config.architecture != FROM_INIT:
        vit = ViTConfig(**saved["architecture"]) if "architecture" in saved else config.vit()
        network = f"{vit.depth} blocks of {vit.embed_dim}, patch {vit.patch_size}"
    done = int(history[-1]["step"]) if history else int(saved.get("step", 0))
    rate = _rate(history)
    facts = {
        "Network": f"{config.architecture}: {network}",
        "Resolution": f"{config.crops.global_size} px, {config.crops.local_crops} local crops of "
        f"{config.crops.local_size} px",
        "Objective": f"DINOv2, {count(config.heads.prototypes)} prototypes",
        "Images a step": count(config.batch_size),
    }
    if "seen" in saved:
        facts["Images seen"] = f"{count(saved['seen']['images'])} different ones"
    if "hardware" in saved:
        facts["Hardware"] = str(saved["hardware"])
    facts["Steps"] = f"{count(done)} of {count(config.steps)}"
    if rate is not None:
        facts["Speed"] = f"{rate:.3g} images / s"
        if done < config.steps:
            facts["To go"] = f"about {duration((config.steps - done) * config.batch_size / rate)}"
    if saved.get("init"):
        facts["Started from"] = Path(str(saved["init"])).name
    return facts


def _rate(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Images a second, in the middle of the last lines."""
    rates = [value for line in history if (value := finite(line.get("images_per_second"))) is not None and value > 0]
    return statistics.median(rates[-_RECENT_LINES:]) if rates else None


def _figures(config: PretrainConfig, history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    done = int(history[-1]["step"]) if history else 0
    passed = f"{done / config.steps:.0%} of {count(config.steps)} steps"
    figures = [("Steps", count(done), "finished" if done >= config.steps else passed)]
    for column, name in (("loss", "Loss"), ("knn_mAP", "mAP of neighbours"), ("linear_mAP", "mAP of a linear map"),
                         ("teacher_effective_rank", "Effective rank")):  # fmt: skip
        values = [value for line in history if (value := finite(line.get(column))) is not None]
        if values:
            digits = 1 if column == "teacher_effective_rank" else 3
            note = f"{decimal(values[0], digits)} at first"
            if column == "knn_mAP":
                note = _change(history) or note
            figures.append((name, decimal(values[-1], digits), note))
    return figures[:4] if len(figures) < 5 else [figures[0], *figures[2:]]


def _change(history: Sequence[Mapping[str, Any]]) -> str:
    last = next((line for line in reversed(history) if "knn_change_low" in line), None)
    if last is None:
        return ""
    low, high = signed(last["knn_change_low"]), signed(last["knn_change_high"])
    shown = "" if last["knn_change_low"] > 0 or last["knn_change_high"] < 0 else ", not shown"
    start = last.get("knn_change_since")
    since = f"step {start:.0f}" if start else "the first probe" if start is None else "the start"
    return f"{signed(last['knn_change'])} since {since} [{low}, {high}]{shown}"


def _provenance(folder: Path, saved: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        name: str(saved[name])
        for name in ("step", "seed", "preprocess_id", "accepted_leak", "not_recorded")
        if saved.get(name)
    }
    if "seen" in saved:
        facts["images seen, SHA-256"] = str(saved["seen"]["sha256"])
    if "architecture" in saved:
        facts["architecture"] = json.dumps(saved["architecture"])
    return facts | {CONFIG_NAME: (folder / CONFIG_NAME).read_text(encoding="utf-8").rstrip() + "\n"}
