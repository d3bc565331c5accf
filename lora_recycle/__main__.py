"""`python -m lora_recycle`, which `accelerate launch -m lora_recycle` uses too."""

import sys

from .cli.main import main


def leave_the_others() -> None:
    """Part from the other processes of a launch in order, which torch asks for on GPUs."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    if code == 0:
        leave_the_others()
    sys.exit(code)
