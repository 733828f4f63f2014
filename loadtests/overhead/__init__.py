"""What the gateway costs on top of its upstream, beside nginx doing the same: `python -m loadtests.overhead`."""
