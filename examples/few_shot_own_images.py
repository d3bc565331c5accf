"""Classify your own photos after a look at a few of each class.

    python examples/few_shot_own_images.py photos/ new1.jpg new2.jpg

`photos/` has a folder for each class: photos/cat, photos/dog, ... Without arguments some handwritten digits are shown,
and others asked for. `--model` takes a folder or repo id of a meta-LoRA; the shipped one is for trying things out.
"""

import argparse

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.demo.run import load_digits_images
from lora_recycle.images.labelled import load_labelled_images


def main(arguments: list[str] | None = None) -> float | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", help="folder of class folders")
    parser.add_argument("images", nargs="*", help="images to classify")
    parser.add_argument("--model", default="demo", help="folder or repo id of a meta-LoRA (default: %(default)s)")
    args = parser.parse_args(arguments)
    model = MetaLoRAForFewShotClassification.from_pretrained(args.model)
    if args.photos is None:
        return classify_digits(model)
    support = load_labelled_images(args.photos, model.backbone.image_size)
    model.fit(support.pixels, [support.label_names[label] for label in support.labels.tolist()])
    for path, label, row in zip(
        args.images, model.predict(args.images), model.predict_proba(args.images), strict=True
    ):
        print(f"{path}: {label} ({row.max():.0%})")
    return None


def classify_digits(model: MetaLoRAForFewShotClassification, shots: int = 5) -> float:
    """Five images of each digit are shown; returns the share of the others that is named rightly."""
    digits = load_digits_images(model.backbone.image_size, max_per_class=3 * shots)
    shown = [i for found in digits.by_class().values() for i in found[:shots].tolist()]
    asked = sorted(set(range(len(digits))) - set(shown))
    model.fit(digits.pixels[shown], digits.labels[shown])
    right = sum(
        a == b for a, b in zip(model.predict(digits.pixels[asked]), digits.labels[asked].tolist(), strict=True)
    )
    print(f"{right} of {len(asked)} handwritten digits named rightly after {shots} images of each")
    return right / len(asked)


if __name__ == "__main__":
    main()
