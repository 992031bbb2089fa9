"""A Hugging Face Hub on the loopback device: real HTTP, driven by the real huggingface_hub, kept in memory.

    with FakeHub() as hub:
        subprocess.run([...], env=hub.environment(tmp_path))
        assert hub.commits("user/name")[0]["files"]["README.md"] == b"..."

huggingface_hub reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, so a client belongs into a subprocess
started with `environment`. Xet's chunk protocol is not spoken here: with HF_HUB_DISABLE_XET=1 the client uses LFS.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

# Made up, one of each kind that the Hub gives out. The fine-grained one may read repositories, not write them.
WRITER, READER, FINE_GRAINED = (f"hf_{name * 4}" for name in ("CanaryWriter", "CanaryReader", "CanaryScoped"))
LFS = (".safetensors", ".bin", ".png", ".parquet")
RESET, LOSE_ANSWER = "reset", "lose answer"  # cut half-way through the request; do the work, then cut


@dataclass
class Repo:
    private: bool
    commits: list[dict] = field(default_factory=list)  # oldest first: {"oid": ..., "files": {path: bytes}}
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS contents by SHA-256, committed or not

    def commit(self, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append({"oid": oid, "files": files})
        return oid

    def at(self, revision: str | None) -> dict:
        return next((commit for commit in self.commits if commit["oid"] == revision), self.commits[-1])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]["files"]


def blob_oid(path: str, content: bytes) -> str:  # SHA-256 for LFS files, git's own SHA-1 for others
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# As the Hub's documentation gives them (huggingface.co/docs/hub: model-cards, repositories-licenses; modelcard.md of
# hub-docs): what its own check says of anything else nobody here can know.
REPO_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?")
LICENCES = set("apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gemma".split())
LICENCES |= {"odc-by", "other", "unknown"}
STRINGS = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")


def problems_of_card(content: str, kind: str) -> list[str]:
    """What is wrong with the YAML at the head of a card; stands in for the Hub's own check of it."""
    head = re.match(r"---\r?\n(.*?\n)---\r?\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    if kind != "model":
        return []
    found = [f'"{name}" must be a string' for name in STRINGS if not isinstance(data.get(name, ""), str)]
    found += [] if data.get("license", "other") in LICENCES else [f'"license" {data["license"]!r} is not known']
    named = re.fullmatch(r"[a-z0-9-.]+", str(data.get("license_name", "a")))
    found += [] if named else ['"license_name" must be lower case letters, digits, - and .']
    linked = re.fullmatch(r"LICENSE(\.md)?|https?://\S+", str(data.get("license_link", "LICENSE")))
    found += [] if linked else ['"license_link" must be LICENSE, LICENSE.md, or a URL']
    for name in ("base_model", "datasets", "tags"):
        values = data.get(name, [])
        values = [values] if isinstance(values, str) and name == "base_model" else values
        good = re.compile(r"\S.*") if name == "tags" else REPO_ID
        if not isinstance(values, list) or not all(isinstance(one, str) and good.fullmatch(one) for one in values):
            found.append(f'"{name}" must be a list of names, not {data[name]!r}')
    relations = ("finetune", "adapter", "merge", "quantized")
    if "base_model_relation" in data and (data["base_model_relation"] not in relations or "base_model" not in data):
        found.append(f'"base_model_relation" must be one of {relations}, beside a base_model')
    if "model-index" in data:
        from huggingface_hub.repocard_data import model_index_to_eval_results  # as late as clients are started

        try:
            model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            found.append(f'"model-index" is not one: {error!r}')
    return found


class FakeHub:
    def __init__(self) -> None:
        self.users = {
            WRITER: {"name": "user", "role": "write", "orgs": {"team": "write", "readers": "read"}},
            READER: {"name": "user", "role": "read", "orgs": {}},
            FINE_GRAINED: {"name": "user", "role": "fineGrained", "orgs": {}},
        }
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path), in order of arrival
        self.faults: list[dict] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """The variables of this process, but with this Hub, this token, and `home` for whatever the Hub stores."""
        others = re.compile("HF_|HUGGING|TRANSFORMERS_OFFLINE|(http|https|all)_proxy", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not others.match(name)}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        kept |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")}
        return kept | ({"HF_TOKEN": token} if token else {})

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {}))
        return repo

    def commits(self, repo_id: str) -> list[dict]:
        """What was pushed, oldest first, without the commit that comes with every new repository."""
        return self.repos[repo_id].commits[1:] if repo_id in self.repos else []

    def count(self, method: str, path_part: str) -> int:
        return sum(asked == method and path_part in path for asked, path in self.requests)

    def fail_next(self, path_part: str, status: int | str, times: int = 1, message: str = "injected") -> None:
        """For the next `times` requests whose path holds `path_part`; `{token}` in a message repeats the client's."""
        self.faults.append({"part": path_part, "status": status, "times": times, "message": message})


class HubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def handle_any(self) -> None:
        self.plain_path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.users.get(token)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.plain_path))
            due = [fault for fault in self.hub.faults if fault["times"] and fault["part"] in self.plain_path]
            fault = due[0] if due else {"times": 0, "status": None, "message": ""}
            fault["times"] -= 1
        self.answer_is_lost = fault["status"] == LOSE_ANSWER
        if fault["status"] == RESET:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.cut()
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(fault["status"], int):
            return self.refuse(fault["status"], fault["message"].format(token=token))
        with self.hub.lock:
            self.route()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self) -> None:
        patterns = {
            r"(/api/whoami-v2)": self.whoami,
            r"(/api/repos/create)": self.create,
            r"(/api/validate-yaml)": self.validate,
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?": self.repo_api,
            r"(?:/datasets)?/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)": self.lfs_batch,
            r"/([^/]+/[^/]+)/lfs/(\w+)(/verify)?": self.lfs_object,
            r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
        }
        for pattern, handler in patterns.items():
            if match := re.fullmatch(pattern, self.plain_path):
                repo = self.hub.repos.get(match[1])
                # LFS contents have signed addresses at the true Hub, which need no token.
                hidden = repo is None or (repo.private and not self.user and handler != self.lfs_object)
                if hidden and not match[1].startswith("/api/"):
                    return self.refuse(404, "Repository not found", X_Error_Code="RepoNotFound")
                return handler(repo, *match.groups())
        self.refuse(404, f"nothing at {self.plain_path}")

    def may_write(self, repo_id: str) -> bool:
        user = self.user or {"role": None}
        return user["role"] == "write" and {user["name"]: "write", **user["orgs"]}.get(repo_id.split("/")[0]) == "write"

    def whoami(self, *_: object) -> None:
        if not self.user:
            return self.refuse(401, "Invalid credentials in Authorization header")
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.user["orgs"].items()]
        access = {"accessToken": {"role": self.user["role"]}}
        self.reply({"type": "user", "name": self.user["name"], "orgs": orgs, "auth": access})

    def validate(self, *_: object) -> None:
        asked = json.loads(self.body)
        errors = [{"message": problem} for problem in problems_of_card(asked["content"], asked["repoType"])]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, *_: object) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or (self.user or {}).get('name')}/{asked['name']}"
        if not self.may_write(repo_id):
            return self.refuse(403 if self.user else 401, f"You don't have the rights to create {repo_id}")
        answer = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repos:
            return self.reply(answer, 409)
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private")
        self.reply(answer)

    def repo_api(self, repo: Repo, repo_id: str, verb: str | None, rest: str | None) -> None:
        writes = verb in ("commit", "preupload", "settings") or (verb, rest) == ("auth-check", "write")
        if writes and not self.may_write(repo_id):
            return self.refuse(403 if self.user else 401, f"You don't have write access to {repo_id}")
        repo.private = json.loads(self.body)["visibility"] == "private" if verb == "settings" else repo.private
        if verb in (None, "revision", "auth-check", "settings"):
            info = {"id": repo_id, "sha": repo.at(rest)["oid"], "private": repo.private, "tags": []}
            return self.reply(info | {"siblings": [{"rfilename": path} for path in repo.files]})
        if verb == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.at("main")["oid"]}
            return self.reply({"branches": [main], "tags": [], "converts": []})
        if verb == "preupload":
            answer = json.loads(self.body)
            for item in answer["files"]:
                path = item["path"]
                item |= {"uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False}
                item["oid"] = blob_oid(path, repo.files[path]) if path in repo.files else None
            return self.reply(answer)
        if verb == "commit":
            return self.take_commit(repo, repo_id)
        if verb == "tree":
            return self.tree(repo, *rest.partition("/")[::2])
        return self.refuse(404, f"no such call: {verb}")

    def tree(self, repo: Repo, revision: str, folder: str) -> None:
        entries: dict[str, dict] = {}
        flat = "recursive=true" not in self.path.lower()
        for path, content in repo.at(revision)["files"].items():
            inside = folder and f"{folder}/"
            name, *below = path.removeprefix(inside).split("/")
            if path.startswith(inside) and below and flat:
                entries[name] = {"type": "directory", "path": inside + name, "size": 0, "oid": "0" * 40}
            elif path.startswith(inside):
                oid, size = blob_oid(path, content), len(content)
                lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if path.endswith(LFS) else {}
                entries[path] = {"type": "file", "path": path, "size": size, "oid": oid[:40], **lfs}
        if not entries:
            return self.refuse(404, "no such folder", X_Error_Code="EntryNotFound")
        self.reply([*entries.values()])

    def take_commit(self, repo: Repo, repo_id: str) -> None:
        files = dict(repo.files)
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in repo.blobs:
                files[value["path"]] = repo.blobs[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key != "header":
                return self.refuse(400, f"cannot commit {key} {value}")
        oid = repo.commit(files)
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def lfs_batch(self, repo: Repo, repo_id: str, _: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            href = f"{self.hub.url}/{repo_id}/lfs/{item['oid']}"
            if item["oid"] not in repo.blobs:  # what is here already is not asked for again
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_object(self, repo: Repo, _: str, oid: str, verify: str | None) -> None:
        if not verify and hashlib.sha256(self.body).hexdigest() == oid:
            repo.blobs[oid] = self.body
        self.reply({}) if oid in repo.blobs else self.refuse(400, "the content does not have this hash")

    def resolve(self, repo: Repo, _: str, revision: str, path: str) -> None:
        commit = repo.at(revision)
        if path not in commit["files"]:
            return self.refuse(404, "no such file", X_Error_Code="EntryNotFound", X_Repo_Commit=commit["oid"])
        content = commit["files"][path]
        headers = {"ETag": f'"{blob_oid(path, content)}"', "X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))} if path.endswith(LFS) else {}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers)
        self.send(200, content, headers)

    def reply(self, answer: object, status: int = 200) -> None:
        self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()} | {"X-Error-Message": message}
        self.send(status, json.dumps({"error": message}).encode(), named | {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.answer_is_lost:
            return self.cut()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:  # by a TCP reset, as a failing network does
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
