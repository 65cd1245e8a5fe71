"""What `benchmarks/hostile.py` feeds to the product: content that would take more than it may."""
