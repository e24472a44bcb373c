"""The best checkpoint of a run by one of its measures, and stopping when it gets no better."""
