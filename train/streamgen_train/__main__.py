"""python -m streamgen_train experiment=NAME key=value ..."""

import sys

from streamgen_train.main import run

sys.exit(run(sys.argv[1:]))
