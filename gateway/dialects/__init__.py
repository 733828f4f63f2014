"""The generation endpoints' dialects; each speaks one API, all go down one hot path under one policy."""

from gateway.dialects.chat import Chat, Completions
from gateway.dialects.counts import CountTokens, InputTokens, Tokenize
from gateway.dialects.dialect import Bounds, Checked, Dialect, Stream
from gateway.dialects.fields import OPT_IN
from gateway.dialects.messages import Messages
from gateway.dialects.responses import Responses

DIALECTS: tuple[type[Dialect], ...] = (Chat, Completions, Responses, Messages, CountTokens, InputTokens, Tokenize)


def all_dialects(bounds: Bounds) -> dict[str, Dialect]:
    """One of each, by the path it answers to."""
    return {kind.path: kind(bounds) for kind in DIALECTS}


__all__ = ["DIALECTS", "OPT_IN", "Bounds", "Checked", "Dialect", "Stream", "all_dialects"]
