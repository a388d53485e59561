"""`python -m finetune_lab` is `finetune-lab`."""

import sys

from finetune_lab.cli import main

sys.exit(main())
