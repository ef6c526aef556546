"""What happens inside the one process of a case. `python -m bench.engine FOLDER` is that process."""
