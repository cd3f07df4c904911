"""`python -m ppo`: the command line."""

import sys

from ppo.cli import main

if __name__ == "__main__":
    sys.exit(main())
