"""``python -m data_bridge``: the same as the command ``data-bridge``."""

import sys

from .cli import main

sys.exit(main())
