"""A hub that is busy, hangs or breaks off, over real connections: patience, and then an error that says what to do."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

COMMIT = "5" * 40
FILES = {"config.json": b'{"num_hidden_layers": 2}', "model.safetensors": b"weights" * 1000}
FETCH = """
from evopress.config.model import HubModel
from evopress.util.errors import EvopressError
from evopress.models import download as hub
hub._WAITS = (0.01, 0.02, 0.03)
try:
    folder, commit = hub.fetch_snapshot(HubModel(source="hub", id="ours/tiny"))
    print(commit, sorted(path.name for path in folder.iterdir()), (folder / "model.safetensors").stat().st_size)
except EvopressError as error:
    print(f"{type(error).__name__}: {error}")
"""
READ = """
import time
time.sleep = lambda seconds: None  # the hub's own client waits, too
from evopress.data import hub
from evopress.util.errors import EvopressError
hub.WAITS = (0.01, 0.02)
try:
    print([row["text"] for row in hub.read_rows(hub.Split("ours/texts", "train", revision="main"))])
except EvopressError as error:
    print(f"{type(error).__name__}: {error}")
"""
COUNT = """
from evopress.config.model import HubModel
from evopress.util.errors import EvopressError
from evopress.models import download as hub
hub._WAITS = (0.01, 0.02, 0.03)
from evopress.models.config_file import count_blocks
try:
    print(count_blocks(HubModel(source="hub", id="ours/tiny")), "blocks")
except EvopressError as error:
    print(f"{type(error).__name__}: {error}")
"""
TASK = """
import sys, time
from pathlib import Path
time.sleep = lambda seconds: None
from evopress.util.errors import EvopressError
from evopress.evaluation import tasks as task_files
folder = Path(sys.argv[1])
(folder / "mine.yaml").write_text("{task: mine, dataset_path: ours/texts, test_split: test, doc_to_text: a,"
    " doc_to_target: b, output_type: loglikelihood}")
try:
    with task_files.task_manager(["mine"], str(folder)) as manager:
        manager.load(["mine"])
except EvopressError as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0])
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as fetching a model asks of it."""

    protocol_version = "HTTP/1.1"
    faults: ClassVar[list[str]] = []
    """What befalls the next requests: "busy", "hangs", "drops" or "breaks"; if "..." is last, all that come, too."""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.asked.append(self.path)
        fault = self.faults[0] if self.faults else ""
        if self.faults and self.faults[-1] != "...":
            self.faults.pop(0)
        if fault == "busy":
            self.reply(503, b"busy")
        elif fault == "hangs":
            time.sleep(3)
            self.close_connection = True
        elif fault == "drops":
            self.close_connection = True
        elif self.path.startswith("/api/models/ours/tiny/revision"):
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": "ours/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith("/api/models/ours/tiny/tree"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "1" * 40} for name, body in FILES.items()]
            self.reply(200, json.dumps(tree).encode())
        elif self.path.startswith("/ours/tiny/resolve/"):
            self.reply(200, FILES[self.path.rsplit("/", 1)[1]], breaks=fault == "breaks")
        else:
            self.reply(404, b"")

    def reply(self, status: int, body: bytes, breaks: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if breaks else body)
        if breaks:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.faults, Hub.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(program: str, hub: str, home: Path, **changes: str) -> str:
    """What a program says whose hub is ours; offline settings of this process do not count."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }
    environment |= {"NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= changes
    done = subprocess.run(
        [sys.executable, "-c", program, str(home)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("faults", [[], ["busy", "busy"], ["hangs"], ["", "", "busy"], ["", "", "", "breaks"]], ids=str)
def test_a_model_comes_once_the_hub_answers(hub: str, tmp_path: Path, faults: list[str]) -> None:
    Hub.faults = [*faults]
    assert ask(FETCH, hub, tmp_path) == f"{COMMIT} ['config.json', 'model.safetensors'] 7000"


@pytest.mark.parametrize("fault", ["busy", "hangs"])
def test_a_hub_that_stays_away_ends_with_an_error(hub: str, tmp_path: Path, fault: str) -> None:
    Hub.faults = [fault, "..."]
    said = ask(FETCH, hub, tmp_path)
    assert said.startswith("ModelError: ours/tiny: the hub did not answer in 4 attempts (")
    assert said.endswith("try again later, or fetch the model elsewhere and give its folder")
    assert len(Hub.asked) >= 4


def test_nobody_listens(tmp_path: Path) -> None:
    assert "ModelError: ours/tiny: the hub did not answer in 4 attempts" in ask(FETCH, "http://127.0.0.1:9", tmp_path)


@pytest.mark.parametrize("fault", ["busy", "drops"])
def test_texts_of_a_hub_that_stays_away(hub: str, tmp_path: Path, fault: str) -> None:
    Hub.faults = [fault, "..."]
    said = ask(READ, hub, tmp_path)
    assert said.startswith("DataError: ours/texts train: the hub did not answer in 3 attempts (")
    assert said.endswith("try again later, or use source: file")


@pytest.mark.parametrize(
    ("faults", "told"), [(["busy", "hangs"], "2 blocks"), (["busy", "..."], "ConfigError: model.")]
)
def test_the_number_of_blocks_comes_once_the_hub_answers(
    hub: str, tmp_path: Path, faults: list[str], told: str
) -> None:
    Hub.faults = [*faults]
    said = ask(COUNT, hub, tmp_path)
    assert said.startswith(told)
    assert "the hub did not answer in 3 attempts" in said or said == told


@pytest.mark.parametrize(
    ("fault", "offline", "told"),
    [
        ("busy", "0", "DataError: evaluation.tasks: the hub did not answer in 3 attempts ("),
        ("", "0", "DataError: evaluation.tasks: cannot be loaded (Couldn't find any data file"),
        ("", "1", "DataError: evaluation.tasks: cannot be loaded (Couldn't reach"),
    ],
)
def test_data_of_tasks_that_do_not_come(hub: str, tmp_path: Path, fault: str, offline: str, told: str) -> None:
    Hub.faults = [fault, "..."] if fault else []
    assert ask(TASK, hub, tmp_path, HF_HUB_OFFLINE=offline).startswith(told)
