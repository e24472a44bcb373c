"""What the tools calculate with the factors of LoRAs: sums, ranks, differences. No model is needed."""
