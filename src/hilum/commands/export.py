"""`hilum export`: a model for other runtimes, or its backbone for other libraries, compared before it is written."""

from pathlib import Path

from hilum.core.tracking import next_step, progress, say
from hilum.deploy.exporting.directory import HUGGINGFACE, export_model
from hilum.deploy.model_files import ENSEMBLE_FORMAT, read_config


def run(model: Path, form: str, out: Path) -> None:
    """Export a MODEL or an ensemble.

    Args:
        model: the directory.
        form: one of `exporting.directory.NAMES`.
        out: a new directory.

    Raises:
        HilumError: as `export_model`.
    """
    content = read_config(model)
    count = len(content["members"]) if content["format"] == ENSEMBLE_FORMAT else 1
    with progress("export", count, "networks") as bar:
        written = export_model(model, form, out, lambda number: bar.advance(1))
    for network in written["networks"]:
        apart = network["difference"]
        said = [f"embeddings' cosine at least {apart['embeddings']['smallest_cosine']:.8f}"]
        if "probabilities" in apart:
            said.insert(0, f"probabilities within {apart['probabilities']['largest_difference']:.2g}")
            said.insert(1, f"maps within a share of {apart['maps']['largest_share_elsewhere']:.2g}")
        say(f"{out / network['folder'] / network['graph']}: {', '.join(said)} of the predictor")
    if form in ("onnx", "openvino"):
        next_step(f"hilum predict {out} INPUT --engine {form} --out findings.csv")
    elif form == HUGGINGFACE:
        next_step(f"hilum fit decoder --data STORE --backbone {out / written['networks'][0]['folder']} --out MODEL")
