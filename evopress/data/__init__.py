"""Text and tokens: where documents come from, and how they become sequences of one length."""
