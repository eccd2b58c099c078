"""Compare methods, ratios and seeds under one budget: `make compare CONFIG=tiny`, or `python -m compare --help`."""

import sys

from compare.command import main

if __name__ == "__main__":
    sys.exit(main())
