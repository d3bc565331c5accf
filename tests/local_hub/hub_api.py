"""The endpoints of the local Hub that read; `hub_api_write` has those that change something."""

import re
from typing import NamedTuple
from urllib.parse import quote, unquote, urlencode

from hub_answers import Answer, Request, fail, file_answer, json_answer
from hub_cards import complaints, repo_info
from hub_store import Commit, Repo


class Route(NamedTuple):
    method: str
    path: re.Pattern
    answer: object


#: In the order of trial: the short paths that another would swallow come last.
ROUTES: list[Route] = []
ID = r"(?P<id>[^/]+(?:/[^/]+)??)"
REPO = rf"/api/(?P<kind>models|datasets)/{ID}"
FILES = rf"/(?:(?P<kind>datasets)/)?{ID}"


def route(method: str, path: str):
    """Register a function of (hub, request, named groups of the path) -> `Answer`."""

    def register(function):
        ROUTES.append(Route(method, re.compile(path), function))
        return function

    return register


def dispatch(hub, request: Request) -> Answer | None:
    """The answer of the first route that fits; None if the path is unknown. Groups are unquoted one by one."""
    method = "GET" if request.method == "HEAD" else request.method
    for known in ROUTES:
        match = known.path.fullmatch(request.raw_path)
        if known.method == method and match:
            groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            return known.answer(hub, request, groups)
    return None


def readable(hub, request: Request, groups: dict[str, str]) -> Repo:
    """The repo, if this token may see it. A repo that is hidden looks like one that does not exist."""
    repo = hub.repos.get((groups.get("kind", "models"), groups["id"]))
    if repo is None or (repo.private and not hub.may_write(request.user, repo.id)):
        fail(404 if request.user else 401, "RepoNotFound", "Repository not found")
    return repo


def downloadable(hub, request: Request, groups: dict[str, str]) -> Repo:
    """The repo, if this token may download its files. What a gated repo holds may be listed by all."""
    repo = readable(hub, request, groups)
    if repo.gated and not hub.may_write(request.user, repo.id):
        wanted = "You must be authenticated" if request.user is None else "Your request is not approved"
        fail(403 if request.user else 401, "GatedRepo", f"Access to {repo.id} is restricted. {wanted}.")
    return repo


@route("GET", "/api/whoami-v2")
def whoami(hub, request, groups):
    if request.user is None:
        fail(401, None, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return json_answer({"type": "user", "id": request.user, "name": request.user, "orgs": [], "auth": token})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request, groups):
    body = request.json()
    errors, warnings = complaints(body["content"], body["repoType"])
    told = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return json_answer(told, status=400 if errors else 200)


@route("GET", f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub, request, groups):
    """A plain file, or the way to an LFS file: another address, with its hash and size in the headers."""
    repo = downloadable(hub, request, groups)
    commit = repo.resolve(groups["revision"])
    file = commit.files.get(groups["path"])
    headers = {"X-Repo-Commit": commit.sha}
    if file is None:
        fail(404, "EntryNotFound", "Entry not found", **headers)
    if not file.lfs:
        return file_answer(request, file.data, headers | {"ETag": f'"{file.etag}"'})
    where = f"{hub.cdn}/cdn/{repo.prefix}{repo.id}/{file.sha256}/{quote(groups['path'])}"
    headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data)), "Location": where}
    return Answer(302, b"", headers)


@route("GET", f"/cdn{FILES}/(?P<oid>[0-9a-f]{{64}})/.+")
def cdn(hub, request, groups):
    """An LFS object. Who knows its address may have it, as with the signed addresses of the real one."""
    repo = hub.repos.get((groups.get("kind", "models"), groups["id"]))
    if repo is None or groups["oid"] not in repo.lfs:
        fail(403, None, "Access denied")
    return file_answer(request, repo.lfs[groups["oid"]], {"ETag": f'"{groups["oid"]}"'})


@route("GET", f"{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(hub, request, groups):
    repo = readable(hub, request, groups)
    commit = repo.resolve(groups["revision"])
    top = groups.get("path", "").rstrip("/")
    inside = f"{top}/" if top else ""
    below = [path.removeprefix(inside) for path in commit.files if path.startswith(inside)]
    if top and not below:
        fail(404, "EntryNotFound", f"{top} does not exist on {groups['revision']}", **{"X-Repo-Commit": commit.sha})
    parts = {name for path in below for name in parents(path)} | set(below)
    shown = sorted(parts if request.flag("recursive") else {path.split("/")[0] for path in below})
    entries = [entry(repo, commit, inside + path, request.flag("expand")) for path in shown]
    return paged(hub, request, entries)


def parents(path: str) -> list[str]:
    """`a`, `a/b` of `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict:
    """A file or folder as the tree and paths-info tell it."""
    file = commit.files.get(path)
    told = {"type": "directory", "path": path, "size": 0, "oid": commit.sha}
    if file is not None:
        size = repo.claimed_sizes.get(path, len(file.data))
        told = {"type": "file", "path": path, "size": size, "oid": file.oid} | file.lfs_info("oid")
    if expand:
        changed = repo.last_change(path, commit)
        told["lastCommit"] = {"id": changed.sha, "title": changed.title, "date": changed.date}
    return told


def paged(hub, request: Request, items: list) -> Answer:
    """`hub.page_size` items (fewer if the request has a `limit`) and a Link header to the next page."""
    start = int(request.query.get("cursor", ["0"])[0])
    size = min(hub.page_size, int(request.query.get("limit", [hub.page_size])[0]))
    headers = {}
    if start + size < len(items):
        query = urlencode(request.query | {"cursor": [str(start + size)]}, doseq=True)
        headers["Link"] = f'<{hub.endpoint}{request.raw_path}?{query}>; rel="next"'
    return json_answer(items[start : start + size], headers=headers)


@route("POST", f"{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub, request, groups):
    repo = readable(hub, request, groups)
    commit = repo.resolve(groups["revision"])
    known = set(commit.files) | {name for path in commit.files for name in parents(path)}
    form = request.form()
    expand = form.get("expand", ["false"])[0].lower() == "true"
    paths = [path.rstrip("/") for path in form.get("paths", [])]
    return json_answer([entry(repo, commit, path, expand) for path in paths if path in known])


@route("GET", f"{REPO}/refs")
def refs(hub, request, groups):
    repo = readable(hub, request, groups)
    told = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    keys = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, sha in repo.refs.items():
        prefix = next(prefix for prefix in keys if ref.startswith(prefix))
        told[keys[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
    return json_answer(told)


@route("GET", f"{REPO}/commits/(?P<revision>[^/]+)")
def commits(hub, request, groups):
    repo = readable(hub, request, groups)
    return paged(
        hub,
        request,
        [
            {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repo.history(repo.resolve(groups["revision"]))
        ],
    )


@route("GET", f"{REPO}/auth-check")
def auth_check(hub, request, groups):
    downloadable(hub, request, groups)
    return json_answer({})


@route("GET", "/api/(?P<kind>models|datasets)")
def search(hub, request, groups):
    """Repos that this token may see, newest first, by `filter` (every tag), `search`, `author`, `pipeline_tag`."""
    found = []
    for (kind, repo_id), repo in hub.repos.items():
        if kind != groups["kind"] or (repo.private and not hub.may_write(request.user, repo_id)):
            continue
        info = repo_info(repo, repo.resolve("main"))
        if matches(info, request.query):
            found.append(info)
    found.sort(key=lambda info: info["lastModified"], reverse=True)
    hidden = set() if request.flag("full") else {"sha", "lastModified", "siblings", "gated", "author"}
    hidden |= set() if request.flag("cardData") else {"cardData"}
    hidden |= set() if request.flag("config") else {"config"}
    return paged(hub, request, [trimmed(info, request, hidden) for info in found])


def matches(info: dict, query: dict[str, list[str]]) -> bool:
    wanted = set(query.get("filter", [])) | set(query.get("pipeline_tag", []))
    return (
        wanted <= set(info["tags"])
        and all(text.lower() in info["id"].lower() for text in query.get("search", []))
        and all(author == info["author"] for author in query.get("author", []))
    )


def trimmed(info: dict, request: Request, hidden: set[str] = frozenset()) -> dict:
    """Without the hidden fields; or, if the request names fields with `expand`, only those."""
    asked = request.query.get("expand", [])
    if asked:
        return {key: value for key, value in info.items() if key in {*asked, "_id", "id"}}
    return {key: value for key, value in info.items() if key not in hidden}


@route("GET", f"{REPO}/revision/(?P<revision>[^/]+)")
def info_at(hub, request, groups):
    repo = readable(hub, request, groups)
    return json_answer(trimmed(repo_info(repo, repo.resolve(groups["revision"]), request.flag("blobs")), request))


@route("GET", REPO)
def info(hub, request, groups):
    return info_at(hub, request, groups | {"revision": "main"})
