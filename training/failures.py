"""Why a run ends without an adapter. No torch here.

TrainingFailed
├── LossNotFinite
├── OutOfMemory
└── QuantizationMissing
"""


class TrainingFailed(Exception):
    """Training cannot give a usable adapter; the message says at which step and why."""


class LossNotFinite(TrainingFailed):
    """The loss or its gradient became NaN or infinite, at `step` (the first is 1)."""

    def __init__(self, step: int, loss: float, what: str = "loss") -> None:
        super().__init__(f"the {what} is {loss} at step {step}: lower the learning rate or look at the data")
        self.step = step


class OutOfMemory(TrainingFailed):
    """The run's step does not fit into memory, even alone."""

    def __init__(self, step: int, tokens: int) -> None:
        super().__init__(
            f"step {step} needs more memory than there is for {tokens} tokens in one pass: lower batch_size (and raise "
            "gradient_accumulation_steps), lower max_length, or turn gradient_checkpointing on"
        )
        self.step = step


class QuantizationMissing(TrainingFailed):
    """The run wants its base in four bits, and the package that does it is not there."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "quantization needs bitsandbytes, which cannot be imported here: install tailor[qlora], or train without "
            f"quantization ({reason})"
        )
