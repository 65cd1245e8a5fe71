"""A call to a provider that ended without a usage: the provider may have worked on it, and may bill it, unsaid.

Carried by completions from remote engines to *account*, which says what such calls cost at most. A record of its own,
since no token count of it is known: nothing of it is ever added to what was billed.
"""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class LostCall:
    """One such call.

    Attributes:
        error_type: how it ended, such as `engine_timeout`.
        started_at: UTC; decides the price.
        prompt_tokens: of the request, as they were counted or estimated here.
        max_output_tokens: most that the provider could have written.
    """

    provider: str
    model: str
    error_type: str
    started_at: datetime
    prompt_tokens: int
    max_output_tokens: int
