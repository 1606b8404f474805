"""The settings of a training run: the one source of the command's options, of their help, and of the saved file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from overlock.data.augmentation import Augmentation
from overlock.settings import check_number, check_types, renew

if TYPE_CHECKING:
    from typing_extensions import Self

SUB_NETWORKS = ("base_net", "overview_net", "focus_net", "head")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, timm's, and its schedule: linear warm-up, then a fall."""

    name: str = "adamw"
    """Any optimiser of timm's."""
    lr: float = 1e-3
    """Peak learning rate for a batch of base_batch_size images; it grows in proportion to batch_size."""
    base_batch_size: int = 1024
    """The batch that lr is stated for."""
    weight_decay: float = 0.05
    """Weight decay, none on biases, norms and other 1-D parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments, for Adam, LAMB and their kin."""
    eps: float = 1e-8
    """Added to the root of the second moment, likewise."""
    clip_norm: float = 5.0
    """Largest norm of the gradient; 0 for no limit."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one before it, for fine-tuning; none unless given."""
    schedule: Literal["cosine", "linear", "multistep"] = "cosine"
    """How the rate falls after the warm-up: along a cosine, linearly, or to a tenth at each of the milestones."""
    milestones: tuple[float, ...] = ()
    """Epochs after which it falls to a tenth, for the schedule multistep."""
    warmup_epochs: float = 5.0
    """Length of the warm-up, at most half of the run."""
    warmup_steps: int | None = None
    """The same in steps; counts instead of warmup_epochs where it is given."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Learning rate of the last step; the schedule multistep has none."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        for name in ("weight_decay", "clip_norm", "warmup_epochs", "warmup_lr", "min_lr", "eps"):
            check_number(f"optim.{name}", getattr(self, name), 0)
        check_number("optim.lr", self.lr, 1e-12)
        check_number("optim.base_batch_size", self.base_batch_size, 1)
        check_number("optim.layer_decay", self.layer_decay, 1e-6, 1)
        check_number("optim.warmup_steps", self.warmup_steps, 0)
        for epoch in self.milestones:
            check_number("optim.milestones", epoch, 0)
        if bool(self.milestones) != (self.schedule == "multistep"):
            raise ValueError("optim.milestones is what optim.schedule 'multistep' needs, and no other one takes")
        if sorted(set(self.milestones)) != list(self.milestones):
            raise ValueError(f"optim.milestones must rise, got {', '.join(map(str, self.milestones))}")
        for beta in self.betas:
            check_number("optim.betas", beta, 0, 1)

    @property
    def takes_betas(self) -> bool:
        """Whether the optimiser is given betas and eps."""
        return "adam" in self.name or "lamb" in self.name

    def peak(self, batch_size: int) -> float:
        """The learning rate after the warm-up."""
        return self.lr * batch_size / self.base_batch_size


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised: cross entropy on the mixed and smoothed labels, of both heads."""

    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    aux_weight: float = 0.4
    """Weight of the same loss on OverLoCK's auxiliary head; 0 trains without that head."""
    mixup: float = 0.0
    """Mixup's alpha; 0 for none."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 for none."""
    mix_prob: float = 1.0
    """Share of the batches that are mixed."""
    switch_prob: float = 0.5
    """Share of the mixed batches that CutMix takes where both are on."""

    def __post_init__(self) -> None:
        check_types(self, "loss.")
        check_number("loss.label_smoothing", self.label_smoothing, 0, 0.999)
        for name in ("aux_weight", "mixup", "cutmix"):
            check_number(f"loss.{name}", getattr(self, name), 0)
        for name in ("mix_prob", "switch_prob"):
            check_number(f"loss.{name}", getattr(self, name), 0, 1)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The moving average of the weights, which is what is evaluated and saved."""

    decay: float = 0.0
    """Decay a step; 0 for no average."""
    warmup: bool = False
    """Average over fewer steps at first, for runs too short for the decay."""

    def __post_init__(self) -> None:
        check_types(self, "ema.")
        check_number("ema.decay", self.decay, 0, 0.9999999)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how the same computation runs; of no effect on the result but for rounding."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device: the GPU where there is one."""
    devices: int | None = None
    """Devices a node: one unless given, or as torchrun and SLURM say."""
    nodes: int | None = None
    """Machines: one unless given, or as torchrun and SLURM say."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: each the whole network (ddp) or a part of it (fsdp)."""
    micro_batch: int | None = None
    """Most images of one forward pass on one device; a larger share of the batch is accumulated."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; the weights are always float32."""
    workers: int = 2
    """Processes that load images, for each device; 0 loads them in the training process."""
    sync_bn: bool = True
    """Batch norm over the images of all devices."""
    channels_last: bool = False
    """Keep images and weights in channels-last order."""
    compile: bool = False
    """Compile the network with torch.compile."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory (gradient checkpointing)."""

    def __post_init__(self) -> None:
        check_types(self, "runtime.")
        check_number("runtime.workers", self.workers, 0)
        for name in ("devices", "nodes", "micro_batch"):
            check_number(f"runtime.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """When to save, and how much may go wrong."""

    minutes: float = 10.0
    """Time between checkpoints; there is one after each epoch in any case."""
    steps: int | None = None
    """Steps between checkpoints, beside the time."""
    bad_steps: int = 10
    """After so many steps in a row without a finite loss and gradient, go back to the last good checkpoint."""
    rollbacks: int = 3
    """Stop when that has happened more often than this."""
    unreadable: int = 100
    """Images that may be unreadable; they are skipped and listed in the run's unreadable.txt."""

    def __post_init__(self) -> None:
        check_types(self, "safety.")
        for name in ("minutes", "rollbacks", "unreadable"):
            check_number(f"safety.{name}", getattr(self, name), 0)
        for name in ("steps", "bad_steps"):
            check_number(f"safety.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all runs have in common. Raises ValueError for values that cannot be."""

    task: str
    """What is learnt."""
    data: str
    """What to learn from."""
    train_split: str | None = None
    """Name of the training part; 'train', or what is usual, unless given."""
    val_split: str | None = None
    """Name of the part to test on; 'validation', or 'val' or 'test' where there is none of that name."""
    classes: str | None = None
    """File with the names of the classes, one a line, for data that has none with them."""
    output: str = "runs/train"
    """Folder for the results; must be new or empty, but for --resume and --overwrite."""
    model: str = "overlock_xt"
    """Any model of timm's, ours among them: overlock_atto, _nano, _xt, _t, _s, _b."""
    pretrained: bool = False
    """Start from published weights, downloaded by timm."""
    weights: str | None = None
    """Start from weights: a file, the authors' or ours, or of a classifier of timm's its own; a run's folder; or
    'hf-hub:USER/NAME'."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: base_net, overview_net, focus_net, head, or any prefix of parameter names."""
    drop_path: float | None = None
    """Stochastic depth of the last block, rising linearly over the three sub-networks; the size's own unless given."""
    epochs: int = 300
    """Passes over the training images."""
    epoch_steps: int | None = None
    """Steps that are counted as an epoch, where tests are to come more or less often than once a pass."""
    batch_size: int = 64
    """Images a step, over all devices; it sets the learning rate."""
    seed: int = 0
    """Of the split, the initial weights, the order and the augmentation."""
    validate_every: int = 1
    """Epochs from one test to the next; the last one is always tested."""
    logger: Literal["mlflow", "trackio", "wandb"] | None = None
    """Experiment tracker that gets settings and log too, beside TensorBoard: mlflow, trackio or wandb, if installed."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser and the learning rate."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """The moving average of the weights."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices and speed."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    """Checkpoints and faults."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "epoch_steps", "batch_size", "validate_every"):
            check_number(name, getattr(self, name), 1)
        check_number("seed", self.seed, 0)
        check_number("drop_path", self.drop_path, 0, 0.99)
        if not self.data:
            raise ValueError("data must name the images to train on")
        if self.pretrained and self.weights:
            raise ValueError("give either pretrained or weights, not both")
        peak = self.optim.peak(self.batch_size)
        if self.optim.min_lr > peak and self.optim.schedule != "multistep":
            raise ValueError(
                f"optim.min_lr {self.optim.min_lr:g} is above the peak learning rate {peak:g} (optim.lr x batch_size / "
                f"optim.base_batch_size); raise optim.lr or lower optim.min_lr"
            )
        if self.runtime.strategy == "fsdp" and self.ema.decay:
            raise ValueError("the average of the weights is not available with fsdp; set ema.decay to 0 or use ddp")
        if self.runtime.strategy == "fsdp" and self.runtime.precision == "fp16":
            raise ValueError("fp16 is not available with fsdp; set runtime.precision to bf16 or fp32, or use ddp")

    @property
    def joins_pairs(self) -> bool:
        """Whether images of a batch are mixed by twos."""
        return False

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration of nested settings, as :meth:`to_dict` gives them and YAML files hold them.

        Settings may have their names of earlier versions: :data:`overlock.settings.RENAMED`.

        Raises:
            ValueError: for a name that is no setting, and for values that cannot be.
        """
        return _build(cls, renew(settings), "")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain numbers, strings, lists and dicts, as a run's folder keeps them."""
        return _plain(asdict(self))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """How a classifier is trained. Raises ValueError for values that cannot be."""

    task: Literal["classify"] = "classify"
    """What is learnt: the class of an image."""
    data: str
    """Images: a folder by class (with train and val below it, or split here), a folder or file of tars, 'wds:FOLDER'
    of WebDataset shards, 'hfds:NAME' or, streaming, 'hfids:NAME' of Hugging Face, or 'digits' for scikit-learn's."""
    image_size: int = 224
    """Side of the images in pixels."""
    in_chans: Literal[1, 3] = 3
    """Channels of the images: 3, or 1 for grey."""
    stem_stride: Literal[1, 2, 4] | None = None
    """Stride of OverLoCK's stem: 4 unless given; 2 or 1 for images of few pixels."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's model: --model_args '{"patch_size": 1}' is convnext's word for such a stem."""
    augment: Augmentation = field(default_factory=Augmentation)
    """Random changes to training images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss and the mixing of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("image_size", self.image_size, 8)
        if self.stem_stride is not None and not self.model.startswith("overlock_"):
            raise ValueError(f"stem_stride is an option of OverLoCK; leave it out for {self.model}")

    @property
    def joins_pairs(self) -> bool:
        return self.loss.mixes


_GROUPS: dict[str, Any] = dict(
    augment=Augmentation,
    loss=LossConfig,
    optim=OptimConfig,
    ema=EmaConfig,
    runtime=RuntimeConfig,
    safety=SafetyConfig,
)


def _build(kind: Any, settings: Mapping[str, Any], prefix: str) -> Any:
    known = {part.name for part in fields(kind)}
    values = {}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"unknown setting {prefix}{name}; {mend}")
        if not prefix and name in _GROUPS:
            if not isinstance(value, (Mapping, _GROUPS[name])):
                raise ValueError(f"{name} must be a table of settings, got {value!r}")
            values[name] = value if isinstance(value, _GROUPS[name]) else _build(_GROUPS[name], value, f"{name}.")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{error} of the settings") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value
