"""What goes into a model and what comes out: chats become prompts, answers become content, reasoning and calls.

Pure text: neither torch nor a tokenizer is needed. One file a family of models; `chat_encoding` picks among them.
"""
