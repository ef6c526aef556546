import hypothesis

# A commit is judged by the same examples each time; `--hypothesis-profile explore` looks for new ones. No deadline: a
# shared machine is now and then slow, and the tests that bound a time say so themselves.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("same")
