"""Images: reading any file, data sets of every form, preparation for the network, and repeatable batches."""

from typing import TYPE_CHECKING

from overlock import lazy

if TYPE_CHECKING:
    from overlock.data.augmentation import Augmentation
    from overlock.data.files import IMAGE_SUFFIXES, find_images, read_image, to_rgb
    from overlock.data.images import ImageData
    from overlock.data.load import load_data, load_test_data
    from overlock.data.transforms import make_eval_transform, make_train_transform
else:
    __getattr__, __dir__ = lazy.attach(
        __name__,
        {
            "augmentation": ["Augmentation"],
            "files": ["IMAGE_SUFFIXES", "find_images", "read_image", "to_rgb"],
            "images": ["ImageData"],
            "load": ["load_data", "load_test_data"],
            "transforms": ["make_eval_transform", "make_train_transform"],
        },
    )

__all__ = [
    "IMAGE_SUFFIXES",
    "Augmentation",
    "ImageData",
    "find_images",
    "load_data",
    "load_test_data",
    "make_eval_transform",
    "make_train_transform",
    "read_image",
    "to_rgb",
]
