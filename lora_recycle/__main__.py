"""`python -m lora_recycle`, which `accelerate launch -m lora_recycle` uses too."""

import sys

from .commands.main import main


if __name__ == "__main__":
    sys.exit(main())
