"""What is known of the dense model beside its numbers: name, origin, license."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evopress.artifacts.manifest import damaged, load_manifest
from evopress.artifacts.paths import CARD, Run

INHERITED = ("license", "license_name", "license_link", "language")
"""Keys of the original's model card that hold for a compressed version too."""
BASE = ("base_model", "base_model_relation")
"""Those that say what a GGUF file was made of."""


@dataclass(frozen=True)
class ModelFacts:
    """Name and origin of the dense model."""

    name: str
    origin: str
    """Where it came from, as a line of text."""
    hub_id: str | None = None
    """Repository on the hub, if it came from there."""
    card: dict[str, Any] = field(default_factory=dict)
    """Entries of the original's card that a compressed version inherits."""


def read_model_facts(run: Run) -> ModelFacts:
    """Facts from ``model.json`` and from the original's model card, where it has one.

    Raises:
        ArtifactError: ``model.json`` is missing.
        DamagedError: it is damaged.
    """
    path = run.model_manifest
    manifest = load_manifest(path, "model")
    try:
        source, origin = manifest["source"], manifest.get("origin", {})
        return model_facts({**source, **origin}, read_card(run.model / CARD))
    except (KeyError, TypeError) as error:
        raise damaged(path, repr(error)) from error


def model_facts(source: dict[str, Any], card: dict[str, Any]) -> ModelFacts:
    """Facts from the settings of the source, with what pins it down, and the YAML header of the original's card."""
    inherited = {key: card[key] for key in INHERITED if key in card}
    kind = source.get("source")
    if kind == "hub":
        revision = source.get("commit", source["revision"])
        return ModelFacts(_stem(source["id"]), f"{source['id']} at {revision}", source["id"], inherited)
    size = f", {source['gguf_bytes'] / 1e6:,.1f} MB" if "gguf_bytes" in source else ""
    if kind in ("gguf", "pypi"):
        inherited |= {key: card[key] for key in BASE if key in card}
    if kind == "pypi":
        origin = f"{source['file']} in {source['package']} {source['version']} (PyPI){size}"
        return ModelFacts(_stem(source["file"]), origin, None, inherited)
    return ModelFacts(_stem(source["path"]), f"{kind} {source['path']}{size}", None, inherited)


def read_card(path: Path) -> dict[str, Any]:
    """YAML header of a model card; nothing where there is no card or none that can be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.startswith("---\n"):
            return {}
        header = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}


def relative_link(card: dict[str, Any]) -> str | None:
    """The file beside the card that its `license_link` names; None where that is an address, or missing."""
    link = card.get("license_link")
    if not isinstance(link, str) or "://" in link:
        return None
    return link.removeprefix("./")


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".gguf") or "model"
