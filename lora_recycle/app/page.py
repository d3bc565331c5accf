"""The page itself, in Gradio: where things stand and what happens on a click. The work is `session`'s."""

from __future__ import annotations

import functools
import os
import webbrowser
from collections.abc import Callable
from html import escape
from typing import Any

from ..adapters.sources import one_id
from ..errors import ConfigError, DataError, LoraRecycleError
from ..hub.cards import is_repo_id
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from .answers import STYLE, answers_html
from .session import FewShotSession


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is to leave this machine
try:
    import gradio as gr
    from gradio.processing_utils import save_bytes_to_cache
except ImportError as error:
    raise ConfigError(f"The page needs Gradio ({error}). Install it: pip install 'lora-recycle[app]'") from error


MAX_CLASSES = 20
MODELS_KEPT = 2  # meta-LoRAs in memory
ZIP_NAME = "fitted_task.zip"
_START = 2  # classes shown at first
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
        LoraRecycleError: it cannot be loaded.
    """
    load = functools.lru_cache(maxsize=MODELS_KEPT)(functools.partial(load_model, device=device))
    first = load(model)
    with gr.Blocks(title="lora_recycle", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(_INTRO)
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
            asked = gr.Textbox(model, label="Repo id, or a folder" if folders else "Repo id", max_lines=1)
            choose = gr.Button("Load")
            about = gr.Markdown(_about(model, first))
        # the model serves one visitor after the other, and nobody but the page
        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        task = [chosen, *names, *images]
        classify.click(_classify(load), [queries, *task], answers, **one)
        save.click(_save(load, page), task, saved, **one)
        choose.click(_choose(load, folders), asked, [chosen, about], **one)
        page.load(js=_NAMES_FOR_READERS)
        asked.submit(_choose(load, folders), asked, [chosen, about], **one)
    return page


def launch(
    model: str = "demo",
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    device: Any = None,
    folders: bool = True,
) -> gr.Blocks:
    """Serve the page in the background, at `local_url` of what is returned, until its `close`.

    Its `block_thread` waits for Ctrl-C.

    Args:
        host: address to listen on; 127.0.0.1 is for this machine alone.
        port: None takes the first free one from 7860 on.

    Raises:
        LoraRecycleError: the model cannot be loaded, or the port is taken.
    """
    page = build_page(model, device=device, folders=folders)
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
            max_file_size="50mb",
        )
    except OSError as error:
        raise ConfigError(f"The page cannot listen on {host}:{port or 7860} ({error}). Try another --port.") from error
    except ValueError:  # Gradio gives its own page three seconds to answer, which a busy machine may not manage
        if not page.is_running:
            raise
    if browser:
        webbrowser.open(str(page.local_url))
    return page


def load_model(name: str, device: Any = None) -> MetaLoRAForFewShotClassification:
    """The meta-LoRA of a folder or repo id. Raises `LoraRecycleError` where there is none."""
    repo, revision = one_id(name)
    return MetaLoRAForFewShotClassification.from_pretrained(repo, revision=revision, device=device)


def _classes() -> tuple[list[gr.Textbox], list[gr.Gallery]]:
    """Places for classes: all are there from the start, and are shown one by one."""
    gr.Markdown("## Classes")
    shown, groups, names, images = gr.State(_START), [], [], []
    with gr.Row(elem_classes="classes"):
        for number in range(1, MAX_CLASSES + 1):
            with gr.Column(visible=number <= _START, min_width=0) as group:
                names.append(gr.Textbox(label=f"Name of class {number}", placeholder=f"class {number}", max_lines=1))
                images.append(_drop_zone(f"Images of class {number}"))
            groups.append(group)
    add = gr.Button("Add a class")

    def one_more(count: int) -> list[Any]:
        places = [gr.Column(visible=number <= count) for number in range(MAX_CLASSES)]
        return [count + 1, gr.Button(interactive=count + 1 < MAX_CLASSES), *places]

    add.click(one_more, shown, [shown, add, *groups], show_progress="hidden", api_visibility="private")
    return names, images


def _drop_zone(label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        file_types=["image"],
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
    return [path for path, _ in images or []]


def _told(function: Callable) -> Callable:
    """What the user can act on appears on the page."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (LoraRecycleError, OSError) as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return wrapped


def _classify(load: Callable) -> Callable:
    def classify(queries: list[tuple[str, str | None]] | None, name: str, *slots: Any) -> str:
        model = load(name)
        return answers_html(_session(model, slots).classify(_paths(queries)), model.backbone.patch_size)

    return _told(classify)


def _save(load: Callable, page: gr.Blocks) -> Callable:
    def save(name: str, *slots: Any) -> gr.File:
        packed = _session(load(name), slots).save()
        return gr.File(save_bytes_to_cache(packed, ZIP_NAME, page.GRADIO_CACHE), visible=True)

    return _told(save)


def _choose(load: Callable, folders: bool) -> Callable:
    def choose(name: str) -> tuple[str, str]:
        name = name.strip()
        repo = one_id(name).name
        if not folders and name != "demo" and not is_repo_id(repo):
            raise DataError("Name a repo of the Hub, as in org/name.")
        return name, _about(name, load(name))

    return _told(choose)


def _about(name: str, model: MetaLoRAForFewShotClassification) -> str:
    backbone = model.backbone
    size = f"{backbone.image_size} pixels, patches of {backbone.patch_size}"
    return f"In use: `{name}` on `{backbone.name}` ({size}, {len(backbone.layers)} layers), head {model.head.name}."
