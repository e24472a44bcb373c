"""The run itself: optimiser, schedule, memory, loop, saving. The top floor; imports everything below."""
