import hypothesis

# A shared machine is now and then slow; the tests that bound a time say so themselves.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")
