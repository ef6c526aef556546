"""From a case to something to ship: the artefact, a manifest, and a program of some thirty lines that serves it."""
