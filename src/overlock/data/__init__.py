"""Images: reading any file, data sets of every form, preparation for the network, and repeatable batches."""

from overlock.data.files import IMAGE_SUFFIXES, find_images, read_image, to_rgb
from overlock.data.images import ImageData, load_data, load_test_data
from overlock.data.transforms import Augmentation, make_eval_transform, make_train_transform

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
