"""Give a meta-LoRA that has none the experts of its pool, without distilling it again.

    python examples/tools/add_experts.py demo --pool demo --bits 16 --output lora_recycle/demo/assets/meta_lora

The shared network stays as it is, bit by bit where `--bits` is what it was stored with. An expert is the average of
the adapters of one domain, cut to `--rank` (docs/domains.md). A few seconds for the shipped pool.
"""

import argparse
from pathlib import Path

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification
from lora_recycle.distillation.experts import expert_networks
from lora_recycle.hub.embedded import pool_path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repo id of a meta-LoRA, `demo` for the shipped one")
    parser.add_argument("--pool", required=True, help="the adapters that it was made of, `demo` for the shipped ones")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--bits", type=int, help="of each weight (default: as they are in memory)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    model = MetaLoRAForFewShotClassification.from_pretrained(args.model)
    pool = AdapterPool.from_pretrained(pool_path() if args.pool == "demo" else args.pool)
    model.domain_networks = expert_networks(pool, model.backbone, args.rank)
    model.save_pretrained(args.output, bits=args.bits)
    print(f"{args.output}: {', '.join(model.domains) or 'no experts, the pool is of one domain'}")


if __name__ == "__main__":
    main()
