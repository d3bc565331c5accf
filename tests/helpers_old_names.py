"""Sidecars as the first format had them."""

HEADS = {
    "prototypes": "class_centres",
    "cosine_prototypes": "cosine_centres",
    "euclidean_prototypes": "euclidean_centres",
}
SETTINGS = {"validation_fraction": "held_out", "eval_steps": "judge_every", "save_steps": "checkpoint_every"}


def as_format_1(sidecar: dict) -> dict:
    old = {key: value for key, value in sidecar.items() if key != "format_version"}
    old["head"] = HEADS.get(old["head"], old["head"])
    for key, names in (("head_parameters", HEADS), ("distillation", SETTINGS)):
        if key in old:
            old[key] = {names.get(name, name): value for name, value in old[key].items()}
    return old
