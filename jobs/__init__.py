"""What a person touches: the command line, job files, the notebook call and the demo."""
