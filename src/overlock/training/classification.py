"""What the training of a classifier is made of: data, network, the loss on mixed images, and the measures of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.fabric import Fabric
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.ablation.models import TRAINED_WITH_AUX_HEAD
from overlock.checkpoints import (
    CONFIG_FILE,
    Record,
    build,
    default_preprocessing,
    find_ends,
    find_weights,
    start_from,
    to_timm_config,
)
from overlock.data import ImageData, load_data, make_eval_transform, make_train_transform
from overlock.data.images import save_examples
from overlock.data.loaders import Batch, OnImage
from overlock.files import write_atomically
from overlock.network import VARIANTS
from overlock.training.config import LossConfig, TrainConfig
from overlock.training.job import Job
from overlock.weights import read_checkpoint, unwrap
from overlock.weights.head_names import find_head

EXAMPLES = "examples"


class Classification:
    """Loss and measures of a classifier.

    Args:
        config: of the loss.
        num_classes: of the logits.
    """

    main_metric = "top1"
    shares: ClassVar[dict[str, str]] = dict(top1="accuracy", top5="among the best five")

    def __init__(self, config: LossConfig, num_classes: int):
        self.config = config
        self.num_classes = num_classes
        self.mix = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                switch_prob=config.switch_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
            if config.mixes
            else None
        )

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the main head and, weighted, of the auxiliary one: a scalar with a gradient.

        Where mixing is on, images and labels are mixed first, by numpy's global generator, and the labels are shares
        of the classes; smoothing is part of those.
        """
        images, labels = batch.images, batch.labels
        smoothing = self.config.label_smoothing
        if self.mix is not None:
            images, labels = self.mix(images, labels)
            smoothing = 0.0
        outputs = network(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        for other in auxiliary:
            loss = loss + self.config.aux_weight * F.cross_entropy(other.float(), labels, label_smoothing=smoothing)
        return loss

    def make_metrics(self) -> ClassifierMetrics:
        """Those of a test that begins."""
        return ClassifierMetrics(self.num_classes)


class ClassifierMetrics:
    """Shares of the images that are named rightly, at first and within the best five, and the mean loss.

    Args:
        num_classes: of the logits.
    """

    def __init__(self, num_classes: int):
        self.best = min(5, num_classes)
        self.sums: Tensor | None = None

    def update(self, network: nn.Module, batch: Batch) -> None:
        """Count the images of a batch."""
        logits = network(batch.images).float()
        right = logits.topk(self.best, dim=1).indices == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        sums = torch.stack([loss.new_tensor(len(right)), right[:, 0].sum(), right.sum(), loss])
        self.sums = sums if self.sums is None else self.sums + sums

    def measures(self, fabric: Fabric) -> dict[str, float]:
        """top1, top5 and test_loss, over all processes."""
        sums = torch.zeros(4, device=fabric.device) if self.sums is None else self.sums
        count, top1, top5, loss = fabric.all_reduce(sums, reduce_op="sum").tolist()
        if count == 0:
            raise ValueError("none of the images to test on could be read")
        return dict(top1=top1 / count, top5=top5 / count, test_loss=loss / count)


def make_job(config: TrainConfig) -> Job:
    """Data, network and task of a classifier's run.

    Raises:
        ValueError: for data, weights or a model that will not do.
    """
    data = load_data(
        config.data,
        seed=config.seed,
        train_split=config.train_split,
        val_split=config.val_split,
        classes=config.classes,
    )
    torch.manual_seed(config.seed)  # the initial weights, the same on all processes
    network, record = make_network(config, data)

    def finish(folder: Path, _: nn.Module) -> None:
        write_atomically(folder / CONFIG_FILE, to_timm_config(record))
        save_examples(data, folder / EXAMPLES)

    return Job(
        task=Classification(config.loss, len(data.classes)),
        data=data,
        network=network,
        record=record,
        prepare_train=OnImage(make_train_transform(record.preprocessing, config.augment, hflip=data.hflip)),
        prepare_test=OnImage(make_eval_transform(record.preprocessing)),
        repeats=config.augment.repeats,
        only_training=("aux_head.",),
        finish=finish,
    )


def make_network(config: TrainConfig, data: ImageData) -> tuple[nn.Module, Record]:
    """The network to train, and the record of what prediction will need."""
    name = config.model.partition(".")[0]  # without the tag of its weights
    ours = name in VARIANTS
    arguments: dict[str, Any] = {**config.model_args, "in_chans": config.in_chans, "num_classes": len(data.classes)}
    if config.stem_stride is not None:
        arguments["stem_stride"] = config.stem_stride
    rate = VARIANTS[name].drop_path if ours and config.drop_path is None else config.drop_path
    only_training: dict[str, Any] = dict(drop_path_rate=rate) if rate else {}
    if (ours or name in TRAINED_WITH_AUX_HEAD) and config.loss.aux_weight:
        only_training["aux_head"] = True
    source = None if config.weights is None else find_weights(config.weights)
    given: dict[str, Any] = dict(pretrained=config.pretrained)
    state = {} if source is None or ours else unwrap(read_checkpoint(source))
    by_timm = bool(state) and find_head(state) is None
    if by_timm:  # which fits them to another number of classes or channels
        count, _ = find_ends(state, config.model)
        its_classes = {} if count is None else dict(num_classes=count)
        given = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, **its_classes))
    try:
        network = build(config.model, **given, **arguments, **only_training)
    except OSError as error:
        raise ValueError(f"the weights of {config.model} could not be fetched ({error}); try --weights FILE") from None
    if source is not None and not by_timm:
        start_from(network, source)
    cast(Any, network).pretrained_cfg.pop("state_dict", None)  # or every copy of the network would copy it too
    smallest = getattr(network, "smallest_image", 1)
    if config.image_size < smallest:
        raise ValueError(f"image_size must be at least {smallest} with this stem, got {config.image_size}")
    preprocessing = default_preprocessing(
        network, in_chans=config.in_chans, image_size=config.image_size, crop_pct=data.crop_pct
    )
    return network, Record(model=config.model, model_args=arguments, classes=data.classes, preprocessing=preprocessing)
