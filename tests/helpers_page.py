"""A client of the page that sends what it likes."""

import json

import httpx


META = {"_type": "gradio.FileData"}


class Visitor:
    """One visitor, by the name of a session."""

    def __init__(self, served, name="v"):
        self.name, self.inputs = name, {fn.name: len(fn.inputs) for fn in served.page.fns.values()}
        self.number = {fn.name: number for number, fn in reversed(served.page.fns.items())}
        self.client = httpx.Client(base_url=served.url, timeout=120)

    def upload(self, path):
        with open(path, "rb") as file:
            (place,) = self.client.post("/gradio_api/upload", files={"files": file}).raise_for_status().json()
        return place

    def event(self, queries, classes, function="classify"):
        """The body of a click: queries and the images of classes, by name, in Gradio's own form."""
        slots = self.inputs["classify"] // 2 - 1
        empty = slots - len(classes)
        images = [*classes.values(), *[None] * empty]
        data = [None, *classes, *[""] * empty, *images]
        return {
            "data": [queries, *data] if function == "classify" else data,
            "fn_index": self.number[function],
            "session_hash": self.name,
        }

    def join(self, event, **options):
        return self.client.post("/gradio_api/queue/join", json=event, **options)

    def result(self):
        """What the page sends when the event is over."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    return message["output"]


def image(path, **more):
    return {"image": {"path": path, **more}, "caption": None}
