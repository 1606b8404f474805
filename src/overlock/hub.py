"""The Hugging Face hub: a run's folder as a model; ``timm.create_model("hf-hub:...")`` loads a classifier."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from overlock.checkpoint import CONFIG_FILE, MODEL_FILE, Record, read_record
from overlock.files import write_atomically

CARD_FILE, PREFIX = "README.md", "hf-hub:"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE)


def find_weights(source: str | os.PathLike[str]) -> Path:
    """The file of weights that a path, a run's folder or 'hf-hub:USER/NAME' stands for, downloaded where need be.

    Raises:
        ValueError: where there is none.
    """
    text = str(source)
    if text.startswith(PREFIX):
        from huggingface_hub import hf_hub_download  # noqa: PLC0415
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError  # noqa: PLC0415

        try:
            return Path(hf_hub_download(text.removeprefix(PREFIX), MODEL_FILE))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"{text}: {MODEL_FILE} could not be fetched ({_first_line(error)})") from None
    path = Path(source)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file():
            raise ValueError(f"{path}: no {MODEL_FILE} in this folder; give the folder of a finished run")
        return path / MODEL_FILE
    return path


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


def push(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Upload a run's weights and model card, and a classifier's configuration.

    Args:
        folder: of a finished run.
        repository: 'USER/NAME'.
        private: make a new repository private.

    Returns:
        The address.

    Raises:
        ValueError: for a folder without those files, and where the hub refuses.
    """
    folder = Path(folder)
    record = read_record(folder / MODEL_FILE) if (folder / MODEL_FILE).is_file() else None
    files = FILES if record is None or record.head is None else (MODEL_FILE, CARD_FILE)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: {', '.join(missing)} not found; give the folder of a finished run")
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError  # noqa: PLC0415

    api = HfApi()
    card = (folder / CARD_FILE).read_text(encoding="utf-8").replace("hf-hub:USER/NAME", f"hf-hub:{repository}")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        for name in files[:-1]:
            api.upload_file(path_or_fileobj=str(folder / name), path_in_repo=name, repo_id=repository)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD_FILE, repo_id=repository)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(
            f"{repository}: the hub did not take it ({_first_line(error)}); check the name and run: hf auth login"
        ) from None
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
