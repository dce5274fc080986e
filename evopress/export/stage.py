"""The export stage: what a search has chosen, as an exporter writes it."""

import json

from evopress.artifacts.atomic import atomic_folder
from evopress.artifacts.exports import file_digests, write_export_manifest
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import settings_of
from evopress.config.context import StageContext
from evopress.export.base import ExportContext, Exporter
from evopress.search.base import Polish
from evopress.util.progress import log


def run_export(context: StageContext, search: str, exporter: Exporter, polish: Polish = "none") -> None:
    """Write the folder of an export, and then its manifest.

    Where ``polish`` is not `none`, what was chosen is taken as the polish has made it.

    The model card is written by `evopress.export.card.write_card`, once the model has been measured.

    Raises:
        ArtifactError: the configuration or a variant is missing, damaged or of another model, or the folder cannot be
            written.
        ModelError: the dense checkpoint is damaged.
        UnsupportedArchitectureError: the exporter cannot write a model like this one.
    """
    run, name = context.run, exporter.exporter
    own = ExportContext(run, context.compute, context.trust_remote_code, context.key, polished=polish != "none")
    fingerprint = read_model_fingerprint(run)
    with atomic_folder(run.export(search, name)) as folder:
        exporter.write(own, search, folder)
        files = file_digests(folder)
        run.export_manifest(search, name).unlink(missing_ok=True)  # that of what is about to be replaced
    settings = {**settings_of(run.configuration(search)), "polish": polish, **exporter.model_dump(mode="json")}
    write_export_manifest(run, search, name, files, Provenance("export", json.dumps(settings), fingerprint))
    log.info("%s: %.1f MB", run.export(search, name), sum(int(facts["bytes"]) for facts in files.values()) / 1e6)
