"""A replica without a model: vLLM's dialect and scheduling, in plain Python."""
