"""What providers spell differently in a response: reasons of its end, pieces of tool calls, text in halves, usage."""
