"""`python -m bench`: see `bench.cli`."""

import sys

try:
    from bench.cli import main
except (ImportError, AttributeError) as error:  # the latter of a package that is too old
    from bench.installed import missing

    if not (there_is_none_of := missing()):
        raise
    sys.stderr.write(f"bench: {error}; missing here: {', '.join(there_is_none_of)}: install them with pip\n")
    sys.exit(2)

main()
