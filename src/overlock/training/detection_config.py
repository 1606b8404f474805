"""The settings of a detector's run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from overlock.object_files import Format, ObjectFiles
from overlock.settings import check_number
from overlock.training.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class DetectConfig(RunConfig):
    """How a detector is trained. Raises ValueError for values that cannot be."""

    task: Literal["detect"] = "detect"
    """What is learnt: objects' boxes, and their masks by the detectors that have some."""
    data: str
    """Folder of images with annotations of objects: COCO's (annotations/instances_PART.json and PART/ and the like),
    YOLO's (data.yaml), Pascal VOC's (XML files), Labelme's (a JSON file an image) or CreateML's; PART is train, val and
    so on. Without a part to test on a fifth is held out."""
    format: Format | None = None
    """Form of the annotations; told by what lies there unless given."""
    annotations: str | None = None
    """File of the annotations to train on, or folder of such files, if they lie elsewhere than the folder has them."""
    images: str | None = None
    """Folder of their images; the data folder unless given."""
    test_annotations: str | None = None
    """File or folder of the annotations to test on; a fifth of the others is held out unless given."""
    test_images: str | None = None
    """Folder of their images; the data folder unless given."""
    background: bool = False
    """Keep images without an object in training: what is seen in them is no object."""
    detector: Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"] = "mask_rcnn"
    """The heads: Faster R-CNN and Cascade R-CNN find boxes, the other two masks as well."""
    categories: tuple[str, ...] = ()
    """Names of the categories to detect; all unless given."""
    min_size: int = 800
    """What the short side of an image is brought to."""
    max_size: int = 1333
    """What its long side may be at most."""
    hidden_channels: int = 256
    """Width of the pyramid and of the heads' convolutions."""
    proposals: int = 1000
    """Regions of an image that the heads look at; most of the heads' cost."""
    regions: int = 512
    """Those of them that the heads learn from."""
    multi_scale: tuple[int, ...] = ()
    """In training, short sides to draw from, min_size among them; then half of the images are cropped first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None:
            raise ValueError("classes has no effect on detectors: annotations have names; choose with categories")
        for size in (self.min_size, *self.multi_scale):
            check_number("min_size and multi_scale", size, 32, self.max_size)
        if self.multi_scale and self.min_size not in self.multi_scale:
            raise ValueError(
                f"multi_scale must have min_size {self.min_size}, at which tests are made, among its sizes"
            )
        for name in ("hidden_channels", "proposals", "regions"):
            check_number(name, getattr(self, name), 1)
        for name in ("", "test_"):
            if getattr(self, f"{name}images") and not getattr(self, f"{name}annotations"):
                raise ValueError(f"{name}images is for the images of {name}annotations; give both, or neither")

    @property
    def train_files(self) -> ObjectFiles:
        """Where the images to train on and their annotations are."""
        return ObjectFiles(
            data=self.data, format=self.format, split=self.train_split, annotations=self.annotations, images=self.images
        )

    @property
    def test_files(self) -> ObjectFiles:
        """Where those to test on are."""
        return ObjectFiles(
            data=self.data, format=self.format, split=self.val_split, annotations=self.test_annotations,
            images=self.test_images,
        )  # fmt: skip

    @property
    def masks(self) -> bool:
        """Whether the detector gives masks."""
        return "mask" in self.detector
