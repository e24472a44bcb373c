"""Events of a run: what happens is handed to sinks, such as the record of the run beside its model."""
