"""The sections of a recipe, one dataclass each; every field says what may be written there.

Importing this module imports neither torch nor NNI.
"""

# ruff: noqa: RUF009 (option returns a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nni_plugins.training.schema import option

MODEL_NAMES = ("mlp", "small_cnn", "resnet8", "resnet20", "resnet56", "mobilenetv2", "staged")
AUTO = "auto"
DATA_NAMES = ("digits", "cifar10", "image_folder")
LOSS_NAMES = ("cross_entropy", "mse", "l1", "bce")
METRIC_NAMES = ("accuracy", "mse", "mae", "r2")
OPTIMIZER_NAMES = ("sgd", "adam", "adamw")
SCHEDULE_NAMES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class ModelSettings:
    """What is compressed."""

    name: str = option("resnet8", "a shipped model, or the user's module:function", choices=MODEL_NAMES, reference=True)
    arguments: dict[str, Any] = option({}, "keyword arguments of the model's function")
    checkpoint: str | None = option(None, "trained dense weights (safetensors or torch state dict), used as they are")


@dataclass(frozen=True)
class DataSettings:
    """Where the three splits come from."""

    name: str = option("digits", "a known data set, or the user's module:function", choices=DATA_NAMES, reference=True)
    root: str | None = option(
        None,
        "folder (or .npz archive) of the images",
        needed_for=("name", ("cifar10", "image_folder")),
    )
    arguments: dict[str, Any] = option({}, "keyword arguments of the data's function")
    batch_size: int = option(64, "images in a training step", low=1)
    validation: float = option(0.2, "share of the training images held out for validation", above=0, below=1)
    split_seed: int = option(0, "seed of the split, apart from the seed of training", low=0)
    augment: str = option("none", "random changes to training images", choices=("none", "crop", "crop_flip"))
    limit: int | None = option(None, "use only so many training images (validation included)", low=2)


@dataclass(frozen=True)
class TrainSettings:
    """How the dense model is trained, and fine-tuning where it says nothing else."""

    epochs: int = option(30, "passes over the training split", low=0)
    optimizer: str = option("sgd", "optimizer, or module:function", choices=OPTIMIZER_NAMES, reference=True)
    optimizer_arguments: dict[str, Any] = option({}, "further keyword arguments of the optimizer")
    learning_rate: float = option(0.1, "peak learning rate", above=0)
    momentum: float = option(0.9, "momentum of sgd", low=0, below=1)
    weight_decay: float = option(5e-4, "decay of weights; norms and biases have none", low=0)
    schedule: str = option("cosine", "how the learning rate falls", choices=SCHEDULE_NAMES)
    warmup_epochs: float = option(1.0, "epochs of linear rise to the peak", low=0)
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "step schedule: shares of training where it falls", above=0, below=1
    )
    gamma: float = option(0.1, "step schedule: factor at each milestone", above=0, high=1)
    loss: str = option("cross_entropy", "loss(output, target), or module:function", choices=LOSS_NAMES, reference=True)
    label_smoothing: float = option(0.0, "of cross_entropy", low=0, below=1)
    metric: str = option("accuracy", "measure of quality, or module:function", choices=METRIC_NAMES, reference=True)
    higher_is_better: bool | None = option(None, "null: as the metric says; a user's own is taken as higher is better")
    clip_norm: float | None = option(None, "largest norm of the gradient", above=0)
    amp: bool = option(True, "mixed precision, where there is a GPU")
    channels_last: bool = option(False, "keep images channels last: faster convolutions on many CPUs")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    threads: int | None = option(None, "CPU threads of training; null: as torch decides", low=1)


@dataclass(frozen=True)
class PruneSettings:
    """What is removed."""

    pruner: str = option("magnitude", "name in nni_plugins.pruners.PRUNERS, nni:ClassName, module:Class, or none")
    sparsity: float = option(0.5, "share to remove, of what target names", low=0, below=1)
    target: str = option("macs", "what sparsity counts", choices=("channels", "macs", "params", "latency"))
    scope: str = option("global", "where units compete", choices=("local", "global", "isomorphic", "knapsack"))
    round_to: int = option(
        1, "kept units are a multiple of this; auto: of 1, 4, 8 and 16 what saves most time, as timed", low=1, word=AUTO
    )
    exact_only: bool = option(True, "leave out groups whose removal cannot equal masking")
    groups: dict[str, float] = option({}, "sparsity of the groups whose name starts with the key", low=0, below=1)
    scales: dict[str, float] = option({}, "factor of the scores of the groups whose name starts with the key (LeGR)")
    shifts: dict[str, float] = option({}, "added to these scores, in means of all groups' scores (LeGR)")
    max_sparsity: float | None = option(None, "no layer loses more than this share", above=0, below=1)
    op_types: tuple[str, ...] = option((), "module classes to prune; empty: all that can be")
    op_names: tuple[str, ...] = option((), "module names to prune; empty: all that can be")
    exclude: tuple[str, ...] = option((), "module names to leave alone")
    arguments: dict[str, Any] = option({}, "further keyword arguments of the pruner")


@dataclass(frozen=True)
class RankSettings:
    """Allocations tried before fine-tuning: each is pruned, recalibrated, and ranked on validation (EagleEye)."""

    candidates: int = option(
        0, "how many to try; the best one is fine-tuned; 0: the prune section decides alone", low=0
    )
    lowest: float = option(
        0.0, "least sparsity that a group is given, before all are scaled to the budget", low=0, below=1
    )
    highest: float = option(0.8, "greatest sparsity that a group is given", above=0, below=1)
    batches: int = option(20, "training batches that refresh the statistics of each candidate", low=0)


@dataclass(frozen=True)
class SupernetSettings:
    """One network trained at all widths, of which every trial is a slice."""

    epochs: int = option(0, "passes over the training split, after the dense training; 0: no supernet", low=0)
    smallest: float = option(0.25, "least share of a group's units that is trained", above=0, below=1)
    samples: int = option(2, "random widths in each step, beside the largest and the smallest", low=0)
    distill: bool = option(True, "narrow widths learn the outputs of the largest, not the labels")
    learning_rate: float | None = option(None, "peak learning rate; null: that of train", above=0)
    pruner: str = option("magnitude", "which units stay longest: a name in nni_plugins.pruners.PRUNERS")
    batches: int = option(20, "training batches that make the statistics of a slice afresh", low=1)


@dataclass(frozen=True)
class FinetuneSettings:
    """Training after pruning; null takes the value of train."""

    epochs: int = option(10, "passes over the training split", low=0)
    learning_rate: float | None = option(0.02, "peak learning rate", above=0)
    weight_decay: float | None = option(None, "decay of weights", low=0)
    schedule: str | None = option(None, "how the learning rate falls", choices=SCHEDULE_NAMES)
    warmup_epochs: float | None = option(None, "epochs of linear rise to the peak", low=0)


@dataclass(frozen=True)
class DistillSettings:
    """A teacher for fine-tuning."""

    method: str = option(
        "none",
        "kd and dkd: the teacher's outputs; feature: what its layers return, on the channels that are kept",
        choices=("none", "kd", "dkd", "feature"),
    )
    weight: float = option(1.0, "of the teacher's part beside the task's loss", above=0)
    temperature: float = option(4.0, "of kd and dkd", above=0)
    alpha: float = option(1.0, "dkd: weight of the part on the right class", low=0)
    beta: float = option(8.0, "dkd: weight of the part on the other classes", low=0)
    warmup_epochs: float = option(1.0, "epochs in which the teacher's part rises to its weight", low=0)
    layers: tuple[str, ...] = option((), "feature: module names; empty: one for each channel group")
    teacher: str = option("dense", "the dense model, or the user's module:function", choices=("dense",), reference=True)
    teacher_arguments: dict[str, Any] = option({}, "keyword arguments of the teacher's function")
    teacher_checkpoint: str | None = option(None, "trained weights of the teacher")
    ablation: bool = option(True, "the report fine-tunes the winner without the teacher too, and says what it adds")


@dataclass(frozen=True)
class SpeedupSettings:
    """Taking the removed units out, and proving it."""

    recalibrate_batches: int = option(0, "training batches that refresh batch-norm statistics after fine-tuning", low=0)
    tolerance: float = option(1e-5, "largest error of the compact model, in shares of the output's size", above=0)
    keep_masked: bool = option(True, "write the masked model's weights beside the compact ones")


@dataclass(frozen=True)
class QuantizeSettings:
    """Whole numbers in place of floats, after everything else."""

    method: str = option(
        "none",
        "ptq looks at batches; qat and lsq train with rounding (NNI's quantisers)",
        choices=("none", "ptq", "qat", "lsq"),
    )
    epochs: int = option(3, "passes over the training split, of qat and lsq", low=1)
    learning_rate: float = option(0.002, "peak learning rate, of qat and lsq", above=0)
    calibrate_batches: int = option(20, "batches that ranges are taken from before anything is rounded", low=1)
    weight_bits: int = option(8, "bits of a weight; each output channel has its own scale", low=2, high=8)
    activation_bits: int = option(8, "bits of an activation; each tensor has one scale", low=2, high=8)
    activations: str = option(
        "auto",
        "affine: unsigned with a zero point, what CPUs are fast at; symmetric: signed around 0, what TensorRT takes; "
        "auto: affine, but for lsq",
        choices=("auto", "affine", "symmetric"),
    )
    exclude: tuple[str, ...] = option((), "modules that stay in float, with all below them")


@dataclass(frozen=True)
class ExportSettings:
    """Files for other runtimes."""

    formats: tuple[str, ...] = option(
        (),
        "onnx: compact.onnx, and int8.onnx where the model is quantised; pt2: torch.export; tensorrt: onnx, checked "
        "against TensorRT's documented rules; openvino: the same models as .xml and .bin",
        choices=("onnx", "pt2", "tensorrt", "openvino"),
    )
    dynamic_batch: bool = option(True, "leave the size of the batch free, where the model allows it")
    opset: int | None = option(None, "of ONNX; null: the exporter's own", low=17)


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a search maximises: one quantity under bounds on the others."""

    metric: str = option(
        "accuracy",
        "what is made best: accuracy (train.metric on validation), or the cost that is made small",
        choices=("accuracy", "macs", "params", "bytes", "latency_ms"),
    )
    reference: float | None = option(
        None, "what a cost is a share of, where it is the metric; null: the dense model's own", above=0
    )
    macs: float | None = option(None, "bound: share of the dense model's MACs; above 1, a number of MACs", above=0)
    params: float | None = option(
        None, "bound: share of the dense model's parameters; above 1, a number of them", above=0
    )
    bytes: float | None = option(None, "bound: share of the size of the dense model's file; above 1, bytes", above=0)
    latency_ms: float | None = option(None, "bound: milliseconds of one input on one thread", above=0)
    accuracy: float | None = option(None, "bound: worst validation metric that is accepted")
    penalty: float = option(10.0, "lost per unit of relative excess over the bounds", above=0)
    skip_infeasible: bool = option(True, "no fine-tuning once the plan breaks a bound on a cost")


@dataclass(frozen=True)
class SearchSettings:
    """How much of the recipe a trial does, and what is left for the end of the search."""

    mode: str = option("full", "quick: a trial prunes and recalibrates, without fine-tuning", choices=("full", "quick"))
    finetune_best: int = option(3, "how many of the best quick trials are fine-tuned when the search is over", low=1)
