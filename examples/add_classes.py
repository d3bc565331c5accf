"""Teach a fitted model new classes, and more images of old ones, without the earlier images.

    python examples/add_classes.py

Digits come two at a time. After the last pair the model is the one that had seen all images at once: prototypes
keep sums and counts, and these add up.
"""

import argparse

import torch

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.demo.run import load_digits_images


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5, help="images of each digit (default: %(default)s)")
    parser.add_argument("--head", help="few-shot head (default: prototypes)")
    args = parser.parse_args(arguments)
    model = MetaLoRAForFewShotClassification.from_pretrained("demo", head=args.head)
    digits = load_digits_images(model.backbone.image_size, max_per_class=2 * args.shots)
    shown = {label: found[: args.shots] for label, found in digits.by_class().items()}
    asked = torch.cat([found[args.shots :] for found in digits.by_class().values()])
    for first in range(0, 10, 2):
        pair = torch.cat([shown[first], shown[first + 1]])
        learn = model.add_classes if model.label_names else model.fit
        learn(digits.pixels[pair], digits.labels[pair])
        known = asked[digits.labels[asked] < first + 2]
        right = (torch.tensor(model.predict(digits.pixels[known])) == digits.labels[known]).float().mean()
        print(f"{len(model.label_names):2} classes: {right:.0%} of new images right")
    return model.predict_proba(digits.pixels[asked])


if __name__ == "__main__":
    main()
