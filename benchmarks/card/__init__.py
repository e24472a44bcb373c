"""What benchmarks/on_a_card.py runs in processes of its own."""
