"""`python -m streamgen`: the command line; the one file here that names the layer above."""

import sys

from streamgen_infer.cli import main

if __name__ == "__main__":
    sys.exit(main())
