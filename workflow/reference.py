"""Write config/schema.json and the reference in config/README.md, as of the settings classes.

Run it in the project's folder after changing a setting; a test notices drift.
"""

from evopress.workflow.reference import write_reference
from studies.run import StudiedSettings

if __name__ == "__main__":
    write_reference(StudiedSettings)
