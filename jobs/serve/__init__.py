"""OpenAI's Files and Batches over run folders: `moebeam serve`. A batch becomes a run."""
