"""What the local Hub reads from a repo's card and files: metadata, tags, complaints."""

import json
import re
from typing import Any

import yaml  # comes with huggingface_hub
from hub_store import Commit, Repo


# those of the Hub's own error message (huggingface_hub issue 4218, May 2026), and one that is documented since
LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
    openmdw-1.1
"""
LICENSES = frozenset(LICENSES.split())
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
SIZES = {"unknown", "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"}
SIZES |= {"10B<n<100B", "100B<n<1T", "n>1T"}
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def front_matter(readme: str) -> str | None:
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    return match[1] if match else None


def card_data(commit: Commit) -> dict[str, Any]:
    """Metadata of README.md, empty if it has none or is broken."""
    readme = commit.files.get("README.md")
    try:
        data = yaml.safe_load(front_matter(readme.data.decode()) or "") if readme else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def complaints(readme: str, repo_type: str = "model") -> tuple[list[str], list[str]]:
    """Errors, with which the Hub refuses a card, and warnings.

    Known from messages of the real one: licences, base_model, datasets, what must be strings. From its specification
    (modelcard.md and datasetcard.md of its documentation), so that it may be stricter than the real one: the rest.
    """
    told = front_matter(readme)
    if told is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(told)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not isinstance(data, dict):
        return ['"value" must be of type object'], []
    unknown = [name for name in listed(data, "license") if name not in LICENSES]
    errors = [f'"license" must be one of {sorted(LICENSES)}'] if unknown else []
    for key in ("base_model", "datasets", "tags"):
        values = listed(data, key)
        errors += [f'"{key}[{i}]" must be a string' for i, value in enumerate(values) if not isinstance(value, str)]
    for name in listed(data, "base_model"):
        if isinstance(name, str) and not MODEL_ID.fullmatch(name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    for i, name in enumerate(listed(data, "datasets")):
        if isinstance(name, str) and not MODEL_ID.fullmatch(name):
            errors.append(
                f'"datasets[{i}]" with value "{name}" is not valid. Use a dataset id from https://hf.co/datasets'
            )
    for key, known in (("base_model_relation", RELATIONS), ("size_categories", SIZES)):
        errors += [f'"{key}" must be one of {sorted(known)}' for value in listed(data, key) if value not in known]
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "pretty_name"):
        errors += [f'"{key}" must be a string'] if not isinstance(data.get(key, ""), str) else []
    return errors + (result_complaints(data) if repo_type == "model" else []), []


def result_complaints(data: dict[str, Any]) -> list[str]:
    """What is missing in `model-index`, or no string where it must be one."""
    errors = []
    for m, model in enumerate(listed(data, "model-index")):
        errors += [] if isinstance(model.get("name"), str) else [f'"model-index[{m}].name" is required']
        for r, result in enumerate(model.get("results", [])):
            where = f"model-index[{m}].results[{r}]"
            needed = [("task", result.get("task", {}), ("type",), ("name",))]
            needed += [("dataset", result.get("dataset", {}), ("type", "name"), ("config", "split", "revision"))]
            needed += [("metrics", one, ("type", "value"), ("name",)) for one in result.get("metrics") or [{}]]
            for part, told, required, optional in needed:
                errors += [f'"{where}.{part}.{key}" is required' for key in required if told.get(key) is None]
                texts = {key: told[key] for key in (*required, *optional) if key in told and key != "value"}
                errors += [
                    f'"{where}.{part}.{k}" must be a string' for k, v in texts.items() if not isinstance(v, str)
                ]
    return errors


def listed(data: dict[str, Any], key: str) -> list:
    """A value that may be one or a list, as a list."""
    value = data.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def adapter_config(commit: Commit) -> dict[str, Any] | None:
    file = commit.files.get("adapter_config.json")
    try:
        config = json.loads(file.data) if file else None
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def library_of(commit: Commit) -> str | None:
    named = card_data(commit).get("library_name")
    if named:
        return named
    if "adapter_config.json" in commit.files:
        return "peft"
    return None


def tags_of(repo: Repo, commit: Commit) -> list[str]:
    """Tags that searches filter by: those of the card and those that follow from other metadata and from files."""
    card = card_data(commit)
    tags = [library_of(commit)] if repo.kind == "models" else []
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
    tags += listed(card, "tags") + listed(card, "pipeline_tag") + listed(card, "task_categories")
    tags += [f"dataset:{name}" for name in listed(card, "datasets")]
    relation = card.get("base_model_relation") or ("adapter" if "adapter_config.json" in commit.files else "finetune")
    for base in listed(card, "base_model"):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"license:{name}" for name in listed(card, "license")] + ["region:us"]
    return list(dict.fromkeys(str(tag) for tag in tags if tag))


def repo_info(repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """What `model_info` and `dataset_info` get."""
    card = dict(card_data(commit))
    info = {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(repo, commit),
        "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.files.items())],
        "usedStorage": sum(len(file.data) for file in commit.files.values()),
    }
    if repo.kind == "models":
        info |= {"modelId": repo.id, "model-index": card.pop("model-index", None)}
        info |= {"pipeline_tag": card["pipeline_tag"]} if "pipeline_tag" in card else {}
        info |= {"library_name": library_of(commit)} if library_of(commit) else {}
        config = adapter_config(commit)
        if config is not None:
            keys = ("base_model_name_or_path", "task_type")
            info["config"] = {"peft": {key: config[key] for key in keys if config.get(key) is not None}}
    return info | ({"cardData": card} if card else {})


def _sibling(path: str, file, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    return {"rfilename": path, "size": len(file.data), "blobId": file.oid} | file.lfs_info("sha256")
