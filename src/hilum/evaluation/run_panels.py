"""Which columns of a run's `metrics.jsonl` are drawn together, and what is said of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A chart: columns of `metrics.jsonl` with their names in the legend."""

    title: str
    caption: str
    columns: tuple[tuple[str, str], ...]
    unit: str
    logarithmic: bool = False
    reference: str = ""
    """Name of a dotted level: "initial", "start" (the value at the first probe) or "clip"."""


PANELS: tuple[Panel, ...] = (
    Panel(
        "Losses", "Dotted: the value while predictions are uniform. A run that stays there has not begun to learn.",
        (("dino_local", "[CLS], local crops"), ("ibot", "masked patches"), ("dino_global", "[CLS], global crops")),
        "nats", reference="initial",
    ),
    Panel(
        "Total and spread", "The weighted sum, and KoLeo, which is low where [CLS] are spread out.",
        (("loss", "total"), ("koleo", "KoLeo")), "nats",
    ),
    Panel(
        "Findings by neighbours and a linear map",
        "Mean average precision on labelled images of other patients. Dotted: at the first probe.",
        (("knn_mAP", "nearest neighbours"), ("linear_mAP", "linear map")), "mAP", reference="start",
    ),
    Panel(
        "The same, area under the ROC curve", "0.5 is guessing. Dotted: at the first probe.",
        (("knn_mAUC", "nearest neighbours"), ("linear_mAUC", "linear map")), "mAUC", reference="start",
    ),
    Panel(
        "Entropy of the targets", "Share of its maximum. 1: targets say nothing; near 0: hard labels.",
        (("cls_target_entropy", "[CLS]"), ("patch_target_entropy", "masked patches")), "share of ln K",
    ),
    Panel(
        "Prototypes in use", "Entropy of the mean target. Near 1: all alike; falling: few take everything.",
        (("cls_prototype_usage", "[CLS]"), ("patch_prototype_usage", "masked patches")), "share of ln K",
    ),
    Panel(
        "Effective rank of [CLS]", "Directions that a batch of the teacher's features uses. 1 is collapse.",
        (("teacher_effective_rank", "teacher"),), "dimensions",
    ),
    Panel(
        "Spread of [CLS]", "Distance to the nearest neighbour, and deviation over a batch. 0 is collapse.",
        (("nearest_distance", "nearest neighbour"), ("teacher_feature_deviation", "deviation")), "of unit vectors",
    ),
    Panel(
        "Gradient norms", "Before clipping, each part by itself. Growth by orders of magnitude comes before a break.",
        (("gradient_norm_backbone", "backbone"), ("gradient_norm_dino_head", "DINO head"),
         ("gradient_norm_ibot_head", "iBOT head")), "norm", logarithmic=True, reference="clip",
    ),
    Panel("Learning rate", "As scheduled; prototypes rest at first.",
           (("learning_rate", "heads"), ("backbone_learning_rate", "backbone"),
            ("last_layer_learning_rate", "prototypes")), "rate"),
    Panel("Momentum of the teacher", "1: it no longer follows.", (("momentum", "momentum"),), "share that stays"),
    Panel("Teacher temperature", "Lower is sharper.", (("teacher_temperature", "temperature"),), "divisor"),
    Panel("Weight decay", "As scheduled; none on biases, norms and LayerScale.", (("weight_decay", "weight decay"),),
           "factor"),
    Panel("Speed", "Over all processes; dips are probes, checkpoints, or a slow disk.",
           (("images_per_second", "speed"),), "images / s"),
    Panel("Use of the GPU", "Operations that a step needs, over what the device could do at its peak.",
           (("mfu", "MFU"),), "share of the peak"),
)  # fmt: skip
