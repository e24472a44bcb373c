"""How the optimizer changes the weights: some of them at a time, during the backward pass, in bf16, with its state in
main memory."""
