"""Everything that is worth knowing of a GPU, in runs of a few minutes: a conductor of commands that exist."""
