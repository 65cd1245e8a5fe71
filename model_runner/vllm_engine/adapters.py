"""The digest that pins a LoRA adapter, as part of a job's identity."""

import hashlib

from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage


def compute_adapter_revision(folder: str) -> str:
    """SHA-256 (hex) over names and contents of an adapter's configuration and weights.

    Raises:
        EngineLoadError: a file cannot be read.
    """
    total = hashlib.sha256()
    try:
        for name in sorted(storage.list_names(folder)):
            if name.endswith((".json", ".safetensors", ".bin")):
                digest = hashlib.sha256(storage.read_bytes(storage.join(folder, name))).hexdigest()
                total.update(f"{name}\0{digest}\n".encode())
    except OSError as error:
        raise EngineLoadError(f"[model.adapters] {folder}: expected a readable adapter, found: {error}") from error
    return total.hexdigest()
