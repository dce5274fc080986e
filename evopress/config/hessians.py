"""How the Hessians are accumulated."""

from pydantic import Field

from evopress.config.base import Section


class HessianSettings(Section):
    """How the Hessians are accumulated."""

    shards: int = Field(1, ge=1, description="Token shards that run as separate jobs and are then summed.")
    keep: bool = Field(
        True, description="False removes a block's Hessians when all that need them are done; new levels remake them."
    )
