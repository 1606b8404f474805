"""Networks as files: weights with a record of all that is needed to build the network and to prepare its images."""

from overlock.checkpoints.card import CARD_FILE, write_card
from overlock.checkpoints.defaults import default_classes, default_preprocessing
from overlock.checkpoints.hub import push
from overlock.checkpoints.load import find_weights, load_classifier, load_model, load_record
from overlock.checkpoints.recognise import find_ends
from overlock.checkpoints.record import (
    CONFIG_FILE,
    HEADS,
    MODEL_FILE,
    Record,
    build,
    check_model_name,
    read_record,
    save_model,
    to_timm_config,
)
from overlock.checkpoints.start import start_from

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "HEADS",
    "MODEL_FILE",
    "Record",
    "build",
    "check_model_name",
    "default_classes",
    "default_preprocessing",
    "find_ends",
    "find_weights",
    "load_classifier",
    "load_model",
    "load_record",
    "push",
    "read_record",
    "save_model",
    "start_from",
    "to_timm_config",
    "write_card",
]
