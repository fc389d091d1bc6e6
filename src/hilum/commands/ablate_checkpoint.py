"""A backbone as it was part of the way of a pretraining run, out of one of the run's checkpoints; and the identity of
weights that come from elsewhere.
"""

from functools import cache
from pathlib import Path

from hilum.backbones.sources import WEIGHTS_NAME, find_weights
from hilum.backbones.vit import ViTConfig
from hilum.backbones.weights import resolve_weights, save_backbone
from hilum.core import checkpoint
from hilum.core.config import from_dict
from hilum.core.errors import CheckpointError
from hilum.core.files import sha256_file
from hilum.data.store import Store
from hilum.pretraining import exposure
from hilum.pretraining.state import CHECKPOINTS, all_seen, teacher_backbone

__all__ = ["WEIGHTS_NAME", "export", "weights_digest"]


def export(run: Path, step: int, store: Store, out: Path) -> None:
    """Write the teacher of one checkpoint as a folder that `hilum fit --backbone` takes.

    Args:
        run: a run of `hilum pretrain`.
        step: of the checkpoint.
        store: that the run was trained on.
        out: folder to write; the record of images seen is that of the checkpoint.

    Raises:
        CheckpointError: there is no whole checkpoint of that step.
    """
    folder = run / CHECKPOINTS
    path = folder / f"step_{step:08d}"
    if not path.is_dir():
        found = ", ".join(sorted(one.name for one in folder.glob("step_*"))) or "none"
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; it has {found}. A run that was stopped on the way makes one "
            "more at each stop, which pushes out an old one: raise keep in the run's overrides."
        )
    saved = checkpoint.load_checkpoint(path)
    architecture = from_dict(ViTConfig, saved.values["architecture"], "architecture.")
    seen = all_seen(saved.tensors, exposure.Seen(*(exposure.uid_numbers(ids) for ids in (store.uids, store.pictures))))
    extra = {
        "step": step,
        "steps": saved.values["steps"],
        "seed": saved.values["config"]["seed"],
        "init": saved.values["init"],
        "seen": {"images": len(seen.uids), "sha256": exposure.write_seen(out, seen)},
        "accepted_leak": saved.values["accepted_leak"],
        "hardware": saved.values["hardware"],
    }
    save_backbone(teacher_backbone(saved.tensors, architecture), out, saved.values["preprocess_id"], extra)


@cache
def weights_digest(weights: str) -> str:
    """Hex SHA-256 of the file that a path, or a name on a hub, stands for.

    Raises:
        CheckpointError: nothing there.
    """
    return sha256_file(find_weights(Path(resolve_weights(weights))))
