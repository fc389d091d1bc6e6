"""`hilum pretrain`: a store in, a self-supervised backbone out. DINOv2, read from top to bottom.

A stage at a higher resolution is this program again, with `init` naming the run before it. One process on the CPU or
one GPU, or several through `core.distributed`. The objective is `pretraining/dinov2.py`; the run folder:

    RUN/config.yaml        the settings, complete; can be passed back
    RUN/metrics.jsonl      one line per logged step
    RUN/checkpoints/       resume state, the last few
    RUN/teacher.safetensors, config.json    the backbone, renewed with every checkpoint
    RUN/seen.npz           the identity of every image that it, or a stage before it, was trained on

More than 300 lines: the loop, and all that it says, checks and writes, in one place.
"""

import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hilum.backbones.vit import ViTConfig
from hilum.backbones.weights import WEIGHTS_NAME, save_backbone
from hilum.core import checkpoint
from hilum.core.config import read_yaml, to_dict, write_yaml
from hilum.core.distributed import Engine, launch, max_over_ranks, mean_over_ranks
from hilum.core.errors import CheckpointError, ConfigError, NonFiniteLossError
from hilum.core.files import write_json
from hilum.core.locks import folder_lock
from hilum.core.seeding import torch_stream
from hilum.core.tracking import Bar, MetricsLog, duration, next_step, progress, say, warn
from hilum.data.samplers import EndlessSampler, WeightedDraw, dataset_weights
from hilum.data.store import Store
from hilum.data.transforms import Preprocessing, normalise, preprocessing
from hilum.pretraining import dinov2, exposure
from hilum.pretraining.config import PretrainConfig, SamplingConfig
from hilum.pretraining.loading import PretrainBatch, PretrainLoader, PretrainSource
from hilum.pretraining.param_groups import parameter_groups, set_values
from hilum.pretraining.schedules import Values
from hilum.pretraining.state import CHECKPOINTS, TrainingState, start_from

CONFIG_NAME, METRICS_NAME = "config.yaml", "metrics.jsonl"
STOPPED_STATUS = 75
"""Exit status after SIGTERM or SIGUSR1: saved, run the same command again (EX_TEMPFAIL)."""
_STEPS_BEFORE_ESTIMATE = 5
_MAY_CHANGE = ("workers", "checkpoint_every", "keep", "log_every", "threads")
"""Settings that a resumed run may have otherwise: no result depends on them (on `threads` in the last bits only)."""


def run(
    config: PretrainConfig, data: Path, out: Path, init: Path | None = None, resume: bool = True, devices: int = 1
) -> Path:
    """Pretrain a backbone; start, or go on where an interrupted run stopped.

    SIGTERM and SIGUSR1 finish the step, save, and end the program with status 75. On a CPU, a resumed run ends with the
    same bits as an uninterrupted one (same build and number of threads).

    Args:
        config: all settings.
        data: store.
        out: run folder; created.
        init: an earlier run (both networks and heads start from its last checkpoint, positions resampled) or weights
            (both networks start from the backbone).
        resume: False refuses a folder that holds a run.
        devices: GPUs, or CPU processes, of this machine.

    Returns:
        `out`.

    Raises:
        ConfigError: settings that do not fit each other, the store or the machine; `out` holds a run with others.
        CheckpointError: `init` or the saved state is damaged or does not fit.
        NonFiniteLossError: a loss or gradient is not finite; no weight has moved since the step before.
        HilumError: another process writes `out`; the disk is full.
    """
    data, out = Path(data), Path(out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with launch(devices, config.precision, config.accelerator) as engine, ExitStack() as held:
        main = engine.rank == 0
        if main:
            held.enter_context(folder_lock(out))
            _refuse_another_run(config, out, resume)
        engine.barrier()

        # Data: which images, in which order.
        store = Store.open(data)
        recipe = preprocessing(store.preprocess_id)
        pool = exposure.select(store, config.train_on)
        source = _source(config, store, pool, engine)
        loader = PretrainLoader(source, config.workers, pin_memory=engine.device.type == "cuda")

        # Networks, optimizer, and the state they resume from.
        architecture = config.vit()
        student, teacher = dinov2.make_networks(architecture, config.heads, config.seed)
        saved = checkpoint.load_newest(out / CHECKPOINTS)
        inherited = exposure.Seen(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        if init is not None and saved is None:
            inherited = start_from(Path(init), student, teacher, store.preprocess_id)
        teacher.to(engine.device)
        model = engine.setup(student)
        groups = parameter_groups(student, architecture.depth, config.layer_decay, config.patch_embed_factor)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
        centres = dinov2.make_centres(config.heads.prototypes, engine.device)
        seen = torch.zeros(len(store), dtype=torch.bool)
        state = TrainingState(student, teacher, optimizer, centres, seen, inherited)
        facts = _facts(config, architecture, store, source, engine, init)
        if saved is not None:
            facts["accepted_leak"] = saved.values.get("accepted_leak", "")
        start = 0
        if saved is not None:
            _check_same_run(saved, facts, init)
            state.restore(saved)
            start = saved.step
        if start >= config.steps:
            if main:
                _export(state, start, config, facts, store, out)
                say(f"{out} is finished: {start} of {config.steps} steps.")
            return out
        if main:
            if saved is None:  # everything fits: from here on the folder holds this run
                write_yaml(out / CONFIG_NAME, config)
            _announce(config, architecture, student, pool, engine, start, init, facts["accepted_leak"])

        schedules = config.schedules()
        batches = loader.batches(start, config.steps)
        log = MetricsLog(out / METRICS_NAME, start) if main else None
        clock = _Clock(start)
        with _stop_signals() as stop, _bar(config.steps - start, main) as bar:
            for step in range(start, config.steps):
                values = schedules.at(step)
                set_values(optimizer, values)
                loaded = next(batches)
                batch = _to_device(loaded, engine.device, recipe)
                drop_path_stream = torch_stream(config.seed, "drop path", step, engine.rank)

                with engine.autocast():
                    taught = dinov2.teacher_forward(teacher, batch)
                    targets = dinov2.teacher_targets(taught, state.centres, values.teacher_temperature, config.losses)
                    said = model(batch, config.drop_path, drop_path_stream)
                    losses = dinov2.compute_losses(said, targets, batch, config.losses)
                engine.backward(losses.total)
                norms = dinov2.clip_gradients(student, config.clip)
                stopping = _check_finite(out, step, losses, norms, loaded, store, engine, stop)

                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                dinov2.update_teacher(teacher, student, values.momentum)
                if config.losses.centering == "centre":
                    state.centres = dinov2.update_centres(state.centres, taught, config.losses.centre_momentum)
                state.seen[loaded.indices] = True

                if engine.world_size == 1:  # several processes agree once a step, before it; one may look again
                    stopping = stop.requested
                done, last = step + 1, step + 1 == config.steps
                if done % config.log_every == 0 or done == start + 1 or last or stopping:
                    line = _measure(losses, norms, values, taught, targets, loaded)
                    rate = clock.steps_per_second(done) * config.batch_size
                    bar.note(f"loss {line['loss']:.3f}, {rate:.0f} images/s")
                    if log:
                        log.write(done, **line, images_per_second=round(rate, 2))
                bar.advance()
                if main and done == start + _STEPS_BEFORE_ESTIMATE and not last:
                    say(f"About {duration((config.steps - done) * clock.seconds() / (done - start))} to go.")
                if done % config.checkpoint_every == 0 or last or stopping:
                    _save(state, done, config, facts, store, out, engine)
                if stopping and not last:
                    if main:
                        say(f"Stopped after step {done} of {config.steps}; saved. The same command goes on from there.")
                    raise SystemExit(STOPPED_STATUS)

        if main:
            say(f"{config.steps} steps done in {duration(clock.seconds())}; backbone: {out / WEIGHTS_NAME}")
            if loader.replaced:
                say(f"{len(loader.replaced)} damaged image(s) were replaced; `hilum verify {data}` lists them.")
            next_step(f"hilum fit RECIPE --data {data} --backbone {out} --out MODEL")
    return out


def _refuse_another_run(config: PretrainConfig, out: Path, resume: bool) -> None:
    """Make sure that a run in the folder has these settings; before its first checkpoint they may still change."""
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
    different = [key for key in now if before.get(key) != now[key] and key not in _MAY_CHANGE]
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


def _source(config: PretrainConfig, store: Store, pool: exposure.Pool, engine: Engine) -> PretrainSource:
    if config.batch_size % engine.world_size:
        raise ConfigError(f"batch_size={config.batch_size} does not divide among {engine.world_size} processes.")
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
        indices, config.batch_size // engine.world_size, config.seed, engine.rank, engine.world_size, draw, window
    )
    return PretrainSource(
        store, sampler, config.crops, config.vit().patch_size, config.mask_ratio, config.mask_probability
    )


def _facts(
    config: PretrainConfig, vit: ViTConfig, store: Store, source: PretrainSource, engine: Engine, init: Path | None
) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    return {
        "config": to_dict(config),
        "architecture": to_dict(vit),
        "preprocess_id": store.preprocess_id,
        "steps": config.steps,
        "images": store.fingerprint(source.sampler.indices),
        "order": source.sampler.fingerprint(),
        "processes": engine.world_size,
        "threads": torch.get_num_threads(),
        "init": str(Path(init).resolve()) if init else None,
        "accepted_leak": exposure.join_leaks(store.accepted_leak, exposure.leak_of(init) if init else ""),
    }


def _check_same_run(saved: checkpoint.Checkpoint, facts: dict[str, Any], init: Path | None) -> None:
    """A resumed run must see the same images from the same number of processes."""
    for key, meaning in (
        ("images", "images to train on"), ("processes", "number of processes"), ("order", "order of images"),
    ):  # fmt: skip
        if saved.values.get(key, facts[key]) != facts[key]:  # older checkpoints do not note their order
            raise CheckpointError(
                f"{saved.path} was written with another {meaning} ({saved.values[key]}, now {facts[key]}); the run "
                "cannot go on as it was. Use the same, or start another run."
            )
    if init is not None and saved.values["init"] != facts["init"]:
        raise ConfigError(f"{saved.path} belongs to a run that started from {saved.values['init']}, not from {init}.")
    if saved.values["threads"] != facts["threads"]:
        say(f"Threads: {saved.values['threads']} before, {facts['threads']} now; the last bits will differ.")


def _announce(
    config: PretrainConfig, vit: ViTConfig, student: torch.nn.Module, pool: exposure.Pool, engine: Engine,
    start: int, init: Path | None, leak: str,
) -> None:  # fmt: skip
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
    if leak:
        warn(f"leak accepted: {leak}")
    say(
        f"Views: {crops.global_crops} x {crops.global_size} px, {crops.local_crops} x {crops.local_size} px an image, "
        f"augmentation {crops.augmentation}"
    )
    parameters = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    say(
        f"Network: {config.architecture}, {vit.depth} blocks of {vit.embed_dim}, patch {vit.patch_size}; "
        f"{parameters:.1f} M parameters with heads, {config.precision} on {engine.world_size} x {engine.device.type}"
        + (f", from {init}" if init else "")
    )
    sampling = config.sampling
    if sampling != SamplingConfig():
        windows = f" of {sampling.blocks} blocks of {sampling.block} images" if sampling.order == "window" else ""
        say(f"Sampling: shares of datasets {sampling.datasets}, order {sampling.order}{windows}")
    passes = config.steps * config.batch_size / images
    say(
        f"Steps: {config.steps} of {config.batch_size} images ({passes:.1f} passes)"
        + (f"; going on after step {start}" if start else "")
    )


def _to_device(batch: PretrainBatch, device: torch.device, recipe: Preprocessing) -> dinov2.Batch:
    masked = batch.masks.flatten().nonzero().flatten()  # on the CPU: on a GPU it would wait for all work queued
    moved = batch.to(device)
    return dinov2.Batch(
        normalise(moved.global_crops, recipe),
        normalise(moved.local_crops, recipe),
        moved.masks,
        masked.to(device, non_blocking=True),
        moved.mask_weights,
    )


def _check_finite(
    out: Path, step: int, losses: dinov2.Losses, norms: dict[str, Tensor], loaded: PretrainBatch, store: Store,
    engine: Engine, stop: "_Stop",
) -> bool:  # fmt: skip
    """Raise, on every process, if a loss or a gradient is not finite on any; else say whether to stop after this step.

    The one place where a step waits for the device.
    """
    numbers = torch.stack([*losses, *norms.values()]).detach()
    flags = torch.stack([(~torch.isfinite(numbers)).any(), torch.tensor(stop.requested, device=numbers.device)])
    broken, stopping = max_over_ranks(flags.to(torch.int32)).tolist()
    if broken:
        uids = store.uids[loaded.indices.numpy()].tolist()
        record = {
            "step": step + 1,
            "values": {
                name: value if math.isfinite(value) else str(value)
                for name, value in zip((*losses._fields, *norms), numbers.tolist(), strict=True)
            },
            "images": uids,
        }
        path = out / f"non_finite_step_{step + 1:08d}_rank_{engine.rank}.json"
        write_json(path, record)
        bad = [name for name, value in record["values"].items() if isinstance(value, str)]
        raise NonFiniteLossError(
            f"Step {step + 1}: {', '.join(bad) or 'a value on another process'} is not finite; no weight was moved. "
            f"The step's images and values are in {path}. Start another run from the last checkpoint (--init) with a "
            "lower learning_rate or precision=fp32."
        )
    return bool(stopping)


def _measure(
    losses: dinov2.Losses, norms: dict[str, Tensor], values: Values, taught: dinov2.TeacherOutput,
    targets: dinov2.Targets, loaded: PretrainBatch,
) -> dict[str, Any]:  # fmt: skip
    """One line of `metrics.jsonl`; losses are means over processes. All processes call it."""
    mean = mean_over_ranks(torch.stack(list(losses)).detach().clone()).tolist()
    named = dict(zip(("loss", *losses._fields[1:]), mean, strict=True))
    named |= {f"gradient_norm_{part}": norm.item() for part, norm in norms.items()}
    named |= {name: value.item() for name, value in dinov2.health(taught, targets).items()}
    content = hashlib.sha256()
    for tensor in (loaded.indices, loaded.masks, loaded.global_crops, loaded.local_crops):
        content.update(tensor.numpy().data)
    return named | values._asdict() | {"batch": content.hexdigest()[:16]}


def _save(
    state: TrainingState, done: int, config: PretrainConfig, facts: dict[str, Any], store: Store, out: Path,
    engine: Engine,
) -> None:  # fmt: skip
    """Checkpoint, then everything that can be read without resuming. All processes call it."""
    seen = max_over_ranks(state.seen.to(engine.device, torch.int32))
    state.seen = seen.to("cpu", torch.bool)
    if engine.rank == 0:
        checkpoint.save_checkpoint(out / CHECKPOINTS, done, state.tensors(), facts, config.keep)
        _export(state, done, config, facts, store, out)
    engine.barrier()


def _export(
    state: TrainingState, done: int, config: PretrainConfig, facts: dict[str, Any], store: Store, out: Path
) -> None:
    """The record of images seen, and the teacher's backbone."""
    numbers = exposure.Seen(exposure.uid_numbers(store.uids), exposure.uid_numbers(store.pictures))
    seen = state.all_seen(numbers)
    extra = {
        "step": done,
        "steps": config.steps,
        "seed": config.seed,
        "init": facts["init"],
        "seen": {"images": len(seen.uids), "sha256": exposure.write_seen(out, seen)},
        "accepted_leak": facts["accepted_leak"],
    }
    save_backbone(state.teacher.backbone, out, store.preprocess_id, extra)


class _Clock:
    """Seconds since the loop began, and the rate since the last question."""

    def __init__(self, step: int) -> None:
        self.began = self.last = time.monotonic()
        self.step = step

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def steps_per_second(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self.step) / max(now - self.last, 1e-9)
        self.last, self.step = now, step
        return rate


class _NoBar:
    """Progress of the processes that show none."""

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _bar(steps: int, shown: bool) -> AbstractContextManager[Bar]:
    return progress("pretraining", steps, "steps") if shown else nullcontext(_NoBar())


class _Stop:
    """Whether a signal has asked this run to stop."""

    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Inside, SIGTERM and SIGUSR1 are noted, not obeyed. Other threads than the main one get no signals."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(_number: int, _frame: object) -> None:
        stop.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
