import os

import hypothesis

# Tests side by side have a core each. Two threads a test, which wait for each other at every operation, took a quarter
# longer.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A commit is judged by the same examples each time; `--hypothesis-profile explore` looks for new ones. No deadline: a
# shared machine is now and then slow, and the tests that bound a time say so themselves.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("same")
