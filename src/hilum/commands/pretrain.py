"""`hilum pretrain`: a store in, a self-supervised backbone out. DINOv2, read from top to bottom.

A stage at a higher resolution is this program again, with `init` naming the run before it. One process on the CPU or
one GPU, or several through `core.distributed`. The objective is `pretraining/dinov2.py`; what is settled before the
loop is `pretrain_setup.py`, what a step is asked is `pretrain_watch.py`. The run folder:

    RUN/config.yaml        the settings, complete; can be passed back
    RUN/metrics.jsonl      one line per logged step
    RUN/checkpoints/       resume state, the last few
    RUN/teacher.safetensors, config.json    the backbone, renewed with every checkpoint
    RUN/seen.npz           the identity of every image that it, or a stage before it, was trained on
    RUN/report.html        curves, feature maps and neighbours, written at the end

More than 300 lines: the loop, and what it writes and says at every step, in one place.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilum.backbones.vit import ViTConfig
from hilum.backbones.weights import WEIGHTS_NAME, save_backbone
from hilum.commands import pretrain_setup as setup
from hilum.commands.pretrain_probe import Probe, open_probe
from hilum.commands.pretrain_report import write_report
from hilum.commands.pretrain_watch import Watch, stop_signals
from hilum.core import checkpoint
from hilum.core.config import write_yaml
from hilum.core.distributed import Engine, launch, max_over_ranks, mean_over_ranks
from hilum.core.errors import HilumError
from hilum.core.files import remove_leftovers
from hilum.core.locks import folder_lock
from hilum.core.seeding import torch_stream
from hilum.core.sharding import whole_tensors
from hilum.core.tracking import Bar, MetricsLog, duration, next_step, progress, say, warn
from hilum.core.transfer import send
from hilum.data.store import Store
from hilum.data.transforms import Preprocessing, normalise, preprocessing
from hilum.pretraining import dinov2, exposure
from hilum.pretraining.alarms import LOOK_BACK, RECENT, alarms
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.flops import device_peak, step_flops, utilisation
from hilum.pretraining.loading import PretrainBatch, PretrainLoader
from hilum.pretraining.param_groups import parameter_groups, set_values
from hilum.pretraining.schedules import Values
from hilum.pretraining.state import CHECKPOINTS, TrainingState, all_seen, start_from, teacher_backbone

METRICS_NAME = "metrics.jsonl"
STOPPED_STATUS = 75
"""Exit status after SIGTERM or SIGUSR1: saved, run the same command again (EX_TEMPFAIL)."""
_STEPS_BEFORE_ESTIMATE = 10
"""Without the first, which compiles and waits for the first batch."""


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
        PeerError: another process of the run was killed or does not answer.
        HilumError: another process writes `out`; the disk is full.
    """
    data, out = Path(data), Path(out)
    init = Path(init) if init is not None else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with (
        launch(devices, config.precision, config.accelerator, config.strategy, config.gradients) as engine,
        ExitStack() as held,
    ):
        main = engine.rank == 0
        stop = held.enter_context(stop_signals())  # from here on: a signal while the run starts is not lost either
        if main:
            held.enter_context(folder_lock(out))
            setup.refuse_another_run(config, out, resume)
            remove_leftovers(out)
        engine.barrier()

        # Data: which images, in which order.
        store = Store.open(data)
        recipe = preprocessing(store.preprocess_id)
        pool = exposure.select(store, config.train_on)
        saved = checkpoint.load_newest(out / CHECKPOINTS)
        architecture = setup.architecture(config, init, saved)
        source = setup.make_source(config, architecture, store, pool, engine)
        loader = PretrainLoader(source, config.workers, pin_memory=engine.device.type == "cuda")
        probe = open_probe(store, config.probe, architecture.image_size, config.seed, out, speaks=main)

        # Networks, optimizer, and the state they resume from.
        student, teacher = dinov2.make_networks(architecture, config.heads, config.seed)
        origin = exposure.Origin()
        if init is not None and saved is None:
            origin = start_from(init, student, teacher, store.preprocess_id)
        if config.compile == "on" or (config.compile == "auto" and engine.device.type == "cuda"):
            student.backbone.compile_blocks()
            teacher.backbone.compile_blocks()
        engine.setup(teacher, ("forward_crops",))
        model = engine.setup(student, ("forward_crops",))
        groups = parameter_groups(student, architecture.depth, config.layer_decay, config.patch_embed_factor)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
        centres = dinov2.make_centres(config.heads.prototypes, engine.device)
        seen = torch.zeros(len(store), dtype=torch.bool)
        state = TrainingState(student, teacher, optimizer, centres, seen, origin.seen)
        facts = setup.facts(config, architecture, store, source, engine, init, origin)
        start = 0
        if saved is not None:
            setup.check_same_run(saved, facts, init)
            facts |= {"init": saved.values["init"]}  # older checkpoints lack the others
            facts |= {name: saved.values.get(name, "") for name in ("accepted_leak", "not_recorded", "init_sha256")}
            state.restore(saved)
            start = saved.step
            if start >= config.steps:
                facts |= {"hardware": saved.values.get("hardware", facts["hardware"])}  # nothing is trained here
        output = _Output(out, store, architecture, config, facts)
        if start >= config.steps:
            tensors = whole_tensors(state.tensors())
            if main:
                output.export(start, tensors)
                say(f"{out} is finished: {start} of {config.steps} steps.")
            return out
        if main:
            if saved is None:  # everything fits: from here on the folder holds this run
                write_yaml(out / setup.CONFIG_NAME, config)
            setup.announce(config, architecture, student, pool, engine, start, init, facts)

        schedules = config.schedules()
        batches = loader.batches(start * config.accumulate, config.steps * config.accumulate)
        log = held.enter_context(closing(_Log(out, start, config))) if main else None
        clock = _Clock(start, config, architecture, engine)
        writer = held.enter_context(checkpoint.CheckpointWriter())
        bar = held.enter_context(_bar(config.steps - start, main))
        watch = Watch(out, engine, stop)
        if probe and start == 0:
            measured = _probe(probe, teacher, engine, 0)
            clock.leave_out()
            if log:
                log.write(0, **measured)
        for step in range(start, config.steps):
            values = schedules.at(step)
            set_values(optimizer, values)
            parts, images, content = [], [], []
            for micro in range(step * config.accumulate, (step + 1) * config.accumulate):
                loaded = next(batches)
                batch = _to_device(loaded, engine.device, recipe)
                drop_path_stream = torch_stream(config.seed, "drop path", micro, engine.rank)
                last_part = micro + 1 == (step + 1) * config.accumulate
                with engine.accumulating(model, not last_part):
                    with engine.autocast():
                        taught = dinov2.teacher_forward(teacher, batch)
                        targets = dinov2.teacher_targets(
                            taught, state.centres, values.teacher_temperature, config.losses
                        )
                        said = model(batch, config.drop_path, drop_path_stream)
                        losses = dinov2.compute_losses(said, targets, batch, config.losses)
                    engine.backward(losses.total / config.accumulate)
                if config.losses.centering == "centre":
                    state.centres = dinov2.update_centres(state.centres, taught, config.losses.centre_momentum)
                parts.append(torch.stack(list(losses)).detach())
                images += loaded.indices.tolist()
                content.append(loaded)
            found = torch.stack(parts).mean(dim=0)
            norms = dinov2.clip_gradients(student, config.clip)
            numbers = dict(zip(dinov2.Losses._fields, found, strict=True)) | norms
            broken = watch.ask(step, numbers, store.uids[images].tolist())

            optimizer.found_inf = broken  # type: ignore[attr-defined]  # the fused step obeys it without a wait
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            dinov2.update_teacher(teacher, student, values.momentum, broken)
            state.seen[images] = True

            done, last = step + 1, step + 1 == config.steps
            stopping = watch.stopping
            if engine.world_size == 1:  # several processes agree once a step, before it; one may look again
                stopping = stop.requested
            saving = done % config.checkpoint_every == 0 or last or stopping
            probing = probe is not None and probe.is_due(done, config.steps)
            if done % config.log_every == 0 or done == start + 1 or last or stopping or probing:
                watch.settle()  # before measuring: what is not finite has no singular values
                line = _measure(found, norms, values, taught, targets, content)
                line |= clock.speed(done)
                made = (done - start) * config.batch_size // engine.world_size
                line["damaged_share"] = round(sum(loader.replaced.values()) / made, 6)
                bar.note(f"loss {line['loss']:.3f}, {line['images_per_second']:.0f} images/s")
                if probe and probing:
                    line |= _probe(probe, teacher, engine, done)
                    clock.leave_out()
                if log:
                    log.write(done, **line)
            bar.advance()
            writer.check()
            if done == start + 1:
                first_done = clock.seconds()
            if main and done == start + _STEPS_BEFORE_ESTIMATE and not last:
                each = (clock.seconds() - first_done) / (_STEPS_BEFORE_ESTIMATE - 1)
                say(f"About {duration((config.steps - done) * each)} to go.")
            if saving:
                watch.settle()
                seen_by_all = max_over_ranks(state.seen.to(engine.device, torch.int32))
                state.seen = seen_by_all.to("cpu", torch.bool)
                tensors = whole_tensors(state.tensors())
                if main:
                    output.save(writer, done, tensors)
            if stopping and not last:
                writer.wait()
                if main:
                    say(f"Stopped after step {done} of {config.steps}; saved. The same command goes on from there.")
                raise SystemExit(STOPPED_STATUS)

        writer.wait()
        if main:
            say(f"{config.steps} steps done in {duration(clock.seconds())}; backbone: {out / WEIGHTS_NAME}")
            if loader.replaced:
                say(f"{len(loader.replaced)} damaged image(s) were replaced; `hilum verify {data}` lists them.")
            try:
                say(f"Report: {write_report(out, store, engine.device.type)}")
            except (HilumError, OSError) as error:  # the run itself is whole
                warn(f"no report: {error} `hilum inspect {out} --data {data}` writes it again.")
            next_step(f"hilum fit RECIPE --data {data} --backbone {out} --out MODEL")
    return out


def _to_device(batch: PretrainBatch, device: torch.device, recipe: Preprocessing) -> dinov2.Batch:
    masked = batch.masks.flatten().nonzero().flatten()  # on the CPU: on a GPU it would wait for all work queued
    moved = batch.to(device)
    return dinov2.Batch(
        normalise(moved.global_crops, recipe),
        normalise(moved.local_crops, recipe),
        moved.masks,
        send(masked, device),
        moved.mask_weights,
    )


def _measure(
    losses: Tensor, norms: dict[str, Tensor], values: Values, taught: dinov2.TeacherOutput, targets: dinov2.Targets,
    content: list[PretrainBatch],
) -> dict[str, Any]:  # fmt: skip
    """One line of `metrics.jsonl`; losses are means over processes and micro-batches. All processes call it."""
    mean = mean_over_ranks(losses.clone()).tolist()
    named = dict(zip(("loss", *dinov2.Losses._fields[1:]), mean, strict=True))
    named |= {f"gradient_norm_{part}": norm.item() for part, norm in norms.items()}
    named |= {name: value.item() for name, value in dinov2.health(taught, targets).items()}
    return named | values._asdict() | {"batch": "-".join(batch.digest() for batch in content)}


def _probe(probe: Probe, teacher: dinov2.Network, engine: Engine, step: int) -> dict[str, float]:
    """What the teacher's features are worth; not compiled, since images and their sizes are not a step's."""
    with torch.compiler.set_stance("force_eager"):
        return probe.measure(teacher.backbone, engine, step)


class _Output:
    """What a run leaves beside its log."""

    def __init__(
        self, out: Path, store: Store, architecture: ViTConfig, config: PretrainConfig, facts: dict[str, Any]
    ) -> None:
        self.out, self.store, self.architecture, self.config, self.facts = out, store, architecture, config, facts

    def save(self, writer: checkpoint.CheckpointWriter, done: int, tensors: Mapping[str, Tensor]) -> None:
        """The record of images seen, a checkpoint, and the backbone; written while training goes on.

        The record comes first: whatever is killed when, a stage that starts from the newest checkpoint finds every
        image that this has seen.
        """
        writer.save(
            self.out / CHECKPOINTS, done, tensors, self.facts, self.config.keep,
            then=lambda copies: self.export(done, copies), first=self.record,
        )  # fmt: skip

    def record(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write the record of images seen; what `config.json` says of it."""
        numbers = exposure.Seen(exposure.uid_numbers(self.store.uids), exposure.uid_numbers(self.store.pictures))
        seen = all_seen(tensors, numbers)
        return {"images": len(seen.uids), "sha256": exposure.write_seen(self.out, seen)}

    def export(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """The record of images seen, and the teacher's backbone."""
        extra = {
            "step": done,
            "steps": self.config.steps,
            "seed": self.config.seed,
            "init": self.facts["init"],
            "seen": self.record(tensors),
            "accepted_leak": self.facts["accepted_leak"],
            "hardware": self.facts["hardware"],
        }
        if self.facts["not_recorded"]:
            extra["not_recorded"] = self.facts["not_recorded"]
        save_backbone(teacher_backbone(tensors, self.architecture), self.out, self.store.preprocess_id, extra)


class _Log:
    """`metrics.jsonl`, and the alarms that its lines raise: each said once, until it is over."""

    def __init__(self, out: Path, start: int, config: PretrainConfig) -> None:
        self.config, self.log = config, MetricsLog(out / METRICS_NAME, start, config.tensorboard)
        self.history = self.log.history()
        self.raised = set(self.history[-1].get("alarms", ())) if self.history else set()

    def write(self, step: int, **line: Any) -> None:
        self.history.append({"step": step, **line})
        found = alarms(self.history, self.config)
        for alarm in found:
            if alarm.name not in self.raised:
                warn(f"step {step}: {alarm}")
        self.raised = {alarm.name for alarm in found}
        self.log.write(step, **line, **({"alarms": sorted(self.raised)} if self.raised else {}))
        recent = LOOK_BACK + RECENT
        probed = [line for line in self.history[:-recent] if "knn_mAP" in line][-1:]  # what an alarm compares with
        self.history = probed + self.history[-recent:]

    def close(self) -> None:
        self.log.close()


class _Clock:
    """Seconds since the loop began, and how fast it has been since the last question."""

    def __init__(self, step: int, config: PretrainConfig, architecture: ViTConfig, engine: Engine) -> None:
        self.began = self.last = time.monotonic()
        self.step, self.images, self.processes = step, config.batch_size, engine.world_size
        crops, share = config.crops, max(config.batch_size // (engine.world_size * config.accumulate), 1)
        sizes = crops.global_size, crops.local_size
        operations = step_flops(architecture, config.heads, share, sizes, crops.local_crops, config.drop_path)
        self.flops_per_image = operations.total / share
        self.peak = device_peak(torch.cuda.get_device_name(engine.device)) if engine.device.type == "cuda" else None

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def speed(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        rate = (step - self.step) * self.images / max(now - self.last, 1e-9)
        self.last, self.step = now, step
        found = {"images_per_second": round(rate, 2)}
        if self.peak:
            found["mfu"] = round(utilisation(rate / self.processes, self.flops_per_image, self.peak), 4)
        return found

    def leave_out(self) -> None:
        """What has passed since the last question is not training."""
        self.last = time.monotonic()


class _NoBar:
    """Progress of the processes that show none."""

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _bar(steps: int, shown: bool) -> AbstractContextManager[Bar]:
    return progress("pretraining", steps, "steps") if shown else nullcontext(_NoBar())
