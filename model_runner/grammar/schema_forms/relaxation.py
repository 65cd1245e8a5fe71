"""What a grammar leaves to validation; see `moebeam.model_runner.grammar.json_grammar`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Relaxation:
    """A keyword of a schema that a grammar does not enforce, or not fully.

    Attributes:
        pointer: JSON pointer (RFC 6901) to the schema that holds the keyword; empty for the root.
        keyword: as the schema spells it.
        reason: one sentence, without the schema's own values.
    """

    pointer: str
    keyword: str
    reason: str

    def __str__(self) -> str:
        return f"{self.keyword} at {self.pointer or 'the root'}: {self.reason}"
