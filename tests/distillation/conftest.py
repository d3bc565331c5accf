"""What the tests of training share."""

import contextlib

import pytest

from lora_recycle.distillation import trainer as trainer_module
from lora_recycle.distillation.schedule import learning_rate


@pytest.fixture
def killing(monkeypatch):
    """`with killing(step):` ends the training in it before that step, and sees to it that it was ended so."""

    @contextlib.contextmanager
    def at(killed_at):
        def kill(config, step):
            if step == killed_at:
                raise KeyboardInterrupt
            return learning_rate(config, step)

        with monkeypatch.context() as patched:
            patched.setattr(trainer_module, "learning_rate", kill)
            with pytest.raises(KeyboardInterrupt):
                yield

    return at
