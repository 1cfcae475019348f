"""python -m streamgen_distill experiment=NAME key=value ..."""

import sys

from streamgen_distill.main import run

sys.exit(run(sys.argv[1:]))
