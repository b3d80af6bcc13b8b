"""A Hub on 127.0.0.1 that keeps everything in memory and speaks what the client of huggingface_hub uses.

Repositories with branches and commits, preupload, LFS batch, upload and verification, commits as ndjson, resolve with
ETag, redirect to a file store and byte ranges, tree listing, tokens and private repositories. Connections can be made
to break.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple

from support.routed_handler import Problem, RoutedHandler


USER, TOKEN = "ada", "hf_right"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Blob(NamedTuple):
    """A file of a commit; `sha256` says where the store has it, for files that are kept there."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        return {**entry, "lfs": lfs} if self.sha256 else entry


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, Blob]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        before = self.branches.get(branch, "")
        text = json.dumps([before, sorted((path, blob.oid) for path, blob in files.items()), len(self.commits)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """Run it in a `with` block; `url` is what HF_ENDPOINT has to be.

    Attributes:
        stored: files of the LFS store by sha256.
        uploads: sha256 of every file that was sent to the store, in order.
        uploads_left: after so many uploads every further one breaks off half way; None for no limit.
        broken_downloads: so many downloads from the store break off half way.
        ranges: the Range headers of the downloads from the store.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.uploads_left: int | None = None
        self.broken_downloads = 0
        self.ranges: list[str | None] = []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo]
        return {path: blob.content for path, blob in repository.commits[repository.find(revision)].items()}


class Handler(RoutedHandler):
    server: HubServer

    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", rf"/api/models/{REPO}", "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/store/(?P<sha>\w+)", "store"),
        ("POST", r"/verify/(?P<sha>\w+)", "verify"),
        ("GET", r"/store/(?P<sha>\w+)", "download"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def user(self) -> str | None:
        """Who asks; nobody without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            raise Problem(401, "", "Invalid user token.")
        return USER if token else None

    def repository(self, repo: str, write: bool = False) -> Repository:
        user = self.user()
        found = self.server.repositories.get(repo)
        if found is None or (user is None and (found.private or write)):
            raise Problem(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and repo.partition("/")[0] != user:
            raise Problem(403, "", "You don't have the rights to write to this repository")
        return found

    def revision(self, repo: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self.repository(repo)
        sha = repository.find(revision)
        if sha is None:
            raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def whoami(self) -> None:
        if self.user() is None:
            raise Problem(401, "", "Invalid username or password.")
        self.answer({"type": "user", "name": USER})

    def create(self) -> None:
        asked, user = json.loads(self.body()), self.user()
        if user is None:
            raise Problem(401, "", "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise Problem(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{asked['name']}"
        if repo in self.server.repositories:
            self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, 409)
            return
        self.server.repositories[repo] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        self.answer({"url": f"{self.server.url}/{repo}", "name": repo})

    def validate_yaml(self) -> None:
        card = json.loads(self.body())["content"]
        errors = [] if card.startswith("---\n") else [{"message": "the card must start with metadata"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo: str, branch: str) -> None:
        self.body()
        repository = self.repository(repo, write=True)
        if branch in repository.branches:
            raise Problem(409, "", f"Reference already exists: {branch}")
        repository.branches[branch] = repository.branches["main"]
        self.answer({})

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        present = self.repository(repo, write=True)
        files = present.commits[present.find(revision)]
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                        "shouldIgnore": False,
                        "oid": files[file["path"]].oid if file["path"] in files else None,
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, repo: str) -> None:
        asked = json.loads(self.body())
        self.repository(repo, write=True)
        objects = []
        for wanted in asked["objects"]:
            sha = wanted["oid"]
            links = {
                name: {"href": f"{self.server.url}/{path}/{sha}"}
                for name, path in (("upload", "store"), ("verify", "verify"))
            }
            objects.append(wanted if sha in self.server.stored else {**wanted, "actions": links})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, sha: str) -> None:
        length = int(self.headers["Content-Length"])
        with self.server.lock:
            breaks = self.server.uploads_left == 0
            if self.server.uploads_left:
                self.server.uploads_left -= 1
        if breaks:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == sha
        self.server.stored[sha] = content
        self.server.uploads.append(sha)
        self.answer({})

    def verify(self, sha: str) -> None:
        asked = json.loads(self.body())
        self.user()
        if len(self.server.stored.get(sha, b"")) != asked["size"]:
            raise Problem(422, "", "the file is not complete")
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repository = self.repository(repo, write=True)
        files = dict(repository.commits[repository.find(revision)])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Problem(400, "", f"{value['path']} has not been uploaded")
                files[value["path"]] = Blob(self.server.stored[value["oid"]], value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def info(self, repo: str, revision: str = "main") -> None:
        sha, files = self.revision(repo, revision)
        private = self.server.repositories[repo].private
        siblings = [{"rfilename": path} for path in files]
        self.answer({"_id": "1", "id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self.revision(repo, revision)
        self.answer([blob.describe(path) for path, blob in files.items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.revision(repo, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise Problem(404, "EntryNotFound", "Entry not found", **headers)
        blob = files[path]
        if blob.sha256 is None:
            self.answer(blob.content, 200, {**headers, "ETag": f'"{blob.oid}"'})
            return
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        # Another host, as the real store is: the client follows redirects of the Hub itself without a second look.
        self.answer(
            b"", 302, {**headers, "Location": f"http://localhost:{self.server.server_port}/store/{blob.sha256}"}
        )

    def download(self, sha: str) -> None:
        content, asked = self.server.stored[sha], self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        headers = {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        with self.server.lock:
            breaks = self.server.broken_downloads > 0 and self.command == "GET"
            self.server.broken_downloads -= breaks
        if breaks:
            self.send_response(206 if asked else 200)
            for name, value in {**headers, "Content-Length": str(len(rest))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.answer(rest, 206 if asked else 200, headers)
