"""What `hilum pretrain` settles before its loop: settings against the folder, the data, the saved state; what it says.

Everything here is done once. The loop is `pretrain.py`.
"""

from pathlib import Path
from typing import Any

import torch

from hilum.backbones.vit import ViTConfig
from hilum.core import checkpoint
from hilum.core.config import read_yaml, to_dict
from hilum.core.distributed import Engine
from hilum.core.errors import CheckpointError, ConfigError, PreprocessingMismatchError
from hilum.core.tracking import say, warn
from hilum.data.samplers import EndlessSampler, WeightedDraw, dataset_weights
from hilum.data.store import Store
from hilum.pretraining import exposure
from hilum.pretraining.config import FROM_INIT, PretrainConfig, SamplingConfig
from hilum.pretraining.loading import PretrainSource
from hilum.pretraining.state import CHECKPOINTS, architecture_of, is_origin

CONFIG_NAME = "config.yaml"
MAY_CHANGE = (
    "workers", "checkpoint_every", "keep", "log_every", "threads", "tensorboard", "strategy", "gradients", "compile",
    "probe.every", "probe.batch_size", "probe.resamples", "losses.prototype_loss", "losses.chunk",
)  # fmt: skip
"""Settings that a resumed run may have otherwise: no result depends on them, or in the last bits only (of bfloat16, for
`gradients`). The last two are the cure of a run that is out of memory: they sum in another order, so that it does not
end with the bits that it would have had."""


def refuse_another_run(config: PretrainConfig, out: Path, resume: bool) -> None:
    """Make sure that a run in the folder has these settings; before its first checkpoint they may still change.

    Raises:
        ConfigError: other settings, which are named; a folder that cannot be a run; a run where none may be.
    """
    path, begun = out / CONFIG_NAME, checkpoint.any_in(out / CHECKPOINTS)
    if not path.exists():
        if begun:
            raise ConfigError(f"{out} has checkpoints and no {CONFIG_NAME}; restore it, or choose another folder.")
        return
    earlier = read_yaml(PretrainConfig, path)  # an error where it is not ours, so that it is never replaced
    if not begun:
        return
    if not resume:
        raise ConfigError(f"{out} already holds a run; choose another folder, or let it resume.")
    before, now = _flat(to_dict(earlier)), _flat(to_dict(config))
    different = [key for key in now if before.get(key) != now[key] and key not in MAY_CHANGE]
    if different:
        listed = "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in different)
        raise ConfigError(
            f"{out} holds a run with other settings: {listed}. Choose another folder, or the same settings."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def architecture(config: PretrainConfig, init: Path | None, saved: checkpoint.Checkpoint | None) -> ViTConfig:
    """The network of a run, which architecture=init leaves to the weights.

    Raises:
        ConfigError: numbers that do not fit together, or nothing to take the network from.
        CheckpointError: the weights cannot be read.
    """
    if config.architecture != FROM_INIT:
        return config.vit()
    if saved is not None:
        return ViTConfig(**saved.values["architecture"])
    return config.vit(architecture_of(init) if init is not None else None)


def make_source(
    config: PretrainConfig, vit: ViTConfig, store: Store, pool: exposure.Pool, engine: Engine
) -> PretrainSource:
    """What the micro-batches of this process are: `accumulate` of them a step.

    Raises:
        ConfigError: a batch that does not divide, or is larger than the pool.
    """
    shares = engine.world_size * config.accumulate
    if config.batch_size % shares:
        parts = f"{engine.world_size} processes" + (
            f" x {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        )
        raise ConfigError(f"batch_size={config.batch_size} does not divide among {parts}.")
    share, group = config.batch_size // shares, config.losses.koleo_group
    if group and share % group:
        raise ConfigError(
            f"losses.koleo_group={group} does not divide the {share} images of a process and micro-batch."
        )
    if config.batch_size > len(pool.indices):
        raise ConfigError(
            f"batch_size={config.batch_size} is more than the {len(pool.indices)} images to train on: an image would "
            "be its own neighbour. Use a smaller batch."
        )
    indices, draw, window = pool.indices, None, config.sampling.window()
    if window is not None or config.sampling.datasets != "natural":
        indices = store.in_storage_order(indices)
    if config.sampling.datasets != "natural":
        weights = dataset_weights(store.datasets[indices], config.sampling.datasets)
        draw = WeightedDraw(weights, config.seed)
    sampler = EndlessSampler(
        indices, config.batch_size // shares, config.seed, engine.rank, engine.world_size, draw, window
    )
    return PretrainSource(
        store, sampler, config.crops, vit.patch_size, config.mask_ratio, config.mask_probability, config.crops_on
    )


def facts(
    config: PretrainConfig, vit: ViTConfig, store: Store, source: PretrainSource, engine: Engine, init: Path | None,
    origin: exposure.Origin,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint says beside its tensors."""
    return {
        "config": to_dict(config),
        "architecture": to_dict(vit),
        "preprocess_id": store.preprocess_id,
        "size": store.header.get("size"),
        "steps": config.steps,
        "images": store.fingerprint(source.sampler.indices),
        "order": source.sampler.fingerprint(),
        "processes": engine.world_size,
        "micro_batch": source.sampler.batch_size,
        "threads": torch.get_num_threads(),
        "hardware": f"{engine.world_size} x {_device(engine)}",
        "init": _named(init),
        "accepted_leak": exposure.join_leaks(store.accepted_leak, origin.accepted_leak),
        "not_recorded": origin.not_recorded,
        "init_sha256": origin.sha256,
    }


def _device(engine: Engine) -> str:
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU process"


def _named(init: Path | None) -> str | None:
    """A path that stays true in another working directory; names that are no path (of a hub) as they are."""
    if init is None:
        return None
    return str(init.resolve()) if init.exists() else str(init)


def check_same_run(saved: checkpoint.Checkpoint, now: dict[str, Any], init: Path | None) -> None:
    """A resumed run must see the same images, stored alike, in the same order; it may be spread otherwise.

    Raises:
        PreprocessingMismatchError: images that were read by another recipe.
        CheckpointError: other images, of another size, or another order.
        ConfigError: another origin.
    """
    if saved.values["preprocess_id"] != now["preprocess_id"]:
        raise PreprocessingMismatchError(
            f"{saved.path} is of a run on images of the recipe {saved.values['preprocess_id']!r}; this store was built "
            f"with {now['preprocess_id']!r}. Go on with the store that the run began with, or start another run."
        )
    for key, meaning in (("images", "images to train on"), ("order", "order of images"), ("size", "size of images")):
        if saved.values.get(key, now[key]) != now[key]:  # older checkpoints note neither order nor size
            raise CheckpointError(
                f"{saved.path} was written with another {meaning} ({saved.values[key]}, now {now[key]}); the run "
                "cannot go on as it was. Use the same, or start another run."
            )
    if init is not None and saved.values["init"] != now["init"]:
        begun = saved.values["init"]
        if begun is None or (init.exists() and not is_origin(init, saved.values.get("init_sha256", ""))):
            raise ConfigError(
                f"{saved.path} belongs to a run that started from {begun or 'no other weights'}, not from {init}. To "
                "go on with that run, leave out --init: it needs its origin no more."
            )
        if not init.exists():
            warn(f"--init {init} does not exist; the run, which started from {begun}, goes on without it.")
    if saved.values["processes"] != now["processes"]:
        warn(
            f"processes: {saved.values['processes']} before, {now['processes']} now. The images and their order stay; "
            "masks and stochastic depth are drawn for each process, so the run is as good, but not the same bits."
        )
    after = now["config"]["losses"]
    before = after | saved.values.get("config", {}).get("losses", {})
    if different := [name for name in ("prototype_loss", "chunk") if before[name] != after[name]]:
        listed = ", ".join(f"losses.{name} {before[name]} before, {after[name]} now" for name in different)
        say(f"{listed}; the last bits will differ.")
    if saved.values["threads"] != now["threads"]:
        say(f"Threads: {saved.values['threads']} before, {now['threads']} now; the last bits will differ.")


def announce(
    config: PretrainConfig, vit: ViTConfig, student: torch.nn.Module, pool: exposure.Pool, engine: Engine,
    start: int, init: Path | None, facts: dict[str, Any],
) -> None:  # fmt: skip
    """Say what is about to run."""
    crops, images = config.crops, len(pool.indices)
    left_out = [
        f"{count} {why}"
        for count, why in (
            (pool.held_out, "held out"),
            (pool.held_out_patients, "of held-out patients"),
            (pool.not_allowed, "not allowed for pretraining"),
        )
        if count
    ]
    say(f"Images: {images}" + (f" (left out: {', '.join(left_out)})" if left_out else ""))
    if facts["accepted_leak"]:
        warn(f"leak accepted: {facts['accepted_leak']}")
    if facts["not_recorded"]:
        warn(f"nothing lists which images {facts['not_recorded']} was trained on, and this stays with the run.")
    say(
        f"Views: {crops.global_crops} x {crops.global_size} px, {crops.local_crops} x {crops.local_size} px an image, "
        f"augmentation {crops.augmentation}" + (f", cut on {engine.device.type}" if config.crops_on == "device" else "")
    )
    parameters = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    say(
        f"Network: {config.architecture}, {vit.depth} blocks of {vit.embed_dim}, patch {vit.patch_size}; "
        f"{parameters:.1f} M parameters with heads, {config.precision} on {engine.world_size} x {engine.device.type}"
        + (f" ({config.strategy})" if engine.world_size > 1 else "")
        + (f", from {init}" if init else "")
    )
    if config.head_warmup and start == 0:
        say(f"Warm-up: the backbone stays as it is for the first {round(config.head_warmup * config.steps)} steps.")
    sampling = config.sampling
    if sampling != SamplingConfig():
        windows = f" of {sampling.blocks} blocks of {sampling.block} images" if sampling.order == "window" else ""
        say(f"Sampling: shares of datasets {sampling.datasets}, order {sampling.order}{windows}")
    if config.accumulate > 1:
        together = config.batch_size // config.accumulate
        say(
            f"Micro-batches: {config.accumulate} a step. Sinkhorn sees {together} images at a time and KoLeo "
            f"{config.losses.koleo_group or together // engine.world_size}, not {config.batch_size}."
        )
    passes = config.steps * config.batch_size / images
    say(
        f"Steps: {config.steps} of {config.batch_size} images ({passes:.1f} passes)"
        + (f"; going on after step {start}" if start else "")
    )
