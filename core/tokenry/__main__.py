"""`python -m tokenry` is `tokenry`."""

import sys

from tokenry.cli import main

if __name__ == "__main__":
    sys.exit(main())
