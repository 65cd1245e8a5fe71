"""What all sections of a job file have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a job file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
