"""The contract between stages: path, schema and atomic read and write of every artifact."""
