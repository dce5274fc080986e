"""Experiments that check what the paper claims: a user of the package, with rules in workflow/rules/studies.smk."""
