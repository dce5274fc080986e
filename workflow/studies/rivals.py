"""Searches of ours at the sizes of the files that llama.cpp's quantizer has made."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evopress.artifacts.atomic import write_text
from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import HUGGINGFACE
from evopress.artifacts.tables import PEERS, PERPLEXITY, read_table
from evopress.config.context import StageContext
from evopress.evaluation.perplexity import evaluate_perplexity
from evopress.export.exporters.gguf import GgufFile
from evopress.export.exporters.huggingface import HuggingFace
from evopress.export.stage import run_export
from evopress.search.base import Strategy
from evopress.search.problem import SearchProblem
from evopress.search.run import open_problem, run_search
from evopress.search.target import SizeTarget
from evopress.util.errors import ConfigError
from evopress.util.progress import log
from studies.paths import peer_path, rival_name, rival_path
from studies.peers import is_smaller, measured_rows, read_measured, write_measured
from studies.settings import PeerSettings


def search_rival(
    context: StageContext, peer: PeerSettings, name: str, search: Strategy, exporter: GgufFile, datasets: Sequence[str]
) -> None:
    """Search at the size of a file of llama.cpp, write what is found as GGUF, and measure it.

    What lies in the run of an earlier start is used: the search goes on from its last round, and is not made again once
    it has ended.

    Args:
        context: of the run.
        peer: the file.
        name: of the search that is copied.
        search: its settings.
        exporter: writes the GGUF file.
        datasets: names of evaluation sets.

    Raises:
        ArtifactError: what is read is missing, damaged or of another model.
        ConfigError: the text and the memory do not allow the search. (A size that no levels meet is no error: nothing
            is compared with that file.)
    """
    run, own = context.run, rival_name(peer.name)
    theirs = read_measured(run, peer_path(run, peer.name)).iloc[0]
    size, embedding = int(theirs["bytes"]), str(theirs["embedding"])
    target = rival_path(run, peer.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    nothing = pd.DataFrame(columns=PEERS.names)
    if not is_smaller(run, size):
        write_measured(run, target, nothing, peer)
        return
    try:
        asked = at_size(search, size, exporter)
        problem = open_problem(run, asked, f"studies.peers.against: {name}")
    except ConfigError as error:
        log.warning("%s: no choice of levels is as small as %.1f MB: %s", peer.name, size / 1e6, error)
        write_measured(run, target, nothing, peer)
        return
    _search(context, own, asked, problem, target.with_suffix(".ended"))
    for form in (HuggingFace(), exporter):
        run_export(context, own, form)
    evaluate_perplexity(context, own, datasets)
    made = sum(path.stat().st_size for path in run.export(own, exporter.exporter).glob("*.gguf"))
    found = read_table(run.perplexity(own), PERPLEXITY)
    write_measured(run, target, measured_rows(found, peer, embedding, name, made), peer)
    run.export_manifest(own, HUGGINGFACE).unlink()  # it has served: a dense model for each of many files
    shutil.rmtree(run.export(own, HUGGINGFACE))


def _search(context: StageContext, name: str, search: Strategy, problem: SearchProblem, ended: Path) -> None:
    """Search, unless the file ``ended`` says that the very same has been done."""
    made_from = [context.key, search.model_dump_json(), *problem.digests, sha256(context.run.tokens("search"))]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    there = ended.exists() and context.run.configuration(name).exists()
    # Without a key nothing tells whether the code of the search is the same.
    if not (context.key and there and ended.read_text() == digest):
        run_search(context, name, search)
        write_text(ended, digest)


def at_size(search: Strategy, size: int, exporter: GgufFile) -> Strategy:
    """Settings of ``search`` with a GGUF file of at most ``size`` bytes for its target."""
    return search.model_copy(update={"target": SizeTarget(bytes=size, file=exporter)})
