"""`python -m pat` is the `pat` command."""

import sys

if __name__ == "__main__":
    from pat.cli import main

    sys.exit(main())
