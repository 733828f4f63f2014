"""The tokens of one request, as the engine counts them."""

import msgspec


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + (self.completion_tokens or 0)
