"""The page itself, in Gradio: where things stand and what happens on a click. The work is `session`'s."""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import webbrowser
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..adapters.sources import one_id
from ..errors import ConfigError, DataError, LoRARecycleError
from ..fewshot.domains import SHARED
from ..hub.markdown import code
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..runtime.terminal import counted
from .answers import STYLE, answers_html
from .models import ServedModels
from .session import FewShotSession
from .uploads import is_upload, upload_folder, without_folder


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is to leave this machine
try:
    import gradio as gr
    from gradio.processing_utils import save_bytes_to_cache
    from starlette.middleware import Middleware

    from .guard import Guard
except ImportError as error:
    raise ConfigError(f"The page needs Gradio ({error}). Install it: pip install 'lora-recycle[app]'") from error


MAX_CLASSES = 20
MAX_WAITING = 50  # visitors whose turn has not come
MAX_FILE_BYTES = 50 * 1024**2
ZIP_NAME = "fitted_task.zip"
_START = 2  # classes shown at first
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CSS = (
    STYLE
    + """
.gradio-container { max-width: 64rem !important; margin: 0 auto !important; }
.classes { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.drop-zone .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)) !important; }
button:focus-visible, a:focus-visible, input:focus-visible, textarea:focus-visible {
  outline: 3px solid var(--body-text-color) !important; outline-offset: 2px; }
footer { display: none !important; }
"""
)
# All drop zones would be called alike by screen readers, and answers would come unheard.
_NAMES_FOR_READERS = """() => {
  const name = () => document.querySelectorAll('.drop-zone').forEach((zone) => {
    const label = zone.querySelector('[data-testid="block-label"]')?.textContent.trim();
    zone.querySelectorAll('button[aria-dropeffect]').forEach((button) => {
      const text = `${label}: choose or drop files`;
      if (label && button.getAttribute('aria-label') !== text) button.setAttribute('aria-label', text);
    });
  });
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  document.getElementById('answers').setAttribute('aria-live', 'polite');
  name();
}"""
_INTRO = """# Few-shot image classification
Show a few images of each class, then new ones. The model learns them in one forward pass; nothing is tuned.
"""


def build_page(model: str = "demo", *, device: Any = None, folders: bool = True) -> gr.Blocks:
    """The page, with a meta-LoRA loaded.

    Args:
        model: folder or repo id (`org/name@revision`) of the meta-LoRA to begin with.
        folders: whether visitors may name folders of this machine, or only repo ids.

    Raises:
        LoRARecycleError: it cannot be loaded.
    """
    upload_folder()  # before Gradio asks where it is
    models = ServedModels(device)
    with models.use(model) as first:
        described = _about(model, first, folders)
    with gr.Blocks(title="lora_recycle", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(_INTRO)
        about = gr.Markdown(described)
        chosen = gr.State(model)
        names, images = _classes()
        gr.Markdown("## New images")
        queries = _drop_zone("New images")
        with gr.Row():
            classify = gr.Button("Classify", variant="primary")
            save = gr.Button("Save the fitted task")
        answers = gr.HTML(label="Answers", elem_id="answers")
        saved = gr.File(label="Fitted task", visible=False, interactive=False)
        with gr.Accordion("Another meta-LoRA", open=False):
            shown = model if folders or _HUB_NAME.fullmatch(model) else ""
            asked = gr.Textbox(shown, label="Repo id, or a folder" if folders else "Repo id", max_lines=1)
            choose = gr.Button("Load")
        # the model serves one visitor after the other, and nobody but the page
        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        task = [chosen, *names, *images]
        classify.click(None, None, answers, js="() => ''", api_visibility="private")  # nothing old under an error
        classify.click(_classify(models), [queries, *task], answers, **one)
        save.click(_save(models, page), task, saved, **one)
        choose.click(_choose(models, folders), asked, [chosen, about], **one)
        page.load(js=_NAMES_FOR_READERS)
        asked.submit(_choose(models, folders), asked, [chosen, about], **one)
    return page.queue(api_open=False, max_size=MAX_WAITING)


def launch(
    model: str = "demo",
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    device: Any = None,
    folders: bool | None = None,
    hosts: Sequence[str] = (),
) -> gr.Blocks:
    """Serve the page in the background, at `local_url` of what is returned, until its `close`.

    Its `block_thread` waits for Ctrl-C.

    Args:
        host: address to listen on; 127.0.0.1 is for this machine alone.
        port: None takes the first free one from 7860 on.
        folders: whether visitors may name folders of this machine; by default where `host` is for this machine alone.
        hosts: further names under which browsers reach the page, as of a proxy; others are refused.

    Raises:
        LoRARecycleError: the model cannot be loaded, or the port is taken.
    """
    page = build_page(model, device=device, folders=_is_this_machine(host) if folders is None else folders)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_CSS,
            share=False,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            max_file_size=MAX_FILE_BYTES,
            mcp_server=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(Guard, hosts=[host, *hosts])]},
        )
    except OSError as error:
        raise ConfigError(f"The page cannot listen on {host}:{port or 7860} ({error}). Try another --port.") from error
    except ValueError:  # Gradio gives its own page three seconds to answer, which a busy machine may not manage
        if not page.is_running:
            raise
    if browser:
        webbrowser.open(str(page.local_url))
    return page


def _is_this_machine(host: str) -> bool:
    """Whether nobody but this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _classes() -> tuple[list[gr.Textbox], list[gr.Gallery]]:
    """Places for classes: all are there from the start; some of them are shown."""
    gr.Markdown("## Classes")
    shown, groups, names, images, removes = gr.State(tuple(range(_START))), [], [], [], []
    with gr.Row(elem_classes="classes"):
        for number in range(1, MAX_CLASSES + 1):
            with gr.Column(visible=number <= _START, min_width=0) as group:
                names.append(gr.Textbox(label=f"Name of class {number}", placeholder=f"class {number}", max_lines=1))
                images.append(_drop_zone(f"Images of class {number}"))
                removes.append(gr.Button(f"Remove class {number}", size="sm"))
            groups.append(group)
    add = gr.Button("Add a class")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    add.click(_one_more, shown, [shown, add, *groups], **quiet)
    for place, (remove, *slot) in enumerate(zip(removes, names, images, strict=True)):
        removed = functools.partial(_one_less, place)
        remove.click(removed, shown, [shown, add, *groups, *slot], api_name=f"remove_{place}", **quiet)
    return names, images


def _one_more(shown: tuple[int, ...]) -> list[Any]:
    """The first place that is free, shown too."""
    free = [place for place in range(MAX_CLASSES) if place not in shown]
    return _places(tuple(sorted([*shown, *free[:1]])))


def _one_less(place: int, shown: tuple[int, ...]) -> list[Any]:
    """A place emptied, and hidden where more than two are left: a task needs two."""
    kept = tuple(other for other in shown if other != place)
    return [*_places(kept if len(kept) >= _START else tuple(shown)), "", None]


def _places(shown: tuple[int, ...]) -> list[Any]:
    columns = [gr.Column(visible=place in shown) for place in range(MAX_CLASSES)]
    return [shown, gr.Button(interactive=len(shown) < MAX_CLASSES), *columns]


def _drop_zone(label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        file_types=["image", ".heic", ".heif"],
        interactive=True,
        columns=4,
        height=180,
        object_fit="contain",
        buttons=[],
        elem_classes="drop-zone",
    )


def _session(model: MetaLoRAForFewShotClassification, slots: tuple[Any, ...]) -> FewShotSession:
    """The task of what stands in the places for classes; a class with images but without a name gets a number."""
    session, count = FewShotSession(model), len(slots) // 2
    for number, (name, images) in enumerate(zip(slots[:count], slots[count:], strict=True), 1):
        if (name or "").strip() or images:
            session.add_class((name or "").strip() or f"class {number}", _paths(images))
    return session


def _paths(images: list[tuple[str, str | None]] | None) -> list[str]:
    """Where the images lie. Raises `DataError`, in the same words whether or not there is a file, for no upload."""
    paths = [path for path, _ in images or []]
    if not all(map(is_upload, paths)):
        raise DataError("An image was not uploaded to this page. Drop it again.")
    return paths


def _with_reason(function: Callable) -> Callable:
    """What the user can act on appears on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (LoRARecycleError, OSError) as error:
            raise gr.Error(escape(without_folder(str(error))), print_exception=False) from error

    return wrapped


def _classify(models: ServedModels) -> Callable:
    def classify(queries: list[tuple[str, str | None]] | None, name: str, *slots: Any) -> str:
        skipped: list[str] = []
        with models.use(name) as model:
            answers = _session(model, slots).classify(_paths(queries), skipped)
            return answers_html(answers, model.backbone.patch_size, list(map(without_folder, skipped)))

    return _with_reason(classify)


def _save(models: ServedModels, page: gr.Blocks) -> Callable:
    def save(name: str, *slots: Any) -> gr.File:
        skipped: list[str] = []
        with models.use(name) as model:
            packed = _session(model, slots).save(skipped)
        for reason in skipped:
            gr.Warning(escape(f"Left out: {without_folder(reason)}"))
        return gr.File(save_bytes_to_cache(packed, ZIP_NAME, page.GRADIO_CACHE), visible=True)

    return _with_reason(save)


def _choose(models: ServedModels, folders: bool) -> Callable:
    def choose(name: str) -> tuple[str, str]:
        name = name.strip()
        if not folders and name != "demo":
            return name, _about_repo(models, name)
        with models.use(name) as model:
            return name, _about(name, model, folders)

    return _with_reason(choose)


def _about_repo(models: ServedModels, name: str) -> str:
    """Of a repo of the Hub alone. What is wrong is not said in detail: it would tell of this machine's folders."""
    repo = one_id(name).name
    if not _HUB_NAME.fullmatch(repo):
        raise DataError("Name a repo of the Hub, as in org/name.")
    try:
        if Path(repo).exists():
            raise DataError(f"{repo} lies on this machine.")
        with models.use(name) as model:
            return _about(name, model, folders=False)
    except (LoRARecycleError, OSError) as error:
        told = f"{name}: no meta-LoRA that this page can load. `lora-recycle inspect {name}` elsewhere tells why."
        raise DataError(told) from error


def _about(name: str, model: MetaLoRAForFewShotClassification, folders: bool) -> str:
    """What is in use; without `folders` only the last part of where it lies."""
    backbone, names = model.backbone, [name, model.backbone.name]
    if not folders:
        names = [name if _HUB_NAME.fullmatch(name) else Path(name).name for name in names]
    layers = counted(len(backbone.layers), "layer")
    size = f"{backbone.image_size} pixels, patches of {backbone.patch_size}, {layers}"
    domains = ", ".join(code(domain) for domain in model.domains if domain != SHARED)
    found = f" Its domains: {domains}; the examples choose." if domains else ""
    return f"In use: {code(names[0])} on {code(names[1])} ({size}), head {model.head.name}.{found}"
