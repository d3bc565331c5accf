"""A private cache, a Hub of our own, one thread, and tiny models that every test may read but none may change.

Each process of the tests (`-n`) has its own of all these.
"""

import os
import tempfile

from hub_server import OWNER_TOKEN, HubServer


HUB_SERVER = HubServer()

# before huggingface is imported: it reads these once
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lora-recycle-tests-")
os.environ["HF_ENDPOINT"] = HUB_SERVER.endpoint
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process: several tests run side by side
for _name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(_name, None)
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)

import contextlib  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import huggingface_hub  # noqa: E402
import hypothesis  # noqa: E402
import peft  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from helpers_tiny import TINY_LAYERS, GivenImages, save_tiny_adapter, save_tiny_backbone, toy_images  # noqa: E402

from lora_recycle.backbones.backbone import Backbone  # noqa: E402
from lora_recycle.cli.main import main  # noqa: E402
from lora_recycle.distillation.config import DistillationConfig  # noqa: E402
from lora_recycle.distillation.trainer import MetaLoRATrainer  # noqa: E402
from lora_recycle.hub import download  # noqa: E402
from lora_recycle.inversion.config import InversionConfig  # noqa: E402
from lora_recycle.pool.pool import AdapterPool  # noqa: E402


hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, max_examples=25, deadline=None)
hypothesis.settings.load_profile("repeatable")


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # the others fill the gaps that these leave at the end


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)  # of each process of the tests, their first one too


@pytest.fixture(scope="session", autouse=True)
def only_this_machine():
    """No name but this machine's is looked up: `datasets` asks for a host of its own beside `HF_ENDPOINT`."""
    known, look_up = {"", "127.0.0.1", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()}, socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host or ""
        if name not in known:
            raise socket.gaierror(f"tests do not reach {name}")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture
def hub(monkeypatch):
    """An empty local Hub, to which all clients of this test lead, with an empty cache. See `hub_server.Hub`."""
    for folder in ("hub", "datasets"):
        shutil.rmtree(Path(os.environ["HF_HOME"], folder), ignore_errors=True)
    huggingface_hub.HfFileSystem.clear_instance_cache()  # it remembers listings
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    no_wait = SimpleNamespace(sleep=lambda seconds: None)
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download, download):
        monkeypatch.setattr(module, "time", no_wait)
    hub = HUB_SERVER.new_hub()
    yield hub
    HUB_SERVER.new_hub()
    assert not hub.problems, "\n".join(hub.problems)


@pytest.fixture
def file_size_limit():
    """The system refuses to write beyond so many bytes of any file, as a quota does."""

    @contextlib.contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_backbone_path(tmp_path_factory):
    """Folder of a random `ViTModel` (32 wide, 2 layers, 32x32 pixels, patches of 8) and its image processor."""
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny-vit")


@pytest.fixture(scope="session")
def toy_data():
    """8 classes of 20 images, each class a colour with noise."""
    return toy_images()


@pytest.fixture(scope="session")
def tiny_pool_path(tmp_path_factory, tiny_backbone_path, toy_data):
    """Four adapters of 4 classes each, none of them trained: LoRA, LoRA on q and v only, DoRA, LoHa."""
    folder = tmp_path_factory.mktemp("pool")
    layers = {"target_modules": TINY_LAYERS, "modules_to_save": ["classifier"], "r": 4}
    configs = [
        peft.LoraConfig(lora_alpha=8, **layers),
        peft.LoraConfig(lora_alpha=8, **{**layers, "target_modules": ["q_proj", "v_proj"]}),
        peft.LoraConfig(lora_alpha=8, use_dora=True, **layers),
        peft.LoHaConfig(alpha=8, **layers),
    ]
    for task, config in enumerate(configs):
        classes = list(range(task, task + 4))
        save_tiny_adapter(folder / f"adapter-{task}", tiny_backbone_path, toy_data, classes, config, seed=task)
    return folder


@pytest.fixture(scope="session")
def tiny_pool(tiny_pool_path):
    """Its adapters stay in memory: to read a DoRA again takes longer than most of what is done with it."""
    stored = AdapterPool.from_pretrained(tiny_pool_path)
    return AdapterPool(stored.backbone, list(stored))


@pytest.fixture(scope="session")
def tiny_surrogate(tmp_path_factory, tiny_pool):
    """Surrogate data of `tiny_pool`, none of it optimised: 6 images of each class, half of the patches kept."""
    config = InversionConfig(images_per_class=6, iterations=5, keep_ratio=0.5, jitter=0)
    return GivenImages(tiny_pool, config).run(tmp_path_factory.mktemp("surrogate"), progress=False)


def files_with_license(folder, license):
    """The files of an adapter folder with a card that states a licence (None: states none)."""
    stated = f"license: {license}\n" if license else ""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names} | {"README.md": f"---\n{stated}---\n# An adapter\n"}


@pytest.fixture
def make_model(hub, tiny_backbone_path, tiny_pool_path, tiny_surrogate):
    """Makes a meta-LoRA of org/adapter-0 and -1 for org/tiny-vit, all on the Hub; `licenses` are the adapters'."""

    def make(licenses=("apache-2.0", "apache-2.0"), surrogate=tiny_surrogate, **config):
        if not hub.exists("org/tiny-vit"):
            hub.put("org/tiny-vit", tiny_backbone_path)
        for i, license in enumerate(licenses):
            hub.put(f"org/adapter-{i}", files_with_license(tiny_pool_path / f"adapter-{i}", license))
        backbone = Backbone.from_pretrained("org/tiny-vit")
        backbone.revision = hub.repo("org/tiny-vit").resolve("main").sha
        pool = AdapterPool.from_pretrained([f"org/adapter-{i}" for i in range(len(licenses))], backbone=backbone)
        settings = DistillationConfig(**{"steps": 0, "rank": 4, **config})
        return MetaLoRATrainer(pool, surrogate, settings).to_model()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def launched_with_bf16(monkeypatch):
    """What `accelerate launch --mixed_precision bf16` leaves in the environment of its processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(capsys):
    """Runs one command: exit code, stdout and stderr."""

    def command(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command
