"""`python -m blixard` is `blixard`."""

from __future__ import annotations

import sys

from blixard.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
