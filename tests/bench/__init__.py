"""Measurements of parts of the gateway from inside; `make bench-gateway` runs them."""
