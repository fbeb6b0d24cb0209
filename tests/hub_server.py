"""A small Hugging Face Hub on loopback, for the real client: repositories with commits, branches, access tokens and
LFS.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKENS = {"hf_user": ("user", "write"), "hf_reader": ("reader", "read"), "hf_other": ("other", "write")}
SHA = re.compile(r"[0-9a-f]{40}")


@dataclass
class Repo:
    """`commits` from commit id to files, `refs` from branch or pull request to commit id."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]

    def commit(self, files: dict[str, bytes], ref: str, message: str = "") -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = files, message, oid
        return oid


class HubServer(ThreadingHTTPServer):
    """Serves on a free port from the moment it is made.

    `dies_at`: once a request's path contains this, no request is answered any more. `requests`: method and path of
    all.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.dies_at: str | None = None
        self.dead = False

    def add(self, repo_id: str, folder, **options) -> Repo:
        """A repository with the files of a folder."""
        self.repos[repo_id] = repo = Repo(**options)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        repo.commit(files, "main", "first")
        return repo


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: dict | None = None):
        self.status, self.body = status, body or ({"error": message} if message else {})
        self.headers = {k: v for k, v in {"X-Error-Code": code, "X-Error-Message": message}.items() if v}


NO_REPO = Refused(401, "RepoNotFound", "Repository not found")


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.requests.append(f"{self.command} {url.path}")
        if hub.dead or (hub.dies_at is not None and hub.dies_at in url.path):
            hub.dead = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        try:
            result, headers = self.route(body)
        except Refused as refused:
            return self.send(json.dumps(refused.body).encode(), refused.status, refused.headers)
        self.send(result if isinstance(result, bytes) else json.dumps(result).encode(), 200, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, body: bytes, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass

    def route(self, body: bytes):
        match self.command, self.parts:
            case "POST", ["api", "validate-yaml"]:
                return check_card(json.loads(body)["content"]), {}
            case "POST", ["api", "repos", "create"]:
                return self.create(json.loads(body)), {}
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self.repo(
                    f"{owner}/{name.removesuffix('.git')}"
                )  # writing is asked for by the commit, a pull request maybe
                return self.batch(json.loads(body)), {}
            case "PUT", ["lfs", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.server.large[oid] = body
                return {}, {}
            case "POST", ["api", "models", owner, name, action, revision]:
                repo_id = f"{owner}/{name}"
                return self.write(repo_id, self.repo(repo_id, write=True), action, revision, body), {}
            case _, ["api", "models", owner, name, *rest]:
                return self.read(f"{owner}/{name}", self.repo(f"{owner}/{name}"), rest), {}
            case _, [owner, name, "resolve", revision, *path]:
                return self.resolve(self.repo(f"{owner}/{name}"), revision, "/".join(path))
        raise Refused(404, "RepoNotFound")

    def user(self) -> tuple[str | None, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, ""))

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        repo, (user, right) = self.server.repos.get(repo_id), self.user()
        own = user == repo_id.split("/")[0]
        if repo is None or (repo.private and not own):
            raise Refused(404, "RepoNotFound", "Repository not found") if user else NO_REPO
        if write and not (own and right == "write") and "create_pr" not in self.query:
            raise Refused(403, "", f"You don't have the rights to write to {repo_id}")
        return repo

    def create(self, wanted: dict):
        user, right = self.user()
        if user is None:
            raise Refused(401, "", "Invalid username or password")
        owner = wanted.get("organization") or user
        url = {"url": f"{self.server.url}/{owner}/{wanted['name']}"}
        if f"{owner}/{wanted['name']}" in self.server.repos:
            raise Refused(409, "", "You already created this model repo", url)
        if owner != user or right != "write":
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.server.repos[f"{owner}/{wanted['name']}"] = Repo(private)
        repo.commit({}, "main", "initial commit")
        return url

    def batch(self, wanted: dict):
        missing = [o for o in wanted["objects"] if o["oid"] not in self.server.large]
        known = [o for o in wanted["objects"] if o["oid"] in self.server.large]
        sent = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in missing]
        return {"transfer": "basic", "objects": sent + known}

    def write(self, repo_id: str, repo: Repo, action: str, revision: str, body: bytes):
        if action == "branch":
            if revision in repo.refs:
                raise Refused(409, "", "Reference already exists")
            repo.refs[revision] = repo.refs["main"]
            return {}
        if revision not in repo.refs:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = ["lfs" if f["path"].endswith(".safetensors") else "regular" for f in files]
            return {
                "files": [{"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes)]
            }
        files, message = dict(repo.files(revision)), ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        ref = (
            f"refs/pr/{sum(r.startswith('refs/pr') for r in repo.refs) + 1}" if "create_pr" in self.query else revision
        )
        oid = repo.commit(files, ref, message)
        pull = f"{self.server.url}/{repo_id}/discussions/{ref.rpartition('/')[2]}"
        return {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull}

    def read(self, repo_id: str, repo: Repo, rest: list[str]):
        revision = rest[1] if len(rest) > 1 else "main"
        oid = self.commit_of(repo, revision)
        files = repo.commits[oid]
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            if folder and not any(path.startswith(folder) for path in files):
                raise Refused(404, "EntryNotFound")
            return [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
                if path.startswith(folder)
            ]
        metadata = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), flags=re.DOTALL)
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": repo.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
            "cardData": yaml.safe_load(metadata[1]) if metadata else None,
        }

    def resolve(self, repo: Repo, revision: str, path: str):
        oid = self.commit_of(repo, revision)
        content = repo.commits[oid].get(path)
        if content is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": oid}

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid


def check_card(content: str) -> dict:
    """Refuses what the Hub refuses: metadata that is no YAML, two blocks of it, and base models that are no ids."""
    metadata = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    errors = [] if metadata else ["no metadata"]
    data = yaml.safe_load(metadata[1]) if metadata else {}
    base = data.get("base_model") or []
    for name in [base] if isinstance(base, str) else base:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    if metadata and re.match(r"\s*---\n", content[metadata.end() :]):
        errors.append("two blocks of metadata")
    if errors:
        raise Refused(400, "", errors[0], {"errors": [{"message": e} for e in errors], "warnings": []})
    return {"errors": [], "warnings": []}


HUB = HubServer()  # one for all tests: the client reads its address when it is imported
