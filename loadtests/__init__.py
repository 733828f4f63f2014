"""Load tests of a running Tailor: they speak HTTP only, and import nothing of what they measure."""
