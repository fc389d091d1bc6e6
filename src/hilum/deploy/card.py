"""The model card of a MODEL directory, from what `config.json` says. It claims nothing that was not recorded."""

from collections.abc import Mapping
from typing import Any

from hilum.core.types import RESEARCH_NOTICE


def model_card(content: Mapping[str, Any]) -> str:
    """README.md for people who are handed the directory."""
    backbone, head = content["architecture"]["backbone"], content["architecture"]["head"]
    recipe, training = content["preprocessing"], content["training"]
    images = content["exposure"]["images"]
    fitted = content["fitted_on"]
    findings = content["findings"]
    untrained = [finding["name"] for finding in findings if not finding["trained"]]
    few = content["calibration"]["image"]["maps"]
    flagged = [name for name, one in few.items() if one and one["flag"]]
    lines = [
        f"# {len(findings)} findings on chest X-rays",
        "",
        RESEARCH_NOTICE,
        "",
        f"A {_NAMES[head['name']]} {_VIEWS[head.get('views', 'single')]}on a "
        f"{_method(training)} vision transformer ({backbone['depth']} blocks of "
        f"{backbone['embed_dim']} channels, patch {backbone['patch_size']}), {recipe['resolution']} x "
        f"{recipe['resolution']} pixels. Made by Hilum {content['hilum']}.",
        "",
        "```python",
        "import hilum",
        'result = hilum.load("THIS_FOLDER").predict(["frontal.dcm", "lateral.dcm"])  # one study',
        f'result.probabilities["{findings[0]["name"]}"]',
        "```",
        "",
        "## Data",
        "",
        f"Pretraining: {images['pretraining']} images. Head: {images['train']} training images"
        f"{_and_val(images['val'])}. Their identities are in `exposure.npz`; an evaluation on any of them is "
        "not one on unseen images.",
        "",
        *([f"Leak accepted: {content['accepted_leak']}.", ""] if content.get("accepted_leak") else []),
        "## Calibration",
        "",
        f"Calibrators and operating points were fitted on {fitted['images']} validation images, predicted by the head "
        f"of the learning-rate search (rate {training['learning_rate']:g}, epoch {fitted['epoch']}), which had not "
        f"been trained on them; {'the head in this folder inherits them' if training['refit_epochs'] else _SAME}.",
        *([f"Too few positives for a calibration of their own: {', '.join(flagged)}."] if flagged else []),
        "",
        "## Findings",
        "",
        "| finding | group | positive training images | known |",
        "|---|---|---|---|",
        *(f"| {one['name']} | {one['group']} | {one['positives']} | {one['known']} |" for one in findings),
        "",
        *([f"Never trained, and always null: {', '.join(untrained)}."] if untrained else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _and_val(images: int) -> str:
    return f" and, in the last fit, {images} validation images" if images else "; no validation images"


def _method(training: Mapping[str, Any]) -> str:
    tuning = training.get("tuning")
    return "frozen" if not tuning or not tuning["chosen"] else f"tuned ({tuning['method']})"


_SAME = "it is the head in this folder"
_NAMES = {"linear": "linear head", "ml_decoder": "ML-Decoder head", "csra": "class-specific attention (CSRA) head"}
_VIEWS = {
    "single": "", "concat": "reading pairs of views, ", "set": "reading all views of a study, ",
    "attention": "weighing the views of a study, ", "memory": "reading all views of a study, ",
}  # fmt: skip
