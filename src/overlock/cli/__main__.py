"""``python -m overlock.cli``."""

import sys

from overlock.cli.main import main

sys.exit(main())
