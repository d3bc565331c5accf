"""Heads for adapters without one, from class names: zero-shot classification through the base model's text tower."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import set_peft_model_state_dict
from transformers import AutoTokenizer, CLIPModel, PreTrainedModel, SiglipModel

from ..backbones.backbone import Backbone
from ..backbones.base_models import CONFIG_FILES, LOADING, TOKENIZER_FILES, WEIGHT_FILES, BaseModel
from ..errors import AdapterError, ConfigError
from ..hub.download import HubOptions
from .adapter import Adapter
from .checkpoint_files import CHECKPOINT
from .files import read_header
from .heads import Head, TextHead
from .load import load_adapter
from .other_names import has_text_half
from .peft_wrap import wrap
from .pull import AdapterInfo
from .sources import BadAdapters
from .stored import StoredAdapter


#: CLIP's own prompt for photographs; `{}` stands for the class name.
PROMPT = "a photo of a {}."
_TEXTS_AT_ONCE = 256
_WHOLE: dict[str, type[PreTrainedModel]] = {"clip": CLIPModel, "siglip": SiglipModel}


def give_heads(
    adapters: Sequence[Adapter | StoredAdapter],
    backbone: Backbone,
    bad: BadAdapters,
    *,
    prompt: str,
    required: bool,
    **hub: Any,
) -> list[Adapter | StoredAdapter]:
    """Give adapters without a head that know their class names (`info.labels`) one made of them.

    That is the base model's own, where it has as many classes, or one that the text tower makes of the names.
    The text tower is loaded once for all of them, and not at all where nobody needs it. An adapter whose names make no
    head is bad; with `required` so is one without a head, or with one that does not fit.
    """
    adapters = [a.with_head(own) if (own := head_of_base(a, backbone)) else a for a in adapters]
    lacking, heads, failure = [a for a in adapters if a.headless and a.info.labels], [], None
    if lacking:
        try:
            names, infos = [a.info.labels or () for a in lacking], [a.info for a in lacking]
            heads = text_heads(backbone, names, prompt, infos, **hub)
        except AdapterError as error:
            failure = error
    made, usable = iter(heads), []
    for adapter in adapters:
        with bad.handled(adapter.info.where):
            if adapter.headless and adapter.info.labels:
                if failure:
                    raise no_text_head(adapter.info, failure)
                adapter = adapter.with_head(next(made))
            if required:
                adapter.require_head(backbone)
            usable.append(adapter)
    return usable


def head_of_base(adapter: Adapter | StoredAdapter, backbone: Backbone) -> Head | None:
    """The base model's own classifier, for an adapter without a head whose class names are as many as its classes."""
    own, names = backbone.own_head, adapter.info.labels
    if own is None or names is None or not adapter.headless or len(names) != len(own.weight):
        return None
    return Head(own.weight, own.bias)


def no_text_head(info: AdapterInfo, reason: AdapterError) -> AdapterError:
    """What is wrong with an adapter whose class names should make its head, and do not."""
    return AdapterError(f"{info.where}: has no head, and its class names make none: {reason}")


def text_heads(
    backbone: Backbone,
    class_names: Sequence[Sequence[str]],
    prompt: str = PROMPT,
    adapters: Sequence[AdapterInfo] = (),
    **hub: Any,
) -> list[TextHead]:
    """One head for each list of class names. On `backbone` its logits are the whole model's `logits_per_image`.

    Radford et al., *Learning Transferable Visual Models From Natural Language Supervision* (2021), section 3.1.2.

    Args:
        prompt (`str`): what each name is put into, at `{}`.
        adapters (`list`, *optional*): as many as lists. One that tunes the text tower too reads its own names so.
        hub: `token`, `cache_dir` and `local_files_only`.

    Raises:
        AdapterError: the base model has no text tower, or it or its tokenizer cannot be loaded.
        ConfigError: the prompt has no `{}`.
    """
    if "{}" not in prompt:
        raise ConfigError(f"prompt must hold {{}} where the class name goes, got {prompt!r}.")
    model, tokenizer = _load_text_tower(backbone, cast(HubOptions, hub))
    texts = _texts((name for names in class_names for name in names), prompt)
    unread = [t for t, ids in zip(texts, _token_ids(tokenizer, texts), strict=True) if ids <= {tokenizer.unk_token_id}]
    if unread:  # without its files transformers makes a tokenizer without words, and says nothing
        raise AdapterError(
            f"{backbone.name}: its tokenizer knows no word of {unread[0]!r}. Is tokenizer.json missing in the repo?"
        )
    try:
        shared = dict(zip(texts, _embed(model, tokenizer, texts), strict=True))
        embeddings = [shared] * len(class_names)
        for i, info in enumerate(adapters):
            if _reads_texts(info):
                own = _texts(class_names[i], prompt)
                with _worn_text_half(model, info):
                    embeddings[i] = dict(zip(own, _embed(model, tokenizer, own), strict=True))
    except (IndexError, ValueError, TypeError, RuntimeError) as error:  # a tokenizer that is not the tower's own
        raise AdapterError(f"{backbone.name}: its text tower cannot read the class names ({error}).") from error
    scale, bias = model.logit_scale.detach().exp().cpu(), getattr(model, "logit_bias", None)
    projection = getattr(model, "visual_projection", None)
    projection = None if projection is None else projection.weight.detach().cpu()
    heads = []
    for names, known in zip(class_names, embeddings, strict=True):
        weight = torch.stack([known[text] for text in _texts(names, prompt)]) * scale
        shift = None if bias is None else bias.detach().cpu().expand(len(names))
        heads.append(TextHead(weight, shift, projection=projection, prompt=prompt))
    return heads


def _texts(names: Iterable[str], prompt: str) -> list[str]:
    return [prompt.replace("{}", name) for name in dict.fromkeys(names)]


def _reads_texts(info: AdapterInfo) -> bool:
    return info.peft_type != CHECKPOINT and has_text_half(read_header(info.path, info.where))


@contextlib.contextmanager
def _worn_text_half(model: Any, info: AdapterInfo) -> Iterator[None]:
    """The model with the text half of an adapter around its text tower, the way PEFT does it."""
    own = model.text_model
    loaded, worn = load_adapter(info, own, tower="text"), copy.deepcopy(own)
    for name, tensor in loaded.weights.items():
        worn.get_parameter(name).data.copy_(tensor)
    if loaded.state_dict:
        wrapped = wrap(worn, loaded.peft_config)
        set_peft_model_state_dict(wrapped, loaded.state_dict)
        worn = wrapped.get_base_model().to(model.device).eval()
    try:
        model.text_model = worn
        yield
    finally:
        model.text_model = own


def _load_text_tower(backbone: Backbone, hub: HubOptions) -> tuple[Any, Any]:
    """The whole model in float32 on the backbone's device, without the image tower, and its tokenizer."""
    files = CONFIG_FILES | WEIGHT_FILES | TOKENIZER_FILES
    base = BaseModel.pull(backbone.name, backbone.revision, files, **hub)
    check_text_tower(base)
    model: Any = base.load(_WHOLE[base.model_type], base.whole_config())
    try:
        with LOADING:
            tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - tokenizers raise anything for files that are missing or damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{backbone.name}: its text tower cannot be loaded ({reason}).") from error
    model.vision_model = None  # the backbone is there already
    return model.to(backbone.device), tokenizer


def check_text_tower(base: BaseModel) -> None:
    """Raise `AdapterError` where a base model is of a type without a text tower that makes heads."""
    if base.model_type not in _WHOLE:
        raise AdapterError(
            f"{base.name}: is a {base.model_type} model without a text tower, and only CLIP and SigLIP, published "
            "whole, make heads of class names. Use adapters that have heads, or name the whole model as the base."
        )


def _token_ids(tokenizer: Any, texts: list[str]) -> list[set[int]]:
    return [set(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def _embed(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Texts to their embeddings, of length 1, float32 on the CPU: (N, P)."""
    longest = model.config.text_config.max_position_embeddings
    # SigLIP was trained on texts of full length
    padding = "max_length" if model.config.model_type == "siglip" else True
    parts = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = texts[start : start + _TEXTS_AT_ONCE]
        tokens = tokenizer(part, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
        parts.append(model.get_text_features(**tokens.to(model.device)).pooler_output)
    return F.normalize(torch.cat(parts), dim=-1).cpu()
