"""What a job will cost, from a survey of its prompts."""
