"""Weights under the authors' names, drawn from the names, and images for them: what the golden outputs were made with.

The released code was given these tensors and images; ``official/golden`` holds what it answered (float32, CPU,
evaluation). ``official/specs`` holds the names and shapes of its state dicts by form: ``cls`` (training form with the
auxiliary head), ``cls_deploy`` (merged), ``dense_seg`` and ``dense_det`` (backbones), and of the plug-in block
``block``, ``block_ls`` and ``block_deploy``. Trained weights are not needed: the same tensors and the same image must
give the same output.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "official"
Spec = dict[str, tuple[tuple[int, ...], str]]

# Gains that keep every branch of the network of about the same size, by name. The first pattern found counts.
GAINS = {
    r"\.dil_conv_k\d+_\d+\.weight$": 0.5,
    r"(^|\.)dwconv[12]?\.weight$": 0.5,
    r"(^|\.)(proj\.6|mlp\.2)\.weight$": 0.5,
    r"(^|\.)weight_proj\.weight$": 2.0,
    r"(^|\.)(dyconv_proj|fusion_proj)\.0\.weight$": 2.0,
    r"(^|\.)weight_key\.1\.weight$": 2.0,
    r"(^|\.)(proj\.3\.proj|se_layer\.proj)\.[13]\.weight$": 2.0,
}


def load_spec(variant: str, form: str) -> Spec:
    """Names, shapes and dtypes of a state dict of the authors'."""
    with gzip.open(FOLDER / "specs" / f"{variant}.json.gz", "rt", encoding="utf-8") as file:
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in json.load(file)[form].items()}


def load_golden() -> dict[str, np.ndarray]:
    """Outputs of OverLoCK-XT and, under their names, of the plug-in block."""
    files = [np.load(FOLDER / "golden" / f"{name}.npz") for name in ("overlock_xt", "contmix_block")]
    return {key: array for file in files for key, array in file.items()}


def draw_state(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """A tensor for each name, each drawn from a generator of its own."""
    return {name: draw_tensor(name, shape, seed).astype(dtype) for name, (shape, dtype) in spec.items()}


def draw_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Scales around one, variances positive, biases and tables small, kernels variance-keeping; float64."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape)
    generator = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return 0.5 + generator.random(shape)
    if leaf == "weight" and shape[1:] == (1, 1, 1):  # a scale of the residual
        return 0.4 + 0.8 * generator.random(shape)
    normal = generator.standard_normal(shape)
    if leaf in ("rpb1", "rpb2", "gamma", "beta"):
        return 0.5 * normal
    if leaf in ("running_mean", "bias"):
        return (0.5 if re.search(r"(^|\.)weight_proj\.bias$", name) else 0.1) * normal
    gain = next((gain for pattern, gain in GAINS.items() if re.search(pattern, name)), 1.0)
    return (gain / math.sqrt(math.prod(shape[1:]))) * normal


def draw_image(seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Noise (B, C, H, W) of pixels and of patches of 8 and 32 pixels, float32."""
    batch, channels, height, width = shape
    generator = np.random.Generator(np.random.PCG64([zlib.crc32(b"image"), seed]))
    image = 0.5 * generator.standard_normal(shape)
    for side, gain in ((32, 0.8), (8, 0.6)):
        patches = generator.standard_normal((batch, channels, math.ceil(height / side), math.ceil(width / side)))
        image += gain * patches.repeat(side, axis=2).repeat(side, axis=3)[:, :, :height, :width]
    return image.astype(np.float32)
