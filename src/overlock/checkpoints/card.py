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
    kind, about, use = _TEXTS[record.task]
    trained_on = Path(data).name
    classes = ", ".join(record.classes[:20]) + (", ..." if len(record.classes) > 20 else "")
    rows = "\n".join(
        f"| {name}, % | {'none' if math.isnan(share) else f'{100 * share:.2f}'} |" for name, share in measures.items()
    )
    text = f"""---
{_make_head(record, measures, trained_on)}
---

# {record.name}, trained on {trained_on}

{kind} of {len(record.classes)} classes ({classes}), of the [OverLoCK](https://arxiv.org/abs/2502.20087) architecture if
its name has overlock in it, trained with the package `overlock` for {settings["epochs"]} epochs.

| measure on the held-out images | value |
| --- | --- |
{rows}

{about.format(*record.preprocessing.get("input_size", ()))}

```python
{use}```

On the command line: `overlock predict IMAGE --checkpoint hf-hub:USER/NAME`. To train it further:
`overlock train RECIPE --data DATA --weights hf-hub:USER/NAME`. A revision goes behind an `@`.

## Licence

Apache-2.0, as the package's. Weights may be used for what the licences of the images allow that they were trained on,
and those of the weights that they started from (`weights` and `pretrained` below).

## Settings

All settings of the run:

```yaml
{yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)}```
"""
    write_atomically(path, text)


def _make_head(record: Record, measures: Mapping[str, float], data: str) -> str:
    """What the hub reads: licence, task and measures, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData  # noqa: PLC0415

    library, tag = _TAGS[record.task]
    results = [
        EvalResult(
            task_type=tag, dataset_type=data, dataset_name=f"{data}, held-out images", metric_type=_type_of(name),
            metric_name=f"{name}, %", metric_value=round(100 * share, 2),
        )
        for name, share in measures.items()
        if not math.isnan(share)
    ]  # fmt: skip
    settings: dict[str, Any] = dict(model_name=record.name, eval_results=results) if results else {}
    return ModelCardData(
        library_name=library, license="apache-2.0", pipeline_tag=tag, tags=["overlock", "timm"], **settings
    ).to_yaml()  # fmt: skip


def _type_of(name: str) -> str:
    """A measure's name as the hub writes them: 'box AP' is box_ap."""
    return name.lower().replace(" ", "_")


_TAGS = {  # library, task
    "classify": ("timm", "image-classification"),
    "detect": ("overlock", "object-detection"),
    "segment": ("overlock", "image-segmentation"),
}
_TEXTS = {  # kind, preparation, use
    "classify": (
        "An image classifier",
        "The images it takes are {1} x {2} pixels; their preparation is in `config.json`.",
        "import overlock  # registers the models with timm\nimport timm\n\n"
        'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()\n',
    ),
    "detect": (
        "A detector", "It takes images of any size, and prepares them by itself.",
        'from overlock.deploy import Detector\n\ndetector = Detector.from_checkpoint("hf-hub:USER/NAME")\n'
        'found = detector(["image.jpg"], threshold=0.5)[0]  # labels, scores, boxes; masks where it has them\n',
    ),
    "segment": (
        "A segmenter", "It takes images of any size, and prepares them by itself.",
        'from overlock.deploy import Segmenter\n\nsegmenter = Segmenter.from_checkpoint("hf-hub:USER/NAME")\n'
        'found = segmenter(["image.jpg"])[0]  # labels (H, W)\n',
    ),
}  # fmt: skip
