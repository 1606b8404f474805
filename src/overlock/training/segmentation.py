"""What the training of a segmenter is made of: data, network, the loss of both heads, and mean IoU (section 4.3)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from overlock.checkpoints import Record
from overlock.data.label_maps import load_label_maps
from overlock.data.loaders import Batch, as_lists
from overlock.data.segmentation_transforms import PrepareLabels, make_segmentation_transform
from overlock.drawing import draw_labels, draw_legend
from overlock.tasks.metrics import SegmentationMetrics
from overlock.tasks.segmentation import segmentation_loss
from overlock.tasks.sliding import segment
from overlock.training.job import Job
from overlock.training.networks import SAMPLES, make_network, save_samples
from overlock.training.segmentation_config import SegmentConfig


class Segmentation:
    """Loss and measures of a segmenter.

    Args:
        num_classes: of the pixels.
        aux_weight: of the auxiliary head's loss.
    """

    main_metric = "mIoU"
    shares: ClassVar[dict[str, str]] = dict(mIoU="mIoU", mAcc="mean accuracy", aAcc="accuracy of pixels")

    def __init__(self, num_classes: int, *, aux_weight: float):
        self.num_classes, self.aux_weight = num_classes, aux_weight

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the head and, weighted, of the auxiliary one."""
        return segmentation_loss(network(batch.images), batch.labels, auxiliary_weight=self.aux_weight)

    def make_metrics(self) -> SegmenterMetrics:
        """Those of a test that begins."""
        return SegmenterMetrics(self.num_classes)


class SegmenterMetrics:
    """Mean IoU and accuracies of a test, on whole images.

    Args:
        num_classes: of the pixels.
    """

    def __init__(self, num_classes: int):
        self.metrics = SegmentationMetrics(num_classes)

    def update(self, network: nn.Module, batch: Batch) -> None:
        """Count the pixels of a batch, at the size of the label maps."""
        for image, labels in zip(batch.images, batch.labels, strict=True):
            shares = segment(network, image[None], size=labels.shape)
            self.metrics.update(shares[0].argmax(dim=0), labels)

    def measures(self, fabric: Fabric) -> dict[str, float]:
        """Those of :class:`overlock.tasks.metrics.SegmentationMetrics`, of all processes' images."""
        counts = fabric.all_reduce(self.metrics.counts.to(fabric.device), reduce_op="sum")
        assert isinstance(counts, Tensor)
        self.metrics.counts = counts.cpu()
        return self.metrics.measures()


def make_job(config: SegmentConfig) -> Job:
    """Data, network and task of a segmenter's run.

    Raises:
        ValueError: for data, weights or a model that will not do.
    """
    data = load_label_maps(config.label_files, seed=config.seed)
    record = Record(
        model=config.model, head="upernet", classes=data.classes,
        model_args=dict(hidden_channels=config.hidden_channels, drop_path=config.drop_path),
        preprocessing=dict(scale=config.scale),
    )  # fmt: skip
    network = make_network(config, record)
    testing = PrepareLabels(make_segmentation_transform(training=False, scale=config.scale))

    def draw(place: int, tested: nn.Module) -> list[Image.Image]:
        image, labels = data.test.read(place)
        prepared, _ = testing(image, labels)
        device = next(tested.parameters()).device
        found = segment(tested, prepared[None].to(device), size=labels.shape)[0].argmax(dim=0).cpu()
        shown = sorted({*labels.unique().tolist(), *found.unique().tolist()} & set(range(len(data.classes))))
        maps = [draw_labels(image, places, data.classes) for places in (labels, found)]
        return [*maps, draw_legend(data.classes, shown, height=image.height)]

    def finish(folder: Path, tested: nn.Module) -> None:
        save_samples(folder / SAMPLES, lambda place: draw(place, tested), len(data.test))

    training = make_segmentation_transform(training=True, crop=config.crop, scale=config.scale, ratio=config.ratio)
    return Job(
        task=Segmentation(len(data.classes), aux_weight=config.aux_weight),
        data=data,
        network=network,
        record=record,
        prepare_train=PrepareLabels(training),
        prepare_test=testing,
        join_test=as_lists,
        finish=finish,
    )
