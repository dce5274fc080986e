"""What is started from a command line: the commands of `evopress` and the scripts of the workflow."""
