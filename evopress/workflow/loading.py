"""Settings from files: overlays, one after the other, over the embedded default."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from evopress.util.errors import ConfigError
from evopress.workflow.settings import Settings, lay_over

DEFAULT = Path("config/config.yaml")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error: all but the last would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Look at what is written, before `<<` merges in what may well be overridden."""
        node = super().compose_mapping_node(anchor)
        written: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.value in written:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice; keep one of them")
            written.add(str(key.value))
        return node


def load_settings(paths: Sequence[Path]) -> Settings:
    """Settings of files that are laid over the default.

    Raises:
        ConfigError: a file is missing or no YAML, or the settings are wrong.
    """
    return Settings.load(combined(map(read_yaml, paths)))


def combined(overlays: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay overlays over one another, and over the default unless they say that they are complete.

    Raises:
        ConfigError: the default is missing.
    """
    values: dict[str, Any] = {}
    for overlay in overlays:
        values = lay_over(values, overlay)
    return values if values.get("complete") else lay_over(read_yaml(DEFAULT), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings in a file.

    Raises:
        ConfigError: it is missing, or no mapping in YAML.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; check the path, or start in the project's folder") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings (a mapping in YAML)")
    return values
