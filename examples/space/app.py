"""The page of `lora-recycle app` as a Space of the Hub. The variable META_LORA names the meta-LoRA to begin with."""

import os

from lora_recycle.app.page import launch


if __name__ == "__main__":
    hosts = os.environ.get("SPACE_HOST", "").split(",")  # the Hub names the Space's address here
    page = launch(os.environ.get("META_LORA", "demo"), host="0.0.0.0", browser=False, folders=False, hosts=hosts)
    page.block_thread()
