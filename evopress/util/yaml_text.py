"""Settings as YAML that is pleasant to read."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Safe YAML with lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def to_yaml(values: dict[str, Any], *, sort: bool = False) -> str:
    """Text of ``values`` (plain JSON types), in their order or sorted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=sort, allow_unicode=True, width=100)
