"""Uploading an export: to a stand-in for the hub over a real connection, and what is refused before."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from finished_run import FINGERPRINT, make_results
from huggingface_hub import HfApi

from evopress.artifacts.exports import file_digests, write_export_manifest
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.cli.commands import main
from evopress.export.push import prepare_upload, push
from evopress.util.errors import ArtifactError, ConfigError, DamagedError

WEIGHTS = bytes(range(256)) * 8


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks of it."""

    repositories: ClassVar[dict[str, dict]] = {}
    commits: ClassVar[list[dict[str, bytes]]] = []
    status: ClassVar[int] = 200

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        if self.headers["Authorization"] != "Bearer hf_ours" or self.status != 200:
            self._answer({"error": "Unauthorized"}, 401 if self.status == 200 else self.status)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.repositories[f"{asked['organization']}/{asked['name']}"] = asked
            self._answer({"url": f"http://{self.headers['Host']}/ours/tiny"})
        elif self.path == "/api/validate-yaml":
            bad = "license: 7" in json.loads(body)["content"]
            self._answer({"errors": [{"message": "license must be a string"}]} if bad else {}, 400 if bad else 200)
        elif self.path == "/api/models/ours/tiny/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif self.path == "/api/models/ours/tiny/commit/main":
            files = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            self._answer({"commitUrl": f"http://{self.headers['Host']}/ours/tiny/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        """Nothing else is known."""
        self._answer({"error": self.path}, 404)

    def _answer(self, content: object, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    for name, value in {"repositories": {}, "commits": [], "status": 200}.items():
        monkeypatch.setattr(Hub, name, value)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_ours")
    server.shutdown()
    server.server_close()


@pytest.fixture
def results(tmp_path: Path) -> Run:
    """A run with a finished export, its card, and a file that is none of its own."""
    run = make_results(tmp_path)
    folder = run.export("evo", "gguf")
    folder.mkdir(parents=True)
    (folder / "evo.gguf").write_bytes(WEIGHTS)
    (folder / "LICENSE").write_text("terms")
    write_export_manifest(run, "evo", "gguf", file_digests(folder), Provenance("export", "{}", FINGERPRINT))
    (folder / "README.md").write_text("the card")
    (folder / "notes.txt").write_text("mine")
    return run


ARGUMENTS = ["evo", "gguf", "--repo", "ours/tiny"]


def test_an_export_and_its_card_arrive_in_one_commit(results: Run, hub: HfApi) -> None:
    address = push(prepare_upload(results, "evo", "gguf"), "ours/tiny", hub, private=True)
    assert address == f"{hub.endpoint}/ours/tiny/commit/1"
    assert Hub.repositories["ours/tiny"]["visibility"] == "private"
    assert Hub.commits == [{"evo.gguf": WEIGHTS, "LICENSE": b"terms", "README.md": b"the card"}]


def test_the_picture_that_a_card_shows_goes_with_it(results: Run) -> None:
    (results.export("evo", "gguf") / "levels.png").write_bytes(b"picture")
    assert prepare_upload(results, "evo", "gguf").files["levels.png"] == 7


def test_a_dry_run_lists_files_and_sizes_and_asks_the_hub_nothing(
    results: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    assert main(["push", str(results.root), *ARGUMENTS, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["LICENSE", "evo.gguf", "README.md"]
    assert lines[3] == "0.0 MB in 3 files would go to ours/tiny"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: run.export_manifest("evo", "gguf").unlink(), "missing; run the stage that writes it"),
        (lambda run: (run.export("evo", "gguf") / "evo.gguf").write_bytes(WEIGHTS[::-1]), "differs from its checksum"),
        (lambda run: (run.export("evo", "gguf") / "LICENSE").unlink(), "missing"),
        (lambda run: run.card("evo", "gguf").unlink(), "which writes the model card"),
    ],
)
def test_what_is_unfinished_or_damaged_is_refused(
    results: Run, capsys: pytest.CaptureFixture[str], spoil: object, said: str
) -> None:
    spoil(results)  # type: ignore[operator]
    assert main(["push", str(results.root), *ARGUMENTS, "--dry-run"]) == 1
    assert said in capsys.readouterr().err


def test_an_archive_has_no_card_and_is_refused(results: Run) -> None:
    folder = results.export("evo", "archive")
    folder.mkdir()
    (folder / "archive.safetensors").write_bytes(WEIGHTS)
    write_export_manifest(results, "evo", "archive", file_digests(folder), Provenance("export", "{}", FINGERPRINT))
    with pytest.raises(ArtifactError, match="archive has no model card, which the hub needs; push another export"):
        prepare_upload(results, "evo", "archive")


def test_changed_weights_are_found_though_their_size_is_the_same(results: Run) -> None:
    folder = results.export("evo", "gguf")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    write_export_manifest(results, "evo", "gguf", file_digests(folder), Provenance("export", "{}", FINGERPRINT))
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(DamagedError, match="differs from its checksum"):
        prepare_upload(results, "evo", "gguf")


def test_a_hub_that_refuses_or_is_away_is_one_line(results: Run, hub: HfApi) -> None:
    upload = prepare_upload(results, "evo", "gguf")
    with pytest.raises(ConfigError, match=r"ours/tiny: the hub refuses it .*hf auth login"):
        push(upload, "ours/tiny", HfApi(endpoint=hub.endpoint, token="hf_other"))
    with pytest.raises(ConfigError, match=r"ours/tiny: cannot be uploaded .* check the network"):
        push(upload, "ours/tiny", HfApi(endpoint="http://127.0.0.1:9", token="hf_ours"))
    (upload.folder / "README.md").write_text("---\nlicense: 7\n---\n")
    with pytest.raises(ConfigError, match=r"ours/tiny: the hub refuses the card .*license must be a string"):
        push(upload, "ours/tiny", hub)
    assert Hub.commits == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../tiny", "ours/ti ny"])
def test_a_name_that_no_repository_has_is_refused(results: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["push", str(results.root), "evo", "gguf", "--repo", name]) == 1
    assert "is no repository of the hub" in capsys.readouterr().err
