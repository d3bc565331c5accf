"""Licences: read from the cards of the source adapters, stated on the card of what is made of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.untrusted_files import path_inside
from .card_files import read_card
from .markdown import code
from .repo_files import CARD_FILE


#: Identifiers that the Hub takes in a card's header, as its documentation lists them
#: (huggingface.co/docs/hub/repositories-licenses, August 2026); it refuses every other.
_HUB_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other
    pddl postgresql unknown unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_HUB_LICENSES.split())
_NAME = re.compile(r"[\w.+-]{1,60}")


def read_license(folder: Path) -> str | None:
    """The licence that the card in `folder` states, by its name where it is `other`; None where it states none.

    Lower case, as the Hub writes them; several are joined by `+`. A card that cannot be read states none: anyone may
    have written it.
    """
    try:
        path = path_inside(folder, CARD_FILE)
        data = {} if path is None else read_card(path).metadata
    except (OSError, ValueError):
        return None
    stated = data.get("license")
    if stated == "other":
        stated = data.get("license_name") or stated
    names = stated if isinstance(stated, list) else [stated]
    return "+".join(sorted(n.lower() for n in names if isinstance(n, str) and _NAME.fullmatch(n))) or None


def inherited_license(stated: Sequence[str | None]) -> tuple[dict[str, Any], str]:
    """Header fields and one sentence for what is made of sources that state these licences (None: states none)."""
    counts = Counter(stated)
    named = sorted(name for name in counts if name)
    if not named:
        return {}, "No source adapter states a licence, so this card states none."
    if len(counts) == 1:
        fields = {"license": named[0]} if named[0] in HUB_LICENSES else {"license": "other", "license_name": named[0]}
        return fields, f"All source adapters are under {code(named[0])}, and so is this."
    mix = ", ".join(f"{code(name)} ({counts[name]})" for name in named)
    silent = f", none stated ({counts[None]})" if counts[None] else ""
    sentence = f"The source adapters have different licences: {mix}{silent}. Comply with all of them."
    return {"license": "other", "license_name": "mixed"}, sentence
