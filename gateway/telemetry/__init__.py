"""What the gateway tells of itself: metrics and traces. Ids and numbers only, never prompts, keys or header values."""
