"""The gateway."""

from gateway import compiled

compiled.use()
