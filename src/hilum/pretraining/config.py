"""Settings of one stage of pretraining; `commands/pretrain.py` runs them, `recipes.py` names them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hilum.backbones.layers import FeedForward
from hilum.backbones.vit import SIZES, ViTConfig
from hilum.core.distributed import Accelerator, Gradients, Precision, Strategy
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.samplers import Window, parse_shares
from hilum.pretraining import dinov2
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.probing import ProbeConfig
from hilum.pretraining.schedules import Schedules, scaled_learning_rate

FROM_INIT = "init"
"""The architecture's name that stands for that of the weights a run starts from."""


@dataclass(frozen=True)
class SamplingConfig:
    """Which images an epoch draws, and in which order; see `hilum.data.samplers`."""

    order: Literal["random", "window"] = "random"
    """random: anywhere in the store. window: blocks of neighbours, for a store on a disk that is slow to seek."""
    block: int = 64
    """Window: images that are read together."""
    blocks: int = 64
    """Window: blocks that are open at a time; batches are mixed from these."""
    datasets: str = "natural"
    """Share of the draws of each dataset: natural (its size), sqrt (the root of its size), uniform, or
    "NAME=SHARE,NAME=SHARE" with every dataset of the pool."""

    def __post_init__(self) -> None:
        self.window()
        parse_shares(self.datasets)

    def window(self) -> Window | None:
        """The shuffle; None: over the whole epoch."""
        window = Window(self.block, self.blocks)
        return window if self.order == "window" else None


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one stage of self-supervised pretraining. Defaults: CheXFound's ViT-L stage at 224 pixels."""

    architecture: str = "vitl16"
    """Named size, see `hilum.backbones.vit.SIZES`, or init: that of the weights it starts from. The fields below
    change it; with init only `patch_size` may, which resamples the patch kernel."""
    embed_dim: int | None = None
    """Channels of a token; None: of the named size. So for the next six."""
    depth: int | None = None
    """Transformer blocks."""
    num_heads: int | None = None
    """Attention heads."""
    patch_size: int | None = None
    """Side of a patch, pixels."""
    registers: int | None = None
    """Register tokens."""
    feed_forward: FeedForward | None = None
    """Feed-forward of the blocks."""
    layer_scale: float | None = None
    """Initial LayerScale factor."""
    crops: CropConfig = field(default_factory=CropConfig)
    """Views; `crops.global_size` is the resolution of the stage."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of masked patches of a masked crop."""
    mask_probability: float = 0.5
    """Share of global crops that are masked."""
    heads: dinov2.HeadConfig = field(default_factory=dinov2.HeadConfig)
    """Projection heads and prototypes."""
    losses: dinov2.LossConfig = field(default_factory=dinov2.LossConfig)
    """Weights and temperatures of the losses."""
    train_on: tuple[str, ...] = ("train", "")
    """Splits whose images may be seen ("" belongs to none); images not `ssl_ok` never are, nor any image of a patient
    with images in another split."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Draws and order; by default every image once an epoch, in random order."""
    batch_size: int = 304
    """Images a step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step. Sinkhorn and KoLeo see one micro-batch of all processes at a time, so more than one is
    not the same run."""
    steps: int = 250_000
    """Length of the stage; all schedules are fractions of it. CheXFound: 100 epochs of 2,500."""
    learning_rate: float = 2e-4
    """Peak for a batch of 1024; multiplied by sqrt(batch_size / 1024)."""
    final_learning_rate: float = 1e-6
    """End of the cosine; not scaled."""
    warmup: float = 0.1
    """Fraction of the run in which the rate grows from 0."""
    weight_decay: tuple[float, float] = (0.04, 0.2)
    """First and last value, half a cosine between."""
    momentum: tuple[float, float] = (0.994, 1.0)
    """EMA of the teacher: first and last value, half a cosine between."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """First and constant value, linear between."""
    teacher_temperature_warmup: float = 0.3
    """Fraction of the run until the constant value."""
    freeze_last_layer: float = 0.01
    """Fraction of the run in which the prototypes do not move."""
    head_warmup: float = 0.0
    """Fraction of the run in which the backbone does not move: for new heads on weights that are good already."""
    layer_decay: float = 1.0
    """Learning-rate factor per block below the top; DINOv2 0.9, CheXFound 1."""
    patch_embed_factor: float = 0.2
    """Learning-rate factor of the patch embedding."""
    drop_path: float = 0.4
    """Stochastic depth of the student."""
    clip: float = 3.0
    """Largest gradient norm of backbone, DINO head and iBOT head, each by itself; 0: no limit."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Looks at labelled images now and then, to see what the features are worth; changes nothing."""
    precision: Precision = "bf16"
    """Of matrix products; weights and losses are float32. auto: bf16 where the hardware has it."""
    accelerator: Accelerator = "auto"
    """auto takes a GPU where there is one."""
    strategy: Strategy = "ddp"
    """Several processes: ddp keeps a whole copy of the networks in each, fsdp2 a part."""
    gradients: Gradients = "auto"
    """Precision in which processes exchange gradients; auto: bf16 between GPUs, fp32 between CPU processes."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the transformer blocks; auto: on a GPU."""
    crops_on: Literal["cpu", "device"] = "cpu"
    """Where views are cut: by the loading processes, or by the GPU from whole images (within one grey level)."""
    seed: int = 0
    """Root of every random stream."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice. Another number changes results in the last bits."""
    workers: int = 0
    """Processes that make batches; 0 makes them in the training process."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept, at least 2."""
    log_every: int = 10
    """Steps between lines of `metrics.jsonl`."""
    tensorboard: bool = False
    """Also write the lines for TensorBoard (extra `tensorboard`)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "checkpoint_every", "log_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}.")
        for name in ("warmup", "teacher_temperature_warmup", "freeze_last_layer", "head_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a fraction of the run, 0 to 1, found {getattr(self, name)}.")
        for name in ("learning_rate", "final_learning_rate", "layer_decay", "patch_embed_factor", "clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}.")
        if not all(0 <= value < math.inf for value in self.weight_decay):
            raise ConfigError(f"weight_decay: expected 0 or more, found {self.weight_decay}.")
        if not all(0 < value < math.inf for value in self.teacher_temperature):
            raise ConfigError(f"teacher_temperature: expected more than 0, found {self.teacher_temperature}.")
        if not all(0 <= value <= 1 for value in self.momentum):
            raise ConfigError(f"momentum: expected shares in [0, 1], found {self.momentum}.")
        if self.keep < 2:
            raise ConfigError(f"keep: expected at least 2, found {self.keep}; the newest may turn out damaged.")
        if self.crops.global_crops != 2:
            raise ConfigError(f"crops.global_crops: the objective takes 2, found {self.crops.global_crops}.")
        if self.workers < 0:
            raise ConfigError(f"workers: expected 0 or more, found {self.workers}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, found {self.threads}.")
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] <= 1 or not 0 <= self.mask_probability <= 1:
            raise ConfigError(
                f"mask_ratio {self.mask_ratio} and mask_probability {self.mask_probability}: expected shares in [0, 1]."
            )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path: expected a rate in [0, 1), found {self.drop_path}.")

    def vit(self, init: ViTConfig | None = None) -> ViTConfig:
        """The architecture, its position table laid out for this stage's resolution.

        Args:
            init: architecture of the weights that the run starts from, for architecture=init.

        Raises:
            UnknownNameError: no such named size.
            ConfigError: numbers that do not fit together, or architecture=init and nothing to start from.
        """
        names = ("embed_dim", "depth", "num_heads", "patch_size", "registers", "feed_forward", "layer_scale")
        changes: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.architecture == FROM_INIT:
            if init is None:
                raise ConfigError(
                    "architecture=init takes the network of the weights given with --init; there are none."
                )
            if fixed := changes.keys() - {"patch_size"}:
                raise ConfigError(f"architecture=init: the weights decide {', '.join(sorted(fixed))}; leave it out.")
            return dataclasses.replace(init, image_size=self.crops.global_size, in_channels=1, **changes)
        if self.architecture not in SIZES:
            raise UnknownNameError("architecture", self.architecture, [*SIZES, FROM_INIT])
        return dataclasses.replace(SIZES[self.architecture], image_size=self.crops.global_size, **changes)

    def schedules(self) -> Schedules:
        """The schedules, with the learning rate scaled to the batch."""
        return Schedules(
            self.steps,
            scaled_learning_rate(self.learning_rate, self.batch_size),
            self.final_learning_rate,
            self.warmup,
            self.weight_decay,
            self.momentum,
            self.teacher_temperature,
            self.teacher_temperature_warmup,
            self.freeze_last_layer,
            self.head_warmup,
        )
