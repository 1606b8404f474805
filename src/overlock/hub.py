"""The former name of the hub's part of :mod:`overlock.checkpoints`."""

from overlock.checkpoints import CARD_FILE, find_weights, push, write_card

__all__ = ["CARD_FILE", "find_weights", "push", "write_card"]
