"""What cutting the prefix tree costs: `python -m benchmarks.sharding`, `.plans` and `.torch_prefill`."""
