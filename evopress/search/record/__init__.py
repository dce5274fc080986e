"""What a search leaves behind: its trace, its effort, and what it resumes from."""
