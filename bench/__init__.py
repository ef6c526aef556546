"""The harness: cases in, records out; verdicts, recommendations and pages are read from the records."""
