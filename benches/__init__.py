"""Benchmarks against PEFT and plain torch: ``python -m benches`` lists them."""
