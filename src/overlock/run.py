"""``python -m overlock.run SCRIPT.py ...``: run a script with OverLoCK's models known to timm.

Scripts that build a model by its name, timm's own ``train.py`` among them, need no change::

    python -m overlock.run train.py --data-dir photos --model overlock_t
    torchrun --nproc_per_node 8 -m overlock.run train.py --data-dir photos --model overlock_t
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the first argument names, with the others as its own; the package is imported by now.

    Raises:
        SystemExit: without a script.
    """
    script = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if script is None or not script.is_file():
        given = "no script is given" if script is None else f"{script}: no such file"
        raise SystemExit(f"{given}; use: python -m overlock.run SCRIPT.py [its arguments]")
    del sys.argv[0]
    sys.path[0] = str(script.resolve().parent)  # as Python itself sets it
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
