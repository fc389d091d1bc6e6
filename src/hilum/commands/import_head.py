"""hilum import-weights --head: a published backbone and its published head to a MODEL that `hilum predict` runs.

The MODEL is marked: nothing calibrates it, it has no thresholds, and what it has seen is not recorded image by image.
`hilum recalibrate` on labelled studies of one's own gives it the first two.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import hilum
from hilum.backbones.vit import VisionTransformer
from hilum.backbones.weights import GREY_RECIPE, load_backbone, read_backbone_config
from hilum.commands.import_names import findings_of, read_names
from hilum.commands.import_weights import SHOWN, readable
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import sha256_file, write_text
from hilum.core.tracking import next_step, say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.leaks import known_exposures
from hilum.deploy import model_files as files
from hilum.deploy.card import FRONT_MATTER
from hilum.deploy.checklist import CHECKLIST_NAME, checklist
from hilum.evaluation.calibration import Calibrator
from hilum.heads.registry import HeadConfig, on_meta
from hilum.heads.released import BEST, ReleasedHead, choose_head, head_config, read_heads

RECIPE = "chexfound-1"
STORED_SIDE = 512
"""Shorter side of the images that the published weights were trained on, pixels."""
SEEN = "CheXFound-CXR1M"
"""Of data/facts/known_exposure.csv."""
RESULTS_NAME = "results_eval_linear.json"
UNCALIBRATED = (
    "imported: no calibrator came with the weights; fit one on labelled studies of your own (hilum recalibrate)"
)
WHAT_IS_KNOWN = (
    "Which images these weights have seen is not recorded. By what is published they have seen training data of "
    "CXR-LT, CheXpert, BRAX and NIH, and probably development and test images of CXR-LT"
)
NOT_RECORDED = f"imported: {WHAT_IS_KNOWN[0].lower()}{WHAT_IS_KNOWN[1:]}"


def run(
    backbone: str,
    head: Path,
    out: Path,
    head_name: str | None = None,
    findings: Path | None = None,
    results: Path | None = None,
    image_size: int | None = None,
) -> None:
    """Write a MODEL, and say what became of every tensor.

    Args:
        backbone: published weights of the backbone, or what `hilum import-weights` made of them.
        head: the file of its heads (glori.pth), or its tensors as safetensors.
        out: a new folder.
        head_name: which head of several: its name, a part that only one has, or "best".
        findings: text file with the name of each output, in order (`read_names`); None: CXR-LT 2024 Task 1's, of 40.
        results: for "best", what the public code wrote of its selection; None: results_eval_linear.json beside `head`.
        image_size: lay positions out for squares of this side, pixels; None: as stored.

    Raises:
        CheckpointError: a file is refused, damaged, holds what cannot be explained, or the two do not fit each other.
        ConfigError: `out` is taken, a backbone of Hilum's own, or names that do not fit the outputs.
        HilumError: the disk is full or the folder cannot be written.
    """
    files.require_new(out)
    with readable(str(head)) as (head_file, head_tensors):
        shapes = _shapes(head_tensors)
        found = read_heads(shapes, str(head_file))
        name = _best(results or head_file.parent / RESULTS_NAME, found.heads) if head_name == BEST else head_name
        chosen = choose_head(found.heads, name, str(head_file))
        state = _read(head_tensors, chosen)
    with readable(backbone) as (file, tensors):
        network, record = _backbone(file, tensors, image_size)
    config = head_config(chosen, shapes, network.config.embed_dim, str(head_file))
    if config.blocks > network.config.depth:
        raise CheckpointError(f"{head_file} reads the last {config.blocks} blocks; {file} has {network.config.depth}.")
    names = read_names(findings, config.findings)
    described = files.NetworkConfig(
        backbone=network.config, head=config, findings=findings_of(names), preprocess_id=RECIPE,
        resolution=network.config.image_size, short_side=max(STORED_SIDE, network.config.image_size),
    )  # fmt: skip
    others = [one for one in found.heads if one != chosen.name]
    imported = {
        "backbone": record,
        "head": {
            "file": head_file.name, "sha256": sha256_file(head_file), "name": chosen.name,
            "learning_rate": chosen.learning_rate, "other_heads": others, "left_out": found.left_out,
        },
        "findings": "CXR-LT 2024 Task 1, in its order" if findings is None else findings.name,
    }  # fmt: skip
    _write(out, described, network, _head(config, state, str(head_file)), imported)
    _report(out, described, imported, sum(one.numel() for one in state.values()))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}.") from error


def _read(file: Path, head: ReleasedHead) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        state = {name: opened.get_tensor(key) for name, key in head.sources.items()}
    wrong = [name for name, value in state.items() if not (value.is_floating_point() and bool(value.isfinite().all()))]
    if wrong:
        raise CheckpointError(f"The head {head.name!r} has values that are no finite numbers: {', '.join(wrong[:6])}.")
    return {name: value.float() for name, value in state.items()}


def _best(path: Path, heads: Mapping[str, ReleasedHead]) -> str:
    """The head that the public code selected: of each line that is JSON, `{"best_classifier": {"name": ...}}`; last."""
    names = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
            except ValueError:
                continue  # the file mixes lines of JSON with plain ones
            told = content.get("best_classifier") if isinstance(content, dict) else None
            names += [told["name"]] if isinstance(told, dict) and isinstance(told.get("name"), str) else []
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--head-name {BEST}: {path} cannot be read ({error}). Name a head instead.") from error
    if not names or names[-1] not in heads:
        told_words = f"it names {names[-1]!r}" if names else "it names no best_classifier"
        raise CheckpointError(
            f"--head-name {BEST}: {path}: {told_words}; expected one of {'; '.join(heads)}. Name the head instead."
        )
    return str(names[-1])


def _backbone(file: Path, tensors: Path, image_size: int | None) -> tuple[VisionTransformer, dict[str, Any]]:
    described = read_backbone_config(tensors)
    own = described.get("imported")
    if described["format"] != "imported" and not own:
        raise ConfigError(f"{file} was trained by Hilum: a published head is not its head. Fit one with `hilum fit`.")
    record = own or {key: described[key] for key in ("layout", "normalisation", "left_out", "filled")}
    if described["preprocess_id"] != GREY_RECIPE:
        raise CheckpointError(f"{file}: nothing tells how its images were normalised, so no head can be put on it.")
    model = load_backbone(tensors, image_size=image_size)
    return model, {"file": file.name, "sha256": sha256_file(file), **record}


def _head(config: HeadConfig, state: Mapping[str, Tensor], where: str) -> torch.nn.Module:
    head = on_meta(config)
    head.load_state_dict(dict(state), strict=True, assign=True)
    return head.eval().requires_grad_(False)


def _write(
    out: Path,
    described: files.NetworkConfig,
    backbone: VisionTransformer,
    head: torch.nn.Module,
    imported: Mapping[str, Any],
) -> None:
    names = tuple(finding.name for finding in described.findings)
    maps: dict[str, dict[str, Any] | None] = {
        finding.name: {
            "kind": "identity", "parameters": {}, "positives": 0, "known": 0, "group": finding.group,
            "flag": "uncalibrated: imported", "threshold_shrunk": False,
        }
        for finding in described.findings
    }  # fmt: skip
    stages = {"image": "raw", "study": "study"}
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "format": files.MODEL_FORMAT, "hilum": hilum.__version__, "notice": RESEARCH_NOTICE,
        **files.describe(described),
        "weights": files.write_weights(out, backbone, head),  # type: ignore[arg-type]
        "calibration": files.describe_calibrators(
            {unit: Calibrator(names, maps, {}, {}, stage, unit) for unit, stage in stages.items()}
        ),
        "uncalibrated": UNCALIBRATED,
        "fitted_on": None,
        "accepted_leak": "",
        "exposure": {
            **files.write_exposure(out, files.Exposure()), "not_recorded": NOT_RECORDED, "weights": SEEN,
            "datasets": sorted({fact.dataset for fact in known_exposures() if fact.weights == SEEN}),
        },
        "training": {"imported": imported},
    }  # fmt: skip
    write_text(out / files.CARD_NAME, _card(content))
    write_text(out / CHECKLIST_NAME, checklist(content))
    files.write_config(out, content)


def _card(content: Mapping[str, Any]) -> str:
    imported, exposure = content["training"]["imported"], content["exposure"]
    findings = content["findings"]
    return "\n".join(
        [
            FRONT_MATTER,
            f"# {len(findings)} findings on chest X-rays, imported",
            "",
            RESEARCH_NOTICE,
            "",
            f"Weights of others: backbone `{imported['backbone']['file']}`, head `{imported['head']['file']}` "
            f"({imported['head']['name'] or 'without a name'}), converted by Hilum {content['hilum']}. Read their "
            "licence where you got them.",
            "",
            "## Not calibrated",
            "",
            "Its values are the sigmoids of its logits: they rank images, and are no probabilities. There are no "
            "thresholds. `hilum recalibrate` on labelled studies of your own gives both, and says whether the model is "
            "fit for them.",
            "",
            "## Exposed",
            "",
            f"{WHAT_IS_KNOWN}. All images of "
            f"{', '.join(exposure['datasets'])} count as met: scores on them say nothing of unseen images.",
            "",
            "## Images",
            "",
            f"Recipe `{content['preprocessing']['id']}`, {content['preprocessing']['resolution']} pixels "
            "(docs/reference/images.md).",
            "",
            "## Findings",
            "",
            f"Order of the outputs: {imported['findings']}. {', '.join(one['name'] for one in findings)}.",
            "",
            "## Reporting",
            "",
            f"`{CHECKLIST_NAME}`: the items of CLAIM 2024 and TRIPOD+AI, filled where the files know the answer.",
        ]
    ) + "\n"  # fmt: skip


def _report(out: Path, described: files.NetworkConfig, imported: Mapping[str, Any], numbers: int) -> None:
    backbone, head = imported["backbone"], imported["head"]
    config = described.head
    say(
        f"{backbone['file']}: ViT of {described.backbone.depth} blocks of {described.backbone.embed_dim} channels, "
        f"{described.resolution} pixels"
    )
    say(
        f"{head['file']}: head {head['name'] or '(without a name)'}, {config.findings} findings from the last "
        f"{config.blocks} blocks, {'with' if config.cat_cls else 'without'} [CLS]; {numbers:,} numbers, all mapped"
    )
    if head["other_heads"]:
        say(f"  other heads in the file: {'; '.join(head['other_heads'])}")
    for reason, keys in head["left_out"].items():
        rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        say(f"  left out, {reason}: {', '.join(keys[:SHOWN])}{rest}")
    say(f"  findings: {imported['findings']}; images by the recipe {described.preprocess_id}")
    warn(f"{out} is not calibrated and has no thresholds: its values rank images, and are no probabilities")
    warn(f"{out}: what it has seen is not recorded; it has probably met images of CXR-LT, of its test set too")
    next_step(f"hilum recalibrate {out} studies --labels labels.csv --out {out}_here")
