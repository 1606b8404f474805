"""The model card of a run: what the Hugging Face hub shows, and what tells another person how to use the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from overlock.checkpoints.record import Record
from overlock.files import write_atomically

CARD_FILE = "README.md"
"""The model card, in the folder of a run."""


def write_card(
    path: Path, record: Record, *, settings: Mapping[str, Any], measures: Mapping[str, float], data: str
) -> None:
    """A model card.

    Args:
        path: to write.
        record: of the weights.
        settings: of the run.
        measures: of the final weights on the held-out images, as shares of 1, by what they are called; NaN for none.
        data: what it was trained on.
    """
    library, tag, kind, about, use = _TEXTS[record.task]
    head = yaml.safe_dump(
        dict(library_name=library, license="apache-2.0", pipeline_tag=tag, tags=["overlock", "timm"]), sort_keys=False
    )
    classes = ", ".join(record.classes[:20]) + (", ..." if len(record.classes) > 20 else "")
    rows = "\n".join(
        f"| {name}, % | {'none' if math.isnan(share) else f'{100 * share:.2f}'} |" for name, share in measures.items()
    )
    text = f"""---
{head}---

# {record.name}, trained on {Path(data).name}

{kind} of {len(record.classes)} classes ({classes}), of the [OverLoCK](https://arxiv.org/abs/2502.20087) architecture if
its name has overlock in it, trained with the package `overlock` for {settings["epochs"]} epochs.

| measure on the held-out images | value |
| --- | --- |
{rows}

{about.format(*record.preprocessing.get("input_size", ()))}

```python
{use}```

All settings of the run:

```yaml
{yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)}```
"""
    write_atomically(path, text)


_TEXTS = {  # library, tag, kind, preparation, use
    "classify": (
        "timm", "image-classification", "An image classifier",
        "The images it takes are {1} x {2} pixels; their preparation is in `config.json`.",
        "import overlock  # registers the models with timm\nimport timm\n\n"
        'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()\n',
    ),
    "detect": (
        "overlock", "object-detection", "A detector", "It takes images of any size, and prepares them by itself.",
        'from overlock.deploy import Detector\n\ndetector = Detector.from_checkpoint("hf-hub:USER/NAME")\n',
    ),
    "segment": (
        "overlock", "image-segmentation", "A segmenter", "It takes images of any size, and prepares them by itself.",
        'from overlock.deploy import Segmenter\n\nsegmenter = Segmenter.from_checkpoint("hf-hub:USER/NAME")\n',
    ),
}  # fmt: skip
