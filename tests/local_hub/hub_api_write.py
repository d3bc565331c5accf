"""The endpoints of the local Hub that change something: repos, LFS, commits, branches, collections."""

import base64
import hashlib
import json

from hub_answers import Answer, Request, fail, json_answer
from hub_api import FILES, REPO, paged, readable, route
from hub_store import File, Repo, is_lfs


KINDS = {None: "models", "model": "models", "dataset": "datasets"}
COLLECTION = "/api/collections/(?P<slug>[^/]+/[^/]+)"


def logged_in(request: Request) -> str:
    if request.user is None:
        fail(401, None, "Invalid username or password.")
    return request.user


def writable(hub, request: Request, groups: dict[str, str]) -> Repo:
    """The repo, if this token may write to it."""
    repo = readable(hub, request, groups)
    if not hub.may_write(logged_in(request), repo.id):
        fail(403, None, f"You have read access but not the required permissions for {repo.id}")
    return repo


def named(request: Request) -> dict[str, str]:
    """Kind and id of the repo that a body names."""
    body = request.json()
    owner = body.get("organization") or logged_in(request)
    return {"kind": KINDS[body.get("type")], "id": f"{owner}/{body['name']}"}


@route("POST", "/api/repos/create")
def create_repo(hub, request, groups):
    user, groups = logged_in(request), named(request)
    kind, repo_id = groups["kind"], groups["id"]
    if not hub.may_write(user, repo_id):
        fail(403, None, f"You don't have the rights to create a repo under the namespace {repo_id.split('/')[0]}")
    old = hub.repos.get((kind, repo_id))
    repo = old or hub.new_repo(kind, repo_id, user)
    told = {"url": f"{hub.endpoint}/{repo.prefix}{repo_id}", "name": repo_id, "id": repo_id}
    if old is not None:
        return json_answer(told | {"error": f"You already created this {kind[:-1]} repo: {repo_id}"}, status=409)
    body = request.json()
    repo.private = body.get("private") is True or body.get("visibility") == "private"
    return json_answer(told)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub, request, groups):
    repo = writable(hub, request, named(request))
    del hub.repos[repo.kind, repo.id]
    return json_answer({})


@route("PUT", f"{REPO}/settings")
def settings(hub, request, groups):
    repo, body = writable(hub, request, groups), request.json()
    if "gated" in body:
        repo.gated = body["gated"]
    if "visibility" in body:
        repo.private = body["visibility"] == "private"
    return json_answer({})


@route("POST", f"{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(hub, request, groups):
    """Which files go through LFS, and what the repo has at their paths."""
    commit = writable(hub, request, groups).resolve(groups["revision"])
    told = []
    for file in request.json()["files"]:
        lfs = is_lfs(file["path"], base64.b64decode(file["sample"]), file["size"])
        one = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        old = commit.files.get(file["path"])
        told.append(one | ({"oid": old.etag} if old else {}))
    return json_answer({"files": told})


@route("POST", rf"{FILES}\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, groups):
    """Where to send the objects that the repo does not have."""
    repo = writable(hub, request, groups)
    objects = []
    for one in request.json()["objects"]:
        told = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] not in repo.lfs:
            where = f"{hub.endpoint}/lfs/{repo.prefix}{repo.id}/{one['oid']}"
            told["actions"] = {"upload": {"href": where, "header": {}}}
        objects.append(told)
    return json_answer({"transfer": "basic", "objects": objects})


@route("PUT", f"/lfs{FILES}/(?P<oid>[0-9a-f]{{64}})")
def lfs_put(hub, request, groups):
    """Keep an object whose content has the hash that was announced. The address itself is the permission."""
    repo = hub.repos.get((groups.get("kind", "models"), groups["id"]))
    if repo is None:
        fail(403, None, "Access denied")
    if hashlib.sha256(request.body).hexdigest() != groups["oid"]:
        fail(400, None, "The SHA-256 you specified did not match the received content")
    repo.lfs[groups["oid"]] = request.body
    return Answer(200, b"")


@route("POST", f"{REPO}/commit/(?P<revision>[^/]+)")
def commit(hub, request, groups):
    """All operations or none. `create_pr` leaves the branch alone and opens `refs/pr/<n>`."""
    repo = writable(hub, request, groups)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    header = next(line["value"] for line in lines if line["key"] == "header")
    parent = repo.resolve(groups["revision"])
    ref = repo.ref(groups["revision"])
    if ref is None:
        fail(404, "RevisionNotFound", f"{groups['revision']} is not a branch")
    told = header.get("parentCommit")
    if told and not parent.sha.startswith(told):
        fail(412, None, "A commit has happened since. Please refresh and try again.")
    changes = {}
    for line in lines:
        changes |= change(repo, parent, line["key"], line["value"])
    number = None
    if request.flag("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref = f"refs/pr/{number}"
        repo.refs[ref] = parent.sha
    made = repo.commit(changes, header["summary"], request.user, hub.tick(), ref, header.get("description", ""))
    url = f"{hub.endpoint}/{repo.prefix}{repo.id}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}", "hookOutput": ""}
    return json_answer(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}))


def change(repo: Repo, parent, key: str, value: dict) -> dict[str, File | None]:
    """Path to new file (None: gone) of one line of a commit."""
    path = value.get("path", "")
    if key != "header" and (path.startswith("/") or {"..", ".", ""} & set(path.rstrip("/").split("/"))):
        fail(400, None, f"Invalid path in repo: {path!r}")
    if key == "file":
        return {path: File.of(base64.b64decode(value["content"]), False)}
    if key == "lfsFile":
        if value["oid"] not in repo.lfs:
            fail(400, None, f"LFS pointer pointed to a file that does not exist: {path} ({value['oid']})")
        return {path: File.of(repo.lfs[value["oid"]], True)}
    if key == "deletedFile":
        if path not in parent.files:
            fail(404, "EntryNotFound", f"A file to delete does not exist: {path}")
        return {path: None}
    if key == "deletedFolder":
        return {name: None for name in parent.files if name.startswith(f"{path.rstrip('/')}/")}
    return {}


@route("POST", f"{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(hub, request, groups):
    repo = writable(hub, request, groups)
    body = json.loads(request.body or b"{}")
    return add_ref(repo, f"refs/heads/{groups['branch']}", body.get("startingPoint") or "main")


@route("POST", f"{REPO}/tag/(?P<revision>[^/]+)")
def create_tag(hub, request, groups):
    repo = writable(hub, request, groups)
    return add_ref(repo, f"refs/tags/{request.json()['tag']}", groups["revision"])


def add_ref(repo: Repo, ref: str, revision: str) -> Answer:
    if ref in repo.refs:
        fail(409, None, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.resolve(revision).sha
    return json_answer({})


@route("DELETE", f"{REPO}/(?P<what>branch|tag)/(?P<name>[^/]+)")
def delete_ref(hub, request, groups):
    repo = writable(hub, request, groups)
    ref = ("refs/heads/" if groups["what"] == "branch" else "refs/tags/") + groups["name"]
    if ref not in repo.refs:
        fail(404, "RevisionNotFound", f"Reference does not exist: {ref}")
    del repo.refs[ref]
    return json_answer({})


@route("POST", "/api/collections")
def create_collection(hub, request, groups):
    user, body = logged_in(request), request.json()
    if not hub.may_write(user, body["namespace"] + "/"):
        fail(403, None, f"You don't have the rights to write to {body['namespace']}")
    name = "-".join(body["title"].lower().split())
    slug = f"{body['namespace']}/{name}-{hashlib.sha1(name.encode()).hexdigest()[:24]}"
    if slug in hub.collections:
        return json_answer({"error": "This collection already exists", "slug": slug}, status=409)
    told = {key: body[key] for key in ("title", "description", "private") if key in body}
    hub.collections[slug] = {
        "private": False,
        "slug": slug,
        "owner": {"name": body["namespace"]},
        "items": [],
        "lastUpdated": hub.tick(),
        "position": len(hub.collections),
        "theme": "green",
        "upvotes": 0,
    } | told
    return json_answer(hub.collections[slug])


def visible_collection(hub, request: Request, slug: str) -> dict:
    found = hub.collections.get(slug)
    if found is None or (found["private"] and not hub.may_write(request.user, slug)):
        fail(404, None, f"Collection not found: {slug}")
    return found


@route("GET", COLLECTION)
def get_collection(hub, request, groups):
    return json_answer(visible_collection(hub, request, groups["slug"]))


@route("GET", "/api/collections")
def list_collections(hub, request, groups):
    owners = request.query.get("owner", [])
    shown = [one for one in hub.collections.values() if not one["private"] or hub.may_write(request.user, one["slug"])]
    shown = [one for one in shown if not owners or one["owner"]["name"] in owners]
    return paged(hub, request, [{key: one[key] for key in one if key != "position"} for one in shown])


@route("POST", f"{COLLECTION}/items")
def add_collection_item(hub, request, groups):
    collection, body = visible_collection(hub, request, groups["slug"]), request.json()
    if not hub.may_write(logged_in(request), groups["slug"]):
        fail(403, None, f"You don't have the rights to write to {groups['slug']}")
    item = {"id": body["item"]["id"], "type": body["item"]["type"]}
    if any(item.items() <= old.items() for old in collection["items"]):
        fail(409, None, f"{item['id']} is already in the collection")
    if item["type"] in KINDS:
        readable(hub, request, {"kind": KINDS[item["type"]], "id": item["id"]})
    note = {"note": {"text": body["note"]}} if body.get("note") else {}
    position = len(collection["items"])
    collection["items"].append(item | {"_id": f"{position:024x}", "position": position} | note)
    return json_answer(collection)
