"""Renders chats as prompts and parses answers into content, reasoning and calls of tools.

`chat/` holds what all encodings share, `deepseek/` DeepSeek's own; `chat_encoding` picks one for a checkpoint.
"""
