"""The Hugging Face hub: a run's folder as a model there; ``timm.create_model("hf-hub:...")`` loads a classifier."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from overlock.checkpoints.card import CARD_FILE
from overlock.checkpoints.record import CONFIG_FILE, MODEL_FILE, read_record

PREFIX = "hf-hub:"
FILES = (MODEL_FILE, CONFIG_FILE, CARD_FILE)


def fetch(address: str) -> Path:
    """The weights of a model of the hub, downloaded where need be.

    Args:
        address: 'hf-hub:USER/NAME', or 'hf-hub:USER/NAME@REVISION'.

    Raises:
        ValueError: where there are none, or nothing says what they are.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    try:
        name, _, revision = address.removeprefix(PREFIX).partition("@")
        settings: dict[str, Any] = {"revision": revision} if revision else {}
        path = Path(hf_hub_download(name, MODEL_FILE, **settings))
        if read_record(path) is None:  # of timm's, whose configuration is a file beside
            hf_hub_download(name, CONFIG_FILE, **settings)
        return path
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{address}: not to be fetched ({_first_line(error)})") from None


def push(folder: str | os.PathLike[str], repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a run's weights and model card, and a classifier's configuration.

    Args:
        folder: of a finished run.
        repository: 'USER/NAME'.
        private: make a new repository private.
        revision: branch to upload to, made where there is none; the main one unless given.

    Returns:
        The address.

    Raises:
        ValueError: for a folder without those files, a public repository where a private one is asked for, and where
            the hub refuses.
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
    address = f"{PREFIX}{repository}" + (f"@{revision}" if revision else "")
    card = (folder / CARD_FILE).read_text(encoding="utf-8").replace(f"{PREFIX}USER/NAME", address)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ValueError(
                f"{repository}: it is there already, and public; choose another name, or leave --private out"
            )
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        for name in files:
            content = card.encode() if name == CARD_FILE else str(folder / name)
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repository, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(
            f"{repository}: the hub did not take it ({_first_line(error)}); check the name and run: hf auth login"
        ) from None
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
