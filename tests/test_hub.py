"""A model of the hub is a folder: fetched from a server on this machine that speaks as the hub
does; and each thing that goes wrong is one line."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest
import torch

from data.common import UserError
from data.llama import find
from model import GPT
from tests.tiny import tiny_llama_folder, tiny_model, tokens

SHA = "0123456789" * 4
REPO = "someone/tiny.llama"
GATED = {"X-Error-Code": "GatedRepo"}


class Hub(BaseHTTPRequestHandler):
    """Serves `folder` as REPO. `trouble`: an HTTP status for all, or "cut": weights end early."""
    folder, trouble, asked = None, None, []

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path.split("/")[-1])
        if isinstance(self.trouble, int):
            return self.answer(self.trouble, b"", {403: GATED}.get(self.trouble, {}))
        if REPO not in path:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if "no-such" in path:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        if "/resolve/" in path:
            content, name = files[path.split("/")[-1]], path.split("/")[-1]
            return self.answer(200, content, {"X-Repo-Commit": SHA, "ETag": f'"{name}"'})
        if "/tree/" in path:
            listed = [{"type": "file", "path": name, "size": len(content), "oid": name}
                      for name, content in files.items()]
        else:
            listed = {"id": REPO, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
        self.answer(200, json.dumps(listed).encode(), {})

    do_HEAD = do_GET

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.trouble == "cut" and len(content) > 9999:
            content = content[:-5000]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; its cache is empty, and nobody waits before another try."""
    handler = type("Handler", (Hub,), {"folder": tiny_llama_folder(tmp_path / "served"),
                                       "asked": []})
    (handler.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)  # as HF_ENDPOINT does before the import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def same_as_tiny(gpt):
    idx = tokens(1, 10)
    return torch.equal(gpt(idx)[0], tiny_model()(idx)[0])


@pytest.mark.parametrize("name", [REPO, f"{REPO}@main"])
def test_a_model_is_fetched_once_and_no_pickle(hub, capsys, monkeypatch, name):
    assert same_as_tiny(GPT.from_llama(name))
    assert "0.00 GB to fetch from http://127" in capsys.readouterr().err
    assert "pytorch_model.bin" not in hub.asked
    assert same_as_tiny(GPT.from_llama(name))
    assert "to fetch" not in capsys.readouterr().err
    offline(monkeypatch)
    assert same_as_tiny(GPT.from_llama(name))


def told(name) -> str:
    with pytest.raises(UserError) as error:
        find(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("trouble, name, words", [
    (401, REPO, "wants a token"),
    (403, REPO, "wants your agreement"),
    (500, REPO, "the hub is not reached"),
    ("cut", REPO, "try again, which goes on where it stopped"),
    (None, f"{REPO}@no-such", "no revision no-such"),
    (None, "out/softmaxx", "is no folder here, and: the hub has no such model"),
])
def test_what_goes_wrong_is_one_line(hub, trouble, name, words):
    hub.trouble = trouble
    assert words in told(name)


def test_offline_without_the_cache(hub, monkeypatch):
    offline(monkeypatch)
    assert "the hub is not reached" in told(REPO)


def test_offline_with_half_of_it_in_the_cache(hub, monkeypatch):
    hub.trouble = "cut"
    told(REPO)
    offline(monkeypatch)
    assert "has not all of it" in told(REPO)


# ---------------------------------------------------------------- wrong things given as FOLDER

def test_a_home_folder_in_quotes_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = tiny_llama_folder(tmp_path / "tiny")
    assert find("~/tiny") == folder


@pytest.mark.parametrize("given, words", [
    ("model.gguf", "is a file; give a folder"),
    ("models--x--y", "give models--x--y/snapshots/1"),
    ("above", "give above/tiny"),
    ("empty", "the folder that holds it"),
    ("run", "give it without --llama"),
    ("not/there/at/all", "is not there"),
    ("nowhere", "is not there"),
])
def test_what_is_no_folder_of_a_llama_gets_a_hint(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    tiny_llama_folder(tmp_path / "models--x--y/snapshots/1")
    tiny_llama_folder(tmp_path / "above/tiny")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.pt").touch()
    assert words in told(given)
