"""What the adapter store costs, from an upload to the first token: `python -m loadtests.store`."""
