"""Base against head: what is measured, what the evidence says, and what a build does with it.

`decision` and `proceedings` turn numbers into verdicts and know neither processes nor files, so that `simulation`, the
tests and CI run the very same rule.
"""
