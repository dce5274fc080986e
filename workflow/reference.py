"""Write config/schema.json, the reference in config/README.md, and docs/artifacts.md, as of the code.

Run it in the project's folder after changing a setting; a test notices drift.
"""

from evopress.workflow.reference import write_reference
from studies.run import StudiedSettings

if __name__ == "__main__":
    write_reference(StudiedSettings)
