"""Images: reading any file, folders by class, handwritten digits, and preparation for the network."""

from overlock.data.files import IMAGE_SUFFIXES, find_images, read_image, to_rgb
from overlock.data.images import ImageData, load_data
from overlock.data.transforms import make_eval_transform, make_train_transform

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageData",
    "find_images",
    "load_data",
    "make_eval_transform",
    "make_train_transform",
    "read_image",
    "to_rgb",
]
