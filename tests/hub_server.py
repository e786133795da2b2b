"""A small Hub on loopback: just enough of the HTTP interface that the real huggingface_hub client pushes and pulls.

Repositories are dictionaries {path: bytes} in memory; every commit makes a new revision.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_for_tests_only"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}  # "org/name" -> [{path: bytes}, ...], one per commit
        self.branches = {}  # (repository, branch) -> number of its newest commit
        self.private = {}  # repository -> as it was asked for
        self.blobs = {}  # sha256 of an LFS file -> bytes
        self.requests = []
        self.quota = None  # bytes of LFS files that there is room for
        self.spoils = False  # whether it keeps something else than it was sent
        self.cuts = 0  # uploads that are still to be broken off in the middle

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


def commit_id(number):
    return hashlib.sha1(f"commit {number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content=None, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer({"error": message}, status, **{"X_Error_Code": code, "X_Error_Message": message})

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def route(self):
        path = unquote(urlsplit(self.path).path)
        if self.command == "PUT" and self.server.cuts:
            self.server.cuts -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.close()
            self.close_connection = True
            return None
        content = self.body()  # read in any case, so that the connection stays usable
        self.server.requests.append((self.command, path))
        for method, pattern, handle in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                token = self.headers.get("Authorization")
                if token not in (None, f"Bearer {TOKEN}") or ("POST" in method and not token):
                    return self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
                return handle(self, content, **match.groupdict())
        return self.refuse(404, "EntryNotFound", f"no such address: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815  (the names that http.server calls)

    def files(self, repo, revision):
        """The files of a revision and its commit id, or None after an error has been answered."""
        commits = self.server.repositories.get(repo)
        hidden = self.server.private.get(repo) and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if commits is None or hidden:
            self.refuse(404, "RepoNotFound", f"repository {repo} not found")
            return None
        ids = [commit_id(number) for number in range(len(commits))]
        revision = unquote(revision)
        if (repo, revision) in self.server.branches:
            revision = ids[self.server.branches[repo, revision]]
        if revision == "main":
            newest = self.server.branches.get((repo, "main"), 0)
            return commits[newest], ids[newest]
        if revision in ids:
            return commits[ids.index(revision)], revision
        self.refuse(404, "RevisionNotFound", f"revision {revision} not found")
        return None


def create(self, content):
    wanted = json.loads(content)
    repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
    if repo in self.server.repositories:
        return self.answer({"url": f"{self.server.url}/{repo}", "error": "exists"}, 409)
    self.server.repositories[repo] = [{}]
    self.server.private[repo] = wanted.get("private") or wanted.get("visibility") == "private"
    return self.answer({"url": f"{self.server.url}/{repo}", "name": repo})


def validate_yaml(self, content):
    metadata = json.loads(content)["content"].split("---")[1]
    errors = [] if "license_name" not in metadata or "license:" in metadata else [{"message": "license is missing"}]
    return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def preupload(self, content, repo, revision):
    files = json.loads(content)["files"]
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }
        for file in files
    ]
    return self.answer({"files": modes})


def lfs_batch(self, content, repo):
    wanted = json.loads(content)["objects"]
    if self.server.quota is not None and sum(item["size"] for item in wanted) > self.server.quota:
        return self.refuse(403, "Forbidden", "Storage quota exceeded.")
    objects = [
        {"oid": item["oid"], "size": item["size"]}
        | (
            {}  # it is here already
            if item["oid"] in self.server.blobs
            else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}}}
        )
        for item in wanted
    ]
    return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")


def lfs_put(self, content, oid):
    if hashlib.sha256(content).hexdigest() != oid:
        return self.refuse(400, "BadRequest", "checksum differs")
    self.server.blobs[oid] = content if not self.server.spoils else content[:-1] + bytes([content[-1] ^ 1])
    return self.answer()


def commit(self, content, repo, revision):
    found = self.files(repo, revision)
    if found is None:
        return None
    files = dict(found[0])
    for line in content.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            files[value["path"]] = self.server.blobs[value["oid"]]
        elif operation["key"] == "deletedFile":
            files.pop(value["path"], None)
    number = len(self.server.repositories[repo])
    self.server.repositories[repo].append(files)
    oid = commit_id(number)
    made = {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
    if "create_pr=1" in urlsplit(self.path).query:
        revision = "refs/pr/1"
        made["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/1"
    self.server.branches[repo, unquote(revision)] = number
    return self.answer(made)


def branch(self, content, repo, revision):
    if (repo, revision) in self.server.branches:
        return self.refuse(409, "Conflict", "Reference already exists")
    self.server.branches[repo, revision] = len(self.server.repositories[repo]) - 1
    return self.answer()


def info(self, content, repo, revision="main"):
    found = self.files(repo, revision)
    if found is None:
        return None
    files, oid = found
    return self.answer(
        {
            "id": repo,
            "modelId": repo,
            "sha": oid,
            "private": bool(self.server.private.get(repo)),
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        | {"siblings": [{"rfilename": path} for path in sorted(files)]}
    )


def tree(self, content, repo, revision, path=""):
    found = self.files(repo, revision)
    if found is None:
        return None
    return self.answer(
        [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in sorted(found[0].items())
        ]
    )


def resolve(self, content, repo, revision, path):
    found = self.files(repo, revision)
    if found is None:
        return None
    files, oid = found
    if path not in files:
        return self.refuse(404, "EntryNotFound", f"{path} is not in {repo}")
    data = files[path]
    headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
    headers["Content_Length"] = len(data)
    return self.answer(data, **headers)


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>refs/pr/[0-9]+|[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", create),
    (("POST",), r"/api/validate-yaml", validate_yaml),
    (("POST",), rf"/api/models/{REPO}/preupload/{REVISION}", preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    (("POST",), rf"/api/models/{REPO}/branch/{REVISION}", branch),
    (("POST",), rf"/api/models/{REPO}/commit/{REVISION}", commit),
    (("GET", "HEAD"), rf"/api/models/{REPO}", info),
    (("GET", "HEAD"), rf"/api/models/{REPO}/revision/{REVISION}", info),
    (("GET", "HEAD"), rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.*))?", tree),
    (("GET", "HEAD"), rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
]


@contextmanager
def running_hub():
    """A Hub on a free loopback port, with the environment in which a process talks to it and to nothing else."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # plain LFS over HTTP
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        yield hub, environment
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
