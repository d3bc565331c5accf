"""From the adapters of an organisation on the Hub to one meta-LoRA, and back to the Hub.

    python examples/recycle_organisation.py acme --output runs/acme --push me/acme-meta-lora

Takes every PEFT adapter of the organisation that can be used, tells which cannot and why, and writes `surrogate/` and
`meta_lora/` into the output folder. Run again it goes on where it was. A ViT-B/16 wants a GPU: `--device cuda`.
Settings come from a recipe, `--recipe examples/recipes/vit-base-patch16-224-in21k.yaml` say. docs/organisation.md
tells the same for the shell.
"""

import argparse
from pathlib import Path

from lora_recycle import (
    AdapterPool,
    DistillationConfig,
    InversionConfig,
    LoRAInverter,
    MetaLoRATrainer,
    save_meta_lora,
)
from lora_recycle.cli.arguments import read_section


def main(arguments: list[str] | None = None) -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisation", help="name of an organisation or a user")
    parser.add_argument("--base-model", help="repo id of the base; by default what most adapters name")
    parser.add_argument("--recipe", help="YAML file with the sections invert and distill")
    parser.add_argument("--output", type=Path, default=Path("runs/organisation"), help="default: %(default)s")
    parser.add_argument("--push", metavar="REPO_ID", help="where the meta-LoRA is published")
    parser.add_argument("--device", help="cpu, cuda, ...")
    args = parser.parse_args(arguments)

    sources = f"author:{args.organisation}"
    pool = AdapterPool.from_pretrained(
        sources, args.base_model, on_error="skip", require_heads=True, device=args.device, progress=True
    )
    print(f"{len(pool)} adapters of {pool.backbone.name}, {len(pool.skipped)} left out")
    for name, reason in pool.skipped:
        print(f"  {name}: {reason}")

    settings = {verb: read_section(args.recipe, verb) if args.recipe else {} for verb in ("invert", "distill")}
    surrogate = LoRAInverter(pool, InversionConfig.from_dict(settings["invert"])).run(args.output / "surrogate")
    trainer = MetaLoRATrainer(pool, surrogate, DistillationConfig.from_dict(settings["distill"]))
    trainer.train(args.output / "work")
    model = trainer.to_model()  # knows its sources, for sidecar and card
    save_meta_lora(model, args.output / "meta_lora")
    return model.push_to_hub(args.push) if args.push else None


if __name__ == "__main__":
    print(main() or "done")
