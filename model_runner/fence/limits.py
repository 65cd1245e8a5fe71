"""What a program behind the fence may take for one item, beside the item itself; known on both sides of it."""

MAX_CPU_S = 2.0
MAX_MEMORY_BYTES = 768 << 20
"""Of address space; a prompt of `MAX_PROMPT_CHARACTERS` needs a part of it."""

MAX_PROMPT_CHARACTERS = 32 << 20
