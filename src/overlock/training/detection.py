"""What the training of a detector is made of: data, network, the losses, and average precisions (section 4.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from overlock.checkpoints import Record
from overlock.data.detection import load_detection
from overlock.data.detection_transforms import PrepareObjects, make_detection_transform
from overlock.data.loaders import Batch, as_lists
from overlock.drawing import draw_objects
from overlock.tasks.detection import find_objects
from overlock.tasks.metrics import DetectionMetrics
from overlock.training.detection_config import DetectConfig
from overlock.training.job import Job
from overlock.training.networks import SAMPLES, make_network, save_samples

SHOWN = 0.5  # score from which on an object is drawn


class Detection:
    """Losses and measures of a detector.

    Args:
        masks: whether it gives masks.
    """

    main_metric = "box_AP"
    _shares: ClassVar[dict[str, str]] = dict(box_AP="box AP", box_AP50="box AP50")
    _of_masks: ClassVar[dict[str, str]] = dict(mask_AP="mask AP", mask_AP50="mask AP50")

    def __init__(self, *, masks: bool):
        self.masks = masks
        self.shares = self._shares | (self._of_masks if masks else {})

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Sum of the losses of the region proposals and of the heads."""
        losses: dict[str, Tensor] = network(batch.images, batch.labels)
        return torch.stack(list(losses.values())).sum()

    def make_metrics(self) -> DetectorMetrics:
        """Those of a test that begins."""
        return DetectorMetrics(masks=self.masks)


class DetectorMetrics:
    """COCO's average precisions of a test.

    Args:
        masks: of the masks too.
    """

    def __init__(self, *, masks: bool):
        self.metrics = DetectionMetrics(masks=masks)

    def update(self, network: nn.Module, batch: Batch) -> None:
        """Count the objects of a batch."""
        self.metrics.update(find_objects(network, batch.images), batch.labels)

    def measures(self, fabric: Fabric) -> dict[str, float]:
        """Those of :class:`overlock.tasks.metrics.DetectionMetrics`, of all processes' images."""
        if fabric.world_size > 1:
            states: list[Any] = [None] * fabric.world_size
            torch.distributed.all_gather_object(states, self.metrics.state())
            self.metrics.merge(states)
        return self.metrics.measures()


def make_job(config: DetectConfig) -> Job:
    """Data, network and task of a detector's run.

    Raises:
        ValueError: for data, weights or a model that will not do.
        ImportError: without torchmetrics or pycocotools.
    """
    DetectionMetrics(masks=config.masks)  # that nothing is missing after the first epoch
    data = load_detection(
        config.train_files, config.test_files, masks=config.masks, categories=config.categories,
        background=config.background, seed=config.seed,
    )  # fmt: skip
    kept = ("max_size", "hidden_channels", "proposals", "regions")
    # torchvision's detectors draw one of several sizes in training, and test at the last.
    scales = (*(size for size in config.multi_scale if size != config.min_size), config.min_size)
    record = Record(
        model=config.model, head=config.detector, classes=data.classes,
        model_args={name: getattr(config, name) for name in kept} | dict(min_size=scales, drop_path=config.drop_path),
    )  # fmt: skip
    network = make_network(config, record)

    def draw(place: int, tested: nn.Module) -> list[Image.Image]:
        image, target = data.test.read(place)
        device = next(tested.parameters()).device
        (found,) = find_objects(tested, [pil_to_tensor(image).to(device) / 255], threshold=SHOWN)
        return [draw_objects(image, target, data.classes), draw_objects(image, found, data.classes)]

    def finish(folder: Path, tested: nn.Module) -> None:
        save_samples(folder / SAMPLES, lambda place: draw(place, tested), len(data.test))

    training = make_detection_transform(training=True, crop=bool(config.multi_scale))
    return Job(
        task=Detection(masks=config.masks),
        data=data,
        network=network,
        record=record,
        prepare_train=PrepareObjects(training),
        prepare_test=PrepareObjects(make_detection_transform(training=False)),
        join_train=as_lists,
        join_test=as_lists,
        finish=finish,
    )
