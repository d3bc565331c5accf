"""Adapters whose tensors stay in their file until they are asked for."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Iterator

from ..backbones.backbone import Backbone
from ..errors import AdapterError
from .adapter import Adapter
from .checkpoint_files import CHECKPOINT
from .checkpoints import load_checkpoint
from .heads import Head, head_problem
from .load import load_adapter
from .pull import AdapterInfo
from .weight_deltas import to_adapter


#: Backbones that an adapter is folded into just now; what another adapter changes cannot be told from them.
_CHANGED: weakref.WeakSet[Backbone] = weakref.WeakSet()


class StoredAdapter:
    """An adapter whose tensors stay in their file until they are asked for. It is checked in full when made.

    Args:
        info ([`AdapterInfo`]): from [`pull_adapter`].
        backbone ([`Backbone`]): what the adapter is read for.
        expected (`dict`): shared by the adapters of one backbone, see [`load_adapter`].

    Raises:
        AdapterError: the adapter is damaged or does not fit the backbone.
    """

    def __init__(self, info: AdapterInfo, backbone: Backbone, expected: dict):
        self.info, self.backbone, self.expected = info, backbone, expected
        self._given: Head | None = None
        adapter = self.load()
        self.info = adapter.info  # now with the generation that the model's names showed
        self.headless, self._problem = adapter.headless, head_problem(adapter.head, backbone)

    def load(self) -> Adapter:
        """Read the tensors. Raises `AdapterError` where the file changed, or the backbone wears an adapter now."""
        if self.backbone in _CHANGED:
            raise AdapterError(
                f"{self.info.where}: cannot be read while an adapter is folded into {self.backbone.name}. Take it "
                "from the pool before, or fold it itself."
            )
        if self.info.peft_type == CHECKPOINT:
            adapter = load_checkpoint(self.info, self.backbone)
        else:
            adapter = to_adapter(load_adapter(self.info, self.backbone.model, self.expected), self.backbone)
        return adapter if self._given is None else adapter.with_head(self._given)

    def with_head(self, head: Head) -> StoredAdapter:
        """The same adapter with a head that its file lacks."""
        other = copy.copy(self)
        other._given, other.headless, other._problem = head, False, head_problem(head, self.backbone)
        other.info = dataclasses.replace(self.info, prompt=head.prompt)
        return other

    def require_head(self, backbone: Backbone) -> None:
        """As of [`Adapter`], without reading the file again."""
        if self._problem:
            raise AdapterError(f"{self.info.where}: {self._problem}")


@contextlib.contextmanager
def marked_as_changed(backbone: Backbone) -> Iterator[None]:
    """While `backbone` wears an adapter no other one is read for it."""
    outer = backbone in _CHANGED
    _CHANGED.add(backbone)
    try:
        yield
    finally:
        if not outer:
            _CHANGED.discard(backbone)
